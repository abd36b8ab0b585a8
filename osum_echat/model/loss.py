"""Cross-entropy at supervised positions, without ever holding [positions x classes].

The LM head of the published model has 151,936 rows and the speech head 4,097: logits of 4,000 positions would be 2.5 GB in float32, and their
gradient as much again. Here positions go through the heads in chunks; the backward pass computes a chunk's logits again from the hidden
states. The trade-off: one more matrix product per chunk, for a memory that does not grow with the number of targets. When the heads are frozen
their gradient is not needed, the hidden states' gradient is computed in the forward pass, and nothing is computed twice.

Where Liger's fused loss is installed (0.8 or newer, which takes a gradient per target) and the device runs Triton, it is used instead; its
numbers are these to 1e-5.

M supervised positions, D width of the LLM, C classes of a head.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from osum_echat import device as devices

# Float32 logits held at a time: 2**25 numbers, 128 MB (215 positions of the published model).
LOGIT_BUDGET = 2**25

Head = tuple[Tensor, "Tensor | None"]  # weight [C, D], bias [C]


def linear_nll(hidden_MD: Tensor, targets_M: Tensor, heads: Sequence[nn.Linear], chunk: int | None = None) -> Tensor:
    """-log softmax(logits)[target] per position, softmax over the classes of all ``heads`` together.

    Args:
        hidden_MD: hidden states.
        targets_M: class numbers; those of the second head follow those of the first.
        heads: linear layers (``weight`` [C, D], ``bias`` [C] or None), their classes side by side.
        chunk: positions at a time; default by `LOGIT_BUDGET`.

    Returns:
        [M] float32; gradients flow to hidden states, weights and biases.
    """
    if len(targets_M) and devices.runs_triton(hidden_MD.device) and (fused := _liger()) is not None:
        return _liger_nll(fused, hidden_MD, targets_M, heads)
    flat: list[Tensor | None] = []
    for head in heads:
        flat += [head.weight, head.bias]
    classes = sum(len(head.weight) for head in heads)
    chunk = chunk or max(1, LOGIT_BUDGET // classes)
    device = hidden_MD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_MD.dtype
    with torch.autocast(device, enabled=False):
        return _LinearNll.apply(hidden_MD.to(dtype), targets_M, chunk, *flat)


@functools.cache
def _liger() -> Any:
    """Liger's autograd function, None when it is not installed or too old to take a gradient per target."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    known = inspect.signature(module.fused_linear_cross_entropy_forward).parameters
    return module.LigerFusedLinearCrossEntropyFunction if "token_grad_output" in known else None


def _liger_nll(fused: Any, hidden_MD: Tensor, targets_M: Tensor, heads: Sequence[nn.Linear]) -> Tensor:
    """Liger takes one head: several are put one under the other (a copy of their weights, small beside the logits saved)."""
    weights: list[Tensor] = [head.weight for head in heads]
    biases: list[Tensor] = [head.weight.new_zeros(len(head.weight)) if head.bias is None else head.bias for head in heads]
    weight_CD = weights[0] if len(heads) == 1 else torch.cat(weights)
    bias_C = heads[0].bias if len(heads) == 1 else torch.cat(biases)
    return fused.apply(hidden_MD, weight_CD, targets_M, bias_C, None, -100, 0.0, 0.0, "none")[0]


class _LinearNll(torch.autograd.Function):
    """Saves hidden states and log-sum-exps (or, with frozen heads, the hidden states' gradient)."""

    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, targets_M: Tensor, chunk: int, *flat: Tensor | None) -> Tensor:
        heads = _pairs(flat, hidden_MD.dtype)
        nll_M = hidden_MD.new_empty(len(targets_M), dtype=torch.float32)
        lse_M = torch.empty_like(nll_M)
        ctx.chunk = chunk
        ctx.heads_frozen = not any(ctx.needs_input_grad[3:])
        grad_MD = torch.empty_like(hidden_MD) if ctx.heads_frozen and ctx.needs_input_grad[0] else None
        for part in _chunks(len(targets_M), chunk):
            logits_MC = _logits(hidden_MD[part], heads)
            lse_M[part] = logits_MC.logsumexp(dim=1)
            nll_M[part] = lse_M[part] - logits_MC.gather(1, targets_M[part, None])[:, 0]
            if grad_MD is not None:
                grad_MD[part] = _hidden_grad(_probability_error(logits_MC, lse_M[part], targets_M[part]), heads)
        if ctx.heads_frozen:
            ctx.save_for_backward(grad_MD)
        else:
            ctx.save_for_backward(hidden_MD, targets_M, lse_M, *flat)
        return nll_M

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Any, ...]:
        if ctx.heads_frozen:
            (unit_MD,) = ctx.saved_tensors
            return (unit_MD * grad_M[:, None].to(unit_MD.dtype), None, None, *[None] * (len(ctx.needs_input_grad) - 3))
        hidden_MD, targets_M, lse_M, *flat = ctx.saved_tensors
        heads = _pairs(flat, hidden_MD.dtype)
        grad_MD = torch.empty_like(hidden_MD) if ctx.needs_input_grad[0] else None
        grads = [
            torch.zeros_like(tensor) if tensor is not None and needed else None
            for tensor, needed in zip(flat, ctx.needs_input_grad[3:], strict=True)
        ]
        for part in _chunks(len(targets_M), ctx.chunk):
            error_MC = _probability_error(_logits(hidden_MD[part], heads), lse_M[part], targets_M[part])
            error_MC *= grad_M[part, None]
            if grad_MD is not None:
                grad_MD[part] = _hidden_grad(error_MC, heads)
            start = 0
            for number, (weight_CD, _) in enumerate(heads):
                head_error_MC = error_MC[:, start : start + len(weight_CD)]
                start += len(weight_CD)
                _accumulate(grads[2 * number], head_error_MC, hidden_MD[part])
                if (bias_grad_C := grads[2 * number + 1]) is not None:
                    bias_grad_C += head_error_MC.sum(0).to(bias_grad_C.dtype)
        return (grad_MD, None, None, *grads)


def _pairs(flat: Sequence[Tensor | None], dtype: torch.dtype) -> list[Head]:
    cast = [None if tensor is None else tensor.detach().to(dtype) for tensor in flat]
    return [(weight, bias) for weight, bias in zip(cast[::2], cast[1::2], strict=True) if weight is not None]


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _logits(hidden_MD: Tensor, heads: Sequence[Head]) -> Tensor:
    """Float32 logits of all heads side by side [M, C]."""
    out_MC = hidden_MD.new_empty(len(hidden_MD), sum(len(weight) for weight, _ in heads), dtype=torch.float32)
    start = 0
    for weight_CD, bias_C in heads:
        out_MC[:, start : start + len(weight_CD)] = torch.nn.functional.linear(hidden_MD, weight_CD, bias_C)
        start += len(weight_CD)
    return out_MC


def _probability_error(logits_MC: Tensor, lse_M: Tensor, targets_M: Tensor) -> Tensor:
    """softmax - one-hot: the gradient of the NLL by the logits. Overwrites ``logits_MC``."""
    error_MC = logits_MC.sub_(lse_M[:, None]).exp_()
    error_MC[torch.arange(len(targets_M), device=targets_M.device), targets_M] -= 1.0
    return error_MC


def _hidden_grad(error_MC: Tensor, heads: Sequence[Head]) -> Tensor:
    start, total_MD = 0, None
    for weight_CD, _ in heads:
        piece_MD = error_MC[:, start : start + len(weight_CD)].to(weight_CD.dtype) @ weight_CD
        total_MD = piece_MD if total_MD is None else total_MD + piece_MD
        start += len(weight_CD)
    assert total_MD is not None
    return total_MD


def _accumulate(grad_CD: Tensor | None, error_MC: Tensor, hidden_MD: Tensor) -> None:
    if grad_CD is None:
        return
    if grad_CD.dtype == hidden_MD.dtype:
        grad_CD.addmm_(error_MC.to(hidden_MD.dtype).T, hidden_MD)
    else:  # autocast: float32 master weights, products in half precision
        grad_CD += error_MC.to(hidden_MD.dtype).T @ hidden_MD
