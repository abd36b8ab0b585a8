"""What a training of one part of token2wav is made of: its config, and the recipe that the loop (`loop.py`) runs.

The four recipes share their beginning: device, precision, records, features, batches, averages. Each adds its modules,
what one step does, what is measured and what is written.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from osum_echat import device
from osum_echat.config import warn_older
from osum_echat.run import config as run_config
from osum_echat.run.files import write_atomically
from osum_echat.training.token2wav.average import Average
from osum_echat.training.token2wav.records import Batches, Features, ListConfig, Utterance, train_and_valid

C = TypeVar("C", bound="PartTraining")
T = TypeVar("T")

VALIDATED = 16  # held-out recordings that flow and vocoder are measured on


@dataclass
class OptimConfig(run_config.OptimConfig):
    """The defaults of token2wav's trainings. While the rate is on its plateau, a run can be prolonged by a larger
    ``max_steps``."""

    RENAMED_KEYS: ClassVar[Mapping[str, str]] = {"final_lr": "final_factor", "clip_norm": "clip"}

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    schedule: run_config.Schedule = "plateau"
    warmup_steps: int = 100
    final_factor: float = 0.02
    clip: float = 1.0


@dataclass(kw_only=True)
class PartTraining(run_config.RunConfig):
    """The YAML keys that all four trainings have; see `RunConfig` for the others.

    Attributes:
        data: which records take part.
        target: the file of weights to write.
        ema: decay of the average of the weights that is validated and exported; None: the weights themselves.
        export_half: round the stored weights to float16.
    """

    data: ListConfig
    target: Path
    out: Path = Path("exp/token2wav")
    seed: int = 0
    max_steps: int = 1000
    log_every: int = 20
    save_every: int = 200
    validate_every: int = 500
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch_size: int = 16
    ema: float | None = None
    export_half: bool = False

    @classmethod
    def read_older(cls, data: dict[str, Any], where: str) -> dict[str, Any]:
        """Until 0.1 some keys stood in a section ``run``, with two of them under other names."""
        run = dict(data.pop("run", None) or {})
        for old, value in run.items():
            new = str({"steps": "max_steps", "dtype": "precision"}.get(old, old))
            warn_older(where, f"run.{old}", new)
            if new == "precision":
                value = {"float32": "fp32", "bfloat16": "autocast"}.get(str(value), value)
            data.setdefault(new, value)
        return data


class Recipe(abc.ABC, Generic[C, T]):
    """One part's training: owns modules and optimisers. ``T`` is what is computed of a recording once and kept
    (`features`).

    A recipe sets ``modules`` (all trained parts, discriminators included) and ``optimizers`` when it is made.
    """

    averaged: tuple[str, ...]  # names in `modules` that the average of the weights covers
    modules: nn.ModuleDict
    optimizers: dict[str, torch.optim.Optimizer]
    average: Average | None = None  # of the weights, kept by the loop

    def __init__(self, cfg: C, need: Sequence[str] = (), by_length: bool = True) -> None:
        """``need``: what records must carry (`records.read_lists`); ``by_length``: batches of recordings of similar
        length."""
        self.cfg = cfg
        self.device = device.resolve(cfg.device)
        self.dtype = torch.bfloat16 if cfg.precision == "autocast" else torch.float32
        train, valid = train_and_valid(cfg.data, need)
        self.prepare(train)
        self.train, self.valid = Features(train, self.features), Features(valid, self.features)
        self.batches = Batches([u.seconds if by_length else 1.0 for u in train], cfg.batch_size, cfg.seed)
        torch.manual_seed(cfg.seed)

    def prepare(self, train: list[Utterance]) -> None:
        """What must be known about the training records before their features are computed."""

    @abc.abstractmethod
    def features(self, utterance: Utterance) -> T:
        """What training needs of one recording. Raises ValueError when it cannot be used."""

    @abc.abstractmethod
    def train_step(self, step: int) -> dict[str, float]:
        """One update of the weights; the losses to log."""

    @abc.abstractmethod
    def validate(self) -> dict[str, float]:
        """Measures on held-out data."""

    @abc.abstractmethod
    def export(self) -> list[Path]:
        """Write the finished files and return their paths."""

    def sounds(self) -> Iterator[tuple[Utterance, np.ndarray]]:
        """Held-out recordings as the trained part makes them again, samples [n] float32 at 22.05 kHz, for validators
        that listen (`evaluation.validation`); nothing for a part that makes no sound."""
        return iter(())

    def rng(self, step: int, *extra: int) -> np.random.Generator:
        """The random numbers of one step: the same whether or not the run was interrupted before it."""
        return np.random.default_rng([self.cfg.seed, step, *extra])

    def autocast(self) -> Any:
        """The run's arithmetic."""
        return device.autocast(self.device, self.dtype)

    def update(self, name: str, loss: Tensor) -> float:
        """One step of the optimiser ``name``; see `update`."""
        return update(self.optimizers[name], loss, self.cfg.optim.clip)

    def held_out(self) -> Iterator[tuple[int, T]]:
        """The first held-out recordings, numbered from 1."""
        return enumerate(itertools.islice(self.valid, VALIDATED), 1)

    def write_weights(self, module: nn.Module) -> Path:
        """A flat state dict at ``target``."""
        state = {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}
        if self.cfg.export_half:
            state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
        write_atomically(self.cfg.target, lambda path: torch.save(state, path))
        return self.cfg.target


class Means:
    """Means of named measures, each over as many values as it got."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, int] = defaultdict(int)

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._sums[name] += value
            self._counts[name] += 1

    def values(self) -> dict[str, float]:
        return {name: value / self._counts[name] for name, value in self._sums.items()}


def adamw(parameters: Iterator[nn.Parameter], optim: run_config.OptimConfig) -> torch.optim.Optimizer:
    """The optimiser that a config describes; vectors (biases, norms, gains) are not decayed."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in parameters:
        if parameter.requires_grad:
            groups[parameter.ndim >= 2].append(parameter)
    decays = [{"params": groups[True], "weight_decay": optim.weight_decay}, {"params": groups[False], "weight_decay": 0.0}]
    return torch.optim.AdamW(decays, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def update(optimizer: torch.optim.Optimizer, loss: Tensor, clip: float) -> float:
    """Backward, clip (0: not), step. Returns the gradient norm before clipping.

    A loss or gradient that is not finite changes no weight; the norm that is returned says so (inf or nan).
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(parameters, clip or math.inf))
    if math.isfinite(norm):
        optimizer.step()
    return norm
