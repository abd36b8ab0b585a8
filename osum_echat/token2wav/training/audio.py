"""How the trainings read audio: mono, at the tokenizer's or the vocoder's rate."""

from __future__ import annotations

import numpy as np
import soxr

from osum_echat.audio import io
from osum_echat.token2wav.config import SAMPLE_RATE
from osum_echat.token2wav.training.records import Utterance


def load_16k(utterance: Utterance) -> np.ndarray:
    """Samples at 16 kHz, [n] float32 in -1 .. 1."""
    return np.asarray(io.to_mono_16k(io.read(utterance.wav)), dtype=np.float32)


def load_22k(utterance: Utterance) -> np.ndarray:
    """Samples at 22.05 kHz, [n] float32."""
    audio = io.read(utterance.wav)
    mono = np.asarray(audio.samples, dtype=np.float32).mean(0)
    if audio.rate != SAMPLE_RATE:
        mono = soxr.resample(mono, audio.rate, SAMPLE_RATE, quality="HQ")
    return mono.astype(np.float32)
