"""Every command of docs/quickstart_training.md, in order, with a tiny model in place of the published one."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
from pathlib import Path

import pytest

from osum_echat import config as config_io
from osum_echat.cli import main as command
from osum_echat.generation.config import GenerationConfig

TINY = "tests/data/osum"
SMALL = (
    "device=cpu precision=fp32 threads=1 max_steps=2 accumulation=1 tensorboard=false data.workers=0 checkpoint_activations=false "
    "safety.try_largest_batch=false lora.rank=4"
)


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of one language in a document."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def short_replies(path: Path) -> Path:
    """The published decoding settings with a few ids a reply."""
    settings = GenerationConfig()
    modes = {name: dataclasses.replace(mode, max_new=6) for name, mode in settings.modes.items()}
    path.write_text(config_io.to_yaml(dataclasses.replace(settings, modes=modes)), encoding="utf-8")
    return path


def test_every_command_of_the_page_runs_in_its_order(
    root_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (root_dir / "docs" / "quickstart_training.md").read_text(encoding="utf-8")
    mine = tmp_path / "mine"
    shutil.copytree(root_dir / "common_utils" / "fake_data" / "raw" / "wav", mine / "wav")
    (records,) = blocks(page, "json")
    for name in ("train.jsonl", "test.jsonl"):
        (mine / name).write_text(records, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    commands = [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]
    assert [c.split()[1] for c in commands] == ["data", "data", "train", "convert", "eval", "infer", "infer"]
    for line in commands:
        name, *arguments = shlex.split(line)[1:]
        arguments = [a.replace("weights/language_think_final.pt", str(root_dir / TINY / "tiny.safetensors")) for a in arguments]
        arguments = [a.replace("conf/lora.yaml", str(root_dir / "conf" / "lora.yaml")) for a in arguments]
        arguments = [a.replace("weights/CosyVoice-300M-25Hz", str(root_dir / "checkpoints/mini/token2wav")) for a in arguments]
        if name == "convert":  # an untrained model does not know when to stop
            arguments += ["--generation", str(short_replies(tmp_path / "short.yaml"))]
        elif name == "train":
            arguments += [*SMALL.split(), f"model={root_dir / TINY / 'tiny_config.yaml'}", "--no-bar"]
        elif name == "eval":
            arguments += ["normalizer=own", "--threads", "1", "--device", "cpu"]
        elif name == "infer":
            arguments += ["--device", "cpu"]
        assert command([name, *arguments]) == 0, (line, capsys.readouterr())
    made = tmp_path / "checkpoints" / "mine"
    assert {"config.yaml", "model.safetensors", "tokenizer", "token2wav"} <= {path.name for path in made.iterdir()}
    assert "lora: null" in (made / "config.yaml").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "mine_eval" / "report.html").is_file()


def test_the_page_names_files_that_are_there(root_dir: Path) -> None:
    page = (root_dir / "docs" / "quickstart_training.md").read_text(encoding="utf-8")
    for name in re.findall(r"`(conf/[\w.]+|tests/[\w./]+\.py)`", page):
        assert (root_dir / name).is_file(), name
