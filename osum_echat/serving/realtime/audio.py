"""Audio as it goes over the wire, to and from samples at the rates that are used inside, piece by piece.

Formats are those of the Realtime API: ``audio/pcm`` (16 bit little endian, 24 kHz), ``audio/pcmu`` and ``audio/pcma``
(G.711, 8 kHz). A piece may end in the middle of a sample: the odd byte waits for the next one.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import numpy as np
import numpy.typing as npt
import soxr

from osum_echat.audio import g711

Samples = npt.NDArray[np.float32]
HEARD_RATE = 16_000
"""Of everything the model and the turn detection hear."""
RATES = {"audio/pcm": 24_000, "audio/pcmu": g711.RATE, "audio/pcma": g711.RATE}
BYTES = {"audio/pcm": 2, "audio/pcmu": 1, "audio/pcma": 1}
_LAWS: dict[str, g711.Law] = {"audio/pcmu": "mu", "audio/pcma": "a"}


def decode_base64(text: str) -> bytes:
    """Raises ValueError for what is no base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("audio must be base64") from error


def from_pcm16(data: bytes) -> Samples:
    """[n] float32 of 2 n bytes."""
    return np.frombuffer(data, dtype="<i2").astype(np.float32) / np.float32(32768)


def to_pcm16(samples: Samples) -> bytes:
    return (np.clip(samples, -1.0, 1.0) * 32767).round().astype("<i2").tobytes()


class Resampler:
    """A stream of samples from one rate to another; equal rates pass through."""

    def __init__(self, rate: int, target: int) -> None:
        self._stream: Any = None if rate == target else soxr.ResampleStream(rate, target, 1, dtype="float32")

    def push(self, samples: Samples, last: bool = False) -> Samples:
        return samples if self._stream is None else self._stream.resample_chunk(samples, last=last)


class Input:
    """What a client sends, as 16 kHz samples."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.rate = RATES[kind]
        self._rest = b""
        self._resampler = Resampler(self.rate, HEARD_RATE)

    def push(self, data: bytes) -> Samples:
        """Samples [n]; may be none, since the resampler holds a little back."""
        data = self._rest + data
        whole = len(data) - len(data) % BYTES[self.kind]
        data, self._rest = data[:whole], data[whole:]
        samples = from_pcm16(data) if self.kind == "audio/pcm" else g711.decode(data, _LAWS[self.kind])
        return self._resampler.push(samples)

    def flush(self) -> Samples:
        """What was held back; the stream begins anew."""
        left = self._resampler.push(np.zeros(0, dtype=np.float32), last=True)
        self._rest, self._resampler = b"", Resampler(self.rate, HEARD_RATE)
        return left


class Output:
    """Samples of a reply as the client wants them: base64 text."""

    def __init__(self, kind: str, rate: int) -> None:
        self.kind = kind
        self.rate = RATES[kind]
        self._resampler = Resampler(rate, self.rate)

    def push(self, samples: Samples, last: bool = False) -> bytes:
        samples = self._resampler.push(samples, last)
        return to_pcm16(samples) if self.kind == "audio/pcm" else g711.encode(samples, _LAWS[self.kind])

    def seconds(self, data: bytes) -> float:
        return len(data) / BYTES[self.kind] / self.rate
