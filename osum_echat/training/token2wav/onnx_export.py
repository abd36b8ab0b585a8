"""Write the speech tokenizer and the speaker net as ONNX files of the released contract, and check that onnxruntime
agrees with torch.

Weights may be stored as float16 with a cast behind each (onnxruntime folds the casts away when it loads): half the
file, float32 arithmetic. They are rounded in torch first, so that both sides compute with the same numbers. The
TorchScript exporter is used on purpose: the newer one needs a further package.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from osum_echat.device.onnx import session_options
from osum_echat.run.files import write_atomically
from osum_echat.training.token2wav.tokenizer_model import Encoder

log = logging.getLogger(__name__)
OPSET = 17
SMALL = 64  # tensors of fewer values stay float32: scalars, shapes, level tables


def rounded_to_half(module: nn.Module) -> nn.Module:
    """A copy whose weights are exactly representable in float16."""
    module = copy.deepcopy(module).float().cpu().eval()
    with torch.no_grad():
        for value in module.parameters():
            if value.numel() >= SMALL:
                value.copy_(value.half().float())
    return module


def store_half(model: Any) -> None:
    """Turn the float32 weights of an ONNX model into float16 ones with a Cast behind each, in place."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for weight in list(model.graph.initializer):
        values = numpy_helper.to_array(weight)
        if values.dtype != np.float32 or values.size < SMALL:
            continue
        half = values.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), values):  # a folded product, not a weight: keep its precision
            continue
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(half, name + "_half"))
        casts.append(helper.make_node("Cast", [name + "_half"], [name], to=TensorProto.FLOAT))
    for cast in reversed(casts):
        model.graph.node.insert(0, cast)


def _export(
    module: nn.Module, inputs: tuple[Tensor, ...], target: Path, names: Sequence[str], output: str, axes: Any, half: bool
) -> None:
    try:
        import onnx
    except ImportError as error:
        raise ValueError("writing ONNX files needs the package onnx: pip install onnx") from error

    def write(path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter announces its successor
            torch.onnx.export(
                module,
                inputs,
                str(path),
                dynamo=False,
                input_names=list(names),
                output_names=[output],
                dynamic_axes=axes,
                opset_version=OPSET,
            )
        model = onnx.load(str(path))
        if half:
            store_half(model)
        onnx.checker.check_model(model)
        onnx.save(model, str(path))

    write_atomically(target, write)


def session(path: Path) -> onnxruntime.InferenceSession:
    """One-thread CPU session."""
    options = session_options(threads=1)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def export_tokenizer(encoder: Encoder, target: Path, half: bool = True) -> float:
    """Write ``encoder`` and compare codes with torch's on random log-mels of several lengths and as a batch.

    Returns the share of equal codes. A position whose score lies within rounding error of a boundary may differ; more
    than 0.2 % of them raise RuntimeError.
    """
    module = (rounded_to_half(encoder) if half else copy.deepcopy(encoder).float().cpu().eval()).eval()
    mels = encoder.conv1.in_channels
    example = (torch.zeros(1, mels, 200), torch.tensor([200], dtype=torch.int32))
    axes = {"feats": {0: "batch", 2: "frames"}, "feats_length": {0: "batch"}, "indices": {0: "batch", 1: "codes"}}
    _export(module, example, target, ("feats", "feats_length"), "indices", axes, half)
    run = session(target)
    generator = torch.Generator().manual_seed(0)
    equal = total = 0
    for lengths in ([1], [2], [3], [97], [300], [1000], [80, 201, 33]):
        feats = torch.randn(len(lengths), mels, max(lengths), generator=generator)
        count = torch.tensor(lengths, dtype=torch.int32)
        with torch.no_grad():
            expected = module(feats, count).numpy()
        found = run.run(None, {"feats": feats.numpy(), "feats_length": count.numpy()})[0]
        if found.shape != expected.shape:
            raise RuntimeError(f"{target}: onnxruntime returned shape {found.shape}, torch {expected.shape}")
        equal += int((found == expected).sum())
        total += expected.size
    if equal < 0.998 * total:
        raise RuntimeError(f"{target}: only {equal} of {total} codes equal torch's")
    log.info("%s: %d of %d codes equal torch's", target.name, equal, total)
    return equal / total


def export_speaker(net: nn.Module, target: Path, half: bool = True, tolerance: float = 1e-3) -> float:
    """Write a net [1, frames, 80] -> [1, 192] and compare it with torch on random inputs. Returns the largest relative
    error."""
    module = (rounded_to_half(net) if half else copy.deepcopy(net).float().cpu().eval()).eval()
    axes = {"input": {0: "batch", 1: "frames"}, "output": {0: "batch"}}
    _export(module, (torch.zeros(1, 200, 80),), target, ("input",), "output", axes, half)
    run = session(target)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for frames in (10, 98, 333):
        feats = torch.randn(1, frames, 80, generator=generator)
        with torch.no_grad():
            expected = module(feats).numpy()
        found = run.run(None, {"input": feats.numpy()})[0]
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    if worst > tolerance:
        raise RuntimeError(f"{target}: onnxruntime differs from torch by {worst:.2g}")
    return worst
