"""Where the words of a recording begin, by what the CTC head heard."""

from __future__ import annotations

from dataclasses import dataclass

from osum_echat.audio.io import Source
from osum_echat.pipeline.echat import EChat
from osum_echat.rates import POSITIONS_PER_SECOND


@dataclass(frozen=True)
class Word:
    """A word and when it begins, in seconds."""

    text: str
    start: float


def words_of(echat: EChat, wav: Source) -> list[Word]:
    """The words that the CTC head heard, with their beginnings; none for a checkpoint without a CTC head. Needs the
    model's thread."""
    ctc = echat.model.ctc
    if ctc is None:
        return []
    [heard] = echat.hear([wav])
    if heard.ctc_log_probs_NPC is None:
        return []
    best_P = heard.ctc_log_probs_NPC[0].argmax(dim=1).tolist()
    begins = [p for p, label in enumerate(best_P) if label != ctc.blank and (p == 0 or best_P[p - 1] != label)]
    words: list[Word] = []
    for p in begins:
        piece = echat.tokenizer.decode([best_P[p]])
        if piece.startswith(" ") or not words:
            words.append(Word(piece.strip(), p / POSITIONS_PER_SECOND))
        else:
            words[-1] = Word(words[-1].text + piece.strip(), words[-1].start)
    return [word for word in words if word.text]
