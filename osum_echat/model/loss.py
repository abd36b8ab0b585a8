"""Cross-entropy at supervised positions, without ever holding [positions x classes].

The LM head of the published model has 151,936 rows and the speech head 4,097: logits of 4,000 positions would be 2.5 GB in float32, and their
gradient as much again. Here positions go through the heads in chunks, and a chunk's part of all gradients is computed while its logits are
there: three matrix products a chunk (logits, gradient of the hidden states, gradient of the heads), the least that there can be. The gradient
that comes from above is not known then; it is expected to be proportional to the targets' weights, which training knows, and only scales what
is there. Where it turns out otherwise, the heads' gradient is computed again. The trade-off: the heads' gradient exists from the forward pass on.

Where Liger's fused loss is installed (0.8 or newer, which takes a gradient per target) and the device runs Triton, it is used instead; its
numbers are these to 1e-5.

M supervised positions, D width of the LLM, C classes of the heads, K positions of a chunk.
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


def linear_nll(
    hidden_MD: Tensor,
    targets_M: Tensor,
    heads: Sequence[nn.Linear],
    first_only_M: Tensor | None = None,
    weights_M: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """-log softmax(logits)[target] per position, softmax over the classes of all ``heads`` together.

    Args:
        hidden_MD: hidden states.
        targets_M: class numbers; those of the second head follow those of the first.
        heads: linear layers (``weight`` [C, D], ``bias`` [C] or None), their classes side by side.
        first_only_M: True where the softmax is over the classes of the first head alone (default: nowhere).
        weights_M: what the gradient from above is expected to be proportional to (default: ones). Right or wrong, gradients are exact; when
            it is right, they cost less.
        chunk: positions at a time; default by `LOGIT_BUDGET`.

    Returns:
        [M] float32; gradients flow to hidden states, weights and biases.
    """
    if first_only_M is None:
        first_only_M = torch.zeros(len(targets_M), dtype=torch.bool, device=hidden_MD.device)
    if len(targets_M) and devices.runs_triton(hidden_MD.device) and (fused := _liger()) is not None:
        return _liger_nll(fused, hidden_MD, targets_M, heads, first_only_M)
    flat: list[Tensor | None] = []
    for head in heads:
        flat += [head.weight, head.bias]
    classes = sum(len(head.weight) for head in heads)
    chunk = chunk or max(1, LOGIT_BUDGET // classes)
    device = hidden_MD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_MD.dtype
    weights_M = torch.ones(len(targets_M), device=hidden_MD.device) if weights_M is None else weights_M.detach().float()
    with torch.autocast(device, enabled=False):
        wanted = torch.is_grad_enabled()  # inside the function it never is
        return _LinearNll.apply(hidden_MD.to(dtype), targets_M, first_only_M, weights_M, chunk, wanted, *flat)


@functools.cache
def _liger() -> Any:
    """Liger's autograd function, None when it is not installed or too old to take a gradient per target."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    known = inspect.signature(module.fused_linear_cross_entropy_forward).parameters
    return module.LigerFusedLinearCrossEntropyFunction if "token_grad_output" in known else None


def _liger_nll(fused: Any, hidden_MD: Tensor, targets_M: Tensor, heads: Sequence[nn.Linear], first_only_M: Tensor) -> Tensor:
    """Liger takes one head: several are put one under the other (a copy of their weights, small beside the logits saved)."""
    nll_M = hidden_MD.new_zeros(len(targets_M), dtype=torch.float32)
    for where, used in ((torch.nonzero(first_only_M)[:, 0], heads[:1]), (torch.nonzero(~first_only_M)[:, 0], heads)):
        if len(where):
            weights: list[Tensor] = [head.weight for head in used]
            biases: list[Tensor] = [head.weight.new_zeros(len(head.weight)) if head.bias is None else head.bias for head in used]
            weight_CD = weights[0] if len(used) == 1 else torch.cat(weights)
            bias_C = used[0].bias if len(used) == 1 else torch.cat(biases)
            found_K = fused.apply(hidden_MD[where], weight_CD, targets_M[where], bias_C, None, -100, 0.0, 0.0, "none")[0]
            nll_M = nll_M.index_put((where,), found_K.float())
    return nll_M


class _LinearNll(torch.autograd.Function):
    """Keeps the gradients for an incoming gradient of ones (hidden states) and of ``weights_M`` (heads)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        targets_M: Tensor,
        first_only_M: Tensor,
        weights_M: Tensor,
        chunk: int,
        wanted: bool,
        *flat: Tensor | None,
    ) -> Tensor:
        heads = _pairs(flat, hidden_MD.dtype)
        ctx.chunk, ctx.number = chunk, 6 + len(flat)
        ctx.head_needs = [wanted and needed for needed in ctx.needs_input_grad[6:]]
        nll_M = hidden_MD.new_empty(len(targets_M), dtype=torch.float32)
        unit_MD = torch.empty_like(hidden_MD) if wanted and ctx.needs_input_grad[0] else None
        grads = _zeros(flat, ctx.head_needs)
        space = _space(hidden_MD, chunk, heads)
        for part_K, used in _chunks(first_only_M, chunk, heads):
            hidden_KD, targets_K1 = hidden_MD[part_K], targets_M[part_K, None]
            error_KC = _logits(hidden_KD, used, space)
            found_K1 = error_KC.gather(1, targets_K1)
            nll_M[part_K] = _softmax_(error_KC) - found_K1[:, 0]
            if unit_MD is None and not any(ctx.head_needs):
                continue
            error_KC.scatter_add_(1, targets_K1, torch.full_like(found_K1, -1.0))  # softmax - one-hot: the gradient by the logits
            if unit_MD is not None:
                unit_MD[part_K] = _hidden_grad(error_KC, used)
            _add_head_grads(grads, error_KC, hidden_KD, weights_M[part_K], used)
        ctx.save_for_backward(hidden_MD, targets_M, first_only_M, weights_M, unit_MD, *flat)
        ctx.grads = grads if any(ctx.head_needs) else None
        return nll_M

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Any, ...]:
        hidden_MD, targets_M, first_only_M, weights_M, unit_MD, *flat = ctx.saved_tensors
        grad_MD = None if unit_MD is None else unit_MD * grad_M[:, None].to(unit_MD.dtype)
        grads, ctx.grads = ctx.grads, None  # used up: a second backward pass computes them again
        if any(ctx.head_needs):
            factor = _common_factor(grad_M, weights_M) if grads is not None else None
            if factor is not None:
                for grad in filter(None.__ne__, grads):
                    grad.mul_(factor.to(grad.dtype))
            else:
                grads = _zeros(flat, ctx.head_needs)
                heads = _pairs(flat, hidden_MD.dtype)
                space = _space(hidden_MD, ctx.chunk, heads)
                for part_K, used in _chunks(first_only_M, ctx.chunk, heads):
                    error_KC = _logits(hidden_MD[part_K], used, space)
                    _softmax_(error_KC)
                    targets_K1 = targets_M[part_K, None]
                    error_KC.scatter_add_(1, targets_K1, error_KC.new_full(targets_K1.shape, -1.0))
                    _add_head_grads(grads, error_KC, hidden_MD[part_K], grad_M[part_K], used)
        return (grad_MD, None, None, None, None, None, *(grads or [None] * len(flat)))


def _common_factor(grad_M: Tensor, weights_M: Tensor) -> Tensor | None:
    """f with grad = f x weights to rounding, None when there is none."""
    if not len(grad_M):
        return grad_M.new_ones(())
    largest = weights_M.abs().argmax()
    factor = grad_M[largest] / weights_M[largest]
    same = ((grad_M - factor * weights_M).abs() <= 1e-6 * grad_M.abs()).all() & factor.isfinite()
    return factor if bool(same) else None


def _pairs(flat: Sequence[Tensor | None], dtype: torch.dtype) -> list[Head]:
    cast = [None if tensor is None else tensor.detach().to(dtype) for tensor in flat]
    return [(weight, bias) for weight, bias in zip(cast[::2], cast[1::2], strict=True) if weight is not None]


def _zeros(flat: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    return [torch.zeros_like(t) if t is not None and need else None for t, need in zip(flat, needed, strict=True)]


def _chunks(first_only_M: Tensor, size: int, heads: list[Head]) -> list[tuple[Tensor, list[Head]]]:
    """Indices of at most ``size`` positions that are scored over the same heads, and these heads."""
    groups = ((first_only_M, heads[:1]), (~first_only_M, heads))
    return [(part_K, used) for chosen_M, used in groups for part_K in torch.nonzero(chosen_M)[:, 0].split(size) if len(part_K)]


def _logits(hidden_KD: Tensor, heads: Sequence[Head], space: Tensor) -> Tensor:
    """Float32 logits of all heads side by side [K, C], in the memory of ``space`` (fresh memory for every chunk costs as much as the product)."""
    classes = sum(len(weight) for weight, _ in heads)
    out_KC = space[: len(hidden_KD) * classes].view(len(hidden_KD), classes)
    start = 0
    for weight_CD, bias_C in heads:
        slot_KC = out_KC[:, start : start + len(weight_CD)]
        if hidden_KD.dtype == torch.float32:
            torch.mm(hidden_KD, weight_CD.T, out=slot_KC)
        else:
            slot_KC.copy_(hidden_KD @ weight_CD.T)
        if bias_C is not None:
            slot_KC += bias_C
        start += len(weight_CD)
    return out_KC


def _softmax_(logits_KC: Tensor) -> Tensor:
    """Turns logits into probabilities [K, C] in place; their log-sum-exp [K]: the largest probability is exp(largest - lse)."""
    largest_K = logits_KC.amax(dim=1)
    torch.softmax(logits_KC, dim=1, out=logits_KC)
    return largest_K - logits_KC.amax(dim=1).log()


def _space(hidden_MD: Tensor, chunk: int, heads: Sequence[Head]) -> Tensor:
    return hidden_MD.new_empty(min(chunk, len(hidden_MD)) * sum(len(weight) for weight, _ in heads), dtype=torch.float32)


def _hidden_grad(error_KC: Tensor, heads: Sequence[Head]) -> Tensor:
    start, total_KD = 0, None
    for weight_CD, _ in heads:
        piece_KD = error_KC[:, start : start + len(weight_CD)].to(weight_CD.dtype) @ weight_CD
        total_KD = piece_KD if total_KD is None else total_KD + piece_KD
        start += len(weight_CD)
    assert total_KD is not None
    return total_KD


def _add_head_grads(
    grads: Sequence[Tensor | None], error_KC: Tensor, hidden_KD: Tensor, weights_K: Tensor, heads: Sequence[Head]
) -> None:
    """Add a chunk's part to the gradients of weights and biases (weight, bias, weight, bias ...; None: frozen)."""
    scaled_KD = hidden_KD * weights_K[:, None].to(hidden_KD.dtype)
    start = 0
    for number, (head_CD, _) in enumerate(heads):
        part_KC = error_KC[:, start : start + len(head_CD)]
        start += len(head_CD)
        if (grad_CD := grads[2 * number]) is not None:
            if grad_CD.dtype == hidden_KD.dtype:
                grad_CD.addmm_(part_KC.to(hidden_KD.dtype).T, scaled_KD)
            else:  # autocast: float32 master weights, products in half precision
                grad_CD += part_KC.to(hidden_KD.dtype).T @ scaled_KD
        if (grad_C := grads[2 * number + 1]) is not None:
            grad_C += (weights_K @ part_KC).to(grad_C.dtype)
