"""Names of the published checkpoints and of ours, both ways, strictly.

A published state dict (`language_think_final.pt`, `tag_think_final.pt`, 888 keys) and one of ours hold the same tensors
under other names. `match` finds for each tensor of a model the key of a file that holds it, and stops with a list when
a key is missing, unexpected or of another shape; nothing is dropped silently. Known and harmless: up to four names for
the tied token table, three more that appear after the reference has generated once, and `ln_speech`, which no forward
pass has ever used (kept as ``unused.*`` when files are converted, so that the way back gives every key). The position
tables are in the files, rounded, and override the computed ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from osum_echat.model.echat import EChatModel
from osum_echat.model.lora import lora_layers

Shape = tuple[int, ...]

UNUSED = ("ln_speech.weight", "ln_speech.bias")
UNUSED_PREFIX = "unused."
LATE_ALIASES = {
    "llama_model.speech_token_emded.weight": "speech_token_emded.weight",
    "llama_model.speech_head.weight": "speech_head.weight",
    "llama_model.speech_head.bias": "speech_head.bias",
}
_LLM = "lm.llm."
_LLM_RELEASED = "llama_model."
_LLM_RELEASED_LORA = "llama_model.base_model.model."

# Clean prefix or block part -> published one.
_PREFIXES = {
    "encoder.conv1.": "encoder.embed.conv.0.",
    "encoder.conv2.": "encoder.embed.conv.2.",
    "encoder.norm.": "encoder.after_norm.",
    "encoder.blocks.": "encoder.encoders.",
    "encoder.positions_SE": "encoder.embed.pos_enc.pe",
    "adapter.down.convs.0.": "down_sample_2.conv.1.",
    "adapter.down.convs.1.": "down_sample_2.conv.4.",
    "adapter.down.convs.2.": "down_sample_2.conv.7.",
    "adapter.input.": "speech_transformer.embed.out.0.",
    "adapter.input_norm.": "speech_transformer.embed.out.1.",
    "adapter.positions_PA": "speech_transformer.embed.pos_enc.pe",
    "adapter.blocks.": "speech_transformer.encoders.",
    "adapter.norm.": "speech_transformer.after_norm.",
    "projection.": "speech_llama_proj.",
    "lm.speech_embedding.": "speech_token_emded.",
    "lm.speech_head.": "speech_head.",
}
_BLOCK_PARTS = {
    "attention.q": "self_attn.linear_q",
    "attention.k": "self_attn.linear_k",
    "attention.v": "self_attn.linear_v",
    "attention.out": "self_attn.linear_out",
    "attention_norm": "norm1",
    "ffn_norm": "norm2",
    "ffn.up": "feed_forward.w_1",
    "ffn.down": "feed_forward.w_2",
}
POSITION_TABLES = ("encoder.positions_SE", "adapter.positions_PA")


class CheckpointError(ValueError):
    """A checkpoint that does not fit the config, or cannot be read; the message says what to do."""


@dataclass(frozen=True)
class ModelSpec:
    """What a model's state dict holds, without its tensors.

    Attributes:
        shapes: shape of every entry, by clean name; a tied LM head is an entry of its own.
        token_table, text_head: names of the LLM's embedding table and LM head.
        tied: whether they are one tensor.
        lora: whether the LLM carries LoRA adapters.
    """

    shapes: Mapping[str, Shape]
    token_table: str
    text_head: str
    tied: bool
    lora: bool


def spec_of(model: EChatModel) -> ModelSpec:
    """The spec of a model (also one on the meta device)."""
    llm = model.lm.llm
    table, head = llm.get_input_embeddings().weight, llm.get_output_embeddings().weight
    names = {id(p): name for name, p in model.named_parameters()}
    heads = [name for name, p in model.named_parameters(remove_duplicate=False) if p is head]
    tied = bool(getattr(llm.config, "tie_word_embeddings", False))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return ModelSpec(shapes, names[id(table)], heads[-1], tied, bool(lora_layers(model)))


def is_released(names: Iterable[str]) -> bool:
    """Whether these keys are a published state dict's."""
    return any(name.startswith((_LLM_RELEASED, "speech_transformer.", "speech_token_emded.", "down_sample_2.")) for name in names)


def released_name(name: str, lora: bool) -> str | None:
    """The published key of a clean name; None for parts that the published model does not have."""
    if name.startswith(_LLM):
        return (_LLM_RELEASED_LORA if lora else _LLM_RELEASED) + name.removeprefix(_LLM)
    for clean, released in _PREFIXES.items():
        if name.startswith(clean):
            rest = name.removeprefix(clean)
            if clean.endswith("blocks."):
                number, _, inner = rest.partition(".")
                part, _, kind = inner.rpartition(".")
                rest = f"{number}.{_BLOCK_PARTS[part]}.{kind}"
            return released + rest
    return None


def _released_names(name: str, spec: ModelSpec) -> list[str]:
    """All published keys of one clean entry, the main one first."""
    main = released_name(name, spec.lora)
    if main is None:
        return []
    table, head = released_name(spec.token_table, spec.lora), released_name(spec.text_head, spec.lora)
    assert table is not None and head is not None
    if name in (spec.token_table, spec.text_head):
        if spec.tied:
            return [table, head, "embed_tokens.weight", "lm_head.weight"]
        return [main, "embed_tokens.weight" if name == spec.token_table else "lm_head.weight"]
    return [main, *(alias for alias, target in LATE_ALIASES.items() if target == main)]


def names_in_file(name: str, spec: ModelSpec, released: bool) -> list[str]:
    """Keys under which a file may hold clean entry ``name``, the usual one first; empty when the published form has no
    place for it."""
    if released:
        return _released_names(name, spec)
    if spec.tied and name in (spec.token_table, spec.text_head):
        return [spec.token_table, spec.text_head]
    return [name]


def match(found: Mapping[str, Shape], spec: ModelSpec, released: bool | None = None) -> dict[str, str]:
    """For each clean entry of ``spec`` the key of ``found`` (shapes of a file's tensors) that holds it.

    ``released``: whether ``found`` has published names; by default that is told from the names.

    Raises:
        CheckpointError: listing missing, unexpected and misshaped keys, with a remedy.
    """
    released = is_released(found) if released is None else released
    chosen: dict[str, str] = {}
    known = set(UNUSED) if released else {UNUSED_PREFIX + name for name in UNUSED}
    missing, misshaped = [], []
    for name, shape in spec.shapes.items():
        candidates = names_in_file(name, spec, released)
        known.update(candidates)
        present = [key for key in candidates if key in found]
        if not present:
            missing.append(candidates[0] if candidates else f"{name} (no place for it in the published form)")
            continue
        chosen[name] = present[0]
        wanted = (1, *shape) if released and name in POSITION_TABLES else shape
        misshaped += [f"{key} is {list(found[key])}, expected {list(wanted)}" for key in present if tuple(found[key]) != wanted]
    unexpected = [key for key in found if key not in known]
    if missing or unexpected or misshaped:
        raise CheckpointError(_complaint(missing, unexpected, sorted(set(misshaped)), spec))
    return chosen


def from_file(name: str, tensor: Tensor) -> Tensor:
    """A tensor of a file in the shape of clean entry ``name`` (published position tables have a batch axis)."""
    return tensor[0] if name in POSITION_TABLES and tensor.ndim == 3 else tensor


def to_released(state: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """The complete published state dict of clean tensors, aliases included (they share memory).

    ``state`` may hold ``unused.ln_speech.*``; without it, `ln_speech` is the identity it was initialised to.

    Raises:
        CheckpointError: when the model has parts that the published form has no place for, or an entry is missing.
    """
    homeless = [name for name in spec.shapes if released_name(name, spec.lora) is None]
    if homeless:
        raise CheckpointError(
            f"the published form has no place for {_listed(homeless)}; it holds models without adapter.encoder_layers, adapter.ctc "
            "and adapter.tags only. Export to safetensors instead"
        )
    chosen = match({name: tuple(tensor.shape) for name, tensor in state.items()}, spec)
    out: dict[str, Tensor] = {}
    for name in spec.shapes:
        tensor = state[chosen[name]]
        keys = [key for key in _released_names(name, spec) if key not in LATE_ALIASES]
        out.update(dict.fromkeys(keys, tensor[None] if name in POSITION_TABLES else tensor))
    norm = state["encoder.norm.weight"]
    out["ln_speech.weight"] = state.get(UNUSED_PREFIX + "ln_speech.weight", torch.ones_like(norm))
    out["ln_speech.bias"] = state.get(UNUSED_PREFIX + "ln_speech.bias", torch.zeros_like(norm))
    return out


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _complaint(missing: list[str], unexpected: list[str], misshaped: list[str], spec: ModelSpec) -> str:
    lines = ["the checkpoint does not fit the config:"]
    for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped)):
        if names:
            lines.append(f"  {len(names)} {title}: {_listed(names)}")
    if any(re.search(r"\.lora_[AB]\.|\.base_layer\.", name) for name in unexpected):
        remedy = "it holds LoRA adapters: add a lora: section (rank, alpha, targets) to the config"
    elif spec.lora and any(".lora_" in name or ".base_layer." in name for name in missing):
        remedy = "the config asks for LoRA adapters, the file has none: take lora: out of the config, and add adapters when training starts"
    elif misshaped:
        remedy = "its sizes are other ones: compare encoder, adapter, llm and vocabulary of the config with the shapes above"
    elif missing and not unexpected:
        remedy = "it is incomplete: use the whole model's file, or load single parts with checkpoint.load_parts"
    else:
        remedy = "it is another model's: use the config that came with it"
    return "\n".join([*lines, f"  {remedy}. `python -m osum_echat.model.inspect CONFIG --checkpoint FILE` shows both sides"])
