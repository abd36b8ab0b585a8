"""Attention of sequences of different length that stand end to end, in one kernel: `torch.nn.attention.varlen`, where
it is.

PyTorch has it since 2.10, for CUDA and half precision. Its arguments have changed between releases, so the signature is
asked.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from osum_echat.device.accelerators import VARLEN_KINDS

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, bool, "float | None"], Tensor]
"""(query [P, H, d], key, value [P, H or fewer, d], ends int32 [D + 1], longest, causal, scale) to [P, H, d]."""

_WIDTHS = range(8, 257, 8)  # of a head, that the kernel takes
_STEP = 128


def varlen_attention(query: Tensor) -> Kernel | None:
    """The kernel for such a query [..., d], None where there is none."""
    return _kernel() if _takes(query.device.type, query.dtype, query.shape[-1]) else None


def _takes(kind: str, dtype: torch.dtype, width: int) -> bool:
    return kind in VARLEN_KINDS and dtype in (torch.bfloat16, torch.float16) and width in _WIDTHS


@functools.cache
def _kernel() -> Kernel | None:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    return adapt(importlib.import_module("torch.nn.attention.varlen").varlen_attn)


def adapt(varlen_attn: Callable[..., Any]) -> Kernel | None:
    """The kernel over one release's ``varlen_attn``; None for a signature that says nothing known about causal
    attention."""
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known and "is_causal" not in known:
        return None

    def kernel(
        query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, causal: bool, scale: float | None
    ) -> Tensor:
        options: dict[str, Any] = {"window_size": (-1, 0 if causal else -1)} if "window_size" in known else {"is_causal": causal}
        if scale is not None and scale != query.shape[-1] ** -0.5:
            assert "scale" in known, f"this release's varlen_attn takes no scale, {scale} is asked for"
            options["scale"] = scale
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and "enable_gqa" in known:
            options["enable_gqa"] = True
        elif groups > 1:
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        # An upper bound does; in steps, so that a compiled layer sees few different ones.
        longest = -(-longest // _STEP) * _STEP
        return varlen_attn(query, key, value, ends, ends, longest, longest, **options)

    return kernel
