"""Guards against what small and sampled models do wrong: loops, silence without end, no age, thinks that never close.

Each is a few tensor operations on the logits of all rows that choose now; none loops over ids. Limits that end
something (speech longer than its text allows, a think that is too long) are counted per row and act by giving the next
id; they live in `phases`.

R rows, V classes of the head (text or speech), W last ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from osum_echat.device import send
from osum_echat.dialogue.tokens import Tokenizer, encode
from osum_echat.dialogue.vocabulary import Vocabulary
from osum_echat.generation.config import AgeGuard, RepetitionGuard, SilenceGuard

BANNED = float("-inf")


def repetition_bans(recent_RW: Tensor, guard: RepetitionGuard) -> Tensor:
    """Which of the last ids may not come next.

    Args:
        recent_RW: last ids as speech codes, oldest first (W >= ``guard.memory``); negative: no code (text, or nothing
            yet).

    Returns:
        bool_RW: True where that id is banned. Nothing is banned after an id that is no speech code.
    """
    code_RW = recent_RW >= 0
    frequent_RW = torch.zeros_like(code_RW)
    for code in guard.frequent_codes:
        frequent_RW |= recent_RW == code
    same_RWW = (recent_RW[:, :, None] == recent_RW[:, None, :]) & code_RW[:, None, :]
    often_RW = same_RWW[:, :, -guard.window :].sum(2) >= guard.count
    often_frequent_RW = same_RWW[:, :, -guard.frequent_window :].sum(2) >= guard.frequent_count
    last_RW = same_RWW[:, :, -1]
    run_R1 = last_RW.flip(1).long().cumprod(1).sum(1, keepdim=True)
    run_limit_RW = torch.where(frequent_RW, guard.frequent_run, guard.run)
    banned_RW = torch.where(frequent_RW, often_frequent_RW, often_RW) | (last_RW & (run_R1 >= run_limit_RW))
    return banned_RW & code_RW & code_RW[:, -1:]


def ban_ids(logits_RV: Tensor, ids_RW: Tensor, banned_RW: Tensor) -> Tensor:
    """Logits with ``ids_RW`` at -inf where ``banned_RW``; ids elsewhere may be anything."""
    penalty_RW = torch.zeros(ids_RW.shape, dtype=logits_RV.dtype, device=logits_RV.device).masked_fill_(banned_RW, BANNED)
    return logits_RV.scatter_add(1, torch.where(banned_RW, ids_RW, 0), penalty_RW)


class Repetition:
    """See `RepetitionGuard`."""

    name = "repetition"

    def __init__(self, guard: RepetitionGuard) -> None:
        self.guard = guard
        self.memory = guard.memory

    def __call__(self, logits_RV: Tensor, recent_RW: Tensor) -> tuple[Tensor, Tensor]:
        """Speech logits and last ids as codes; returns logits and whether it acted on each row."""
        recent_RW = recent_RW[:, -self.memory :]
        banned_RW = repetition_bans(recent_RW, self.guard)
        return ban_ids(logits_RV, recent_RW, banned_RW), banned_RW.any(1)


class Silence:
    """See `SilenceGuard`."""

    name = "silence"

    def __init__(self, guard: SilenceGuard) -> None:
        self.codes = tuple(guard.codes)
        self.memory = guard.longest

    def __call__(self, logits_RV: Tensor, recent_RW: Tensor) -> tuple[Tensor, Tensor]:
        silent_RW = torch.zeros_like(recent_RW, dtype=torch.bool)
        for code in self.codes:
            silent_RW |= recent_RW == code
        acted_R = silent_RW[:, -self.memory :].all(1)
        codes_C = on_device(self.codes, logits_RV.device)
        left_RC = logits_RV[:, codes_C].masked_fill(acted_R[:, None], BANNED)
        return logits_RV.index_copy(1, codes_C, left_RC), acted_R


class AgeChoice:
    """See `AgeGuard`. A row is armed until the guard has acted on it, and each row is looked at by itself."""

    name = "age"

    def __init__(self, trigger_ids: Sequence[int], choice_ids: Sequence[int]) -> None:
        self.trigger_ids = tuple(trigger_ids)
        self.choice_ids = tuple(choice_ids)
        self.memory = len(self.trigger_ids)

    def __call__(self, logits_RV: Tensor, recent_RW: Tensor, armed_R: Tensor) -> tuple[Tensor, Tensor]:
        """Text logits, last text ids (negative: none) and which rows are armed; returns logits and whether it acted."""
        trigger_W = on_device(self.trigger_ids, logits_RV.device)
        acted_R = (recent_RW[:, -self.memory :] == trigger_W).all(1) & armed_R
        choices_C = on_device(self.choice_ids, logits_RV.device)
        only_RV = torch.full_like(logits_RV, BANNED).index_copy(1, choices_C, logits_RV[:, choices_C])
        return torch.where(acted_R[:, None], only_RV, logits_RV), acted_R

    @classmethod
    def compile(cls, guard: AgeGuard, tokenizer: Tokenizer, vocab: Vocabulary) -> AgeChoice | None:
        """Ids of the trigger and first ids of the choices; None when the tokenizer cannot tell them apart (the guard is
        off then).

        The choices are encoded behind the trigger, as they stand in a think, because a tokenizer may join characters
        across the border.
        """
        trigger = encode(tokenizer, guard.trigger)
        first = []
        for choice in guard.choices:
            ids = encode(tokenizer, guard.trigger + choice)
            if not trigger or ids[: len(trigger)] != trigger or len(ids) == len(trigger):
                return None
            first.append(ids[len(trigger)])
        if not first or any(not 0 <= i < vocab.text_size for i in (*trigger, *first)):
            return None
        return cls(trigger, sorted(set(first)))


def ban_id(logits_RV: Tensor, index: int, rows_R: Tensor) -> tuple[Tensor, Tensor]:
    """Ban one id on some rows (bool); acted where it would have been the most likely one."""
    acted_R = rows_R & (logits_RV.argmax(1) == index)
    logits_RV = logits_RV.clone()
    logits_RV[:, index] = torch.where(rows_R, BANNED, logits_RV[:, index])
    return logits_RV, acted_R


@lru_cache(maxsize=64)
def on_device(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Ids that never change, copied once. Not to be written to."""
    return send(ids, device)
