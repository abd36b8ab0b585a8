"""Token encoder and length regulator of the flow: speech tokens at 25 Hz to a mel-rate condition.

The encoder sees all tokens at once (no causality). Its relative-position scores are made for a block of queries at a
time, so memory grows with the length, not with its square.

Shapes: B batch, L tokens, T mel frames, D model width, H heads, K width of a head, M mel bins.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osum_echat.token2wav.config import EncoderConfig, mel_frames

QUERY_BLOCK = 256
"""Queries per block of relative-position scores: [H, 256, L] floats are the largest temporary of the encoder."""

HEAD_TOKENS = 20
"""Tokens at either end of a reply that the regulator stretches apart from the middle (CosyVoice's streaming
overlap)."""


def relative_table(length: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sinusoids of the distances length-1 .. -(length-1) (query minus key), [2 * length - 1, width]; sine on even
    columns."""
    distance = torch.arange(length - 1, -length, -1, dtype=torch.float32, device=device)
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float32, device=device) * -(math.log(10000.0) / width))
    angle = distance[:, None] * rate
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).to(dtype)


class RelativeAttention(nn.Module):
    """Multi-head attention with the relative positions of Transformer-XL (as in ESPnet)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, self.head_dim)))
        self.pos_bias_v = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, self.head_dim)))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(-3, -2)

    def forward(self, x_BLD: Tensor, table_RD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """``table_RD`` is `relative_table` of L; ``mask_BL`` is True for real tokens (None: all are)."""
        q_BHLK, k_BHLK, v_BHLK = (self._split(f(x_BLD)) for f in (self.linear_q, self.linear_k, self.linear_v))
        p_HRK = self._split(self.linear_pos(table_RD))
        length = x_BLD.shape[1]
        blocks = []
        for start in range(0, length, QUERY_BLOCK):
            q = q_BHLK[:, :, start : start + QUERY_BLOCK]
            bias_BHQL = self._position_scores(q + self.pos_bias_v[:, None], p_HRK, start, length)
            if mask_BL is not None:
                bias_BHQL = bias_BHQL.masked_fill(~mask_BL[:, None, None, :], float("-inf"))
            content = q + self.pos_bias_u[:, None]
            blocks.append(F.scaled_dot_product_attention(content, k_BHLK, v_BHLK, attn_mask=bias_BHQL))
        return self.linear_out(torch.cat(blocks, dim=2).transpose(1, 2).flatten(2))

    def _position_scores(self, q_BHQK: Tensor, p_HRK: Tensor, start: int, length: int) -> Tensor:
        """(q + v) · p at distance i - j for queries start .. start+Q-1 and all keys, scaled: [B, H, Q, L].

        Only the table rows that these queries can reach are multiplied. Row q of the product starts at distance
        start+q-0 in column Q-1-q, so the wanted matrix is the same memory read with a row stride one shorter.
        """
        count = q_BHQK.shape[2]
        first = length - (start + count)
        reach = p_HRK[:, first : first + count + length - 1]
        scores = (q_BHQK / math.sqrt(self.head_dim)) @ reach.transpose(-2, -1)
        batch, heads, _, width = scores.shape
        scores = scores.contiguous()
        return scores.as_strided(
            (batch, heads, count, length),
            (heads * count * width, count * width, width - 1, 1),
            scores.storage_offset() + count - 1,
        )


class FeedForward(nn.Module):
    """Two linear layers around SiLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(width, hidden)
        self.w_2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(F.silu(self.w_1(x)))


class EncoderLayer(nn.Module):
    """Pre-norm block: attention, then feed-forward. The tiny eps of the two norms is the released one."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width = config.output_size
        self.self_attn = RelativeAttention(width, config.attention_heads)
        self.feed_forward = FeedForward(width, config.linear_units)
        self.norm_mha = nn.LayerNorm(width, eps=1e-12)
        self.norm_ff = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x_BLD: Tensor, table_RD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        x_BLD = x_BLD + self.self_attn(self.norm_mha(x_BLD), table_RD, mask_BL)
        return x_BLD + self.feed_forward(self.norm_ff(x_BLD))


class InputLayer(nn.Module):
    """Linear and LayerNorm, scaled by sqrt(width). Positions are not added here: they enter in the attention."""

    def __init__(self, input_size: int, width: int) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.Linear(input_size, width), nn.LayerNorm(width, eps=1e-5))
        self.scale = math.sqrt(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x) * self.scale


class TokenEncoder(nn.Module):
    """Embedded tokens [B, L, input] to hidden states [B, L, D]."""

    def __init__(self, input_size: int, config: EncoderConfig) -> None:
        super().__init__()
        self.embed = InputLayer(input_size, config.output_size)
        self.encoders = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_blocks))
        self.after_norm = nn.LayerNorm(config.output_size, eps=1e-5)

    def forward(self, x_BLI: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """``mask_BL`` is True for real tokens; padded queries give values that nobody should read."""
        x_BLD = self.embed(x_BLI)
        table_RD = relative_table(x_BLD.shape[1], x_BLD.shape[2], x_BLD.device, x_BLD.dtype)
        for layer in self.encoders:
            x_BLD = layer(x_BLD, table_RD, mask_BL)
        return self.after_norm(x_BLD)


def stretch(h_BLM: Tensor, frames: int) -> Tensor:
    """Linear interpolation along time to ``frames`` frames, [B, frames, M] (sample centres aligned, not corners)."""
    if frames == 0:
        return h_BLM[:, :0]
    return F.interpolate(h_BLM.transpose(1, 2), size=frames, mode="linear").transpose(1, 2)


def stretch_reply(h_BLM: Tensor, token_rate: int) -> Tensor:
    """Hidden states of one reply to mel rate, the way the released model is used: above 40 tokens, the first and the
    last 20 are stretched apart from the middle, so that the ends do not depend on how the length divides.

    Raises ValueError for no tokens: there is nothing to interpolate.
    """
    tokens = h_BLM.shape[1]
    if tokens == 0:
        raise ValueError("cannot stretch a reply of no tokens; give at least one speech token")
    frames = mel_frames(tokens, token_rate)
    if tokens <= 2 * HEAD_TOKENS:
        return stretch(h_BLM, frames)
    edge = mel_frames(HEAD_TOKENS, token_rate)
    head, middle, tail = h_BLM.split([HEAD_TOKENS, tokens - 2 * HEAD_TOKENS, HEAD_TOKENS], dim=1)
    return torch.cat((stretch(head, edge), stretch(middle, frames - 2 * edge), stretch(tail, edge)), dim=1)


class LengthRegulator(nn.Module):
    """Convolution stack over the stretched condition. Its GroupNorm statistics run over all frames, so give one row at
    a time (or rows without padding)."""

    def __init__(self, channels: int, blocks: int = 4, groups: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(blocks):
            layers += [nn.Conv1d(channels, channels, 3, padding=1), nn.GroupNorm(groups, channels), nn.Mish()]
        self.model = nn.Sequential(*layers, nn.Conv1d(channels, channels, 1))

    def forward(self, h_BTM: Tensor) -> Tensor:
        return self.model(h_BTM.transpose(1, 2)).transpose(1, 2)
