"""Flow matching from speech tokens to log-mel: condition, ODE, classifier-free guidance.

Parameter names are those of the released ``flow.pt``, so its state dict loads as it is and a trained one can be saved
the same way.

Shapes: B batch, N reply tokens, P prompt tokens, L = P + N, T mel frames (prompt and reply), M mel bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osum_echat import device as devices
from osum_echat.token2wav.config import FlowConfig, SolverConfig
from osum_echat.token2wav.encoder import LengthRegulator, TokenEncoder, stretch, stretch_reply
from osum_echat.token2wav.estimator import Estimator, EstimatorFeedForward, Padding, SelfAttention


@dataclass(frozen=True)
class Condition:
    """What the ODE is conditioned on, for one row: ``mu_TM`` tokens at mel rate, ``spk_M`` speaker, ``cond_TM`` prompt
    mel."""

    mu_TM: Tensor
    spk_M: Tensor
    cond_TM: Tensor
    prompt_frames: int

    @property
    def frames(self) -> int:
        return self.mu_TM.shape[0]


def time_grid(steps: int, schedule: str = "cosine") -> list[float]:
    """Times 0 .. 1 of the Euler solver, steps + 1 values. "cosine" starts slowly, "linear" is even."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, found {steps}")
    if schedule == "cosine":
        return [1.0 - math.cos(k / steps * 0.5 * math.pi) for k in range(steps + 1)]
    if schedule == "linear":
        return [k / steps for k in range(steps + 1)]
    raise ValueError(f"schedule must be cosine or linear, found {schedule!r}")


class FlowDecoder(nn.Module):
    """Holder of the estimator under its released name, and the ODE around it."""

    def __init__(self, mel_bins: int, config: FlowConfig) -> None:
        super().__init__()
        self.config: SolverConfig = config.solver
        self.estimator = Estimator(mel_bins, config.estimator)
        self.short_products = False
        """Round products as `device.short_products` says."""
        self._recordings = devices.Recordings()

    def solve(
        self,
        noise_BTM: Tensor,
        mu_BTM: Tensor,
        spk_BM: Tensor,
        cond_BTM: Tensor,
        padding: Padding | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        schedule: str | None = None,
    ) -> Tensor:
        """Noise to mel by Euler steps, [B, T, M].

        Each step takes (1 + g) * v(condition) - g * v(nothing), with ``guidance`` g; g = 0 skips the unconditional
        half. ``schedule`` is named in `time_grid`. None: the directory's own; a distilled flow takes nothing else.
        """
        steps, guidance, schedule = self.config.chosen(steps, guidance, schedule)
        grid = time_grid(steps, schedule)
        times_S = devices.send(grid[:-1], noise_BTM.device, torch.float32)
        embedded_SE = self.estimator.time_mlp(times_S).to(self.estimator.final_proj.weight.dtype)
        mask = () if padding is None else (padding.mask_BT1,)
        fixed = (tuple(grid), guidance, "" if padding is None else padding.statistics)
        with devices.short_products(noise_BTM.device, self.short_products):
            return self._recordings(self._euler, noise_BTM, mu_BTM, spk_BM, cond_BTM, embedded_SE, *mask, fixed=fixed)

    def _euler(self, *arguments: Any) -> Tensor:
        """All steps as one function of tensors and numbers, so that it can be recorded: noise, condition, speaker,
        prompt mel, embedded times, the padding's mask if there is one; then times, guidance and what norms average (see
        `solve`)."""
        *tensors, grid, guidance, statistics = arguments
        noise_BTM, mu_BTM, spk_BM, cond_BTM, embedded_SE = tensors[:5]
        padding = Padding(tensors[5], statistics) if len(tensors) > 5 else None
        dtype = self.estimator.final_proj.weight.dtype  # the ODE itself stays float32
        x_BTM = noise_BTM * self.config.temperature
        batch, _, bins = x_BTM.shape
        guided = guidance != 0.0
        rows = 2 * batch if guided else batch
        inputs = x_BTM.new_zeros(rows, x_BTM.shape[1], 4 * bins, dtype=dtype)  # the unconditional rows keep their zeros
        inputs[:batch, :, bins:] = torch.cat((mu_BTM, spk_BM[:, None].expand_as(mu_BTM), cond_BTM), dim=-1)
        if padding is not None and guided:
            padding = Padding(padding.mask_BT1.repeat(2, 1, 1).to(dtype), padding.statistics)
        for step in range(len(grid) - 1):
            inputs.view(-1, batch, *inputs.shape[1:])[..., :bins] = x_BTM
            v = self.estimator.velocity(inputs, embedded_SE[step : step + 1], padding).to(x_BTM)
            if guided:
                v = (1.0 + guidance) * v[:batch] - guidance * v[batch:]
            x_BTM = x_BTM + (grid[step + 1] - grid[step]) * v
        return x_BTM


class FlowModel(nn.Module):
    """Tokens to mel, released parameter names. Encoder, regulator and the ODE run in float32; `prepare` chooses the
    U-Net's type."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        bins = config.output_size
        self.input_embedding = nn.Embedding(config.vocab_size, config.input_size)
        self.spk_embed_affine_layer = nn.Linear(config.spk_embed_dim, bins)
        self.encoder = TokenEncoder(config.input_size, config.encoder)
        self.encoder_proj = nn.Linear(config.encoder.output_size, bins)
        self.length_regulator = LengthRegulator(bins, config.regulator_blocks, config.regulator_groups)
        self.decoder = FlowDecoder(bins, config)

    def prepare(self, dtype: torch.dtype = torch.float32) -> None:
        """For inference only, on the final device: the U-Net, nearly all of the work, in ``dtype``, its products joined
        and, where the CPU has the kernels, packed.

        The model cannot be trained or saved afterwards.
        """
        estimator = self.decoder.estimator.to(dtype)
        estimator.time_mlp.float()
        weight = estimator.final_proj.weight
        kernel = devices.linear_kernel(weight.device, weight.dtype, weight.shape[1], weight.numel(), many_rows=True)
        for module in list(estimator.modules()):
            if isinstance(module, (SelfAttention, EstimatorFeedForward)):
                module.prepare(kernel == "packed")

    def check_tokens(self, tokens_N: Tensor) -> None:
        """Raise ValueError for ids outside the codebook, naming the first one."""
        outside = ((tokens_N < 0) | (tokens_N >= self.config.vocab_size)).nonzero()
        if len(outside):
            at = int(outside[0, -1])
            raise ValueError(
                f"speech token {int(tokens_N[..., at].flatten()[0])} at position {at} is outside 0..{self.config.vocab_size - 1}; "
                "remove end-of-speech and other special ids before synthesis"
            )

    def speaker(self, embedding_BS: Tensor) -> Tensor:
        """A speaker embedding (any length) to what the estimator reads, [B, M]."""
        return self.spk_embed_affine_layer(F.normalize(embedding_BS, dim=1))

    def encode(self, tokens_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Tokens to hidden states at token rate, [B, L, M]; ``mask_BL`` True for real tokens."""
        x_BLI = self.input_embedding(tokens_BL)
        if mask_BL is not None:
            x_BLI = x_BLI * mask_BL[..., None]
        return self.encoder_proj(self.encoder(x_BLI, mask_BL))

    def checked(self, tokens: Tensor | Sequence[int]) -> Tensor:
        """Ids on the model's device, after `check_tokens`; a list is looked at on the host and sent without waiting."""
        if isinstance(tokens, Tensor):
            self.check_tokens(tokens)
            return tokens
        size = self.config.vocab_size
        if any(not 0 <= token < size for token in tokens):
            self.check_tokens(torch.tensor(tokens))
        return devices.send(tokens, self.input_embedding.weight.device, torch.long)

    def condition(
        self, tokens_N: Tensor | Sequence[int], prompt_tokens_P: Tensor, prompt_mel_TM: Tensor, spk_M: Tensor
    ) -> Condition:
        """The condition of one reply after one prompt (both prompt parts may be empty). Checks the ids."""
        h_1LM = self.encode(torch.cat((prompt_tokens_P, self.checked(tokens_N)))[None])
        mu_TM = self.length_regulator(self.stretch_whole(h_1LM, len(prompt_tokens_P), len(prompt_mel_TM)))[0]
        return self.condition_of(mu_TM, prompt_mel_TM, spk_M)

    def stretch_whole(self, h_1LM: Tensor, prompt_tokens: int, prompt_frames: int) -> Tensor:
        """What `encode` made of so many tokens of the prompt and the whole reply, at mel rate."""
        stretched = stretch_reply(h_1LM[:, prompt_tokens:], self.config.input_frame_rate)
        if not prompt_tokens:
            return stretched
        return torch.cat((stretch(h_1LM[:, :prompt_tokens], prompt_frames), stretched), dim=1)

    @staticmethod
    def condition_of(mu_TM: Tensor, prompt_mel_TM: Tensor, spk_M: Tensor) -> Condition:
        """``mu_TM``: of the length regulator, the prompt's frames first."""
        cond_TM = torch.zeros_like(mu_TM)
        cond_TM[: len(prompt_mel_TM)] = prompt_mel_TM
        return Condition(mu_TM, spk_M, cond_TM, len(prompt_mel_TM))

    def solve(
        self,
        conditions: Sequence[Condition],
        noises: Sequence[Tensor],
        steps: int | None = None,
        guidance: float | None = None,
        schedule: str | None = None,
    ) -> list[Tensor]:
        """Mel of each row without its prompt, [T_i, M], float32. ``noises`` are [T_i, M], prompt frames included."""
        lengths = [c.frames for c in conditions]
        frames = max(lengths)

        def padded(rows: Sequence[Tensor]) -> Tensor:
            return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)

        padding = Padding.of(lengths, frames, noises[0].dtype, noises[0].device)
        mel_BTM = self.decoder.solve(
            padded(noises),
            padded([c.mu_TM for c in conditions]),
            torch.stack([c.spk_M for c in conditions]),
            padded([c.cond_TM for c in conditions]),
            padding,
            steps,
            guidance,
            schedule,
        )
        return [mel[c.prompt_frames : c.frames].float() for mel, c in zip(mel_BTM, conditions, strict=True)]
