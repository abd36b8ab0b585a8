"""The layout of a training folder, and how to read it without a run.

    <out>/checkpoints/step_00001250/   dcp/ or deepspeed/   weights and optimiser, written by the engine
                                       rank_00000.pt ...    random states and data position of each rank
                                       state.json           step, epoch, config, code version, world size: written last
    <out>/checkpoints/latest           name of the newest complete checkpoint
    <out>/tokenizer/                   the tokenizer of the run
    <out>/metrics.jsonl, tensorboard/, curves.png

`checkpoint.Checkpoints` writes the checkpoints. Everything that reads a training folder asks this module where things
are.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

STATE_FILE = "state.json"
LATEST = "latest"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
DEEPSPEED = "deepspeed"  # folder and tag of DeepSpeed's own files
DCP = "dcp"
_MODULE_PREFIX = "model."  # of `objective.Objective`, the module that engines save


def step_name(step: int) -> str:
    """Folder name of the checkpoint of one optimiser step."""
    return f"step_{step:08d}"


def complete_steps(checkpoints: Path) -> list[Path]:
    """All complete checkpoints in a ``checkpoints`` folder, oldest first."""
    return sorted(path for path in checkpoints.glob("step_*") if (path / STATE_FILE).is_file())


def latest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint in a ``checkpoints`` folder, or None.

    Raises:
        ValueError: when ``latest`` names a checkpoint and there is none at all.
    """
    pointer = checkpoints / LATEST
    if pointer.is_file():
        path = checkpoints / pointer.read_text(encoding="utf-8").strip()
        if (path / STATE_FILE).is_file():
            return path
        # Killed while the same step was being replaced: the newest complete one serves.
    complete = complete_steps(checkpoints)
    if pointer.is_file() and not complete:
        raise ValueError(f"{pointer} names a checkpoint that is not there; restore it, or remove the file to start anew")
    return complete[-1] if complete else None


def is_training_folder(folder: Path) -> bool:
    """Whether ``folder`` is a training run's output or one ``step_*`` folder of it."""
    return (folder / CHECKPOINTS).is_dir() or (folder / STATE_FILE).is_file()


def step_folder(folder: Path) -> Path:
    """The checkpoint that ``folder`` means: itself, or the newest of a run. Raises ValueError when there is none."""
    if (folder / STATE_FILE).is_file():
        return folder
    newest = latest(folder / CHECKPOINTS)
    if newest is None:
        raise ValueError(f"{folder} holds no complete training checkpoint")
    return newest


def run_folder(step: Path) -> Path:
    """The training folder that a ``step_*`` folder belongs to."""
    return step.parent.parent


def read_state(step: Path) -> dict[str, Any]:
    """state.json of one checkpoint. Raises ValueError when there is none."""
    file = step / STATE_FILE
    if not file.is_file():
        raise ValueError(f"{step} is not a complete training checkpoint (no {STATE_FILE})")
    return json.loads(file.read_text(encoding="utf-8"))


def engine_family(step: Path, state: dict[str, Any]) -> str:
    """``torch`` or ``deepspeed``: which engines can continue a checkpoint. Older checkpoints do not state it, their
    files tell."""
    return str(state.get("engine_family") or ("deepspeed" if (step / DEEPSPEED).is_dir() else "torch"))


def trained_weights(step: Path) -> dict[str, Tensor]:
    """The weights in one training checkpoint under the names of `EChatModel`, as they were stored (DeepSpeed: float32).

    Sharded files are read as they lie, without a process group.
    """
    if (step / DEEPSPEED).is_dir():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        state = get_fp32_state_dict_from_zero_checkpoint(str(step), tag=DEEPSPEED, exclude_frozen_parameters=True)
        return {name.removeprefix(_MODULE_PREFIX): tensor for name, tensor in state.items()}
    reader = dcp.FileSystemReader(str(step / DCP))
    stored = reader.read_metadata().state_dict_metadata
    state = {
        # The section of DCP's own state.
        name.removeprefix("model."): torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in stored.items()
        if name.startswith("model.") and isinstance(meta, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        # DCP's remark in every single process.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load({"model": state}, storage_reader=reader, no_dist=True)
    return {name.removeprefix(_MODULE_PREFIX): tensor for name, tensor in state.items()}
