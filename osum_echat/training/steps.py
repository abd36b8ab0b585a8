"""Steps that all ranks take alike, however unevenly the data lies on them: the one place where that is decided.

Every rank fetches up to ``accumulation`` batches of its own. One exchange of a few numbers then says how many
micro-batches the longest rank has, what they hold together (the loss is divided by it), and what any rank wants to be
known, such as a wish to stop. A rank with fewer micro-batches fills up with placeholders, which have no targets. So
nobody waits for a collective that does not come, no sample is left out, and nothing that changes the run is decided by
one rank alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from osum_echat.data.batch import Batch
from osum_echat.training.distributed import World
from osum_echat.training.objective import MicroBatch, Objective, placeholder


@dataclass
class Step:
    """What this rank runs in one step.

    Attributes:
        micros: micro-batches, as many as on every other rank.
        totals: what the micro-batches of all ranks hold together, by name (`Objective.names`).
        flags: of the flags that the ranks handed in: whether any rank has raised it.
        waited: seconds that this rank waited for its data.
    """

    micros: list[MicroBatch]
    totals: dict[str, float]
    flags: list[bool]
    waited: float


class Steps:
    """The steps of one epoch, by `next`.

    Args:
        batches: of this rank.
        accumulation: micro-batches a step, as long as there are so many.
        input_noise: see `Objective.prepare`.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        objective: Objective,
        world: World,
        device: torch.device,
        accumulation: int = 1,
        input_noise: float = 0.0,
    ):
        self._batches, self._objective, self._world, self._device = batches, objective, world, device
        self._accumulation, self._input_noise = accumulation, input_noise

    def next(self, flags: Sequence[bool] = ()) -> Step | None:
        """The next step (all ranks call together); None, on all ranks alike, when no rank has a batch left."""
        began = time.monotonic()
        micros = [
            self._objective.prepare(batch, self._device, self._input_noise)
            for batch in itertools.islice(self._batches, self._accumulation)
        ]
        waited = time.monotonic() - began
        names = self._objective.names
        mine = [float(len(micros)), *map(float, flags)]
        mine += [sum(micro.counts.get(name, 0.0) for micro in micros) for name in names]
        table = self._world.table(mine)
        number = int(table[:, 0].max())
        if number == 0:
            return None
        mels = self._objective.model.config.encoder.mels
        while len(micros) < number:
            micros.append(self._objective.prepare(placeholder(mels), self._device))
        raised = (table[:, 1 : 1 + len(flags)].max(0).values > 0).tolist() if flags else []
        totals = dict(zip(names, table[:, 1 + len(flags) :].sum(0).tolist(), strict=True))
        return Step(micros, totals, raised, waited)
