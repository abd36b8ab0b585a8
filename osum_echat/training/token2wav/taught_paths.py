"""What a teacher says to a recording, computed once: the conditions of a row and the points of the teacher's path at
the student's times.

The row of a recording (its part, its prompt) and its noise are then a function of the seed and the recording alone. For
a small flow on a CPU the teacher's path costs ten times the student's step, so computing it once for each recording
makes many more steps affordable; files in the run's folder let the next piece of an interrupted run go on with them.

Shapes: B batch, T mel frames, M mel bins, P points of a path.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osum_echat.run.files import write_atomically
from osum_echat.token2wav.estimator import Estimator, Padding

log = logging.getLogger(__name__)


@dataclass
class Task:
    """What the ODE of a batch is conditioned on, at mel rate, with its starting noise."""

    noise_BTM: Tensor
    mu_BTM: Tensor
    spk_BM: Tensor
    cond_BTM: Tensor
    padding: Padding | None

    def velocity(self, estimator: Estimator, x_BTM: Tensor, t: float, guidance: float = 0.0) -> Tensor:
        """Velocity at one time for all rows, guided as in `FlowDecoder.solve`."""
        t_1 = x_BTM.new_tensor([t])
        v_BTM = estimator(x_BTM, self.mu_BTM, t_1, self.spk_BM, self.cond_BTM, self.padding).float()
        if guidance:
            nothing_BTM, no_voice_BM = torch.zeros_like(self.mu_BTM), torch.zeros_like(self.spk_BM)
            free_BTM = estimator(x_BTM, nothing_BTM, t_1, no_voice_BM, nothing_BTM, self.padding).float()
            v_BTM = (1.0 + guidance) * v_BTM - guidance * free_BTM
        return v_BTM

    def path(self, estimator: Estimator, grid: Sequence[float], guidance: float) -> list[Tensor]:
        """The points of the Euler solution at the times of ``grid``, the noise first, [B, T, M] each."""
        points = [self.noise_BTM]
        for k in range(len(grid) - 1):
            points.append(points[-1] + (grid[k + 1] - grid[k]) * self.velocity(estimator, points[-1], grid[k], guidance))
        return points


@dataclass(frozen=True)
class TaughtPath:
    """One recording's row: conditions and points, the noise first."""

    mu_TM: Tensor
    spk_M: Tensor
    cond_TM: Tensor
    points_PTM: Tensor


class TaughtPaths:
    """The paths of recordings by their number, from memory, from ``folder``, or computed (and written there).

    Args:
        made_of: what the paths depend on; other values have other files.
    """

    def __init__(self, folder: Path, made_of: Any, compute: Callable[[int], TaughtPath | None]) -> None:
        name = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
        self._folder, self._compute = folder / name, compute
        self._kept: dict[int, TaughtPath | None] = {}

    def get(self, index: int) -> TaughtPath | None:
        """None: the recording cannot be used."""
        if index not in self._kept:
            self._kept[index] = self._read(index)
        return self._kept[index]

    def _read(self, index: int) -> TaughtPath | None:
        file = self._folder / f"{index}.pt"
        if file.is_file():
            return TaughtPath(*(part.float() for part in torch.load(file, weights_only=True)))
        found = self._compute(index)
        if found is not None:
            parts = [part.half() for part in (found.mu_TM, found.spk_M, found.cond_TM, found.points_PTM)]
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(file, lambda path: torch.save(parts, path))
            found = TaughtPath(*(part.float() for part in parts))  # the same numbers as when it is read
        return found


def join(rows: Sequence[TaughtPath], device: torch.device) -> tuple[Task, list[Tensor]]:
    """Rows as a batch: the task and the points, [B, T, M] each."""
    lengths_B = torch.tensor([len(row.mu_TM) for row in rows])
    frames = int(lengths_B.max())

    def padded(parts: Sequence[Tensor]) -> Tensor:
        return nn.utils.rnn.pad_sequence(list(parts), batch_first=True).to(device)

    points = [padded([row.points_PTM[p] for row in rows]) for p in range(len(rows[0].points_PTM))]
    spk_BM = torch.stack([row.spk_M for row in rows]).to(device)
    padding = Padding.of(lengths_B.to(device), frames)
    return Task(points[0], padded([r.mu_TM for r in rows]), spk_BM, padded([r.cond_TM for r in rows]), padding), points
