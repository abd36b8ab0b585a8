"""How age, gender, emotion and sound events are made audible: documented signal rules, not acting.

| label | what is done to the speech |
|---|---|
| gender, age | the mean pitch and the formants of `BODIES`; children high and small, old people a little lower, slower, with tremor and breath |
| happy | higher, livelier, faster, brighter; the pitch bounces 2.6 times a second |
| sad | lower, monotone, slower, duller; the pitch sinks to the end |
| angry | faster, bright, hard (clipped) |
| surprised | the pitch rises through the second half |
| events | a generated laugh, cough, sneeze, applause or sigh before or after the speech |

The recogniser's log-mel takes the overall level away, so loudness is never a cue. The rules are kept soft enough for a recogniser to follow
(`python -m recipes.mini.check_speech` measures each cell): harsher ones train better tags on worse words. Pitch movements are made by
reading the samples at a varying speed, so they work alike for every voice.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import soxr

from recipes.mini import engines
from recipes.mini.texts import Labels

Samples = npt.NDArray[np.float32]

RATE = 16_000

# (age, gender): mean pitch in Hz, formants relative to an adult man
BODIES = {
    ("adult", "male"): (112.0, 1.0),
    ("adult", "female"): (196.0, 1.14),
    ("child", "male"): (252.0, 1.20),
    ("child", "female"): (322.0, 1.28),
    ("old", "male"): (104.0, 0.98),
    ("old", "female"): (178.0, 1.11),
}


@dataclass(frozen=True)
class Manner:
    """An emotion: factors on pitch, pitch spread and duration; spectral tilt > 0 is brighter, < 0 duller."""

    pitch: float = 1.0
    spread: float = 1.0
    duration: float = 1.0
    tilt: float = 0.0


MANNERS = {
    "neutral": Manner(),
    "happy": Manner(pitch=1.12, spread=1.6, duration=0.93, tilt=0.25),
    "sad": Manner(pitch=0.92, spread=0.35, duration=1.15, tilt=-0.45),
    "angry": Manner(pitch=1.0, spread=1.3, duration=0.94, tilt=0.3),
    "surprised": Manner(pitch=1.05, spread=1.5, duration=1.0),
}


@dataclass(frozen=True)
class Voice:
    """A synthetic speaker. ``pitch``: its own mean in Hz; ``formants``: relative to an adult man; ``fixed``: its pitch cannot be set."""

    engine: str
    variant: str
    pitch: float
    formants: float
    fixed: bool = False

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.variant or 'default'}"


VOICES = {
    voice.name: voice
    for voice in (
        Voice("flite", "slt", 174, 1.15),
        Voice("flite", "awb", 129, 1.0),
        Voice("flite", "kal16", 93, 1.0),
        Voice("flite", "rms", 104, 1.0, fixed=True),
        Voice("espeak", "", 103, 1.0),
        Voice("espeak", "m1", 97, 1.0),
        Voice("espeak", "m3", 107, 1.0),
        Voice("espeak", "m7", 111, 1.0),
        Voice("espeak", "klatt", 105, 1.0),
        Voice("espeak", "klatt2", 108, 1.0),
        Voice("espeak", "klatt4", 103, 1.0),
        Voice("espeak", "max", 106, 1.0),
        Voice("espeak", "Michael", 115, 1.0),
        Voice("espeak", "f1", 181, 1.1),
        Voice("espeak", "f2", 195, 1.15),
        Voice("espeak", "f4", 181, 1.15),
        Voice("espeak", "f5", 205, 1.17),
        Voice("espeak", "Annie", 232, 1.15),
        Voice("espeak", "steph", 185, 1.12),
        Voice("espeak", "belinda", 230, 1.15),
        Voice("espeak", "shelby", 180, 1.05),
    )
}


# Speech -----------------------------------------------------------------------------------------------------------------------------


def speak(text: str, voice: Voice, labels: Labels, rng: random.Random) -> Samples:
    """``text`` in ``voice`` said as ``labels`` (sound event included), 16 kHz mono, with short silences around it."""
    noise = np.random.default_rng(rng.getrandbits(32))
    manner = MANNERS[labels.emotion]

    def around(width: float) -> float:
        return rng.uniform(1 - width, 1 + width)

    pitch, formants = BODIES[labels.age, labels.gender]
    pitch *= manner.pitch * around(0.05)
    shift = formants / voice.formants * around(0.02)  # by resampling, which moves pitch and duration too
    duration = manner.duration * (1.1 if labels.age == "old" else 1.0) * around(0.05)
    speech = _engine(text, voice, pitch / shift, manner.spread, duration * shift)
    if abs(shift - 1) > 0.005:
        speech = _resample(speech, RATE * shift, RATE)
    speech = _move(speech, labels, rng)
    if labels.age == "old":
        speech = _breath(_tremor(speech, rng), noise)
    if manner.tilt:
        speech = _tilt(speech, manner.tilt)
    speech = speech * np.float32(0.07 / (speech.std() + 1e-6))
    if labels.emotion == "angry":
        speech = (np.tanh(speech * 11) * 0.09).astype(np.float32)

    def silence(low: float, high: float) -> Samples:
        return np.zeros(int(RATE * rng.uniform(low, high)), np.float32)

    parts = [silence(0.05, 0.15), speech * np.float32(around(0.2)), silence(0.1, 0.2)]
    if labels.event != "none":
        event = EVENT_SOUNDS[labels.event](rng, noise) * np.float32(around(0.2))
        parts = [*parts, event, silence(0.05, 0.1)] if rng.random() < 0.5 else [silence(0.02, 0.1), event, *parts]
    whole = np.concatenate(parts)
    whole += noise.standard_normal(len(whole), dtype=np.float32) * np.float32(rng.choice((0.0003, 0.0008, 0.0016)))
    return np.clip(whole, -1, 1)


def _engine(text: str, voice: Voice, pitch: float, spread: float, stretch: float) -> Samples:
    """Plain speech at 16 kHz with about this pitch (Hz), spread (factor) and duration (factor)."""
    if voice.engine == "flite":
        hertz = (0.1 * pitch if pitch < 170 else 0.12 * pitch) * spread
        spoken = engines.flite().speak(text, voice.variant, f0=pitch, spread=hertz, stretch=stretch)
    else:
        octaves = np.log2(pitch / voice.pitch)
        setting = 50 + octaves * (68 if octaves > 0 else 90)  # measured: pitch 0..99 spans about 1.3 octaves
        spoken = engines.espeak().speak(
            text,
            voice.variant,
            pitch=int(np.clip(setting, 0, 99)),
            speed=int(np.clip(172 / stretch, 80, 400)),
            spread=int(np.clip(45 * spread, 5, 99)),
        )
    trimmed = _trim(spoken.samples, spoken.rate)
    return trimmed if spoken.rate == RATE else _resample(trimmed, spoken.rate, RATE)


def _resample(samples: Samples, rate_in: float, rate_out: float) -> Samples:
    return np.asarray(soxr.resample(samples, rate_in, rate_out), dtype=np.float32)


def _trim(samples: Samples, rate: int) -> Samples:
    """Without the silence that engines put around speech."""
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max(initial=1e-6))
    if not len(loud):
        return samples
    margin = rate // 50
    return samples[max(0, loud[0] - margin) : loud[-1] + margin]


def _read_at(samples: Samples, speed: npt.NDArray[np.float64]) -> Samples:
    """Play ``samples`` at a varying speed (1 = as it is), reading between samples of a doubled rate."""
    position = np.cumsum(speed)
    position = position[position < len(samples) - 1]
    double = _resample(samples, RATE, 2 * RATE)
    return np.interp(2 * position, np.arange(len(double)), double).astype(np.float32)


def _move(speech: Samples, labels: Labels, rng: random.Random) -> Samples:
    """The pitch movement of an emotion."""
    count = len(speech)
    seconds = np.arange(count) / RATE
    if labels.emotion == "happy":
        bounce = 2 * np.pi * 2.6 * rng.uniform(0.9, 1.1) * seconds + rng.uniform(0, 2 * np.pi)
        return _read_at(speech, 1 + 0.065 * np.sin(bounce))
    if labels.emotion == "sad":
        return _read_at(speech, np.linspace(1.04, 0.9 * rng.uniform(0.98, 1.02), count))
    if labels.emotion == "surprised":
        second_half = np.clip((np.arange(count) / count - 0.45) / 0.55, 0, 1)
        return _read_at(speech, 0.98 + 0.22 * rng.uniform(0.9, 1.1) * second_half)
    return speech


def _tremor(speech: Samples, rng: random.Random) -> Samples:
    rate = 2 * np.pi * rng.uniform(5.0, 6.2)
    out = _read_at(speech, 1 + 0.022 * np.sin(rate * np.arange(len(speech)) / RATE))
    return (out * (1 + 0.18 * np.sin(rate * np.arange(len(out)) / RATE + 1))).astype(np.float32)


def _breath(speech: Samples, noise: np.random.Generator) -> Samples:
    """Noise that follows the loudness of the speech."""
    width = RATE // 100
    envelope = np.convolve(np.abs(speech), np.ones(width) / width, "same")
    hiss = _band(noise.standard_normal(len(speech)), 1500, 5000)
    return (speech + 0.12 * hiss * envelope).astype(np.float32)


def _tilt(speech: Samples, amount: float) -> Samples:
    """Brighter (first difference, amount > 0) or duller (its inverse)."""
    spectrum = np.fft.rfft(speech)
    turn = np.exp(-1j * np.linspace(0, np.pi, len(spectrum)))
    spectrum = spectrum * (1 - amount * turn) if amount > 0 else spectrum / (1 + amount * turn)
    out = np.fft.irfft(spectrum, len(speech))
    return (out * np.sqrt((speech**2).mean() / ((out**2).mean() + 1e-9))).astype(np.float32)


# Sound events -----------------------------------------------------------------------------------------------------------------------


def _band(samples: npt.NDArray[np.floating], low: float, high: float) -> npt.NDArray[np.float64]:
    """What lies between ``low`` and ``high`` Hz, with soft edges."""
    spectrum = np.fft.rfft(samples)
    hertz = np.fft.rfftfreq(len(samples), 1 / RATE)
    gate = 1 / (1 + (low / np.maximum(hertz, 1)) ** 4) / (1 + (hertz / high) ** 4)
    return np.fft.irfft(spectrum * gate, len(samples))


def _laugh(rng: random.Random, noise: np.random.Generator) -> Samples:
    """Four to six "ha" on a falling pitch."""
    pitch = rng.uniform(160, 320)
    parts = []
    for syllable in range(rng.choice((4, 5, 6))):
        count = int(RATE * 0.11)
        seconds = np.arange(count) / RATE
        f0 = pitch * (1 - 0.04 * syllable)
        voiced = np.zeros(count)
        for harmonic in range(1, 20):
            hertz = harmonic * f0
            vowel = np.exp(-(((hertz - 750) / 250) ** 2)) + 0.8 * np.exp(-(((hertz - 1250) / 300) ** 2)) + 0.1
            voiced += vowel / harmonic * np.sin(2 * np.pi * hertz * seconds)
        parts.append(np.hanning(count) * (0.35 * voiced + 0.02 * noise.standard_normal(count)))
        parts.append(0.008 * noise.standard_normal(int(RATE * 0.07)))
    return np.concatenate(parts).astype(np.float32)


def _cough(rng: random.Random, noise: np.random.Generator) -> Samples:
    """Two or three sudden bursts."""
    parts = []
    for _ in range(rng.choice((2, 3))):
        count = int(RATE * rng.uniform(0.16, 0.24))
        step = np.arange(count)
        envelope = np.exp(-step / (0.05 * RATE)) * (1 - np.exp(-step / 60))
        parts += [0.6 * envelope * np.convolve(noise.standard_normal(count), np.ones(5) / 5, "same"), np.zeros(int(RATE * 0.12))]
    return np.concatenate(parts).astype(np.float32)


def _sneeze(rng: random.Random, noise: np.random.Generator) -> Samples:
    """A rising breath, then a sharp hiss."""
    breath = _band(noise.standard_normal(int(RATE * rng.uniform(0.35, 0.5))), 900, 2200)
    hiss = _band(noise.standard_normal(int(RATE * rng.uniform(0.25, 0.35))), 2500, 7000)
    rise = np.linspace(0, 1, len(breath)) ** 2
    decay = np.exp(-np.arange(len(hiss)) / (0.09 * RATE))
    return np.concatenate([0.4 * rise * breath, np.zeros(RATE // 20), 0.8 * decay * hiss]).astype(np.float32)


def _applause(rng: random.Random, noise: np.random.Generator) -> Samples:
    """Some seventy claps in a second."""
    out = np.zeros(int(RATE * rng.uniform(0.9, 1.2)))
    for _ in range(70):
        at = rng.randrange(len(out) - 800)
        out[at : at + 800] += noise.standard_normal(800) * np.exp(-np.arange(800) / 120) * rng.uniform(0.2, 1)
    return (0.13 * out).astype(np.float32)


def _sigh(rng: random.Random, noise: np.random.Generator) -> Samples:
    """A breath that sinks from a bright to a dark vowel and dies away."""
    count = int(RATE * rng.uniform(0.8, 1.1))
    time = np.linspace(0, 1, count)
    raw = noise.standard_normal(count)
    sound = 0.35 * _band(raw, 350, 900) + 0.25 * (1 - time) * _band(raw, 1200, 2000)
    return (sound * np.minimum(1, 8 * time) * (1 - time) ** 0.7).astype(np.float32)


EVENT_SOUNDS = {"laugh": _laugh, "cough": _cough, "sneeze": _sneeze, "applause": _applause, "sigh": _sigh}


@cache
def training_voices() -> tuple[str, ...]:
    """Voices of training, each as often as it shall be drawn."""
    clear = {"default": 8, "f4": 8, "m3": 6, "klatt2": 6, "Michael": 6, "f2": 6, "m1": 4}
    shares = {"flite-slt": 36, "flite-awb": 36, "flite-rms": 14} | {
        f"espeak-{variant}": share for variant, share in clear.items()
    }
    names = []
    for name in VOICES:
        if name not in HELD_OUT_VOICES:
            names += [name] * shares.get(name, 2)
    return tuple(names)


HELD_OUT_VOICES = ("flite-kal16", "espeak-f5")
"""Never in training, nor in the choice of any setting: a speaker of another engine type and a female espeak-ng variant."""

REPLY_VOICE = "af_sarah"
"""The voice of Kokoro that answers; of twelve, the one that DNSMOS likes best (3.48; af_nova and am_michael 3.46, af_heart 3.31). Whisper base understands Kokoro's
every word, of flite's best voice (rms, which answered before) it mishears one in ten."""
REPLY_SPEED = 1.15
"""A little brisker than the voice is by itself: fewer speech tokens a reply."""


def allowed(voice: Voice, labels: Labels) -> bool:
    """A voice whose pitch cannot be set speaks only for the body it has."""
    return not voice.fixed or (labels.gender == "male" and labels.age != "child")
