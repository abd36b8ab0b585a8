"""CTC on the adapter output: a head, its loss, and two ways in which the LLM can use it.

A small LLM that is trained from scratch does not learn to listen through cross-entropy alone in reasonable time; a CTC
head does, and the LLM can then read what the head heard. *Soft tokens*: a frame's posterior over the text classes,
times the LLM's own token embeddings. *Compression*: only the first frame of each CTC segment (a run of one label with
the blanks after it) stays visible and holds the segment's mean. Compressed frames keep their slot as masked positions
(see `dialogue.layout`), so layouts keep their length. Both are off in the published model.

CTC: Graves et al. 2006. Compression: Gaido et al. 2021 (arXiv 2102.01578).

N recordings, P positions (12.5/s), A adapter width, D LLM width, C classes: text ids and the blank, which is the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osum_echat import device as devices
from osum_echat.model.blocks import valid_frames
from osum_echat.model.config import CtcConfig


@dataclass
class Transcripts:
    """Targets of the CTC loss: text ids of what is said in each recording, one after another.

    Attributes:
        ids: of all transcripts.
        labels: how many belong to each recording, 0 where the transcript is unknown; ``positions``: of its audio. Both
            on the host.
        known_N: the same numbers as ``labels``.
    """

    ids: Tensor
    labels: tuple[int, ...]
    positions: tuple[int, ...]
    known_N: Tensor

    @classmethod
    def of(cls, transcripts: Sequence[Tensor], positions: Sequence[int]) -> Transcripts:
        assert len(transcripts) == len(positions), f"{len(transcripts)} transcripts for {len(positions)} recordings"
        labels = tuple(len(t) for t in transcripts)
        ids = torch.cat([t.cpu().long() for t in transcripts]) if transcripts else torch.zeros(0, dtype=torch.long)
        return cls(ids, labels, tuple(positions), torch.tensor(labels, dtype=torch.long))

    def to(self, device: torch.device) -> Transcripts:
        ids, known_N = devices.send_together([self.ids, self.known_N], device)
        return replace(self, ids=ids, known_N=known_N)


class CtcBridge(nn.Module):
    """CTC head and what goes from it to the LLM."""

    def __init__(self, config: CtcConfig, adapter_dim: int, llm_dim: int, text_size: int) -> None:
        super().__init__()
        self.config = config
        self.blank = text_size
        self.head = nn.Linear(adapter_dim, text_size + 1)
        # The projection joins token embeddings, which are small: normed, then scaled by a learned gate.
        self.projection_norm = nn.LayerNorm(llm_dim)
        self.gate = nn.Parameter(torch.tensor([float(config.gate)]))  # [1]: sharding takes no scalars

    def forward(
        self, adapted_NPA: Tensor, projected_NPD: Tensor, lengths_N: Tensor, text_table_VD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the LLM gets.

        Returns:
            Embeddings [N, P, D], visible [N, P] (all valid positions without compression), CTC log-probabilities [N, P,
            C] (float32).
        """
        log_probs_NPC = self.head(adapted_NPA).float().log_softmax(dim=2)
        visible_NP = valid_frames(lengths_N, adapted_NPA.shape[1])
        embeds_NPD = self.projection_norm(projected_NPD) * self.gate
        text_NPV = log_probs_NPC.exp()[..., : self.blank] * visible_NP[..., None]
        if self.config.compress:
            keep_NP, segment_NP = segments(log_probs_NPC, lengths_N, self.blank)
            embeds_NPD = segment_mean(embeds_NPD, segment_NP, visible_NP)
            # Over a segment, only the share among the text classes counts: blanks inside it say nothing.
            text_NPV = segment_mean(text_NPV, segment_NP, visible_NP)
            text_NPV = text_NPV / text_NPV.sum(dim=2, keepdim=True).clamp(min=1e-4)
            visible_NP = keep_NP
        if self.config.soft_tokens:
            embeds_NPD = embeds_NPD + (text_NPV.to(text_table_VD.dtype) @ text_table_VD).to(embeds_NPD.dtype)
        return embeds_NPD, visible_NP, log_probs_NPC

    def loss(self, log_probs_NPC: Tensor, transcripts: Transcripts) -> tuple[Tensor, Tensor]:
        """CTC negative log-likelihood of each recording [N] and its number of labels [N]; both are 0 where the
        transcript is unknown, and the likelihood where the recording is too short for it."""
        labels, positions = transcripts.labels, transcripts.positions
        assert len(labels) == len(log_probs_NPC), f"{len(labels)} transcripts for {len(log_probs_NPC)} recordings"
        nll_N = F.ctc_loss(
            log_probs_NPC.transpose(0, 1),
            transcripts.ids,
            torch.tensor(positions),  # on the host, where the kernel wants them
            torch.tensor(labels),
            blank=self.blank,
            reduction="none",
            zero_infinity=True,
        )
        known_N = transcripts.known_N
        return torch.where(known_N > 0, nll_N, torch.zeros_like(nll_N)), known_N

    def transcribe(self, log_probs_NPC: Tensor, lengths_N: Tensor) -> list[list[int]]:
        """The best path of each recording as text ids, repeats and blanks removed."""
        keep_NP, _ = segments(log_probs_NPC, lengths_N, self.blank, at_least_one=False)
        best_NP = log_probs_NPC.argmax(dim=2)
        return [best_P[keep_P].tolist() for best_P, keep_P in zip(best_NP, keep_NP, strict=True)]


def segments(log_probs_NPC: Tensor, lengths_N: Tensor, blank: int, at_least_one: bool = True) -> tuple[Tensor, Tensor]:
    """Cut recordings where CTC begins a new label.

    Returns:
        keep [N, P]: True at the first frame of each segment; segment number of each frame [N, P] (frames before the
        first label belong to segment 0). A recording without any label keeps its first frame when ``at_least_one`` is
        set.
    """
    valid_NP = valid_frames(lengths_N, log_probs_NPC.shape[1])
    best_NP = log_probs_NPC.argmax(dim=2).masked_fill(~valid_NP, blank)
    before_NP = F.pad(best_NP[:, :-1], (1, 0), value=blank)
    keep_NP = (best_NP != blank) & (best_NP != before_NP)
    if at_least_one and keep_NP.shape[1]:
        keep_NP[:, 0] |= ~keep_NP.any(dim=1) & valid_NP[:, 0]
    return keep_NP, (keep_NP.long().cumsum(dim=1) - 1).clamp(min=0)


def segment_mean(x_NPD: Tensor, segment_NP: Tensor, valid_NP: Tensor) -> Tensor:
    """Each frame replaced by the mean of the valid frames of its segment."""
    n, p, d = x_NPD.shape
    index = (segment_NP + torch.arange(n, device=segment_NP.device)[:, None] * p).reshape(-1)
    weight = valid_NP.reshape(-1, 1).float()
    total = torch.zeros(n * p, d, device=x_NPD.device).index_add(0, index, x_NPD.float().reshape(-1, d) * weight)
    count = torch.zeros(n * p, 1, device=x_NPD.device).index_add(0, index, weight)
    return (total / count.clamp(min=1))[index].view(n, p, d).to(x_NPD.dtype)
