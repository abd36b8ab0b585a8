"""The velocity estimator: a 1-D U-Net of residual convolutions and transformer blocks over mel frames.

Activations stay [B, T, C] throughout, convolutions included: linear layers, norms and attention then need no copies,
and a convolution over that layout is oneDNN's fast one. Padding is optional: without a mask nothing is multiplied by
one.

Shapes: B batch, T frames, C channels, M mel bins, H heads, K width of a head, E time embedding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osum_echat import device as devices
from osum_echat.cpu_linear import PackedLinear
from osum_echat.token2wav.config import EstimatorConfig

PACKED_ROWS = 512
"""Rows (frames of both halves of a step) that packed weights are tuned for; any number works."""


@dataclass(frozen=True)
class Padding:
    """Which frames of a batch are real.

    ``mask_BT1`` is 1 for real frames. ``statistics`` says what GroupNorm averages: "real" frames (a row then gives the
    same as alone) or "all" frames, padding included, which is what the published implementation does.
    """

    mask_BT1: Tensor
    statistics: str = "real"

    @classmethod
    def of(
        cls,
        lengths: Tensor | Sequence[int],
        frames: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Padding | None:
        """Padding for rows of these lengths, or None when every row is full. With a list nothing waits for
        ``device``."""
        if isinstance(lengths, Tensor):
            lengths_B, full = lengths, bool((lengths == frames).all())
        else:
            lengths_B, full = devices.send(lengths, device or torch.device("cpu")), all(length == frames for length in lengths)
        if full:
            return None
        real = torch.arange(frames, device=lengths_B.device) < lengths_B[:, None]
        return cls(real[..., None].to(dtype))

    def halved(self) -> Padding:
        """The padding after a convolution of stride 2."""
        return Padding(self.mask_BT1[:, ::2], self.statistics)

    def keys_B11T(self) -> Tensor:
        """True for frames that attention may look at."""
        return self.mask_BT1.transpose(1, 2)[:, None] > 0


def masked(x_BTC: Tensor, padding: Padding | None) -> Tensor:
    """``x_BTC`` with padded frames at zero."""
    return x_BTC if padding is None else x_BTC * padding.mask_BT1


def conv_time(conv: nn.Conv1d, x_BTC: Tensor) -> Tensor:
    """A Conv1d over [B, T, C] without turning it round: seen as an image of height 1 the layout is channels-last."""
    image = x_BTC.transpose(1, 2).unsqueeze(2)
    weight = conv.weight.unsqueeze(2)
    out = F.conv2d(image, weight, conv.bias, stride=(1, conv.stride[0]), padding=(0, int(conv.padding[0])))
    return out.squeeze(2).transpose(1, 2)


def pointwise(conv: nn.Conv1d, x_BTC: Tensor) -> Tensor:
    """A Conv1d of kernel 1 as the linear layer that it is."""
    return F.linear(x_BTC, conv.weight[:, :, 0], conv.bias)


def group_norm_time(norm: nn.GroupNorm, x_BTC: Tensor, padding: Padding | None) -> Tensor:
    """GroupNorm whose statistics run over the frames and the channels of a group."""
    if padding is None or padding.statistics == "all":
        image = x_BTC.transpose(1, 2).unsqueeze(2)
        return F.group_norm(image, norm.num_groups, norm.weight, norm.bias, norm.eps).squeeze(2).transpose(1, 2)
    x_BTGC = x_BTC.unflatten(-1, (norm.num_groups, -1))
    mask_BT11 = padding.mask_BT1[..., None]
    count_B111 = mask_BT11.sum(dim=(1, 2, 3), keepdim=True) * x_BTGC.shape[-1]
    mean = (x_BTGC * mask_BT11).sum(dim=(1, 3), keepdim=True) / count_B111
    centred = (x_BTGC - mean) * mask_BT11
    variance = centred.square().sum(dim=(1, 3), keepdim=True) / count_B111
    return (centred * torch.rsqrt(variance + norm.eps)).flatten(2) * norm.weight + norm.bias


def mish(x: Tensor) -> Tensor:
    """x tanh(log(1 + e^x)), for inference in float32 on a CPU as a ratio with one exponential: a third of the time of
    PyTorch's."""
    if not x.is_cpu or x.dtype != torch.float32 or torch.is_grad_enabled():
        return F.mish(x)
    e = x.clamp(max=20.0).exp_()  # from there on the ratio is 1 in float32
    n = (e + 2.0).mul_(e)
    return torch.mul(x, n).div_(n.add_(2.0))


class ConvBlock(nn.Module):
    """Convolution, GroupNorm, Mish."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(channels_in, channels_out, 3, padding=1), nn.GroupNorm(groups, channels_out), nn.Mish()
        )

    def forward(self, x_BTC: Tensor, padding: Padding | None = None) -> Tensor:
        conv, norm = cast(nn.Conv1d, self.block[0]), cast(nn.GroupNorm, self.block[1])
        x_BTC = group_norm_time(norm, conv_time(conv, masked(x_BTC, padding)), padding)
        return masked(mish(x_BTC), padding)


class ResnetBlock(nn.Module):
    """Two convolution blocks with the time embedding added between them, and a 1x1 convolution around them."""

    def __init__(self, channels_in: int, channels_out: int, time_width: int, groups: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(time_width, channels_out))
        self.block1 = ConvBlock(channels_in, channels_out, groups)
        self.block2 = ConvBlock(channels_out, channels_out, groups)
        self.res_conv = nn.Conv1d(channels_in, channels_out, 1)

    def forward(self, x_BTC: Tensor, time_BE: Tensor, padding: Padding | None = None) -> Tensor:
        """``time_BE`` is the time embedding after Mish (shared by all blocks), with one row when all rows have the same
        time."""
        h = self.block1(x_BTC, padding) + self.mlp[1](time_BE)[:, None]
        return self.block2(h, padding) + pointwise(self.res_conv, masked(x_BTC, padding))


class SelfAttention(nn.Module):
    """Full attention without positions; the projections carry no bias."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, width)])
        self._joined: nn.Module | None = None

    def prepare(self, pack: bool) -> None:
        """Inference only: one product for queries, keys and values, with packed weights if ``pack``."""
        weight = torch.cat([f.weight.detach() for f in (self.to_q, self.to_k, self.to_v)])
        out = cast(nn.Linear, self.to_out[0])
        if pack:
            self._joined = PackedLinear(weight, None, rows_hint=PACKED_ROWS)
            self.to_out[0] = PackedLinear(out.weight, out.bias, rows_hint=PACKED_ROWS)
        else:
            self._joined = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            self._joined.weight = nn.Parameter(weight, requires_grad=False)
        del self.to_q, self.to_k, self.to_v

    def forward(self, x_BTC: Tensor, padding: Padding | None = None) -> Tensor:
        if self._joined is None:
            q, k, v = (f(x_BTC).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        else:
            q, k, v = self._joined(x_BTC).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        keys = None if padding is None else padding.keys_B11T()
        if x_BTC.is_cpu and x_BTC.dtype == torch.bfloat16:
            # The CPU's fused attention is no faster in bfloat16, and less exact.
            q, k, v = q.float(), k.float(), v.float()
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2).flatten(2)
        return self.to_out[0](mixed.to(x_BTC.dtype))


class Projection(nn.Module):
    """Linear and exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class EstimatorFeedForward(nn.Module):
    """256 -> 1024 -> 256 around GELU. The identity keeps the released numbering (a dropout stood there)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(Projection(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def prepare(self, pack: bool) -> None:
        """Inference only: packed weights, GELU within the first product."""
        if pack:
            first, last = cast(Projection, self.net[0]).proj, cast(nn.Linear, self.net[2])
            self.net = nn.Sequential(
                PackedLinear(first.weight, first.bias, gelu=True, rows_hint=PACKED_ROWS),
                PackedLinear(last.weight, last.bias, rows_hint=PACKED_ROWS),
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, width: int, config: EstimatorConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = SelfAttention(width, config.num_heads, config.attention_head_dim)
        self.norm3 = nn.LayerNorm(width)
        self.ff = EstimatorFeedForward(width)

    def forward(self, x_BTC: Tensor, padding: Padding | None = None) -> Tensor:
        x_BTC = x_BTC + self.attn1(self.norm1(x_BTC), padding)
        return x_BTC + self.ff(self.norm3(x_BTC))


class HalveRate(nn.Module):
    """Convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return conv_time(self.conv, x_BTC)


class DoubleRate(nn.Module):
    """Transposed convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(channels, channels, 4, stride=2, padding=1)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.conv(x_BTC.transpose(1, 2)).transpose(1, 2)


class Stage(nn.ModuleList):
    """One resolution's part of the U-Net: a resnet, transformer blocks, and (not in the middle) a change of rate. A
    list, because the released names are numbers."""

    def __init__(
        self, channels_in: int, width: int, time_width: int, config: EstimatorConfig, resample: nn.Module | None = None
    ) -> None:
        blocks = nn.ModuleList(TransformerBlock(width, config) for _ in range(config.n_blocks))
        resnet = ResnetBlock(channels_in, width, time_width, config.groups)
        super().__init__([resnet, blocks] if resample is None else [resnet, blocks, resample])

    def forward(self, x_BTC: Tensor, time_BE: Tensor, padding: Padding | None) -> Tensor:
        """The resnet and the transformer blocks."""
        x_BTC = self[0](x_BTC, time_BE, padding)
        for block in cast(nn.ModuleList, self[1]):
            x_BTC = block(x_BTC, padding)
        return x_BTC

    def resample(self, x_BTC: Tensor) -> Tensor:
        """The change of rate, or at the innermost and outermost stage the plain convolution in its place."""
        last = self[2]
        return conv_time(last, x_BTC) if isinstance(last, nn.Conv1d) else last(x_BTC)

    @property
    def halves(self) -> bool:
        return isinstance(self[2], HalveRate)


class TimeEmbedding(nn.Module):
    """Two linear layers over sinusoids of 1000 t; `forward` includes the Mish that every resnet applies to it."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.count = width_in // 2
        self.linear_1 = nn.Linear(width_in, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t_B: Tensor) -> Tensor:
        rate = torch.exp(
            torch.arange(self.count, device=t_B.device, dtype=torch.float32) * -(math.log(10000.0) / (self.count - 1))
        )
        angle = 1000.0 * t_B.float()[:, None] * rate
        sinusoids = torch.cat((angle.sin(), angle.cos()), dim=-1).to(self.linear_1.weight.dtype)
        return F.mish(self.linear_2(F.silu(self.linear_1(sinusoids))))


class Estimator(nn.Module):
    """Velocity of noisy mel frames, given the token condition, the speaker and the prompt mel."""

    def __init__(self, mel_bins: int, config: EstimatorConfig) -> None:
        super().__init__()
        self.config = config
        width_in = 4 * mel_bins
        first = config.channels[0]
        time_width = 4 * first
        self.time_mlp = TimeEmbedding(width_in, time_width)
        self.down_blocks = nn.ModuleList()
        self.mid_blocks = nn.ModuleList()
        self.up_blocks = nn.ModuleList()

        channels = width_in
        for index, width in enumerate(config.channels):
            last = index == len(config.channels) - 1
            down = nn.Conv1d(width, width, 3, padding=1) if last else HalveRate(width)
            self.down_blocks.append(Stage(channels, width, time_width, config, down))
            channels = width
        for _ in range(config.num_mid_blocks):
            self.mid_blocks.append(Stage(channels, channels, time_width, config))
        ups = (*reversed(config.channels), first)
        for index, (wide, width) in enumerate(itertools.pairwise(ups)):
            last = index == len(ups) - 2
            up = nn.Conv1d(width, width, 3, padding=1) if last else DoubleRate(width)
            self.up_blocks.append(Stage(2 * wide, width, time_width, config, up))
        self.final_block = ConvBlock(first, first, config.groups)
        self.final_proj = nn.Conv1d(first, mel_bins, 1)

    def forward(
        self,
        x_BTM: Tensor,
        mu_BTM: Tensor,
        t_B: Tensor,
        spk_BM: Tensor,
        cond_BTM: Tensor,
        padding: Padding | None = None,
    ) -> Tensor:
        """The velocity [B, T, M] at time ``t_B`` (0 noise .. 1 speech; one entry serves all rows).

        ``mu_BTM`` is the regulated token condition, ``spk_BM`` the projected speaker, ``cond_BTM`` the prompt mel with
        zeros after it.
        """
        spk_BTM = spk_BM[:, None].expand(-1, x_BTM.shape[1], -1)
        return self.velocity(torch.cat((x_BTM, mu_BTM, spk_BTM, cond_BTM), dim=-1), self.time_mlp(t_B), padding)

    def velocity(self, x_BTC: Tensor, time_BE: Tensor, padding: Padding | None = None) -> Tensor:
        """`forward` on the joined input [B, T, 4M] with the time already embedded."""
        skips = []
        for stage in cast("list[Stage]", self.down_blocks):
            x_BTC = stage(x_BTC, time_BE, padding)
            skips.append((x_BTC, padding))
            x_BTC = stage.resample(masked(x_BTC, padding))
            if stage.halves and padding is not None:
                padding = padding.halved()
        for stage in cast("list[Stage]", self.mid_blocks):
            x_BTC = stage(x_BTC, time_BE, padding)
        for stage in cast("list[Stage]", self.up_blocks):
            skip, padding = skips.pop()
            # An odd length has one frame too many after doubling.
            x_BTC = torch.cat((x_BTC[:, : skip.shape[1]], skip), dim=-1)
            x_BTC = stage.resample(masked(stage(x_BTC, time_BE, padding), padding))
        x_BTC = self.final_block(x_BTC, padding)
        return masked(pointwise(self.final_proj, masked(x_BTC, padding)), padding)
