"""Recordings that libsndfile does not read: m4a and 3gp of phones, webm of browsers, raw aac, amr, wma.

They go through PyAV (``pip install 'osum-echat[audio]'``), or through an ``ffmpeg`` on the PATH. Only files whose first
bytes say that they are of these kinds do: FFmpeg knows many forms (playlists among them) that nobody should open by
accident.
"""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

SECONDS = 120.0
"""An ffmpeg that takes longer than this is stopped."""
_FFMPEG_RATE = 48_000


class DecodeError(ValueError):
    """What was wrong with the recording, or what is missing here."""


def container(head: bytes) -> str | None:
    """The kind of a file by its first bytes (16 are enough), for the kinds that are decoded here; else None."""
    if head[4:8] == b"ftyp":
        return "m4a or mp4"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "webm"
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return "aac"
    if head[:5] == b"#!AMR":
        return "amr"
    return "wma" if head[:8] == b"0&\xb2u\x8ef\xcf\x11" else None


def decode(source: str | os.PathLike[str] | bytes, kind: str, max_seconds: float) -> tuple[npt.NDArray[np.float32], int]:
    """Samples [channels, n] and rate of the first sound in the file; a little more than ``max_seconds`` of it at most.

    Raises:
        DecodeError: in words for the person whose file it is.
    """
    if importlib.util.find_spec("av") is not None:
        return _with_av(source, max_seconds)
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        raise DecodeError(f"is {kind}, which needs PyAV or ffmpeg: pip install 'osum-echat[audio]', or install ffmpeg")
    return _with_ffmpeg(ffmpeg, source, max_seconds)


def _with_av(source: str | os.PathLike[str] | bytes, max_seconds: float) -> tuple[npt.NDArray[np.float32], int]:
    import av

    handle: Any = io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)
    try:
        with av.open(handle) as opened:
            if not opened.streams.audio:
                raise DecodeError("holds no sound")
            rate = int(opened.streams.audio[0].rate)
            parts = list(_frames(opened, rate, max_seconds))
    except av.FFmpegError as error:
        raise DecodeError(f"is damaged: {error.strerror}") from error
    if not parts:
        raise DecodeError("holds no sound")
    return np.concatenate(parts, axis=1), rate


def _frames(opened: Any, rate: int, max_seconds: float) -> Iterator[npt.NDArray[np.float32]]:
    import av

    floats, count = av.AudioResampler(format="fltp"), 0
    for frame in opened.decode(audio=0):
        for part in floats.resample(frame):
            yield np.asarray(part.to_ndarray(), dtype=np.float32)
            count += part.samples
        if count > (max_seconds + 1) * rate:
            return


def _with_ffmpeg(ffmpeg: str, source: str | os.PathLike[str] | bytes, max_seconds: float) -> tuple[npt.NDArray[np.float32], int]:
    """One channel at 48 kHz."""
    with tempfile.NamedTemporaryFile(suffix=".recording") as file:  # m4a has its index at the end, so a pipe is no help
        if isinstance(source, bytes):
            file.write(source)
            file.flush()
        name = file.name if isinstance(source, bytes) else os.fspath(source)
        command = [ffmpeg, "-v", "error", "-nostdin", "-protocol_whitelist", "file,pipe", "-i", f"file:{name}", "-map", "0:a:0"]
        command += ["-t", str(max_seconds + 1), "-ac", "1", "-ar", str(_FFMPEG_RATE), "-f", "f32le", "pipe:1"]
        try:
            done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise DecodeError(f"was not decoded within {SECONDS:.0f} s") from error
    if done.returncode or not done.stdout:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise DecodeError(f"is damaged: {said[-1].replace(name, 'the file')}" if said else "holds no sound")
    return np.frombuffer(done.stdout, dtype="<f4")[None].astype(np.float32), _FFMPEG_RATE
