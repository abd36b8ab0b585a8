"""`osum-echat doctor --checkpoint`: what a report says of a checkpoint that works, and of each way in which one may not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from osum_echat import config as config_io
from osum_echat.cli import checkpoint_report, doctor
from osum_echat.dialogue.tasks import OUTPUTS
from osum_echat.generation.config import GenerationConfig
from osum_echat.model.checkpoint import load_model, save_model
from tests.generation_case import DATA

SHORT = GenerationConfig(modes={name: replace(GenerationConfig().mode(name), max_new=12) for name in OUTPUTS})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    model, tokenizer = load_model(DATA / "tiny.safetensors", DATA / "tiny_config.yaml")
    save_model(model, tokenizer, folder)
    (folder / "generation.yaml").write_text(config_io.to_yaml(SHORT), encoding="utf-8")
    return folder


def reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = doctor.main(["--checkpoint", str(folder), "--device", "cpu"])
    return code, capsys.readouterr().out


def test_mini_works_here_and_the_report_holds_no_path(capsys):
    code, out = reported(Path("checkpoints/mini").resolve(), capsys)
    assert code == 0 and "it works here" in out and "FAIL" not in out
    found = out.partition("\ncheckpoint\n")[2]
    for line in ("all 274 entries of the model are there and fit", "all values are finite", "tts", "past turns"):
        assert line in found
    assert str(Path.cwd()) not in found


def test_a_reply_that_does_not_end_is_a_failure(whole, capsys):
    code, out = reported(whole, capsys)  # random weights talk until the limit
    assert code == 1 and "did not end by itself" in out and "paste this whole report" in out
    assert "FAIL keys" not in out and "FAIL weights" not in out


def _not_finite(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    next(iter(state.values())).view(-1)[0] = torch.nan
    save_file(state, folder / "model.safetensors")


def _other_shape(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    name = next(iter(state))
    state[name] = torch.zeros(3)
    save_file(state, folder / "model.safetensors")


def _no_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


@pytest.mark.parametrize(
    ("spoil", "check", "says"),
    [
        (_not_finite, "weights", "not finite"),
        (_other_shape, "keys", "of another shape"),
        (_no_tokenizer, "load", "tokenizer"),
    ],
)
def test_each_fault_is_named(whole, tmp_path, capsys, spoil: Callable[[Path], None], check: str, says: str):
    folder = tmp_path / "spoilt"
    shutil.copytree(whole, folder)
    spoil(folder)
    code, out = reported(folder, capsys)
    [line] = [line for line in out.splitlines() if line.strip().startswith(f"FAIL {check}")]
    assert code == 1 and says in line


def test_too_little_memory_is_said_before_anything_is_loaded(whole, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint_report, "_available", lambda device: 10**6)
    code, out = reported(whole, capsys)
    assert code == 1 and "FAIL memory" in out and "GB available on cpu" in out


@pytest.mark.parametrize(("available", "says"), [(64e9, "it fits"), (2e9, "too little memory")])
def test_the_machine_is_told_whether_the_published_model_would_fit(available, says, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint_report, "_available", lambda target: int(available))
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    [line] = [line for line in out.splitlines() if line.startswith("  published ")]
    assert f"{available / 1e9:.1f} GB available" in line and line.endswith(says)
    assert "extra ui" in out and "extra audio" in out


def test_a_checkpoint_that_is_not_there_is_one_sentence(capsys):
    assert doctor.main(["--checkpoint", "nowhere.pt"]) == 1
    assert "nowhere.pt" in capsys.readouterr().err
