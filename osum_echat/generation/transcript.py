"""Joint CTC/attention decoding: the words of a transcript are chosen by the LLM and by the CTC head that heard them.

A small LLM loses its place in a long sentence: it leaves words out or says some again. The CTC head cannot, because its
score of the next id is the probability that the recording goes on with it behind what is written already. At every id
of a transcript the row's scores are

    (1 - w) log p_LLM(id | all before) + w log p_CTC(id | transcript so far)

(Watanabe et al. 2017, "Hybrid CTC/Attention Architecture for End-to-End Speech Recognition"). What ends the transcript
has the probability that the recording ends here. The rest of the row (tags, reply, speech) is the LLM's alone.

P positions of the recording (12.5/s), C classes of the CTC head: text ids and the blank, which is the last; V text ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from osum_echat.dialogue import think
from osum_echat.dialogue.think import ThinkTemplate
from osum_echat.dialogue.tokens import Tokenizer, decode, encode
from osum_echat.dialogue.vocabulary import Vocabulary

_NEVER = -1e30
"""Log-probability of what cannot be; finite, so that differences stay numbers."""
_LEAST = -1e4
"""The least score of an id: none is banned."""


@dataclass(frozen=True)
class Place:
    """Where a transcript stands in a row's text.

    Attributes:
        begin: the text begins with these ids; the transcript follows.
        end: what follows the transcript begins with this character.
    """

    begin: tuple[int, ...] = ()
    end: str = "<"

    @classmethod
    def in_think(cls, template: ThinkTemplate, tokenizer: Tokenizer) -> Place | None:
        """The transcript of a tag think. None for templates that do not begin with it, or whose ids are joined with
        those of the first word."""
        if len(template.parts) < 2 or template.parts[0][1] != "transcript":
            return None
        opening = think.OPEN + template.parts[0][0].rstrip()
        begin = encode(tokenizer, opening)
        if encode(tokenizer, f"{opening} a")[: len(begin)] != begin:
            return None
        return cls(tuple(begin), template.parts[1][0].lstrip()[:1])


class Transcribed(NamedTuple):
    """Where a row writes its transcript, and what the CTC head heard of the recording (log-probabilities)."""

    place: Place
    log_probs_PC: Tensor


class CtcPrefix:
    """Probabilities of what may follow the ids that were taken so far.

    For every position there is the probability of all paths up to it which say just these ids, those that end in a
    label and those that end in a blank.
    """

    def __init__(self, log_probs_PC: Tensor) -> None:
        self._x_PC = log_probs_PC.double().cpu()
        self._blank = self._x_PC.shape[1] - 1
        self._ends_in_label_P = torch.full((len(self._x_PC),), _NEVER, dtype=torch.float64)
        self._blanks_P = self._ends_in_blank_P = self._x_PC[:, self._blank].cumsum(0)
        self._last: int | None = None
        self._so_far = 0.0  # log-probability that the recording begins with the ids taken
        self._following_V = self._follow()

    def next(self) -> tuple[Tensor, float]:
        """log p(id | ids taken) of every text id [V], and of the end. Together they are a distribution."""
        complete = torch.logaddexp(self._ends_in_label_P[-1], self._ends_in_blank_P[-1])
        return self._following_V - self._so_far, float(complete) - self._so_far

    def take(self, token: int) -> None:
        """Put an id behind the others."""
        # Paths that say the ids before, up to the position where this one begins.
        new_P = self._before(token == self._last)
        x_P, blank_P = self._x_PC[:, token].cumsum(0), self._blanks_P
        # r[t] = (r[t-1] + new[t]) x[t] and b[t] = (b[t-1] + r[t-1]) blank[t], in logarithms and without a loop.
        label_P = torch.logcumsumexp(new_P - _shifted(x_P, 0.0), 0) + x_P
        blank_ends_P = torch.logcumsumexp(_shifted(label_P, _NEVER) - _shifted(blank_P, 0.0), 0) + blank_P
        self._ends_in_label_P, self._ends_in_blank_P = label_P.clamp(min=_NEVER), blank_ends_P.clamp(min=_NEVER)
        self._so_far, self._last = float(self._following_V[token]), token
        self._following_V = self._follow()

    def _before(self, repeated: bool) -> Tensor:
        """[P]: paths that say the ids so far and have ended before position t; between two equal labels there must be a
        blank."""
        ended_P = self._ends_in_blank_P if repeated else torch.logaddexp(self._ends_in_label_P, self._ends_in_blank_P)
        return _shifted(ended_P, 0.0 if self._last is None else _NEVER)

    def _follow(self) -> Tensor:
        """[V]: log-probability that the recording begins with the ids so far and each id."""
        following_V = (self._before(False)[:, None] + self._x_PC[:, : self._blank]).logsumexp(0)
        if self._last is not None:
            following_V[self._last] = (self._before(True) + self._x_PC[:, self._last]).logsumexp(0)
        return following_V


class TranscriptRow:
    """The transcript of one row: it reads the row's ids as they come."""

    def __init__(self, place: Place, log_probs_PC: Tensor, ends_V: Tensor) -> None:
        """See `Transcribed`. ``ends_V``: which ids end a transcript (see `ending_ids`)."""
        self._place, self._log_probs_PC, self._ends_V = place, log_probs_PC, ends_V
        self._prefix: CtcPrefix | None = None
        self._read = 0
        self._over = False

    def scores(self, text_ids: Sequence[int]) -> Tensor | None:
        """CTC's score of every id [V] that may follow ``text_ids``, those of the row so far; None outside of the
        transcript."""
        begin = self._place.begin
        while self._read < len(text_ids) and not self._over:
            token, at = text_ids[self._read], self._read
            self._read += 1
            if at < len(begin):
                self._over = token != begin[at]
            elif self._ends_V[token]:
                self._over = True
            else:
                self._known().take(token)
        if self._over or self._read < len(begin):
            return None
        following_V, end = self._known().next()
        return following_V.masked_fill(self._ends_V, end).clamp(min=_LEAST).float()

    def _known(self) -> CtcPrefix:
        if self._prefix is None:
            self._prefix = CtcPrefix(self._log_probs_PC)
        return self._prefix


def ending_ids(tokenizer: Tokenizer, vocab: Vocabulary, end: str) -> Tensor:
    """bool [V]: ids that no transcript holds: the end of the text, and those whose text begins with ``end`` behind
    blanks."""
    ids = range(vocab.text_size)
    return torch.tensor([i == vocab.eos_id or decode(tokenizer, [i]).lstrip().startswith(end) for i in ids])


def _shifted(values_P: Tensor, first: float) -> Tensor:
    """One position later, ``first`` in front."""
    return torch.cat([values_P.new_tensor([first]), values_P[:-1]])
