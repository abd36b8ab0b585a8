"""Recordings as other microphones, rooms and lines would have given them; sounds behind and beside speech.

Each change is a documented signal rule with a drawn strength; `vary` draws some of them. Level alone is no change (the log-mel takes it away), but clipping
is. Words stay audible: the softest speech is 5 dB above its noise.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from recipes.mini import labels

Samples = npt.NDArray[np.float32]
RATE = 16_000


def speed(samples: Samples, factor: float) -> Samples:
    """Played ``factor`` times as fast; pitch and formants move with it, so factors stay within 0.9 to 1.1 where a gender is noted."""
    return np.asarray(soxr.resample(samples, RATE * factor, RATE), dtype=np.float32)


def room(samples: Samples, rng: random.Random) -> Samples:
    """A small room: direct sound, some early echoes, a tail of decaying noise (reverberation time 0.15 to 0.6 s). The length stays."""
    noise = np.random.default_rng(rng.getrandbits(32))
    time_60 = rng.uniform(0.15, 0.6)
    count = int(RATE * time_60)
    decay = np.exp(-6.9 * np.arange(count) / count)
    tail = noise.standard_normal(count) * decay
    tail[: RATE // 300] = 0
    tail *= rng.uniform(0.15, 0.6) / np.sqrt((tail**2).sum() + 1e-9)
    for _ in range(rng.randint(2, 6)):
        at = rng.randrange(RATE // 500, RATE // 40)
        if at < count:
            tail[at] += rng.uniform(-0.3, 0.3)
    tail[0] = 1.0
    size = 1 << (len(samples) + count).bit_length()  # a transform of a prime length takes ten times as long
    out = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(tail, size), size)[: len(samples)]
    return out.astype(np.float32)


def band(samples: Samples, rng: random.Random) -> Samples:
    """What a cheap microphone or a telephone lets through, with a tilted spectrum."""
    low, high = rng.choice(((300, 3400), (80, 7000), (150, 5500), (50, 4500), (200, 7600)))
    size = 1 << len(samples).bit_length()
    spectrum = np.fft.rfft(samples, size)
    hertz = np.fft.rfftfreq(size, 1 / RATE)
    gate = 1 / (1 + (low / np.maximum(hertz, 1)) ** 6) / (1 + (hertz / high) ** 8)
    tilt = (np.maximum(hertz, 100) / 1000) ** rng.uniform(-0.35, 0.35)
    return np.fft.irfft(spectrum * gate * tilt, size)[: len(samples)].astype(np.float32)


def codec(samples: Samples, rng: random.Random) -> Samples:
    """Through a lossy codec: Opus or Vorbis at a low rate, mp3, or 8-bit companded at 8 kHz as on a telephone."""
    kind = rng.choice(("opus", "vorbis", "telephone"))
    if kind == "telephone":
        narrow = soxr.resample(samples, RATE, RATE // 2)
        peak = np.abs(narrow).max(initial=1e-6)
        companded = np.round(127 * np.sign(narrow) * np.log1p(255 * np.abs(narrow) / peak) / np.log(256)) / 127
        narrow = np.sign(companded) * (256 ** np.abs(companded) - 1) / 255 * peak
        wide = np.asarray(soxr.resample(narrow, RATE // 2, RATE), dtype=np.float32)
        return np.pad(wide, (0, max(0, len(samples) - len(wide))))[: len(samples)]
    data = io.BytesIO()
    level = rng.uniform(0.9, 0.99)  # 1: the lowest rate
    soundfile.write(data, np.clip(samples, -1, 1), RATE, format="OGG", subtype=kind.upper(), compression_level=level)
    data.seek(0)
    out, _ = soundfile.read(data, dtype="float32")
    return np.pad(out, (0, max(0, len(samples) - len(out))))[: len(samples)]


def clip(samples: Samples, rng: random.Random) -> Samples:
    """Recorded too loud: the highest peaks are cut off."""
    limit = np.abs(samples).max(initial=1e-6) * rng.uniform(0.35, 0.8)
    return np.clip(samples, -limit, limit)


def hiss(samples: Samples, rng: random.Random) -> Samples:
    """Noise of a microphone: white to brown, 10 to 35 dB below the speech."""
    size = 1 << len(samples).bit_length()
    spectrum = np.fft.rfft(np.random.default_rng(rng.getrandbits(32)).standard_normal(size))
    spectrum *= np.maximum(np.fft.rfftfreq(size, 1 / RATE), 40) ** rng.uniform(-1.0, 0.0)
    return behind(samples, np.fft.irfft(spectrum, size)[: len(samples)].astype(np.float32), rng.uniform(10, 35))


def behind(speech: Samples, sound: Samples, decibels: float) -> Samples:
    """``sound``, repeated as needed, so many decibels below the speech (by mean power of the loud half of each)."""
    repeated = np.resize(sound, len(speech))
    gain = power(speech) / (power(repeated) + 1e-12) * 10 ** (-decibels / 10)
    return (speech + np.float32(np.sqrt(gain)) * repeated).astype(np.float32)


def power(samples: Samples) -> float:
    squares = samples.astype(np.float64) ** 2
    return float(np.mean(squares[squares >= np.median(squares)])) + 1e-12


def with_event(speech: Samples, event: Samples, rng: random.Random) -> Samples:
    """An event before or after the speech, overlapping it a little now and then, about as loud as it."""
    event = event * np.float32(np.sqrt(power(speech) / power(event)) * rng.uniform(0.5, 1.2))
    gap = int(RATE * rng.uniform(-0.15, 0.25))
    first, second = (event, speech) if rng.random() < 0.5 else (speech, event)
    if gap >= 0:
        return np.concatenate([first, np.zeros(gap, np.float32), second])
    out = np.zeros(max(len(first), len(first) + gap + len(second)), np.float32)
    out[: len(first)] += first
    start = max(0, len(first) + gap)
    out[start : start + len(second)] += second[: len(out) - start]
    return out


def draw_event(name: str, sneezes: Sequence[Samples], rng: random.Random) -> Samples:
    """The sound of an event: a recorded sneeze where there are some, else a generated one."""
    if name == "sneeze" and sneezes and rng.random() < 0.7:
        return trimmed(rng.choice(sneezes))[: 2 * RATE]
    return labels.EVENT_SOUNDS[name](rng, np.random.default_rng(rng.getrandbits(32)))


def trimmed(sound: Samples) -> Samples:
    """Without the quiet parts before and after (25 dB below the loudest)."""
    loud = np.flatnonzero(np.abs(sound) > 0.056 * np.abs(sound).max(initial=1e-6))
    return sound if not len(loud) else sound[max(0, loud[0] - 400) : loud[-1] + 400]


CHANGES: Mapping[str, tuple[float, Callable[[Samples, random.Random], Samples]]] = {
    "room": (0.35, room),
    "clip": (0.08, clip),
    "band": (0.35, band),
    "codec": (0.25, codec),
    "hiss": (0.4, hiss),
}
"""Probability and change, in the order in which they are made."""


def vary(samples: Samples, sounds: Sequence[Samples], rng: random.Random, widest: float = 0.1) -> Samples:
    """One drawn variant. ``sounds``: what may be behind the speech (5 to 25 dB below it); ``widest``: of the speed's change."""
    out = speed(samples, rng.uniform(1 - widest, 1 + widest))
    if sounds and rng.random() < 0.4:
        out = behind(out, rng.choice(sounds), rng.uniform(5, 25))
    for probability, change in CHANGES.values():
        if rng.random() < probability:
            out = change(out, rng)
    peak = float(np.abs(out).max(initial=1e-6))
    return (out * np.float32(rng.uniform(0.1, 0.9) / peak)).astype(np.float32)
