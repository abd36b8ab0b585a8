"""Packed weights: the same numbers, the same ids, and only where they pay."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from osum_echat.cpu_linear import PackedLinear, pack_linears
from osum_echat.device import cpu
from osum_echat.generation.config import GenerationConfig
from osum_echat.generation.generator import Generator
from tests.generation_case import done, request, tiny

needs_kernels = pytest.mark.skipif(not cpu.packs(torch.float32), reason="this CPU or build of torch has no oneDNN kernels")


@needs_kernels
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 256), (16, 256), (2, 37, 256)])
def test_a_packed_layer_computes_what_linear_does(bias: bool, shape: tuple[int, ...]) -> None:
    linear = nn.Linear(256, 2048, bias=bias)
    x = torch.randn(shape)
    with torch.inference_mode():
        assert torch.allclose(PackedLinear(linear.weight, linear.bias)(x), linear(x), atol=1e-5)
        if cpu.packs(torch.bfloat16):
            half, exact = linear.bfloat16(), linear(x.bfloat16()).float()
            assert (PackedLinear(half.weight, half.bias)(x.bfloat16()).float() - exact).abs().max() < 0.02 * exact.abs().max()


@needs_kernels
def test_only_what_gains_is_packed() -> None:
    class Odd(nn.Linear):
        """Somebody's own linear layer."""

    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(64, 64), nn.Sequential(nn.Linear(1024, 2048), Odd(1024, 1024)))
    model.append(nn.Linear(1024, 1024, device="meta"))
    assert pack_linears(model) == 2
    assert [type(m).__name__ for m in model] == ["PackedLinear", "Linear", "Sequential", "Linear"]
    assert [type(m).__name__ for m in model[2]] == ["PackedLinear", "Odd"]  # type: ignore[arg-type]


class Block(nn.Module):
    """Layers by the names that are packed together; the second pair does not read the same width."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(512, 2048), nn.Linear(512, 256, bias=False), nn.Linear(512, 256)
        self.gate_proj, self.up_proj = nn.Linear(512, 2048), nn.Linear(1024, 2048)


@needs_kernels
def test_layers_with_the_same_input_become_one_product() -> None:
    block = Block()
    names = ("q_proj", "k_proj", "v_proj", "gate_proj")
    plain, x, other = copy.deepcopy(block), torch.randn(2, 3, 512), torch.randn(2, 3, 512)
    assert pack_linears(block) == 5
    kinds = {name: type(child).__name__ for name, child in block.named_children()}
    assert kinds == dict.fromkeys(names[:3], "JointPart") | dict.fromkeys(("gate_proj", "up_proj"), "PackedLinear")
    with torch.inference_mode():
        # In order, out of order, one alone, and the same input again: each call gives what its own layer gives.
        for name, given in [*((n, x) for n in names), ("v_proj", other), ("q_proj", other), ("q_proj", other), ("k_proj", x)]:
            assert torch.allclose(getattr(block, name)(given), getattr(plain, name)(given), atol=1e-5)


@needs_kernels
def test_a_model_with_packed_weights_decodes_the_same_ids() -> None:
    model, tokenizer, _ = tiny()
    packed = copy.deepcopy(model)
    head = packed.lm.llm.lm_head
    packed.lm.llm.lm_head = PackedLinear(head.weight, None)  # by hand: the tiny layers are too small to pay
    row = request("s2t_chat", recordings=[1], max_new=20)
    generators = [Generator(m, tokenizer, GenerationConfig()) for m in (model, packed)]
    results = [done([e for _, e in g.generate([replace(row)])]).generated for g in generators]
    assert results[0] == results[1]
