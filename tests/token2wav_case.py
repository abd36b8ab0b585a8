"""A tiny token2wav directory for tests: the recorded weights of tests/data/token2wav in the released shape, and small ONNX models.

The ONNX models have the released contracts (inputs by position, token rate, sizes) and simple arithmetic inside.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file
from torch import Tensor

from osum_echat.golden.token2wav import TINY
from osum_echat.token2wav import Speaker, Token2Wav, released_yaml

DATA = Path(__file__).parent / "data" / "token2wav"


def weights(name: str) -> dict[str, Tensor]:
    """The tiny ``flow`` or ``hift`` weights as recorded (float16, new weight-norm names)."""
    return load_file(DATA / f"tiny_{name}_fp16.safetensors")


def write_directory(target: Path, onnx_models: bool = False) -> Path:
    """A loadable directory: ``cosyvoice.yaml``, ``flow.pt``, ``hift.pt``."""
    target.mkdir(parents=True, exist_ok=True)
    released_yaml.write(target / "cosyvoice.yaml", TINY)
    torch.save(weights("flow"), target / "flow.pt")
    torch.save(weights("hift"), target / "hift.pt")
    if onnx_models:
        write_tokenizer(target / "speech_tokenizer_v1.onnx")
        write_campplus(target / "campplus.onnx")
    return target


def write_tokenizer(path: Path, batch: str | int = "batch") -> None:
    """[B, 128, frames] and int32 [B] to int32 [B, ceil(ceil(frames / 2) / 2)]: the rounded mean of every fourth frame."""
    constants = {"zero": [0], "step": [4], "axis": [2], "end": [2**31 - 1]}
    initializers = [numpy_helper.from_array(np.array(v, dtype=np.int64), k) for k, v in constants.items()]
    initializers += [
        numpy_helper.from_array(np.array(v, dtype=np.float32), k) for k, v in {"gain": 997.0, "size": 4096.0}.items()
    ]
    nodes = [
        helper.make_node("Slice", ["feats", "zero", "end", "axis", "step"], ["fourth"]),
        helper.make_node("ReduceMean", ["fourth"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("Mul", ["mean", "gain"], ["scaled"]),
        helper.make_node("Abs", ["scaled"], ["positive"]),
        helper.make_node("Mod", ["positive", "size"], ["within"], fmod=1),
        helper.make_node("Cast", ["within"], ["indices"], to=TensorProto.INT32),
    ]
    inputs = [
        helper.make_tensor_value_info("feats", TensorProto.FLOAT, [batch, 128, "frames"]),
        helper.make_tensor_value_info("feats_length", TensorProto.INT32, [batch]),
    ]
    outputs = [helper.make_tensor_value_info("indices", TensorProto.INT32, [batch, "codes"])]
    _save(path, nodes, inputs, outputs, initializers)


def write_campplus(path: Path) -> None:
    """[1, frames, 80] to [1, 192]: a fixed projection of the mean of squares (the mean itself has been taken off)."""
    projection = np.random.default_rng(0).standard_normal((80, 192)).astype(np.float32)
    nodes = [
        helper.make_node("Mul", ["input", "input"], ["square"]),
        helper.make_node("ReduceMean", ["square"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["mean", "projection"], ["output"]),
    ]
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, "frames", 80])]
    outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 192])]
    _save(path, nodes, inputs, outputs, [numpy_helper.from_array(projection, "projection")])


def _save(path: Path, nodes: list, inputs: list, outputs: list, initializers: list) -> None:
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


@functools.cache
def recorded_stream() -> dict[str, Tensor]:
    return load_file(DATA / "stream_n120_prompt20.safetensors")


def recorded_speaker() -> Speaker:
    """The prompt of the recorded stream: 20 tokens, 70 frames."""
    data = recorded_stream()
    return Speaker(data["prompt_token"][0].long(), data["prompt_feat"][0], data["embedding"][0])


def recorded_tokens(count: int = 120) -> list[int]:
    ids = recorded_stream()["token"][0].tolist()
    return (ids * (1 + count // len(ids)))[:count]


def tiny_model(target: Path, **options: str) -> Token2Wav:
    return Token2Wav.load(write_directory(target), device="cpu", **options)
