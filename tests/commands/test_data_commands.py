"""The data commands as a person uses them, in a folder outside the checkout."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from osum_echat.cli import main as command

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "assets" / "demo" / "demo.jsonl"


def test_the_script_shows_the_fake_data_in_all_three_forms_from_any_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "do_test_dataloader.py"), "--batches", "1"],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^=== .*fake_data/(\w+)/\S+ \((\w+)\) ===$", done.stdout, re.M) == [
        ("raw", "raw"),
        ("shard", "shard"),
        ("combine", "combine"),
    ]
    assert done.stdout.count("  54 used; none left out\n") == 3, "the same records in each form"
    assert done.stdout.count("batch 0: ") == 3 and "tags:  age=ADULT gender=MALE emotion=ANGRY event=sigh" in done.stdout


def test_samples_are_shown_with_the_labels_of_their_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["data", "show", str(DEMO), "--samples", "20", "--batches", "9"]) == 0
    shown = capsys.readouterr().out
    assert "8 used; none left out" in shown and "we watched that film last night" in shown
    assert len(re.findall(r"^  \d\w+  .* positions, \d+ targets, \d+ frames$", shown, re.M)) == 8


def test_a_list_that_is_not_there_and_one_that_is_bad_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command(["data", "show", "nowhere.list"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("osum-echat data show: list not found: nowhere.list")
    shutil.copytree(ROOT / "assets" / "demo", tmp_path / "demo")
    (tmp_path / "demo" / "1_adult_male_happy.ogg").write_bytes(b"no sound")
    assert command(["data", "doctor", "demo/demo.jsonl"]) == 1
    assert "1_adult_male_happy" in capsys.readouterr().out
