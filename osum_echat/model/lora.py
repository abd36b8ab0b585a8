"""LoRA on the LLM, by peft: adding it, finding it, merging it."""

from __future__ import annotations

from typing import Any

from torch import nn

from osum_echat.model.config import LoraConfig


def add_lora(llm: nn.Module, config: LoraConfig) -> None:
    """Put low-rank adapters on ``llm`` in place. The LLM's other parameters are frozen by this; a training stage
    decides anew who trains.

    Raises:
        ValueError: for targets that are not there, or that the heads and the embedding table are part of (their weights
            are read directly).
    """
    import peft

    heads = {name for name, module in llm.named_modules() if module in (llm.get_output_embeddings(), llm.get_input_embeddings())}  # type: ignore[operator]
    wrong = [target for target in config.targets if any(name == target or name.endswith("." + target) for name in heads)]
    if wrong:
        raise ValueError(
            f"lora.targets may not hold the token table or the LM head ({', '.join(wrong)}); take linear layers of the blocks"
        )
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            target_modules=list(config.targets),
        ),
        llm,
    )


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The linear layers that carry an adapter, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def merge_lora(model: nn.Module) -> int:
    """Add every adapter to its layer's weight and take it away, in place. Returns how many there were."""
    layers = lora_layers(model)
    for name, layer in layers.items():
        layer.merge(safe_merge=True)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer.get_base_layer())
    return len(layers)
