"""Where weights come from: a checkpoint of any form, a training run, or a new model; then single parts put in.

A training checkpoint holds what was trained; what was frozen comes from where that run started (`load_run`).
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osum_echat import config as config_io
from osum_echat import device as devices
from osum_echat.model import checkpoint as model_io
from osum_echat.model import download
from osum_echat.model.config import ModelConfig, load_config
from osum_echat.model.echat import EChatModel
from osum_echat.model.lora import add_lora
from osum_echat.model.parts import belongs
from osum_echat.model.whisper import read_whisper
from osum_echat.training import folder as layout
from osum_echat.training.config import ConfigError, TrainConfig

log = logging.getLogger(__name__)


def load_start(config: TrainConfig) -> tuple[EChatModel, Any]:
    """The model on the CPU, with LoRA where the config wants it, and the tokenizer.

    Raises:
        ConfigError: when neither a checkpoint nor a model config is given.
        ValueError: when a file does not fit the model.
    """
    init = config.init
    devices.seed_all(config.seed)  # new weights are the same on every rank
    if init.checkpoint is not None and layout.is_training_folder(Path(init.checkpoint)):
        model, tokenizer = load_run(Path(init.checkpoint), changes=_changes(config))
    elif init.checkpoint is not None:
        model, tokenizer = _from_checkpoint(config, init.checkpoint)
    else:
        model, tokenizer = _new(config)
    for part, path in init.parts.items():
        log.info("%s: %d tensors from %s", part, _put_part(model, part, Path(path)), path)
    if init.whisper is not None:
        put_whisper(model, init.whisper)
    if init.llm is not None:
        model_io.load_llm(model, init.llm)
    if config.lora is not None and model.config.lora is None:
        model.config = dataclasses.replace(model.config, lora=config.lora)
        add_lora(model.lm.llm, config.lora)
    return model, tokenizer


def load_run(
    folder: Path, changes: dict[str, Any] | None = None, weights: dict[str, Tensor] | None = None
) -> tuple[EChatModel, Any]:
    """Model (LoRA not merged) and tokenizer of a training run's newest checkpoint, or of one ``step_*`` folder of it.

    Args:
        changes: keys of the model config to replace.
        weights: instead of those in the checkpoint (an average).
    """
    step = layout.step_folder(folder)
    content = layout.read_state(step)
    config = config_io.from_dict(TrainConfig, content["config"], where=str(step))
    if config.save_frozen or not content.get("frozen"):
        # Nothing of the start is needed any more.
        model_config = config_io.from_dict(ModelConfig, content["model"], where=str(step))
        model, tokenizer = _complete_run(step, model_config, changes or {})
    else:
        config.model_changes = config_io.merge(config.model_changes, changes or {})
        model, tokenizer = load_start(config)
    own = dict(model.named_parameters(remove_duplicate=False))  # DeepSpeed names tied weights twice
    for name, tensor in (layout.trained_weights(step) if weights is None else weights).items():
        own[name].data = tensor.to(own[name].dtype)
    return model, tokenizer


def _complete_run(step: Path, model_config: ModelConfig, changes: dict[str, Any]) -> tuple[EChatModel, Any]:
    """An empty model for a checkpoint that holds every weight, and the run's own tokenizer (None when it saved
    none)."""
    model = EChatModel(changed(model_config, {**changes, "lora": None}))
    if model_config.lora is not None:
        model.config = changed(model.config, {"lora": config_io.to_dict(model_config.lora)})
        add_lora(model.lm.llm, model_config.lora)
    tokenizer_folder = layout.run_folder(step) / layout.TOKENIZER
    return model, model_io.load_tokenizer(step, model.config, tokenizer_folder) if tokenizer_folder.is_dir() else None


def _put_part(model: EChatModel, part: str, path: Path) -> int:
    """Copy one part from a checkpoint or from a training run that has trained (or kept) it; returns the number of
    tensors."""
    if not layout.is_training_folder(path):
        return len(model_io.load_parts(model, path, [part]))
    weights = layout.trained_weights(layout.step_folder(path))
    wanted = {name: param for name, param in model.named_parameters() if belongs(name, part)}
    missing = [name for name in wanted if name not in weights]
    if missing or not wanted:
        raise ConfigError(
            f"init.parts.{part}: {path} has not stored {(missing or [part])[0]}; export that run and name the exported folder"
        )
    with torch.no_grad():
        for name, param in wanted.items():
            param.copy_(weights[name])
    return len(wanted)


def put_whisper(model: EChatModel, name: str) -> None:
    """Copy a Whisper encoder (any published form, or a hub name) into the model. Its position table may be shorter than
    the model's."""
    sizes, state = read_whisper(download.find(name, ["config.json", "model.safetensors"], "init.whisper"))
    ours = model.config.encoder
    wrong = [f for f in ("mels", "dim", "heads", "ffn", "layers") if getattr(sizes, f) != getattr(ours, f)]
    if wrong:
        sizes_differ = ", ".join(f"{f} {getattr(sizes, f)} (model: {getattr(ours, f)})" for f in wrong)
        raise ConfigError(f"init.whisper: {name} does not fit the model's encoder: {sizes_differ}")
    own = model.encoder.state_dict()
    with torch.no_grad():
        for key, tensor in state.items():
            rows = min(len(tensor), len(own[key]))  # only the position table differs in length
            own[key][:rows].copy_(tensor[:rows])


def _changes(config: TrainConfig) -> dict[str, Any]:
    return config_io.merge({"activation_checkpointing": config.checkpoint_activations}, config.model_changes)


def changed(model_config: ModelConfig, changes: dict[str, Any]) -> ModelConfig:
    """A model config with some keys replaced."""
    return config_io.from_dict(ModelConfig, config_io.merge(config_io.to_dict(model_config), changes), where="model_changes")


def _from_checkpoint(config: TrainConfig, name: str) -> tuple[EChatModel, Any]:
    """A checkpoint folder's own config goes before ``model``, which is for files that bring none."""
    path = download.find(name, key="init.checkpoint")
    own = path / model_io.CONFIG_FILE
    file = own if own.is_file() or config.model is None else Path(config.model)
    if not file.is_file():
        raise ConfigError(f"init.checkpoint: {name} has no {model_io.CONFIG_FILE}; state its model config with model: (a file)")
    return model_io.load_model(path, changed(load_config(file), _changes(config)), tokenizer=config.init.tokenizer)


def _new(config: TrainConfig) -> tuple[EChatModel, Any]:
    if config.model is None:
        raise ConfigError("state where to start: init.checkpoint, or model: (a model config file) for a new model")
    model_config = changed(load_config(config.model), _changes(config))
    tokenizer = model_io.load_tokenizer(Path(config.model).parent, model_config, config.init.tokenizer or config.init.llm)
    return EChatModel(dataclasses.replace(model_config, lora=None)), tokenizer
