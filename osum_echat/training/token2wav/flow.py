"""Train the flow (speech tokens to log-mel) by conditional flow matching and write its weights as ``flow.pt``.

    python -m osum_echat.training.token2wav.flow --config recipes/mini/conf/token2wav/flow.yaml [key=value ...]

The optimal-transport path of Lipman et al. (arXiv 2210.02747) as in CosyVoice: x_t = (1 - (1 - s) t) z + t x with target velocity
x - (1 - s) z, conditions dropped together with probability ``model.solver.training_cfg_rate``. A part of the rows shows the model a prompt:
either the beginning of the recording, or another recording of the same voice joined before it, which is what it meets at inference.

Shapes: B batch, N tokens, T mel frames, M mel bins, S speaker embedding.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from osum_echat.audio import features as audio_features
from osum_echat.config import InputFile
from osum_echat.token2wav.config import FlowConfig, mel_frames
from osum_echat.token2wav.encoder import stretch_reply
from osum_echat.token2wav.estimator import Padding
from osum_echat.token2wav.flow import FlowModel
from osum_echat.training.token2wav import onnx_export
from osum_echat.training.token2wav.audio import load_22k
from osum_echat.training.token2wav.directory import describe
from osum_echat.training.token2wav.loop import command
from osum_echat.training.token2wav.recipe import Means, PartTraining, Recipe, adamw
from osum_echat.training.token2wav.records import Utterance, pad


@dataclass(kw_only=True)
class FlowTraining(PartTraining):
    """The YAML file of this command."""

    target: Path = Path("exp/token2wav/model/flow.pt")
    campplus: InputFile = Path("exp/token2wav/model/campplus.onnx")  # speaker embeddings
    tokenizer: InputFile | None = None  # for records without speech_token; None: such records are left out
    model: FlowConfig = field(default_factory=FlowConfig)
    prompt_share: float = 0.5  # of the rows show the mel of their beginning
    prompt_most: float = 0.3  # of a single recording at most
    joined_share: float = 0.3  # of the rows have another recording before them, half of these as the prompt
    prior_weight: float = 0.0  # squared distance between mel and regulated tokens; 0 as published, more converges sooner
    prior_steps: int = 0  # at the start, only that distance: it needs the encoder alone, a tenth of the cost of a step

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior_steps and not self.prior_weight:
            raise ValueError("prior_steps needs a prior_weight above 0: what only the start trained would be forgotten")


@dataclass
class Spoken:
    """One utterance: tokens [N], log-mel [mel_frames(N), M] float16, speaker embedding [S]."""

    tokens_N: np.ndarray
    mel_TM: np.ndarray
    embedding_S: np.ndarray


@dataclass
class Row:
    """One row of a batch: recordings to join (the last is the reply) and how many mel frames are shown as the prompt."""

    parts: list[Spoken]
    prompt_frames: int

    @property
    def mel_TM(self) -> np.ndarray:
        return np.concatenate([p.mel_TM for p in self.parts])


@dataclass
class FlowBatch:
    """Rows as tensors: log-mel, its lengths, the mel that is shown as the prompt, and the prompt's voice."""

    rows: list[Row]
    mel_BTM: Tensor
    lengths_B: Tensor
    cond_BTM: Tensor
    embedding_BS: Tensor


class FlowRecipe(Recipe[FlowTraining, Spoken]):
    """The flow, its loss, measures and export."""

    averaged: tuple[str, ...] = ("flow",)

    def __init__(self, cfg: FlowTraining) -> None:
        super().__init__(cfg, need=() if cfg.tokenizer is not None else ("tokens",))
        self._campplus = onnx_export.session(_existing(cfg.campplus, "campplus", "train it first: ...training.speaker"))
        self._tokenizer = None
        if cfg.tokenizer is not None:
            self._tokenizer = onnx_export.session(_existing(cfg.tokenizer, "tokenizer", "train it first: ...training.tokenizer"))
        self.same_voice: dict[str | None, list[int]] = defaultdict(list)
        for index, utterance in enumerate(self.train.utterances):
            self.same_voice[utterance.voice].append(index)
        self.flow = FlowModel(cfg.model)
        self._start_at_mean_mel()
        self.modules = nn.ModuleDict({"flow": self.flow}).to(self.device)
        self.optimizers = {"flow": adamw(self.flow.parameters(), cfg.optim)}

    def _start_at_mean_mel(self) -> None:
        """The log-mel is not normalised: let the first velocity be its mean, so that no step is spent on finding it."""
        mels = [item.mel_TM.astype(np.float32) for item in itertools.islice(self.valid, 16)]
        if not mels:
            raise ValueError(f"none of the first held-out records can be used: {self.valid.skips}")
        mean_M = torch.from_numpy(np.concatenate(mels).mean(0))
        last = self.flow.length_regulator.model[-1]
        assert isinstance(last, nn.Conv1d) and last.bias is not None
        bias = self.flow.decoder.estimator.final_proj.bias
        assert bias is not None
        with torch.no_grad():
            bias.copy_(mean_M)
            if self.cfg.prior_weight:
                last.bias.copy_(mean_M)

    def features(self, utterance: Utterance) -> Spoken:
        samples_16k = utterance.samples_16k()
        tokens_N = np.array(utterance.tokens, dtype=np.int64)
        if not len(tokens_N):
            tokens_N = self._tokens(samples_16k)
        if len(tokens_N) == 0 or tokens_N.min() < 0 or tokens_N.max() >= self.cfg.model.vocab_size:
            raise ValueError(f"speech tokens must be some ids in 0 .. {self.cfg.model.vocab_size - 1}")
        mel_TM = load_22k(utterance)[1].numpy()
        frames = mel_frames(len(tokens_N), self.cfg.model.input_frame_rate)
        if abs(frames - len(mel_TM)) > 16:
            raise ValueError(f"{len(tokens_N)} speech tokens stand for {frames} mel frames, the audio has {len(mel_TM)}")
        mel_TM = np.pad(mel_TM[:frames], ((0, max(0, frames - len(mel_TM))), (0, 0)), mode="edge")
        return Spoken(tokens_N, mel_TM.astype(np.float16), self._embedding(samples_16k))

    def _tokens(self, samples_16k: np.ndarray) -> np.ndarray:
        assert self._tokenizer is not None, "records without tokens are left out when there is no tokenizer"
        feats, lengths = self._tokenizer.get_inputs()
        mel_MT = audio_features.LogMel(int(feats.shape[1]))(samples_16k).numpy().T
        found = self._tokenizer.run(None, {feats.name: mel_MT[None], lengths.name: np.array([mel_MT.shape[1]], dtype=np.int32)})
        return np.asarray(found[0]).reshape(-1).astype(np.int64)

    def _embedding(self, samples_16k: np.ndarray) -> np.ndarray:
        fbank_TF = audio_features.kaldi_fbank(samples_16k)
        centred_TF = (fbank_TF - fbank_TF.mean(0, keepdim=True)).numpy()
        return self._campplus.run(None, {self._campplus.get_inputs()[0].name: centred_TF[None]})[0].reshape(-1).astype(np.float32)

    # -- batches -------------------------------------------------------------------------------------------------------------

    def _rows(self, indices: Sequence[int], rng: np.random.Generator) -> list[Row]:
        rows = []
        for index in indices:
            spoken = self.train.get(index)
            if spoken is None:
                continue
            kind, where = rng.random(2)
            same = self.same_voice[self.train.utterances[index].voice]
            choice = same[int(rng.integers(len(same)))]
            other = self.train.get(choice) if kind < self.cfg.joined_share else None
            if other is not None:
                rows.append(Row([other, spoken], len(other.mel_TM) if where < 0.5 else 0))
            else:
                shown = int(where * self.cfg.prompt_most * len(spoken.mel_TM)) if rng.random() < self.cfg.prompt_share else 0
                rows.append(Row([spoken], shown))
        if not rows:
            raise RuntimeError(f"no utterance of this batch could be read: {self.train.skips}")
        return rows

    def _batch(self, rows: list[Row]) -> FlowBatch:
        mel_BTM, lengths_B = pad([r.mel_TM.astype(np.float32) for r in rows], multiple=32)
        cond_BTM = np.zeros_like(mel_BTM)
        for row, mel_TM, cond_TM in zip(rows, mel_BTM, cond_BTM, strict=True):
            cond_TM[: row.prompt_frames] = mel_TM[: row.prompt_frames]
        embedding_BS = np.stack([r.parts[0].embedding_S for r in rows])  # of the prompt, as at inference
        arrays = (mel_BTM, lengths_B, cond_BTM, embedding_BS)
        return FlowBatch(rows, *(torch.from_numpy(a).to(self.device) for a in arrays))

    def _regulated(self, batch: FlowBatch) -> Tensor:
        """Tokens at mel rate [B, T, M]; the regulator's norms run over a whole row, so it takes one row at a time."""
        tokens = [np.concatenate([p.tokens_N for p in row.parts]) for row in batch.rows]
        tokens_BN, lengths_B = pad(tokens, multiple=16)
        mask_BN = torch.arange(tokens_BN.shape[1]) < torch.from_numpy(lengths_B)[:, None]
        h_BNM = self.flow.encode(torch.from_numpy(tokens_BN).to(self.device), mask_BN.to(self.device))
        mu_BTM = batch.mel_BTM.new_zeros(batch.mel_BTM.shape)
        for b, row in enumerate(batch.rows):
            start, stretched = 0, []
            for part in row.parts:
                stop = start + len(part.tokens_N)
                stretched.append(stretch_reply(h_BNM[b : b + 1, start:stop], self.cfg.model.input_frame_rate))
                start = stop
            mu_1TM = self.flow.length_regulator(torch.cat(stretched, dim=1))
            mu_BTM[b, : mu_1TM.shape[1]] = mu_1TM[0].to(mu_BTM.dtype)
        return mu_BTM

    # -- steps ---------------------------------------------------------------------------------------------------------------

    def train_step(self, step: int) -> dict[str, float]:
        rng = self.rng(step)
        batch = self._batch(self._rows(self.batches(step), rng))
        if step < self.cfg.prior_steps:
            loss, parts = self._prior_loss(batch)
        else:
            loss, parts = self._loss(batch, rng, self.cfg.model.solver.training_cfg_rate)
        return {**parts, "grad": self.update("flow", loss)}

    def _prior_loss(self, batch: FlowBatch) -> tuple[Tensor, dict[str, float]]:
        with self.autocast():
            mu_BTM = self._regulated(batch)
        loss = _masked_mean((mu_BTM - batch.mel_BTM).square(), Padding.of(batch.lengths_B, batch.mel_BTM.shape[1]))
        return loss, {"prior": float(loss.detach())}

    def _loss(self, batch: FlowBatch, rng: np.random.Generator, drop_rate: float) -> tuple[Tensor, dict[str, float]]:
        rows = len(batch.rows)
        noise_BTM = torch.from_numpy(rng.standard_normal(batch.mel_BTM.shape, dtype=np.float32)).to(self.device)
        t_B = torch.from_numpy(rng.random(rows)).float().to(self.device)
        if self.cfg.model.solver.t_scheduler == "cosine":
            t_B = 1 - torch.cos(t_B * 0.5 * math.pi)
        kept_B11 = torch.from_numpy(rng.random(rows) >= drop_rate).float().to(self.device)[:, None, None]
        keep = 1 - self.cfg.model.solver.sigma_min
        t_B11 = t_B[:, None, None]
        noisy_BTM = (1 - keep * t_B11) * noise_BTM + t_B11 * batch.mel_BTM
        padding = Padding.of(batch.lengths_B, batch.mel_BTM.shape[1])
        with self.autocast():
            mu_BTM = self._regulated(batch)
            spk_BM = self.flow.speaker(batch.embedding_BS)
            velocity_BTM = self.flow.decoder.estimator(
                noisy_BTM, mu_BTM * kept_B11, t_B, spk_BM * kept_B11[:, 0], batch.cond_BTM * kept_B11, padding
            ).float()
        flow_loss = _masked_mean((velocity_BTM - (batch.mel_BTM - keep * noise_BTM)).square(), padding)
        loss, parts = flow_loss, {"flow": float(flow_loss.detach())}
        if self.cfg.prior_weight:
            prior = _masked_mean((mu_BTM - batch.mel_BTM).square(), padding)
            loss = loss + self.cfg.prior_weight * prior
            parts["prior"] = float(prior.detach())
        return loss, parts

    def validate(self) -> dict[str, float]:
        """The loss without dropping, and the L1 distance between solved and true log-mel, over some held-out recordings."""
        means = Means()
        for count, spoken in self.held_out():
            rng = self.rng(0, count)
            batch = self._batch([Row([spoken], 0)])
            _, parts = self._loss(batch, rng, drop_rate=0.0)
            condition = self.flow.condition(
                torch.from_numpy(spoken.tokens_N).to(self.device),
                torch.zeros(0, dtype=torch.long, device=self.device),
                batch.mel_BTM.new_zeros(0, batch.mel_BTM.shape[-1]),
                self.flow.speaker(batch.embedding_BS)[0],
            )
            noise_TM = torch.from_numpy(rng.standard_normal(condition.mu_TM.shape, dtype=np.float32)).to(self.device)
            solved_TM = self.flow.solve([condition], [noise_TM])[0]
            distance = (solved_TM - batch.mel_BTM[0, : len(solved_TM)]).abs().mean()
            means.add({**parts, "solved_l1": float(distance)})
        return means.values()

    def export(self) -> list[Path]:
        """``flow.pt`` (a flat state dict) and its part of ``cosyvoice.yaml``."""
        return [self.write_weights(self.flow), describe(self.cfg.target.parent, flow=self.cfg.model)]


def _masked_mean(x_BTM: Tensor, padding: Padding | None) -> Tensor:
    """Mean over real frames and all bins."""
    if padding is None:
        return x_BTM.mean()
    return (x_BTM * padding.mask_BT1).sum() / (padding.mask_BT1.sum() * x_BTM.shape[-1])


def _existing(path: Path, name: str, remedy: str) -> Path:
    if not path.is_file():
        raise ValueError(f"{name}: {path} is not there; {remedy}")
    return path


def main(argv: list[str] | None = None) -> int:
    return command(FlowTraining, FlowRecipe, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
