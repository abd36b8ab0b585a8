"""Tensors on disk: safetensors (one file, or shards with an index), torch files, DeepSpeed folders; and 8-bit rows.

A `TensorSource` gives names and shapes from headers alone and tensors one at a time, memory-mapped, so that reading a
file never holds it twice. Torch files are read with ``weights_only``: data, never code.

Groups of 8 or 4 bits (`cpu_linear.groups`) are kept as their codes under the tensor's name and their scales beside
them; `osum-echat quantize` writes them. They too are expanded when read, unless somebody asks for them as they are
(`SafetensorsSource.groups`).

8-bit rows: a matrix is stored as int8 with one half-precision scale a row (absolute maximum / 127), which is a quarter
of float32 for an error of at most 0.4 % of the row's maximum. Vectors and position tables stay in half precision. It is
expanded when read.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from osum_echat.cpu_linear.groups import Bits, Groups
from osum_echat.model.released import CheckpointError, Shape

Storage = Literal["keep", "float32", "bfloat16", "float16", "int8"]
Pieces = Callable[[str, Tensor], dict[str, Tensor]]
"""What is written for one tensor."""
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEEPSPEED_FILE = "mp_rank_00_model_states.pt"
MAX_SHARD_BYTES = 5 * 2**30
_SCALE = ".row_scale"
_GROUP_SCALES: dict[Bits, str] = {4: ".group_scale_4", 8: ".group_scale_8"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SMALL = 4096  # matrices below this many numbers are not worth a scale


class TensorSource(Protocol):
    """Named tensors of a checkpoint. ``shapes`` is known without reading them; ``get`` maps or reads one."""

    shapes: dict[str, Shape]

    def get(self, name: str) -> Tensor: ...


class DictSource:
    """Tensors that are in memory (or memory-mapped) already."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}

    def get(self, name: str) -> Tensor:
        return self.state[name]


class SafetensorsSource:
    """One or several safetensors files; 8-bit rows and groups are expanded to float32.

    Attributes:
        quantized: bits of the tensors that are stored in groups.
    """

    def __init__(self, files: list[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self._open: dict[str, Any] = {}
        raw: dict[str, Shape] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} cannot be read as safetensors ({error}); download or convert it again") from error
            for name in handle.keys():  # noqa: SIM118 - not a dict
                self._open[name] = handle
                raw[name] = tuple(handle.get_slice(name).get_shape())
        self.quantized: dict[str, Bits] = {
            name.removesuffix(end): bits for bits, end in _GROUP_SCALES.items() for name in raw if name.endswith(end)
        }
        for name, bits in self.quantized.items():
            rows, groups, width = raw[name]
            raw[name] = (rows, groups * width * 8 // bits)
        self.shapes = {name: shape for name, shape in raw.items() if not name.endswith((_SCALE, *_GROUP_SCALES.values()))}

    def groups(self, name: str) -> Groups:
        """A tensor of `quantized` as it is stored."""
        bits = self.quantized[name]
        scales = name + _GROUP_SCALES[bits]
        return Groups(self._open[name].get_tensor(name), self._open[scales].get_tensor(scales), bits)

    def get(self, name: str) -> Tensor:
        if name in self.quantized:
            return self.groups(name).expand()
        tensor = self._open[name].get_tensor(name)
        if name + _SCALE in self._open:
            return expand_rows(tensor, self._open[name + _SCALE].get_tensor(name + _SCALE))
        return tensor


class LazyTensors(Mapping[str, Tensor]):
    """Tensors of a source under other names, each read when it is asked for."""

    def __init__(self, source: TensorSource, keys: Mapping[str, str], convert: Callable[[str, Tensor], Tensor]) -> None:
        self.source, self.keys_in_file, self.convert = source, keys, convert

    def __getitem__(self, name: str) -> Tensor:
        return self.convert(name, self.source.get(self.keys_in_file[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_in_file)

    def __len__(self) -> int:
        return len(self.keys_in_file)


def open_source(path: str | Path) -> TensorSource:
    """Open a checkpoint's tensors.

    Args:
        path: a .safetensors file, an index of shards, a torch file (.pt, .pth, .bin), a folder with model.safetensors
            (or its shards), or a DeepSpeed folder (one tag, or the folder that holds the tags).

    Raises:
        CheckpointError: when there is nothing that can be read there.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint not found: {path}")
    if path.suffix == ".safetensors":
        return SafetensorsSource([path])
    if path.name.endswith(".index.json"):
        return SafetensorsSource(_shards(path))
    if path.suffix in (".pt", ".pth", ".bin"):
        return DictSource(load_torch(path))
    raise CheckpointError(
        f"{path}: unknown kind of checkpoint; known are .pt, .safetensors, an index of shards, and folders of them"
    )


def load_torch(path: Path) -> dict[str, Tensor]:
    """The flat state dict of a torch file, memory-mapped; of a DeepSpeed state file its ``module``."""
    try:
        data = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be read as plain tensors ({reason}); if it is whole and you trust it, save its state dict again with torch.save"
        ) from error
    if isinstance(data, Mapping) and isinstance(data.get("module"), Mapping):
        data = data["module"]
    wrong = (
        [key for key, value in data.items() if not isinstance(value, Tensor)] if isinstance(data, Mapping) else ["<top level>"]
    )
    if wrong:
        raise CheckpointError(
            f"{path} is not a flat state dict: {wrong[:3]} hold no tensor; export the model's state_dict() alone"
        )
    return dict(data)


def _open_folder(folder: Path) -> TensorSource:
    if (folder / WEIGHTS_FILE).is_file():
        return SafetensorsSource([folder / WEIGHTS_FILE])
    if (folder / INDEX_FILE).is_file():
        return SafetensorsSource(_shards(folder / INDEX_FILE))
    if is_deepspeed(folder):
        return _open_deepspeed(folder)
    raise CheckpointError(
        f"{folder} holds no {WEIGHTS_FILE}, no {INDEX_FILE} and no DeepSpeed state; name the checkpoint file itself"
    )


def _shards(index: Path) -> list[Path]:
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    lost = [name for name in names if not (index.parent / name).is_file()]
    if lost:
        raise CheckpointError(f"{index} names shards that are not there: {', '.join(lost)}; download them")
    return [index.parent / name for name in names]


# ---- DeepSpeed -------------------------------------------------------------------------------------------------------


def is_deepspeed(folder: Path) -> bool:
    """Whether a folder is a DeepSpeed checkpoint: one tag, or the folder with ``latest`` and the tags."""
    return _deepspeed_tag(folder) is not None


def _deepspeed_tag(folder: Path) -> Path | None:
    if any(folder.glob("*mp_rank_00_model_states.pt")):
        return folder
    latest = folder / "latest"
    if latest.is_file() and (tag := folder / latest.read_text(encoding="utf-8").strip()).is_dir():
        return tag if any(tag.glob("*mp_rank_00_model_states.pt")) else None
    return None


def _open_deepspeed(folder: Path) -> TensorSource:
    """The module's own tensors where they are whole (ZeRO 1 and 2), else the float32 partitions put together (ZeRO
    3)."""
    tag = _deepspeed_tag(folder)
    assert tag is not None
    file = tag / DEEPSPEED_FILE
    if file.is_file():
        state = load_torch(file)
        if all(tensor.numel() or not tensor.shape for tensor in state.values()):
            return DictSource(state)
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise CheckpointError(f"{tag} is partitioned over ranks (ZeRO 3); install deepspeed to put it together") from error
    return DictSource(get_fp32_state_dict_from_zero_checkpoint(str(tag.parent), tag.name))


# ---- writing ---------------------------------------------------------------------------------------------------------


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows and their half-precision scales: weight ~ int8 * scale[row]."""
    flat = weight.float().flatten(1)
    scale = (flat.abs().amax(dim=1) / 127).clamp(min=2**-24).to(torch.float16)
    rows = (flat / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return rows.view(weight.shape), scale


def expand_rows(rows: Tensor, scale: Tensor) -> Tensor:
    """What `quantize_rows` stored, in float32."""
    return rows.float() * scale.float().view(-1, *[1] * (rows.ndim - 1))


def stored_groups(name: str, groups: Groups) -> dict[str, Tensor]:
    """What is written for a matrix in groups."""
    return {name: groups.codes_NGB.contiguous(), name + _GROUP_SCALES[groups.bits]: groups.scales_NG.contiguous()}


def stored(name: str, tensor: Tensor, storage: Storage | Pieces) -> dict[str, Tensor]:
    """What is written for one tensor."""
    tensor = tensor.detach().cpu()
    if callable(storage):
        return storage(name, tensor)
    if storage == "keep" or not tensor.is_floating_point():
        return {name: tensor.contiguous()}
    if storage != "int8":
        return {name: tensor.to(_DTYPES[storage]).contiguous()}
    if tensor.ndim < 2 or tensor.numel() < _SMALL or ".positions_" in name:
        return {name: tensor.to(torch.float16).contiguous()}
    rows, scale = quantize_rows(tensor)
    return {name: rows.contiguous(), name + _SCALE: scale}


def write_safetensors(
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    storage: Storage | Pieces = "keep",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write tensors into ``folder`` as model.safetensors, or as shards with an index when they are more than
    ``max_shard_bytes``.

    Tensors are taken one at a time, so converting a file holds at most one shard. The folder is not the final place:
    the caller renames it.
    """
    from safetensors.torch import save_file

    shards: list[dict[str, int]] = []
    part: dict[str, Tensor] = {}

    def flush() -> None:
        file = folder / f"part-{len(shards)}.safetensors"
        save_file(part, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors makes files that only their owner can read
        shards.append({name: tensor.numel() * tensor.element_size() for name, tensor in part.items()})
        part.clear()

    size = 0
    for name, tensor in tensors:
        pieces = stored(name, tensor, storage)
        add = sum(t.numel() * t.element_size() for t in pieces.values())
        if part and size + add > max_shard_bytes:
            flush()
            size = 0
        part.update(pieces)
        size += add
    flush()
    if len(shards) == 1:
        (folder / "part-0.safetensors").rename(folder / WEIGHTS_FILE)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        shard = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / shard)
        weight_map.update(dict.fromkeys(names, shard))
    index = {"metadata": {"total_size": sum(sum(names.values()) for names in shards)}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def replace_folder(partial: Path, final: Path) -> None:
    """Move a finished folder to its final name; what stood there is removed only after the new one is in place."""
    old = final.with_name(f"{final.name}.old-{os.getpid()}")
    if final.exists():
        final.rename(old)
    partial.rename(final)
    if old.exists():
        import shutil

        shutil.rmtree(old)
