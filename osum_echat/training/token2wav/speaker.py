"""Train the speaker net and write ``campplus.onnx`` (the released contract) and ``spk2info.pt`` (the mean embedding of
every voice).

    python -m osum_echat.training.token2wav.speaker --config recipes/mini/conf/token2wav/speaker.yaml [key=value ...]

A time-delay net with statistics pooling (x-vector, Snyder et al. 2018) that learns to tell the voices of the lists
apart by a cosine softmax with a margin (CosFace, arXiv 1801.09414). How well it does on voices that it never heard
depends on how many it did hear: name in ``data.voice_fields`` everything that makes a voice (speaker, age, ...).

Shapes: B batch, T fbank frames, F fbank bins, C channels, V voices.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from osum_echat.audio.features import kaldi_fbank
from osum_echat.run.files import write_atomically
from osum_echat.training.token2wav import onnx_export
from osum_echat.training.token2wav.loop import command
from osum_echat.training.token2wav.recipe import PartTraining, Recipe, adamw
from osum_echat.training.token2wav.records import Utterance

log = logging.getLogger(__name__)


@dataclass
class SpeakerConfig:
    """Sizes of the net. 80 bins in and 192 out are the released contract."""

    bins: int = 80
    channels: int = 96
    pooled: int = 192
    embedding: int = 192


@dataclass(kw_only=True)
class SpeakerTraining(PartTraining):
    """The YAML file of this command."""

    target: Path = Path("exp/token2wav/model/campplus.onnx")
    speakers: Path | None = Path("exp/token2wav/model/spk2info.pt")
    speaker_voices: list[str] | None = None  # voices to put there, those that the flow learns to speak; None: all
    model: SpeakerConfig = field(default_factory=SpeakerConfig)
    batch_size: int = 48
    crop_frames: int = 150
    margin: float = 0.1
    scale: float = 20.0
    export_half: bool = True


class SpeakerNet(nn.Module):
    """Fbank without its mean over time [B, T, 80] to an embedding [B, 192] (its length means nothing)."""

    def __init__(self, cfg: SpeakerConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = cfg.bins
        for kernel, dilation in ((5, 1), (3, 2), (3, 3), (1, 1)):
            channels = cfg.pooled if kernel == 1 else cfg.channels
            conv = nn.Conv1d(width, channels, kernel, dilation=dilation, padding=(kernel - 1) * dilation // 2)
            layers += [conv, nn.ReLU(), nn.BatchNorm1d(channels)]
            width = channels
        self.frames = nn.Sequential(*layers)
        self.embed = nn.Linear(2 * cfg.pooled, cfg.embedding)

    def forward(self, feats_BTF: Tensor) -> Tensor:
        x_BCT = self.frames(feats_BTF.transpose(1, 2))
        mean_BC = x_BCT.mean(2)
        deviation_BC = ((x_BCT - mean_BC[..., None]).square().mean(2) + 1e-5).sqrt()
        return self.embed(torch.cat([mean_BC, deviation_BC], dim=1))


class SpeakerRecipe(Recipe[SpeakerTraining, np.ndarray]):
    """The net, one direction per voice for training, measures and export."""

    averaged: tuple[str, ...] = ("net",)

    def __init__(self, cfg: SpeakerTraining) -> None:
        super().__init__(cfg, need=("voice",), by_length=False)  # crops
        self.net = SpeakerNet(cfg.model)
        self.directions = nn.Linear(cfg.model.embedding, len(self.voices), bias=False)
        self.modules = nn.ModuleDict({"net": self.net, "directions": self.directions}).to(self.device)
        self.optimizers = {"all": adamw(self.modules.parameters(), cfg.optim)}

    def prepare(self, train: list[Utterance]) -> None:
        self.voices = sorted({str(u.voice) for u in train})
        if len(self.voices) < 2:
            raise ValueError(f"a speaker net learns to tell voices apart, but the lists hold {len(self.voices)}: {self.voices}")
        unknown = set(self.cfg.speaker_voices or ()) - set(self.voices)
        if unknown:
            raise ValueError(
                f"speaker_voices names {sorted(unknown)}, of which there are no recordings; there are: {self.voices}"
            )
        log.info("%d voices: %s", len(self.voices), ", ".join(self.voices[:20]) + (" ..." if len(self.voices) > 20 else ""))

    def features(self, utterance: Utterance) -> np.ndarray:
        fbank_TF = kaldi_fbank(utterance.samples_16k()).numpy()
        if len(fbank_TF) < 10:
            raise ValueError("shorter than ten fbank frames")
        return fbank_TF.astype(np.float16)

    def _crop(self, fbank_TF: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A random part without its mean; what is too short is repeated."""
        frames = self.cfg.crop_frames
        if len(fbank_TF) < frames:
            fbank_TF = np.concatenate([fbank_TF] * -(-frames // len(fbank_TF)))
        start = int(rng.integers(len(fbank_TF) - frames + 1))
        part = fbank_TF[start : start + frames].astype(np.float32)
        return part - part.mean(0)

    def train_step(self, step: int) -> dict[str, float]:
        rng = self.rng(step)
        found = [(i, f) for i in self.batches(step) if (f := self.train.get(i)) is not None]
        if not found:
            raise RuntimeError(f"no utterance of this batch could be read: {self.train.skips}")
        feats_BTF = torch.from_numpy(np.stack([self._crop(f, rng) for _, f in found])).to(self.device)
        voices_B = self._voices([self.train.utterances[i] for i, _ in found])
        with self.autocast():
            embedding_BE = self.net(feats_BTF)
        cosine_BV = F.normalize(embedding_BE.float()) @ F.normalize(self.directions.weight).T
        logits_BV = cosine_BV - self.cfg.margin * F.one_hot(voices_B, len(self.voices))
        loss = F.cross_entropy(self.cfg.scale * logits_BV, voices_B)
        accuracy = float((cosine_BV.argmax(1) == voices_B).float().mean())
        return {
            "loss": float(loss.detach()),
            "accuracy": accuracy,
            "grad": self.update("all", loss),
        }

    def _voices(self, utterances: Sequence[Utterance]) -> Tensor:
        return torch.tensor([self.voices.index(str(u.voice)) for u in utterances], device=self.device)

    @torch.no_grad()
    def _embed(self, fbank_TF: np.ndarray) -> Tensor:
        feats_TF = fbank_TF.astype(np.float32)
        return self.net(torch.from_numpy(feats_TF - feats_TF.mean(0))[None].to(self.device))

    def validate(self) -> dict[str, float]:
        """Share of held-out recordings of known voices that are nearest to their own voice."""
        right = count = 0
        for index, utterance in enumerate(self.valid.utterances):
            fbank = self.valid.get(index)
            if fbank is not None and utterance.voice in self.voices:
                cosine_1V = F.normalize(self._embed(fbank)) @ F.normalize(self.directions.weight).T
                right += int(cosine_1V.argmax()) == self.voices.index(utterance.voice)
                count += 1
        return {"accuracy": right / count} if count else {}

    def export(self) -> list[Path]:
        """``campplus.onnx`` and, if asked for, ``spk2info.pt`` with the mean direction of up to 50 recordings of each
        voice."""
        net = self.net.eval()
        error = onnx_export.export_speaker(net, self.cfg.target, half=self.cfg.export_half)
        log.info("%s: relative difference to torch at most %.2g", self.cfg.target.name, error)
        if self.cfg.speakers is None:
            return [self.cfg.target]
        of_voice: dict[str, list[int]] = defaultdict(list)
        for index, utterance in enumerate(self.train.utterances):
            if self.cfg.speaker_voices is None or utterance.voice in self.cfg.speaker_voices:
                of_voice[str(utterance.voice)].append(index)
        info: dict[str, dict[str, Tensor]] = {}
        for voice, indices in of_voice.items():
            fbanks = itertools.islice((f for i in indices if (f := self.train.get(i)) is not None), 50)
            embeddings = [F.normalize(self._embed(f)) for f in fbanks]
            if embeddings:
                info[voice] = {"embedding": torch.stack(embeddings).mean(0).cpu()}
        write_atomically(self.cfg.speakers, lambda path: torch.save(info, path))
        return [self.cfg.target, self.cfg.speakers]


def main(argv: list[str] | None = None) -> int:
    return command(SpeakerTraining, SpeakerRecipe, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
