"""The shared loop of token2wav training: schedule, average, resuming, atomic files, metrics."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from osum_echat import config
from osum_echat.training.token2wav import flow, speaker, tokenizer, vocoder
from osum_echat.training.token2wav.loop import (
    Average,
    Metrics,
    OptimConfig,
    RunConfig,
    Trainer,
    adamw,
    learning_rate,
    update,
    write_atomically,
)
from tests.token2wav_training_case import TINY_CRITICS, TINY_FLOW, TINY_RUN, TINY_TOKENIZER, TINY_VOCODER, write_records


def test_learning_rate_warms_up_holds_and_decays() -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=10, decay_steps=20, final_lr=0.1)
    rates = [learning_rate(optim, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == pytest.approx([1.0] * 71)
    assert rates[99] == pytest.approx(0.1 + 0.9 / 20)
    assert all(a >= b for a, b in itertools.pairwise(rates[80:]))


def test_a_longer_run_has_the_same_rates_until_the_shorter_one_decays() -> None:
    optim = OptimConfig(decay_steps=20)
    assert [learning_rate(optim, s, 100) for s in range(80)] == [learning_rate(optim, s, 300) for s in range(80)]


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
    with Metrics(tmp_path, tensorboard=False, step=0) as metrics:
        for step in (1, 2, 3):
            metrics.write("train", step, {"loss": step})
    with Metrics(tmp_path, tensorboard=False, step=2) as metrics:
        metrics.write("train", 3, {"loss": 30})
    steps = [(row["step"], row["loss"]) for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())]
    assert steps == [(1, 1), (2, 2), (3, 30)]


def _trainer(kind: str, folder: Path, out: str, steps: int, campplus: Path | None = None) -> Trainer:
    data = {"lists": [str(folder / "list.jsonl")], "held_out": 2, "min_seconds": 0.1}
    run = {**TINY_RUN, "out": str(folder / out), "steps": steps}
    shared = {"data": data, "run": run, "batch_size": 2, "optim": {"warmup_steps": 2, "decay_steps": 0}}
    target = str(folder / out / "weights")
    if kind == "tokenizer":
        cfg = config.from_dict(tokenizer.TokenizerTraining, {**shared, "model": TINY_TOKENIZER, "target": target})
        return Trainer(tokenizer.TokenizerRecipe(cfg), cfg.run, cfg.optim, config.to_dict(cfg))
    if kind == "speaker":
        model = {"channels": 8, "pooled": 8}
        plain = {**shared, "model": model, "target": target, "speakers": str(folder / out / "spk2info.pt"), "crop_frames": 40}
        spk = config.from_dict(speaker.SpeakerTraining, plain)
        return Trainer(speaker.SpeakerRecipe(spk), spk.run, spk.optim, config.to_dict(spk))
    if kind == "flow":
        flw = config.from_dict(flow.FlowTraining, {**shared, "model": TINY_FLOW, "target": target, "campplus": str(campplus)})
        return Trainer(flow.FlowRecipe(flw), flw.run, flw.optim, config.to_dict(flw))
    model = {**TINY_VOCODER}
    plain = {**shared, "model": model, "critics": TINY_CRITICS, "target": target, "segment_frames": 12, "adversarial_from": 2}
    voc = config.from_dict(vocoder.VocoderTraining, plain)
    return Trainer(vocoder.VocoderRecipe(voc), voc.run, voc.optim, config.to_dict(voc))


@pytest.mark.parametrize("kind", ["tokenizer", "speaker", "vocoder", "flow"])
def test_interrupted_and_resumed_is_uninterrupted(kind: str, tmp_path: Path) -> None:
    write_records(tmp_path, tokens=True)
    campplus = None
    if kind == "flow":
        campplus = tmp_path / "speaker" / "weights"
        _trainer("speaker", tmp_path, "speaker", 1).fit()
    whole = _trainer(kind, tmp_path, "whole", 4, campplus)
    whole.fit()
    first = _trainer(kind, tmp_path, "parts", 4, campplus)
    first.run.steps = 2  # interrupted here
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
            "run": {**TINY_RUN, "out": str(tmp_path / "run")},
            "model": {**TINY_TOKENIZER, "width": 24},
        },
    )
    with pytest.raises(ValueError, match=r"choose another run\.out"):
        Trainer(tokenizer.TokenizerRecipe(cfg), cfg.run, cfg.optim, config.to_dict(cfg)).fit()


def test_time_limit_ends_the_run_with_files_that_can_be_used(tmp_path: Path) -> None:
    write_records(tmp_path)
    trainer = _trainer("tokenizer", tmp_path, "run", 1000)
    trainer.run.max_minutes = 1e-4
    trainer.fit()
    assert 0 <= trainer.step < 1000
    assert (tmp_path / "run" / "weights").is_file()
    assert (tmp_path / "run" / "checkpoint.pt").is_file()


def test_run_config_is_written_beside_the_checkpoint(tmp_path: Path) -> None:
    write_records(tmp_path)
    _trainer("tokenizer", tmp_path, "run", 1).fit()
    assert config.load(tokenizer.TokenizerTraining, tmp_path / "run" / "config.yaml").run == RunConfig(
        **{**TINY_RUN, "steps": 1, "out": tmp_path / "run"}
    )


@pytest.mark.parametrize("kind", [tokenizer, speaker, flow, vocoder])
def test_a_wrong_configuration_ends_with_a_sentence(kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        kind.main(["data.lists=[nowhere.jsonl]", "run.stepps=3"])
    assert end.value.code == 2
    assert "did you mean run.steps?" in capsys.readouterr().err


def test_the_command_trains_and_again_resumes(tmp_path: Path) -> None:
    write_records(tmp_path)
    sizes = [f"model.{key}={value}" for key, value in TINY_TOKENIZER.items()]
    run = [
        f"run.out={tmp_path / 'run'}",
        "run.tensorboard=false",
        "run.threads=1",
        f"target={tmp_path / 't.onnx'}",
        "batch_size=2",
    ]
    argv = [f"data.lists=[{tmp_path / 'list.jsonl'}]", "data.held_out=2", *sizes, *run]
    assert tokenizer.main([*argv, "run.steps=1"]) == 0
    assert tokenizer.main([*argv, "run.steps=2"]) == 0
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 2
