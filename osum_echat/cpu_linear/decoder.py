"""A transformers decoder's step on a CPU with less around its products.

At batch 1 a small model's step is mostly the calls between its products: six kernels for a norm, eight for the
rotation, copies for grouped heads, masks that are built to be thrown away. `lighten` keeps the modules and their
weights and replaces the decoder's `forward`: queries, keys and values are one product, as are the two of the
feed-forward; a norm is one call; query and key are rotated together; attention takes grouped heads as they are. Results
differ from transformers' by rounding only.

A step of one position goes through one graph where the decoder is small (`step_graph`).

It serves calls with a cache and a ready mask, which is what decoding makes; everything else goes to transformers as
before.

B rows, n new positions, K cache columns, H heads, d head width, D width, I width of the feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osum_echat.cpu_linear.packed import JointLinear, JointPart, joint_bias
from osum_echat.cpu_linear.replace import TOGETHER
from osum_echat.cpu_linear.step_graph import LayerWeights, StepGraph, dense

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Layer:
    """The parts of one decoder layer. ``joined`` gives queries, keys and values end to end, ``widened`` gate and up."""

    attention_norm: nn.Module
    joined: Product
    out: Product
    mlp_norm: nn.Module
    widened: Product
    down: Product


def lighten(decoder: Any) -> bool:
    """Replace ``forward`` of a decoder on the CPU, in place. Returns False for one whose form is not known here: it
    stays as it is."""
    if type(decoder).__name__ != "Qwen2Model" or decoder.config.hidden_act != "silu" or isinstance(decoder.forward, LightDecoder):
        return False
    decoder.forward = LightDecoder(decoder)
    return True


class LightDecoder:
    """The ``forward`` of a lightened decoder."""

    def __init__(self, decoder: Any) -> None:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        self._original, self._output = decoder.forward, BaseModelOutputWithPast
        self._rotary, self._norm = decoder.rotary_emb, decoder.norm
        config = decoder.config
        self._heads, self._groups = config.num_attention_heads, config.num_key_value_heads
        self._width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._layers = [
            _Layer(
                layer.input_layernorm,
                _joined(layer.self_attn, TOGETHER[0]),
                layer.self_attn.o_proj,
                layer.post_attention_layernorm,
                _joined(layer.mlp, TOGETHER[1]),
                layer.mlp.down_proj,
            )
            for layer in decoder.layers
        ]
        self.graph = StepGraph.of(decoder, _weights(self._layers), self._original)
        """None: every step goes through the layers."""

    def __call__(
        self,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' own, see the module."""
        ready = inputs_embeds is not None and position_ids is not None and past_key_values is not None
        if ready and not args and not kwargs and not torch.is_grad_enabled():
            assert inputs_embeds is not None and position_ids is not None
            cache = past_key_values.layers
            block = attention_mask is None and inputs_embeds.shape[1] > 1
            causal = block and past_key_values.get_seq_length() == 0  # else transformers makes the mask
            mask_known = causal if block else attention_mask is None or attention_mask.ndim == 4
            if mask_known and len(cache) == len(self._layers):
                if self.graph is not None and self.graph.takes(inputs_embeds, position_ids, cache):
                    hidden_BnD = self.graph.step(inputs_embeds, position_ids, attention_mask, cache)
                else:
                    hidden_BnD = self._run(inputs_embeds, position_ids, attention_mask, cache, causal)
                return self._output(last_hidden_state=hidden_BnD, past_key_values=past_key_values)
        return self._original(
            *args,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )

    def _run(self, x_BnD: Tensor, positions_Bn: Tensor, mask: Tensor | None, cache: Any, causal: bool) -> Tensor:
        cos_Bnd, sin_Bnd = self._rotary(x_BnD, position_ids=positions_Bn)
        first_half = torch.arange(self._width, device=x_BnD.device) < self._width // 2
        turn = (cos_Bnd[:, :, None], torch.where(first_half, -sin_Bnd, sin_Bnd)[:, :, None])
        for layer, kept in zip(self._layers, cache, strict=True):
            mixed_BnD = self._attend(layer.joined(_norm(layer.attention_norm, x_BnD)), turn, mask, kept, causal)
            x_BnD = x_BnD + layer.out(mixed_BnD)
            gate, up = layer.widened(_norm(layer.mlp_norm, x_BnD)).chunk(2, dim=-1)
            x_BnD = x_BnD + layer.down(F.silu(gate).mul_(up))
        return _norm(self._norm, x_BnD)

    def _attend(self, joined: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, kept: Any, causal: bool) -> Tensor:
        """Attention of the new positions over the cache, which they join: [B, n, (H + 2 groups) d] to [B, n, H d]."""
        batch, count, _ = joined.shape
        heads, groups, width = self._heads, self._groups, self._width
        parts = joined.view(batch, count, heads + 2 * groups, width)
        turned = parts[:, :, : heads + groups]
        # rotate_half(x) is (-x2, x1); the sign stands in the sine.
        turned = torch.addcmul(turned * turn[0], turned.roll(width // 2, -1), turn[1])
        query, key = turned[:, :, :heads].transpose(1, 2), turned[:, :, heads:].transpose(1, 2)
        keys, values = kept.update(key, parts[:, :, heads + groups :].transpose(1, 2))
        if count == 1:  # a head of the cache serves its group's queries as if they were positions
            out = F.scaled_dot_product_attention(query.reshape(batch, groups, -1, width), keys, values, mask)
            return out.reshape(batch, 1, heads * width)
        out = F.scaled_dot_product_attention(query, keys, values, mask, is_causal=causal, enable_gqa=heads != groups)
        return out.transpose(1, 2).reshape(batch, count, heads * width)


def _weights(layers: Sequence[_Layer]) -> list[LayerWeights] | None:
    """Of all layers in float32, None where some product has them in another form."""
    found = []
    for layer in layers:
        products = [dense(product) for product in (layer.joined, layer.out, layer.widened, layer.down)]
        qkv, out, gate_up, down = products
        modules: list[Any] = [layer.attention_norm, layer.mlp_norm]
        norms: list[Tensor] = [norm.weight.detach() for norm in modules]
        if qkv is None or out is None or gate_up is None or down is None or norms[0].dtype != torch.float32:
            return None
        found.append(LayerWeights(norms[0], qkv, out, norms[1], gate_up, down))
    return found


def _norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _joined(parent: Any, names: tuple[str, ...]) -> Product:
    """One product for layers with the same input: the one that they are parts of already, else of plain layers, which
    become its parts."""
    layers: list[nn.Module] = [getattr(parent, name) for name in names]
    first = layers[0]
    if isinstance(first, JointPart) and all(isinstance(p, JointPart) and p.joint is first.joint for p in layers):
        return first.joint.product
    if not all(type(layer) is nn.Linear for layer in layers):
        return lambda x: torch.cat([layer(x) for layer in layers], dim=-1)
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    weight_OI = torch.cat([linear.weight.detach() for linear in linears])
    bias_O = joint_bias([(linear.bias, linear.out_features) for linear in linears], weight_OI)
    product = nn.Linear(linears[0].in_features, len(weight_OI), bias=bias_O is not None, device="meta")
    product.weight = nn.Parameter(weight_OI, requires_grad=False)
    if bias_O is not None:
        product.bias = nn.Parameter(bias_O, requires_grad=False)
    joint = JointLinear(product, [linear.out_features for linear in linears], linears[0].in_features)
    for name, part in zip(names, joint.parts, strict=True):
        setattr(parent, name, part)
    return product
