"""Whisper's encoder weights from the three forms in which they are published, under our names.

    Hugging Face folder   config.json + model.safetensors (or pytorch_model.bin)
    OpenAI file           tiny.en.pt, medium.pt ...: {"dims": ..., "model_state_dict": ...}
    CTranslate2 folder    model.bin (as in the faster-whisper packages): float32, float16, bfloat16 or int8 with scales

Only data is read; nothing of the packages is executed. The position table is taken from the file as it is (checked
against the formula): rounded to half precision, as CTranslate2 keeps it, it moves single outputs by up to 0.04.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from osum_echat.model.config import EncoderConfig
from osum_echat.model.encoder import whisper_positions

State = dict[str, Tensor]

_OUTER = {
    "hf": {"layer_norm": "norm", "conv1": "conv1", "conv2": "conv2"},
    "openai": {"ln_post": "norm", "conv1": "conv1", "conv2": "conv2"},
}
_BLOCK = {
    "hf": {
        "self_attn_layer_norm": "attention_norm",
        "self_attn.q_proj": "attention.q",
        "self_attn.k_proj": "attention.k",
        "self_attn.v_proj": "attention.v",
        "self_attn.out_proj": "attention.out",
        "final_layer_norm": "ffn_norm",
        "fc1": "ffn.up",
        "fc2": "ffn.down",
    },
    "openai": {
        "attn_ln": "attention_norm",
        "attn.query": "attention.q",
        "attn.key": "attention.k",
        "attn.value": "attention.v",
        "attn.out": "attention.out",
        "mlp_ln": "ffn_norm",
        "mlp.0": "ffn.up",
        "mlp.2": "ffn.down",
    },
}


def read_whisper(path: str | Path) -> tuple[EncoderConfig, State]:
    """The encoder of a Whisper checkpoint in any published form.

    Returns:
        Its sizes and its weights (float32, names of `encoder.AudioEncoder`).

    Raises:
        ValueError: when the path is none of the known forms, or the file is not what its form promises.
    """
    path = Path(path)
    if path.is_dir() and (path / "config.json").is_file() and any((path / name).is_file() for name in _HF_FILES):
        return _finish(*_read_hf(path), path)
    if path.is_dir() and (path / "model.bin").is_file():
        return _finish(*_read_ctranslate2(path / "model.bin"), path)
    if path.name == "model.bin" and path.is_file():
        return _finish(*_read_ctranslate2(path), path)
    if path.suffix == ".pt" and path.is_file():
        return _finish(*_read_openai(path), path)
    raise ValueError(
        f"{path} is not a Whisper checkpoint that can be read; give a Hugging Face folder (config.json + model.safetensors), "
        "an OpenAI .pt file, or a CTranslate2 folder with model.bin"
    )


def _finish(heads: int, state: State, positions: Tensor, path: Path) -> tuple[EncoderConfig, State]:
    """Sizes from the weights; the stored position table must be the formula's (to half precision)."""
    layers = 1 + max(int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name)))
    dim, mels = int(state["conv1.weight"].shape[0]), int(state["conv1.weight"].shape[1])
    ffn = int(state["blocks.0.ffn.up.weight"].shape[0])
    error = float((positions.float() - whisper_positions(*positions.shape)).abs().max())
    if error > 2e-3:
        raise ValueError(
            f"{path}: its position table differs from Whisper's formula by {error:.3g}; this is not a Whisper encoder"
        )
    config = EncoderConfig(mels=mels, dim=dim, heads=heads, ffn=ffn, layers=layers, max_positions=int(positions.shape[0]))
    return config, {name: tensor.float().contiguous() for name, tensor in {**state, "positions_SE": positions}.items()}


# ---- Hugging Face, OpenAI --------------------------------------------------------------------------------------------


_HF_FILES = ("model.safetensors", "pytorch_model.bin")


def _read_hf(folder: Path) -> tuple[int, State, Tensor]:
    heads = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("encoder_attention_heads")
    if heads is None:
        raise ValueError(f"{folder}/config.json has no encoder_attention_heads; it is not a Whisper model")
    file = next(folder / name for name in _HF_FILES if (folder / name).is_file())
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        raw = load_file(file)
    else:
        raw = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    raw = {name.removeprefix("model."): tensor for name, tensor in raw.items()}
    state, positions = _rename(raw, "hf", r"encoder\.layers\.(\d+)\.(.+)", "encoder.embed_positions.weight", folder)
    return int(heads), state, positions


def _read_openai(file: Path) -> tuple[int, State, Tensor]:
    raw = torch.load(file, map_location="cpu", weights_only=True)
    if "dims" not in raw or "model_state_dict" not in raw:
        raise ValueError(f"{file} has no dims and model_state_dict; it is not a Whisper file of OpenAI's form")
    state, positions = _rename(
        raw["model_state_dict"], "openai", r"encoder\.blocks\.(\d+)\.(.+)", "encoder.positional_embedding", file
    )
    return int(raw["dims"]["n_audio_head"]), state, positions


def _rename(raw: Mapping[str, Tensor], form: str, block: str, positions: str, path: Path) -> tuple[State, Tensor]:
    state: State = {}
    unknown = []
    for name, tensor in raw.items():
        if not name.startswith("encoder.") or name == positions:
            continue
        if match := re.fullmatch(block, name):
            inner, _, kind = match[2].rpartition(".")
            new = f"blocks.{match[1]}.{_BLOCK[form][inner]}.{kind}" if inner in _BLOCK[form] else None
        else:
            inner, _, kind = name.removeprefix("encoder.").rpartition(".")
            new = f"{_OUTER[form][inner]}.{kind}" if inner in _OUTER[form] else None
        if new is None:
            unknown.append(name)
        else:
            state[new] = tensor
    if unknown or positions not in raw:
        raise ValueError(f"{path}: not a Whisper encoder; unknown {unknown[:5]}, position table found: {positions in raw}")
    return state, raw[positions]


# ---- CTranslate2 -----------------------------------------------------------------------------------------------------


_CT2_DTYPES: dict[int, Callable[[bytes], Tensor]] = {
    0: lambda b: torch.frombuffer(bytearray(b), dtype=torch.float32),
    1: lambda b: torch.frombuffer(bytearray(b), dtype=torch.int8),
    2: lambda b: torch.frombuffer(bytearray(b), dtype=torch.int16),
    3: lambda b: torch.frombuffer(bytearray(b), dtype=torch.int32),
    4: lambda b: torch.frombuffer(bytearray(b), dtype=torch.float16),
    5: lambda b: torch.frombuffer(bytearray(b), dtype=torch.bfloat16),
}
_CT2_MIN_VERSION = 4  # older files state no data type per variable


def read_ctranslate2(file: str | Path) -> dict[str, Tensor]:
    """The variables of a CTranslate2 ``model.bin`` by name, aliases resolved, in the file's data types.

    Layout (little-endian): uint32 version, string spec, uint32 revision, uint32 count; per variable: string name, uint8
    rank, uint32 sizes, uint8 data type, uint32 bytes, data; then uint32 aliases, each two strings. A string is uint16
    length (with the closing zero) and bytes.
    """
    out: dict[str, Tensor] = {}
    with open(file, "rb") as stream:
        version = _unpack(stream, "I", file)
        if not _CT2_MIN_VERSION <= version <= 6:
            raise ValueError(f"{file}: CTranslate2 format {version} is not known (4 to 6 are); convert the model anew")
        _string(stream, file)
        _unpack(stream, "I", file)
        for _ in range(_unpack(stream, "I", file)):
            name = _string(stream, file)
            sizes = [_unpack(stream, "I", file) for _ in range(_unpack(stream, "B", file))]
            kind, size = _unpack(stream, "B", file), _unpack(stream, "I", file)
            data = stream.read(size)
            if kind not in _CT2_DTYPES or len(data) != size:
                raise ValueError(f"{file}: {name} is cut off or of an unknown data type ({kind}); the file is damaged")
            tensor = _CT2_DTYPES[kind](data) if size else torch.zeros(0)
            out[name] = tensor.reshape(sizes) if sizes else tensor
        for _ in range(_unpack(stream, "I", file)):
            alias, target = _string(stream, file), _string(stream, file)
            out[alias] = out[target]
    return out


def _unpack(stream: BinaryIO, kind: str, file: str | Path) -> int:
    size = struct.calcsize("<" + kind)
    data = stream.read(size)
    if len(data) != size:
        raise ValueError(f"{file} ends in the middle; the file is damaged or not a CTranslate2 model")
    return int(struct.unpack("<" + kind, data)[0])


def _string(stream: BinaryIO, file: str | Path) -> str:
    return stream.read(_unpack(stream, "H", file)).rstrip(b"\0").decode("utf-8")


def _read_ctranslate2(file: Path) -> tuple[int, State, Tensor]:
    raw = read_ctranslate2(file)
    if "encoder/conv1/weight" not in raw or "encoder/num_heads" not in raw:
        raise ValueError(f"{file}: a CTranslate2 model, but not a Whisper one")

    def get(name: str) -> Tensor:
        tensor = raw[f"encoder/{name}"].float()
        scale = raw.get(f"encoder/{name}_scale")
        return tensor if scale is None else tensor / scale.float().reshape(-1, *[1] * (tensor.ndim - 1))

    def linear(source: str, target: str) -> State:
        return {f"{target}.weight": get(f"{source}/weight"), f"{target}.bias": get(f"{source}/bias")}

    def norm(source: str, target: str) -> State:
        return {f"{target}.weight": get(f"{source}/gamma"), f"{target}.bias": get(f"{source}/beta")}

    state = {**linear("conv1", "conv1"), **linear("conv2", "conv2"), **norm("layer_norm", "norm")}
    number = 0
    while f"encoder/layer_{number}/ffn/linear_0/weight" in raw:
        layer, block = f"layer_{number}", f"blocks.{number}"
        weights, biases = (
            get(f"{layer}/self_attention/linear_0/weight").chunk(3),
            get(f"{layer}/self_attention/linear_0/bias").chunk(3),
        )
        if np.abs(biases[1].numpy()).max() > 0:
            raise ValueError(f"{file}: layer {number} has a key bias, Whisper has none")
        for part, weight, bias in zip("qkv", weights, biases, strict=True):
            state[f"{block}.attention.{part}.weight"] = weight
            if part != "k":
                state[f"{block}.attention.{part}.bias"] = bias
        state |= linear(f"{layer}/self_attention/linear_1", f"{block}.attention.out")
        state |= norm(f"{layer}/self_attention/layer_norm", f"{block}.attention_norm")
        state |= norm(f"{layer}/ffn/layer_norm", f"{block}.ffn_norm")
        state |= linear(f"{layer}/ffn/linear_0", f"{block}.ffn.up") | linear(f"{layer}/ffn/linear_1", f"{block}.ffn.down")
        number += 1
    return int(raw["encoder/num_heads"].reshape(-1)[0]), state, get("position_encodings/encodings")
