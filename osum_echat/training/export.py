"""From a training run to a model: put its weights together, whatever engine wrote them, and write a checkpoint folder.

Training checkpoints hold what was trained; what was frozen comes from where the run started. Sharded files are read as they lie, without a
process group.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from osum_echat import config as config_io
from osum_echat.model import checkpoint as model_io
from osum_echat.model.config import ModelConfig
from osum_echat.model.echat import EChatModel
from osum_echat.model.lora import add_lora, merge_lora
from osum_echat.training import checkpoint
from osum_echat.training.config import TrainConfig

TOKENIZER = "tokenizer"
_PREFIX = "model."  # of `objective.Objective`


def trained_weights(step: Path) -> dict[str, Tensor]:
    """The weights in one training checkpoint under the names of `EChatModel`, as they were stored (DeepSpeed: float32)."""
    if (step / "deepspeed").is_dir():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        state = get_fp32_state_dict_from_zero_checkpoint(str(step), tag="deepspeed", exclude_frozen_parameters=True)
        return {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}
    reader = dcp.FileSystemReader(str(step / "dcp"))
    stored = reader.read_metadata().state_dict_metadata
    state = {
        name.removeprefix("model."): torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in stored.items()
        if name.startswith("model.") and isinstance(meta, TensorStorageMetadata)
    }
    dcp.load({"model": state}, storage_reader=reader, no_dist=True)
    return {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}


def assemble(
    folder: Path, changes: dict[str, Any] | None = None, weights: dict[str, Tensor] | None = None
) -> tuple[EChatModel, Any]:
    """Model (LoRA not merged) and tokenizer of a training run's newest checkpoint, or of one ``step_*`` folder of it.

    Args:
        changes: keys of the model config to replace.
        weights: instead of those in the checkpoint (an average).
    """
    from osum_echat.training import start

    step = checkpoint.step_folder(folder)
    content = checkpoint.read_state(step)
    config = config_io.from_dict(TrainConfig, content["config"], where=str(step))
    model_config = config_io.from_dict(ModelConfig, content["model"], where=str(step))
    tokenizer_folder = step.parent.parent / TOKENIZER
    if config.save_frozen or not content.get("frozen"):
        # Nothing of the start is needed any more.
        model = EChatModel(start.changed(model_config, {**(changes or {}), "lora": None}))
        if model_config.lora is not None:
            model.config = start.changed(model.config, {"lora": config_io.to_dict(model_config.lora)})
            add_lora(model.lm.llm, model_config.lora)
        tokenizer = model_io.load_tokenizer(step, model.config, tokenizer_folder) if tokenizer_folder.is_dir() else None
    else:
        config.model_changes = config_io.merge(config.model_changes, changes or {})
        model, tokenizer = start.load_start(config)
    own = dict(model.named_parameters(remove_duplicate=False))  # DeepSpeed names tied weights twice
    for name, tensor in (trained_weights(step) if weights is None else weights).items():
        own[name].data = tensor.to(own[name].dtype)
    return model, tokenizer


def export_folder(
    folder: Path, out: Path, merge: bool = True, storage: Literal["keep", "float32", "bfloat16", "float16", "int8"] = "keep"
) -> Path:
    """Write the run's model as a checkpoint folder that `load_model`, `EChat.load` and the hub understand.

    Args:
        merge: add LoRA to the weights it adapts; False keeps both.
        storage: data type on disk.
    """
    model, tokenizer = assemble(folder)
    return _write(model, tokenizer, out, merge, storage)


def export_average(
    folders: Sequence[Path], out: Path, storage: Literal["keep", "float32", "bfloat16", "float16", "int8"] = "keep"
) -> Path:
    """Write the mean of several checkpoints of one run. Raises ValueError when they do not hold the same parameters."""
    steps = [checkpoint.step_folder(f) for f in folders]
    total: dict[str, Tensor] = {}
    for step in steps:
        weights = trained_weights(step)
        if total and weights.keys() != total.keys():
            raise ValueError(f"{step} does not hold the same parameters as {steps[0]}; average checkpoints of one run")
        for name, tensor in weights.items():
            total[name] = total[name] + tensor.double() if name in total else tensor.double()
    mean = {name: (tensor / len(steps)).float() for name, tensor in total.items()}
    model, tokenizer = assemble(steps[-1], weights=mean)
    return _write(model, tokenizer, out, True, storage)


def _write(model: EChatModel, tokenizer: Any, out: Path, merge: bool, storage: Any) -> Path:
    if merge and model.config.lora is not None:
        import dataclasses

        merge_lora(model)
        model.config = dataclasses.replace(model.config, lora=None)
    return model_io.save_model(model, tokenizer, out, storage)
