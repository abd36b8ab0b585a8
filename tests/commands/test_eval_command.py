"""`osum-echat eval` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from osum_echat.cli import main as command
from tests.evaluation_case import write_list, write_wav

DEMO = "assets/demo/demo.jsonl"


@pytest.fixture
def answered(tmp_path: Path) -> tuple[Path, Path]:
    """A list and answers to it, two of three right."""
    data = write_list(tmp_path / "l.jsonl", write_wav(tmp_path / "a.wav"), 3)
    path = tmp_path / "theirs" / "results.jsonl"
    path.parent.mkdir()
    texts = ["answer 0", "answer 1", "nonsense"]
    path.write_text("".join(json.dumps({"id": f"k{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    return data, path


def last_line(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


def test_help_names_the_options_and_suites_are_listed(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        command(["eval", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(
        option in shown for option in ("--suite", "--data", "--out", "--limit", "--from", "--judge", "--compare", "--export")
    )
    assert command(["eval", "--list-suites"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name} " in shown for name in ("dialogue", "empathy", "latency", "speech", "understanding"))


def test_a_checkpoint_is_measured_from_list_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    arguments = ["eval", "checkpoints/mini", "--suite", "understanding", "--data", DEMO, "--out", str(out), "--limit", "2"]
    assert command([*arguments, "normalizer=own", "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    values = last_line(shown)
    assert values["suite"] == "understanding" and values["scored"] == 10 and values["holes"] == 0
    assert values["gender"] == 100 and values["age"] == 100 and values["wer"] < 40
    assert "| wer |" in shown and "Published" in shown
    for name in ("report.md", "report.json", "report.html", "results.jsonl", "scores.jsonl"):
        assert (out / name).stat().st_size > 0
    before = (out / "results.jsonl").read_bytes()
    assert command([*arguments, "normalizer=own"]) == 0  # nothing is asked again
    assert (out / "results.jsonl").read_bytes() == before
    assert last_line(capsys.readouterr().out) == values


def test_answers_of_another_system_need_no_model(answered: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data, path = answered
    assert command(["eval", "--suite", "dialogue", "--data", str(data), "--from", str(path), "--out", str(tmp_path / "o")]) == 0
    values = last_line(capsys.readouterr().out)
    assert values["reply_fit"] == 66.67 and values["scored"] == 3
    assert json.loads((tmp_path / "o" / "report.json").read_text())["system"] == "theirs"


def test_several_suites_write_folders_and_take_data_of_their_own(answered: tuple[Path, Path], tmp_path: Path):
    data, path = answered
    arguments = ["--data", f"dialogue={data}", "--data", str(data), "--from", str(path), "--out", str(tmp_path / "o")]
    assert command(["eval", "--suite", "dialogue", "--suite", "understanding", *arguments, "normalizer=own"]) == 0
    assert (tmp_path / "o/dialogue/report.html").is_file() and (tmp_path / "o/understanding/report.md").is_file()


def test_one_suite_that_fails_and_a_change_of_one_suites_part_do_not_stop_the_others(
    answered: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data, path = answered
    arguments = ["eval", "--suite", "speech", "--suite", "dialogue", "--from", str(path), "--out", str(tmp_path / "o")]
    assert command([*arguments, "--data", str(data), "--data", f"speech={tmp_path / 'none'}", "parts.open.take=2"]) == 0
    shown = capsys.readouterr()
    assert "speech: test set not found" in shown.err and last_line(shown.out)["scored"] == 2
    assert command([*arguments, "--data", str(data), "parts.nowhere.take=2"]) == 1
    assert "parts.nowhere: there is no such part to change" in capsys.readouterr().err


def test_runs_are_compared_and_exported(answered: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data, path = answered
    for name in ("one", "two"):
        arguments = ["--data", str(data), "--from", str(path), "--out", str(tmp_path / name), "--export", "voicebench,versa"]
        assert command(["eval", "--suite", "dialogue", *arguments]) == 0
    assert (tmp_path / "one/export/voicebench/theirs-open-test-audio.jsonl").is_file()
    capsys.readouterr()
    assert command(["eval", "--compare", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "c")]) == 0
    assert "no difference seen" in capsys.readouterr().out and (tmp_path / "c/compare.html").is_file()


def test_items_are_made_of_a_labelled_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert command(["eval", "--make-items", DEMO, "--out", str(tmp_path / "items.jsonl")]) == 0
    made = last_line(capsys.readouterr().out)
    rows = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert made["items"] == len(rows) and {row["group"] for row in rows} == {"emotion", "age", "gender", "event", "multi"}


def test_mistakes_are_one_line_and_an_exit_code(answered: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data, path = answered
    common = ["--data", str(data), "--out", str(tmp_path / "o")]
    for arguments, message in (
        (["--suite", "nonsense", *common], "there is no suite 'nonsense'"),
        (["--suite", "dialogue", *common, "--from", str(tmp_path / "none.jsonl")], "none.jsonl cannot be read"),
        (["--suite", "dialogue", "--data", str(tmp_path / "none"), "--out", "x", "--from", str(path)], "test set not found"),
        (["--suite", "dialogue", *common, "--from", str(path), "--judge-model", "m"], "--judge-model without its --judge URL"),
        (["--suite", "dialogue", *common, "--from", str(path), "sed=1"], "unknown key sed"),
        (["no/such/checkpoint", "--suite", "dialogue", *common], "no such checkpoint"),
    ):
        assert command(["eval", *arguments]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        command(["eval", "--suite", "dialogue"])
    assert stopped.value.code == 2


def test_a_run_without_a_single_answer_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = write_list(tmp_path / "l.jsonl", write_wav(tmp_path / "a.wav"), 3)
    (tmp_path / "r.jsonl").write_text('{"id": "other", "text": "x"}\n')
    arguments = ["--suite", "dialogue", "--data", str(data), "--from", str(tmp_path / "r.jsonl"), "--out", str(tmp_path / "o")]
    assert command(["eval", *arguments]) == 1
    assert last_line(capsys.readouterr().out)["scored"] == 0


def test_devices_share_the_work_and_the_answers_come_together(tmp_path: Path):
    out = tmp_path / "o"
    arguments = ["eval", "checkpoints/mini", "--suite", "understanding", "--data", DEMO, "--out", str(out), "--limit", "2"]
    assert command([*arguments, "--devices", "cpu,cpu", "--threads", "1", "normalizer=own"]) == 0
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and len({(row["part"], row["id"]) for row in rows}) == 10
    assert (out / "results.0of2.jsonl").is_file() and (out / "results.1of2.jsonl").is_file()
