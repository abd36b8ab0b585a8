"""One step of a transformers decoder, written out over its own weights: shapes that never change, a cache that is
written in place, few kernels.

transformers' decoder cannot be recorded as a graph: its cache grows, its mask and positions come from the host. Here
each row owns a slot of the cache, its columns are its positions, and how many it has is a number on the device. A layer
is 15 kernels (36 to 40 there): products that read the same input are one, a residual is added by the product before it,
queries and keys are turned together.

What is taken: decoders of the Llama and Qwen family as they are (`refusal` says what is not), with plain, packed or
rounded linear layers.

B slots, n positions of a step (1 but on a CPU), D width, H query heads, G key heads, d width of a head, C columns of
the cache, K columns that are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osum_echat.model.echat import EChatModel

_DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_ROPE_BY_LENGTH = ("dynamic", "longrope")
"""Rotary tables that depend on how long the sequence is."""


_SHAPES = 64
"""Sizes that are compiled before the compiler gives up: 7 of slots, 5 of columns, phases."""


class Joint:
    """Linear layers with the same input as one product. Plain ones become views of the joint weight, so nothing is held
    twice."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        self._weight_OI: Tensor | None = None
        self._bias_O: Tensor | None = None
        self._modules = list(linears)
        plain = [layer for layer in linears if type(layer) is nn.Linear]
        biased = [layer.bias is not None for layer in plain]
        if len(plain) < len(self._modules) or (any(biased) and not all(biased)):
            return
        self._weight_OI = torch.cat([layer.weight.detach() for layer in plain])
        self._bias_O = torch.cat([layer.bias.detach() for layer in plain]) if all(biased) else None
        start = 0
        for layer in plain:
            layer.weight.data = self._weight_OI[start : start + layer.out_features]
            start += layer.out_features

    def __call__(self, x: Tensor) -> Tensor:
        if self._weight_OI is not None:
            return F.linear(x, self._weight_OI, self._bias_O)
        return torch.cat([module(x) for module in self._modules], dim=-1)


class AddingProduct:
    """A linear layer whose output is added to something: one kernel where the layer is a plain one."""

    def __init__(self, linear: nn.Module) -> None:
        self._linear = linear
        self._weight_IO = linear.weight.detach().T if type(linear) is nn.Linear and linear.bias is None else None

    def __call__(self, x: Tensor, to: Tensor) -> Tensor:
        if self._weight_IO is None:
            return to + self._linear(x)
        flat = torch.addmm(to.flatten(0, -2), x.flatten(0, -2), self._weight_IO)
        return flat.view_as(to)


@dataclass(frozen=True)
class Norm:
    """Root mean square norm."""

    weight: Tensor
    eps: float

    @classmethod
    def of(cls, module: Any) -> Norm:
        return cls(module.weight.detach(), float(module.variance_epsilon))

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Cache:
    """Keys and values of all slots, per layer [B, C, G, d]."""

    def __init__(
        self, layers: int, slots: int, columns: int, heads: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        # Zeros, not empty: a column that is not looked at is multiplied by weight 0, and 0 times a stray NaN would be
        # NaN.
        shape = (slots, columns, heads, width)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.slots, self.columns = slots, columns

    def resized(self, rows: Sequence[int], slots: int, columns: int, used: int) -> Cache:
        """A cache of another size whose first slots hold these ``rows``, their first ``used`` columns."""
        like = self.keys[0]
        new = Cache(0, slots, columns, 0, 0, like.dtype, like.device)
        shape = (slots, columns, *like.shape[2:])
        for mine, theirs in ((self.keys, new.keys), (self.values, new.values)):
            for old in mine:
                kept = old.new_zeros(shape)
                for slot, row in enumerate(rows):
                    kept[slot, :used] = old[row, :used]
                theirs.append(kept)
        return new


@dataclass(frozen=True)
class At:
    """Where the new positions of a step stand.

    Attributes:
        column_Bn: their columns, which are their position numbers.
        flat_N: the same as places in the cache with slots and columns as one, N = B * n.
        bias_B1nK: 0 for columns that may be looked at, a large negative number elsewhere; None where all K may.
        columns: K.
    """

    column_Bn: Tensor
    flat_N: Tensor
    bias_B1nK: Tensor | None
    columns: int


class _Layer:
    def __init__(self, layer: Any, heads: int, key_heads: int, width: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.heads, self.key_heads, self.width = heads, key_heads, width
        self.scaling = float(attention.scaling)
        self.norm, self.norm_mlp = Norm.of(layer.input_layernorm), Norm.of(layer.post_attention_layernorm)
        self.qkv = Joint([attention.q_proj, attention.k_proj, attention.v_proj])
        self.head_norms = [Norm.of(getattr(attention, name)) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
        self.out = AddingProduct(attention.o_proj)
        self.gate_up = Joint([mlp.gate_proj, mlp.up_proj])
        self.act = mlp.act_fn
        self.down = AddingProduct(mlp.down_proj)

    def __call__(self, x_BnD: Tensor, at: At, cos_sin: tuple[Tensor, Tensor], keys: Tensor, values: Tensor) -> Tensor:
        """``cos_sin``: see `DecoderStep.cos_sin`; ``keys``, ``values``: this layer's cache, written to."""
        batch, count, _ = x_BnD.shape
        qkv = self.qkv(self.norm(x_BnD)).view(batch, count, -1, self.width)
        turned, value = qkv.split((self.heads + self.key_heads, self.key_heads), dim=2)
        if self.head_norms:
            parts = turned.split((self.heads, self.key_heads), dim=2)
            turned = torch.cat([norm(part) for norm, part in zip(self.head_norms, parts, strict=True)], dim=2)
        cos, sin = cos_sin
        half = self.width // 2
        turned = turned * cos + torch.cat((turned[..., half:], turned[..., :half]), dim=-1) * sin
        query, key = turned.split((self.heads, self.key_heads), dim=2)
        for cached, new in ((keys, key), (values, value)):
            cached.flatten(0, 1).index_copy_(0, at.flat_N, new.flatten(0, 1))
        x_BnD = self.out(self._attend(query, at, keys, values), x_BnD)
        gate, up = self.gate_up(self.norm_mlp(x_BnD)).chunk(2, dim=-1)
        return self.down(self.act(gate) * up, x_BnD)

    def _attend(self, query_BnHd: Tensor, at: At, keys: Tensor, values: Tensor) -> Tensor:
        """The heads that share a key head are given as positions of it, so that its keys are read once. Returns [B, n,
        H * d]."""
        batch, count = query_BnHd.shape[:2]
        group = self.heads // self.key_heads
        grouped = query_BnHd.view(batch, count, self.key_heads, group, self.width).permute(0, 2, 3, 1, 4)
        grouped = grouped.reshape(batch, self.key_heads, group * count, self.width)
        bias = at.bias_B1nK
        if bias is not None and count > 1:
            bias = bias[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)
        key, value = (cached[:, : at.columns].transpose(1, 2) for cached in (keys, values))
        out = F.scaled_dot_product_attention(grouped, key, value, bias, scale=self.scaling)
        if count == 1:
            return out.reshape(batch, 1, -1)
        return out.view(batch, self.key_heads, group, count, self.width).permute(0, 3, 1, 2, 4).reshape(batch, count, -1)


class DecoderStep:
    """The decoder of a model, a step at a time. See the module.

    Raises:
        ValueError: for a decoder that is not taken, with what `refusal` says.
    """

    def __init__(self, model: EChatModel) -> None:
        reason = refusal(model)
        if reason:
            raise ValueError(reason)
        decoder = model.lm.llm.get_decoder()
        first = decoder.layers[0].self_attn
        config = decoder.config
        self.heads, self.key_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.width = int(first.head_dim)
        self.layers = [_Layer(layer, self.heads, self.key_heads, self.width) for layer in decoder.layers]
        self.norm = Norm.of(decoder.norm)
        self.dtype, self.device = self.norm.weight.dtype, self.norm.weight.device
        self._rotary = decoder.rotary_emb
        self._call_layer = [layer.__call__ for layer in self.layers]
        self._compile_options: dict[str, Any] | None = None

    def cache(self, slots: int, columns: int) -> Cache:
        return Cache(len(self.layers), slots, columns, self.key_heads, self.width, self.dtype, self.device)

    def cos_sin(self, columns: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each column's rotation, [C, 1, d]; the sine has the sign of its half, so that turning
        needs no negation."""
        example = torch.zeros(1, 1, 1, dtype=self.dtype, device=self.device)
        cos, sin = self._rotary(example, torch.arange(columns, device=self.device)[None])
        half = self.width // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        return cos[0, :, None].contiguous(), sin[0, :, None].contiguous()

    def at(self, length_B: Tensor, count: int, columns: int, capacity: int, masked: bool) -> At:
        """New positions behind ``length_B`` of each slot.

        Args:
            columns: the first so many columns are looked at.
            capacity: columns of the cache.
            masked: False where every row may look at all of them.
        """
        device = length_B.device
        column_Bn = length_B[:, None] if count == 1 else length_B[:, None] + torch.arange(count, device=device)
        first_B = torch.arange(len(length_B), device=device) * capacity
        bias = None
        if masked:
            hidden = torch.arange(columns, device=device) > column_Bn[..., None]
            lowest = torch.finfo(self.dtype).min
            bias = torch.zeros(hidden.shape, dtype=self.dtype, device=device).masked_fill_(hidden, lowest)[:, None]
        return At(column_Bn, (column_Bn + first_B[:, None]).flatten(), bias, columns)

    def __call__(self, x_BnD: Tensor, at: At, cache: Cache, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        """Hidden states [B, n, D] after the final norm; the cache has the new positions then."""
        cos_sin_Bn = (cos_sin[0][at.column_Bn], cos_sin[1][at.column_Bn])
        for layer, keys, values in zip(self._call_layer, cache.keys, cache.values, strict=True):
            x_BnD = layer(x_BnD, at, cos_sin_Bn, keys, values)
        return self.norm(x_BnD)

    def compile(self, **options: Any) -> None:
        """Compile a layer, once for all of them (`torch.compile`), and what `compiled` is given from now on."""
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SHAPES)
        self._compile_options = options
        compiled = torch.compile(_Layer.__call__, **options)
        self._call_layer = [_bound(compiled, layer) for layer in self.layers]

    def compiled(self, function: Any) -> Any:
        """The function compiled as the layers are; itself where they are not."""
        return function if self._compile_options is None else torch.compile(function, **self._compile_options)


def _bound(call: Any, layer: _Layer) -> Any:
    return lambda *args: call(layer, *args)


def refusal(model: EChatModel) -> str | None:
    """Why the decoder of this model cannot be run here, or None. Found by its parts, not its name."""
    decoder = model.lm.llm.get_decoder()
    names = {name for name, _ in decoder.named_children()}
    if names != _DECODER:
        return f"the LLM's decoder has the parts {', '.join(sorted(names))}"
    rope = getattr(decoder.rotary_emb, "rope_type", "default")
    if not isinstance(rope, str) or rope in _ROPE_BY_LENGTH:
        return f"its rotary embedding ({rope}) depends on the length"
    if any(parameter.requires_grad and parameter.grad is not None for parameter in decoder.parameters()):
        return "the model is being trained"
    for number, layer in enumerate(decoder.layers):
        attention, mlp = ({name for name, _ in part.named_children()} for part in (layer.self_attn, layer.mlp))
        if (
            {name for name, _ in layer.named_children()} != _LAYER
            or attention not in (_ATTENTION, _ATTENTION | _HEAD_NORMS)
            or mlp != _MLP
        ):
            return f"layer {number} of the LLM has other parts than those of Llama and Qwen"
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        if any(not hasattr(norm, "variance_epsilon") or getattr(norm, "bias", None) is not None for norm in norms):
            return f"layer {number} of the LLM has other norms than those of Llama and Qwen"
    return None


_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.1}


def build_step(model: EChatModel) -> DecoderStep:
    """The step of a model's decoder, tried against transformers' own with a few ids.

    Raises:
        ValueError: where it does not take the model, with the reason.
    """
    with torch.inference_mode(False), torch.no_grad():
        step = DecoderStep(model)
    difference = differs(model, step)
    if difference > _TOLERANCE.get(step.dtype, 1e-3):
        raise ValueError(f"hidden states of the static step are {difference:.2g} from those of this LLM's own code")
    return step


@torch.inference_mode()
def differs(model: EChatModel, step: DecoderStep, positions: int = 3) -> float:
    """How far hidden states of the step are from transformers' own, over their largest value: layers of the same names
    may compute something else."""
    generator = torch.Generator().manual_seed(0)
    ids_1n = torch.randint(model.vocabulary.text_size, (1, positions), generator=generator).to(step.device)
    embeds = model.embed(ids_1n)
    expected = model.hidden(embeds, torch.arange(positions, device=step.device)[None]).float()
    cache, cos_sin = step.cache(1, positions), step.cos_sin(positions)
    found = []
    for position in range(positions):
        length_B = torch.full((1,), position, device=step.device)
        at = step.at(length_B, 1, positions, positions, masked=True)
        found.append(step(embeds[:, position : position + 1], at, cache, cos_sin).float())
    return float((torch.cat(found, dim=1) - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
