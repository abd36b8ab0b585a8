"""Who speaks: GE2E speaker embeddings (Resemblyzer's published weights), clusters of them, and pitch.

People's recordings come without names. Clips whose embeddings are near are taken for one speaker, so that a cluster, not a clip, goes into the training, the
choice or the report set. A gender is believed only where pitch and embedding agree.

Source of the network: Wan et al. 2018 (arXiv 1710.10467); weights and settings of resemble-ai/Resemblyzer 0.1.4 (Apache-2.0), read as data: 40 mel powers of
25 ms windows every 10 ms, windows of 1.6 s, three LSTM layers of 256, the mean over windows.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from osum_echat.audio.features import mel_filter_bank
from recipes.mini.packages import Package

PACKAGE = Package(
    "pip",
    "Resemblyzer",
    "0.1.4",
    "Resemblyzer-0.1.4-py3-none-any.whl",
    "8f12eb2f1a9982d32e8db7856de754709b59c93a77bcf0ff536584b619a9dd1f",
)
RATE = 16_000
MELS, WINDOW, STEP = 40, 160, 80  # frames of 10 ms
LEVEL = 10 ** (-30 / 20)  # of the samples, root mean square

Samples = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float32]


class SpeakerNet(nn.Module):
    """The embedding network: [B, 160, 40] mel powers to [B, 256] of length 1."""

    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(MELS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        self.register_buffer("filters", torch.from_numpy(mel_filter_bank(RATE, 400, MELS, RATE / 2)).float(), persistent=False)

    @classmethod
    def load(cls, folder: Path) -> SpeakerNet:
        """The published network. ``folder``: where its package is, or is to be downloaded. Raises ValueError (see `Package.fetch`)."""
        with zipfile.ZipFile(PACKAGE.fetch(folder)) as archive:
            data = archive.read("resemblyzer/pretrained.pt")
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)["model_state"]
        net = cls()
        net.load_state_dict({name: tensor for name, tensor in state.items() if name.startswith(("lstm.", "linear."))})
        return net.eval()

    def forward(self, mels_BTM: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mels_BTM)
        return nn.functional.normalize(torch.relu(self.linear(hidden[-1])), dim=1)

    @torch.no_grad()
    def embed(self, samples: Samples) -> npt.NDArray[np.float32]:
        """[n] samples at 16 kHz to [256]. Silence is cut away first."""
        x = torch.from_numpy(speech_only(samples))
        x = x * (LEVEL / (x.square().mean().sqrt() + 1e-9))
        missing = WINDOW * 160 - len(x)
        if missing > 0:
            x = nn.functional.pad(x, (0, missing))
        spectrum = torch.stft(x, 400, 160, window=torch.hann_window(400), center=True, pad_mode="constant", return_complex=True)
        mels_TM = spectrum.abs().square().T @ self.filters
        starts = range(0, max(1, len(mels_TM) - WINDOW + 1), STEP)
        windows = torch.stack([mels_TM[s : s + WINDOW] for s in starts])
        return np.asarray(nn.functional.normalize(self(windows).mean(0), dim=0).numpy(), dtype=np.float32)


def speech_only(samples: Samples, below: float = 35.0) -> Samples:
    """Without the stretches that are ``below`` dB under the loudest 30 ms; everything when too little would be left."""
    size = RATE * 30 // 1000
    count = len(samples) // size
    if count < 10:
        return samples
    frames = samples[: count * size].reshape(count, size)
    level = 10 * np.log10((frames**2).mean(axis=1) + 1e-12)
    loud = level > np.percentile(level, 97) - below
    loud = np.convolve(loud, np.ones(7), "same") > 0  # 90 ms around speech
    kept = frames[loud].reshape(-1)
    return kept if len(kept) > RATE // 2 else samples


def clusters(embeddings_ND: Matrix, nearest: float) -> list[int]:
    """Average-linkage clusters: two are joined while the mean cosine similarity between them is above ``nearest``. A number for each row."""
    n = len(embeddings_ND)
    similarity = (embeddings_ND @ embeddings_ND.T).astype(np.float32)
    np.fill_diagonal(similarity, -2.0)
    sizes = np.ones(n, np.float32)
    member_of = np.arange(n)
    best = similarity.argmax(axis=1)
    values = similarity[np.arange(n), best]
    while True:
        a = int(values.argmax())
        if values[a] <= nearest:
            break
        b = int(best[a])
        row = (similarity[a] * sizes[a] + similarity[b] * sizes[b]) / (sizes[a] + sizes[b])
        row[[a, b]] = -2.0
        row[sizes == 0] = -2.0
        sizes[a] += sizes[b]
        sizes[b] = 0
        member_of[member_of == b] = a
        similarity[a], similarity[:, a] = row, row
        similarity[b], similarity[:, b] = -2.0, -2.0
        values[b] = -2.0
        stale = np.flatnonzero((best == a) | (best == b))
        for i in {a, *stale.tolist()} - {b}:
            best[i] = similarity[i].argmax()
            values[i] = similarity[i, best[i]]
        nearer = np.flatnonzero(row > values)
        best[nearer], values[nearer] = a, row[nearer]
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(member_of.tolist()))}
    return [numbers[cluster] for cluster in member_of.tolist()]


def pitch(samples: Samples) -> float:
    """Median pitch of the voiced frames in Hz, by autocorrelation between 70 and 400 Hz; 0 when there are hardly any."""
    size, hop = RATE * 40 // 1000, RATE * 10 // 1000
    x = speech_only(samples)
    if len(x) < 10 * size:
        x = np.pad(x, (0, max(0, 10 * size - len(x))))
    frames = np.lib.stride_tricks.sliding_window_view(x, size)[::hop] * np.hanning(size)
    spectrum = np.abs(np.fft.rfft(frames, 2 * size, axis=1)) ** 2
    spectrum[:, : 60 * 2 * size // RATE] = 0
    auto = np.fft.irfft(spectrum, axis=1)
    window = np.fft.irfft(np.abs(np.fft.rfft(np.hanning(size), 2 * size)) ** 2)
    low, high = RATE // 400, RATE // 70
    shape = auto[:, low:high] / (auto[:, :1] + 1e-12) / (window[low:high] / window[0])
    loud = auto[:, 0] > 0.1 * np.percentile(auto[:, 0], 95)
    strength = shape.max(axis=1)
    peak = np.pad((shape[:, 1:-1] >= shape[:, :-2]) & (shape[:, 1:-1] >= shape[:, 2:]), ((0, 0), (1, 1)))
    lag = (peak & (shape >= 0.85 * strength[:, None])).argmax(axis=1)  # the first high peak: twice its lag is as high
    voiced = loud & (strength > 0.6) & peak.any(axis=1)
    if voiced.sum() < 8:
        return 0.0
    return float(np.median(RATE / (lag[voiced] + low)))
