"""From logits to ids, for all rows at once with settings per row.

The order of operations is that of transformers 4.44: repetition penalty and guards, then temperature, top_k, top_p. An
id is drawn with one uniform number per row and step by inverting the distribution, so a row's reply depends on its own
seed alone, never on its neighbours.

R rows, V classes of the head, K candidates, G generated ids.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from osum_echat.device import send
from osum_echat.generation.config import Sampling


@dataclass(frozen=True)
class SamplingRows:
    """`Sampling` of R rows as tensors; build it once for a set of rows with `sampling_rows`."""

    greedy_R: Tensor
    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    penalty_R: Tensor
    all_greedy: bool
    any_penalty: bool
    any_top_p: bool
    candidates: int
    """Largest top_k, or 0 when some row that samples wants them all."""


@lru_cache(maxsize=256)
def sampling_rows(settings: tuple[Sampling, ...], device: torch.device) -> SamplingRows:
    """Stack per-row settings."""

    def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return send(values, device, dtype)

    drawn = [s for s in settings if not s.greedy]
    return SamplingRows(
        greedy_R=column([s.greedy for s in settings], torch.bool),
        temperature_R=column([s.temperature for s in settings], torch.float32),
        top_k_R=column([s.top_k or 2**31 - 1 for s in settings], torch.long),
        top_p_R=column([s.top_p for s in settings], torch.float32),
        penalty_R=column([s.repetition_penalty for s in settings], torch.float32),
        all_greedy=not drawn,
        any_penalty=any(s.repetition_penalty != 1 for s in settings),
        any_top_p=any(s.top_p < 1 for s in drawn),
        candidates=max((s.top_k for s in drawn), default=0) if all(s.top_k for s in drawn) else 0,
    )


def penalise(logits_RV: Tensor, ids_RG: Tensor, valid_RG: Tensor, penalty_R: Tensor) -> Tensor:
    """Make ids that were generated before less likely.

    Args:
        ids_RG: generated ids as classes of this head; any value where not ``valid_RG``.
        penalty_R: positive logits are divided by it, negative ones multiplied; once per id, however often it occurred.
    """
    if ids_RG.shape[1] == 0:
        return logits_RV
    ids_RG = torch.where(valid_RG, ids_RG, 0)
    scores_RG = logits_RV.gather(1, ids_RG)
    scores_RG = torch.where(scores_RG > 0, scores_RG / penalty_R[:, None], scores_RG * penalty_R[:, None])
    # A penalty never raises a logit, so the smallest of what is written for an id is the penalised one, and inf changes
    # nothing.
    return logits_RV.scatter_reduce(1, ids_RG, scores_RG.masked_fill(~valid_RG, float("inf")), "amin")


def choose(logits_RV: Tensor, rows: SamplingRows, uniform_R: Tensor | None) -> Tensor:
    """Choose one id per row.

    Args:
        logits_RV: float32, after penalty and guards; banned ids are -inf.
        uniform_R: one number in [0, 1) per row; may be None when every row is greedy.

    Returns:
        ids_R.
    """
    if rows.all_greedy:
        return most_likely(logits_RV)
    assert uniform_R is not None, "rows that sample need random numbers"
    vocabulary = logits_RV.shape[1]
    count = min(rows.candidates, vocabulary) or vocabulary
    sorted_RK, ids_RK = logits_RV.topk(count, dim=1) if count < vocabulary else logits_RV.sort(dim=1, descending=True)
    sorted_RK = sorted_RK / rows.temperature_R[:, None]
    rank_K = torch.arange(count, device=logits_RV.device)
    probs_RK = sorted_RK.masked_fill(rank_K >= rows.top_k_R[:, None], float("-inf")).softmax(dim=1)
    if rows.any_top_p:
        before_RK = probs_RK.cumsum(dim=1) - probs_RK
        keep_RK = (before_RK < rows.top_p_R[:, None]) | (rank_K == 0)
        probs_RK = torch.where(keep_RK, probs_RK, 0.0)
    cumulative_RK = probs_RK.cumsum(dim=1)
    point_R1 = uniform_R.to(cumulative_RK)[:, None] * cumulative_RK[:, -1:]
    picked_R1 = torch.searchsorted(cumulative_RK, point_R1, right=True)
    # Rounding may put the point on the very end of the distribution: the last id with a probability is meant.
    last_R1 = (probs_RK > 0).long().cumsum(dim=1).argmax(dim=1, keepdim=True)
    picked_R1 = torch.minimum(picked_R1, last_R1)
    return torch.where(rows.greedy_R, ids_RK[:, 0], ids_RK.gather(1, picked_R1)[:, 0])


_BLOCKS = 32


def most_likely(logits_RV: Tensor) -> Tensor:
    """`argmax` over the classes, the first of equals. By blocks, because a maximum alone is vectorised and `argmax` is
    not (on a CPU, a fifth of the time for one row of a text head, an eighth for 16)."""
    rows, vocabulary = logits_RV.shape
    if vocabulary % _BLOCKS:
        return logits_RV.argmax(dim=1)
    blocks_RbL = logits_RV.reshape(rows, _BLOCKS, -1)
    block_R = blocks_RbL.amax(dim=2).argmax(dim=1)
    inside_R = blocks_RbL[torch.arange(rows, device=logits_RV.device), block_R].argmax(dim=1)
    return block_R * blocks_RbL.shape[2] + inside_R


class Dice:
    """Uniform numbers of one row, from its own seed; drawn in blocks because a call per step costs more than the
    number."""

    BLOCK = 256

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._block: deque[float] = deque()

    def peek(self, ahead: int = 0) -> float:
        """The number that `roll` gives after ``ahead`` others."""
        while len(self._block) <= ahead:
            self._block.extend(torch.rand(self.BLOCK, generator=self._generator, dtype=torch.float64).tolist())
        return self._block[ahead]

    def roll(self) -> float:
        self.peek()
        return self._block.popleft()
