"""Loading and saving models: one function for every form of checkpoint.

    checkpoint folder   config.yaml + model.safetensors (or shards) + tokenizer/   what `save_model` writes
    published file      language_think_final.pt, with conf/ct_config.yaml
    safetensors         a file or shards of either naming, with a config
    DeepSpeed folder    of a training run, ours or the published code's, with a config

The model is built on the meta device and the file's tensors become its parameters: no random initialisation, nothing
held twice. Where device and dtype are the file's own (CPU), tensors of large files stay memory-mapped until something
writes to them.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from osum_echat import config as config_io
from osum_echat.device import Weights
from osum_echat.model import download, quantized
from osum_echat.model.config import LlmConfig, ModelConfig, load_config
from osum_echat.model.echat import EChatModel
from osum_echat.model.parts import PARTS, belongs
from osum_echat.model.released import (
    POSITION_TABLES,
    UNUSED,
    UNUSED_PREFIX,
    CheckpointError,
    ModelSpec,
    from_file,
    is_released,
    match,
    names_in_file,
    spec_of,
    to_released,
)
from osum_echat.model.storage import (
    MAX_SHARD_BYTES,
    LazyTensors,
    Pieces,
    Storage,
    TensorSource,
    open_source,
    replace_folder,
    write_safetensors,
)

CONFIG_FILE = "config.yaml"
TOKENIZER_FOLDER = "tokenizer"
# Smaller checkpoints are copied: mapped tensors lie at odd addresses, which moves the last bits of matrix products, and
# depend on the file.
COPY_BELOW_BYTES = 2**30
Dtype: TypeAlias = torch.dtype | Callable[[int, str | None], Weights] | None


def build_meta(config: ModelConfig) -> EChatModel:
    """The model with its parameters on the meta device: shapes, no memory. Computed buffers (rotary tables) are
    real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = EChatModel(config)
    model.lm.llm.tie_weights()  # moving parameters to meta one by one has parted the LM head from the table
    return model


def load_model(
    path: str | Path,
    config: str | Path | ModelConfig | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: Dtype = None,
    tokenizer: str | Path | None = None,
) -> tuple[EChatModel, Any]:
    """A model in evaluation mode and its tokenizer, from any form of checkpoint.

    Args:
        path: checkpoint folder, file, or the name of a repository on the hub (``owner/name``).
        config: model config or its file; needed unless the checkpoint is a folder with config.yaml.
        dtype: of the floating-point weights; None keeps the file's. Or a function that decides
            (`device.model_weights`), from how many weights the model has and what the file has rounded them to ("int8",
            "int4" or None).
        tokenizer: folder or hub name instead of the checkpoint's own or the config's.

    Raises:
        CheckpointError: the file does not fit the config, or cannot be read.
        ValueError: no config or no tokenizer where one is needed.
    """
    path = local_path(path)
    model_config = config_for(path, config)
    source = open_source(path)
    model = _assemble(model_config, source, torch.device(device), dtype, str(path))
    return model.eval(), load_tokenizer(path, model_config, tokenizer)


def load_weights(
    path: str | Path,
    config: str | Path | ModelConfig | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: Dtype = None,
) -> EChatModel:
    """`load_model` without a tokenizer."""
    path = local_path(path)
    return _assemble(config_for(path, config), open_source(path), torch.device(device), dtype, str(path)).eval()


def load_tokenizer(path: Path, config: ModelConfig, tokenizer: str | Path | None = None) -> Any:
    """The tokenizer named explicitly, beside the checkpoint, or in the config, in this order."""
    from transformers import AutoTokenizer

    beside = path / TOKENIZER_FOLDER
    name = tokenizer or (beside if beside.is_dir() else config.tokenizer)
    if name is None:
        raise ValueError(
            f"no tokenizer for {path}: put one into {TOKENIZER_FOLDER}/ beside the weights, or name it (tokenizer: in the config)"
        )
    download.check(str(name), "tokenizer")
    try:
        return AutoTokenizer.from_pretrained(str(name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer {name} cannot be loaded ({str(error).splitlines()[0]}); name a local folder with its files"
        ) from error


def _assemble(config: ModelConfig, source: TensorSource, device: torch.device, dtype: Dtype, where: str) -> EChatModel:
    model = build_meta(config)
    spec = spec_of(model)
    try:
        chosen = match(source.shapes, spec)
        check_aliases(source, spec)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    placed: set[str] = set()
    if callable(dtype):
        weights = dtype(sum(parameter.numel() for parameter in model.parameters()), quantized.stored_kind(source))
        dtype = weights.dtype
        if weights.kind is not None:
            placed = quantized.put(model, source, chosen, weights.kind)
    rest = {name: (from_file(name, source.get(key)), key) for name, key in chosen.items() if name not in placed}
    assign(model, rest, device, dtype)
    return model


def check_aliases(source: TensorSource, spec: ModelSpec) -> None:
    """Several names of one tensor must hold the same numbers. Raises CheckpointError when they do not."""
    released = is_released(source.shapes)
    groups = {tuple(key for key in names_in_file(name, spec, released) if key in source.shapes) for name in spec.shapes}
    for first, *others in (group for group in groups if len(group) > 1):
        tensor = source.get(first)
        for other in others:
            alias = source.get(other)
            if alias.data_ptr() != tensor.data_ptr() and not torch.equal(alias, tensor):
                raise CheckpointError(
                    f"{other} and {first} are names of one tensor in this model, but differ in the file; "
                    "if they were trained apart, set tie_word_embeddings: false in llm.config"
                )


def assign(model: nn.Module, tensors: Mapping[str, tuple[Tensor, str]], device: torch.device, dtype: torch.dtype | None) -> None:
    """Make tensors the parameters and buffers of ``model`` (name -> (tensor, key in the file)); one key under two names
    stays one tensor."""
    placed: dict[str, nn.Parameter] = {}
    small = sum(tensor.numel() * tensor.element_size() for tensor, _ in tensors.values()) < COPY_BELOW_BYTES
    for name, (tensor, key) in tensors.items():
        parent, _, attribute = name.rpartition(".")
        module = model.get_submodule(parent)
        tensor = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None, copy=small)
        if attribute in module._buffers:
            module._buffers[attribute] = tensor
            continue
        old = module._parameters[attribute]
        assert old is not None
        if key not in placed:
            placed[key] = nn.Parameter(tensor, requires_grad=old.requires_grad)
        module._parameters[attribute] = placed[key]
    for name, buffer in model.named_buffers():  # computed ones, such as rotary tables
        if name not in tensors and buffer.device != device:
            parent, _, attribute = name.rpartition(".")
            model.get_submodule(parent)._buffers[attribute] = buffer.to(device)


def local_path(path: str | Path) -> Path:
    """A path of this machine; the name of a hub repository is downloaded."""
    try:
        return download.find(path)
    except download.NotFound as error:
        raise CheckpointError(str(error)) from error


def config_for(path: Path, config: str | Path | ModelConfig | None) -> ModelConfig:
    """The config that was given, else the one beside the weights of ``path``. Raises ValueError when there is none."""
    if isinstance(config, ModelConfig):
        return config
    if config is not None:
        return load_config(config)
    if (path / CONFIG_FILE).is_file():
        return load_config(path / CONFIG_FILE)
    if not path.exists():
        raise CheckpointError(f"checkpoint not found: {path}")
    raise ValueError(
        f"{path} has no {CONFIG_FILE} beside its weights; pass its model config (for the published weights: package:ct_config.yaml)"
    )


# ---- single parts ----------------------------------------------------------------------------------------------------


def load_parts(model: EChatModel, path: str | Path, parts: Iterable[str]) -> list[str]:
    """Copy the weights of some parts from another checkpoint into a model that has memory already.

    For a start from a Whisper encoder (`osum-echat convert-whisper`), or from a checkpoint whose other parts differ.
    Inside a part every tensor must be there and fit. A position table may be shorter than the model's: its rows are
    copied, the rest stays computed.

    Args:
        parts: of `parts.PARTS`, or modules (``lm.llm``, ``ctc``).

    Returns:
        Names of what was copied.

    Raises:
        CheckpointError: an entry is missing or has another shape.
    """
    wanted_parts = list(parts)
    source = open_source(local_path(path))
    own = model.state_dict()
    spec = spec_of(model)
    wanted = [name for name in own for part in wanted_parts if belongs(name, part)]
    if not wanted:
        raise ValueError(f"the model has no part {', '.join(wanted_parts)}; parts are {', '.join(PARTS)}")
    partial = ModelSpec({n: spec.shapes[n] for n in wanted}, spec.token_table, spec.text_head, spec.tied, spec.lora)
    released = is_released(source.shapes)
    keys = {key for name in wanted for key in names_in_file(name, spec, released)}
    shapes = {key: shape for key, shape in source.shapes.items() if key in keys}
    for table in (name for name in POSITION_TABLES if name in wanted and name in shapes):
        if shapes[table][1:] == spec.shapes[table][1:]:
            shapes[table] = spec.shapes[table]
    chosen = match(shapes, partial, released)
    with torch.no_grad():
        for name, key in chosen.items():
            tensor = from_file(name, source.get(key))
            if name in POSITION_TABLES:
                own[name][: len(tensor)].copy_(tensor[: len(own[name])])
            else:
                own[name].copy_(tensor)
    return list(chosen)


def load_llm(model: EChatModel, name: str | Path) -> None:
    """Copy a pretrained LLM (a transformers folder or hub name) into ``model.lm.llm``; sizes must be the config's."""
    from transformers import AutoModelForCausalLM

    download.check(str(name), "llm")
    try:
        donor = AutoModelForCausalLM.from_pretrained(str(name), dtype="auto")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"LLM {name} cannot be loaded ({str(error).splitlines()[0]}); name a local folder with its weights"
        ) from error
    with torch.no_grad():
        try:
            model.lm.llm.load_state_dict(donor.state_dict(), strict=True)
        except RuntimeError as error:
            raise CheckpointError(f"LLM {name} does not fit llm: of the config: {error}") from error


# ---- saving ----------------------------------------------------------------------------------------------------------


def clean_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the second name of a tied LM head."""
    spec = spec_of(model)  # type: ignore[arg-type]
    state = model.state_dict()
    if spec.tied:
        del state[spec.text_head]
    return state


def save_model(
    model: EChatModel,
    tokenizer: Any,
    folder: str | Path,
    storage: Storage | Pieces = "keep",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint folder: config.yaml, model.safetensors (or shards), tokenizer/. It appears under its name only
    when complete.

    Args:
        storage: data type on disk (see `storage`); int8 and float16 are expanded to the dtype asked for when loaded.
        state: clean tensors instead of the model's own (gathered from a sharded engine, or converted from a file).
    """
    folder = Path(folder)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    state = clean_state(model) if state is None else state
    write_safetensors(state.items(), partial, storage, max_shard_bytes)
    (partial / CONFIG_FILE).write_text(config_io.to_yaml(portable_config(model.config)), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(partial / TOKENIZER_FOLDER)
    replace_folder(partial, folder)
    return folder


def save_quantized(
    path: str | Path, folder: str | Path, kind: quantized.Kind, config: str | Path | ModelConfig | None = None
) -> Path:
    """Write a checkpoint of any form as a folder with its weights rounded to ``kind``, one tensor at a time; what lies
    beside the weights comes along.

    Raises:
        CheckpointError: the file does not fit the config, or cannot be read.
        ValueError: no config or no tokenizer where one is needed, or ``folder`` is the checkpoint itself.
    """
    path, folder = local_path(path), Path(folder)
    if folder.exists() and folder.samefile(path):
        raise ValueError(f"{folder} is the checkpoint itself; name another folder to write")
    model_config = config_for(path, config)
    model = build_meta(model_config)
    source = open_source(path)
    try:
        tensors = clean_tensors(source, spec_of(model))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    save_model(model, load_tokenizer(path, model_config), folder, quantized.pieces(kind), state=tensors)
    for beside in sorted(path.iterdir()) if path.is_dir() else []:
        weights = beside.suffix in (".safetensors", ".pt", ".bin") or beside.name.endswith(".index.json")
        if beside.is_dir() and not (folder / beside.name).exists():
            shutil.copytree(beside, folder / beside.name)
        elif beside.is_file() and not weights and not (folder / beside.name).exists():
            shutil.copy2(beside, folder / beside.name)
    return folder


def clean_tensors(source: TensorSource, spec: ModelSpec) -> LazyTensors:
    """What a checkpoint of any naming holds, under clean names; ``unused.*`` keeps what the model has no place for.

    Raises:
        CheckpointError: when the source does not fit ``spec``.
    """
    chosen = match(source.shapes, spec)
    check_aliases(source, spec)
    if spec.tied:
        del chosen[spec.text_head]
    for name in UNUSED:
        for key in (name, UNUSED_PREFIX + name):
            if key in source.shapes:
                chosen[UNUSED_PREFIX + name] = key
    return LazyTensors(source, chosen, from_file)


def save_released(state: Mapping[str, Tensor], spec: ModelSpec, file: str | Path) -> Path:
    """Write clean tensors as a flat file with the published names, complete with aliases. It appears under its name
    only when complete."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial-{os.getpid()}")
    torch.save({name: tensor.detach().cpu() for name, tensor in to_released(state, spec).items()}, partial)
    partial.replace(file)
    return file


def portable_config(config: ModelConfig) -> ModelConfig:
    """The config without paths of this machine: the LLM's config written out, the tokenizer beside the weights."""
    llm = LlmConfig(config=config.llm.transformers_config(), attention=config.llm.attention)
    return dataclasses.replace(config, llm=llm, tokenizer=None)
