"""The keys that every training config has. A training inherits `RunConfig`, adds its own keys and may set other
defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Schedule = Literal["warmuplr", "linear", "cosine", "constant", "plateau"]


@dataclass
class OptimConfig:
    """AdamW, schedule and clipping. The defaults are those of the published training.

    Attributes:
        lr: peak learning rate.
        schedule: see `schedule.factor`.
        decay_steps: ``plateau``: over how many steps at the end the rate falls.
        total_steps: where falling schedules end; None: the run's expected steps.
        final_factor: share of ``lr`` that falling schedules end at.
        clip: largest gradient norm; 0: no clipping.
    """

    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-6
    weight_decay: float = 0.01
    schedule: Schedule = "warmuplr"
    warmup_steps: int = 2000
    decay_steps: int = 0
    total_steps: int | None = None
    final_factor: float = 0.0
    clip: float = 5.0

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.warmup_steps < 0 or self.decay_steps < 0 or self.clip < 0:
            raise ValueError("lr must be positive, warmup_steps, decay_steps and clip >= 0 (clip 0: no clipping)")


@dataclass
class SafetyConfig:
    """``max_bad_steps``: the run stops after so many steps in a row with a loss or gradient that is not finite."""

    max_bad_steps: int = 5


@dataclass(kw_only=True)
class RunConfig:
    """Where a run writes, how long it goes on, on what.

    Attributes:
        out: folder of the run: checkpoints, metrics.jsonl, TensorBoard, curves. A run that finds checkpoints there
            continues.
        device: ``auto``, or a name such as ``cpu``, ``cuda:1``, ``npu``.
        precision: ``fp32``; ``autocast``: float32 weights, bfloat16 arithmetic. Some trainings know more.
        max_steps: of the whole run; max_minutes: of this process. Whichever comes first ends it; it saves, and the same
            command continues.
        threads: CPU threads; None: as many as torch takes.
        log_every, save_every, validate_every: optimiser steps between lines of metrics.jsonl, checkpoints, validations.
    """

    out: Path = Path("out/train")
    device: str = "auto"
    precision: Literal["fp32", "autocast"] = "fp32"
    seed: int = 777
    threads: int | None = None
    max_steps: int | None = None
    max_minutes: float | None = None
    log_every: int = 10
    save_every: int = 1250
    validate_every: int = 1250
    tensorboard: bool = True
    optim: OptimConfig = field(default_factory=OptimConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)

    def __post_init__(self) -> None:
        for name in ("log_every", "save_every", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
