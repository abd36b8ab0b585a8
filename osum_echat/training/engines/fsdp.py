"""Fully sharded data parallel (FSDP2): each block's weights, gradients and optimiser states are split over the ranks.

`fully_shard` per block, the rest (tables, heads) at the root. Shards are float32 and are their own masters; with
``bf16`` the gathered copies and the arithmetic are bfloat16 and gradients are summed in float32. Gradients are reduced
after every micro-batch: that keeps them sharded, which is what the technique is for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from osum_echat.training.config import ConfigError
from osum_echat.training.engines.base import TorchEngine


class FsdpEngine(TorchEngine):
    """FSDP2 over all ranks of the run."""

    shards_weights = True

    def distribute(self, module: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        if self.config.precision == "fp16":
            raise ConfigError("engine fsdp does not train in fp16 (no sharded loss scaling); use precision=bf16 or autocast")
        low = self.config.precision == "bf16"
        options: dict[str, Any] = {
            "mesh": init_device_mesh(self.device.type, (self.world.size,)),
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if low else None, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            "offload_policy": CPUOffloadPolicy() if self.config.engine.cpu_offload else OffloadPolicy(),
        }
        for block in blocks:
            fully_shard(block, reshard_after_forward=self.config.engine.reshard_after_forward, **options)
        fully_shard(module, reshard_after_forward=False, **options)
        return module

    def sync(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()
