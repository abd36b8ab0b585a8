"""Configuration of the model: encoder, adapter, LLM, vocabulary, LoRA.

The defaults are the published 3B model (arXiv 2508.09600), so a config states only what differs. Two written forms are
read: ours (`conf/ct_config.yaml`, the field names below) and the training YAML of the published code (`encoder_conf:`,
`llm_path:`, ...), so that a config which somebody already has next to a checkpoint works as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from osum_echat import config as config_io
from osum_echat.config import ConfigError, InputPath
from osum_echat.dialogue.dialect import Dialect
from osum_echat.dialogue.vocabulary import Vocabulary
from osum_echat.rates import ENCODER_FRAMES_PER_SECOND, POSITIONS_PER_SECOND

DOWN_SAMPLE_RATE = 4

Recompute = bool | Literal["selective"]
"""What of a block the backward pass computes again instead of keeping it: all but its input, or what costs little
("selective": everything but products and attention)."""
_QWEN_3B = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


@dataclass(frozen=True)
class EncoderConfig:
    """A Whisper-shaped encoder (defaults: medium).

    ``max_positions`` is the number of rows of the fixed position table (two feature frames each, so 50 a second); it is
    part of a checkpoint.
    """

    mels: int = 80
    dim: int = 1024
    heads: int = 16
    ffn: int = 4096
    layers: int = 24
    max_positions: int = 30000
    dropout: float = 0.1

    def __post_init__(self) -> None:
        _check_heads("encoder", self.dim, self.heads)


@dataclass(frozen=True)
class CtcConfig:
    """A CTC head on the adapter output, over the text vocabulary and one blank class (the last).

    Args:
        soft_tokens: the LLM hears the posterior: (posterior of the text classes) x (its own token embeddings) is added
            to the gated projection.
        compress: frames that CTC calls blank or a repeat become invisible; the first frame of a segment holds the
            segment's mean.
        gate: start value of the gate on the projection (learned; 1 without soft tokens is the plain adapter).
    """

    soft_tokens: bool = True
    compress: bool = True
    gate: float = 1.0


@dataclass(frozen=True)
class AdapterConfig:
    """Down-sampler (rate 4) and adapter blocks.

    Args:
        encoder_layers: encoder layers that the adapter sees side by side, each under its own LayerNorm: k is the output
            of block k (from 1), the number of blocks is the encoder's final output. Empty: the final output alone, as
            published.
        ctc: see `CtcConfig`; None as published.
        tags: tag heads, name -> labels (for example ``gender: [male, female]``); their soft decisions are added to the
            two marker rows around the audio. Empty as published.
        turn: labels of the head that says where a turn stands (`model.turn.LABELS`). Empty, as published: no head.
    """

    dim: int = 1024
    heads: int = 4
    ffn: int = 2560
    layers: int = 4
    max_positions: int = 5000
    dropout: float = 0.1
    encoder_layers: tuple[int, ...] = ()
    ctc: CtcConfig | None = None
    tags: dict[str, list[str]] = field(default_factory=dict)
    turn: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_heads("adapter", self.dim, self.heads)
        if self.dim % 2:
            raise ValueError(f"adapter.dim={self.dim} must be even: its position table interleaves sines and cosines")
        for name, labels in self.tags.items():
            if len(labels) < 2 or len(set(labels)) != len(labels):
                raise ValueError(f"adapter.tags.{name} needs at least two different labels, found {labels}")


@dataclass(frozen=True)
class LlmConfig:
    """Any transformers causal LM.

    Args:
        config: its transformers config written out (``model_type`` and sizes); used when ``path`` is None.
        path: a folder with the LLM's ``config.json`` (and tokenizer); relative paths start at the file that states
            them.
        attention: transformers' attention back end. ``sdpa``; ``eager`` is the faster one for bf16 training on CPUs
            with AMX; ``flash_attention_2`` where it is installed.
        rotary_dtype: what the cosines and sines of the rotary positions are rounded to. The published model's LLM was
            built in bfloat16, its tables with it: a float32 run meets the recorded numbers (1e-6 instead of 3e-3 in
            hidden states) with the same rounding. A bfloat16 run rounds them anyway.
    """

    config: dict[str, Any] = field(default_factory=lambda: dict(_QWEN_3B))
    path: InputPath | None = None
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    rotary_dtype: Literal["float32", "bfloat16"] = "float32"

    def transformers_config(self) -> dict[str, Any]:
        """The LLM's transformers config as plain data. Raises ConfigError when it cannot be read."""
        data = dict(self.config)
        if self.path is not None:
            file = Path(self.path) / "config.json"
            if not file.is_file():
                raise ConfigError(
                    f"llm.path: {file} not found; give a folder with the LLM's config.json, or write llm.config out instead"
                )
            data = json.loads(file.read_text(encoding="utf-8"))
        if "model_type" not in data:
            raise ConfigError(f"llm config {self.path or ''} has no model_type (for example qwen2)")
        return data


@dataclass(frozen=True)
class LoraConfig:
    """LoRA on the LLM by peft; the defaults are the published training recipe (no up_proj)."""

    rank: int = 64
    alpha: float = 32.0
    dropout: float = 0.1
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj")


@dataclass(frozen=True)
class ModelConfig:
    """The whole model.

    ``dialect``: how the checkpoint is spoken to, and what it has learnt. ``tokenizer``: folder or hub name of the text
    tokenizer (a checkpoint folder brings its own). ``activation_checkpointing``: what of each block is computed again
    in the backward pass instead of kept (`Recompute`). ``weights``: how a CPU keeps the weights when it answers and the
    call does not say (`device.WEIGHTS`); training and accelerators do not look at it.
    """

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    llm: LlmConfig = field(default_factory=LlmConfig)
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    lora: LoraConfig | None = None
    dialect: Dialect = field(default_factory=Dialect)
    tokenizer: InputPath | None = None
    activation_checkpointing: Recompute = False
    weights: Literal["auto", "float32", "bf16", "int8", "int4"] = "auto"

    def __post_init__(self) -> None:
        chosen = self.adapter.encoder_layers
        if any(not 1 <= layer <= self.encoder.layers for layer in chosen) or len(set(chosen)) != len(chosen):
            raise ValueError(f"adapter.encoder_layers={list(chosen)} must be different numbers in 1..{self.encoder.layers}")

    @property
    def max_seconds(self) -> float:
        """The longest recording that the position tables of encoder and adapter hold."""
        return min(self.encoder.max_positions / ENCODER_FRAMES_PER_SECOND, self.adapter.max_positions / POSITIONS_PER_SECOND)

    @property
    def encoder_layers(self) -> tuple[int, ...]:
        """Encoder layers that the adapter sees (see `AdapterConfig`)."""
        return self.adapter.encoder_layers or (self.encoder.layers,)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ModelConfig:
    """Read a model config in either written form; ``overrides`` are ``key=value`` of our form. Raises ConfigError."""
    path = Path(config_io.find_path(str(path)))
    data = config_io.read_with_folders(path)
    if is_reference_form(data):
        data = from_reference(data, path)
    return config_io.from_dict(ModelConfig, config_io.merge(data, config_io.parse_overrides(overrides)), where=str(path))


def _check_heads(part: str, dim: int, heads: int) -> None:
    if dim < 1 or heads < 1 or dim % heads:
        raise ValueError(f"{part}.dim={dim} must be a multiple of {part}.heads={heads}")


# ---- the training YAML of the published code -------------------------------------------------------------------------


# What the published model class supports; any other value names a variant that was never released.
_FIXED_TOP = {"encoder": "transformer", "adapter_type": "osum_echat", "downsample_rate": DOWN_SAMPLE_RATE, "model": "osum_echat"}
_FIXED_ENCODER = {
    "activation_type": "gelu",
    "input_layer": "conv1d2",
    "pos_enc_layer_type": "abs_pos_whisper",
    "normalize_before": True,
    "key_bias": False,
    "static_chunk_size": -1,
    "use_dynamic_chunk": False,
}
_ENCODER_NAMES = {
    "output_size": "dim",
    "attention_heads": "heads",
    "linear_units": "ffn",
    "num_blocks": "layers",
    "dropout_rate": "dropout",
}
_ENCODER_IGNORED = {"positional_dropout_rate", "attention_dropout_rate", "use_dynamic_left_chunk", "gradient_checkpointing"}


def _dtype_of(llm: Mapping[str, Any]) -> str:
    """The published code builds the LLM in the dtype that its config names."""
    return "bfloat16" if llm.get("torch_dtype", llm.get("dtype")) == "bfloat16" else "float32"


def is_reference_form(data: Mapping[str, Any]) -> bool:
    """Whether a config mapping is written the way the published training code writes it."""
    return "encoder_conf" in data or "llm_path" in data


def from_reference(data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Our form of a published training YAML. Keys about data and optimisation are not the model's and are left alone.

    Raises ConfigError for a variant that this model does not have.
    """
    for key, value in _FIXED_TOP.items():
        if data.get(key, value) != value:
            raise ConfigError(f"{path}: {key}: {data[key]!r} is not supported; the published checkpoints have {value!r}")
    encoder_conf = data.get("encoder_conf") or {}
    encoder: dict[str, Any] = {"mels": data.get("input_dim", EncoderConfig.mels)}
    for key, value in encoder_conf.items():
        if key in _ENCODER_NAMES:
            encoder[_ENCODER_NAMES[key]] = value
        elif key in _FIXED_ENCODER:
            if value != _FIXED_ENCODER[key]:
                raise ConfigError(f"{path}: encoder_conf.{key}: {value!r} is not supported; use {_FIXED_ENCODER[key]!r}")
        elif key not in _ENCODER_IGNORED:
            raise ConfigError(f"{path}: unknown key encoder_conf.{key}")
    if not data.get("llm_path"):
        raise ConfigError(f"{path}: llm_path is missing; it names the folder of the LLM's config.json and tokenizer")
    llm_path = Path(str(data["llm_path"]))
    if not llm_path.is_absolute() and (path.parent / llm_path).is_dir():
        llm_path = path.parent / llm_path
    llm = LlmConfig(path=str(llm_path)).transformers_config()
    text_size, eos = int(llm["vocab_size"]), llm.get("eos_token_id", Vocabulary.eos_id)
    unknown = Vocabulary.unknown_id if text_size == Vocabulary.text_size else None
    out: dict[str, Any] = {
        "encoder": encoder,
        "adapter": {"dim": encoder.get("dim", EncoderConfig.dim)},
        "llm": {"path": str(llm_path), "rotary_dtype": _dtype_of(llm)},
        "vocabulary": {
            "text_size": text_size,
            "eos_id": eos[0] if isinstance(eos, list) else eos,
            "unknown_id": unknown,
            "speech_codes": int(data.get("speech_token_num", Vocabulary.speech_codes + 1)) - 1,
        },
        "tokenizer": str(llm_path),
        "activation_checkpointing": bool(encoder_conf.get("gradient_checkpointing", False)),
    }
    if data.get("use_lora"):
        lora = LoraConfig()
        out["lora"] = {
            "rank": data.get("lora_rank", lora.rank),
            "alpha": float(data.get("lora_alpha", lora.alpha)),
            "dropout": data.get("lora_dropout", lora.dropout),
        }
    return out
