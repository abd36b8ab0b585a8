"""The commands that ask the model something, as a person uses them: the shipped model, the demo's recordings, an empty folder.

What comes out is compared with the list's own labels. Commands that end before a model is loaded, and many small questions to the same model,
are called in this process; the scripts of the README run in a process of their own.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from osum_echat import metrics
from osum_echat.cli import batch, batch_answers, common, infer, multiturn
from osum_echat.cli import main as command
from osum_echat.config import read_yaml
from osum_echat.pipeline import EChat

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "checkpoints" / "mini"
DEMO = ROOT / "assets" / "demo" / "demo.jsonl"
RECORDS = [json.loads(line) for line in DEMO.read_text(encoding="utf-8").splitlines()]
COUGH, NEUTRAL = RECORDS[5], RECORDS[4]
LEARNT_TURNS = read_yaml(MINI / "config.yaml")["dialect"]["learnt"]["past_turns"]
REMEMBERED = 0  # a held-out conversation that the shipped weights get right


def wav_of(record: dict[str, Any]) -> Path:
    return DEMO.parent / record["wav"]


def script(name: str, *arguments: object, cwd: Path, stdin: bytes | None = None) -> subprocess.CompletedProcess[str]:
    program = ["bash", str(ROOT / name)] if name.endswith(".sh") else [sys.executable, str(ROOT / name)]
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*program, *map(str, arguments)], cwd=cwd, input=stdin, env=env, capture_output=True, check=False, timeout=300
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture(scope="module")
def mini() -> EChat:
    return EChat.load(MINI, device="cpu")


@pytest.fixture
def here(mini: EChat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in; the commands find the model loaded."""
    monkeypatch.chdir(tmp_path)
    for module in (infer, batch_answers, multiturn):
        monkeypatch.setattr(module, "load_echat", lambda args, speech=True: mini)
    return tmp_path


def ask(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert infer.main([*map(str, arguments), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a person reads: one line on stderr, nothing else, exit code 1."""
    assert infer.main([str(argument) for argument in arguments]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ") and shown.err.count("\n") == 1
    return shown.err


# ---- infer_runtime.py ----------------------------------------------------------------------------------------------------------------


def test_the_readmes_first_example_in_an_empty_folder(tmp_path: Path) -> None:
    done = script(
        "infer_runtime.py",
        "--task",
        "s2s_think",
        "--think",
        "tag",
        "--wav",
        wav_of(COUGH),
        "--out",
        "reply.wav",
        "--json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert metrics.normalize(found["text"]) in {metrics.normalize(reply) for reply in COUGH["extra"]["replies"]}
    assert found["think"]["transcript"] == COUGH["txt"] and found["finish_reason"] == "stop"
    assert {kind: found["think"][kind] for kind in ("age", "gender", "emotion", "event")} == {
        kind: COUGH["extra"][kind] for kind in ("age", "gender", "emotion", "event")
    }
    with soundfile.SoundFile(tmp_path / "reply.wav") as file:
        assert file.samplerate == 22050 and abs(file.frames / 22050 - len(found["speech_tokens"]) / 25) < 0.05
        assert "synthetic" in file.comment
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "reply.wav").stat().st_mode & 0o777 == 0o666 & ~umask and os.listdir(tmp_path) == ["reply.wav"]


def test_a_recording_from_standard_input(tmp_path: Path) -> None:
    done = script("infer_runtime.py", "--task", "asr", "--wav", "-", cwd=tmp_path, stdin=wav_of(COUGH).read_bytes())
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "asr" and f"text      {COUGH['txt']}" in done.stdout and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("task", "words"),
    [("emotion", "angry"), ("age+gender", "old male"), ("asr+emotion", "angry"), ("caption", "cough"), ("<GENDER>", "male")],
)
def test_tags_are_those_of_the_list(task: str, words: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ask(capsys, "--task", task, "--wav", wav_of(COUGH))["text"]
    assert all(f"<{word}>" in text for word in words.split())
    assert ("asr" in task) == (COUGH["txt"] in text)


def test_a_phones_recording_is_heard_as_the_original(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import av

    samples, rate = soundfile.read(wav_of(NEUTRAL), dtype="float32")
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=rate, layout="mono")
        for start in range(0, len(samples), 1024):
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], format="fltp", layout="mono")
            frame.rate, frame.pts = rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (here / "memo.m4a").write_bytes(out.getvalue())
    assert ask(capsys, "--task", "asr", "--wav", "memo.m4a")["text"] == NEUTRAL["txt"]


def test_a_long_recording_is_written_down_piece_by_piece(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [RECORDS[i] for i in (2, 4, 5, 7)]
    read = [soundfile.read(wav_of(record), dtype="float32") for record in records]
    rate = read[0][1]
    assert {rate for _, rate in read} == {rate}
    pause = np.zeros(rate, np.float32)
    soundfile.write("long.wav", np.concatenate([part for samples, _ in read for part in (samples, pause)]), rate)
    said = " ".join(record["txt"] for record in records)
    found = ask(capsys, "--task", "asr", "--wav", "long.wav")
    assert metrics.word_errors(said, found["text"]).rate < 0.25 and found["finish_reason"] == "stop"
    assert "learnt recordings of at most" in refused(capsys, "--task", "asr+emotion", "--wav", "long.wav")


def test_silence_is_answered_as_silence(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write("silence.wav", np.zeros(48_000), 16_000)
    found = ask(capsys, "--task", "s2t_chat_think", "--wav", "silence.wav")
    assert (found["text"], found["think"], found["finish_reason"]) == ("I heard nothing.", None, "silence")
    assert infer.main(["--task", "asr", "--wav", "silence.wav"]) == 0
    assert "heard     nothing" in capsys.readouterr().out
    assert infer.main(["--task", "s2s", "--wav", "silence.wav", "--out", "reply.wav"]) == 1
    assert "reply.wav was not written" in capsys.readouterr().err and not Path("reply.wav").exists()


def test_a_long_text_is_said_to_its_end(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentences = [
        "Take a deep breath.",
        "I understand your anger.",
        "There are other shops in town.",
        "Look at the sky before you go.",
    ]
    text = " ".join(sentences * 2)
    alone = [len(ask(capsys, "--task", "tts", "--text", sentence, "--out", "one.wav")["speech_tokens"]) for sentence in sentences]
    found = ask(capsys, "--task", "tts", "--text", text, "--out", "all.wav")
    seconds = soundfile.info("all.wav").duration
    assert found["text"] == text and seconds > 0.7 * 2 * sum(alone) / 25 and found["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "tts", "--text", "你好"], "says English; the text has Chinese characters ('你')"),
        (["--task", "t2t", "--text", "你好"], "reads English"),
        (["--task", "asr+style", "--wav", wav_of(COUGH)], "has not learnt <TRANSCRIBE> <STYLE>, only <TRANSCRIBE>"),
        (
            ["--task", "s2s_streaming", "--wav", wav_of(COUGH)],
            "has not learnt a spoken reply to a recording, text and speech in turns",
        ),
        (["--task", "asr", "--prompt", "Transcribe.", "--wav", wav_of(COUGH)], "follows its own instructions only"),
    ],
)
def test_what_mini_has_not_learnt_is_refused(
    arguments: list[object], words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "s2s", "--wav", wav_of(COUGH), "--out", "reply.doc"], "use a suffix such as .wav"),
        (["--task", "s2s", "--wav", wav_of(COUGH), "--out", "taken/reply.wav"], "taken/reply.wav cannot be written"),
        (["--task", "asr", "--wav", "."], ". is a folder, not a recording"),
        (["--task", "asr", "--wav", "http://127.0.0.1:9/a.wav"], "http://127.0.0.1:9/a.wav cannot be reached"),
        (["--task", "t2t", "--text", "a", "--temperature", "-1"], "temperature=-1.0 must be 0"),
        (["--task", "t2t", "--text", "a", "--max-tokens", "0"], "max_tokens=0 must be at least 1"),
        (["--task", "dance", "--text", "a"], "unknown task 'dance': use one of asr, "),
    ],
)
def test_wrong_calls_end_before_a_model_is_loaded(
    arguments: list[object], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "*")
    Path("taken").write_text("")
    monkeypatch.setattr(infer, "load_echat", lambda *a, **k: pytest.fail("a model was loaded"))
    assert words in refused(capsys, *arguments)


def test_a_voice_that_is_not_there_and_a_profile_of_others_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such voice: nobody" in refused(capsys, "--task", "tts", "--text", "hello", "--speaker", "nobody")
    assert "strings of its own" in refused(capsys, "--task", "t2t", "--text", "hello", "--profile", "as_released")


# ---- infer_multiturn.py --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without_a_past(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mini's folder with a config that says it has learnt no past turns."""
    folder = tmp_path_factory.mktemp("without_a_past")
    for path in MINI.iterdir():
        if path.name != "config.yaml":
            (folder / path.name).symlink_to(path)
    config = read_yaml(MINI / "config.yaml")
    config["dialect"]["learnt"]["past_turns"] = 0
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    return folder


def test_a_dialogue_with_a_checkpoint_that_has_learnt_no_past_says_so_before_it_answers(
    without_a_past: Path, tmp_path: Path
) -> None:
    wavs = [wav_of(record) for record in (COUGH, NEUTRAL)]
    done = script("infer_multiturn.py", *wavs, "--checkpoint", without_a_past, "--text-only", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert "has not learnt dialogues with 1 past turns" in done.stderr and "--turns 0 answers each recording" in done.stderr


def test_without_past_turns_each_recording_is_answered_by_itself(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wavs = [str(wav_of(record)) for record in (COUGH, NEUTRAL)]
    assert multiturn.main([*wavs, "--turns", "0", "--think", "tag", "--json", "--out", "talk"]) == 0
    rounds = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["round"] for row in rounds] == [1, 2]
    for record, row in zip((COUGH, NEUTRAL), rounds, strict=True):
        assert row["think"]["transcript"] == record["txt"] and row["think"]["emotion"] == record["extra"]["emotion"]
        assert metrics.normalize(row["text"]) in {metrics.normalize(reply) for reply in record["extra"]["replies"]}
        assert abs(soundfile.info(row["wav"]).duration - len(row["speech_tokens"]) / 25) < 0.05
    assert sorted(os.listdir("talk")) == ["round_1.wav", "round_2.wav"]


def dialogue_clips(number: int, folder: Path) -> tuple[list[Path], dict[str, Any]]:
    """The three recordings of a held-out conversation, and what its last answer has to contain."""
    with tarfile.open(ROOT / "assets" / "evaluation" / "dialogues.tar.gz") as archive:
        archive.extractall(
            folder, [f"dialogue_{number:03d}_{turn}.{end}" for turn in (1, 2, 3) for end in ("ogg", "extra")], filter="data"
        )
    wanted = json.loads((folder / f"dialogue_{number:03d}_3.extra").read_text(encoding="utf-8"))
    return [folder / f"dialogue_{number:03d}_{turn}.ogg" for turn in (1, 2, 3)], wanted


@pytest.mark.skipif(LEARNT_TURNS < 2, reason="the shipped weights have learnt no past turns")
def test_the_third_round_uses_what_was_said_in_the_first(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wavs, wanted = dialogue_clips(REMEMBERED, here)
    answers = {}
    for turns in ("2", "0"):
        assert multiturn.main([*map(str, wavs), "--turns", turns, "--think", "tag", "--text-only", "--json"]) == 0
        rounds = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["round"] for row in rounds] == [1, 2, 3]
        answers[turns] = f" {metrics.normalize(rounds[-1]['text'])} "
    fact = f" {metrics.normalize(wanted['answer'])} "
    assert fact in answers["2"], "the fact of the first round"
    assert fact not in answers["0"], "which nobody can know without it"


# ---- batch ---------------------------------------------------------------------------------------------------------------------------


def run_batch(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = batch.main([str(argument) for argument in arguments])
    shown = capsys.readouterr().out.splitlines()
    return code, json.loads(shown[-1]) if shown else {}


def test_batch_of_spoken_replies_has_everything_and_scores_that_make_sense(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, score = run_batch(capsys, "--list", DEMO, "--out", "talk", "--task", "s2s_think")
    assert code == 0 and (score["records"], score["failed"], score["scored"]) == (8, 0, 8)
    assert score["wer"] < 20, "words of the thought, not the reply against what the user said"
    accuracy = {kind: found["accuracy"] for kind, found in score["tags"].items()}
    assert accuracy == {"age": 100.0, "emotion": 87.5, "event": 100.0, "gender": 100.0}, "one happy voice is called neutral"
    assert score["speech"]["seconds"] > 2 and score["speech"]["without_percent"] == 0
    rows = [json.loads(line) for line in Path("talk/results.jsonl").read_text(encoding="utf-8").splitlines()]
    for row, record in zip(rows, RECORDS, strict=True):
        assert {"key", "task", "text", "think", "tags", "wav", "finish", "guards", "timings", "error"} <= set(row)
        assert row["key"] == record["key"] and row["error"] is None and row["task"] == "s2s_think"
        assert abs(soundfile.info(f"talk/{row['wav']}").duration - len(row["speech_tokens"]) / 25) < 0.05
    assert sorted(os.listdir("talk/wav")) == sorted(f"{record['key']}.wav" for record in RECORDS)
    assert sorted(os.listdir("talk")) == ["results.jsonl", "task.json", "text", "wav"]
    assert Path("talk/text").read_text(encoding="utf-8").startswith(f"{RECORDS[0]['key']} ")
    before = Path("talk/results.jsonl").read_bytes()
    assert batch.main(["--list", str(DEMO), "--out", "talk", "--task", "emotion"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and "holds the answers of task s2s_think, this is task <EMOTION>" in shown.err
    assert Path("talk/results.jsonl").read_bytes() == before


def test_batch_of_an_understanding_task_scores_words_and_tags(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, score = run_batch(capsys, "--list", DEMO, "--out", "emotion", "--task", "asr+emotion", "--batch-size", "3")
    assert code == 0 and score["wer"] < 20 and score["tags"]["emotion"]["of"] == 8 and score["tags"]["emotion"]["right"] >= 5
    assert "speech" not in score and not Path("emotion/wav").exists()


@pytest.mark.parametrize("form", ["shard", "combine"])
def test_batch_finds_the_type_of_a_list_by_itself(form: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(DEMO.parent, "raw")
    assert command(["data", "convert", "raw/demo.jsonl", "shard", "--to", "shard", "--workers", "1"]) == 0
    if form == "combine":
        assert (
            command(
                [
                    "data",
                    "convert",
                    str(next(Path("shard").rglob("shards_list.txt"))),
                    "combine",
                    "--to",
                    "combine",
                    "--workers",
                    "1",
                ]
            )
            == 0
        )
    listed = next(Path(form).rglob("combines_list.txt" if form == "combine" else "shards_list.txt"))
    capsys.readouterr()
    code, score = run_batch(capsys, "--list", listed, "--out", "out", "--task", "emotion")
    assert code == 0 and (score["records"], score["failed"]) == (8, 0) and score["tags"]["emotion"]["right"] >= 7


def test_a_batch_that_failed_wholly_is_an_error_and_one_that_failed_in_part_is_counted(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"key": "a", "wav": "none.wav", "txt": "x"}, {"key": "b", "wav": str(wav_of(COUGH)), "txt": COUGH["txt"]}]
    Path("all.jsonl").write_text(json.dumps(records[0]) + "\n")
    assert batch.main(["--list", "all.jsonl", "--out", "all"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["failed_percent"] == 100 and "wer" not in shown.out
    assert "no record could be answered; the first one:" in shown.err and "none.wav" in shown.err
    Path("some.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*records, records[1]]))
    code, score = run_batch(capsys, "--list", "some.jsonl", "--out", "some")
    assert code == 0 and (score["records"], score["failed"], score["scored"], score["wer"]) == (3, 2, 1, 0.0)
    errors = [json.loads(line)["error"] for line in Path("some/results.jsonl").read_text().splitlines()]
    assert sum(error is None for error in errors) == 1 and any("has this key" in (error or "") for error in errors)
    assert batch.main(["--list", "some.jsonl", "--out", "x", "--task", "asr+style"]) == 1
    assert "has not learnt <TRANSCRIBE> <STYLE>" in capsys.readouterr().err


def test_the_script_shares_a_list_out_and_a_killed_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(
        "".join(
            json.dumps({**record, "key": f"{record['key']}-{i}", "wav": str(wav_of(record))}) + "\n"
            for i in range(2)
            for record in RECORDS
        )
    )
    arguments = ["list.jsonl", "out", "cpu,cpu", "", "", "", "--task", "emotion", "--batch-size", "2"]
    env = {**os.environ, "PYTHON": sys.executable}
    part = tmp_path / "out" / "results.0of2.jsonl"
    first = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "osum_echat.cli",
            "batch",
            "--list",
            "list.jsonl",
            "--out",
            "out",
            "--part",
            "0/2",
            *arguments[6:],
        ],
        cwd=tmp_path,
        env={**env, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    for _ in range(6000):
        if part.exists() and part.read_bytes().count(b"\n") >= 2:
            break
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    kept = part.read_bytes()
    assert 2 <= kept.count(b"\n") < 8, "it was killed in the middle"
    with part.open("ab") as file:
        file.write(b'{"key": "half')
    done = script("infer_with_shards_or_raw.sh", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, "one line of scores"
    score = json.loads(done.stdout)
    assert (score["records"], score["failed"]) == (16, 0) and score["tags"]["emotion"]["right"] >= 14
    assert part.read_bytes().startswith(kept), "what was there is not made again"
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len({row["key"] for row in rows}) == 16


def test_the_script_without_arguments_shows_its_help_and_nothing_else(tmp_path: Path) -> None:
    done = script("infer_with_shards_or_raw.sh", cwd=tmp_path)
    assert done.returncode == 2 and "LIST RESULT_DIR" in done.stdout and "set -euo" not in done.stdout


def test_a_list_that_is_not_there_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert batch.main(["--list", "none.jsonl", "--out", str(tmp_path / "out")]) == 1
    assert "list not found: none.jsonl" in capsys.readouterr().err
    (tmp_path / "taken").write_text("")
    assert batch.main(["--list", str(DEMO), "--out", str(tmp_path / "taken")]) == 1
    assert "taken cannot be written" in capsys.readouterr().err


def test_the_commands_share_one_way_to_name_a_recording(tmp_path: Path) -> None:
    with pytest.raises(common.UserError, match=r"no such recording: none\.wav"):
        common.recording("none.wav")
    assert common.request_options(argparse.Namespace(seed=1, greedy=True, temperature=0.5, max_tokens=3)) == {
        "seed": 1,
        "greedy": True,
        "temperature": 0.5,
        "max_tokens": 3,
    }
