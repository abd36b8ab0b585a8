"""How flow and vocoder training read audio: mono, at the rate and with the mel of what they make."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from osum_echat.audio import features, io
from osum_echat.audio.resample import resample
from osum_echat.token2wav.config import MEL_HOP, SAMPLE_RATE
from osum_echat.training.token2wav.records import Utterance


def load_22k(utterance: Utterance) -> tuple[np.ndarray, Tensor]:
    """Samples at 22.05 kHz [256 T] float32 and log-mel [T, 80]; the samples that fill no mel frame are cut."""
    audio = io.read(utterance.wav, utterance.start, utterance.end)
    samples = resample(audio.mono(), audio.rate, SAMPLE_RATE)
    mel_TM = features.mel_22k(samples)
    return samples[: len(mel_TM) * MEL_HOP], mel_TM
