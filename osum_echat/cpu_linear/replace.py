"""Packed weights for decoding (see `packed`).

A step at batch 1 reads every weight once, so its time is reading. PyTorch's `linear` keeps the rows of a weight as they
are in the file: on the machine of `benchmarks/results` it reads 60 % of what the memory gives in bfloat16 at batch 1,
and less with more rows. The same weights in oneDNN's blocked order are read at the memory's speed, and at batch 16 a
step is twice as fast.

Small float32 matrices are the exception: they stay in the processor's cache, where PyTorch's own kernel is faster at
batch 1, so they are left.

`pack_linears` swaps the `nn.Linear` modules of a model that only decodes; the model cannot be trained or saved
afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from osum_echat import device
from osum_echat.cpu_linear.packed import JointLinear, PackedLinear

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers with the same input, by the names that transformers gives them in all models of this family."""


def pays(linears: Sequence[nn.Linear]) -> bool:
    """Whether this machine can pack the layers as one (or a single one), and a step at batch 1 gains by it."""
    weight = linears[0].weight
    if weight.is_meta:
        return False
    numbers = sum(linear.weight.numel() for linear in linears)
    return device.linear_kernel(weight.device, weight.dtype, linears[0].in_features, numbers) == "packed"


def pack_linears(module: nn.Module) -> int:
    """Replace each `nn.Linear` inside ``module`` that it `pays` for, in place, one at a time (a weight exists twice
    only for that moment).

    Layers that read the same input are packed as one product. A weight that something else uses too (an LM head tied to
    the token table) is packed beside the original. Returns how many layers were packed.
    """
    packed = 0
    for parent in list(module.modules()):
        for names in TOGETHER:
            together = [parent.get_submodule(name) for name in names if hasattr(parent, name)]
            linears = [child for child in together if type(child) is nn.Linear]
            if len(linears) == len(names) and len({x.in_features for x in linears}) == 1 and pays(linears):
                for name, part in zip(names, JointLinear.packed(linears).parts, strict=True):
                    setattr(parent, name, part)
                packed += len(linears)
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and pays([child]):
                setattr(parent, name, PackedLinear(child.weight, child.bias))
                packed += 1
    return packed
