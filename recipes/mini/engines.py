"""Free speech synthesisers from Debian, in process: flite and espeak-ng by ctypes, festival by its command.

`flite` gives audio, words, phones and their end times from one call, some seventy times faster than real time; `espeak` brings many voice
variants. Packages: libflite1, libespeak-ng1, festival with festvox-us-slt-hts. Licences: flite and the festival voices are free software
of Carnegie Mellon (permissive); espeak-ng is GPL-3 as a program and ships nothing here.
"""

from __future__ import annotations

import ctypes as C
import functools
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]


@dataclass
class Spoken:
    """Speech of an engine at its own rate. Times are seconds at which a phone or word ends; the pause after a word belongs to it."""

    samples: Samples
    rate: int
    phones: list[tuple[str, float]] = field(default_factory=list)
    words: list[tuple[str, float]] = field(default_factory=list)


# flite ------------------------------------------------------------------------------------------------------------------------------


class _FliteWave(C.Structure):
    _fields_ = [
        ("type", C.c_char_p),
        ("sample_rate", C.c_int),
        ("num_samples", C.c_int),
        ("num_channels", C.c_int),
        ("samples", C.POINTER(C.c_short)),
    ]


class _FliteVoice(C.Structure):
    _fields_ = [("name", C.c_char_p), ("features", C.c_void_p)]


def _library(name: str) -> C.CDLL:
    try:
        return C.CDLL(name, mode=C.RTLD_GLOBAL)
    except OSError as error:
        raise ValueError(
            f"{name} is not installed; on Debian: apt-get install flite libflite1 espeak-ng libespeak-ng1"
        ) from error


class Flite:
    """The flite library with its voices; one object per process."""

    def __init__(self) -> None:
        self._flite = _library("libflite.so.1")
        for name in ("libflite_usenglish.so.1", "libflite_cmulex.so.1"):
            _library(name)
        signatures: dict[str, tuple[object, list[object]]] = {
            "flite_init": (C.c_int, []),
            "flite_synth_text": (C.c_void_p, [C.c_char_p, C.c_void_p]),
            "utt_wave": (C.POINTER(_FliteWave), [C.c_void_p]),
            "utt_relation": (C.c_void_p, [C.c_void_p, C.c_char_p]),
            "relation_head": (C.c_void_p, [C.c_void_p]),
            "item_next": (C.c_void_p, [C.c_void_p]),
            "item_feat_string": (C.c_char_p, [C.c_void_p, C.c_char_p]),
            "item_feat_float": (C.c_float, [C.c_void_p, C.c_char_p]),
            "path_to_item": (C.c_void_p, [C.c_void_p, C.c_char_p]),
            "delete_utterance": (None, [C.c_void_p]),
            "flite_feat_set_float": (None, [C.c_void_p, C.c_char_p, C.c_float]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self._flite, name)
            function.restype, function.argtypes = result, arguments
        self._flite.flite_init()
        self._voices: dict[str, int] = {}

    def _voice(self, name: str) -> int:
        if name not in self._voices:
            register = getattr(_library(f"libflite_cmu_us_{name}.so.1"), f"register_cmu_us_{name}")
            register.restype, register.argtypes = C.c_void_p, [C.c_char_p]
            self._voices[name] = register(None)
        return self._voices[name]

    def speak(self, text: str, voice: str, f0: float | None = None, spread: float | None = None, stretch: float = 1.0) -> Spoken:
        """Synthesise ``text`` (16 kHz). ``f0``, ``spread``: mean and standard deviation in Hz (rms ignores both); ``stretch`` > 1 is slower."""
        pointer = self._voice(voice)
        features = C.cast(pointer, C.POINTER(_FliteVoice)).contents.features
        for key, value in ((b"int_f0_target_mean", f0), (b"int_f0_target_stddev", spread), (b"duration_stretch", stretch)):
            if value is not None:
                self._flite.flite_feat_set_float(features, key, value)
        utterance = self._flite.flite_synth_text(text.encode("ascii", "ignore"), pointer)
        try:
            wave = self._flite.utt_wave(utterance).contents
            samples = np.ctypeslib.as_array(wave.samples, (wave.num_samples,)).astype(np.float32) / 32768
            phones, words = self._segments(utterance)
            return Spoken(samples, wave.sample_rate, phones, words)
        finally:
            self._flite.delete_utterance(utterance)

    def _segments(self, utterance: int) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
        phones: list[tuple[str, float]] = []
        words: list[tuple[str, float]] = []
        last: int | None = None
        item = self._flite.relation_head(self._flite.utt_relation(utterance, b"Segment"))
        while item:
            end = round(float(self._flite.item_feat_float(item, b"end")), 4)
            phones.append((self._flite.item_feat_string(item, b"name").decode(), end))
            word = self._flite.path_to_item(item, b"R:SylStructure.parent.parent")
            if word and word != last:
                words.append((self._flite.item_feat_string(word, b"name").decode(), end))
            elif words:  # a later phone of the word, or the pause after it
                words[-1] = (words[-1][0], end)
            last = word or last
            item = self._flite.item_next(item)
        return phones, words


@functools.cache
def flite() -> Flite:
    return Flite()


# espeak-ng --------------------------------------------------------------------------------------------------------------------------


class Espeak:
    """The espeak-ng library; one object per process (it keeps its voice and settings between calls)."""

    SYNCHRONOUS, UTF8, SSML = 0x02, 0x01, 0x10
    RATE, PITCH, RANGE = 1, 3, 4
    IPA = 0x02

    def __init__(self) -> None:
        self._espeak = _library("libespeak-ng.so.1")
        self.rate = self._espeak.espeak_Initialize(self.SYNCHRONOUS, 500, None, 0)
        if self.rate <= 0:
            raise ValueError("espeak-ng did not start; is its data installed (Debian package espeak-ng-data)?")
        self._chunks: list[npt.NDArray[np.int16]] = []
        callback = C.CFUNCTYPE(C.c_int, C.POINTER(C.c_short), C.c_int, C.c_void_p)
        self._callback = callback(self._collect)
        self._espeak.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples: object, count: int, _events: object) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())  # type: ignore[call-overload]
        return 0

    def speak(self, text: str, variant: str = "", pitch: int = 50, speed: int = 165, spread: int = 50) -> Spoken:
        """Synthesise ``text`` (22.05 kHz). ``pitch`` and ``spread`` 0..99, ``speed`` in words a minute."""
        name = f"en-us+{variant}" if variant else "en-us"
        if self._espeak.espeak_SetVoiceByName(name.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {name!r}; `espeak-ng --voices=variant` lists them")
        for parameter, value in ((self.RATE, speed), (self.PITCH, pitch), (self.RANGE, spread)):
            self._espeak.espeak_SetParameter(parameter, int(value), 0)
        self._chunks = []
        data = text.encode()
        self._espeak.espeak_Synth(data, C.c_size_t(len(data) + 1), 0, 1, 0, self.UTF8, None, None)
        self._espeak.espeak_Synchronize()
        samples = np.concatenate(self._chunks) if self._chunks else np.zeros(0, np.int16)
        return Spoken(samples.astype(np.float32) / 32768, self.rate)

    def phonemes(self, text: str, language: str) -> str:
        """``text`` in IPA, clause after clause."""
        if self._espeak.espeak_SetVoiceByName(language.encode()) != 0:
            raise ValueError(f"espeak-ng has no language {language!r}; `espeak-ng --voices` lists them")
        self._espeak.espeak_TextToPhonemes.restype = C.c_char_p
        pointer, clauses = C.c_char_p(text.encode()), []
        while pointer:  # moved to what is left; null at the end
            clauses.append(self._espeak.espeak_TextToPhonemes(C.byref(pointer), self.UTF8, self.IPA) or b"")
        return " ".join(clause.decode() for clause in clauses)


@functools.cache
def espeak() -> Espeak:
    return Espeak()


# Symbols that espeak-ng writes for sounds of other languages, as the nearest that Kokoro knows.
_NEAREST = (("\u02b2", "j"), ("r", "\u0279"), ("x", "k"), ("\u026c", "l"), ("\u0361", ""))


def phonemes(text: str, language: str = "en-us") -> str:
    """IPA of espeak-ng in the symbols that Kokoro was trained on."""
    found = espeak().phonemes(text, language)
    for symbol, nearest in _NEAREST:
        found = found.replace(symbol, nearest)
    return found


# festival ---------------------------------------------------------------------------------------------------------------------------


def festival(text: str, voice: str = "cmu_us_slt_arctic_hts") -> Spoken:
    """Synthesise with festival's command ``text2wave`` (about real time; for small sets only)."""
    import soundfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        subprocess.run(
            ["text2wave", "-eval", f"(voice_{voice})", "-o", str(path)], input=text.encode(), check=True, capture_output=True
        )
        samples, rate = soundfile.read(path, dtype="float32")
    return Spoken(samples, rate)
