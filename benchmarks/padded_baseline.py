"""A straightforward training step, to measure ours against: what packing, one forward for all tasks and chunked losses save.

Built from the public description of the published code: a micro-batch for each kind of task; every piece of a sequence (prompt, audio,
assistant header, text, speech) is padded to the longest of the micro-batch *inside* the sequence; both heads run at every position and their
logits are concatenated for one cross-entropy. It uses the same modules and weights as ours, so only the way of batching differs.

B samples, T positions with inner padding, D width, C classes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from osum_echat.data.batch import pad_features
from osum_echat.dialogue.layout import IGNORE
from osum_echat.model.echat import EChatModel


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


def by_task(samples: Sequence[Sample]) -> list[list[Sample]]:
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.task].append(sample)
    return list(groups.values())


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


def loss_sum(model: EChatModel, samples: Sequence[Sample]) -> Tensor:
    """Summed cross-entropy of samples of one task."""
    pieces = [_piece(model, [s.prompt for s in samples], False)]
    feats = [s.feats for s in samples if s.feats is not None]
    if feats:
        audio = model.encode_audio(*pad_features(feats, model.config.encoder.mels))
        padded_BLD = torch.nn.utils.rnn.pad_sequence(list(audio.embeds_PD.split(audio.lengths_N.tolist())), batch_first=True)
        mask_BL = torch.arange(padded_BLD.shape[1])[None] < audio.lengths_N[:, None]
        pieces.append((padded_BLD, mask_BL, torch.full(mask_BL.shape, IGNORE)))
    pieces.append(_piece(model, [s.header for s in samples], False))
    speaks = bool(samples[0].speech)
    if samples[0].text:
        pieces.append(_piece(model, [s.text for s in samples], True))
    if speaks:
        pieces.append(_piece(model, [s.speech for s in samples], True))
    embeds_BTD, mask_BT, targets_BT = (torch.cat([p[i] for p in pieces], dim=1) for i in range(3))
    positions_BT = torch.where(mask_BT, mask_BT.long().cumsum(1) - 1, 1)
    hidden_BTD = model.hidden(embeds_BTD, positions_BT, attention_mask=mask_BT.long())
    logits_BTC = torch.cat([model.text_logits(hidden_BTD), model.speech_logits(hidden_BTD)], dim=2).float()
    if not speaks:
        logits_BTC = logits_BTC[..., : model.vocabulary.text_size]
    return F.cross_entropy(logits_BTC[:, :-1].flatten(0, 1), targets_BT[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")
