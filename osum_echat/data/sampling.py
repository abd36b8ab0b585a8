"""Which lines of a list an epoch reads, in which order, by whom. Pure functions of seed and epoch: no clock, no global
random state.

The order is that of the published sampler when the seed is 0: shuffle by epoch, stride over ranks, then over workers.
What it did not do: lines that do not divide evenly over the readers are shared sample by sample, so that every reader
has nearly the same amount of work and none goes without.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def weighted_lines(count: int, weight: float, rng: random.Random) -> list[int]:
    """Line numbers that ``weight`` asks for: ``int(weight)`` times all lines from 1 on, a random part below, none for
    0.

    Raises:
        ValueError: for a negative weight.
    """
    if weight < 0:
        raise ValueError(f"a weight must not be negative, found {weight}")
    if weight >= 1:
        return list(range(count)) * int(weight)
    return sorted(rng.sample(range(count), int(count * weight)))


def epoch_order(count: int, epoch: int, seed: int = 0, split: int = 1, shuffle: bool = True) -> list[int]:
    """Positions of a list of ``count`` lines in the order in which ``epoch`` reads them.

    Args:
        split: an epoch reads one of ``split`` slices of the list (the last slice takes the remainder); every line is
            read once in ``split`` epochs.
    """
    order = list(range(count))
    if split > 1:
        round_, slice_ = divmod(epoch + 1, split)
        if shuffle:
            random.Random(seed + round_).shuffle(order)
        size = count // split
        order = order[slice_ * size : (slice_ + 1) * size if slice_ < split - 1 else None]
    if shuffle:
        random.Random(seed + epoch).shuffle(order)
    return order


@dataclass(frozen=True)
class Share:
    """A line of a list, of which this reader takes the samples whose number is ``part`` modulo ``parts``."""

    line: int
    part: int = 0
    parts: int = 1


class Shares(Sequence[Share]):
    """What one of ``readers`` equal readers reads of ``order``.

    Whole lines are dealt one by one; the last ``len(order) % readers`` lines are read by all, each taking every
    ``readers``-th sample. Holds eight bytes a line: raw lists have millions.

    Args:
        reader: ``rank + world_size * worker``: ranks are dealt to first, then the workers of a rank.
    """

    def __init__(self, order: Sequence[int], reader: int, readers: int) -> None:
        assert 0 <= reader < readers, (reader, readers)
        whole = len(order) - len(order) % readers
        self._lines = np.asarray(order[:whole][reader::readers], dtype=np.int64)
        self._shared = [Share(line, (reader + i) % readers, readers) for i, line in enumerate(order[whole:])]

    def __len__(self) -> int:
        return len(self._lines) + len(self._shared)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        at %= len(self)
        return Share(int(self._lines[at])) if at < len(self._lines) else self._shared[at - len(self._lines)]


def draw(weights: Sequence[float], alive: Sequence[bool], rng: random.Random) -> int:
    """One of the streams that are alive, by *their own* weights (all of these above 0)."""
    point = rng.random() * sum(w for w, up in zip(weights, alive, strict=True) if up)
    last = -1
    for i, (weight, up) in enumerate(zip(weights, alive, strict=True)):
        if up:
            assert weight > 0, f"stream {i} is alive with weight {weight}"
            last = i
            point -= weight
            if point < 0:
                break
    assert last >= 0, "no stream is alive"
    return last
