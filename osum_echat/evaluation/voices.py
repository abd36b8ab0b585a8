"""Speaker similarity: the cosine of two recordings' speaker vectors.

Two networks, since the first is the one by which token2wav itself is told whose voice to use: ``similarity`` is the
checkpoint's own (``campplus.onnx``; any ONNX network of that contract, such as WeSpeaker's and 3D-Speaker's, can take
its place), ``similarity_ge2e`` is the GE2E network whose weights the package ``resemblyzer`` carries. Published
SEED-TTS numbers use WavLM-large, which is neither; compare like with like.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from osum_echat.audio import features
from osum_echat.audio.io import Samples
from osum_echat.device.onnx import session_options

log = logging.getLogger(__name__)


class SpeakerNet(Protocol):
    """Compares voices of samples [n] at 16 kHz."""

    def similarity(self, one: Samples, other: Samples) -> float: ...


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0))


class OnnxNet:
    """A network of campplus's contract: mean-normalised Kaldi filter banks [1, frames, 80] in, one vector out."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        if not path.is_file():
            raise ValueError(f"speaker network not found: {path}")
        options = session_options()
        self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def vector(self, samples: Samples) -> Tensor:
        fbank_TF = features.kaldi_fbank(torch.from_numpy(np.ascontiguousarray(samples)))
        centred = (fbank_TF - fbank_TF.mean(dim=0, keepdim=True))[None].numpy()
        (vector, *_) = self._session.run(None, {self._session.get_inputs()[0].name: centred})
        return torch.from_numpy(np.asarray(vector, dtype=np.float32))

    def similarity(self, one: Samples, other: Samples) -> float:
        return cosine(self.vector(one), self.vector(other))


class Ge2eNet:
    """The GE2E speaker encoder (Wan et al. 2018): 3 LSTM layers of 256 over 40 mel bands, mean of windows of 1.6 s.

    Built here and filled with the weights that resemblyzer 0.1.4 carries (its own code needs a compiled voice
    detector); volume is raised to -30 dBFS as there, pauses are left in.
    """

    WINDOW, STEP, BANDS, LEVEL = 160, 80, 40, -30.0

    def __init__(self, weights: Path) -> None:
        state = torch.load(weights, map_location="cpu", weights_only=True)["model_state"]
        self._lstm = torch.nn.LSTM(self.BANDS, 256, 3, batch_first=True)
        self._linear = torch.nn.Linear(256, 256)
        for name, module in (("lstm", self._lstm), ("linear", self._linear)):
            module.load_state_dict({k.partition(".")[2]: v for k, v in state.items() if k.startswith(f"{name}.")})
        filters = features.mel_filter_bank(features.SAMPLE_RATE, features.N_FFT, self.BANDS, features.SAMPLE_RATE / 2)
        self._filters = torch.from_numpy(filters).float()

    @torch.inference_mode()
    def vector(self, samples: Samples) -> Tensor:
        mel_TF = self._mel(torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32)))
        short = max(0, self.WINDOW - len(mel_TF))
        windows_NTF = torch.nn.functional.pad(mel_TF, (0, 0, 0, short)).unfold(0, self.WINDOW, self.STEP).transpose(1, 2)
        _, (hidden, _) = self._lstm(windows_NTF)
        each = torch.nn.functional.normalize(torch.relu(self._linear(hidden[-1])), dim=1)
        return torch.nn.functional.normalize(each.mean(dim=0), dim=0)

    def _mel(self, samples: Tensor) -> Tensor:
        """Power mel spectrogram [frames, bands], no logarithm."""
        level = 20 * torch.log10(samples.pow(2).mean().sqrt().clamp(min=1e-7))
        samples = samples * 10 ** (max(0.0, self.LEVEL - float(level)) / 20)
        window = torch.hann_window(features.N_FFT)
        spectrum = torch.stft(samples, features.N_FFT, features.HOP, window=window, pad_mode="constant", return_complex=True)
        return spectrum.abs().pow(2).T @ self._filters

    def similarity(self, one: Samples, other: Samples) -> float:
        return cosine(self.vector(one), self.vector(other))


def find_nets(given: str | None, token2wav: str | None) -> dict[str, SpeakerNet]:
    """The networks that can be had, by the name of their measure; a missing one is said. Raises ValueError for a given
    one that is not there."""
    nets: dict[str, SpeakerNet] = {}
    own = Path(token2wav) / "campplus.onnx" if token2wav else None
    if given is not None:
        nets["similarity"] = OnnxNet(Path(given))
    elif own is not None and own.is_file():
        nets["similarity"] = OnnxNet(own)
    else:
        log.warning("no speaker network: give speaker_net=FILE.onnx, or a checkpoint whose token2wav folder has campplus.onnx")
    package = importlib.util.find_spec("resemblyzer")
    weights = Path(package.origin).with_name("pretrained.pt") if package is not None and package.origin else None
    if weights is not None and weights.is_file():
        nets["similarity_ge2e"] = Ge2eNet(weights)
    else:
        log.warning("no second speaker network: pip install --no-deps resemblyzer==0.1.4 brings its weights")
    return nets
