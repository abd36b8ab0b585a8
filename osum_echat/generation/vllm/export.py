"""A checkpoint's LLM as a plain Qwen2 with an enlarged vocabulary, in a folder that vLLM (or transformers) loads.

    config.json, generation_config.json   Qwen2ForCausalLM with V + S + 3 ids, untied; it ends at ``end_id``
    model.safetensors (or shards)         the LLM; text table and speech table in one, text head and speech head in one
    tokenizer/                            of the text
    osum_echat.json                       vocabulary, settings of decoding, the speech head's bias, and what the folder
                                          was made of

The tokenizer has a folder of its own: beside config.json transformers would take it for a Qwen2's, which splits text in
its own way.

Unified ids are row numbers, so nothing is translated. A Qwen2 head has no bias and the speech head has one: it is
written beside the weights and added by the logits processor. Head rows of the two ids that are inputs only are zero.
Encoder, adapter and token2wav stay in the checkpoint.

V text ids, S speech codes, D width.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osum_echat.config import to_dict
from osum_echat.dialogue.dialect import Dialect
from osum_echat.generation.config import GenerationConfig
from osum_echat.generation.vllm.rules import end_id, to_settings
from osum_echat.model.checkpoint import TOKENIZER_FOLDER, clean_state
from osum_echat.model.echat import EChatModel
from osum_echat.model.lora import merge_lora
from osum_echat.model.storage import replace_folder, write_safetensors

SETTINGS_FILE = "osum_echat.json"
FORMAT = 1
_LLM = "lm.llm."
_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def refusal(model: EChatModel) -> str | None:
    """Why the LLM cannot be written as a plain Qwen2, in a sentence; None when it can."""
    config = model.lm.llm.config
    if config.model_type != "qwen2":
        return f"the LLM of this checkpoint is a {config.model_type}; only a qwen2 can be exported for vLLM"
    if model.config.llm.rotary_dtype == "bfloat16" and model.dtype == torch.float32:
        return "this checkpoint rounds its rotary tables to bfloat16, which vLLM does in bfloat16 only: export it with --dtype bfloat16"
    return None


def export_for_vllm(model: EChatModel, tokenizer: Any, config: GenerationConfig, dialect: Dialect, folder: str | Path) -> Path:
    """Write the folder; it appears under its name only when complete. Adapters (LoRA) are merged into ``model``.

    Raises:
        ValueError: the LLM cannot be written as a plain Qwen2, or ``folder`` holds something else.
    """
    why = refusal(model)
    if why is not None:
        raise ValueError(why)
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / SETTINGS_FILE).is_file():
        raise ValueError(f"{folder} holds something else; name another folder to write")
    merge_lora(model)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with torch.inference_mode():
        write_safetensors(qwen2_tensors(model), partial)
    end = end_id(model.vocabulary)
    _write_json(partial / "config.json", qwen2_config(model))
    _write_json(partial / "generation_config.json", {"eos_token_id": end, "do_sample": False})
    tokenizer.save_pretrained(partial / TOKENIZER_FOLDER)
    settings = {
        "format": FORMAT,
        "vocabulary": to_dict(model.vocabulary),
        "end_id": end,
        "decoding": to_settings(config, dialect),
        "speech_bias": model.lm.speech_head.bias.detach().float().tolist(),
        "fingerprint": fingerprint(model),
    }
    _write_json(partial / SETTINGS_FILE, settings)
    replace_folder(partial, folder)
    return folder


def qwen2_config(model: EChatModel) -> dict[str, Any]:
    """``config.json``: the LLM's own, with the enlarged vocabulary."""
    data: dict[str, Any] = model.lm.llm.config.to_dict()
    for name in ("torch_dtype", "_attn_implementation", "_attn_implementation_internal", "pad_token_id", "_name_or_path"):
        data.pop(name, None)
    end = end_id(model.vocabulary)
    return data | {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": end + 1,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": end,
        "dtype": str(model.dtype).removeprefix("torch."),
        "use_cache": True,
        "osum_echat": FORMAT,
    }


def qwen2_tensors(model: EChatModel) -> Iterator[tuple[str, Tensor]]:
    """The tensors under their Qwen2 names, one at a time."""
    state = clean_state(model)
    tied = model.lm.llm.get_output_embeddings().weight
    text_VD = model.lm.llm.get_input_embeddings().weight
    speech_SD = model.lm.speech_head.weight
    inputs_only = speech_SD.new_zeros(model.vocabulary.speech_rows - model.vocabulary.speech_classes, speech_SD.shape[1])
    yield _TABLE, torch.cat([text_VD, model.lm.speech_embedding.weight.to(text_VD.dtype)])
    yield _HEAD, torch.cat([tied, speech_SD.to(tied.dtype), inputs_only.to(tied.dtype)])
    for name, tensor in state.items():
        short = name.removeprefix(_LLM)
        if name.startswith(_LLM) and short not in (_TABLE, _HEAD):
            yield short, tensor.contiguous()


def fingerprint(model: EChatModel) -> str:
    """A mark of the weights: a digest of the speech head's bias and of the last norm, which every training changes."""
    digest = hashlib.sha256()
    norm = model.lm.llm.get_decoder().norm.weight
    for tensor in (model.lm.speech_head.bias, norm):
        digest.update(tensor.detach().to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:32]


def read_settings(folder: str | Path) -> dict[str, Any]:
    """What `export_for_vllm` wrote beside the weights. Raises ValueError for a folder that is none of its own."""
    file = Path(folder) / SETTINGS_FILE
    if not file.is_file():
        raise ValueError(f"{folder} was not written by osum-echat export --for vllm: it has no {SETTINGS_FILE}")
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("format") != FORMAT:
        raise ValueError(
            f"{folder} was exported by another version (format {settings.get('format')}, this is {FORMAT}); export it again"
        )
    return settings


def folder_dtype(folder: str | Path) -> str:
    """What vLLM computes in on an exported folder. Raises ValueError for another folder."""
    read_settings(folder)
    config: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return str(config["dtype"])


def check_folder(folder: str | Path, model: EChatModel) -> dict[str, Any]:
    """The settings of a folder that was exported from these weights. Raises ValueError for another one."""
    settings = read_settings(folder)
    if settings["fingerprint"] != fingerprint(model) or settings["vocabulary"] != to_dict(model.vocabulary):
        raise ValueError(f"{folder} was exported from another checkpoint; run osum-echat export --for vllm again")
    return settings


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
