"""AdamW over the trainable parameters, with float32 masters where the weights are bfloat16.

States are created at once instead of at the first step, so that a checkpoint can be read into them. The learning rate
is set from the schedule before every step; nothing about it is state. The update is one fused kernel for many
parameters where the device has one: it clips on the way, and leaves everything as it is when the gradients are not
finite, so that nothing has to be read back before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from osum_echat import device as devices
from osum_echat.run.config import OptimConfig

UPDATED_TOGETHER = 2**26
"""Parameters whose gradients are float32 at the same time where they were not before: 256 MB (or one parameter that is
larger)."""


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
        self.groups, self.config = groups, config
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
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(master, memory_format=torch.preserve_format),
            }
        rates = [group.lr for group in groups for _ in group.named]
        self._chunks = _chunked(list(zip(self.pairs, rates, strict=True)))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [param for _, param, _ in self.pairs]

    @torch.no_grad()
    def update(self, lr_factor: float, clip: float = 0.0, keep: bool = False) -> Tensor:
        """One update at ``lr_factor`` times the groups' rates, from the parameters' ``.grad``, which are gone
        afterwards.

        Args:
            clip: largest gradient norm, 0: no clipping.
            keep: only use the memory that an update needs; weights and states stay as they are.

        Returns:
            Norm of all gradients before clipping, on the device. When it is not finite nothing has changed.
        """
        # A parameter that this step's batch did not reach has gradient zero (as it has under ZeRO), not none.
        for param in self.parameters:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        norm = nn.utils.get_total_norm([param.grad for param in self.parameters if param.grad is not None])
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).float()
        skipped = torch.ones_like(norm) if keep else (~norm.isfinite()).float()
        scale = ((norm + 1e-6) / clip).clamp(min=1.0) if clip else None
        fused = devices.fuses_optimizer(norm.device)
        if not fused and bool(skipped):
            self.zero_grad()
            return norm
        for chunk in self._chunks:
            self._update_chunk(chunk, lr_factor, scale, skipped if fused else None)
        return norm

    def _update_chunk(self, chunk: _Chunk, lr_factor: float, scale: Tensor | None, skipped: Tensor | None) -> None:
        grads = [_local(param.grad).to(master.dtype) for _, param, master in chunk.pairs]
        masters = [_local(master) for _, _, master in chunk.pairs]
        states = [self.inner.state[master] for _, _, master in chunk.pairs]
        if skipped is None and scale is not None:
            torch._foreach_div_(grads, scale)
            scale = None
        adamw(
            masters,
            grads,
            [_local(state["exp_avg"]) for state in states],
            [_local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=skipped is not None,
            foreach=skipped is None,
            grad_scale=scale,
            found_inf=skipped,
            amsgrad=False,
            beta1=self.config.betas[0],
            beta2=self.config.betas[1],
            lr=chunk.lr * lr_factor,
            weight_decay=self.config.weight_decay,
            eps=self.config.eps,
            maximize=False,
        )
        for _, param, master in chunk.pairs:
            param.grad = None
            if master is not param:
                param.copy_(master)

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


@dataclass
class _Chunk:
    """Parameters that are updated together, at one learning rate."""

    lr: float
    pairs: list[tuple[str, nn.Parameter, Tensor]]
    size: int = 0


def _chunked(items: list[tuple[tuple[str, nn.Parameter, Tensor], float]]) -> list[_Chunk]:
    out: list[_Chunk] = []
    for pair, lr in items:
        count = pair[1].numel()
        if not out or out[-1].lr != lr or out[-1].size + count > UPDATED_TOGETHER:
            out.append(_Chunk(lr, []))
        out[-1].pairs.append(pair)
        out[-1].size += count
    return out


def _local(tensor: Tensor | None) -> Tensor:
    """This rank's shard of a sharded tensor; the tensor itself otherwise."""
    assert tensor is not None
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class FloatSums:
    """Sums gradients of lower-precision parameters over a step's micro-batches in float32.

    A sum in bfloat16 has 8 bits: of 8 micro-batches the last ones add little that is true. It matters for heads and
    tables, whose gradients are sums over all targets; it costs 4 bytes a parameter. The gradient that is left after the
    last micro-batch is rounded once.

    Set ``last`` before each backward pass.
    """

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.last = True
        self._params = params
        self._sums: dict[int, Tensor] = {}
        for number, param in enumerate(params):
            param.register_hook(lambda grad, number=number: self._add(number, grad))

    def _add(self, number: int, grad: Tensor) -> Tensor:
        before = self._sums.pop(number, None)
        if self.last and before is None:
            return grad
        total = grad.float() if before is None else before.add_(grad)
        if self.last:
            return total.to(grad.dtype)
        self._sums[number] = total
        return torch.zeros_like(grad)

    @torch.no_grad()
    def finish(self) -> None:
        """Give parameters that the last micro-batch did not reach what the earlier ones summed."""
        for number, total in self._sums.items():
            param = self._params[number]
            rounded = total.to(param.dtype)
            param.grad = rounded if param.grad is None else param.grad + rounded
        self._sums.clear()
