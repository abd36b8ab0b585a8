"""Teach a trained flow to speak in a few steps without guidance, and write it as a complete token2wav directory.

    python -m osum_echat.training.token2wav.distill --config recipes/mini/conf/token2wav/distill.yaml [key=value ...]

The student is the same network with the same names, so a distilled ``flow.pt`` is read by the code that reads the
published one; only the number of steps, the absent guidance and the word ``distilled`` in ``cosyvoice.yaml`` differ. It
is taught in phases (``phases``):

1. *Guidance* (as many steps as the teacher takes): at points of the guided teacher's path the student learns its
  velocity, so that one row a
   step replaces two (arXiv 2210.03142).
2. *Fewer steps*: for every step of the student its teacher takes several. The student learns their mean velocity over
  that interval, which is the
   interval splitting of SplitMeanFlow (arXiv 2507.16884) on a fixed grid: (c - a) u(a, c) = (b - a) u(a, b) + (c - b)
   u(b, c). It needs no derivative of the network (JVP), and since the grid is fixed, the time of a step says its
   interval: no second time input.

The teacher of a phase is the student that the phase before has made; of the first one, the guided flow. If that phase
has fewer steps than the teacher takes, guidance and steps are learnt at once. With ``keep_paths`` its paths are
computed once for each recording (`taught_paths`).

In the second kind the student walks on its own path and each step aims at the teacher's next point, so that a later
step mends what an earlier one missed. Encoder, regulator and speaker projection stay the teacher's. Recordings are
needed only for their codes, their voice and, where rows show a prompt, their beginning; what the student says is
compared with what the teacher says.

Shapes: B batch, T mel frames, M mel bins, N tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from osum_echat.token2wav import released_yaml
from osum_echat.token2wav.checkpoint import load_into, read_weights
from osum_echat.token2wav.config import FlowConfig, mel_frames
from osum_echat.token2wav.estimator import Padding
from osum_echat.token2wav.flow import FlowModel, time_grid
from osum_echat.training.token2wav.directory import NAME, describe
from osum_echat.training.token2wav.loop import command
from osum_echat.training.token2wav.recipe import Means, adamw
from osum_echat.training.token2wav.spoken import FlowBatch, Row, Spoken, SpokenRecipe, SpokenTraining, masked_mean, regulated
from osum_echat.training.token2wav.taught_paths import Task, TaughtPath, TaughtPaths, join

COMPANIONS = (
    "hift.pt",
    "hift.safetensors",
    "speech_tokenizer_v1.onnx",
    "campplus.onnx",
    "spk2info.pt",
    "speaker.safetensors",
)
"""Files of the teacher's directory that the student's needs as they are."""


@dataclass
class Phase:
    """From the training step ``begin`` on the student takes ``steps`` Euler steps."""

    steps: int
    begin: int = 0


@dataclass(kw_only=True)
class Distillation(SpokenTraining):
    """The YAML file of this command.

    Attributes:
        teacher: a token2wav directory whose flow was not distilled itself.
        teacher_steps: Euler steps of the teacher that are taken as the truth.
        phases: each number of steps divides the one before (the first one ``teacher_steps``).
        points: of the teacher's path, at which guidance is learnt, for each row and training step.
        keep_paths: one row and noise for each recording, whose path by the first teacher is computed once and kept in
            ``out``.
        cut_share: share of the rows that are a random part of a recording, as the windows of a stream are.
        cut_tokens: shortest and longest part.
    """

    target: Path = Path("exp/token2wav/distilled/flow.pt")
    teacher: Path = Path("exp/token2wav/model")
    teacher_steps: int = 12
    phases: list[Phase] = field(default_factory=lambda: [Phase(12), Phase(4, 2000), Phase(2, 6000)])
    max_steps: int = 16000
    points: int = 4
    keep_paths: bool = False
    cut_share: float = 0.3
    cut_tokens: tuple[int, int] = (20, 78)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.phases or self.phases[0].begin != 0:
            raise ValueError("phases: the first begins at step 0")
        taken = [self.teacher_steps, *(phase.steps for phase in self.phases)]
        for index, (before, steps) in enumerate(itertools.pairwise(taken)):
            if steps < 1 or before % steps or (index and before == steps):
                raise ValueError(
                    f"phases: {steps} steps do not divide the {before} that are taken before; for example 12, 4, 2, 1"
                )
        if any(after.begin <= before.begin for before, after in itertools.pairwise(self.phases)):
            raise ValueError("phases: each begins after the one before it")
        if self.keep_paths and self.phases[0].steps == self.teacher_steps:
            raise ValueError(
                "keep_paths: the first phase learns at other points every time; give it fewer steps than teacher_steps"
            )

    def phase_at(self, step: int) -> int:
        """Index of the phase that the training step belongs to."""
        return max(index for index, phase in enumerate(self.phases) if phase.begin <= step)


class _Progress(nn.Module):
    """The phase that the weights are in, as a part of the checkpoint."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("index", torch.zeros((), dtype=torch.long))


class DistillRecipe(SpokenRecipe[Distillation]):
    """Student and teacher, the loss, measures and export."""

    averaged: tuple[str, ...] = ("student",)

    def __init__(self, cfg: Distillation) -> None:
        directory = released_yaml.load_config(cfg.teacher / NAME)
        self.directory = directory
        if directory.flow.solver.distilled:
            raise ValueError(f"{cfg.teacher}: this flow was distilled already; teach from the one that it comes from")
        if cfg.target.resolve().parent == cfg.teacher.resolve():
            raise ValueError(f"target: {cfg.target} would replace the teacher; choose another directory")
        super().__init__(cfg, directory.flow)
        self.flow = FlowModel(directory.flow)
        state, where = read_weights(cfg.teacher, "flow")
        load_into(self.flow, state, str(where))
        self.flow.to(self.device).requires_grad_(False)
        student = self.flow.decoder.estimator
        original = copy.deepcopy(self.flow).eval()
        original.prepare()  # it is only asked
        self.original = original.decoder.estimator
        self.teacher = copy.deepcopy(student)
        self.student = student.requires_grad_(True)
        self.progress = _Progress()
        self.modules = nn.ModuleDict({"student": self.student, "teacher": self.teacher, "progress": self.progress}).to(
            self.device
        )
        self.optimizers = {"student": adamw(self.student.parameters(), cfg.optim)}
        self._said: dict[int, Tensor] = {}
        weights = hashlib.sha256(where.read_bytes()).hexdigest()
        teaching = (directory.flow.solver, cfg.teacher_steps, cfg.phases[0].steps)
        rows = (cfg.seed, cfg.cut_share, cfg.cut_tokens, cfg.prompt_share, cfg.prompt_most, cfg.joined_share)
        made_of = (weights, teaching, rows, [utterance.key for utterance in self.train.utterances])
        self.paths = TaughtPaths(cfg.out / "paths", made_of, self._taught)

    # -- what is said --------------------------------------------------------------------------------------------------

    def rows(self, indices: Sequence[int], rng: np.random.Generator) -> list[Row]:
        return [self._cut(row, rng) if rng.random() < self.cfg.cut_share else row for row in super().rows(indices, rng)]

    def _cut(self, row: Row, rng: np.random.Generator) -> Row:
        """A random part of a single recording, without a prompt; joined ones stay."""
        shortest, longest = self.cfg.cut_tokens
        spoken = row.parts[-1]
        if len(row.parts) > 1 or len(spoken.tokens_N) <= shortest:
            return row
        count = int(rng.integers(shortest, min(longest, len(spoken.tokens_N)) + 1))
        start = int(rng.integers(len(spoken.tokens_N) - count + 1))
        first = mel_frames(start, self.model.input_frame_rate)
        mel_TM = spoken.mel_TM[first : first + mel_frames(count, self.model.input_frame_rate)]
        return Row([Spoken(spoken.tokens_N[start : start + count], mel_TM, spoken.embedding_S)], 0)

    @torch.no_grad()
    def _task(self, batch: FlowBatch, rng: np.random.Generator) -> Task:
        noise_BTM = torch.from_numpy(rng.standard_normal(batch.mel_BTM.shape, dtype=np.float32)).to(self.device)
        with self.autocast():
            mu_BTM, spk_BM = regulated(self.flow, batch), self.flow.speaker(batch.embedding_BS).float()
        padding = Padding.of(batch.lengths_B, batch.mel_BTM.shape[1])
        return Task(noise_BTM * self.model.solver.temperature, mu_BTM, spk_BM, batch.cond_BTM, padding)

    @torch.no_grad()
    def _taught(self, index: int) -> TaughtPath | None:
        """The row of a recording and what the first teacher says to it, at the times of the first phase."""
        rng = np.random.default_rng([self.cfg.seed, index])
        if self.train.get(index) is None:
            return None
        task = self._task(self.batch(self.rows([index], rng), multiple=1), rng)
        points = task.path(self.original, self._grid(self.cfg.teacher_steps), self.model.solver.inference_cfg_rate)
        every = self.cfg.teacher_steps // self.cfg.phases[0].steps
        points_PTM = torch.cat(points[::every]).cpu()
        return TaughtPath(task.mu_BTM[0].cpu(), task.spk_BM[0].cpu(), task.cond_BTM[0].cpu(), points_PTM)

    def _grid(self, steps: int) -> list[float]:
        return time_grid(steps, self.model.solver.t_scheduler)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def train_step(self, step: int) -> dict[str, float]:
        self._enter(self.cfg.phase_at(step))
        rng = self.rng(step)
        steps, guidance = self.cfg.phases[self.phase].steps, 0.0
        taken = self.cfg.phases[self.phase - 1].steps
        if self.phase == 0:
            taken, guidance = self.cfg.teacher_steps, self.model.solver.inference_cfg_rate
        if self.phase == 0 and self.cfg.keep_paths:
            found = [path for index in self.batches(step) if (path := self.paths.get(index)) is not None]
            if not found:
                raise RuntimeError(f"no utterance of this batch could be read: {self.train.skips}")
            task, points = join(found, self.device)
        else:
            task = self._task(self.batch(self.rows(self.batches(step), rng)), rng)
            with self.autocast(), torch.no_grad():
                points = task.path(self.teacher, self._grid(taken), guidance)
        with self.autocast():
            if taken == steps:
                loss = self._guidance_loss(task, points, rng)
            else:
                loss = self._interval_loss(task, points[:: (len(points) - 1) // steps])
        return {"distance": float(loss.detach()), "grad": self.update("student", loss)}

    @property
    def phase(self) -> int:
        return int(self.progress.index)

    def _enter(self, phase: int) -> None:
        """Into a later phase: what the student has become teaches it from now on."""
        while self.phase < phase:
            state = {key: value.detach().clone() for key, value in self.student.state_dict().items()}
            if self.average is not None:
                state = {key: self.average.weights[f"student.{key}"].clone() for key in state}
            self.student.load_state_dict(state)
            self.teacher.load_state_dict(state)
            self.progress.index += 1

    def _guidance_loss(self, task: Task, points: list[Tensor], rng: np.random.Generator) -> Tensor:
        """Squared distance of velocities at some points of the guided teacher's path."""
        grid = self._grid(len(points) - 1)
        chosen = rng.choice(len(grid) - 1, size=min(self.cfg.points, len(grid) - 1), replace=False)
        losses = []
        for at in map(int, chosen):
            wanted_BTM = (points[at + 1] - points[at]) / (grid[at + 1] - grid[at])
            losses.append(masked_mean((task.velocity(self.student, points[at], grid[at]) - wanted_BTM).square(), task.padding))
        return torch.stack(losses).mean()

    def _interval_loss(self, task: Task, points: list[Tensor]) -> Tensor:
        """Squared distance of mean velocities over the student's intervals, each weighted by its length, on the
        student's own path. ``points``: the teacher's at the ends of the intervals."""
        grid = self._grid(len(points) - 1)
        x_BTM, loss = task.noise_BTM, torch.zeros((), device=self.device)
        for (begin, end), aim_BTM in zip(itertools.pairwise(grid), points[1:], strict=True):
            v_BTM = task.velocity(self.student, x_BTM, begin)
            wanted_BTM = (aim_BTM - x_BTM) / (end - begin)
            loss = loss + (end - begin) * masked_mean((v_BTM - wanted_BTM).square(), task.padding)
            x_BTM = x_BTM + (end - begin) * v_BTM.detach()
        return loss

    # -- measures, files -----------------------------------------------------------------------------------------------

    def validate(self) -> dict[str, float]:
        """L1 distance of held-out log-mels: what the student says to what the guided teacher says in its ten steps, and
        both to the recording."""
        means = Means()
        grid = self._grid(self.cfg.phases[self.phase].steps)
        solver = self.model.solver
        for count, spoken in self.held_out():
            batch = self.batch([Row([spoken], 0)])
            task = self._task(batch, self.rng(0, count))
            if count not in self._said:
                self._said[count] = task.path(self.original, self._grid(solver.steps), solver.inference_cfg_rate)[-1]
            student_BTM, teacher_BTM = task.path(self.student, grid, 0.0)[-1], self._said[count]
            for name, a, b in (
                ("to_teacher_l1", student_BTM, teacher_BTM),
                ("student_l1", student_BTM, batch.mel_BTM),
                ("teacher_l1", teacher_BTM, batch.mel_BTM),
            ):
                means.add({name: float(masked_mean((a - b).abs(), task.padding))})
        return means.values()

    def export(self) -> list[Path]:
        """``flow.pt`` (a flat state dict), ``cosyvoice.yaml``, and what else the teacher's directory holds."""
        folder = self.cfg.target.parent
        folder.mkdir(parents=True, exist_ok=True)
        written = [self.write_weights(self.flow), describe(folder, flow=self.config(), vocoder=self.directory.vocoder)]
        for name in COMPANIONS:
            if (self.cfg.teacher / name).is_file() and not (folder / name).exists():
                written.append(Path(shutil.copyfile(self.cfg.teacher / name, folder / name)))
        return written

    def config(self) -> FlowConfig:
        """The student's: the steps of its phase, no guidance."""
        steps = self.cfg.phases[self.phase].steps
        solver = dataclasses.replace(self.model.solver, steps=steps, inference_cfg_rate=0.0, distilled=True)
        return dataclasses.replace(self.model, solver=solver)


def main(argv: list[str] | None = None) -> int:
    return command(Distillation, DistillRecipe, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
