"""Train the HiFT vocoder (log-mel to samples) and write its weights as ``hift.pt``.

    python -m osum_echat.training.token2wav.vocoder --config recipes/mini/conf/token2wav/vocoder.yaml [key=value ...]

Two phases in one run. First regression: multi-resolution STFT and log-mel distance to the recording. The sine source
makes that enough for intelligible speech, since it supplies the phases that a spectral distance says nothing about.
From step ``adversarial_from`` on, critics with feature matching (see `discriminators.py`) sharpen what regression
leaves smooth. Throughout, the network is excited by the recording's own pitch while its pitch predictor learns that
pitch beside it.
"""

from __future__ import annotations

import itertools
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from osum_echat.audio.features import mel_filter_bank
from osum_echat.token2wav.checkpoint import load_into, read_weights, vocoder_state
from osum_echat.token2wav.config import MEL_HOP, SAMPLE_RATE, VocoderConfig
from osum_echat.token2wav.vocoder import Vocoder
from osum_echat.training.token2wav.audio import load_22k
from osum_echat.training.token2wav.directory import describe
from osum_echat.training.token2wav.discriminators import CriticConfig, Critics, adversarial_loss, critic_loss, feature_loss
from osum_echat.training.token2wav.loop import command
from osum_echat.training.token2wav.pitch import fundamental
from osum_echat.training.token2wav.recipe import VALIDATED, Means, PartTraining, Recipe, adamw
from osum_echat.training.token2wav.records import Utterance
from osum_echat.training.token2wav.spectral import MelLoss, SpectralLoss

log = logging.getLogger(__name__)
SILENCE = math.log(1e-5)
MEL_N_FFT, MEL_MAX_HZ = 1024, 8000.0


@dataclass(kw_only=True)
class VocoderTraining(PartTraining):
    """The YAML file of this command."""

    target: Path = Path("exp/token2wav/model/hift.pt")
    init: Path | None = None  # a token2wav directory whose vocoder, of the same sizes, is trained on: for another voice
    model: VocoderConfig = field(default_factory=VocoderConfig)
    critics: CriticConfig = field(default_factory=CriticConfig)
    batch_size: int = 8
    segment_frames: int = 32
    adversarial_from: int = 2000
    spectral_weight: float = 10.0
    mel_weight: float = 10.0
    adversarial_weight: float = 1.0
    feature_weight: float = 2.0
    pitch_weight: float = 0.05  # L1 in Hz


@dataclass
class Clip:
    """One utterance at 22.05 kHz: samples [256 T] float32, log-mel [T, M] float16, f0 [T] in Hz."""

    samples_S: np.ndarray
    mel_TM: np.ndarray
    f0_T: np.ndarray


@dataclass
class VocoderBatch:
    """Segments as tensors, with the random start phases and noise of the sine source (H harmonics)."""

    samples_BS: Tensor
    mel_BMT: Tensor
    f0_BT: Tensor
    phase_BH: Tensor
    noise_BSH: Tensor


class VocoderRecipe(Recipe[VocoderTraining, Clip]):
    """Vocoder and critics, their losses, measures and export."""

    averaged: tuple[str, ...] = ("vocoder",)

    def __init__(self, cfg: VocoderTraining) -> None:
        super().__init__(cfg, by_length=False)  # crops
        self.vocoder = Vocoder(cfg.model)
        self.critics = Critics(cfg.critics)
        if cfg.init is None:
            self._start_near_speech()
        else:
            state, path = read_weights(cfg.init, "hift")
            load_into(self.vocoder, vocoder_state(state), str(path))
        self.modules = nn.ModuleDict({"vocoder": self.vocoder, "critics": self.critics}).to(self.device)
        self.optimizers = {
            "vocoder": adamw(self.vocoder.parameters(), cfg.optim),
            "critics": adamw(self.critics.parameters(), cfg.optim),
        }
        self.spectral_loss = SpectralLoss().to(self.device)
        self.mel_loss = MelLoss(self._filters(), MEL_N_FFT, MEL_HOP).to(self.device)

    def _start_near_speech(self) -> None:
        """Let the pitch predictor begin at 100 Hz with a range of tens of Hz (from its default, within 1 Hz of zero,
        the way is long), and harmonics that are aligned begin as the pulse train that they are meant to be, without
        random signs."""
        with torch.no_grad():
            self.vocoder.f0_predictor.classifier.weight.mul_(100.0)
            self.vocoder.f0_predictor.classifier.bias.fill_(100.0)
            if self.cfg.model.nsf_aligned:
                self.vocoder.m_source.l_linear.weight.fill_(0.1)

    def features(self, utterance: Utterance) -> Clip:
        samples, mel_TM = load_22k(utterance)
        return Clip(samples, mel_TM.numpy().astype(np.float16), fundamental(samples, len(mel_TM)))

    def _filters(self) -> Tensor:
        return torch.from_numpy(mel_filter_bank(SAMPLE_RATE, MEL_N_FFT, self.cfg.model.in_channels, MEL_MAX_HZ).T)

    def _crop(self, clip: Clip, rng: np.random.Generator) -> Clip:
        """A random segment; shorter clips are padded with silence."""
        frames = self.cfg.segment_frames
        missing = max(0, frames - len(clip.mel_TM))
        if missing:
            clip = Clip(
                np.pad(clip.samples_S, (0, missing * MEL_HOP)),
                np.pad(clip.mel_TM, ((0, missing), (0, 0)), constant_values=SILENCE),
                np.pad(clip.f0_T, (0, missing)),
            )
        start = int(rng.integers(len(clip.mel_TM) - frames + 1))
        part = slice(start, start + frames)
        return Clip(clip.samples_S[start * MEL_HOP : (start + frames) * MEL_HOP], clip.mel_TM[part], clip.f0_T[part])

    def _batch(self, clips: Sequence[Clip], rng: np.random.Generator) -> VocoderBatch:
        harmonics = self.cfg.model.nb_harmonics + 1
        samples_BS = np.stack([c.samples_S for c in clips])
        arrays = (
            samples_BS,
            np.stack([c.mel_TM for c in clips]).transpose(0, 2, 1).astype(np.float32),
            np.stack([c.f0_T for c in clips]),
            rng.uniform(-math.pi, math.pi, (len(clips), harmonics)).astype(np.float32),
            rng.standard_normal((*samples_BS.shape, harmonics), dtype=np.float32),
        )
        return VocoderBatch(*(torch.from_numpy(a).to(self.device) for a in arrays))

    def _speak(self, batch: VocoderBatch) -> Tensor:
        """Samples from the recording's mel and pitch. Source and inverse STFT stay float32: their phases need it."""
        source_B1S = self.vocoder.source(batch.f0_BT, batch.phase_BH, batch.noise_BSH)
        spectrum = self.vocoder.spectrum(source_B1S)
        with self.autocast():
            shaped = self.vocoder.shape(batch.mel_BMT, spectrum)
        return self.vocoder.to_wave(shaped.float(), spectrum)

    def train_step(self, step: int) -> dict[str, float]:
        rng = self.rng(step)
        clips = [self._crop(clip, rng) for clip in self.train.batch(self.batches(step))]
        batch = self._batch(clips, rng)
        made_BS = self._speak(batch)
        loss, parts = self._regression(batch, made_BS)
        if step >= self.cfg.adversarial_from:
            with self.autocast():
                judged_real, judged_made = self.critics(batch.samples_BS), self.critics(made_BS.detach())
            critics = critic_loss(judged_real, judged_made)
            parts["critics"] = float(critics.detach())
            self.update("critics", critics)
            self.critics.requires_grad_(False)
            with self.autocast():
                with torch.no_grad():
                    judged_real = self.critics(batch.samples_BS)
                judged_made = self.critics(made_BS)
            self.critics.requires_grad_(True)
            adversarial, matched = adversarial_loss(judged_made), feature_loss(judged_real, judged_made)
            loss = loss + self.cfg.adversarial_weight * adversarial + self.cfg.feature_weight * matched
            parts["adversarial"] = float(adversarial.detach())
            parts["features"] = float(matched.detach())
        parts["grad"] = self.update("vocoder", loss)
        return parts

    def _regression(self, batch: VocoderBatch, made_BS: Tensor) -> tuple[Tensor, dict[str, float]]:
        pitch = (self.vocoder.f0(batch.mel_BMT) - batch.f0_BT).abs().mean()
        spectral, mel = self.spectral_loss(made_BS, batch.samples_BS), self.mel_loss(made_BS, batch.samples_BS)
        loss = self.cfg.spectral_weight * spectral + self.cfg.mel_weight * mel + self.cfg.pitch_weight * pitch
        return loss, {"spectral": float(spectral.detach()), "mel": float(mel.detach()), "pitch": float(pitch.detach())}

    def _again(self, clip: Clip, number: int) -> tuple[VocoderBatch, Tensor, Tensor]:
        """A whole recording with the pitch that the network predicts itself: batch, pitch of the recording [1, T],
        samples made [1, S]."""
        batch = self._batch([clip], self.rng(0, number))
        truth_BT, batch.f0_BT = batch.f0_BT, self.vocoder.f0(batch.mel_BMT)
        return batch, truth_BT, self._speak(batch)

    def validate(self) -> dict[str, float]:
        """The regression losses over whole recordings with the pitch that the network predicts itself, and how often it
        errs on voicing."""
        means = Means()
        threshold = self.cfg.model.nsf_voiced_threshold
        for count, clip in self.held_out():
            batch, truth_BT, made_BS = self._again(clip, count)
            predicted_BT = batch.f0_BT
            voiced = (truth_BT > threshold) & (predicted_BT > threshold)
            found = {
                "mel": float(self.mel_loss(made_BS, batch.samples_BS)),
                "spectral": float(self.spectral_loss(made_BS, batch.samples_BS)),
                "voicing_error": float(((truth_BT > threshold) != (predicted_BT > threshold)).float().mean()),
                "pitch": float((truth_BT - predicted_BT).abs()[voiced].mean()) if bool(voiced.any()) else 0.0,
            }
            means.add(found)
        return means.values()

    def sounds(self) -> Iterator[tuple[Utterance, np.ndarray]]:
        for number, (utterance, clip) in enumerate(itertools.islice(self.valid.pairs(), VALIDATED), 1):
            _, _, made_BS = self._again(clip, number)
            yield utterance, made_BS[0].float().cpu().numpy()

    def export(self) -> list[Path]:
        """``hift.pt`` (a flat state dict with plain weights) and its part of ``cosyvoice.yaml``."""
        return [self.write_weights(self.vocoder), describe(self.cfg.target.parent, vocoder=self.cfg.model)]


def main(argv: list[str] | None = None) -> int:
    return command(VocoderTraining, VocoderRecipe, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
