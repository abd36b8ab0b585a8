"""The vocoder's resblocks for a CPU: fewer multiplications, and every pass within the cache.

Nine tenths of HiFT's time are convolutions of 3, 7 and 11 taps over 128 and 256 channels. A convolution over tiles of N samples is a
product of spectra: with the real Fourier basis and three multiplications for each complex product, 11 taps cost 2.1 instead of 11
channel products a sample, 7 taps 2.3. The transforms are matrix products too, so all runs at the speed of matrix multiplication.
Time is walked in blocks, with Snake applied to a block just before its convolution.

The output is the plain convolution's to float32 rounding. The price is memory: transformed weights are 3 to 4 times larger.

Shapes: T time steps, C channels, N tile, V = N - taps + 1 outputs of a tile, R = products for each tile (3 N / 2 - 1).
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osum_echat.token2wav.vocoder import ResBlock, Snake, Vocoder

TILES = {7: 16, 11: 32}
"""Taps -> tile. Other sizes are convolved directly: 3 taps gain nothing."""

MIN_CHANNELS = 96
"""Below this the transforms cost more than they save."""

BLOCK = 2800
"""Time steps of a block: enough rows for matrix products to be efficient, few enough for its tiles to stay in a large cache."""


@functools.lru_cache(maxsize=8)
def bases(tile: int, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices (into [R, N], weight [R, taps], back [V, R]) with conv(x, w) = back @ ((into @ x) * (weight @ w)), float64.

    For a frequency with real and imaginary parts a, b of the signal and c, d of the (conjugate) filter, the product needs ac, bd and
    (a + b)(c + d) only; the first and the middle frequency are real.
    """

    def angles(count: int, f: int) -> tuple[Tensor, Tensor]:
        turn = 2.0 * math.pi * f / tile * torch.arange(count, dtype=torch.float64)
        return turn.cos(), turn.sin()

    into: list[Tensor] = []
    weight: list[Tensor] = []
    back: list[Tensor] = []
    for f in range(tile // 2 + 1):
        (x_cos, x_sin), (w_cos, w_sin), (y_cos, y_sin) = angles(tile, f), angles(taps, f), angles(tile - taps + 1, f)
        if f in (0, tile // 2):
            into, weight, back = [*into, x_cos], [*weight, w_cos], [*back, y_cos / tile]
            continue
        into += [x_cos, -x_sin, x_cos - x_sin]
        weight += [w_cos, w_sin, w_cos + w_sin]
        back += [2 / tile * (y_cos + y_sin), 2 / tile * (y_sin - y_cos), -2 / tile * y_sin]
    return torch.stack(into), torch.stack(weight), torch.stack(back, dim=1)


class FastConv:
    """Snake and one convolution of a resblock on [T, C], in blocks."""

    def __init__(self, snake: Snake, conv: nn.Conv1d) -> None:
        self.alpha_C = snake.alpha.detach()
        self.scale_C = 1.0 / (self.alpha_C + 1e-9)
        assert conv.bias is not None
        self.bias_C = conv.bias.detach()
        self.taps, self.dilation = conv.kernel_size[0], conv.dilation[0]
        weight_OIK = conv.weight.detach()
        self.tile = TILES.get(self.taps, 0) if weight_OIK.shape[1] >= MIN_CHANNELS else 0
        if self.tile:
            into, weight, back = bases(self.tile, self.taps)
            self.into_RN, self.back_VR = into.to(weight_OIK), back.to(weight_OIK)
            self.weight_RIO = torch.einsum("rk,oik->rio", weight, weight_OIK.double()).to(weight_OIK).contiguous()
        else:
            self.weight_KIO = weight_OIK.permute(2, 1, 0).contiguous()

    def __call__(self, x_TC: Tensor) -> Tensor:
        """Convolution of snake(x), zero-padded to the same length, [T, C]."""
        frames, channels = x_TC.shape
        reach = (self.taps - 1) * self.dilation
        # A block is a whole number of tiles for every dilation phase, so that blocks do not overlap.
        unit = self.dilation * (self.tile - self.taps + 1 if self.tile else 1)
        block = unit * max(1, BLOCK // unit)
        out_TC = x_TC.new_empty(-(-frames // unit) * unit, channels)
        for start in range(0, frames, block):
            out = out_TC[start : start + block]
            h_TC = self._input(x_TC, start - reach // 2, len(out) + reach)
            if self.tile:
                self._tiles(h_TC, out)
            else:
                self._direct(h_TC, out)
        return out_TC[:frames]

    def _input(self, x_TC: Tensor, start: int, count: int) -> Tensor:
        """snake(x) from ``start`` on, zeros outside of the signal (Snake keeps zero)."""
        piece = x_TC[max(0, start) : max(0, start + count)]
        before = max(0, -start)
        h_TC = torch.mul(piece, self.alpha_C).sin_().square_().mul_(self.scale_C).add_(piece)
        return F.pad(h_TC, (0, 0, before, count - before - len(piece)))

    def _tiles(self, h_TC: Tensor, out_TC: Tensor) -> None:
        """Tiles of every dilation phase, their spectra, one matrix product each, and back."""
        channels, dilation = h_TC.shape[1], self.dilation
        valid = self.tile - self.taps + 1
        rows = len(out_TC) // (valid * dilation)
        step = dilation * channels
        tiles = h_TC.as_strided((self.tile, rows, dilation, channels), (step, valid * step, channels, 1))
        spectra = (self.into_RN @ tiles.reshape(self.tile, -1)).view(-1, rows * dilation, channels)
        products = torch.bmm(spectra, self.weight_RIO)
        y = (self.back_VR @ products.view(len(products), -1)).view(valid, rows, dilation, channels)
        torch.add(y.transpose(0, 1), self.bias_C, out=out_TC.view(rows, valid, dilation, channels))

    def _direct(self, h_TC: Tensor, out_TC: Tensor) -> None:
        """One matrix product for each tap."""
        torch.addmm(self.bias_C, h_TC[: len(out_TC)], self.weight_KIO[0], out=out_TC)
        for tap in range(1, self.taps):
            out_TC.addmm_(h_TC[tap * self.dilation :][: len(out_TC)], self.weight_KIO[tap])


class FastResBlock:
    """A resblock on [T, C]."""

    def __init__(self, block: ResBlock) -> None:
        first = [FastConv(s, c) for s, c in zip(block.activations1, block.convs1, strict=True)]  # type: ignore[arg-type]
        second = [FastConv(s, c) for s, c in zip(block.activations2, block.convs2, strict=True)]  # type: ignore[arg-type]
        self.pairs = list(zip(first, second, strict=True))

    def __call__(self, x_TC: Tensor) -> Tensor:
        for first, second in self.pairs:
            x_TC = second(first(x_TC)).add_(x_TC)
        return x_TC


class FastVocoder(Vocoder):
    """`Vocoder` for inference; call `prepare` once the weights are in place."""

    def prepare(self) -> FastVocoder:
        """Transform the resblocks' weights. They are copies: weights loaded later would have no effect without another call."""
        self._fast_source = [FastResBlock(b) for b in self.source_resblocks]  # type: ignore[arg-type]
        self._fast = [FastResBlock(b) for b in self.resblocks]  # type: ignore[arg-type]
        return self

    def stage(self, index: int, x_BCT: Tensor, source_BCT: Tensor) -> Tensor:
        kinds = len(self.config.resblock_kernel_sizes)
        rows = []
        for x_CT, source_CT in zip(x_BCT, source_BCT, strict=True):
            x_TC = self._fast_source[index](source_CT.T.contiguous()).add_(x_CT.T)
            mixed = self._fast[index * kinds](x_TC)
            for block in self._fast[index * kinds + 1 : (index + 1) * kinds]:
                mixed = mixed.add_(block(x_TC))
            rows.append(mixed.div_(kinds).T)
        return torch.stack(rows)
