"""The vocoder's resblocks for a CPU: fewer multiplications, and every pass within the cache.

Nine tenths of HiFT's time are convolutions of 3, 7 and 11 taps over 128 and 256 channels. A convolution over tiles of N
samples is a product of spectra: with the real Fourier basis and three multiplications for each complex product, 11 taps
cost 2.1 instead of 11 channel products a sample, 7 taps 2.3. The transforms are matrix products too, so all runs at the
speed of matrix multiplication. Time is walked in blocks, with Snake applied to a block just before its convolution.

The output is the plain convolution's to float32 rounding. The price is memory: transformed weights are 3 to 4 times
larger.

Shapes: B pieces of one length, T time steps, C channels, N tile, V = N - taps + 1 outputs of a tile, R = products for
each tile (3 N / 2 - 1).
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osum_echat.token2wav.vocoder import ResBlock, Snake, Vocoder

TILES = {7: 16, 11: 32}
"""Taps -> tile. Other sizes are convolved directly: 3 taps gain nothing over oneDNN's kernel."""

MIN_CHANNELS = 96
"""Below this the transforms cost more than they save."""

BLOCK = 2800
"""Time steps of a block (of one piece, or of several short ones): enough rows for matrix products to be efficient, few
enough for its tiles to stay in a large cache."""


@functools.lru_cache(maxsize=8)
def bases(tile: int, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices (into [R, N], weight [R, taps], back [V, R]) with conv(x, w) = back @ ((into @ x) * (weight @ w)),
    float64.

    For a frequency with real and imaginary parts a, b of the signal and c, d of the (conjugate) filter, the product
    needs ac, bd and (a + b)(c + d) only; the first and the middle frequency are real.
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


class Scratch:
    """Memory for intermediate results that the convolutions of one stage share: fresh memory for each would cost more
    (page faults) than much of the arithmetic. Not for two threads at once."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor; the previous one of this name is overwritten."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[name] = self._like.new_empty(size)
        return buffer[:size].view(shape)


class FastConv:
    """Snake and one convolution of a resblock on [B, T, C]."""

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
            self.weight_OI1K = weight_OIK.unsqueeze(2).contiguous(memory_format=torch.channels_last)

    def __call__(self, x_BTC: Tensor, scratch: Scratch | None = None, out_BTC: Tensor | None = None) -> Tensor:
        """Convolution of snake(x), zero-padded to the same length, [B, T, C]; into ``out_BTC`` (`padded` time steps) if
        given and tiled."""
        batch, frames, channels = x_BTC.shape
        reach = (self.taps - 1) * self.dilation
        scratch = scratch or Scratch(x_BTC)
        if not self.tile:
            return self._direct(x_BTC, scratch)
        # A block is a whole number of tiles for every dilation phase, so that blocks do not overlap.
        unit = self.dilation * (self.tile - self.taps + 1)
        length = self.padded(frames)
        block = min(length, unit * max(1, BLOCK // unit))
        together = max(1, BLOCK // block)
        out_BTC = x_BTC.new_empty(batch, length, channels) if out_BTC is None else out_BTC
        for piece in range(0, batch, together):
            for start in range(0, length, block):
                out = out_BTC[piece : piece + together, start : start + block]
                h_BTC = scratch.take("snake", len(out), out.shape[1] + reach, channels)
                self._snake(x_BTC[piece : piece + together], start - reach // 2, h_BTC)
                self._tiles(h_BTC, out, scratch)
        return out_BTC[:, :frames]

    def padded(self, frames: int) -> int:
        """Time steps of an output of whole tiles."""
        unit = self.dilation * (self.tile - self.taps + 1) if self.tile else 1
        return -(-frames // unit) * unit

    def _snake(self, x_BTC: Tensor, start: int, h_BTC: Tensor) -> None:
        """snake(x) from ``start`` on into ``h_BTC``, zeros outside of the signal (Snake keeps zero)."""
        piece = x_BTC[:, max(0, start) : max(0, start + h_BTC.shape[1])]
        before, length = max(0, -start), piece.shape[1]
        h_BTC[:, :before] = 0.0
        h_BTC[:, before + length :] = 0.0
        inner = h_BTC[:, before : before + length]
        torch.mul(piece, self.alpha_C, out=inner)
        inner.sin_().square_().mul_(self.scale_C).add_(piece)

    def _tiles(self, h_BTC: Tensor, out_BTC: Tensor, scratch: Scratch) -> None:
        """Tiles of every dilation phase, their spectra, one matrix product each, and back."""
        batch, length, channels = h_BTC.shape
        dilation, valid, products = self.dilation, self.tile - self.taps + 1, len(self.into_RN)
        rows = out_BTC.shape[1] // (valid * dilation)
        step, width = dilation * channels, batch * rows * dilation * channels
        tiles = scratch.take("tiles", self.tile, batch, rows, dilation, channels)
        tiles.copy_(h_BTC.as_strided(tiles.shape, (step, length * channels, valid * step, channels, 1)))
        spectra = torch.mm(self.into_RN, tiles.view(self.tile, width), out=scratch.take("spectra", products, width))
        y = scratch.take("products", products, batch * rows * dilation, channels)
        torch.bmm(spectra.view(y.shape), self.weight_RIO, out=y)
        y = torch.mm(self.back_VR, y.view(products, width), out=scratch.take("tiles", valid, width))
        y = y.view(valid, batch, rows, dilation, channels).permute(1, 2, 0, 3, 4)
        torch.add(y, self.bias_C, out=out_BTC.view(batch, rows, valid, dilation, channels))

    def _direct(self, x_BTC: Tensor, scratch: Scratch) -> Tensor:
        """oneDNN's convolution: as an image of height 1 the layout is channels-last, its fast one."""
        h_BTC = scratch.take("whole", *x_BTC.shape)
        for start in range(0, x_BTC.shape[1], BLOCK):
            self._snake(x_BTC, start, h_BTC[:, start : start + BLOCK])
        image = h_BTC.transpose(1, 2)[:, :, None]
        reach = (self.taps - 1) * self.dilation
        y = F.conv2d(image, self.weight_OI1K, self.bias_C, padding=(0, reach // 2), dilation=(1, self.dilation))
        return y[:, :, 0].transpose(1, 2)


class FastResBlock:
    """A resblock on [B, T, C]."""

    def __init__(self, block: ResBlock) -> None:
        first = [FastConv(s, c) for s, c in zip(block.activations1, block.convs1, strict=True)]  # type: ignore[arg-type]
        second = [FastConv(s, c) for s, c in zip(block.activations2, block.convs2, strict=True)]  # type: ignore[arg-type]
        self.pairs = list(zip(first, second, strict=True))

    def __call__(self, x_BTC: Tensor, scratch: Scratch) -> Tensor:
        batch, frames, channels = x_BTC.shape
        for first, second in self.pairs:
            between = scratch.take("between", batch, first.padded(frames), channels)
            x_BTC = second(first(x_BTC, scratch, between), scratch).add_(x_BTC)
        return x_BTC


class FastVocoder(Vocoder):
    """`Vocoder` for inference; call `prepare` once the weights are in place."""

    def prepare(self) -> FastVocoder:
        """Transform the resblocks' weights. They are copies: weights loaded later would have no effect without another
        call."""
        self._fast_source = [FastResBlock(b) for b in self.source_resblocks]  # type: ignore[arg-type]
        self._fast = [FastResBlock(b) for b in self.resblocks]  # type: ignore[arg-type]
        return self

    def stage(self, index: int, x_BCT: Tensor, source_BCT: Tensor) -> Tensor:
        kinds = len(self.config.resblock_kernel_sizes)
        scratch = Scratch(x_BCT)
        x_BTC = self._fast_source[index](source_BCT.transpose(1, 2).contiguous(), scratch).add_(x_BCT.transpose(1, 2))
        mixed = self._fast[index * kinds](x_BTC, scratch)
        for block in self._fast[index * kinds + 1 : (index + 1) * kinds]:
            mixed = mixed.add_(block(x_BTC, scratch))
        return mixed.div_(kinds).transpose(1, 2)
