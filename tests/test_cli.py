"""The commands with a tiny model in a checkpoint folder: what they print, what they write, how they fail."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from osum_echat import config as config_io
from osum_echat.cli import COMMANDS, batch, demo, infer, multiturn
from osum_echat.cli import main as command
from osum_echat.dialogue.tasks import OUTPUTS, TASKS
from osum_echat.generation.config import GenerationConfig
from osum_echat.model.checkpoint import load_model, save_model
from osum_echat.pipeline import MODES, find_mode
from tests.generation_case import DATA
from tests.token2wav_case import recorded_speaker, write_directory

SHORT = GenerationConfig(modes={name: replace(GenerationConfig().mode(name), max_new=12) for name in OUTPUTS})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as an export writes it, with its own voice."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model, tokenizer = load_model(DATA / "tiny.safetensors", DATA / "tiny_config.yaml")
    save_model(model, tokenizer, folder)
    (folder / "generation.yaml").write_text(config_io.to_yaml(SHORT), encoding="utf-8")
    write_directory(folder / "token2wav")
    recorded_speaker().save(folder / "token2wav" / "speaker.safetensors")
    return folder


@pytest.fixture(scope="module")
def wav(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wav") / "u0.wav"
    with np.load(DATA / "cases.npz") as arrays:
        soundfile.write(path, arrays["wav0_int16"], 16000)
    return path


def run_json(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    assert infer.main([*map(str, arguments), "--device", "cpu", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


def test_every_prompted_task_has_a_short_name():
    assert MODES["asr"].task == "<TRANSCRIBE>" and MODES["asr+emotion"].task == "<TRANSCRIBE> <EMOTION>"
    assert {mode.task for mode in MODES.values() if mode.task} == {name for name, task in TASKS.items() if task.prompted}
    assert find_mode("<AGE> <GENDER>").task == "<AGE> <GENDER>"


@pytest.mark.parametrize("task", ["asr", "age+gender", "<TRANSCRIBE> <EMOTION>", "s2t_chat", "s2t_chat_think"])
def test_infer_answers_in_text(task, checkpoint, wav, capsys):
    found = run_json(capsys, "--task", task, "--wav", wav, "--checkpoint", checkpoint)
    assert found["task"] == task and found["text"] and found["wav"] is None and found["finish_reason"] in ("stop", "length")
    assert {"task", "text", "think", "wav", "sample_rate", "speech_tokens", "finish_reason", "timings"} <= set(found)


def test_infer_speaks_and_the_same_seed_says_the_same(checkpoint, tmp_path, capsys):
    said = []
    for number in range(2):
        out = tmp_path / f"{number}.wav"
        found = run_json(capsys, "--task", "tts", "--text", "hello", "--checkpoint", checkpoint, "--out", out, "--seed", 3)
        samples, rate = soundfile.read(out)
        assert found["wav"] == str(out) and rate == found["sample_rate"] == 22050
        assert abs(len(samples) / rate - len(found["speech_tokens"]) / 25) < 0.05
        said.append(samples)
    np.testing.assert_array_equal(said[0], said[1])


def test_infer_prints_for_people(checkpoint, capsys):
    assert infer.main(["--task", "t2t", "--text", "hello", "--checkpoint", str(checkpoint), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("t2t\n") and "text " in out and "finished" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "asr"], "needs --wav"),
        (["--task", "tts"], "needs --text"),
        (["--task", "tts", "--text", " "], "needs --text"),
        (["--task", "nothing", "--wav", "a.wav"], "unknown task"),
        (["--task", "asr", "--wav", "none.wav"], "no such recording"),
        (["--task", "t2t", "--text", "a", "--out", "b.wav"], "makes no speech"),
        (["--task", "t2t", "--text", "a", "--checkpoint", "nowhere"], "no such checkpoint"),
        (["--task", "t2t", "--text", "a", "--device", "abacus", "--checkpoint", "."], "unknown device"),
    ],
)
def test_infer_says_what_to_mend(arguments, words, capsys):
    assert infer.main(arguments) == 1
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_a_wrong_call_is_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        infer.main([])
    assert stopped.value.code == 2
    assert command(["dance"]) == 2
    assert "unknown command" in capsys.readouterr().err


def test_multiturn_writes_a_wav_a_round(checkpoint, wav, tmp_path, capsys):
    arguments = [str(wav), str(wav), "--checkpoint", str(checkpoint), "--device", "cpu", "--json", "--out", str(tmp_path)]
    assert multiturn.main(arguments) == 0
    rounds = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["round"] for r in rounds] == [1, 2]
    for reply in rounds:  # random weights may end a text before they speak
        assert (reply["wav"] is not None) == bool(reply["speech_tokens"])


def test_demo_shows_every_mode(checkpoint, wav, tmp_path, capsys, monkeypatch):
    record = {
        "key": "ours",
        "wav": "ours.wav",
        "txt": "hello there",
        "extra": {"age": "adult", "emotion": "sad", "replies": ["Hi."]},
    }
    shutil.copy(wav, tmp_path / "ours.wav")
    (tmp_path / "demo.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    monkeypatch.setattr(demo, "find_recordings", lambda: tmp_path / "demo.jsonl")
    out = tmp_path / "out"
    arguments = ["--wav", str(wav), "--checkpoint", str(checkpoint), "--device", "cpu", "--out", str(out)]
    assert demo.main(arguments) == 0
    shown = capsys.readouterr().out
    modes = next(line for line in shown.splitlines() if line.startswith("modes: ")).removeprefix("modes: ").split(", ")
    assert set(modes) == {"s2s_think", "asr", "emotion", "age+gender", "s2t_chat", "s2t_chat_think", "s2s", "tts", "t2t"}
    assert f"yours: {wav.stem}" in shown and "hello there" in shown and "tags 0 of 2" in shown
    assert shown.splitlines()[-1].startswith(f"look and listen: {out / 'index.html'}")
    assert (out / "mode_tts.wav").stat().st_size > 1000
    page = (out / "index.html").read_text(encoding="utf-8")
    for name in modes[1:]:
        assert f"<code>{name}</code>" in page
    assert "✗ emotion: ?" in page and "(is sad)" in page and "a recording of your own" in page
    assert page.count("data:audio/mpeg;base64,") >= 3 and "://" not in page, "the page asks the network for nothing"


def test_demo_without_a_recording_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "find_recordings", lambda: None)
    assert demo.main([]) == 1 and "WAV=me.wav" in capsys.readouterr().err
    assert demo.main(["--wav", "none.wav"]) == 1 and "no such recording: none.wav" in capsys.readouterr().err


@pytest.fixture
def test_list(tmp_path: Path, wav: Path) -> Path:
    """Five records; one recording is no audio, one is missing."""
    shutil.copy(wav, tmp_path / "good.wav")
    (tmp_path / "bad.wav").write_bytes(b"not audio at all" * 100)
    wavs = ["good.wav", "bad.wav", "good.wav", "missing.wav", "good.wav"]
    records = [
        {"key": f"k{i}", "wav": str(tmp_path / name), "txt": "hello", "task": "<TRANSCRIBE>"} for i, name in enumerate(wavs)
    ]
    path = tmp_path / "data.list"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_batch_keeps_bad_records_apart_and_goes_on_where_it_stopped(checkpoint, test_list, tmp_path, capsys):
    out = tmp_path / "results"
    arguments = [
        "--list",
        str(test_list),
        "--out",
        str(out),
        "--checkpoint",
        str(checkpoint),
        "--device",
        "cpu",
        "--batch-size",
        "2",
    ]
    assert batch.main(arguments) == 0
    score = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert score["records"] == 5 and score["failed"] == 2 and score["scored"] == 3
    whole = sorted((out / "results.jsonl").read_text().splitlines())
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join(lines[:2]) + lines[2][:10])  # killed while it wrote the third
    assert batch.main(arguments) == 0
    again = sorted((out / "results.jsonl").read_text().splitlines())

    def plain(line: str) -> dict[str, Any]:
        return {name: value for name, value in json.loads(line).items() if name != "timings"}

    assert [plain(line) for line in again] == [plain(line) for line in whole]


def test_batch_in_parts_is_the_whole(checkpoint, test_list, tmp_path, capsys):
    out = tmp_path / "parts"
    for part in range(2):
        arguments = ["--list", str(test_list), "--out", str(out), "--checkpoint", str(checkpoint), "--device", "cpu"]
        assert batch.main([*arguments, "--part", f"{part}/2"]) == 0
    assert batch.main(["--join", str(out), "--parts", "2"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["records"] == 5
    assert [line.split()[0] for line in (out / "text").read_text().splitlines()] == ["k0", "k2", "k4"]
    assert batch.main(["--join", str(out), "--parts", "3"]) == 1
    assert batch.main([*arguments, "--part", "2/2"]) == 1


def test_commands_exist_and_help_works(capsys):
    assert command(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    assert command(["doctor"]) == 0
    assert "cpu" in capsys.readouterr().out
    for name in ("infer", "batch", "multiturn", "demo", "serve", "page"):
        with pytest.raises(SystemExit) as stopped:
            command([name, "--help"])
        assert stopped.value.code == 0
