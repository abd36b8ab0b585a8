"""Where a speaker's turn stands, told by a small head on the encoder's frames, which are computed for the answer anyway.

`LABELS`: the turn is *complete*; *incomplete* (the speaker pauses inside a sentence); a *backchannel* (a listener's
"mm-hm", which wants no answer); *wait* (the speaker asks for time). Off in the published model. It is trained by itself,
on the frames of an encoder that does not change any more (`recipes.mini.turn_head`), and no other part reads it.

N recordings, S encoder frames (50/s), E width of all encoder layers that the adapter sees, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osum_echat.model.blocks import valid_frames
from osum_echat.rates import ENCODER_FRAMES_PER_SECOND

LABELS = ("complete", "incomplete", "backchannel", "wait")
LAST_FRAMES = 4 * ENCODER_FRAMES_PER_SECOND
"""Of a recording, that are looked at."""
_END_FRAMES = ENCODER_FRAMES_PER_SECOND // 2  # whose mean stands by itself: the pause and what is before it
_HIDDEN = 128
_DROPOUT = 0.2


class TurnHead(nn.Module):
    """Two attentions over the last four seconds, the mean of the last half second and the length, to one class. Of longer
    recordings it makes no difference what came before."""

    def __init__(self, width: int, labels: Sequence[str] = LABELS) -> None:
        super().__init__()
        self.labels = tuple(labels)
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, 2)
        self.decay = nn.Parameter(torch.tensor([0.5, 3.0]))  # start values: how fast each attention forgets, a second
        self.hidden = nn.Linear(3 * width + 1, _HIDDEN)
        self.dropout = nn.Dropout(_DROPOUT)
        self.classifier = nn.Linear(_HIDDEN, len(self.labels))

    def forward(self, layers: Sequence[Tensor], lengths_N: Tensor) -> Tensor:
        """Logits [N, C], float32.

        Args:
            layers: encoder layers, [N, S, .] each (`EChatModel.encode`).
            lengths_N: valid frames of each recording, at least 1.
        """
        frames_NSE = torch.cat(list(layers), dim=2)
        # Counted from the end: frame 0 is the last one of each recording.
        count = min(LAST_FRAMES, frames_NSE.shape[1])
        back_S = torch.arange(count, device=frames_NSE.device)
        index_NS = (lengths_N[:, None] - 1 - back_S).clamp(min=0)
        valid_NS = valid_frames(lengths_N, count)
        frames_NSE = frames_NSE.gather(1, index_NS[..., None].expand(-1, -1, frames_NSE.shape[2]))
        frames_NSE = self.norm(frames_NSE.to(self.norm.weight.dtype))
        scores_NS2 = self.query(frames_NSE).float() - self.decay.float() * (back_S / ENCODER_FRAMES_PER_SECOND)[:, None]
        weights_NS2 = scores_NS2.masked_fill(~valid_NS[..., None], float("-inf")).softmax(dim=1)
        attended_N2E = torch.einsum("nsk,nse->nke", weights_NS2, frames_NSE.float())
        end_NS1 = (valid_NS & (back_S < _END_FRAMES))[..., None].float()
        end_NE = (frames_NSE.float() * end_NS1).sum(dim=1) / end_NS1.sum(dim=1)
        seconds_N1 = torch.log(lengths_N.clamp(max=LAST_FRAMES).float() / ENCODER_FRAMES_PER_SECOND)[:, None]
        pooled = torch.cat([attended_N2E.flatten(1), end_NE, seconds_N1], dim=1).to(self.hidden.weight.dtype)
        return self.classifier(self.dropout(F.gelu(self.hidden(pooled)))).float()
