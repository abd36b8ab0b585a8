"""The exponential moving average of a training's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class Average:
    """Exponential moving average of weights, with a short memory at the start of a run."""

    def __init__(self, modules: nn.ModuleDict, names: tuple[str, ...], decay: float) -> None:
        self.decay = decay
        self._live = {f"{n}.{k}": v for n in names for k, v in modules[n].state_dict(keep_vars=True).items()}
        self.weights = {k: v.detach().clone() for k, v in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in self._live.items():
            average = self.weights[key]
            if average.is_floating_point():
                average.lerp_(value.detach(), 1 - decay)
            else:
                average.copy_(value.detach())

    @contextlib.contextmanager
    @torch.no_grad()
    def swapped(self) -> Iterator[None]:
        """The modules hold the average inside this block."""
        kept = {k: v.detach().clone() for k, v in self._live.items()}
        for key, value in self._live.items():
            value.copy_(self.weights[key])
        try:
            yield
        finally:
            for key, value in self._live.items():
                value.copy_(kept[key])
