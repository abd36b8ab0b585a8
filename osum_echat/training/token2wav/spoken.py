"""Recordings of speech with their tokens as rows of a batch: what the flow's training and its distillation read.

A part of the rows shows the model a prompt: either the beginning of the recording, or another recording of the same
voice joined before it, which is what it meets at inference.

Shapes: B batch, N tokens, T mel frames, M mel bins, S speaker embedding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from osum_echat.audio import features as audio_features
from osum_echat.config import InputFile
from osum_echat.token2wav.config import FlowConfig, mel_frames
from osum_echat.token2wav.encoder import stretch_reply
from osum_echat.token2wav.estimator import Padding
from osum_echat.token2wav.flow import FlowModel
from osum_echat.training.token2wav import onnx_export
from osum_echat.training.token2wav.audio import load_22k
from osum_echat.training.token2wav.recipe import PartTraining, Recipe
from osum_echat.training.token2wav.records import Utterance, pad


@dataclass(kw_only=True)
class SpokenTraining(PartTraining):
    """The YAML keys of both."""

    campplus: InputFile = Path("exp/token2wav/model/campplus.onnx")  # speaker embeddings
    tokenizer: InputFile | None = None  # for records without speech_token; None: such records are left out
    prompt_share: float = 0.5  # of the rows show the mel of their beginning
    prompt_most: float = 0.3  # of a single recording at most
    joined_share: float = 0.3  # of the rows have another recording before them, half of these as the prompt


C = TypeVar("C", bound=SpokenTraining)


@dataclass
class Spoken:
    """One utterance: tokens [N], log-mel [mel_frames(N), M] float16, speaker embedding [S]."""

    tokens_N: np.ndarray
    mel_TM: np.ndarray
    embedding_S: np.ndarray


@dataclass
class Row:
    """One row of a batch: recordings to join (the last is the reply) and how many mel frames are shown as the
    prompt."""

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


class SpokenRecipe(Recipe[C, Spoken]):
    """Reads recordings and makes rows and batches of them."""

    def __init__(self, cfg: C, model: FlowConfig) -> None:
        super().__init__(cfg, need=() if cfg.tokenizer is not None else ("tokens",))
        self.model = model
        self._campplus = onnx_export.session(existing(cfg.campplus, "campplus", "train it first: ...training.speaker"))
        self._tokenizer = None
        if cfg.tokenizer is not None:
            self._tokenizer = onnx_export.session(existing(cfg.tokenizer, "tokenizer", "train it first: ...training.tokenizer"))
        self.same_voice: dict[str | None, list[int]] = defaultdict(list)
        for index, utterance in enumerate(self.train.utterances):
            self.same_voice[utterance.voice].append(index)

    def features(self, utterance: Utterance) -> Spoken:
        samples_16k = utterance.samples_16k()
        tokens_N = np.array(utterance.tokens, dtype=np.int64)
        if not len(tokens_N):
            tokens_N = self._tokens(samples_16k)
        if len(tokens_N) == 0 or tokens_N.min() < 0 or tokens_N.max() >= self.model.vocab_size:
            raise ValueError(f"speech tokens must be some ids in 0 .. {self.model.vocab_size - 1}")
        mel_TM = load_22k(utterance)[1].numpy()
        frames = mel_frames(len(tokens_N), self.model.input_frame_rate)
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

    def rows(self, indices: Sequence[int], rng: np.random.Generator) -> list[Row]:
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

    def batch(self, rows: list[Row], multiple: int = 32) -> FlowBatch:
        """Rows as tensors, padded to a multiple of so many frames."""
        mel_BTM, lengths_B = pad([r.mel_TM.astype(np.float32) for r in rows], multiple=multiple)
        cond_BTM = np.zeros_like(mel_BTM)
        for row, mel_TM, cond_TM in zip(rows, mel_BTM, cond_BTM, strict=True):
            cond_TM[: row.prompt_frames] = mel_TM[: row.prompt_frames]
        embedding_BS = np.stack([r.parts[0].embedding_S for r in rows])  # of the prompt, as at inference
        arrays = (mel_BTM, lengths_B, cond_BTM, embedding_BS)
        return FlowBatch(rows, *(torch.from_numpy(a).to(self.device) for a in arrays))


def regulated(flow: FlowModel, batch: FlowBatch) -> Tensor:
    """Tokens at mel rate [B, T, M]; the regulator's norms run over a whole row, so it takes one row at a time."""
    device, rate = batch.mel_BTM.device, flow.config.input_frame_rate
    tokens = [np.concatenate([p.tokens_N for p in row.parts]) for row in batch.rows]
    tokens_BN, lengths_B = pad(tokens, multiple=16)
    mask_BN = torch.arange(tokens_BN.shape[1]) < torch.from_numpy(lengths_B)[:, None]
    h_BNM = flow.encode(torch.from_numpy(tokens_BN).to(device), mask_BN.to(device))
    mu_BTM = batch.mel_BTM.new_zeros(batch.mel_BTM.shape)
    for b, row in enumerate(batch.rows):
        start, stretched = 0, []
        for part in row.parts:
            stop = start + len(part.tokens_N)
            stretched.append(stretch_reply(h_BNM[b : b + 1, start:stop], rate))
            start = stop
        mu_1TM = flow.length_regulator(torch.cat(stretched, dim=1))
        mu_BTM[b, : mu_1TM.shape[1]] = mu_1TM[0].to(mu_BTM.dtype)
    return mu_BTM


def masked_mean(x_BTM: Tensor, padding: Padding | None) -> Tensor:
    """Mean over real frames and all bins."""
    if padding is None:
        return x_BTM.mean()
    return (x_BTM * padding.mask_BT1).sum() / (padding.mask_BT1.sum() * x_BTM.shape[-1])


def existing(path: Path, name: str, remedy: str) -> Path:
    if not path.is_file():
        raise ValueError(f"{name}: {path} is not there; {remedy}")
    return path
