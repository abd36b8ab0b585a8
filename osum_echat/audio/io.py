"""Recordings in and out: any source to float samples, with errors a person can act on.

`read` takes a path, bytes, an open file or ``(samples, rate)`` and returns samples in [-1, 1] as they are in the file;
`to_mono_16k` is what every listener of the system uses. wav, flac, ogg, mp3 and the other formats of libsndfile are
read; m4a, webm and the like through `decode`.
"""

from __future__ import annotations

import io
import math
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from osum_echat.audio import decode
from osum_echat.audio.fetch import FetchError, fetch, is_web
from osum_echat.audio.resample import resample

if TYPE_CHECKING:
    import soundfile

SAMPLE_RATE = 16_000  # of everything the model hears
MAX_SECONDS = 600.0
MIN_SECONDS = 0.1  # a log-mel frame reflects 12.5 ms at both ends, and nobody says anything in less
LOUDEST = 2.0**31
"""Of a sample. Full scale is 1; integers that were stored as floats reach this; more is no sound, and overflows in the
encoder."""
_PLAUSIBLE_RATES = (1_000, 768_000)

Samples: TypeAlias = npt.NDArray[np.float32]
Source: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO | tuple[Any, int] | Audio"


class AudioError(ValueError):
    """Audio that cannot be used. ``reason`` is a short name to count by: missing, not_audio, empty, not_finite,
    too_short, too_long, bad_input."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Audio:
    """``samples`` [channels, n] float32, about [-1, 1]; ``rate`` in Hz."""

    samples: Samples
    rate: int

    @property
    def seconds(self) -> float:
        return self.samples.shape[1] / self.rate

    def mono(self) -> Samples:
        """Mean over channels, [n]."""
        return self.samples[0] if len(self.samples) == 1 else self.samples.mean(axis=0)


def read(
    source: Source,
    start: float | None = None,
    end: float | None = None,
    min_seconds: float = 0.0,
    max_seconds: float = MAX_SECONDS,
) -> Audio:
    """Read ``source``, or its part from ``start`` to ``end`` seconds.

    Args:
        source: path or http(s) address, bytes of an audio file, file object, `Audio`, or (samples, rate): array [n],
            [channels, n] or [n, channels], float in [-1, 1] or signed/unsigned integer of full scale.
        min_seconds, max_seconds: what is shorter or longer is an error; the length is looked up before samples are
            read.

    Raises:
        AudioError: see its reasons.
    """
    if isinstance(source, Audio):
        audio = _cut(source, start, end, max_seconds)
    elif isinstance(source, tuple):
        if len(source) != 2:
            raise AudioError("bad_input", f"expected (samples, rate), found a tuple of {len(source)}")
        audio = _cut(_from_array(*source), start, end, max_seconds)
    else:
        audio = _from_file(_fetched(source), start, end, max_seconds)
    if audio.samples.size == 0:
        raise AudioError("empty", f"{_name(source)} has no samples")
    peak = max(float(audio.samples.max()), -float(audio.samples.min()))  # NaN where one sample is
    if not math.isfinite(peak):
        raise AudioError("not_finite", f"{_name(source)} holds NaN or infinite samples")
    if peak > LOUDEST:
        raise AudioError("bad_input", f"{_name(source)} holds a sample of {peak:.1e}; floats are in [-1, 1]")
    if audio.seconds < min_seconds:
        raise AudioError("too_short", f"{_name(source)} has {audio.seconds:.3f} s, at least {min_seconds:g} s are needed")
    return audio


def to_mono_16k(
    source: Source,
    start: float | None = None,
    end: float | None = None,
    min_seconds: float = MIN_SECONDS,
    max_seconds: float = MAX_SECONDS,
) -> Samples:
    """`read`, mean over channels, resampled to 16 kHz: [n] float32. Raises AudioError."""
    audio = read(source, start, end, min_seconds, max_seconds)
    return resample(audio.mono(), audio.rate, SAMPLE_RATE)


def write(path: str | os.PathLike[str], samples: npt.ArrayLike, rate: int, comment: str = "") -> None:
    """Write samples [n] or [channels, n] (clipped to [-1, 1]) in the format of the suffix, 16 bit for wav and flac.

    The file appears under its name only when it is whole. ``comment`` goes into its metadata.
    """
    path = Path(path)
    content = encode(samples, rate, _format(path), comment)
    temporary, descriptor = _new_file(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def encode(samples: npt.ArrayLike, rate: int, kind: str = "WAV", comment: str = "", subtype: str | None = None) -> bytes:
    """The bytes of what `write` writes; ``kind`` and ``subtype`` are formats of libsndfile (None: the usual one)."""
    data = np.atleast_2d(np.asarray(samples, dtype=np.float32))
    if data.ndim != 2:
        raise AudioError("bad_input", f"samples must be [n] or [channels, n], found shape {np.shape(samples)}")
    import soundfile

    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, len(data), subtype, format=kind) as sound:
        if comment:
            sound.comment, sound.software = comment, "OSUM-EChat"
        sound.write(np.clip(data, -1.0, 1.0).T)
    return buffer.getvalue()


def check_output(path: str | os.PathLike[str]) -> None:
    """Make the folder of a file to be written and try it, so that what cannot be written is said before anything is
    computed.

    Raises:
        AudioError: no format has this suffix. OSError: the place cannot be written.
    """
    path = Path(path)
    _format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    temporary, descriptor = _new_file(path)
    os.close(descriptor)
    os.unlink(temporary)


def _format(path: Path) -> str:
    import soundfile

    kind = path.suffix.lstrip(".").upper() or "WAV"
    if kind not in soundfile.available_formats():
        raise AudioError("bad_input", f"cannot write {path.name}: use a suffix such as .wav, .flac, .ogg or .mp3")
    return kind


def _new_file(path: Path) -> tuple[Path, int]:
    """A new file beside ``path`` and its descriptor, with the permissions that the user's umask leaves."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    return temporary, os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def duration(source: str | os.PathLike[str] | bytes) -> float:
    """Seconds of a file by its header alone. Raises AudioError."""
    try:
        with _open(source) as file:
            return file.frames / file.samplerate
    except AudioError as error:
        return _decoded(source, error, MAX_SECONDS).seconds


def _fetched(source: Any) -> Any:
    if not is_web(source):
        return source
    try:
        return fetch(source)
    except FetchError as error:
        raise AudioError("missing", str(error)) from error


def _decoded(source: Any, error: AudioError, max_seconds: float) -> Audio:
    """The file through `decode`; ``error`` is what libsndfile had against it, raised again where `decode` has no other
    word for it."""
    if error.reason != "not_audio":
        raise error
    if not isinstance(source, (str, os.PathLike, bytes)):
        source.seek(0)
        source = source.read()
    if isinstance(source, bytes):
        head = source[:16]
    else:
        with open(source, "rb") as file:
            head = file.read(16)
    kind = decode.container(head)
    if kind is None:
        raise error
    try:
        return Audio(*decode.decode(source, kind, max_seconds))
    except decode.DecodeError as problem:
        raise AudioError("not_audio", f"{_name(source)} {problem}") from problem


def _open(source: str | os.PathLike[str] | bytes | BinaryIO) -> soundfile.SoundFile:
    import soundfile

    if isinstance(source, (str, os.PathLike)):
        if not os.path.isfile(source):
            raise AudioError("missing", f"audio file not found: {os.fspath(source)}")
        handle: Any = os.fspath(source)
    else:
        handle = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        return soundfile.SoundFile(handle)
    except (soundfile.LibsndfileError, TypeError) as error:
        reason = "empty" if source == b"" else "not_audio"
        raise AudioError(reason, f"{_name(source)} is not audio that can be read (wav, flac, ogg, mp3): {error}") from error


def _from_file(source: Any, start: float | None, end: float | None, max_seconds: float) -> Audio:
    import soundfile

    try:
        opened = _open(source)
    except AudioError as error:
        return _cut(_decoded(source, error, max_seconds + (start or 0.0)), start, end, max_seconds, _name(source))
    with opened as file:
        rate = file.samplerate
        first, stop = _bounds(file.frames, rate, start, end, _name(source), max_seconds)
        # 16-bit files are read as integers and scaled here: six times faster than libsndfile's own conversion, and
        # equal.
        narrow = file.subtype == "PCM_16"
        try:
            if first:
                file.seek(first)
            data = file.read(stop - first, dtype="int16" if narrow else "float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise AudioError("not_audio", f"{_name(source)} breaks off or is damaged: {error}") from error
    samples = np.ascontiguousarray(data.T, dtype=np.float32)
    if narrow:
        samples *= np.float32(1 / 32768)
    return Audio(samples, rate)


def _from_array(samples: Any, rate: Any) -> Audio:
    if not isinstance(rate, (int, np.integer)) or not _PLAUSIBLE_RATES[0] <= rate <= _PLAUSIBLE_RATES[1]:
        raise AudioError("bad_input", f"expected (samples, rate) with a rate in Hz, found rate {rate!r}")
    try:
        data = np.asarray(samples)
    except (TypeError, ValueError) as error:
        raise AudioError("bad_input", f"samples are not an array of numbers: {error}") from error
    if data.ndim == 1:
        data = data[None]
    elif data.ndim == 2 and data.shape[0] > data.shape[1] > 0:  # [n, channels], as some recorders give it
        data = data.T
    if data.ndim != 2:
        raise AudioError("bad_input", f"samples must be [n], [channels, n] or [n, channels], found shape {data.shape}")
    if data.dtype == np.uint8:
        data = (data.astype(np.float32) - 128) / 128
    elif np.issubdtype(data.dtype, np.signedinteger):
        data = data.astype(np.float64) / -float(np.iinfo(data.dtype).min)
    elif not np.issubdtype(data.dtype, np.floating):
        raise AudioError("bad_input", f"samples must be float, signed integer or uint8, found {data.dtype}")
    return Audio(np.ascontiguousarray(data, dtype=np.float32), int(rate))


def _cut(audio: Audio, start: float | None, end: float | None, max_seconds: float, name: str = "the recording") -> Audio:
    first, stop = _bounds(audio.samples.shape[1], audio.rate, start, end, name, max_seconds)
    return Audio(audio.samples[:, first:stop], audio.rate)


def _bounds(frames: int, rate: int, start: float | None, end: float | None, name: str, max_seconds: float) -> tuple[int, int]:
    """First and last sample of the segment; checks order and length."""
    first = round((start or 0.0) * rate)
    stop = frames if end is None else min(frames, round(end * rate))
    if (start is not None or end is not None) and not 0 <= first < stop:
        raise AudioError("empty", f"{name} has {frames / rate:.2f} s, the segment {start} to {end} s is outside it")
    if stop - first > max_seconds * rate:
        seconds = (stop - first) / rate
        raise AudioError("too_long", f"{name} has {seconds:.1f} s, at most {max_seconds:g} s are taken; cut it into parts")
    return first, stop


def _name(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return f"{len(source)} bytes of audio" if isinstance(source, bytes) else "the recording"
