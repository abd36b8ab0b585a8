"""The published implementation's operations on our weights: the straightforward path that benchmarks/token2wav.py measures against.

Written to be plain, not slow: channels first with copies to and from channels last around every group of transformer blocks, mask
products everywhere, an attention bias repeated for every head and block, time embedding for both guidance rows, weight norm recomputed in
every convolution, Snake in five passes. The numbers are those of `osum_echat.token2wav` up to rounding, which the benchmark checks.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osum_echat.token2wav.estimator import Estimator, HalveRate, Stage, TransformerBlock
from osum_echat.token2wav.flow import Condition, FlowModel, time_grid
from osum_echat.token2wav.vocoder import ResBlock, Snake, Vocoder


def solve(flow: FlowModel, condition: Condition, noise_TM: Tensor, steps: int = 10) -> Tensor:
    """Mel [T, M] of one reply."""
    estimator, rate = flow.decoder.estimator, flow.config.solver.inference_cfg_rate
    x, mu, cond = noise_TM.T[None], condition.mu_TM.T[None], condition.cond_TM.T[None]
    mask = torch.ones_like(x[:, :1])
    grid = time_grid(steps)
    for now, then in itertools.pairwise(grid):
        two_x, two_mask = torch.cat((x, x)), torch.cat((mask, mask))
        two_mu = torch.cat((mu, torch.zeros_like(mu)))
        two_spk = torch.cat((condition.spk_M[None], torch.zeros_like(condition.spk_M[None])))
        two_cond = torch.cat((cond, torch.zeros_like(cond)))
        v = velocity(estimator, two_x, two_mask, two_mu, torch.full((2,), now), two_spk, two_cond)
        x = x + (then - now) * ((1.0 + rate) * v[:1] - rate * v[1:])
    return x[0].T[condition.prompt_frames :]


def velocity(net: Estimator, x: Tensor, mask: Tensor, mu: Tensor, t: Tensor, spk: Tensor, cond: Tensor) -> Tensor:
    time = net.time_mlp
    half = time.count
    rates = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angle = 1000.0 * t[:, None] * rates
    embedded = time.linear_2(F.silu(time.linear_1(torch.cat((angle.sin(), angle.cos()), dim=-1))))
    x = torch.cat((x, mu, spk[:, :, None].expand(-1, -1, x.shape[-1]), cond), dim=1)
    masks, skips = [mask], []
    for stage in net.down_blocks:
        assert isinstance(stage, Stage)
        x = _stage(stage, x, masks[-1], embedded)
        skips.append(x)
        down = stage[2]
        x = (down.conv if isinstance(down, HalveRate) else down)(x * masks[-1])  # type: ignore[operator]
        masks.append(masks[-1][:, :, ::2] if isinstance(down, HalveRate) else masks[-1])
    masks.pop()
    for stage in net.mid_blocks:
        assert isinstance(stage, Stage)
        x = _stage(stage, x, masks[-1], embedded)
    for stage in net.up_blocks:
        assert isinstance(stage, Stage)
        mask, skip = masks.pop(), skips.pop()
        x = _stage(stage, torch.cat((x[:, :, : skip.shape[-1]], skip), dim=1), mask, embedded)
        up = stage[2]
        x = (up if isinstance(up, nn.Conv1d) else up.conv)(x * mask)  # type: ignore[operator]
    x = F.mish(net.final_block.block[1](net.final_block.block[0](x * mask))) * mask  # type: ignore[operator]
    return net.final_proj(x * mask) * mask


def _stage(stage: Stage, x: Tensor, mask: Tensor, embedded: Tensor) -> Tensor:
    resnet = stage[0]
    first, second = resnet.block1.block, resnet.block2.block  # type: ignore[union-attr]
    h = F.mish(first[1](first[0](x * mask))) * mask  # type: ignore[index,operator]
    h = h + resnet.mlp(embedded)[:, :, None]  # type: ignore[operator]
    h = F.mish(second[1](second[0](h * mask))) * mask  # type: ignore[index,operator]
    x = (h + resnet.res_conv(x * mask)).transpose(1, 2).contiguous()  # type: ignore[operator]
    bias = (1.0 - mask) * -1.0e10
    for block in stage[1]:  # type: ignore[union-attr]
        x = _transformer(block, x, bias.expand(-1, x.shape[1], -1))
    return x.transpose(1, 2).contiguous()


def _transformer(block: TransformerBlock, x: Tensor, bias: Tensor) -> Tensor:
    attention = block.attn1
    batch, frames, _ = x.shape
    heads = attention.heads
    h = block.norm1(x)
    q, k, v = (f(h).view(batch, frames, heads, -1).transpose(1, 2) for f in (attention.to_q, attention.to_k, attention.to_v))
    full = bias.repeat_interleave(heads, dim=0).view(batch, heads, frames, frames)
    h = F.scaled_dot_product_attention(q, k, v, attn_mask=full)
    x = attention.to_out[0](h.transpose(1, 2).reshape(batch, frames, -1)) + x
    return block.ff.net[2](F.gelu(block.ff.net[0].proj(block.norm3(x)))) + x  # type: ignore[union-attr,operator]


class NormedVocoder:
    """The vocoder with its weight norm not folded: every convolution of the generator multiplies it out in every call."""

    def __init__(self, vocoder: Vocoder) -> None:
        self.vocoder = vocoder
        skipped = {id(m) for m in vocoder.source_downs}
        self.parts = {
            id(m): (m.weight.flatten(1).norm(dim=1).view(-1, 1, 1), m.weight)
            for m in vocoder.modules()
            if isinstance(m, (nn.Conv1d, nn.ConvTranspose1d)) and id(m) not in skipped
        }

    def conv(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, (nn.Conv1d, nn.ConvTranspose1d))
        scale, direction = self.parts[id(module)]
        weight = torch._weight_norm(direction, scale, 0)
        if isinstance(module, nn.ConvTranspose1d):
            return F.conv_transpose1d(x, weight, module.bias, module.stride, module.padding)
        return F.conv1d(x, weight, module.bias, module.stride, module.padding, module.dilation)

    def f0(self, mel_BMT: Tensor) -> Tensor:
        x = mel_BMT
        for layer in self.vocoder.f0_predictor.condnet:
            x = self.conv(layer, x) if isinstance(layer, nn.Conv1d) else layer(x)
        return self.vocoder.f0_predictor.classifier(x.transpose(1, 2)).squeeze(-1).abs()

    def resblock(self, block: ResBlock, x: Tensor) -> Tensor:
        for snake1, conv1, snake2, conv2 in zip(block.activations1, block.convs1, block.activations2, block.convs2, strict=True):
            h = self.conv(conv1, _snake(snake1, x))
            x = self.conv(conv2, _snake(snake2, h)) + x
        return x

    def decode(self, mel_BMT: Tensor, source_B1S: Tensor) -> Tensor:
        net = self.vocoder
        spectrum = net.spectrum(source_B1S)
        kinds = len(net.config.resblock_kernel_sizes)
        x = self.conv(net.conv_pre, mel_BMT)
        for stage, up in enumerate(net.ups):
            x = self.conv(up, F.leaky_relu(x, net.config.lrelu_slope))
            if stage == len(net.ups) - 1:
                x = F.pad(x, (1, 0), mode="reflect")
            x = x + self.resblock(net.source_resblocks[stage], net.source_downs[stage](spectrum))  # type: ignore[arg-type]
            x = sum(self.resblock(net.resblocks[stage * kinds + k], x) for k in range(kinds)) / kinds  # type: ignore[assignment,arg-type,misc]
        return net.to_wave(self.conv(net.conv_post, F.leaky_relu(x)))


def _snake(snake: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(snake, Snake)
    alpha = snake.alpha[None, :, None]
    return x + (1.0 / (alpha + 1e-9)) * torch.pow(torch.sin(x * alpha), 2)
