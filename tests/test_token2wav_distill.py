"""Distillation of the flow: what the student learns, its files, and what a distilled directory takes."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from osum_echat import config
from osum_echat.token2wav import released_yaml
from osum_echat.token2wav.checkpoint import load_into, read_weights
from osum_echat.token2wav.config import SolverConfig
from osum_echat.token2wav.flow import FlowModel, time_grid
from osum_echat.token2wav.model import Token2Wav
from osum_echat.training.token2wav import speaker
from osum_echat.training.token2wav.distill import Distillation, DistillRecipe, Phase
from osum_echat.training.token2wav.loop import Trainer
from osum_echat.training.token2wav.spoken import Row
from tests.token2wav_case import recorded_speaker, recorded_tokens, write_directory
from tests.token2wav_training_case import TINY_RUN, write_flow, write_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records with codes, a speaker net and a teacher: everything that a distillation reads."""
    folder = tmp_path_factory.mktemp("distill")
    write_records(folder, tokens=True)
    plain = {
        "data": {"lists": [str(folder / "list.jsonl")], "held_out": 2},
        **TINY_RUN,
        "model": {"channels": 8, "pooled": 8},
        "target": str(folder / "campplus.onnx"),
        "speakers": str(folder / "spk2info.pt"),
    }
    speaker.SpeakerRecipe(config.from_dict(speaker.SpeakerTraining, plain)).export()
    write_flow(folder / "teacher")
    return folder


def _plain(folder: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "data": {"lists": [str(folder / "list.jsonl")], "held_out": 2},
        **TINY_RUN,
        "ema": None,
        "optim": {"warmup_steps": 1},
        "batch_size": 3,
        "campplus": str(folder / "campplus.onnx"),
        "teacher": str(folder / "teacher"),
        "target": str(out / "model" / "flow.pt"),
        "out": str(out / "run"),
        "teacher_steps": 4,
        "phases": [{"steps": 4}, {"steps": 2, "begin": 2}],
        **more,
    }


def _recipe(folder: Path, out: Path, **more: Any) -> DistillRecipe:
    return DistillRecipe(config.from_dict(Distillation, _plain(folder, out, **more)))


def test_the_teachers_path_is_that_of_synthesis(folder: Path, tmp_path: Path) -> None:
    recipe = _recipe(folder, tmp_path)
    recipe.modules.eval()
    spoken = recipe.valid.get(0)
    assert spoken is not None
    with torch.no_grad():
        batch = recipe.batch([Row([spoken], 0)])
        task = recipe._task(batch, recipe.rng(0))
        path = task.path(recipe.teacher, time_grid(4), 0.7)
        condition = recipe.flow.condition(
            torch.from_numpy(spoken.tokens_N),
            torch.zeros(0, dtype=torch.long),
            torch.zeros(0, 80),
            recipe.flow.speaker(batch.embedding_BS)[0],
        )
        [solved_TM] = recipe.flow.solve([condition], [task.noise_BTM[0, : condition.frames]], 4, 0.7)
    assert len(path) == 5
    torch.testing.assert_close(path[-1][0, : len(solved_TM)], solved_TM, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("keep_paths", [False, True], ids=["phases", "kept paths"])
def test_the_student_comes_to_say_what_its_teacher_says(keep_paths: bool, folder: Path, tmp_path: Path) -> None:
    """Shown on the recordings that it learns from: without noise: a tiny network of random weights
    makes nothing general of them."""
    write_flow(tmp_path / "strong", solver={"inference_cfg_rate": 4.0, "temperature": 0.0, "steps": 2})
    lists = [str(folder / "list.jsonl")]
    more = {
        "data": {"lists": lists, "valid_lists": lists},
        "cut_share": 0.0,
        "prompt_share": 0.0,
        "joined_share": 0.0,
        "points": 2,
    }
    phases: list[dict[str, Any]] = [{"steps": 2}, {"steps": 1, "begin": 30}]
    own = {"teacher_steps": 2, "phases": phases, "optim": {"lr": 3e-3, "warmup_steps": 1}}
    if keep_paths:
        phases = [{"steps": 1}]
        own = {"teacher_steps": 2, "phases": phases, "keep_paths": True, "optim": {"lr": 1e-3, "warmup_steps": 1}}
    recipe = _recipe(folder, tmp_path, teacher=str(tmp_path / "strong"), batch_size=2, **more, **own)
    with torch.no_grad():
        before = recipe.validate()["to_teacher_l1"]
    for step in range(40):
        recipe.train_step(step)
    with torch.no_grad():
        after = recipe.validate()["to_teacher_l1"]
    assert recipe.phase == len(phases) - 1 and after < (0.8 if keep_paths else 0.93) * before


def test_what_the_student_has_become_teaches_the_next_phase(folder: Path, tmp_path: Path) -> None:
    recipe = _recipe(folder, tmp_path, ema=0.5)
    trainer = Trainer(recipe, bar=False)
    original = {key: value.clone() for key, value in recipe.teacher.state_dict().items()}
    trainer.cfg.max_steps = 2
    trainer.fit()
    assert all(torch.equal(value, original[key]) for key, value in recipe.teacher.state_dict().items())
    assert recipe.average is not None
    learnt = {key: value.clone() for key, value in recipe.average.weights.items()}
    recipe.train_step(2)
    assert recipe.phase == 1
    assert all(torch.equal(value, learnt[f"student.{key}"]) for key, value in recipe.teacher.state_dict().items())
    assert any(not torch.equal(value, original[key]) for key, value in recipe.teacher.state_dict().items())
    assert all(torch.equal(value, original[key]) for key, value in recipe.original.state_dict().items())


def test_only_the_estimator_changes_and_the_files_keep_their_form(folder: Path, tmp_path: Path) -> None:
    Trainer(_recipe(folder, tmp_path), bar=False).fit()
    before, _ = read_weights(folder / "teacher", "flow")
    after, _ = read_weights(tmp_path / "model", "flow")
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith("decoder.estimator.") for key in changed)
    found = released_yaml.load_config(tmp_path / "model" / "cosyvoice.yaml")
    assert (found.flow.solver.steps, found.flow.solver.inference_cfg_rate, found.flow.solver.distilled) == (2, 0.0, True)
    own = dataclasses.replace(found.flow.solver, steps=10, inference_cfg_rate=0.7, distilled=False)
    assert dataclasses.replace(found.flow, solver=own) == released_yaml.load_config(folder / "teacher" / "cosyvoice.yaml").flow


def test_the_published_form_is_distilled_by_the_same_command_and_speaks(folder: Path, tmp_path: Path) -> None:
    """The recorded tiny model has the form of the published directory: its yaml, its names, 4096 codes, a prompt at synthesis."""
    teacher = write_directory(tmp_path / "published")
    shutil.copyfile(folder / "campplus.onnx", teacher / "campplus.onnx")
    recipe = _recipe(folder, tmp_path, teacher=str(teacher), max_steps=3)
    Trainer(recipe, bar=False).fit()
    model = Token2Wav.load(tmp_path / "model", device="cpu")
    assert model.config.flow.vocab_size == released_yaml.load_config(teacher / "cosyvoice.yaml").flow.vocab_size
    voice = recorded_speaker()
    samples, _ = model.synthesize(recorded_tokens(20), voice)
    assert len(samples) == 68 * 256 and np.isfinite(samples).all()
    assert np.array_equal(samples, model.synthesize(recorded_tokens(20), voice, steps=2, guidance=0.0)[0])
    for wrong in ({"steps": 10}, {"guidance": 0.7}, {"schedule": "linear"}):
        with pytest.raises(ValueError, match="distilled to 2 steps"):
            model.synthesize(recorded_tokens(20), voice, **wrong)
        with pytest.raises(ValueError, match="distilled to 2 steps"):
            model.open_stream(voice, **wrong)
    streamed = np.concatenate(list(model.stream(iter(recorded_tokens(60)), voice)))
    assert len(streamed) == len(model.synthesize(recorded_tokens(60), voice)[0])


def test_directories_without_the_new_keys_keep_ten_steps_and_guidance(folder: Path) -> None:
    solver = SolverConfig()
    assert solver.chosen(None, None, None) == (10, 0.7, "cosine")
    assert solver.chosen(4, 0.0, "linear") == (4, 0.0, "linear")
    flow = FlowModel(released_yaml.load_config(folder / "teacher" / "cosyvoice.yaml").flow)
    load_into(flow, read_weights(folder / "teacher", "flow")[0], "teacher")
    noise, mu, spk = torch.randn(1, 12, 80), torch.randn(1, 12, 80), torch.randn(1, 80)
    with torch.no_grad():
        own = flow.decoder.solve(noise, mu, spk, torch.zeros_like(mu))
        assert torch.equal(own, flow.decoder.solve(noise, mu, spk, torch.zeros_like(mu), steps=10, guidance=0.7))


@pytest.mark.parametrize(
    "phases",
    [[], [Phase(4, 3)], [Phase(12), Phase(5, 5)], [Phase(5)], [Phase(4), Phase(4, 5)], [Phase(4), Phase(2, 0)]],
    ids=["none", "late", "no divisor", "not the teacher's", "same", "not later"],
)
def test_phases_that_cannot_be_are_refused(phases: list[Phase]) -> None:
    with pytest.raises(ValueError, match="phases"):
        Distillation(data=config.from_dict(Distillation, {"data": {"lists": ["x"]}}).data, phases=phases)


def test_a_distilled_teacher_and_its_own_directory_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="replace the teacher"):
        _recipe(folder, tmp_path, target=str(folder / "teacher" / "flow.pt"))
    write_flow(tmp_path / "few", solver={"distilled": True, "inference_cfg_rate": 0.0, "steps": 2})
    with pytest.raises(ValueError, match="distilled already"):
        _recipe(folder, tmp_path, teacher=str(tmp_path / "few"))
    with pytest.raises(ValueError, match="no guidance"):
        SolverConfig(distilled=True)


def test_kept_paths_are_read_again_and_belong_to_what_they_were_made_of(folder: Path, tmp_path: Path) -> None:
    own = {"teacher_steps": 2, "phases": [{"steps": 1}], "keep_paths": True}
    first = _recipe(folder, tmp_path, **own).paths.get(0)
    again = _recipe(folder, tmp_path, **own)
    again._taught = lambda index: pytest.fail("computed again")  # type: ignore[method-assign,assignment]
    again.paths._compute = again._taught
    second = again.paths.get(0)
    assert (
        first is not None and second is not None and first.points_PTM.equal(second.points_PTM) and first.mu_TM.equal(second.mu_TM)
    )
    other = _recipe(folder, tmp_path, **own, seed=1).paths.get(0)
    assert other is not None and not (
        other.points_PTM.shape == first.points_PTM.shape and other.points_PTM.equal(first.points_PTM)
    )
    with pytest.raises(ValueError, match="keep_paths"):
        _recipe(folder, tmp_path, keep_paths=True)


def test_parts_of_recordings_have_the_mel_of_their_codes(folder: Path, tmp_path: Path) -> None:
    recipe = _recipe(folder, tmp_path, cut_share=1.0, cut_tokens=[5, 9], joined_share=0.0)
    rows = recipe.rows([0, 1, 2], recipe.rng(1))
    assert all(5 <= len(row.parts[0].tokens_N) <= 9 and row.prompt_frames == 0 for row in rows)
    assert all(len(row.mel_TM) == recipe.model.mel_frames(len(row.parts[0].tokens_N)) for row in rows)
