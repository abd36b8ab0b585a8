"""The shared loop of token2wav training: schedule, average, resuming, atomic files, metrics."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from osum_echat import config
from osum_echat.evaluation import validation
from osum_echat.run import bad_steps, schedule
from osum_echat.run.files import write_atomically
from osum_echat.run.progress import Progress
from osum_echat.run.validators import find_validators
from osum_echat.training.token2wav import distill, flow, speaker, tokenizer, vocoder
from osum_echat.training.token2wav.average import Average
from osum_echat.training.token2wav.loop import Trainer
from osum_echat.training.token2wav.recipe import OptimConfig, adamw, update
from tests.evaluation_case import Listener
from tests.token2wav_training_case import (
    TINY_CRITICS,
    TINY_FLOW,
    TINY_RUN,
    TINY_TOKENIZER,
    TINY_VOCODER,
    write_flow,
    write_records,
)


def test_learning_rate_warms_up_holds_and_decays() -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=10, decay_steps=20, final_factor=0.1)
    rates = [schedule.factor(optim, step + 1, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == pytest.approx([1.0] * 71)
    assert rates[99] == pytest.approx(0.1 + 0.9 / 20)
    assert all(a >= b for a, b in itertools.pairwise(rates[80:]))


def test_a_longer_run_has_the_same_rates_until_the_shorter_one_decays() -> None:
    optim = OptimConfig(decay_steps=20)
    assert [schedule.factor(optim, s, 100) for s in range(1, 81)] == [schedule.factor(optim, s, 300) for s in range(1, 81)]


def test_update_leaves_the_weights_alone_when_the_loss_is_not_finite() -> None:
    layer = nn.Linear(2, 1)
    optimizer = adamw(layer.parameters(), OptimConfig())
    before = layer.weight.detach().clone()
    norm = update(optimizer, (layer(torch.ones(1, 2)) * float("nan")).sum(), 1.0)
    assert norm != norm
    assert torch.equal(layer.weight, before)
    update(optimizer, layer(torch.ones(1, 2)).sum(), 1.0)
    assert not torch.equal(layer.weight, before)


def test_vectors_are_not_decayed() -> None:
    optimizer = adamw(nn.Linear(2, 3).parameters(), OptimConfig(weight_decay=0.5))
    decays = {tuple(p.shape): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays == {(3, 2): 0.5, (3,): 0.0}


def test_average_follows_the_weights_and_is_only_borrowed() -> None:
    modules = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1)})
    weight = modules["a"].weight  # type: ignore[union-attr]
    with torch.no_grad():
        weight.fill_(0.0)
    average = Average(modules, ("a",), decay=0.5)
    with torch.no_grad():
        weight.fill_(1.0)
    average.update(step=1000)
    with average.swapped():
        assert weight.item() == pytest.approx(0.5)
    assert weight.item() == 1.0


def test_a_file_that_could_not_be_finished_does_not_appear(tmp_path: Path) -> None:
    def fails(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write_atomically(tmp_path / "weights.pt", fails)
    assert not (tmp_path / "weights.pt").exists()


def test_metrics_of_steps_that_will_be_made_again_are_dropped(tmp_path: Path) -> None:
    with Progress(tmp_path, None, 0, bar=False, tensorboard=False) as metrics:
        for step in (1, 2, 3):
            metrics.write("train", step, {"loss": step})
    with Progress(tmp_path, None, 2, bar=False, tensorboard=False) as metrics:
        metrics.write("train", 3, {"loss": 30})
    steps = [(row["step"], row["loss"]) for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())]
    assert steps == [(1, 1), (2, 2), (3, 30)]


def _trainer(kind: str, folder: Path, out: str, steps: int, campplus: Path | None = None) -> Trainer:
    plain: dict[str, Any] = {
        **TINY_RUN,
        "data": {"lists": [str(folder / "list.jsonl")], "held_out": 2, "min_seconds": 0.1},
        "out": str(folder / out),
        "max_steps": steps,
        "batch_size": 2,
        "optim": {"warmup_steps": 2, "decay_steps": 0},
        "target": str(folder / out / "weights"),
    }
    if kind == "tokenizer":
        cfg = config.from_dict(tokenizer.TokenizerTraining, {**plain, "model": TINY_TOKENIZER})
        return Trainer(tokenizer.TokenizerRecipe(cfg), bar=False)
    if kind == "speaker":
        own = {"model": {"channels": 8, "pooled": 8}, "speakers": str(folder / out / "spk2info.pt"), "crop_frames": 40}
        return Trainer(speaker.SpeakerRecipe(config.from_dict(speaker.SpeakerTraining, {**plain, **own})), bar=False)
    if kind == "flow":
        own = {"model": TINY_FLOW, "campplus": str(campplus)}
        return Trainer(flow.FlowRecipe(config.from_dict(flow.FlowTraining, {**plain, **own})), bar=False)
    if kind == "distill":
        own = {
            "campplus": str(campplus),
            "teacher": str(folder / "teacher"),
            "target": str(folder / out / "model" / "flow.pt"),
            "teacher_steps": 4,
            "phases": [{"steps": 4}, {"steps": 2, "begin": 1}, {"steps": 1, "begin": 2}],
        }
        return Trainer(distill.DistillRecipe(config.from_dict(distill.Distillation, {**plain, **own})), bar=False)
    own = {"model": {**TINY_VOCODER}, "critics": TINY_CRITICS, "segment_frames": 12, "adversarial_from": 2}
    return Trainer(vocoder.VocoderRecipe(config.from_dict(vocoder.VocoderTraining, {**plain, **own})), bar=False)


@pytest.mark.parametrize("kind", ["tokenizer", "speaker", "vocoder", "flow", "distill"])
def test_interrupted_and_resumed_is_uninterrupted(kind: str, tmp_path: Path) -> None:
    write_records(tmp_path, tokens=True)
    campplus = None
    if kind == "distill":
        write_flow(tmp_path / "teacher")
    if kind in ("flow", "distill"):
        campplus = tmp_path / "speaker" / "weights"
        _trainer("speaker", tmp_path, "speaker", 1).fit()
    whole = _trainer(kind, tmp_path, "whole", 4, campplus)
    whole.fit()
    first = _trainer(kind, tmp_path, "parts", 4, campplus)
    first.cfg.max_steps = 2  # interrupted here
    first.fit()
    second = _trainer(kind, tmp_path, "parts", 4, campplus)
    second.fit()
    assert second.step == whole.step == 4
    mine, theirs = second.recipe.modules.state_dict(), whole.recipe.modules.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert second.average is not None and whole.average is not None
    assert all(torch.equal(second.average.weights[key], value) for key, value in whole.average.weights.items())
    assert (tmp_path / "parts" / "curves.png").stat().st_size > 1000


def test_a_checkpoint_of_other_sizes_is_refused_with_a_remedy(tmp_path: Path) -> None:
    write_records(tmp_path)
    _trainer("tokenizer", tmp_path, "run", 1).fit()
    cfg = config.from_dict(
        tokenizer.TokenizerTraining,
        {
            "data": {"lists": [str(tmp_path / "list.jsonl")], "held_out": 2},
            **TINY_RUN,
            "out": str(tmp_path / "run"),
            "model": {**TINY_TOKENIZER, "width": 24},
        },
    )
    with pytest.raises(ValueError, match=r"choose another out"):
        Trainer(tokenizer.TokenizerRecipe(cfg), bar=False).fit()


def test_time_limit_ends_the_run_with_files_that_can_be_used(tmp_path: Path) -> None:
    write_records(tmp_path)
    trainer = _trainer("tokenizer", tmp_path, "run", 1000)
    trainer.cfg.max_minutes = 1e-4
    trainer.fit()
    assert 0 <= trainer.step < 1000
    assert (tmp_path / "run" / "weights").is_file()
    assert (tmp_path / "run" / "checkpoint.pt").is_file()


def test_the_config_is_written_beside_the_checkpoint(tmp_path: Path) -> None:
    write_records(tmp_path)
    trainer = _trainer("tokenizer", tmp_path, "run", 1)
    trainer.fit()
    assert config.load(tokenizer.TokenizerTraining, tmp_path / "run" / "config.yaml") == trainer.cfg


def test_both_trainings_have_the_same_keys_and_limits() -> None:
    from osum_echat.run.config import RunConfig
    from osum_echat.training.config import TrainConfig

    shared = {f.name for f in dataclasses.fields(RunConfig)}
    assert {"out", "max_steps", "max_minutes", "optim", "safety", "precision", "threads", "seed"} <= shared
    for kind in (TrainConfig, tokenizer.TokenizerTraining, speaker.SpeakerTraining, flow.FlowTraining, vocoder.VocoderTraining):
        assert issubclass(kind, RunConfig)
        assert next(f for f in dataclasses.fields(kind) if f.name == "safety").default_factory().max_bad_steps == 5  # type: ignore[misc]
        optim = next(f for f in dataclasses.fields(kind) if f.name == "optim").default_factory()  # type: ignore[misc]
        assert {f.name for f in dataclasses.fields(optim)} == {f.name for f in dataclasses.fields(OptimConfig)}


def test_keys_of_older_files_are_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "old.yaml").write_text(
        "data: {lists: [a.jsonl]}\nrun: {out: exp/x, steps: 7, dtype: bfloat16}\noptim: {clip_norm: 2.0, final_lr: 0.1}\n"
    )
    old = config.load(vocoder.VocoderTraining, tmp_path / "old.yaml", ["run.steps=9"])
    assert (old.out, old.max_steps, old.precision) == (Path("exp/x"), 9, "autocast")
    assert (old.optim.clip, old.optim.final_factor, old.optim.warmup_steps) == (2.0, 0.1, 100)
    for message in (
        "run.steps is an older name; write max_steps",
        "run.dtype",
        "optim.clip_norm is an older name; write optim.clip",
    ):
        assert message in caplog.text


def test_too_many_steps_that_are_not_finite_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_records(tmp_path)
    trainer = _trainer("tokenizer", tmp_path, "run", 100)
    trainer.bad.limit = 3
    monkeypatch.setattr(trainer.recipe, "train_step", lambda step: {"loss": float("nan")})
    with pytest.raises(bad_steps.TooManyBadSteps, match="3 steps in a row"):
        trainer.fit()
    assert trainer.step == 3 and not trainer.checkpoint.exists()
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["skipped"] * 3


def test_a_vocoder_is_listened_to_while_it_is_trained_by_the_scorers_of_the_suites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = Listener("nothing of it")
    monkeypatch.setitem(validation._recognisers, "whisper-base", listener)
    write_records(tmp_path)
    trainer = _trainer("vocoder", tmp_path, "run", 1)
    trainer.validators = find_validators(["osum_echat.evaluation.validation:resynthesis"])
    trainer.fit()
    (line,) = [row for row in _metrics(tmp_path / "run") if row["kind"] == "validation"]
    assert line["mel"] > 0 and line["resynthesis.wer"] > 0 and 0 <= line["resynthesis.silence"] <= 100
    assert len(listener.levels) == 2 and min(listener.levels) > 0.4  # both held-out recordings have sound
    with pytest.raises(SystemExit) as end:
        vocoder.main(["--validators", "osum_echat.evaluation.validation:nothing"])
    assert end.value.code == 2
    assert validation.resynthesis(_trainer("tokenizer", tmp_path, "silent", 1)) == {}


def _metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", [tokenizer, speaker, flow, vocoder])
def test_a_wrong_configuration_ends_with_a_sentence(kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        kind.main(["data.lists=[nowhere.jsonl]", "max_stepps=3"])
    assert end.value.code == 2
    assert "did you mean max_steps?" in capsys.readouterr().err


def test_the_command_trains_and_again_resumes(tmp_path: Path) -> None:
    write_records(tmp_path)
    sizes = [f"model.{key}={value}" for key, value in TINY_TOKENIZER.items()]
    run = [
        f"out={tmp_path / 'run'}",
        "tensorboard=false",
        "threads=1",
        f"target={tmp_path / 't.onnx'}",
        "batch_size=2",
    ]
    argv = [f"data.lists=[{tmp_path / 'list.jsonl'}]", "data.held_out=2", *sizes, *run]
    assert tokenizer.main([*argv, "max_steps=1"]) == 0
    assert tokenizer.main([*argv, "max_steps=2"]) == 0
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 2
