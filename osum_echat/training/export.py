"""From a training run to a checkpoint folder, whatever engine wrote the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from osum_echat.model import checkpoint as model_io
from osum_echat.model.echat import EChatModel
from osum_echat.model.lora import merge_lora
from osum_echat.model.storage import Storage
from osum_echat.training.folder import step_folder, trained_weights
from osum_echat.training.weights import load_run


def export_folder(folder: Path, out: Path, merge: bool = True, storage: Storage = "keep") -> Path:
    """Write the run's model as a checkpoint folder that `load_model`, `EChat.load` and the hub understand.

    Args:
        merge: add LoRA to the weights it adapts; False keeps both.
        storage: data type on disk.
    """
    model, tokenizer = load_run(folder)
    return _write(model, tokenizer, out, merge, storage)


def export_average(folders: Sequence[Path], out: Path, storage: Storage = "keep") -> Path:
    """Write the mean of several checkpoints of one run. Raises ValueError when they do not hold the same parameters."""
    steps = [step_folder(f) for f in folders]
    total: dict[str, Tensor] = {}
    for step in steps:
        weights = trained_weights(step)
        if total and weights.keys() != total.keys():
            raise ValueError(f"{step} does not hold the same parameters as {steps[0]}; average checkpoints of one run")
        for name, tensor in weights.items():
            total[name] = total[name] + tensor.double() if name in total else tensor.double()
    mean = {name: (tensor / len(steps)).float() for name, tensor in total.items()}
    model, tokenizer = load_run(steps[-1], weights=mean)
    return _write(model, tokenizer, out, True, storage)


def _write(model: EChatModel, tokenizer: Any, out: Path, merge: bool, storage: Storage) -> Path:
    if merge and model.config.lora is not None:
        merge_lora(model)
        model.config = dataclasses.replace(model.config, lora=None)
    return model_io.save_model(model, tokenizer, out, storage)
