"""The parts of a model, by the names that configs, checkpoints and tables use: one table for all of them."""

from __future__ import annotations

PARTS: dict[str, tuple[str, ...]] = {
    "encoder": ("encoder.",),
    "adapter": ("adapter.", "projection."),
    "heads": ("ctc.", "tags."),  # on the adapter: transcript and tags
    "turn": ("turn.",),  # on the encoder: where a turn stands
    "llm": ("lm.llm.",),  # with the table of text embeddings
    "lora": (),  # inside the LLM: known by the names of its parameters
    "speech": ("lm.speech_embedding.", "lm.speech_head."),
}
"""Part -> how the names of its parameters in `EChatModel` begin."""

_LORA = ".lora_"


def part_of(parameter: str) -> str:
    """The part that a parameter of `EChatModel` belongs to."""
    if _LORA in parameter:
        return "lora"
    for part, prefixes in PARTS.items():
        if parameter.startswith(prefixes):
            return part
    raise AssertionError(f"parameter {parameter} belongs to no part; extend model.parts.PARTS")


def belongs(parameter: str, name: str) -> bool:
    """Whether a parameter or buffer is in ``name``: a part, or a module such as ``lm.llm`` or ``ctc``."""
    return parameter.startswith(PARTS.get(name) or f"{name}.")


def has_lora(parameters: list[str]) -> bool:
    """Whether a model with these parameters has LoRA adapters."""
    return any(_LORA in name for name in parameters)
