"""Activation checkpointing: what the backward pass computes again.

Everything but a block's input costs a second forward pass, a quarter of the work of training. "selective" keeps the
results of products and attention, which are nearly all of the work, and computes again what lies between them (norms,
rotations, activations, sums), which is most of the memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from osum_echat.model.config import Recompute

_KEPT = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_dot_product",
    "aten::_flash_attention",
    "aten::_efficient_attention",
    "torch_attn::_varlen_attn",
)


def checkpoint_options(recompute: Recompute) -> dict[str, Any]:
    """Arguments of `torch.utils.checkpoint.checkpoint`."""
    options: dict[str, Any] = {"use_reentrant": False}
    return options | {"context_fn": _contexts} if recompute == "selective" else options


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name() if isinstance(operator, torch._ops.OpOverload) else str(operator)
    return CheckpointPolicy.MUST_SAVE if name.startswith(_KEPT) else CheckpointPolicy.PREFER_RECOMPUTE
