"""What the loop asks of an engine, and the torch half that single, ddp and fsdp share.

The loop gives every micro-batch a loss that is already divided by the number of targets of the *whole* step (all
micro-batches, all ranks). Engines therefore sum gradients: over micro-batches by accumulation, over ranks by
multiplying with the world size what the collectives average.
"""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from osum_echat import device as devices
from osum_echat.training.config import TrainConfig
from osum_echat.training.distributed import World
from osum_echat.training.folder import DCP
from osum_echat.training.objective import MicroBatch, Objective, Outcome
from osum_echat.training.optimizer import FloatSums, Group, Optimizer


@dataclass(frozen=True)
class StepResult:
    """Of one optimiser step. ``norm``: of all gradients before clipping, on the device; when it is not finite, no
    update was made.

    Reading ``grad_norm`` and ``updated`` waits for the device.
    """

    norm: Tensor

    @property
    def grad_norm(self) -> float:
        return float(self.norm)

    @property
    def updated(self) -> bool:
        return math.isfinite(self.grad_norm)


class Engine(abc.ABC):
    """Owns the module in its distributed form, the gradients and the optimiser.

    Args:
        module: the objective (model and loss) on ``device``, with ``requires_grad`` as the stage says.
        groups: trainable parameters with their learning rates.
        blocks: repeated layers, the units of sharding.
    """

    family: str  # what a checkpoint says about who can continue it: engines of one family read each other's files
    needs_group = True
    shards_weights = False

    def __init__(
        self,
        module: Objective,
        groups: list[Group],
        blocks: Sequence[nn.Module],
        config: TrainConfig,
        world: World,
        device: torch.device,
    ):
        self.module, self.groups, self.config, self.world, self.device = module, groups, config, world, device

    @abc.abstractmethod
    def forward(self, micro: MicroBatch, totals: dict[str, float]) -> Outcome:
        """Run the objective in the run's precision."""

    @abc.abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients; ``last``: of this step's micro-batches."""

    @abc.abstractmethod
    def step(self, lr_factor: float) -> StepResult:
        """Clip and update, or drop the gradients when they are not finite (on all ranks alike)."""

    @abc.abstractmethod
    def rehearse(self, micros: Sequence[MicroBatch], totals: dict[str, float]) -> None:
        """A step of these micro-batches that takes the memory of a real one and changes nothing: no weight, no state of
        the optimiser."""

    @abc.abstractmethod
    def save(self, folder: Path) -> None:
        """Write weights and optimiser into ``folder`` (all ranks call it)."""

    @abc.abstractmethod
    def load(self, folder: Path) -> None:
        """Read what `save` wrote, on the same or another number of ranks."""

    def tensors(self) -> Iterator[Tensor]:
        """What lies in memory between two steps, as far as the engine knows it."""
        yield from self.module.parameters()
        yield from self.module.buffers()

    def extra_state(self) -> dict[str, Any]:
        """State that is neither weight nor optimiser (loss scale)."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore `extra_state`."""
        assert not state, f"{type(self).__name__} keeps no such state: {state}"


class TorchEngine(Engine):
    """Single, ddp and fsdp: torch's optimiser, torch DCP for checkpoints."""

    family = "torch"

    def __init__(
        self,
        module: Objective,
        groups: list[Group],
        blocks: Sequence[nn.Module],
        config: TrainConfig,
        world: World,
        device: torch.device,
    ):
        super().__init__(module, groups, blocks, config, world, device)
        self.runner = self.distribute(module, blocks)
        named = dict(module.named_parameters())  # fsdp replaces the parameters of a module
        self.groups = [Group(g.part, g.lr, [(name, named[name]) for name, _ in g.named]) for g in groups]
        self.optimizer = Optimizer(self.groups, config.optim, masters=config.precision == "bf16")
        low = [p for p in module.weights_read_directly() if p.requires_grad and p.dtype == torch.bfloat16]
        self.sums = FloatSums(low if config.accumulation > 1 else [])
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.compute = {"autocast": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)

    def distribute(self, module: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        """The module to call in forward."""
        return module

    def forward(self, micro: MicroBatch, totals: dict[str, float]) -> Outcome:
        with devices.autocast(self.device, self.compute):
            return Outcome(*self.runner(micro, totals))

    def backward(self, loss: Tensor, last: bool) -> None:
        self.sums.last = last
        with self.sync(last):
            self.scaler.scale(loss * self.world.size).backward()

    def sync(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Context in which gradients are exchanged only for the last micro-batch, where the technique has one."""
        return contextlib.nullcontext()

    def step(self, lr_factor: float) -> StepResult:
        self.sums.finish()
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer.inner)
        norm = self.optimizer.update(lr_factor, self.config.optim.clip)
        if self.scaler.is_enabled():
            self.scaler.update()
        return StepResult(norm)

    def rehearse(self, micros: Sequence[MicroBatch], totals: dict[str, float]) -> None:
        for micro in micros:
            self.backward(self.forward(micro, totals).loss, last=micro is micros[-1])
        self.sums.finish()
        self.optimizer.update(1.0, self.config.optim.clip, keep=True)

    def tensors(self) -> Iterator[Tensor]:
        yield from super().tensors()
        yield from (tensor for _, tensor in self.optimizer.tensors())

    def _state(self) -> dict[str, dict[str, Any]]:
        weights = {n: p.detach() for n, p in self.module.named_parameters() if p.requires_grad or self.config.save_frozen}
        return {"model": weights, "optimizer": dict(self.optimizer.tensors())}

    def save(self, folder: Path) -> None:
        dcp.save(self._state(), checkpoint_id=str(folder / DCP), no_dist=self.world.size == 1)

    def load(self, folder: Path) -> None:
        dcp.load(self._state(), checkpoint_id=str(folder / DCP), no_dist=self.world.size == 1)

    def extra_state(self) -> dict[str, Any]:
        return {"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        if self.scaler.is_enabled() and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
