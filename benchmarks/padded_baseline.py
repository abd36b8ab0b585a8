"""A straightforward training step, to measure ours against: what packing, one forward for all tasks and chunked losses save.

Built from the public description of the published code: a micro-batch holds one kind of task; every piece of a sequence (prompt, audio,
assistant header, text, speech) is padded to the longest of the micro-batch *inside* the sequence; recordings are padded to the longest; both
heads run at every position and their logits are concatenated for one cross-entropy. It uses the same weights as ours, so only the way of
computing differs. Left out in its favour: its copy of the logits to shift them (here the targets are shifted), activations that leak past the
end of a recording, and the 10 s of noise that it makes for samples without a recording.

B samples, T positions with inner padding, D width, C classes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osum_echat.data.batch import pad_features
from osum_echat.dialogue.layout import IGNORE, audio_positions
from osum_echat.model.blocks import Block, valid_frames
from osum_echat.model.echat import EChatModel

POSITIONS = 3700
FACTORS = {"speech2text_token": 0.8, "speech2text_token_think": 0.6, "text2text": 0.6}


@dataclass
class Sample:
    """One sample in pieces. ``text`` and ``speech`` are unified ids and the targets; empty where the task has none."""

    task: str
    prompt: tuple[int, ...]
    feats: Tensor | None
    header: tuple[int, ...]
    text: tuple[int, ...]
    speech: tuple[int, ...]

    @property
    def targets(self) -> int:
        return len(self.text) + len(self.speech)

    @property
    def positions(self) -> int:
        audio = 0 if self.feats is None else audio_positions(len(self.feats))
        return len(self.prompt) + audio + len(self.header) + self.targets


def micro_batches(samples: Sequence[Sample]) -> list[list[Sample]]:
    """One bucket a task, cut as the published loader does: before longest sequence x samples would pass 3,700 positions times a factor."""
    done: list[list[Sample]] = []
    open_: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        bucket = open_[sample.task]
        if max(s.positions for s in [*bucket, sample]) * (len(bucket) + 1) > POSITIONS * FACTORS.get(sample.task, 1.0):
            done.append(bucket)
            bucket = open_[sample.task] = []
        bucket.append(sample)
    return done + list(open_.values())


def padded_positions(samples: Sequence[Sample]) -> int:
    """Positions of a micro-batch, every piece as long as its longest."""
    audio = max(0 if s.feats is None else audio_positions(len(s.feats)) for s in samples)
    pieces = (max(len(getattr(s, name)) for s in samples) for name in ("prompt", "header", "text", "speech"))
    return len(samples) * (audio + sum(pieces))


def _piece(model: EChatModel, pieces: list[tuple[int, ...]], supervised: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Ids right-padded to the longest: embeddings [B, L, D], mask [B, L], targets [B, L]."""
    length = max(map(len, pieces))
    ids_BL = torch.zeros(len(pieces), length, dtype=torch.long)
    mask_BL = torch.zeros(len(pieces), length, dtype=torch.bool)
    for i, piece in enumerate(pieces):
        ids_BL[i, : len(piece)] = torch.tensor(piece, dtype=torch.long)
        mask_BL[i, : len(piece)] = True
    targets_BL = torch.where(mask_BL, ids_BL, IGNORE) if supervised else torch.full_like(ids_BL, IGNORE)
    return model.embed(ids_BL), mask_BL, targets_BL


def _audio(model: EChatModel, feats: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Recordings padded to the longest through encoder and adapter, with a mask over keys: as `_piece`."""
    feats_NTF, lengths_N = pad_features(feats, model.config.encoder.mels)
    encoder, adapter = model.encoder, model.adapter
    x_NET = F.gelu(encoder.conv1(feats_NTF.transpose(1, 2)))
    x_NET = x_NET * valid_frames(lengths_N, x_NET.shape[2])[:, None]
    x_NSE = F.gelu(encoder.conv2(x_NET)).transpose(1, 2)
    lengths_N = (lengths_N + 1) // 2
    x_NSE = _blocks(encoder.blocks, x_NSE + encoder.positions_SE[: x_NSE.shape[1]], lengths_N)
    down_NPA, lengths_N = adapter.down(encoder.norm(x_NSE), lengths_N)
    x_NPA = adapter.input_norm(adapter.input(down_NPA)) * math.sqrt(adapter.config.dim)
    x_NPA = _blocks(adapter.blocks, x_NPA + adapter.positions_PA[: x_NPA.shape[1]], lengths_N)
    mask_NP = valid_frames(lengths_N, x_NPA.shape[1])
    return model.projection(adapter.norm(x_NPA)), mask_NP, torch.full(mask_NP.shape, IGNORE)


def _blocks(blocks: Iterable[nn.Module], x_NTD: Tensor, lengths_N: Tensor) -> Tensor:
    mask_N11T = valid_frames(lengths_N, x_NTD.shape[1])[:, None, None]
    for block in cast("Iterable[Block]", blocks):
        attention, normed_NTD = block.attention, block.attention_norm(x_NTD)
        q, k, v = (
            linear(normed_NTD).unflatten(2, (attention.heads, -1)).transpose(1, 2)
            for linear in (attention.q, attention.k, attention.v)
        )
        y_NHTd = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_N11T)
        x_NTD = x_NTD + attention.out(y_NHTd.transpose(1, 2).flatten(2))
        x_NTD = x_NTD + block.ffn(block.ffn_norm(x_NTD))
    return x_NTD


def loss_sum(model: EChatModel, samples: Sequence[Sample]) -> Tensor:
    """Summed cross-entropy of samples of one task."""
    pieces = [_piece(model, [s.prompt for s in samples], False)]
    feats = [s.feats for s in samples if s.feats is not None]
    if feats:
        pieces.append(_audio(model, feats))
    pieces.append(_piece(model, [s.header for s in samples], False))
    speaks = bool(samples[0].speech)
    if samples[0].text:
        pieces.append(_piece(model, [s.text for s in samples], True))
    if speaks:
        pieces.append(_piece(model, [s.speech for s in samples], True))
    embeds_BTD, mask_BT, targets_BT = (torch.cat([p[i] for p in pieces], dim=1) for i in range(3))
    positions_BT = torch.where(mask_BT, mask_BT.long().cumsum(1) - 1, 1)
    hidden_BTD = model.hidden(embeds_BTD, positions_BT, attention_mask=mask_BT.long())
    text_BTC, speech_BTC = model.text_logits(hidden_BTD), model.speech_logits(hidden_BTD)
    logits_BTC = torch.cat([text_BTC, speech_BTC], dim=2) if speaks else text_BTC
    next_BT = F.pad(targets_BT[:, 1:], (0, 1), value=IGNORE)
    return F.cross_entropy(logits_BTC.flatten(0, 1), next_BT.flatten(), ignore_index=IGNORE, reduction="sum")
