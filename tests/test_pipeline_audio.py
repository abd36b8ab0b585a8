"""Recordings of every kind: what can be used is, what cannot is a sentence, nothing crashes."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from osum_echat.audio.io import AudioError
from osum_echat.generation.config import GenerationConfig
from osum_echat.pipeline import EChat
from tests.generation_case import DATA

NOISE = np.random.default_rng(0).standard_normal(2 * 44_100) * 0.1


@pytest.fixture(scope="module")
def echat() -> EChat:
    settings = GenerationConfig(modes={"text": replace(GenerationConfig().mode("text"), max_new=3)})
    return EChat.load(DATA / "tiny.safetensors", DATA / "tiny_config.yaml", generation=settings, device="cpu")


def file_bytes(samples: np.ndarray, rate: int, kind: str, subtype: str | None = None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=kind, subtype=subtype)
    return out.getvalue()


@pytest.mark.parametrize(
    "source",
    [
        pytest.param((NOISE[:8000], 8000), id="8 kHz"),
        pytest.param((np.tile(NOISE[None, :32000], (6, 1)), 16000), id="5.1 channels"),
        pytest.param((NOISE[:16000].astype(np.float64), 16000), id="float64"),
        pytest.param((NOISE[:16000].tolist(), 16000), id="a list"),
        pytest.param(((NOISE[:16000] * 30000).astype(np.int16), 16000), id="int16"),
        pytest.param((NOISE[:1700], 16000), id="0.106 s"),
        pytest.param(file_bytes(np.stack([NOISE, NOISE], 1), 44100, "MP3"), id="44.1 kHz stereo mp3"),
        pytest.param(file_bytes(NOISE, 44100, "WAV", "DOUBLE"), id="float64 wav"),
        pytest.param(file_bytes(NOISE[:48000], 48000, "FLAC"), id="48 kHz flac"),
        pytest.param(file_bytes(NOISE[:8000], 8000, "WAV", "ULAW"), id="telephone wav"),
    ],
)
def test_recordings_that_are_heard(echat: EChat, source: Any) -> None:
    reply = echat.understand(source)
    assert reply.finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        pytest.param(b"", "empty", id="no bytes"),
        pytest.param(b"this is a text " * 50, "not_audio", id="a text"),
        pytest.param("no/such/file.wav", "missing", id="no file"),
        pytest.param((np.zeros(0), 16000), "empty", id="no samples"),
        pytest.param((np.full(16000, np.nan), 16000), "not_finite", id="NaN"),
        pytest.param((NOISE[:160], 16000), "too_short", id="0.01 s"),
        pytest.param((np.zeros(16000 * 601, dtype=np.float32), 16000), "too_long", id="10 minutes"),
        pytest.param((np.zeros(16000 * 450, dtype=np.float32), 16000), "too_long", id="more than the adapter holds"),
        pytest.param((np.array(["a"]), 16000), "bad_input", id="no numbers"),
        pytest.param((NOISE, 0), "bad_input", id="no rate"),
        pytest.param((NOISE,), "bad_input", id="half a pair"),
    ],
)
def test_recordings_that_cannot_be_used_say_why(echat: EChat, source: Any, reason: str) -> None:
    with pytest.raises(AudioError) as error:
        echat.understand(source, "<EMOTION>")
    assert error.value.reason == reason and len(str(error.value)) > 10


def test_paths_of_both_kinds_are_taken(echat: EChat, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", NOISE[:16000], 16000)
    assert echat.understand(tmp_path / "a.wav").text == echat.understand(str(tmp_path / "a.wav")).text
