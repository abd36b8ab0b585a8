"""What the loop reports: sums over micro-batches and ranks, and the means of them."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from osum_echat.data.batch import Batch
from osum_echat.training.distributed import World
from osum_echat.training.objective import MicroBatch, Outcome


def _zeros() -> dict[str, float]:
    return defaultdict(float)


@dataclass
class Sums:
    """Loss and number of targets of each task; sums and counts of the other parts of the loss (ctc, tag.<name>), by
    name."""

    nll: dict[str, float] = field(default_factory=_zeros)
    targets: dict[str, float] = field(default_factory=_zeros)
    parts: dict[str, float] = field(default_factory=_zeros)
    counts: dict[str, float] = field(default_factory=_zeros)

    def add(self, micro: MicroBatch, outcome: Outcome, finite_only: bool = False) -> None:
        """``finite_only`` leaves out what is not finite: training skips such steps and reports them apart."""
        for sample, nll, targets in zip(micro.batch.samples, outcome.nll_D.tolist(), micro.targets, strict=True):
            if targets and not (finite_only and not math.isfinite(nll)):
                self.nll[sample.task] += nll
                self.targets[sample.task] += targets
        for name, value in outcome.parts.items():
            if name != "lm" and not (finite_only and not math.isfinite(float(value))):
                self.parts[name] += float(value)
                self.counts[name] += micro.counts.get(name, 0.0)

    def over(self, world: World) -> Sums:
        """The sums of all ranks together, on every rank."""
        rows = world.gather((dict(self.nll), dict(self.targets), dict(self.parts), dict(self.counts)))
        return Sums(*(_added([row[i] for row in rows]) for i in range(4)))

    def means(self) -> dict[str, float]:
        """``loss`` over all targets, ``loss/<task>``, and the mean of each other part."""
        values = {"loss": sum(self.nll.values()) / max(sum(self.targets.values()), 1.0)}
        values |= {f"loss/{task}": self.nll[task] / self.targets[task] for task in sorted(self.targets)}
        return values | {name: self.parts[name] / max(self.counts.get(name, 0.0), 1.0) for name in sorted(self.parts)}


def read(norm: Tensor, outcomes: Sequence[Outcome]) -> tuple[float, list[Outcome]]:
    """The numbers of a step on the host, by one copy: its gradient norm and the outcomes, on the CPU. The only wait for
    the device in a step."""
    device = outcomes[0].loss.device
    pieces = [norm.to(device).reshape(1)]
    for outcome in outcomes:
        pieces += [outcome.loss.reshape(1), outcome.nll_D, *(value.reshape(1) for value in outcome.parts.values())]
    numbers = iter(torch.cat([piece.detach().float() for piece in pieces]).tolist())

    def host(like: Tensor) -> Tensor:
        return torch.tensor([next(numbers) for _ in range(like.numel())]).view(like.shape)

    found = next(numbers)
    return found, [Outcome(host(o.loss), host(o.nll_D), {name: host(value) for name, value in o.parts.items()}) for o in outcomes]


@dataclass
class Window:
    """What happened on this rank since the last line of metrics.jsonl."""

    sums: Sums = field(default_factory=Sums)
    padding: float = 0.0
    positions: float = 0.0
    steps: int = 0
    waited: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def add(self, micro: MicroBatch, outcome: Outcome) -> None:
        self.sums.add(micro, outcome, finite_only=True)
        self.positions += micro.batch.num_positions
        self.padding += micro.batch.num_positions * micro.batch.rows.padding_fraction

    def close(self, world: World, peak_memory: int) -> tuple[Sums, dict[str, float]]:
        """Sums of all ranks, and speed, padding, memory and waiting (all ranks call together)."""
        sums = self.sums.over(world)
        table = world.table([self.padding, self.positions, float(peak_memory), self.waited])
        seconds = max(time.monotonic() - self.began, 1e-9)
        return sums, {
            "targets_per_s": sum(sums.targets.values()) / seconds,
            "steps_per_s": self.steps / seconds,
            "padding": float(table[:, 0].sum()) / max(float(table[:, 1].sum()), 1.0),
            "memory_gb": float(table[:, 2].max()) / 2**30,
            "waited_for_data": float(table[:, 3].max()) / seconds,
        }


def shown(sums: Sums, values: dict[str, float]) -> dict[str, str]:
    """What stands behind the progress bar."""
    out = {"loss": f"{values['loss']:.3f}", "targets/s": f"{values['targets_per_s']:.0f}"}
    out |= {"pad": f"{values['padding']:.0%}", "GB": f"{values['memory_gb']:.1f}"}
    means = {task: sums.nll[task] / sums.targets[task] for task in sorted(sums.targets)[:6]}
    return out | {task.replace("<", "").replace(">", ""): f"{mean:.2f}" for task, mean in means.items()}


def spoiled(batch: Batch, nll_D: torch.Tensor) -> list[int]:
    """Numbers of the samples that made a loss non-finite: those with a non-finite recording, else those whose own loss
    is.

    Inside a packed row a NaN spreads to the samples behind it (a masked key counts zero times NaN), so the recordings
    are asked first.
    """
    finite_N = (
        torch.isfinite(batch.feats_NTF).flatten(1).all(dim=1).cpu() if len(batch.feats_NTF) else torch.ones(0, dtype=torch.bool)
    )
    by_recording = sorted({int(d) for d in batch.sample_N[~finite_N] if int(d) < len(batch)})
    return by_recording or torch.nonzero(~torch.isfinite(nll_D))[:, 0].tolist()


@dataclass(frozen=True)
class Suspects:
    """What one rank knows about a step that was left out. ``certain``: a loss itself was not finite, or samples are
    known."""

    rank: int
    kind: str
    keys: list[str]
    certain: bool


def suspects(rank: int, micros: list[MicroBatch], outcomes: list[Outcome]) -> Suspects:
    """The samples of this rank that may have spoiled the step: known ones, else all."""
    pairs = list(zip(micros, outcomes, strict=True))
    guilty = [micro.batch.keys[d] for micro, outcome in pairs for d in spoiled(micro.batch, outcome.nll_D)]
    finite = all(bool(torch.isfinite(outcome.loss)) for outcome in outcomes)
    keys = guilty or [key for micro in micros for key in micro.batch.keys]
    return Suspects(rank, "gradient" if finite else "loss", keys, not finite or bool(guilty))


def named(found: list[Suspects]) -> list[Suspects]:
    """Of all ranks' suspects those worth naming: where some rank knows the culprit, the others' gradients only
    inherited it."""
    known = [s for s in found if s.keys]
    certain = [s for s in known if s.certain]
    return certain or known


def _added(maps: list[dict[str, float]]) -> dict[str, float]:
    out = _zeros()
    for values in maps:
        for key, value in values.items():
            out[key] += value
    return dict(out)
