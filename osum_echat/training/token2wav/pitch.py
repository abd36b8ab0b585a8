"""Fundamental frequency per mel frame, the target of the vocoder's pitch predictor.

The autocorrelation method of Boersma (1993, "Accurate short-term analysis of the fundamental frequency..."; Praat's
default): the autocorrelation of each windowed frame divided by that of the window, some candidates per frame, and the
cheapest path through them. Good for clean recordings, which training wants anyway; no package needed.

Shapes: T frames, W samples of a window, L lags, K candidates of a frame.
"""

from __future__ import annotations

import numpy as np

from osum_echat.token2wav.config import MEL_HOP, SAMPLE_RATE

FLOOR_HZ, CEILING_HZ = 70.0, 450.0
WINDOW = 1024  # three periods of the lowest pitch
CANDIDATES = 6
# Boersma's costs. The two transition costs are per 10 ms; a mel frame is 11.6 ms.
VOICING = 0.45
SILENCE = 0.03
OCTAVE = 0.02
OCTAVE_JUMP = 0.35 * 0.01 * SAMPLE_RATE / MEL_HOP
VOICING_CHANGE = 0.14 * 0.01 * SAMPLE_RATE / MEL_HOP


def fundamental(samples: np.ndarray, frames: int) -> np.ndarray:
    """F0 in Hz, [frames] float32, 0 where unvoiced. ``samples`` at 22.05 kHz; entry t belongs to the middle of mel
    frame t."""
    if frames == 0:
        return np.zeros(0, dtype=np.float32)
    windows_TW = _windows(samples.astype(np.float64), frames)
    hertz_TK, strength_TK = _candidates(windows_TW)
    peak_T = np.abs(windows_TW).max(1)
    loudness_T = peak_T / max(1e-9, float(peak_T.max()))
    unvoiced_T = VOICING + np.maximum(0.0, 2.0 - loudness_T / (SILENCE / (1 + VOICING)))
    return _cheapest_path(hertz_TK, strength_TK, unvoiced_T).astype(np.float32)


def _windows(x: np.ndarray, frames: int) -> np.ndarray:
    """Windowed frames without their mean, [T, W], centred in the middle of each hop."""
    side = WINDOW // 2
    padded = np.pad(x, (side, side + MEL_HOP))
    starts = np.minimum(np.arange(frames) * MEL_HOP + MEL_HOP // 2, len(padded) - WINDOW)
    windows = padded[starts[:, None] + np.arange(WINDOW)]
    return windows - windows.mean(1, keepdims=True)


def _autocorrelation(x_TW: np.ndarray) -> np.ndarray:
    power = np.abs(np.fft.rfft(x_TW, 2 * WINDOW)) ** 2
    return np.fft.irfft(power)[..., :WINDOW]


def _candidates(windows_TW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The strongest peaks of the normalised autocorrelation: their pitch in Hz and strength, [T, K] each (strength -1:
    none)."""
    hann = np.hanning(WINDOW)
    r_TL = _autocorrelation(windows_TW * hann)
    r_TL = r_TL / np.maximum(r_TL[:, :1], 1e-12) / (_autocorrelation(hann) / np.sum(hann**2))
    low, high = int(SAMPLE_RATE / CEILING_HZ), int(SAMPLE_RATE / FLOOR_HZ)
    before, at, after = r_TL[:, low - 1 : high - 1], r_TL[:, low:high], r_TL[:, low + 1 : high + 1]
    curve = 2 * at - before - after
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.where(curve > 1e-12, 0.5 * (after - before) / curve, 0.0).clip(-0.5, 0.5)
    lags = np.arange(low, high) + shift
    height = at + 0.25 * (after - before) * shift
    # A period is also a period twice as long: prefer the higher pitch of two that are equally strong.
    strength = np.minimum(height, 1.0) - OCTAVE * np.log2(FLOOR_HZ * lags / SAMPLE_RATE)
    strength = np.where((at > before) & (at >= after) & (height > 0.25), strength, -1.0)
    best = np.argsort(-strength, axis=1)[:, :CANDIDATES]
    return np.take_along_axis(SAMPLE_RATE / lags, best, 1), np.take_along_axis(strength, best, 1)


def _cheapest_path(hertz_TK: np.ndarray, strength_TK: np.ndarray, unvoiced_T: np.ndarray) -> np.ndarray:
    """Viterbi over the candidates of each frame and "unvoiced" (the last state): pitch per frame, [T]."""
    frames = len(hertz_TK)
    octaves_TK = np.log2(np.concatenate([hertz_TK, np.ones((frames, 1))], axis=1))
    voiced_K = np.arange(octaves_TK.shape[1]) < CANDIDATES
    both = voiced_K[:, None] & voiced_K[None]
    change = (voiced_K[:, None] != voiced_K[None]) * VOICING_CHANGE
    gains_TK = np.concatenate([np.where(strength_TK < 0, -1e3, strength_TK), unvoiced_T[:, None]], axis=1)
    best_K = gains_TK[0]
    came_TK = np.zeros(octaves_TK.shape, dtype=np.int64)
    for t in range(1, frames):
        jump = np.abs(octaves_TK[t - 1][:, None] - octaves_TK[t][None]) * OCTAVE_JUMP
        total = best_K[:, None] - np.where(both, jump, change)
        came_TK[t] = total.argmax(0)
        best_K = total.max(0) + gains_TK[t]
    state = int(best_K.argmax())
    out = np.zeros(frames)
    for t in range(frames - 1, -1, -1):
        out[t] = hertz_TK[t, state] if state < CANDIDATES else 0.0
        state = int(came_TK[t, state])
    return out
