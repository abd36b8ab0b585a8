"""Cross-entropy at supervised positions, without ever holding [positions x classes].

The LM head of the published model has 151,936 rows and the speech head 4,097: logits of 4,000 positions would be 2.5 GB
in float32, and their gradient as much again. Here positions go through the heads in chunks, and a chunk's part of all
gradients is computed while its logits are there: three matrix products a chunk (logits, gradient of the hidden states,
gradient of the heads), the least that there can be. The gradient that comes from above is not known then; it is
expected to be proportional to the targets' weights, which training knows, and only scales what is there. The trade-off:
the heads' gradient exists from the forward pass on. It is summed in float32 whatever the type of the heads: the
published model needs some twenty chunks, and a sum of that many rounded terms loses what the last ones add.

Where Liger's fused loss is installed (0.8 or newer, which takes a gradient per target) and the device runs Triton, it
is used instead; its numbers are these to 1e-5.

M supervised positions, D width of the LLM, C classes of the heads, K positions of a chunk.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Iterator, Sequence
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
    first_only: int = 0,
    weights_M: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """-log softmax(logits)[target] per position, softmax over the classes of all ``heads`` together.

    Args:
        hidden_MD: hidden states.
        targets_M: class numbers; those of the second head follow those of the first.
        heads: linear layers (``weight`` [C, D], ``bias`` [C] or None), their classes side by side.
        first_only: so many positions, at the beginning, have a softmax over the classes of the first head alone.
        weights_M: what the gradient from above is going to be proportional to. Where it is not, the heads' gradients
            are NaN; nothing is read back to find out. None: not known; the value is read, and where it is not the same
            for all, the work is done a second time.
        chunk: positions at a time; default by `LOGIT_BUDGET`.

    Returns:
        [M] float32; gradients flow to hidden states, weights and biases.
    """
    if len(targets_M) and devices.runs_triton(hidden_MD.device) and (fused := _liger()) is not None:
        return _liger_nll(fused, hidden_MD, targets_M, heads, first_only)
    flat: list[Tensor | None] = []
    for head in heads:
        flat += [head.weight, head.bias]
    classes = sum(len(head.weight) for head in heads)
    chunk = chunk or max(1, LOGIT_BUDGET // classes)
    device = hidden_MD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_MD.dtype
    weights_M = None if weights_M is None else weights_M.detach().float()
    with torch.autocast(device, enabled=False):
        wanted = torch.is_grad_enabled()  # inside the function it never is
        return _LinearNll.apply(hidden_MD.to(dtype), targets_M, first_only, weights_M, chunk, wanted, *flat)


@functools.cache
def _liger() -> Any:
    """Liger's autograd function, None when it is not installed or too old to take a gradient per target."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    known = inspect.signature(module.fused_linear_cross_entropy_forward).parameters
    return module.LigerFusedLinearCrossEntropyFunction if "token_grad_output" in known else None


def _liger_nll(fused: Any, hidden_MD: Tensor, targets_M: Tensor, heads: Sequence[nn.Linear], first_only: int) -> Tensor:
    """Liger takes one head: several are put one under the other (a copy of their weights, small beside the logits
    saved)."""
    found = []
    for part, used in _parts(len(targets_M), first_only, heads):
        weights: list[Tensor] = [head.weight for head in used]
        biases: list[Tensor] = [head.weight.new_zeros(len(head.weight)) if head.bias is None else head.bias for head in used]
        weight_CD = weights[0] if len(used) == 1 else torch.cat(weights)
        bias_C = used[0].bias if len(used) == 1 else torch.cat(biases)
        options = (None, -100, 0.0, 0.0, "none")
        found.append(fused.apply(hidden_MD[part], weight_CD, targets_M[part], bias_C, *options)[0].float())
    return torch.cat(found)


class _LinearNll(torch.autograd.Function):
    """Keeps the gradients for an incoming gradient of ones (hidden states) and of ``weights_M`` (heads)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        targets_M: Tensor,
        first_only: int,
        weights_M: Tensor | None,
        chunk: int,
        wanted: bool,
        *flat: Tensor | None,
    ) -> Tensor:
        heads = _pairs(flat, hidden_MD.dtype)
        ctx.first_only, ctx.chunk = first_only, chunk
        ctx.head_needs = [wanted and needed for needed in ctx.needs_input_grad[6:]]
        nll_M = hidden_MD.new_empty(len(targets_M), dtype=torch.float32)
        unit_MD = torch.empty_like(hidden_MD) if wanted and ctx.needs_input_grad[0] else None
        sums = _Sums(flat, ctx.head_needs)
        space = _space(hidden_MD, chunk, heads)
        for part, used in _chunks(len(targets_M), first_only, chunk, heads):
            hidden_KD, targets_K1 = hidden_MD[part], targets_M[part, None]
            error_KC = _logits(hidden_KD, used, space)
            found_K1 = error_KC.gather(1, targets_K1)
            nll_M[part] = _softmax_(error_KC) - found_K1[:, 0]
            if unit_MD is None and not any(ctx.head_needs):
                continue
            # Softmax - one-hot: the gradient by the logits.
            error_KC.scatter_add_(1, targets_K1, torch.full_like(found_K1, -1.0))
            if unit_MD is not None:
                unit_MD[part] = _hidden_grad(error_KC, used)
            sums.add(error_KC, hidden_KD, None if weights_M is None else weights_M[part], used)
        ctx.save_for_backward(hidden_MD, targets_M, weights_M, unit_MD, *flat)
        ctx.grads = sums.tensors() if any(ctx.head_needs) else None
        return nll_M

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Any, ...]:
        hidden_MD, targets_M, weights_M, unit_MD, *flat = ctx.saved_tensors
        grad_MD = None if unit_MD is None else unit_MD * grad_M[:, None].to(unit_MD.dtype)
        grads, ctx.grads = ctx.grads, None  # used up: a second backward pass computes them again
        if any(ctx.head_needs):
            factor = _common_factor(grad_M, weights_M) if grads is not None else None
            if factor is not None:
                for grad in filter(None.__ne__, grads):
                    grad.mul_(factor)
            else:
                sums = _Sums(flat, ctx.head_needs)
                heads = _pairs(flat, hidden_MD.dtype)
                space = _space(hidden_MD, ctx.chunk, heads)
                for part, used in _chunks(len(targets_M), ctx.first_only, ctx.chunk, heads):
                    error_KC = _logits(hidden_MD[part], used, space)
                    _softmax_(error_KC)
                    targets_K1 = targets_M[part, None]
                    error_KC.scatter_add_(1, targets_K1, error_KC.new_full(targets_K1.shape, -1.0))
                    sums.add(error_KC, hidden_MD[part], grad_M[part], used)
                grads = sums.tensors()
            grads = [None if grad is None else grad.to(tensor.dtype) for grad, tensor in zip(grads, flat, strict=True)]
        return (grad_MD, None, None, None, None, None, *(grads or [None] * len(flat)))


def _common_factor(grad_M: Tensor, weights_M: Tensor | None) -> Tensor | None:
    """f with grad = f x weights to rounding; NaN when there is none. Without weights: None when there is none."""
    if not len(grad_M):
        return grad_M.new_ones(())
    expected_M = torch.ones_like(grad_M) if weights_M is None else weights_M
    largest = expected_M.abs().max(dim=0, keepdim=True)
    found = grad_M.gather(0, largest.indices) / expected_M.gather(0, largest.indices)
    factor = torch.where(largest.values > 0, found, 0.0)[0]
    same = ((grad_M - factor * expected_M).abs() <= 1e-6 * grad_M.abs()).all() & factor.isfinite()
    if weights_M is None:
        return factor if bool(same) else None
    return torch.where(same, factor, torch.nan)


def _pairs(flat: Sequence[Tensor | None], dtype: torch.dtype) -> list[Head]:
    cast = [None if tensor is None else tensor.detach().to(dtype) for tensor in flat]
    return [(weight, bias) for weight, bias in zip(cast[::2], cast[1::2], strict=True) if weight is not None]


def _parts(count: int, first_only: int, heads: Sequence[Any]) -> Iterator[tuple[slice, Sequence[Any]]]:
    """Positions that are scored over the same heads, and these heads."""
    assert 0 <= first_only <= count, f"{first_only} of {count} positions"
    for start, end, used in ((0, first_only, heads[:1]), (first_only, count, heads)):
        if end > start:
            yield slice(start, end), used


def _chunks(count: int, first_only: int, size: int, heads: list[Head]) -> Iterator[tuple[slice, Sequence[Head]]]:
    """At most ``size`` positions that are scored over the same heads, and these heads."""
    for part, used in _parts(count, first_only, heads):
        for start in range(part.start, part.stop, size):
            yield slice(start, min(start + size, part.stop)), used


def _logits(hidden_KD: Tensor, heads: Sequence[Head], space: Tensor) -> Tensor:
    """Float32 logits of all heads side by side [K, C], in the memory of ``space`` (fresh memory for every chunk costs
    as much as the product)."""
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
    """Turns logits into probabilities [K, C] in place; their log-sum-exp [K]: the largest probability is exp(largest -
    lse)."""
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


class _Sums:
    """Float32 gradients of weights and biases (weight, bias, weight, bias ...), a chunk at a time. The first chunk
    makes them: a table of zeros would cost as much memory traffic as a product."""

    def __init__(self, flat: Sequence[Tensor | None], needed: Sequence[bool]) -> None:
        self._flat, self._needed = flat, needed
        self._sums: dict[int, Tensor] = {}

    def add(self, error_KC: Tensor, hidden_KD: Tensor, weights_K: Tensor | None, heads: Sequence[Head]) -> None:
        scaled_KD = hidden_KD if weights_K is None else hidden_KD * weights_K[:, None].to(hidden_KD.dtype)
        start = 0
        for number, (head_CD, _) in enumerate(heads):
            part_KC = error_KC[:, start : start + len(head_CD)]
            start += len(head_CD)
            if self._needed[2 * number]:
                self._product(2 * number, part_KC, scaled_KD)
            if self._needed[2 * number + 1]:
                more_C = part_KC.sum(dim=0) if weights_K is None else weights_K @ part_KC
                before = self._sums.get(2 * number + 1)
                self._sums[2 * number + 1] = more_C if before is None else before.add_(more_C)

    def _product(self, place: int, part_KC: Tensor, scaled_KD: Tensor) -> None:
        total_CD = self._sums.get(place)
        if total_CD is None:
            self._sums[place] = (part_KC.to(scaled_KD.dtype).T @ scaled_KD).float()
        elif scaled_KD.dtype == torch.float32:
            total_CD.addmm_(part_KC.T, scaled_KD)
        else:  # products in half precision, their sum is not
            total_CD += part_KC.to(scaled_KD.dtype).T @ scaled_KD

    def tensors(self) -> list[Tensor | None]:
        """Of all that need one; zeros where no position came by."""
        pairs = enumerate(zip(self._flat, self._needed, strict=True))
        out: list[Tensor | None] = []
        for place, (tensor, need) in pairs:
            missing = tensor is not None and need and place not in self._sums
            out.append(torch.zeros_like(tensor, dtype=torch.float32) if missing and tensor is not None else self._sums.get(place))
        return out
