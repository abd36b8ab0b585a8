"""Recordings as people have them: phones, browsers, the web; files that they can read afterwards."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from osum_echat.audio import decode
from osum_echat.audio.fetch import FetchError, fetch
from osum_echat.audio.io import AudioError, check_output, duration, read, to_mono_16k, write

RATE = 48_000
TONE = (0.3 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE)).astype(np.float32)


def encoded(form: str, codec: str, channels: int = 1) -> bytes:
    """The tone as a phone or a browser stores it."""
    import av

    out = io.BytesIO()
    with av.open(out, "w", format=form) as container:
        layout = "mono" if channels == 1 else "stereo"
        stream: Any = container.add_stream(codec, rate=RATE, layout=layout)
        for start in range(0, len(TONE), 960):
            samples = np.repeat(TONE[None, start : start + 960], channels, axis=0)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
            frame.rate, frame.pts = RATE, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def loudest(samples: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum) * rate / len(samples))


FORMS = {"m4a": ("mp4", "aac"), "aac": ("adts", "aac"), "webm": ("webm", "libopus"), "3gp": ("3gp", "aac")}


@pytest.mark.parametrize("suffix", FORMS)
def test_recordings_of_phones_and_browsers_are_read(suffix: str, tmp_path: Path) -> None:
    data = encoded(*FORMS[suffix], channels=2 if suffix == "webm" else 1)
    path = tmp_path / f"me.{suffix}"
    path.write_bytes(data)
    for source in (path, str(path), data, io.BytesIO(data)):
        samples = to_mono_16k(source)
        assert abs(len(samples) / 16_000 - 2.0) < 0.1 and abs(loudest(samples, 16_000) - 440) < 2
        assert abs(np.sqrt(np.mean(samples[8000:24_000] ** 2)) - 0.3 / np.sqrt(2)) < 0.01
    part = read(path, start=0.5, end=1.5)
    assert abs(part.seconds - 1.0) < 0.01 and abs(duration(path) - 2.0) < 0.1
    with pytest.raises(AudioError, match="at most 1 s are taken") as error:
        read(path, max_seconds=1)
    assert error.value.reason == "too_long" and str(path) in str(error.value)


def test_a_damaged_recording_of_a_phone_is_a_sentence() -> None:
    with pytest.raises(AudioError, match=r"bytes of audio (is damaged|holds no sound)") as error:
        to_mono_16k(encoded("mp4", "aac")[:200])
    assert error.value.reason == "not_audio"


def test_without_pyav_ffmpeg_is_asked_and_without_both_a_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "av" else found(name, *a))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    data = encoded("mp4", "aac")
    with pytest.raises(AudioError, match=r"m4a or mp4, which needs PyAV or ffmpeg: pip install 'osum-echat\[audio\]'"):
        to_mono_16k(data)
    commands: list[list[str]] = []

    def ffmpeg(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        assert Path(command[command.index("-i") + 1].removeprefix("file:")).read_bytes() == data
        return subprocess.CompletedProcess(command, 0, TONE.astype("<f4").tobytes(), b"")

    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(subprocess, "run", ffmpeg)
    assert abs(loudest(to_mono_16k(data), 16_000) - 440) < 2
    (tmp_path / "me.m4a").write_bytes(data)
    to_mono_16k(tmp_path / "me.m4a")
    assert commands[1][commands[1].index("-i") + 1] == f"file:{tmp_path / 'me.m4a'}"

    def broken(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(command, 1, b"", b"first\nfile: moov atom not found\n")

    monkeypatch.setattr(subprocess, "run", broken)
    with pytest.raises(AudioError, match="is damaged: file: moov atom not found"):
        to_mono_16k(data)

    def slow(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", slow)
    with pytest.raises(AudioError, match="was not decoded within"):
        to_mono_16k(data)


@pytest.mark.parametrize("text", [b"#EXTM3U\nfile:///etc/passwd\n", b"ffconcat version 1.0\nfile a.wav\n", b"<html></html>" * 40])
def test_only_recordings_are_handed_to_the_decoders(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "decode", lambda *a: pytest.fail("a text was decoded"))
    with pytest.raises(AudioError, match="is not audio that can be read"):
        to_mono_16k(text)


# ---- the web -------------------------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/none.wav":
            self.send_error(404)
            return
        wav = io.BytesIO()
        soundfile.write(wav, TONE, RATE, format="WAV")
        body = wav.getvalue()
        self.send_response(302 if self.path == "/moved.wav" else 200)
        if self.path == "/moved.wav":
            self.send_header("Location", "/a.wav")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path != "/unsized.wav":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        step = 2000 if self.path == "/slow.wav" else len(body)
        try:
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                if self.path == "/slow.wav":
                    time.sleep(0.05)
        except (BrokenPipeError, ConnectionResetError):
            return

    def log_message(self, *args: Any) -> None:
        return


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.mark.parametrize("path", ["/a.wav", "/moved.wav", "/unsized.wav"])
def test_a_recording_on_the_web_is_read(server: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    assert abs(loudest(to_mono_16k(server + path), 16_000) - 440) < 2


def test_what_is_too_large_too_slow_or_not_there_is_a_sentence(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    for path in ("/a.wav", "/unsized.wav"):
        with pytest.raises(FetchError, match="has more than"):
            fetch(server + path, max_bytes=10_000)
    started = time.monotonic()
    with pytest.raises(FetchError, match=r"took longer than 0.3 s"):
        fetch(server + "/slow.wav", seconds=0.3)
    assert time.monotonic() - started < 3
    with pytest.raises(AudioError, match="the server answers 404") as error:
        to_mono_16k(server + "/none.wav")
    assert error.value.reason == "missing"
    with pytest.raises(FetchError, match="cannot be reached"):
        fetch("http://127.0.0.1:9/a.wav", seconds=5)
    with pytest.raises(FetchError, match="not an http or https address"):
        fetch("file:///etc/hostname")


# ---- files that are written ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_of_the_umask(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write(tmp_path / "a.wav", TONE, RATE)
    finally:
        os.umask(before)
    assert (tmp_path / "a.wav").stat().st_mode & 0o777 == mode and os.listdir(tmp_path) == ["a.wav"]


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_a_comment_stays_in_the_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    write(path, TONE, RATE, comment="synthetic speech")
    with soundfile.SoundFile(path) as file:
        assert file.comment == "synthetic speech"
        assert file.software.startswith("OSUM-EChat") or suffix == "mp3", "ID3 tags, as libsndfile writes them, lack it"
        assert abs(loudest(file.read(), RATE) - 440) < 2


def test_what_cannot_be_written_is_said_before(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "a.wav")
    assert os.listdir(tmp_path / "new") == []
    with pytest.raises(AudioError, match=r"a suffix such as \.wav"):
        check_output(tmp_path / "a.doc")
    with pytest.raises(IsADirectoryError):
        check_output(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        check_output(tmp_path / "file" / "a.wav")
