"""What a frozen encoder returned for a recording, kept on disk: a training run goes over the same recordings many
times.

Found by content: the name of an entry is a hash of the features, the folder's name one of the encoder's weights and
layers, so an entry cannot be the wrong one, whatever the recording is called and whichever stage asks. With
augmentation no two features are alike and nothing is ever found; `EncoderCache.describe` shows it. Half precision on
disk, 77 kB a second for two layers of a tiny encoder.

N recordings, S encoder frames, E width.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from osum_echat.model.encoder import AudioEncoder


class EncoderCache:
    """Encoder layers by the content of the features.

    Args:
        folder: may be shared by runs and by processes on one machine.
        encoder: frozen; another one gets a sub-folder of its own.
        layers: which layers are kept (`AudioEncoder.forward`).
    """

    def __init__(self, folder: str | os.PathLike[str], encoder: AudioEncoder, layers: tuple[int, ...]) -> None:
        self.layers = layers
        self.folder = Path(folder) / f"{_fingerprint(encoder)}-{'-'.join(map(str, layers))}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.found = self.missed = 0

    @torch.no_grad()
    def __call__(self, encoder: AudioEncoder, feats_NTF: Tensor, lengths_N: Tensor) -> tuple[list[Tensor], Tensor]:
        """`AudioEncoder.forward`, with what is known already taken from disk. Not for training the encoder: there is no
        gradient."""
        names = [_name(feats_TF[:length]) for feats_TF, length in zip(feats_NTF.cpu(), lengths_N.tolist(), strict=True)]
        kept = [self._read(name) for name in names]
        new = [n for n, entry in enumerate(kept) if entry is None]
        self.found, self.missed = self.found + len(names) - len(new), self.missed + len(new)
        if new:
            longest = int(lengths_N[new].max())
            layers, frames_N = encoder(feats_NTF[new, :longest], lengths_N[new], self.layers)
            for row, n in enumerate(new):
                entry = torch.stack([layer[row, : int(frames_N[row])] for layer in layers]).half().cpu()
                self._write(names[n], entry)
                kept[n] = entry
        frames_N = (lengths_N + 1) // 2
        like = encoder.conv1.weight
        out = torch.zeros(len(self.layers), len(names), int(frames_N.max()), like.shape[0], dtype=like.dtype)
        for n, found in enumerate(kept):
            assert found is not None and found.shape[1] == int(frames_N[n]), f"entry {names[n]} has another length"
            out[:, n, : found.shape[1]] = found
        return list(out.to(like.device)), frames_N

    def describe(self) -> str:
        return f"{self.found} recordings found in {self.folder}, {self.missed} encoded"

    def _read(self, name: str) -> Tensor | None:
        path = self.folder / name[:2] / name
        return torch.from_numpy(np.load(path)) if path.exists() else None

    def _write(self, name: str, entry: Tensor) -> None:
        path = self.folder / name[:2] / name
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp.npy")
        np.save(temporary, entry.numpy())
        os.replace(temporary, path)


def _name(feats_TF: Tensor) -> str:
    return hashlib.blake2b(feats_TF.float().contiguous().numpy().tobytes(), digest_size=16).hexdigest() + ".npy"


def _fingerprint(module: nn.Module) -> str:
    """Of the weights; in half precision, so that storing an encoder in another type does not make it another
    encoder."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()
