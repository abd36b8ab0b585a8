"""AdamW over the trainable parameters, with float32 masters where the weights are bfloat16.

States are created at once instead of at the first step, so that a checkpoint can be read into them. The learning rate is set from the
schedule before every step; nothing about it is state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from osum_echat.run.config import OptimConfig


@dataclass
class Group:
    """Parameters of one part of the model with their learning rate."""

    part: str
    lr: float
    named: list[tuple[str, nn.Parameter]]

    @property
    def size(self) -> int:
        return sum(p.numel() for _, p in self.named)


class Optimizer:
    """AdamW with one group for each part.

    ``masters``: keep a float32 copy of every lower-precision parameter; the update is computed there and rounded back.
    """

    def __init__(self, groups: list[Group], config: OptimConfig, masters: bool = False):
        self.groups = groups
        self.pairs: list[tuple[str, nn.Parameter, Tensor]] = []
        torch_groups = []
        for group in groups:
            members = []
            for name, param in group.named:
                separate = masters and param.dtype != torch.float32
                master: Tensor = nn.Parameter(param.detach().float()) if separate else param
                self.pairs.append((name, param, master))
                members.append(master)
            torch_groups.append({"params": members, "lr": group.lr, "base_lr": group.lr})
        self.inner = torch.optim.AdamW(
            torch_groups, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, lr=config.lr
        )
        for _, _, master in self.pairs:
            self.inner.state[master] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(master, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(master, memory_format=torch.preserve_format),
            }

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [param for _, param, _ in self.pairs]

    def fill_missing_gradients(self) -> None:
        """A parameter that this step's batch did not reach has gradient zero (as it has under ZeRO), not none."""
        for param in self.parameters:
            if param.grad is None:
                param.grad = torch.zeros_like(param)

    @torch.no_grad()
    def step(self, lr_factor: float) -> None:
        """One update at ``lr_factor`` times the groups' rates, from the parameters' ``.grad``."""
        for group in self.inner.param_groups:
            group["lr"] = group["base_lr"] * lr_factor
        for _, param, master in self.pairs:
            if master is not param:
                assert param.grad is not None
                master.grad = param.grad.float()
        self.inner.step()
        for _, param, master in self.pairs:
            if master is not param:
                param.copy_(master)
                master.grad = None

    def zero_grad(self) -> None:
        for param in self.parameters:
            param.grad = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of state under a stable name: ``exp_avg.<parameter>`` and so on."""
        for name, param, master in self.pairs:
            for key, value in self.inner.state[master].items():
                yield f"{key}.{name}", value
            if master is not param:
                yield f"master.{name}", master.detach()
