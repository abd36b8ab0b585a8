"""Tag heads: age, gender, emotion, sound event and the like, classified from a whole recording.

Each head pools the down-sampled encoder frames (attention, mean, standard deviation) and classifies. What it decides,
as a mix of learned label vectors weighted by their probabilities plus a gated projection of the pooled features, is
added to the two marker rows around the audio, so the LLM reads tags without a change of layout. Off in the published
model, whose LLM is large enough to hear tags itself.

N recordings, P positions, A adapter width, D LLM width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osum_echat.model.blocks import valid_frames

_HIDDEN = 192
_GATE = 0.02  # start value: the projection whispers beside label vectors of the size of token embeddings


class TagHead(nn.Module):
    """One tag: pooling, classifier and the label vectors that the LLM sees."""

    def __init__(self, labels: list[str], adapter_dim: int, llm_dim: int, scale: float) -> None:
        super().__init__()
        self.labels = labels
        self.query = nn.Linear(adapter_dim, 1)
        self.hidden = nn.Linear(3 * adapter_dim, _HIDDEN)
        self.classifier = nn.Linear(_HIDDEN, len(labels))
        self.vectors = nn.Embedding(len(labels), llm_dim)
        nn.init.normal_(self.vectors.weight, std=scale)
        self.projection = nn.Linear(3 * adapter_dim, llm_dim)
        self.projection_norm = nn.LayerNorm(llm_dim)
        self.gate = nn.Parameter(torch.tensor([_GATE]))  # [1]: sharding takes no scalars

    def forward(self, frames_NPA: Tensor, valid_NP: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, labels] (float32) and the vector for the LLM [N, D]."""
        weights_NP = self.query(frames_NPA)[..., 0].float().masked_fill(~valid_NP, float("-inf")).softmax(dim=1)
        frames_NPA = frames_NPA.float()
        attended_NA = (weights_NP[..., None] * frames_NPA).sum(dim=1)
        share_NP1 = valid_NP[..., None] / valid_NP.sum(dim=1).clamp(min=1)[:, None, None]
        mean_NA = (frames_NPA * share_NP1).sum(dim=1)
        variance_NA = ((frames_NPA - mean_NA[:, None]).square() * share_NP1).sum(dim=1)
        pooled = torch.cat([attended_NA, mean_NA, variance_NA.clamp(min=1e-5).sqrt()], dim=1)
        logits = self.classifier(F.gelu(self.hidden(pooled.to(self.hidden.weight.dtype)))).float()
        vector_ND = logits.softmax(dim=1).to(self.vectors.weight.dtype) @ self.vectors.weight
        heard_ND = self.projection_norm(self.projection(pooled.to(self.projection.weight.dtype)))
        return logits, vector_ND + self.gate * heard_ND


class TagHeads(nn.Module):
    """All tags of a config (``adapter.tags``)."""

    def __init__(self, tags: Mapping[str, list[str]], adapter_dim: int, llm_dim: int, scale: float) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: TagHead(labels, adapter_dim, llm_dim, scale) for name, labels in tags.items()})

    def forward(self, frames_NPA: Tensor, lengths_N: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Logits of each tag and the sum of the vectors for the LLM [N, D]."""
        valid_NP = valid_frames(lengths_N, frames_NPA.shape[1])
        found = {name: head(frames_NPA, valid_NP) for name, head in self.heads.items()}
        return {name: logits for name, (logits, _) in found.items()}, torch.stack([v for _, v in found.values()]).sum(dim=0)
