"""The training loop that tokenizer, speaker net, flow and vocoder share.

A `Recipe` owns modules, optimisers and what one step does; the loop owns everything around it: learning rate, averaged weights,
progress bar, metrics (``metrics.jsonl``, TensorBoard, ``curves.png``), atomic checkpoints, resuming, the time limit, and SIGTERM or
Ctrl-C, after which the run saves and ends as if its time were up.

The trade-off: the order of the data is not a state that is saved but a function of (seed, step), see `records.Batches` and `step_rng`.
A checkpoint is then only weights, optimisers, random state and the step number, and resuming is exact whatever interrupted the run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from osum_echat import config, device

log = logging.getLogger(__name__)


@dataclass
class OptimConfig:
    """AdamW with a linear warm-up, a plateau, and a linear decay over the last ``decay_steps`` steps.

    The plateau lets a run be prolonged (``run.steps=...``) from any checkpoint that was saved before the decay began.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    warmup_steps: int = 100
    decay_steps: int = 0
    final_lr: float = 0.02  # of lr, at the last step of the decay
    clip_norm: float = 1.0


@dataclass
class RunConfig:
    """Where and how long a run goes on, and on what."""

    out: Path = Path("exp/token2wav")  # checkpoint, metrics, curves
    steps: int = 1000
    max_minutes: float | None = None  # of wall time in this process; the run saves, exports and can be resumed
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"  # of autocast; weights stay float32
    threads: int | None = None
    ema: float | None = None  # decay of the weight average that is validated and exported; None: the weights themselves
    log_every: int = 20
    save_every: int = 200
    validate_every: int = 500
    tensorboard: bool = True


class Recipe(Protocol):
    """What a kind of training must offer to the loop."""

    modules: nn.ModuleDict  # all trained parts, discriminators included
    optimizers: dict[str, torch.optim.Optimizer]
    averaged: tuple[str, ...]  # names in `modules` that the weight average covers

    def train_step(self, step: int) -> dict[str, float]:
        """One update of the weights; the losses to log."""

    def validate(self) -> dict[str, float]:
        """Measures on held-out data."""

    def export(self) -> list[Path]:
        """Write the finished files and return their paths."""


def step_rng(seed: int, step: int, *extra: int) -> np.random.Generator:
    """The random numbers of one step: the same whether or not the run was interrupted before it."""
    return np.random.default_rng([seed, step, *extra])


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of ``step`` (from 0) in a run of ``steps``."""
    rate = min(1.0, (step + 1) / max(1, optim.warmup_steps))
    left = steps - step
    if left <= optim.decay_steps:
        rate *= optim.final_lr + (1 - optim.final_lr) * left / optim.decay_steps
    return optim.lr * rate


def adamw(parameters: Iterator[nn.Parameter], optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser that `OptimConfig` describes; vectors (biases, norms, gains) are not decayed."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in parameters:
        if parameter.requires_grad:
            groups[parameter.ndim >= 2].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": optim.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=optim.lr,
        betas=optim.betas,
        fused=True,
    )


def update(optimizer: torch.optim.Optimizer, loss: Tensor, clip_norm: float) -> float:
    """Backward, clip, step. Returns the gradient norm before clipping.

    A loss or gradient that is not finite changes no weight; the norm that is returned says so (inf or nan).
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(parameters, clip_norm))
    if math.isfinite(norm):
        optimizer.step()
    return norm


class Average:
    """Exponential moving average of weights, with a short memory at the start of a run."""

    def __init__(self, modules: nn.ModuleDict, names: tuple[str, ...], decay: float) -> None:
        self.decay = decay
        self._live = {f"{n}.{k}": v for n in names for k, v in modules[n].state_dict(keep_vars=True).items()}
        self.weights = {k: v.detach().clone() for k, v in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in self._live.items():
            average = self.weights[key]
            if average.is_floating_point():
                average.lerp_(value.detach(), 1 - decay)
            else:
                average.copy_(value.detach())

    @contextlib.contextmanager
    @torch.no_grad()
    def swapped(self) -> Iterator[None]:
        """The modules hold the average inside this block."""
        kept = {k: v.detach().clone() for k, v in self._live.items()}
        for key, value in self._live.items():
            value.copy_(self.weights[key])
        try:
            yield
        finally:
            for key, value in self._live.items():
                value.copy_(kept[key])


@dataclass
class Trainer:
    """Runs a recipe. `fit` resumes from ``out/checkpoint.pt`` when it is there."""

    recipe: Recipe
    run: RunConfig
    optim: OptimConfig
    described: Mapping[str, Any]  # the whole config as plain data, kept with the checkpoint
    step: int = 0
    _stop: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.device = device.resolve(self.run.device)
        self.average = None
        if self.run.ema is not None:
            self.average = Average(self.recipe.modules, self.recipe.averaged, self.run.ema)

    # -- state ---------------------------------------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> Path:
        return self.run.out / "checkpoint.pt"

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "modules": self.recipe.modules.state_dict(),
            "optimizers": {name: o.state_dict() for name, o in self.recipe.optimizers.items()},
            "average": self.average.weights if self.average else None,
            "rng": torch.get_rng_state(),
            "config": dict(self.described),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.recipe.modules.load_state_dict(state["modules"])
        for name, optimizer in self.recipe.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        if self.average is not None:
            source = state["average"]
            if source is None:  # the run began without an average: start it from the weights
                source = {k: v for k, v in state["modules"].items() if k in self.average.weights}
            for key, value in self.average.weights.items():
                value.copy_(source[key])
        torch.set_rng_state(state["rng"])
        self.step = int(state["step"])

    def save(self) -> None:
        """Write the checkpoint under its final name only when it is complete."""
        write_atomically(self.checkpoint, lambda path: torch.save(self.state_dict(), path))

    def resume(self) -> bool:
        """Load the checkpoint if there is one. Returns whether there was."""
        if not self.checkpoint.is_file():
            return False
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        try:
            self.load_state_dict(state)
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{self.checkpoint} does not fit this configuration ({error}); choose another run.out or delete it"
            ) from error
        return True

    # -- running -------------------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, float]:
        """Train to ``run.steps`` or the time limit, validate, export, draw the curves. Returns the last validation."""
        self.run.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(self.run.seed)
        if self.resume():
            log.info("resumed from %s at step %d", self.checkpoint, self.step)
        (self.run.out / "config.yaml").write_text(config.to_yaml(self.described), encoding="utf-8")
        self._describe()
        with device.threads(self.run.threads), self._signals(), Metrics(self.run.out, self.run.tensorboard, self.step) as metrics:
            self._train(metrics)
            self.save()
            measures = self._validate(metrics)
            with self._averaged():
                for path in self.recipe.export():
                    log.info("wrote %s (%.1f MB)", path, path.stat().st_size / 1e6)
        draw_curves(self.run.out / "metrics.jsonl", self.run.out / "curves.png")
        return measures

    def _train(self, metrics: Metrics) -> None:
        deadline = math.inf if self.run.max_minutes is None else time.monotonic() + 60 * self.run.max_minutes
        sums: dict[str, float] = {}
        count = 0
        bad = 0
        with tqdm(total=self.run.steps, initial=self.step, desc=self.run.out.name, dynamic_ncols=True, mininterval=2) as bar:
            while self.step < self.run.steps and not self._stop and time.monotonic() < deadline:
                rate = learning_rate(self.optim, self.step, self.run.steps)
                for optimizer in self.recipe.optimizers.values():
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                losses = self.recipe.train_step(self.step)
                self.step += 1
                if all(math.isfinite(v) for v in losses.values()):
                    bad = 0
                    count += 1
                    for name, value in losses.items():
                        sums[name] = sums.get(name, 0.0) + value
                else:
                    bad += 1
                    log.warning("step %d: a loss or gradient is not finite, the update was skipped: %s", self.step, losses)
                    if bad >= 20:
                        raise RuntimeError("20 steps in a row without a finite loss: lower optim.lr or inspect the data")
                if self.average is not None:
                    self.average.update(self.step)
                bar.update()
                if self.step % self.run.log_every == 0 and count:
                    means = {name: value / count for name, value in sums.items()}
                    bar.set_postfix({k: f"{v:.3f}" for k, v in means.items() if k != "grad"})
                    metrics.write("train", self.step, {**means, "lr": rate})
                    sums, count = {}, 0
                if self.step % self.run.save_every == 0:
                    self.save()
                if self.step % self.run.validate_every == 0 and self.step < self.run.steps:
                    self._validate(metrics)

    def _validate(self, metrics: Metrics) -> dict[str, float]:
        modes = {m: m.training for m in self.recipe.modules.modules()}
        self.recipe.modules.eval()
        with self._averaged(), torch.no_grad():
            measures = self.recipe.validate()
        for module, training in modes.items():
            module.training = training
        if measures:
            log.info("step %d: %s", self.step, ", ".join(f"{k} {v:.4g}" for k, v in measures.items()))
            metrics.write("valid", self.step, measures)
        return measures

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return self.average.swapped() if self.average is not None else contextlib.nullcontext()

    def _describe(self) -> None:
        log.info("device: %s, autocast: %s", device.describe(self.device), self.run.dtype)
        for name, module in self.recipe.modules.items():
            log.info("%s: %.2f M parameters", name, sum(p.numel() for p in module.parameters()) / 1e6)
        limit = f", at most {self.run.max_minutes:g} minutes" if self.run.max_minutes is not None else ""
        log.info("steps %d to %d%s, into %s", self.step, self.run.steps, limit, self.run.out)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the loop after the current step."""

        def stop(number: int, frame: FrameType | None) -> None:
            log.info("signal %d: saving and ending after this step", number)
            self._stop = True

        before = {}
        with contextlib.suppress(ValueError):  # not in the main thread: signals belong to the caller
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Metrics:
    """One JSON object a line in ``metrics.jsonl``, and the same in TensorBoard.

    Lines after ``step`` are dropped when a run resumes: they belong to steps that will be made again.
    """

    def __init__(self, out: Path, tensorboard: bool, step: int) -> None:
        self.path = out / "metrics.jsonl"
        if self.path.is_file():
            kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step]
            text = "".join(line + "\n" for line in kept)
            write_atomically(self.path, lambda path: Path(path).write_text(text, encoding="utf-8"))
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, **{k: round(v, 6) for k, v in values.items()}}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)


def write_atomically(path: Path, write: Any) -> None:
    """Call ``write(temporary path)`` and move the result to ``path`` when it is complete and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def draw_curves(metrics: Path, picture: Path) -> None:
    """One panel per measure of ``metrics.jsonl``: training as a line, validation as dots."""
    if not metrics.is_file():
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        kind, step = row.pop("kind"), row.pop("step")
        for name, value in row.items():
            series.setdefault(name, {}).setdefault(kind, []).append((step, value))
    if not series:
        return
    columns = min(3, len(series))
    rows = math.ceil(len(series) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3 * rows), squeeze=False)
    for axis in axes.flat[len(series) :]:
        axis.axis("off")
    for axis, (name, kinds) in zip(axes.flat, series.items(), strict=False):
        for kind, points in kinds.items():
            x, y = zip(*points, strict=True)
            axis.plot(x, y, marker="o" if kind == "valid" else None, linewidth=1, label=kind)
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    write_atomically(picture, lambda path: figure.savefig(path, format="png", dpi=100))
    plt.close(figure)


def command(
    config_class: type[Any], recipe_class: Callable[[Any], Recipe], description: str | None, argv: list[str] | None
) -> int:
    """The command line that all four trainings share: ``--config FILE key=value ...``. Returns the exit code.

    What is wrong with the configuration or the data ends with its message and code 2; a fault during training is a traceback.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file; see recipes/mini/conf/token2wav/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example run.max_minutes=10 run.threads=1")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        cfg = config.load(config_class, args.config, args.overrides)
        recipe = recipe_class(cfg)
    except ValueError as error:
        parser.error(str(error))
    Trainer(recipe, cfg.run, cfg.optim, config.to_dict(cfg)).fit()
    return 0
