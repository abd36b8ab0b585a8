"""The training loop: the same for every stage and engine.

One step: every rank fetches micro-batches and all agree on what the step holds and whether it is the last (`steps`);
then forward and backward for each micro-batch, one update, a report. Anything that may end or change the run is decided
in that agreement, never by one rank alone.

An accelerator is not kept waiting: the next step is fetched, agreed on and sent while this one is computed, and only
then are this step's numbers read, all at once. A checkpoint says the position in the data, and the random states, of
before that fetch.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from osum_echat import config as config_io
from osum_echat import device as devices
from osum_echat.data.batch import Batch
from osum_echat.run import schedule
from osum_echat.run.bad_steps import BadSteps
from osum_echat.run.curves import draw_curves
from osum_echat.run.progress import METRICS, Progress
from osum_echat.run.signals import StopRequest
from osum_echat.training import report, stages
from osum_echat.training.checkpoint import Checkpoints, TrainState, rng_from_plain
from osum_echat.training.config import TrainConfig
from osum_echat.training.distributed import World
from osum_echat.training.engines import Engine, StepResult
from osum_echat.training.folder import CHECKPOINTS, engine_family, latest, read_state
from osum_echat.training.objective import MicroBatch, Objective, Outcome
from osum_echat.training.steps import Step, Steps
from osum_echat.training.watchdog import Watchdog

log = logging.getLogger(__name__)

Validator = Callable[["Trainer"], Mapping[str, float]]


class Loader(Protocol):
    """What the loop needs of a data loader (`data.loader.Loader`).

    Iterating yields what is left of the current epoch; `set_epoch` begins another. ``state_dict`` says where the last
    batch that was handed out ended.
    """

    def __iter__(self) -> Iterator[Batch]: ...
    def set_epoch(self, epoch: int) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Run:
    """Everything that one rank of a run is made of (`build.make_trainer` puts it together).

    Attributes:
        engine: holds ``objective``, model and loss, in its distributed form.
        loader: this rank's batches; validation: held-out batches for this rank, or None.
        validators: named functions that measure the model on real tasks; they get the trainer and return numbers. All
            ranks call them together, on rank 0's weights.
        facts: what state.json says beside config and progress (model config, fingerprints of frozen weights).
        on_phase: called with step and name at the beginning of each phase of a step: data, forward, backward, update,
            stepped (its end), save, rename, renamed, validate.
    """

    config: TrainConfig
    world: World
    device: torch.device
    engine: Engine
    objective: Objective
    loader: Loader
    validation: Loader | None = None
    validators: Mapping[str, Validator] = field(default_factory=dict)
    tokenizer: Any = None
    expected_steps: int | None = None
    watchdog: Watchdog | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    bar: bool = True
    on_phase: Callable[[int, str], None] | None = None


class Trainer:
    """Runs a `Run`: `resume` to continue what its folder holds, then `fit`."""

    def __init__(self, run: Run):
        self.run = run
        self.config, self.world, self.engine, self.objective = run.config, run.world, run.engine, run.objective
        self.tokenizer, self.device = run.tokenizer, run.device
        self.validators = dict(run.validators)
        self.facts = {"config": config_io.to_dict(run.config), **run.facts}
        self.state = TrainState()
        self.checkpoints = Checkpoints(self.config.out / CHECKPOINTS, self.world, self.config.keep, run.on_phase)
        self.progress: Progress | None = None
        self._stop = StopRequest()
        self._position: dict[str, Any] = {}  # this rank's random states and data position behind the last step
        self._saved_step = -1
        self._made_one = False  # step, in this process
        self._window = report.Window()
        self._started, self._seconds_before = time.monotonic(), 0.0

    # ---- the run -----------------------------------------------------------------------------------------------------

    def resume(self) -> bool:
        """Continue from the newest checkpoint of this run's folder; False when there is none."""
        path = self.world.broadcast(latest(self.checkpoints.folder))
        if path is None:
            return False
        content = read_state(path)
        self._check_fits(content, engine_family(path, content), str(path))
        self.state, ranks = self.checkpoints.load(path, self.engine)
        if len(ranks) == self.world.size:
            mine = ranks[self.world.rank]
            devices.set_rng_state(rng_from_plain(mine["rng"]), self.device)
            self.run.loader.load_state_dict(mine["data"])
            how = "data and random states continue exactly"
        else:
            devices.seed_all(self.config.seed + 7919 * (self.state.step + 1) + self.world.rank)
            how = self._reposition([r["data"] for r in ranks])
        self._saved_step = self.state.step
        if self.world.is_main:
            ours = self.facts["config"]
            changed = sorted(k for k in ours if ours[k] != content["config"].get(k))
            log.info("resumed %s (step %d, written by %d ranks): %s", path, self.state.step, len(ranks), how)
            if changed:
                log.warning("the config has changed since that checkpoint in: %s", ", ".join(changed))
        return True

    def _check_fits(self, content: dict[str, Any], family: str, path: str) -> None:
        """Refuse a checkpoint of another engine family, or one whose frozen weights were others than those read now."""
        if family != self.engine.family:
            raise ValueError(
                f"{path} was written by an engine of the {family} family, this run's belongs to {self.engine.family}; keep the engine, or "
                "start a new run with init.checkpoint pointing at this training folder"
            )
        before, now = content.get("frozen", {}), self.facts.get("frozen", {})
        changed = [name for name, value in before.items() if now.get(name) != value]
        if changed and not self.config.save_frozen:
            raise ValueError(
                f"{len(changed)} frozen parameters (such as {changed[0]}) differ from those that {path} was trained with; "
                "restore the checkpoint named by init, or start a new run"
            )

    def _reposition(self, states: list[dict[str, Any]]) -> str:
        """Data position after a change of the number of ranks; returns a sentence about what happens."""
        merge = getattr(self.run.loader, "load_state_dicts", None)
        if merge is not None:
            return str(merge(states))
        return (
            f"weights and optimiser are re-shared over {self.world.size} ranks, new random states; the loader cannot translate the positions of "
            f"{len(states)} ranks, so the epoch begins again and samples already seen in it are seen once more"
        )

    def fit(self) -> TrainState:
        """Train until the config's limit, the end of the data or a signal; always leaves a checkpoint of the last
        step."""
        config, world = self.config, self.world
        self._started, self._seconds_before = time.monotonic(), self.state.seconds
        self.progress = Progress(
            config.out, self.run.expected_steps, self.state.step, world.is_main, self.run.bar, config.tensorboard
        )
        if self.run.watchdog is not None:
            self.run.watchdog.start()
        try:
            with self.progress, self._stop:
                self._mark_position()
                why = self._epochs()
                if self.run.validation is not None and self.state.step % config.validate_every and not self._stop.wanted:
                    self.validate()
                self.save()
                if world.is_main:
                    draw_curves(config.out / METRICS, config.out / "curves.png")
                self.progress.say(f"stopped at step {self.state.step}: {why}")
        finally:
            if self.run.watchdog is not None:
                self.run.watchdog.close()
        return self.state

    def _epochs(self) -> str:
        """Epochs until the run ends; the reason."""
        if self._limit_reached():
            return "nothing to do: the limit of this run was reached before"
        why, idle = "", 0
        while not why:
            before = self.state.step
            why = self._epoch()
            if why:
                break
            idle = idle + 1 if self.state.step == before else 0
            if idle > 1:  # once may be the rest of an epoch that a checkpoint ended
                raise ValueError("an epoch without a single batch: look at data.streams and at what the filters dropped")
            self.state.epoch += 1
            self.run.loader.set_epoch(self.state.epoch)
            self._mark_position()
            why = self._limit_reached()
        return why

    def _limit_reached(self) -> str:
        config, state = self.config, self.state
        if config.max_steps is not None and state.step >= config.max_steps:
            return f"max_steps={config.max_steps}"
        if config.max_epochs is not None and state.epoch >= config.max_epochs:
            return f"max_epochs={config.max_epochs}"
        return ""

    def _epoch(self) -> str:
        """Steps until the epoch ends ("") or the run does (the reason)."""
        config = self.config
        steps = Steps(iter(self.run.loader), self.objective, self.world, self.device, config.accumulation, config.input_noise)
        step = self._fetch(steps)
        if step is not None and self._made_one and (why := self._flagged(step)):
            return why
        while step is not None:
            why = self._flagged(step)  # of the first one: a run makes at least one step
            outcomes, result, factor = self._compute(step.micros, step.totals)
            if config.max_steps is not None and self.state.step >= config.max_steps:
                why = f"max_steps={config.max_steps}"
            self._mark_position()
            following = None if why else self._fetch(steps)
            self._account(step, outcomes, result, factor)
            if self.state.step % config.save_every == 0:
                self.save()
            if self.run.validation is not None and self.state.step % config.validate_every == 0:
                self.validate()
            why = why or (self._flagged(following) if following is not None else "")
            if why:
                return why
            step = following
        return ""

    def _fetch(self, steps: Steps) -> Step | None:
        """The next step, on its way to the device (all ranks call together)."""
        self._phase("data")
        minutes = (time.monotonic() - self._started) / 60
        time_up = self.world.is_main and self.config.max_minutes is not None and minutes >= self.config.max_minutes
        return steps.next(flags=[self._stop.wanted, time_up])

    def _flagged(self, step: Step) -> str:
        """Why the run ends, as the ranks agreed when ``step`` was fetched."""
        signalled, time_up = step.flags
        if signalled:
            return "a signal asked for it; start again to continue"
        return f"max_minutes={self.config.max_minutes:g}" if time_up else ""

    def _mark_position(self) -> None:
        """What a checkpoint says of this rank from now on."""
        self._position = {"rng": devices.rng_state(self.device), "data": self.run.loader.state_dict()}

    def _compute(self, micros: list[MicroBatch], totals: dict[str, float]) -> tuple[list[Outcome], StepResult, float]:
        """Forward, backward and update over this rank's micro-batches. Nothing is read from the device."""
        outcomes: list[Outcome] = []
        for i, micro in enumerate(micros):
            self._phase("forward")
            outcome: Outcome = self.engine.forward(micro, dict(totals))
            self._phase("backward")
            self.engine.backward(outcome.loss, last=i == len(micros) - 1)
            outcome.loss = outcome.loss.detach()
            outcomes.append(outcome)
        self._phase("update")
        optim = self.config.optim
        factor = schedule.factor(optim, self.state.step + 1, optim.total_steps or self.run.expected_steps)
        result = self.engine.step(factor)
        self.state.step += 1
        self._made_one = True
        return outcomes, result, factor

    def _account(self, step: Step, outcomes: list[Outcome], result: StepResult, factor: float) -> None:
        """Read what a step came to and report it."""
        norm, outcomes = report.read(result.norm, outcomes)
        if math.isfinite(norm):
            self.state.bad_steps = 0
        else:
            self._bad_step(step.micros, outcomes, norm)
        self.state.targets += int(step.totals["lm"])
        self._window.steps += 1
        self._window.waited += step.waited
        for micro, outcome in zip(step.micros, outcomes, strict=True):
            self._window.add(micro, outcome)
        assert self.progress is not None
        self.progress.advance(self._report(norm, factor) if self.state.step % self.config.log_every == 0 else None)
        self.state.seconds = self._seconds_before + time.monotonic() - self._started
        self._phase("stepped", self.state.step)

    # ---- reports -----------------------------------------------------------------------------------------------------

    def _bad_step(self, micros: list[MicroBatch], outcomes: list[Outcome], norm: float) -> None:
        """The update was left out on all ranks; name the samples that did it, and stop when it does not end."""
        mine = report.suspects(self.world.rank, micros, outcomes)
        finite = not self.world.any(mine.kind == "loss")
        found = report.named(self.world.gather(mine))
        if self.world.is_main:
            what = "; ".join(f"rank {s.rank}, {s.kind}: {', '.join(filter(None, s.keys))}" for s in found)
            log.error("step %d skipped, not finite (norm %s). Samples: %s", self.state.step, norm, what)
            assert self.progress is not None
            self.progress.write("skipped", self.state.step, {"samples": [key for s in found for key in s.keys if key]})
        if self.config.precision == "fp16" and finite:
            return  # the loss scale was too high; it has been lowered
        counter = BadSteps(self.config.safety.max_bad_steps, self.state.bad_steps)
        self.state.bad_steps += 1
        counter.bad(
            f"look at the samples named in the log and at the learning rate, then start again: the checkpoint of step {self._saved_step} is "
            "untouched"
        )

    def _report(self, norm: float, factor: float) -> dict[str, str]:
        """One line for metrics.jsonl, summed over ranks; returns what the bar shows."""
        window, self._window = self._window, report.Window()
        sums, speed = window.close(self.world, devices.peak_memory(self.device))
        values: dict[str, Any] = {**sums.means(), "lr_factor": factor, "grad_norm": norm, **speed}
        values |= {"epoch": self.state.epoch, "targets": self.state.targets}
        assert self.progress is not None
        self.progress.write("train", self.state.step, values)
        return report.shown(sums, values)

    def _phase(self, name: str, step: int | None = None) -> None:
        """Tell the watchdog and whoever listens what begins now, in the step that is being made."""
        step = self.state.step + 1 if step is None else step
        if self.run.watchdog is not None:
            self.run.watchdog.beat(step, name)
        if self.run.on_phase is not None:
            self.run.on_phase(step, name)

    # ---- state and validation ----------------------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint of this step, unless there is one already."""
        if self.is_saved:
            return
        self._phase("save")
        if self.checkpoints.save(self.engine, self.state, self._position, self.facts):
            self._saved_step = self.state.step

    @property
    def is_saved(self) -> bool:
        """Whether the newest checkpoint is that of the last step."""
        return self._saved_step == self.state.step

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss per task on the held-out batches (all ranks together) and what the validators measure; training state is
        left as it was."""
        assert self.run.validation is not None
        with self._evaluating():
            held_out = itertools.islice(self.run.validation, self.config.validate_batches)
            steps, sums = Steps(held_out, self.objective, self.world, self.device), report.Sums()
            self._phase("validate")
            while (step := steps.next()) is not None:
                for micro in step.micros:
                    sums.add(micro, self.engine.forward(micro, {}))
                self._phase("validate")
            values = sums.over(self.world).means()
            for name, validator in self.validators.items():
                values |= {f"{name}.{key}": value for key, value in validator(self).items()}
        assert self.progress is not None
        self.progress.write("validation", self.state.step, values)
        self.progress.say(f"step {self.state.step} validation: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
        return values

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode; afterwards train mode as the stage wants it, and the random states of before."""
        rng = devices.rng_state(self.device)
        self.objective.eval()
        try:
            yield
        finally:
            self.objective.train()
            stages.set_modes(self.objective.model, self.config)
            devices.set_rng_state(rng, self.device)
