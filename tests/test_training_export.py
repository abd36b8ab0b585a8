"""From a training folder to a checkpoint folder that answers: what stands beside the weights comes along, or the tool says what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from osum_echat.model.checkpoint import load_weights
from osum_echat.tools import convert
from osum_echat.training.folder import step_folder
from tests import training_case as tc


def trained(folder: Path, start: Path | None) -> Path:
    """A training folder whose run says that it started from ``start``."""
    config = tc.base_config(folder, max_steps=1, save_frozen=True)
    tc.run({"config": config, "batches": [[[0, 1]]], "lora": True})
    state = step_folder(folder) / "state.json"
    content = json.loads(state.read_text())
    content["config"]["init"]["checkpoint"] = None if start is None else str(start)
    state.write_text(json.dumps(content))
    return folder


@pytest.fixture
def start(tmp_path: Path) -> Path:
    folder = tmp_path / "start"
    (folder / "token2wav").mkdir(parents=True)
    (folder / "token2wav" / "flow.pt").write_bytes(b"flow")
    (folder / "generation.yaml").write_text("guards: null\n")
    return folder


def test_a_folder_gets_what_the_first_run_of_a_chain_started_from(tmp_path: Path, start: Path) -> None:
    first = trained(tmp_path / "first", start)
    second = trained(tmp_path / "second", first)
    out = tmp_path / "out"
    assert convert.main([str(second), str(out), "--no-tokenizer"]) == 0
    assert (out / "generation.yaml").read_text() == "guards: null\n" and (out / "token2wav" / "flow.pt").read_bytes() == b"flow"
    assert load_weights(out).config.lora is None, "LoRA is merged"
    assert convert.main([str(second), str(out), "--no-tokenizer", "--keep-lora", "--text-only"]) == 0
    assert not (out / "token2wav").exists() and load_weights(out).config.lora is not None


def test_a_folder_that_could_not_speak_is_refused_with_the_way_out(
    tmp_path: Path, start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path / "run", None)
    out = tmp_path / "out"
    assert convert.main([str(run), str(out), "--no-tokenizer"]) == 2
    message = capsys.readouterr().err
    assert "no token2wav" in message and "--token2wav FOLDER" in message and "--text-only" in message and not out.exists()
    assert convert.main([str(run), str(out), "--no-tokenizer", "--token2wav", str(tmp_path / "none")]) == 2
    assert convert.main([str(run), str(out), "--no-tokenizer", "--token2wav", str(start / "token2wav")]) == 0
    assert (out / "token2wav" / "flow.pt").is_file() and not (out / "generation.yaml").exists()
    assert convert.main([str(run), str(tmp_path / "one.safetensors")]) == 0, "a file is the model alone"
