"""The training loop that tokenizer, speaker net, flow and vocoder share.

A `Recipe` owns modules, optimisers and what one step does; the loop owns what is around it: learning rate, averaged
weights, checkpoints, resuming, limits. What every training of this project needs besides (metrics, files, signals) is
in `osum_echat.run`.

The trade-off: the order of the data is not a state that is saved but a function of (seed, step), see `records.Batches`
and `Recipe.rng`. A checkpoint is then only weights, optimisers, random state and the step number, and resuming is exact
whatever interrupted the run.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from osum_echat import config, device
from osum_echat.run import bad_steps, schedule
from osum_echat.run.curves import draw_curves
from osum_echat.run.files import write_atomically
from osum_echat.run.progress import METRICS, Progress
from osum_echat.run.signals import StopRequest
from osum_echat.run.validators import HELP, Validator, find_validators
from osum_echat.training.token2wav.average import Average
from osum_echat.training.token2wav.recipe import PartTraining, Recipe

log = logging.getLogger(__name__)


class Trainer:
    """Runs a recipe. `fit` resumes from ``out/checkpoint.pt`` when it is there. ``validators``: measure the averaged
    weights at each validation too."""

    def __init__(self, recipe: Recipe[Any, Any], bar: bool = True, validators: Mapping[str, Validator] | None = None) -> None:
        self.recipe, self.validators = recipe, dict(validators or {})
        self.cfg: PartTraining = recipe.cfg
        self.bar = bar
        self.step = 0
        self.bad = bad_steps.BadSteps(self.cfg.safety.max_bad_steps)
        self.average = Average(recipe.modules, recipe.averaged, self.cfg.ema) if self.cfg.ema is not None else None
        recipe.average = self.average
        self._stop = StopRequest()

    # -- state ---------------------------------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> Path:
        return self.cfg.out / "checkpoint.pt"

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "bad_steps": self.bad.in_a_row,
            "modules": self.recipe.modules.state_dict(),
            "optimizers": {name: o.state_dict() for name, o in self.recipe.optimizers.items()},
            "average": self.average.weights if self.average else None,
            "rng": torch.get_rng_state(),
            "config": config.to_dict(self.cfg),
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
        self.step, self.bad.in_a_row = int(state["step"]), int(state.get("bad_steps", 0))

    def save(self) -> None:
        """Write the checkpoint under its final name only when it is complete."""
        write_atomically(self.checkpoint, lambda path: torch.save(self.state_dict(), path))

    def resume(self) -> bool:
        """Load the checkpoint if there is one. Returns whether there was."""
        if not self.checkpoint.is_file():
            return False
        state = torch.load(self.checkpoint, map_location=self.recipe.device, weights_only=True)
        try:
            self.load_state_dict(state)
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{self.checkpoint} does not fit this configuration ({error}); choose another out, or delete it"
            ) from error
        return True

    # -- running -------------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, float]:
        """Train to ``max_steps`` or the time limit, validate, export, draw the curves. Returns the last validation.

        Raises:
            TooManyBadSteps: see `run.bad_steps`; the last checkpoint is untouched.
        """
        cfg = self.cfg
        cfg.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(cfg.seed)
        if self.resume():
            log.info("resumed from %s at step %d", self.checkpoint, self.step)
        (cfg.out / "config.yaml").write_text(config.to_yaml(cfg), encoding="utf-8")
        self._describe()
        progress = Progress(cfg.out, cfg.max_steps, self.step, bar=self.bar, tensorboard=cfg.tensorboard)
        with device.threads(cfg.threads), self._stop, progress:
            self._train(progress)
            self.save()
            measures = self._validate(progress)
            with self._averaged():
                for path in self.recipe.export():
                    log.info("wrote %s (%.1f MB)", path, path.stat().st_size / 1e6)
        draw_curves(cfg.out / METRICS, cfg.out / "curves.png")
        return measures

    def _train(self, progress: Progress) -> None:
        cfg = self.cfg
        deadline = math.inf if cfg.max_minutes is None else time.monotonic() + 60 * cfg.max_minutes
        window: list[dict[str, float]] = []
        while self.step < cfg.max_steps and not self._stop.wanted and time.monotonic() < deadline:
            rate = self._set_rate()
            losses = self.recipe.train_step(self.step)
            self.step += 1
            if all(math.isfinite(v) for v in losses.values()):
                self.bad.good()
                window.append(losses)
            else:
                log.error("step %d skipped, not finite: %s", self.step, losses)
                progress.write("skipped", self.step, losses)
                self.bad.bad("lower optim.lr, or look at the data")
            if self.average is not None:
                self.average.update(self.step)
            shown = None
            if self.step % cfg.log_every == 0 and window:
                means = {name: _mean([l[name] for l in window if name in l]) for l in window for name in l}
                shown = {name: f"{value:.3f}" for name, value in means.items() if name != "grad"}
                progress.write("train", self.step, {**means, "lr": rate})
                window = []
            progress.advance(shown)
            if self.step % cfg.save_every == 0:
                self.save()
            if self.step % cfg.validate_every == 0 and self.step < cfg.max_steps:
                self._validate(progress)

    def _set_rate(self) -> float:
        """Give the coming step its learning rate; returns it."""
        optim = self.cfg.optim
        rate = optim.lr * schedule.factor(optim, self.step + 1, optim.total_steps or self.cfg.max_steps)
        for optimizer in self.recipe.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
        return rate

    def _validate(self, progress: Progress) -> dict[str, float]:
        modes = {m: m.training for m in self.recipe.modules.modules()}
        self.recipe.modules.eval()
        with self._averaged(), torch.no_grad():
            measures = self.recipe.validate()
            for name, validator in self.validators.items():
                measures |= {f"{name}.{key}": value for key, value in validator(self).items()}
        for module, training in modes.items():
            module.training = training
        if measures:
            progress.say(f"step {self.step} validation: " + ", ".join(f"{k} {v:.4g}" for k, v in measures.items()))
            progress.write("validation", self.step, measures)
        return measures

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return self.average.swapped() if self.average is not None else contextlib.nullcontext()

    def _describe(self) -> None:
        cfg = self.cfg
        log.info("device: %s, precision: %s", device.describe(self.recipe.device), cfg.precision)
        for name, module in self.recipe.modules.items():
            log.info("%s: %.2f M parameters", name, sum(p.numel() for p in module.parameters()) / 1e6)
        limit = f", at most {cfg.max_minutes:g} minutes" if cfg.max_minutes is not None else ""
        log.info("steps %d to %d%s, into %s", self.step, cfg.max_steps, limit, cfg.out)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def command(
    config_class: type[PartTraining],
    recipe_class: Callable[[Any], Recipe[Any, Any]],
    description: str | None,
    argv: list[str] | None,
) -> int:
    """The command line that all four trainings share: ``--config FILE key=value ...``. Returns the exit code.

    What is wrong with the configuration or the data ends with its message and code 2, too many bad steps with 3
    (`run.bad_steps`).
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file; see recipes/mini/conf/token2wav/")
    parser.add_argument("--validators", action="append", default=[], metavar="MODULE:FUNCTION", help=HELP)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example max_minutes=10 threads=1")
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        validators = find_validators(args.validators)
        recipe = recipe_class(config.load(config_class, args.config, args.overrides))
    except ValueError as error:
        parser.error(str(error))
    try:
        Trainer(recipe, validators=validators).fit()
    except bad_steps.TooManyBadSteps as error:
        log.error("%s", error)
        return bad_steps.EXIT_CODE
    return 0
