"""Train the flow (speech tokens to log-mel) by conditional flow matching and write its weights as ``flow.pt``.

    python -m osum_echat.training.token2wav.flow --config recipes/mini/conf/token2wav/flow.yaml [key=value ...]

The optimal-transport path of Lipman et al. (arXiv 2210.02747) as in CosyVoice: x_t = (1 - (1 - s) t) z + t x with
target velocity x - (1 - s) z, conditions dropped together with probability ``model.solver.training_cfg_rate``. A part
of the rows shows the model a prompt: either the beginning of the recording, or another recording of the same voice
joined before it, which is what it meets at inference.

Shapes: B batch, N tokens, T mel frames, M mel bins, S speaker embedding.
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from osum_echat.token2wav.checkpoint import load_into, read_weights
from osum_echat.token2wav.config import FlowConfig
from osum_echat.token2wav.estimator import Padding
from osum_echat.token2wav.flow import FlowModel
from osum_echat.training.token2wav.directory import describe
from osum_echat.training.token2wav.loop import command
from osum_echat.training.token2wav.recipe import Means, adamw
from osum_echat.training.token2wav.spoken import FlowBatch, Row, SpokenRecipe, SpokenTraining, masked_mean, regulated


@dataclass(kw_only=True)
class FlowTraining(SpokenTraining):
    """The YAML file of this command."""

    target: Path = Path("exp/token2wav/model/flow.pt")
    init: Path | None = None  # a token2wav directory whose flow, of the same sizes, is trained on: for another voice
    model: FlowConfig = field(default_factory=FlowConfig)
    # Squared distance between mel and regulated tokens; 0 as published, more converges sooner.
    prior_weight: float = 0.0
    prior_steps: int = 0  # at the start, only that distance: it needs the encoder alone, a tenth of the cost of a step

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior_steps and not self.prior_weight:
            raise ValueError("prior_steps needs a prior_weight above 0: what only the start trained would be forgotten")


class FlowRecipe(SpokenRecipe[FlowTraining]):
    """The flow, its loss, measures and export."""

    averaged: tuple[str, ...] = ("flow",)

    def __init__(self, cfg: FlowTraining) -> None:
        super().__init__(cfg, cfg.model)
        self.flow = FlowModel(cfg.model)
        if cfg.init is None:
            self._start_at_mean_mel()
        else:
            state, path = read_weights(cfg.init, "flow")
            load_into(self.flow, state, str(path))
        self.modules = nn.ModuleDict({"flow": self.flow}).to(self.device)
        self.optimizers = {"flow": adamw(self.flow.parameters(), cfg.optim)}

    def _start_at_mean_mel(self) -> None:
        """The log-mel is not normalised: let the first velocity be its mean, so that no step is spent on finding it."""
        mels = [item.mel_TM.astype(np.float32) for item in itertools.islice(self.valid, 16)]
        if not mels:
            raise ValueError(f"none of the first held-out records can be used: {self.valid.skips}")
        mean_M = torch.from_numpy(np.concatenate(mels).mean(0))
        last = self.flow.length_regulator.model[-1]
        assert isinstance(last, nn.Conv1d) and last.bias is not None
        bias = self.flow.decoder.estimator.final_proj.bias
        assert bias is not None
        with torch.no_grad():
            bias.copy_(mean_M)
            if self.cfg.prior_weight:
                last.bias.copy_(mean_M)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def train_step(self, step: int) -> dict[str, float]:
        rng = self.rng(step)
        batch = self.batch(self.rows(self.batches(step), rng))
        if step < self.cfg.prior_steps:
            loss, parts = self._prior_loss(batch)
        else:
            loss, parts = self._loss(batch, rng, self.cfg.model.solver.training_cfg_rate)
        return {**parts, "grad": self.update("flow", loss)}

    def _prior_loss(self, batch: FlowBatch) -> tuple[Tensor, dict[str, float]]:
        with self.autocast():
            mu_BTM = regulated(self.flow, batch)
        loss = masked_mean((mu_BTM - batch.mel_BTM).square(), Padding.of(batch.lengths_B, batch.mel_BTM.shape[1]))
        return loss, {"prior": float(loss.detach())}

    def _loss(self, batch: FlowBatch, rng: np.random.Generator, drop_rate: float) -> tuple[Tensor, dict[str, float]]:
        rows = len(batch.rows)
        noise_BTM = torch.from_numpy(rng.standard_normal(batch.mel_BTM.shape, dtype=np.float32)).to(self.device)
        t_B = torch.from_numpy(rng.random(rows)).float().to(self.device)
        if self.cfg.model.solver.t_scheduler == "cosine":
            t_B = 1 - torch.cos(t_B * 0.5 * math.pi)
        kept_B11 = torch.from_numpy(rng.random(rows) >= drop_rate).float().to(self.device)[:, None, None]
        keep = 1 - self.cfg.model.solver.sigma_min
        t_B11 = t_B[:, None, None]
        noisy_BTM = (1 - keep * t_B11) * noise_BTM + t_B11 * batch.mel_BTM
        padding = Padding.of(batch.lengths_B, batch.mel_BTM.shape[1])
        with self.autocast():
            mu_BTM = regulated(self.flow, batch)
            spk_BM = self.flow.speaker(batch.embedding_BS)
            velocity_BTM = self.flow.decoder.estimator(
                noisy_BTM, mu_BTM * kept_B11, t_B, spk_BM * kept_B11[:, 0], batch.cond_BTM * kept_B11, padding
            ).float()
        flow_loss = masked_mean((velocity_BTM - (batch.mel_BTM - keep * noise_BTM)).square(), padding)
        loss, parts = flow_loss, {"flow": float(flow_loss.detach())}
        if self.cfg.prior_weight:
            prior = masked_mean((mu_BTM - batch.mel_BTM).square(), padding)
            loss = loss + self.cfg.prior_weight * prior
            parts["prior"] = float(prior.detach())
        return loss, parts

    def validate(self) -> dict[str, float]:
        """The loss without dropping, and the L1 distance between solved and true log-mel, over some held-out
        recordings."""
        means = Means()
        for count, spoken in self.held_out():
            rng = self.rng(0, count)
            batch = self.batch([Row([spoken], 0)])
            _, parts = self._loss(batch, rng, drop_rate=0.0)
            condition = self.flow.condition(
                torch.from_numpy(spoken.tokens_N).to(self.device),
                torch.zeros(0, dtype=torch.long, device=self.device),
                batch.mel_BTM.new_zeros(0, batch.mel_BTM.shape[-1]),
                self.flow.speaker(batch.embedding_BS)[0],
            )
            noise_TM = torch.from_numpy(rng.standard_normal(condition.mu_TM.shape, dtype=np.float32)).to(self.device)
            solved_TM = self.flow.solve([condition], [noise_TM])[0]
            distance = (solved_TM - batch.mel_BTM[0, : len(solved_TM)]).abs().mean()
            means.add({**parts, "solved_l1": float(distance)})
        return means.values()

    def export(self) -> list[Path]:
        """``flow.pt`` (a flat state dict) and its part of ``cosyvoice.yaml``."""
        return [self.write_weights(self.flow), describe(self.cfg.target.parent, flow=self.cfg.model)]


def main(argv: list[str] | None = None) -> int:
    return command(FlowTraining, FlowRecipe, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
