"""Data parallel: every rank holds all weights, gradients are averaged while backward runs (`DistributedDataParallel`).

Every trainable parameter must take part in every backward on every rank; the model's ``run_all_parts`` sees to it, so
the search for unused parameters stays off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from osum_echat.training.engines.base import TorchEngine


class DdpEngine(TorchEngine):
    """Gradients are exchanged with the last micro-batch of a step only."""

    def distribute(self, module: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        where = None if self.device.type == "cpu" else [self.device]
        return DistributedDataParallel(module, device_ids=where, broadcast_buffers=False, gradient_as_bucket_view=True)

    def sync(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        assert isinstance(self.runner, DistributedDataParallel)
        return contextlib.nullcontext() if last else self.runner.no_sync()
