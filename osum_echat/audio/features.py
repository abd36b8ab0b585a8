"""What networks hear: log-mel of Whisper's arithmetic, the vocoder's mel at 22.05 kHz, Kaldi's filter bank.

Speed decides here, since the loader computes features while training runs: framing is a view, the transform is one
batched real FFT (torch's; 6 times NumPy's for this size), the filter bank is computed once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SAMPLE_RATE = 16_000
N_FFT = 400  # 25 ms
HOP = 160  # 10 ms: 100 frames a second
REACH = N_FFT // 2  # how far the first and the last frame reach beyond a recording
_NATIVE_MELS = (80, 128)
DYNAMIC_RANGE = 8.0  # decades below the loudest bin of the utterance that are kept

VOCODER_RATE = 22_050
VOCODER_N_FFT = 1024
VOCODER_HOP = 256
VOCODER_MELS = 80
VOCODER_MAX_HZ = 8_000.0


def num_frames(samples: int) -> int:
    """Log-mel frames of so many samples at 16 kHz."""
    return samples // HOP


class LogMel:
    """Log-mel of 16 kHz samples: frames of 25 ms every 10 ms, power, slaney mels, log10, floor 8 decades below the
    maximum, (x + 4) / 4.

    Source: the published arithmetic of Whisper (openai/whisper, whisper/audio.py), without its padding to 30 s.

    ``native``: take a single recording through asrfront where it is installed: equal to 1e-6 in 99.8 % of
    the bins (1e-5 in the rest, where it is the nearer one to exact arithmetic), in a third of the time.
    """

    def __init__(self, num_mels: int = 80, native: bool = False) -> None:
        if num_mels < 1:
            raise ValueError(f"num_mels must be positive, found {num_mels}")
        self.num_mels = num_mels
        self._native = _asrfront() if native and num_mels in _NATIVE_MELS else None

    def __call__(self, samples: npt.NDArray[np.float32] | Tensor) -> Tensor:
        """[..., n] float samples -> [..., n // 160, num_mels] float32. Raises ValueError for less than 12.6 ms."""
        x = torch.as_tensor(samples, dtype=torch.float32)
        if x.shape[-1] <= REACH:
            raise ValueError(f"log-mel needs more than {REACH} samples, found {x.shape[-1]}")
        if self._native is not None and x.dim() == 1 and x.device.type == "cpu" and bool(x.isfinite().all()):
            log_mel_FT = self._native.log_mel(x.numpy(), n_mels=self.num_mels, pad_or_trim=False)
            return torch.from_numpy(np.ascontiguousarray(log_mel_FT.T))
        rows = x.reshape(-1, x.shape[-1])
        padded = torch.nn.functional.pad(rows[:, None], (REACH, REACH), mode="reflect")[:, 0]
        log = self._log(padded, num_frames(x.shape[-1]))
        log = torch.maximum(log, log.amax(dim=(1, 2), keepdim=True) - DYNAMIC_RANGE)
        return log.add_(4.0).div_(4.0).reshape(*x.shape[:-1], -1, self.num_mels)

    def of_reflected(self, samples_NS: Tensor, frames_N: Tensor, frames: int) -> Tensor:
        """Log-mels of recordings of different length: [N, frames, num_mels], 0 behind a recording's end.

        Args:
            samples_NS: float32 samples, each recording continued at both ends by the `REACH` samples that a reflection
                gives (`reflected`).
            frames_N: how many frames each has, at most ``frames``.
        """
        log = self._log(samples_NS, frames)
        behind_NT1 = (torch.arange(frames, device=log.device) >= frames_N[:, None])[..., None]
        loudest_N11 = log.masked_fill(behind_NT1, -torch.inf).amax(dim=(1, 2), keepdim=True)
        log = torch.maximum(log, loudest_N11 - DYNAMIC_RANGE)
        return log.add_(4.0).div_(4.0).masked_fill_(behind_NT1, 0.0)

    def _log(self, reflected_NS: Tensor, frames: int) -> Tensor:
        """Logarithm of the mels of so many frames. The last may reach beyond the recording."""
        frames_NTS = reflected_NS.unfold(-1, N_FFT, HOP)[:, :frames]
        power = _power(frames_NTS * _window(N_FFT, reflected_NS.device))
        mel = power @ _filters(SAMPLE_RATE, N_FFT, self.num_mels, SAMPLE_RATE / 2, reflected_NS.device)
        return mel.clamp_(min=1e-10).log10_()


def has_native(features: str) -> bool:
    """Whether log-mels go through asrfront where ``features`` asks for it: "torch", "asrfront" or "auto" (where it is
    installed).

    Raises:
        ValueError: it is asked for by name and is not installed.
    """
    if features == "asrfront" and _asrfront() is None:
        raise ValueError("features: asrfront needs the package: pip install 'osum-echat[fast-features]', or use features: auto")
    return features != "torch" and _asrfront() is not None


@functools.cache
def _asrfront() -> Any:
    """asrfront's Whisper front end (MIT; extra ``fast-features``), None where it is not installed."""
    if importlib.util.find_spec("asrfront") is None:
        return None
    return importlib.import_module("asrfront").whisper


def mel_22k(samples: npt.NDArray[np.float32] | Tensor) -> Tensor:
    """Mel of the flow model and the vocoder: [..., n] samples at 22.05 kHz -> [..., n // 256, 80], natural log of the
    magnitude mel.

    Raises ValueError for less than 385 samples.
    """
    x = torch.as_tensor(samples, dtype=torch.float32)
    pad = (VOCODER_N_FFT - VOCODER_HOP) // 2
    if x.shape[-1] <= pad:
        raise ValueError(f"the 22.05 kHz mel needs more than {pad} samples, found {x.shape[-1]}")
    rows = x.reshape(-1, 1, x.shape[-1])
    padded = torch.nn.functional.pad(rows, (pad, pad), mode="reflect")[:, 0]
    frames = padded.unfold(-1, VOCODER_N_FFT, VOCODER_HOP)
    magnitude = (_power(frames * _window(VOCODER_N_FFT, x.device)) + 1e-9).sqrt_()
    mel = magnitude @ _filters(VOCODER_RATE, VOCODER_N_FFT, VOCODER_MELS, VOCODER_MAX_HZ, x.device)
    return mel.clamp_(min=1e-5).log_().reshape(*x.shape[:-1], -1, VOCODER_MELS)


def kaldi_fbank(samples: npt.NDArray[np.float32] | Tensor, num_bins: int = 80) -> Tensor:
    """Kaldi's log filter bank of 16 kHz samples [n] in [-1, 1] (not 16-bit scale): [frames, num_bins], without dither.

    25 ms Povey windows every 10 ms, whole windows only: shorter audio gives no frame.
    """
    import kaldi_native_fbank

    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = SAMPLE_RATE
    options.frame_opts.dither = 0.0
    options.frame_opts.snip_edges = True
    options.mel_opts.num_bins = num_bins
    options.mel_opts.low_freq = 20.0
    options.mel_opts.high_freq = 8_000.0
    fbank = kaldi_native_fbank.OnlineFbank(options)
    fbank.accept_waveform(SAMPLE_RATE, np.ascontiguousarray(samples, dtype=np.float32))
    fbank.input_finished()
    frames = [fbank.get_frame(i) for i in range(fbank.num_frames_ready)]
    return torch.from_numpy(np.stack(frames)) if frames else torch.zeros(0, num_bins)


def mel_filter_bank(rate: int, n_fft: int, num_mels: int, max_hz: float) -> npt.NDArray[np.float64]:
    """Triangular filters on Slaney's mel scale, each of unit area in Hz: [n_fft // 2 + 1, num_mels]."""
    bins = np.linspace(0, rate / 2, n_fft // 2 + 1)
    edges = _mel_to_hz(np.linspace(0.0, float(_hz_to_mel(np.asarray(max_hz))), num_mels + 2))
    width = np.diff(edges)
    rising = (bins[:, None] - edges[None, :-2]) / width[:-1]
    falling = (edges[None, 2:] - bins[:, None]) / width[1:]
    return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (edges[2:] - edges[:-2]))


# Slaney's scale: linear below 1 kHz (15 mels), then a factor of 6.4 in 27 mels.
_LINEAR_HZ_PER_MEL = 200.0 / 3.0
_BREAK_HZ = 1000.0
_BREAK_MEL = _BREAK_HZ / _LINEAR_HZ_PER_MEL
_LOG_STEP = np.log(6.4) / 27.0


def _hz_to_mel(hz: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    above = _BREAK_MEL + np.log(np.maximum(hz, _BREAK_HZ) / _BREAK_HZ) / _LOG_STEP
    return np.where(hz >= _BREAK_HZ, above, hz / _LINEAR_HZ_PER_MEL)


def _mel_to_hz(mel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(mel >= _BREAK_MEL, _BREAK_HZ * np.exp(_LOG_STEP * (mel - _BREAK_MEL)), mel * _LINEAR_HZ_PER_MEL)


@functools.lru_cache(maxsize=8)
def _filters(rate: int, n_fft: int, num_mels: int, max_hz: float, device: torch.device) -> Tensor:
    return torch.from_numpy(mel_filter_bank(rate, n_fft, num_mels, max_hz)).to(torch.float32).to(device)


@functools.lru_cache(maxsize=8)
def _window(n_fft: int, device: torch.device) -> Tensor:
    return torch.hann_window(n_fft, periodic=True, dtype=torch.float32).to(device)


def _power(frames: Tensor) -> Tensor:
    """Squared magnitude of the real FFT over the last axis."""
    spectrum = torch.fft.rfft(frames)
    return spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
