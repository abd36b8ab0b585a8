"""Text and speech side by side in one turn: 6:18 chunks, and words with one word of look-ahead.

*Chunks* (the released checkpoint's streaming tasks): up to 6 text ids, up to 18 speech ids, again while text remains,
then the rest of the speech. No marker stands between; the boundary is a count.

*Words* (the mini model): ``delimiter spell(w1) spell(w2) codes(w1) delimiter spell(w3) codes(w2) delimiter ...
codes(wn) delimiter``. The spelled words are given, never chosen, so speech cannot skip or repeat a word; the model
decides how long each lasts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from osum_echat.dialogue.tokens import Tokenizer, encode_fixed

TEXT_CHUNK = 6
SPEECH_CHUNK = 18

_TAG = re.compile(r"<[^<>]*>")


class ImpossibleInterleave(ValueError):
    """Text and speech of one sample cannot be interleaved; a data pipeline drops the sample and counts it."""


@dataclass(frozen=True)
class IdRun:
    """Consecutive ids of one kind. ``supervised`` is False for spelled words, which are given at inference too."""

    kind: Literal["text", "speech"]
    ids: tuple[int, ...]
    supervised: bool = True


def interleave_chunks(text: Sequence[int], speech: Sequence[int], lead: int = 0) -> list[IdRun]:
    """6:18 chunks of ``text`` and ``speech`` (delimiters included in ``speech``).

    Args:
        lead: this many text ids come first without speech between them (the think part of a reply).

    Raises:
        ImpossibleInterleave: fewer speech ids than three for every text id (all text counts, the lead too).
    """
    ratio = SPEECH_CHUNK // TEXT_CHUNK
    if ratio * len(text) > len(speech):
        raise ImpossibleInterleave(f"{len(text)} text ids need at least {ratio * len(text)} speech ids, found {len(speech)}")
    runs = [IdRun("text", tuple(text[:lead]))] if lead else []
    spoken = 0
    for start in range(lead, len(text), TEXT_CHUNK):
        runs.append(IdRun("text", tuple(text[start : start + TEXT_CHUNK])))
        runs.append(IdRun("speech", tuple(speech[spoken : spoken + SPEECH_CHUNK])))
        spoken += SPEECH_CHUNK
    if spoken < len(speech):
        runs.append(IdRun("speech", tuple(speech[spoken:])))
    return [run for run in runs if run.ids]


def split_words(text: str) -> list[str]:
    """Words as speech is aligned to them: what blanks separate, punctuation kept with its word, tags left out."""
    return _TAG.sub(" ", text).split()


def spell(word: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of a word given to the speech part: its characters one by one, then a blank."""
    return tuple(i for character in f"{word} " for i in encode_fixed(tokenizer, character))


def interleave_words(
    words: Sequence[str], lengths: Sequence[int], codes: Sequence[int], delimiter: int, tokenizer: Tokenizer
) -> list[IdRun]:
    """The word form. ``codes``: unified speech ids without delimiters; ``lengths[i]`` of them belong to word i.

    Raises:
        ImpossibleInterleave: no words, or lengths that do not fit the words or the codes.
    """
    if not words or len(words) != len(lengths):
        raise ImpossibleInterleave(f"{len(words)} words but {len(lengths)} word lengths (extra.word_lengths needs one per word)")
    if any(n < 0 for n in lengths) or sum(lengths) != len(codes):
        raise ImpossibleInterleave(f"word lengths must sum to the {len(codes)} speech codes, they sum to {sum(lengths)}")
    runs = [IdRun("speech", (delimiter,)), IdRun("text", spell(words[0], tokenizer), supervised=False)]
    start = 0
    for i, length in enumerate(lengths):
        if i + 1 < len(words):
            runs.append(IdRun("text", spell(words[i + 1], tokenizer), supervised=False))
        runs.append(IdRun("speech", (*codes[start : start + length], delimiter)))
        start += length
    return runs
