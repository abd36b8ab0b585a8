"""The training loop: the same for every stage and engine.

One step: every rank fetches up to ``accumulation`` micro-batches; one exchange of a few numbers tells everybody how many micro-batches
the step has, how many targets they hold together, and whether to stop; then forward and backward for each, one update, a report. A rank that
has run out of data while others have not runs placeholders without targets, so all ranks take the same steps and no sample is left
out. Anything that may end or change the run is decided in that exchange, never by one rank alone.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from osum_echat import config as config_io
from osum_echat import device as devices
from osum_echat.data.batch import Batch
from osum_echat.training import schedule
from osum_echat.training.checkpoint import Checkpoints, TrainState, read_state, rng_from_plain
from osum_echat.training.config import TrainConfig
from osum_echat.training.distributed import World
from osum_echat.training.engines import Engine, StepResult
from osum_echat.training.objective import MicroBatch, Objective, Outcome, placeholder
from osum_echat.training.progress import Progress, draw_curves
from osum_echat.training.watchdog import Watchdog

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
Validator = Callable[["Trainer"], Mapping[str, float]]


class Loader(Protocol):
    """What the loop needs of a data loader (`data.loader.Loader`).

    Iterating yields what is left of the current epoch; the next iteration is the next epoch. ``state_dict`` says where the last batch
    that was handed out ended.
    """

    def __iter__(self) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TooManyBadSteps(RuntimeError):
    """The loss or the gradients were not finite for ``safety.max_bad_steps`` steps in a row."""


@dataclass
class Window:
    """What the reports between two log lines are computed from."""

    nll: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    targets: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    padding: float = 0.0
    positions: float = 0.0
    began: float = field(default_factory=time.monotonic)
    steps: int = 0
    waited: float = 0.0


class Trainer:
    """One run on one rank. Build it with `build.trainer`, then `run`.

    Args:
        objective: model and loss, already inside ``engine``.
        loader: this rank's batches; validation: held-out batches for this rank, or None.
        validators: named functions that measure the model on real tasks; they get the trainer and return numbers. Run on rank 0's
            weights by all ranks together.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        engine: Engine,
        loader: Loader,
        world: World,
        device: torch.device,
        validation: Loader | None = None,
        validators: Mapping[str, Validator] | None = None,
        tokenizer: Any = None,
        expected_steps: int | None = None,
        watchdog: Watchdog | None = None,
        facts: Mapping[str, Any] | None = None,
        bar: bool = True,
    ):
        self.config, self.objective, self.engine, self.loader = config, objective, engine, loader
        self.world, self.device, self.validation, self.tokenizer = world, device, validation, tokenizer
        self.validators = dict(validators or {})
        self.out = Path(config.out)
        self.expected_steps = expected_steps
        self.watchdog = watchdog
        self.facts = {"config": config_io.to_dict(config), "engine_name": type(engine).__name__, **(facts or {})}
        self.state = TrainState()
        self.checkpoints = Checkpoints(self.out / CHECKPOINTS, world, config.keep)
        self.progress: Progress | None = None
        self._bar = bar
        self._stop_signal: int | None = None
        self._saved_step = -1
        self._window = Window()
        self._mels = objective.model.config.encoder.mels

    # ---- the run ------------------------------------------------------------------------------------------------------------------

    def resume(self) -> bool:
        """Continue from the newest checkpoint of this run's folder; False when there is none."""
        path = self.world.broadcast(self.checkpoints.latest())
        if path is None:
            return False
        self._check_fits(read_state(path), path)
        self.state, ranks, content = self.checkpoints.load(path, self.engine)
        written_by = content["world_size"]
        if written_by == self.world.size:
            mine = ranks[self.world.rank]
            devices.set_rng_state(rng_from_plain(mine["rng"]), self.device)
            self.loader.load_state_dict(mine["data"])
            told = "data and random states continue exactly"
        else:
            devices.seed_all(self.config.seed + 7919 * (self.state.step + 1) + self.world.rank)
            told = self._reposition([r["data"] for r in ranks])
        self._saved_step = self.state.step
        if self.world.is_main:
            ours = self.facts["config"]
            changed = sorted(k for k in ours if ours[k] != content["config"].get(k))
            log.info("resumed %s (step %d, written by %d ranks): %s", path, self.state.step, written_by, told)
            if changed:
                log.warning("the config has changed since that checkpoint in: %s", ", ".join(changed))
        return True

    def _check_fits(self, content: dict[str, Any], path: Path) -> None:
        """Refuse a checkpoint of another engine family, or one whose frozen weights were others than those read now."""
        theirs = content.get("engine_name", "")
        if (theirs == "DeepSpeedEngine") != (self.facts["engine_name"] == "DeepSpeedEngine"):
            raise ValueError(
                f"{path} was written by {theirs}, this run uses {self.facts['engine_name']}; keep the engine, or start a new run with "
                "init.checkpoint pointing at this training folder"
            )
        before, now = content.get("frozen", {}), self.facts.get("frozen", {})
        changed = [name for name, value in before.items() if now.get(name) != value]
        if changed and not self.config.save_frozen:
            raise ValueError(
                f"{len(changed)} frozen parameters (such as {changed[0]}) differ from those that {path} was trained with; "
                "restore the checkpoint named by init, or start a new run"
            )

    def _reposition(self, states: list[dict[str, Any]]) -> str:
        """Data position after a change of the number of ranks; returns what to tell."""
        merge = getattr(self.loader, "load_state_dicts", None)
        if merge is not None:
            return str(merge(states))
        return (
            f"weights and optimiser are re-shared over {self.world.size} ranks, new random states; the loader cannot translate the positions of "
            f"{len(states)} ranks, so the epoch begins again and samples already seen in it are seen once more"
        )

    def run(self) -> TrainState:
        """Train until the config's limit, the end of the data or a signal; always leaves a checkpoint of the last step."""
        config = self.config
        self.progress = Progress(self.out, self.expected_steps, self.state.step, self.world.is_main, self._bar)
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        self._started = time.monotonic() - self.state.seconds
        why, idle = "nothing to do: the limit of this run was reached before", 0
        try:
            finished = bool(self._limit_reached())
            while not finished:
                before = self.state.step
                why = self._epoch()
                if why == "":
                    idle = idle + 1 if self.state.step == before else 0
                    if idle > 1:  # once may be the rest of an epoch that a checkpoint ended
                        raise ValueError("an epoch without a single batch: look at data.streams and at what the filters dropped")
                    self.state.epoch += 1
                    why = self._limit_reached()
                finished = bool(why)
            if self.validation is not None and self.state.step % config.validate_every and self._stop_signal is None:
                self.validate()
            self.save()
            if self.world.is_main:
                draw_curves(self.out / "metrics.jsonl", self.out / "curves.png")
            self.progress.say(f"stopped at step {self.state.step}: {why}")
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.progress.close()
            if self.watchdog is not None:
                self.watchdog.close()
        return self.state

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
        batches = iter(self.loader)
        while True:
            self._beat("data")
            began = time.monotonic()
            micros = self._fetch(batches)
            self._window.waited += time.monotonic() - began
            minutes = (time.monotonic() - self._started) / 60
            time_up = config.max_minutes is not None and minutes >= config.max_minutes
            names = self.objective.names
            own = [float(len(micros)), float(self._stop_signal is not None), float(time_up and self.world.is_main)]
            own += [sum(m.counts.get(name, 0.0) for m in micros) for name in names]
            table = self.world.table(own)
            number = int(table[:, 0].max())
            if number == 0:
                return ""
            totals = dict(zip(names, table[:, 3:].sum(0).tolist(), strict=True))
            while len(micros) < number:
                micros.append(self.objective.prepare(placeholder(self._mels), self.device))
            self._step(micros, totals)
            self.state.seconds = time.monotonic() - self._started
            step = self.state.step
            if step % config.save_every == 0:
                self.save()
            if self.validation is not None and step % config.validate_every == 0:
                self.validate()
            if table[:, 1].max() > 0:
                return "a signal asked for it; start again to continue"
            if table[:, 2].max() > 0:
                return f"max_minutes={config.max_minutes:g}"
            if config.max_steps is not None and step >= config.max_steps:
                return f"max_steps={config.max_steps}"

    def _fetch(self, batches: Iterator[Batch]) -> list[MicroBatch]:
        micros: list[MicroBatch] = []
        for batch in batches:
            micros.append(self.objective.prepare(batch, self.device, self.config.input_noise))
            if len(micros) == self.config.accumulation:
                break
        return micros

    def _step(self, micros: list[MicroBatch], totals: Mapping[str, float]) -> None:
        """Forward, backward and update over this rank's micro-batches."""
        outcomes: list[Outcome] = []
        for i, micro in enumerate(micros):
            self._beat("forward")
            outcome: Outcome = self.engine.forward(micro, dict(totals))
            self._beat("backward")
            self.engine.backward(outcome.loss, last=i == len(micros) - 1)
            outcome.loss = outcome.loss.detach()
            outcomes.append(outcome)
        self._beat("update")
        factor = schedule.factor(self.config.optim, self.state.step + 1, self.config.optim.total_steps or self.expected_steps)
        result = self.engine.step(factor)
        self.state.step += 1
        self._after_step(micros, outcomes, totals, result, factor)

    # ---- after a step -------------------------------------------------------------------------------------------------------------

    def _after_step(
        self, micros: list[MicroBatch], outcomes: list[Outcome], totals: Mapping[str, float], result: StepResult, factor: float
    ) -> None:
        if result.updated:
            self.state.bad_steps = 0
        else:
            self._bad_step(micros, outcomes, result)
        self.state.targets += int(totals["lm"])
        window = self._window
        window.steps += 1
        for micro, outcome in zip(micros, outcomes, strict=True):
            for task, nll, targets in zip(micro.batch.tasks, outcome.nll_D.tolist(), outcome.targets_D.tolist(), strict=True):
                if targets and math.isfinite(nll):
                    window.nll[task] += nll
                    window.targets[task] += targets
            for name, value in outcome.parts.items():
                if name != "lm" and math.isfinite(float(value)):
                    window.parts[name] += float(value)
                    window.counts[name] += micro.counts.get(name, 0.0)
            positions = micro.batch.num_positions
            window.positions += positions
            window.padding += positions * micro.batch.rows.padding_fraction
        shown = None
        if self.state.step % self.config.log_every == 0:
            shown = self._report(result, factor)
        assert self.progress is not None
        self.progress.advance(shown)

    def _bad_step(self, micros: list[MicroBatch], outcomes: list[Outcome], result: StepResult) -> None:
        """The update was left out on all ranks; say which samples did it, and stop when it does not end."""
        guilty = [
            micro.batch.keys[d]
            for micro, outcome in zip(micros, outcomes, strict=True)
            for d in spoiled(micro.batch, outcome.nll_D)
        ]
        finite = all(bool(torch.isfinite(o.loss)) for o in outcomes)
        kind = "loss" if not finite else "gradient"
        scaled = self.config.precision == "fp16" and not self.world.any(not finite)
        keys = guilty or [k for m in micros for k in m.batch.keys]
        self.state.bad_steps += 0 if scaled else 1
        everyone = [line for line in self.world.gather((self.world.rank, kind, keys, finite and not guilty)) if line[2]]
        if any(not line[3] for line in everyone):  # some rank knows the culprit: the others' gradients only inherited it
            everyone = [line for line in everyone if not line[3]]
        if self.world.is_main:
            what = "; ".join(f"rank {rank}, {kind}: {', '.join(filter(None, keys))}" for rank, kind, keys, _ in everyone)
            log.error("step %d skipped, not finite (norm %s). Samples: %s", self.state.step, result.grad_norm, what)
            assert self.progress is not None
            self.progress.write("skipped", self.state.step, {"samples": [k for line in everyone for k in line[2] if k]})
        if self.state.bad_steps >= self.config.safety.max_bad_steps:
            raise TooManyBadSteps(
                f"{self.state.bad_steps} steps in a row had a non-finite loss or gradient; look at the samples named in the log and at the "
                f"learning rate, then start again: the checkpoint of step {self._saved_step} is untouched"
            )

    def _report(self, result: StepResult, factor: float) -> dict[str, str]:
        """One line for metrics.jsonl, summed over ranks; what the bar shows."""
        window, self._window = self._window, Window()
        rows = self.world.gather(
            (dict(window.nll), dict(window.targets), dict(window.parts), dict(window.counts), window.padding, window.positions,
             devices.peak_memory(self.device), window.waited)
        )  # fmt: skip
        nll, targets, parts, counts = (_sum_maps([row[i] for row in rows]) for i in range(4))
        seconds = max(time.monotonic() - window.began, 1e-9)
        all_targets = sum(targets.values())
        values: dict[str, Any] = {
            "loss": sum(nll.values()) / max(all_targets, 1.0),
            **{f"loss/{task}": nll[task] / targets[task] for task in sorted(targets)},
            **{name: parts[name] / max(counts.get(name, 0.0), 1.0) for name in sorted(parts)},
            "lr_factor": factor,
            "grad_norm": result.grad_norm,
            "targets_per_s": all_targets / seconds,
            "steps_per_s": window.steps / seconds,
            "padding": sum(r[4] for r in rows) / max(sum(r[5] for r in rows), 1.0),
            "memory_gb": max(r[6] for r in rows) / 2**30,
            "waited_for_data": max(r[7] for r in rows) / seconds,
            "epoch": self.state.epoch,
            "targets": self.state.targets,
        }
        assert self.progress is not None
        self.progress.write("train", self.state.step, values)
        shown = {"loss": f"{values['loss']:.3f}", "targets/s": f"{values['targets_per_s']:.0f}"}
        shown |= {"pad": f"{values['padding']:.0%}", "GB": f"{values['memory_gb']:.1f}"}
        shown |= {task.replace("<", "").replace(">", ""): f"{nll[task] / targets[task]:.2f}" for task in sorted(targets)[:6]}
        return shown

    def _beat(self, phase: str) -> None:
        if self.watchdog is not None:
            self.watchdog.beat(self.state.step + 1, phase)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._stop_signal is not None:
            raise KeyboardInterrupt  # the second time we are meant to go at once
        self._stop_signal = number
        log.warning("signal %d: finishing this step, saving, stopping (once more: stop at once)", number)

    # ---- state and validation -----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint of this step, unless there is one already."""
        if self.is_saved:
            return
        self._beat("save")
        mine = {"rng": devices.rng_state(self.device), "data": self.loader.state_dict()}
        if self.checkpoints.save(self.engine, self.state, mine, self.facts):
            self._saved_step = self.state.step

    @property
    def is_saved(self) -> bool:
        """Whether the newest checkpoint is that of the last step."""
        return self._saved_step == self.state.step

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss per task on the held-out batches (all ranks together) and what the validators measure; training state is left as it was."""
        assert self.validation is not None
        self._beat("validate")
        rng = devices.rng_state(self.device)
        self.objective.eval()
        nll: dict[str, float] = defaultdict(float)
        targets: dict[str, float] = defaultdict(float)
        parts: dict[str, float] = defaultdict(float)
        counts: dict[str, float] = defaultdict(float)
        batches = iter(self.validation)
        seen = 0
        while True:
            limit = self.config.validate_batches
            batch = next(batches, None) if limit is None or seen < limit else None
            if not self.world.any(batch is not None):
                break
            seen += 1
            micro = self.objective.prepare(batch if batch is not None else placeholder(self._mels), self.device)
            outcome: Outcome = self.engine.forward(micro, {})
            for task, value, count in zip(micro.batch.tasks, outcome.nll_D.tolist(), outcome.targets_D.tolist(), strict=True):
                nll[task] += value
                targets[task] += count
            for name in self.objective.names[1:]:
                parts[name] += float(outcome.parts.get(name, 0.0))
                counts[name] += micro.counts.get(name, 0.0)
            self._beat("validate")
        rows = self.world.gather((dict(nll), dict(targets), dict(parts), dict(counts)))
        nll, targets, parts, counts = (_sum_maps([row[i] for row in rows]) for i in range(4))
        values = {"loss": sum(nll.values()) / max(sum(targets.values()), 1.0)}
        values |= {f"loss/{task}": nll[task] / targets[task] for task in sorted(targets) if targets[task]}
        values |= {name: parts[name] / max(counts[name], 1.0) for name in sorted(parts)}
        for name, validator in self.validators.items():
            values |= {f"{name}.{key}": value for key, value in validator(self).items()}
        self.restore_modes()
        devices.set_rng_state(rng, self.device)
        assert self.progress is not None
        self.progress.write("validation", self.state.step, values)
        self.progress.say(f"step {self.state.step} validation: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
        return values

    def restore_modes(self) -> None:
        """Train mode as the stage wants it, after an evaluation."""
        from osum_echat.training.stages import rates, set_modes

        has_lora = any(".lora_" in name for name, _ in self.objective.named_parameters())
        self.objective.train()
        set_modes(self.objective.model, rates(self.config, has_lora))


def spoiled(batch: Batch, nll_D: torch.Tensor) -> list[int]:
    """Numbers of the samples that made a loss non-finite: those with a non-finite recording, else those whose own loss is.

    Inside a packed row a NaN spreads to the samples behind it (a masked key counts zero times NaN), so the recordings are asked first.
    """
    bad_N = ~torch.isfinite(batch.feats_NTF).flatten(1).all(dim=1) if len(batch.feats_NTF) else torch.zeros(0, dtype=torch.bool)
    by_recording = sorted({int(d) for d in batch.sample_N[bad_N] if int(d) < len(batch)})
    return by_recording or torch.nonzero(~torch.isfinite(nll_D))[:, 0].tolist()


def _sum_maps(maps: list[dict[str, float]]) -> dict[str, float]:
    out: dict[str, float] = defaultdict(float)
    for values in maps:
        for key, value in values.items():
            out[key] += value
    return dict(out)
