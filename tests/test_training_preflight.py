"""What is missing is said at once: before weights are loaded, by the key, with what to do."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from osum_echat import config as config_io
from osum_echat.model import download
from osum_echat.training import __main__ as entry
from osum_echat.training import preflight
from osum_echat.training.config import ConfigError, TrainConfig

TINY = "tests/data/osum/tiny.safetensors"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, root_dir: Path, tmp_path: Path) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(root_dir)


def config(**changes: Any) -> TrainConfig:
    plain = {"init": {"checkpoint": TINY}, "data": {"streams": {"raw": {"list": "common_utils/fake_data/raw/data.list"}}}}
    return config_io.from_dict(TrainConfig, config_io.merge(plain, changes))


def test_a_complete_config_passes() -> None:
    preflight.check(config())
    preflight.check(config_io.load(TrainConfig, "conf/finetune_mini.yaml"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": {"checkpoint": "out/no_such_stage"}}, "init.checkpoint: out/no_such_stage is not there; it is what an earlier"),
        (
            {"init": {"parts": {"encoder": "out/none/x"}}},
            r"init.parts.encoder: out/none/x is not there; .*init.parts={} for none",
        ),
        (
            {"init": {"whisper": "openai/whisper-medium"}},
            "init.whisper: openai/whisper-medium is not on this machine, and the hub",
        ),
        ({"init": {"llm": "Qwen/Qwen2.5-3B-Instruct"}}, r"hf download Qwen/Qwen2.5-3B-Instruct .*; then init.llm=FOLDER"),
        ({"data": {"streams": {}}}, "^data.streams is empty"),
        ({"validation": {"workers": 0}}, "^validation.streams is empty.*validation=null"),
        ({"validation": {"streams": {"a": {"list": "gone.list"}}}}, "validation.streams.a.list: gone.list is not there"),
    ],
)
def test_what_is_missing_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight.check(config(**changes))


def test_the_command_ends_with_the_sentence_and_loads_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("osum_echat.training.build.load_start", lambda config: pytest.fail("weights were loaded"))
    assert entry.main(["--config", "conf/stage1_understanding.yaml", f"out={tmp_path}"]) == 2
    assert "init.whisper: openai/whisper-medium is not on this machine" in capsys.readouterr().err


def test_a_hub_name_in_the_cache_needs_no_network(tmp_path: Path) -> None:
    with pytest.raises(download.NotFound, match="HF_ENDPOINT to a mirror"):
        download.check("someone/model")
    snapshot = tmp_path / "hub" / "models--someone--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "hub" / "models--someone--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    download.check("someone/model")


def test_overrides_can_empty_a_mapping() -> None:
    changed = config_io.load(TrainConfig, "recipes/mini/conf/understanding.yaml", ["init.parts={}"])
    assert changed.init.parts == {} and changed.init.checkpoint == "out/mini/generation_tts"


def test_validation_takes_over_what_data_says() -> None:
    shared = {"workers": 0, "limits": {"max_label": 7}, "drops_file": "drops.jsonl", "batch": {"rows": 3}}
    made = config(data=shared, validation={"streams": {"v": {"list": TINY}}, "batch": {"rows": 1}})
    assert made.validation is not None
    assert (made.validation.workers, made.validation.limits.max_label, made.validation.batch.rows) == (0, 7, 1)
    assert list(made.validation.streams) == ["v"] and made.validation.drops_file is None
    assert config_io.from_dict(TrainConfig, config_io.to_dict(made)) == made


def test_an_older_key_on_the_command_line_counts_over_the_new_one_in_the_file() -> None:
    changed = config_io.load(TrainConfig, "recipes/mini/conf/understanding.yaml", ["rooms.encoder=0.5"])
    assert changed.lr.encoder == 0.5 and changed.lr.llm == 8e-4
