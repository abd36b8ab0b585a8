"""Reading and writing audio: every source and format, and a clear error for everything that is not audio."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from osum_echat.audio.io import Audio, AudioError, duration, read, to_mono_16k, write


def tone(seconds: float = 0.5, rate: int = 16000, hz: float = 440.0) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encoded(samples: np.ndarray, rate: int, kind: str, subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.T, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_U8", "FLOAT", "DOUBLE"])
def test_every_wav_subtype_reads_as_soundfile_reads_it(subtype):
    data = encoded(np.stack([tone(), -tone()]), 16000, "WAV", subtype)
    audio = read(data)
    expected, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    assert audio.rate == rate and audio.samples.dtype == np.float32
    np.testing.assert_array_equal(audio.samples, expected.T)


@pytest.mark.parametrize(("kind", "rate"), [("FLAC", 16000), ("OGG", 24000), ("MP3", 44100), ("WAV", 8000)])
def test_formats_and_rates_arrive_as_the_same_sound_at_16k(kind, rate):
    samples = to_mono_16k(encoded(tone(1.0, rate), rate, kind))
    assert abs(len(samples) - 16000) <= 1200  # mp3 pads
    spectrum = np.abs(np.fft.rfft(samples[2000:14000]))
    assert abs(np.argmax(spectrum) * 16000 / 12000 - 440) < 3
    assert abs(np.abs(samples).max() - 0.4) < 0.05


def test_a_path_bytes_an_open_file_and_samples_are_the_same_recording(tmp_path):
    path = tmp_path / "a.wav"
    write(path, tone(), 16000)
    expected = read(path).samples
    for source in (str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), (expected[0], 16000), Audio(expected, 16000)):
        np.testing.assert_array_equal(read(source).samples, expected)
    assert duration(path) == 0.5


@pytest.mark.parametrize(
    "samples",
    [
        np.round(tone() * 32767).astype(np.int16),
        (tone() * 2**31).astype(np.int32),
        tone().astype(np.float64),
        np.stack([tone(), tone()]),
        np.stack([tone(), tone()], axis=1),
        np.stack([tone()] * 6),
    ],
    ids=["int16", "int32", "float64", "stereo", "interleaved", "5.1"],
)
def test_sample_arrays_of_any_kind_become_the_same_mono(samples):
    np.testing.assert_allclose(to_mono_16k((samples, 16000)), tone(), atol=1e-4)


def test_a_segment_is_cut_and_only_it_is_judged():
    data = encoded(tone(3.0), 16000, "WAV")
    np.testing.assert_allclose(to_mono_16k(data, start=1.0, end=1.5), tone(3.0)[16000:24000], atol=1e-4)
    assert len(to_mono_16k(data, start=2.5, max_seconds=1.0)) == 8000
    assert len(to_mono_16k((tone(3.0), 16000), end=0.25)) == 4000
    with pytest.raises(AudioError, match="outside"):
        to_mono_16k(data, start=4.0)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"", "empty"),
        (b"this is text, not sound" * 10, "not_audio"),
        ("no/such/file.wav", "missing"),
        ((np.zeros(0, np.float32), 16000), "empty"),
        ((np.array([0.1, np.nan] * 4000, np.float32), 16000), "not_finite"),
        ((np.array([0.1, np.inf] * 4000, np.float32), 16000), "not_finite"),
        ((np.array([0.1, -1e30] * 4000, np.float32), 16000), "bad_input"),
        ((np.zeros((0, 9)), 16000), "empty"),
        ((tone(0.01), 16000), "too_short"),
        ((np.zeros(16000 * 700, np.int16), 16000), "too_long"),
        ((tone(), 0), "bad_input"),
        ((tone(), "16000"), "bad_input"),
        ((np.zeros((2, 3, 4)), 16000), "bad_input"),
        ((np.array(["a", "b"]), 16000), "bad_input"),
        ((tone(), 16000, 1), "bad_input"),
    ],
)
def test_what_is_not_usable_audio_is_an_error_with_a_reason(source, reason):
    with pytest.raises(AudioError) as caught:
        to_mono_16k(source)
    assert caught.value.reason == reason and len(str(caught.value)) > 20


def test_a_file_that_is_too_long_is_refused_before_its_samples_are_read(monkeypatch):
    data = encoded(tone(2.0), 16000, "WAV")
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *a, **k: pytest.fail("samples were read"))
    with pytest.raises(AudioError, match="at most 1 s"):
        read(data, max_seconds=1.0)


def test_a_truncated_wav_gives_what_is_there_or_an_error():
    data = encoded(tone(1.0), 16000, "WAV")
    assert 0 < len(to_mono_16k(data[: len(data) // 2])) <= 8000
    with pytest.raises(AudioError):
        to_mono_16k(data[:20])


def test_writing_clips_and_leaves_nothing_behind_when_it_fails(tmp_path):
    path = tmp_path / "a.wav"
    write(path, np.array([[2.0, -2.0, 0.0]], np.float32), 16000)
    assert np.abs(read(path).samples).max() <= 1.0
    for bad in (tmp_path / "a.nosuch", tmp_path / "b.wav"):
        with pytest.raises((AudioError, TypeError, ValueError, soundfile.LibsndfileError)):
            write(bad, tone(), 16000 if bad.suffix == ".nosuch" else -1)
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]
