"""Which samples make a batch, and which of them share a row.

A pool of samples is held back; each batch starts from the oldest (nothing starves), takes those with recordings of
similar length (the feature tensor is padded to the longest), fills the gaps that are left in the rows with whatever
fits best, and is then spread evenly, so that rows end nearly together. Padding of positions stays below 5 % as long as
the pool has something to choose from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from osum_echat.data.config import BatchConfig

_GOOD_ENOUGH = 0.02  # padding at which no other arrangement is looked for
_FIRST_FILL = 0.9  # rows are filled so far with recordings of similar length, then with anything that fits


@dataclass(frozen=True, slots=True)
class Cost:
    """What a sample costs: ids of its sequence, its longest recording in frames, number of recordings."""

    positions: int
    longest: int = 0
    recordings: int = 0


def plan_batch(pool: Sequence[Cost], config: BatchConfig) -> list[list[int]]:
    """Rows of the next batch as indices into ``pool``, which is in order of age. At least ``pool[0]`` is in it."""
    if not config.packing:
        return _unpacked(pool, config)
    chosen = _choose(pool, config)
    best: list[list[int]] = []
    best_padding = 2.0
    for rows in range(min(config.rows, len(chosen)), 0, -1):
        plan = _spread(chosen, pool, rows)
        lengths = [sum(pool[i].positions for i in row) for row in plan]
        if max(lengths) > config.row_positions:
            continue
        padding = 1 - sum(lengths) / (len(plan) * _round_up(max(lengths), config.multiple_of))
        if padding < best_padding:
            best, best_padding = plan, padding
        if padding <= _GOOD_ENOUGH:
            break
    fitted = _fit(chosen, pool, config)
    lengths = [sum(pool[i].positions for i in row) for row in fitted]
    if 1 - sum(lengths) / (len(fitted) * _round_up(max(lengths), config.multiple_of)) < best_padding:
        best = fitted
    return best


def _choose(pool: Sequence[Cost], config: BatchConfig) -> list[int]:
    """Samples that fit into the rows together, the oldest among them."""
    anchor = pool[0]
    others = sorted(range(1, len(pool)), key=lambda i: (_distance(pool[i], anchor), i))
    free = [config.row_positions] * config.rows
    free[0] -= anchor.positions
    space = int(config.rows * config.row_positions * (1 - _FIRST_FILL))
    chosen, longest, recordings = [0], anchor.longest, anchor.recordings
    limit = config.max_samples or len(pool)

    def take(i: int) -> bool:
        nonlocal longest, recordings
        cost = pool[i]
        if len(chosen) >= limit or (recordings + cost.recordings) * max(longest, cost.longest) > config.max_frames:
            return False
        row = min((r for r in range(config.rows) if free[r] >= cost.positions), key=lambda r: free[r], default=-1)
        if row < 0:
            return False
        free[row] -= cost.positions
        chosen.append(i)
        longest, recordings = max(longest, cost.longest), recordings + cost.recordings
        return True

    rest = []
    for at, i in enumerate(others):
        if sum(free) <= space:
            rest += others[at:]
            break
        if not take(i):
            rest.append(i)
    for i in sorted(rest, key=lambda i: (-pool[i].positions, i)):
        take(i)
    return chosen


def _distance(cost: Cost, anchor: Cost) -> int:
    """How unlike two samples are in the length of their recordings; text alone goes with anything."""
    return abs(cost.longest - anchor.longest) if cost.recordings else 0


def _spread(chosen: Sequence[int], pool: Sequence[Cost], rows: int) -> list[list[int]]:
    """Longest first, each into the row that is shortest so far."""
    plan: list[list[int]] = [[] for _ in range(rows)]
    lengths = [0] * rows
    for i in sorted(chosen, key=lambda i: (-pool[i].positions, i)):
        row = lengths.index(min(lengths))
        plan[row].append(i)
        lengths[row] += pool[i].positions
    return [row for row in plan if row]


def _fit(chosen: Sequence[int], pool: Sequence[Cost], config: BatchConfig) -> list[list[int]]:
    """The arrangement in which they were chosen: each into the fullest row that takes it."""
    plan: list[list[int]] = [[] for _ in range(config.rows)]
    free = [config.row_positions] * config.rows
    for i in chosen:
        row = min((r for r in range(config.rows) if free[r] >= pool[i].positions), key=lambda r: free[r])
        plan[row].append(i)
        free[row] -= pool[i].positions
    return [row for row in plan if row]


def _unpacked(pool: Sequence[Cost], config: BatchConfig) -> list[list[int]]:
    """One sample a row, those nearest in length to the oldest, while rows times longest stay within the budget of
    positions."""
    anchor = pool[0].positions
    chosen: list[int] = []
    width = longest = recordings = 0
    for i in sorted(range(len(pool)), key=lambda i: (i != 0, abs(pool[i].positions - anchor), i)):
        cost = pool[i]
        new_width, new_longest, new_recordings = (
            max(width, cost.positions),
            max(longest, cost.longest),
            recordings + cost.recordings,
        )
        over = _round_up(new_width, config.multiple_of) * (len(chosen) + 1) > config.rows * config.row_positions
        if chosen and (over or new_longest * new_recordings > config.max_frames or 0 < config.max_samples <= len(chosen)):
            continue
        chosen.append(i)
        width, longest, recordings = new_width, new_longest, new_recordings
    return [[i] for i in chosen]


def _round_up(length: int, multiple_of: int) -> int:
    return -(-length // multiple_of) * multiple_of
