"""onnxruntime in this process: one pool of threads for all its sessions, and how a session is opened.

A session of its own pool would keep as many threads spinning as PyTorch has beside it. The size of the common pool is
PyTorch's number of threads when the first session is opened; it cannot be changed later.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import onnxruntime

log = logging.getLogger(__name__)
_QUIET = 3  # errors only
_EXACT_INT8 = "session.x64quantprecision"
"""Products of int8 do not saturate on x86 without VNNI (onnxruntime's kOrtSessionOptionsAvx2PrecisionMode);
smart-turn's probability of 0.10 was 0.18."""
_INT8_INPUTS = 4
"""`accuracy_level` of `MatMulNBits`: inputs are rounded to int8, a scale for each group. With float32 inputs AVX2 takes
three times as long at 4 bits, and 8 bits are a hundred times slower (measured)."""


@functools.lru_cache(maxsize=1)
def _common_pool() -> bool:
    """Whether the sessions of this process share one pool; not where somebody has opened a session before."""
    import onnxruntime

    try:
        onnxruntime.set_global_thread_pool_sizes(torch.get_num_threads(), 1)
    except (AttributeError, RuntimeError) as error:
        log.info("onnxruntime keeps a pool of threads for each session: %s", str(error).splitlines()[0])
        return False
    return True


def session_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """Options of a session with ``threads`` (default: PyTorch's number) of its own, quiet but for errors.

    Where this process has a common pool, the session uses that: onnxruntime refuses others then. Every session is
    opened with these options.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    options.add_session_config_entry(_EXACT_INT8, "1")
    if _common_pool.cache_info().currsize and _common_pool():
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
    return options


def session(model: bytes | Path, arena: bool = True) -> onnxruntime.InferenceSession:
    """Open a model (serialized, or a file) on the CPU. ``arena``: keep memory between calls, for models with many
    operators."""
    import onnxruntime

    common = _common_pool()
    options = session_options()
    options.enable_cpu_mem_arena = arena
    if not common:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def nbits_session(codes_NGB: Tensor, scales_NG: Tensor, bits: int) -> onnxruntime.InferenceSession:
    """A session of one `MatMulNBits` product, x [rows, K] to y [rows, N] in float32; the weight's form is that of
    `cpu_linear.groups`."""
    from onnx import TensorProto, helper, numpy_helper

    outputs, groups, width = codes_NGB.shape
    size = width * 8 // bits
    initializers = [
        numpy_helper.from_array(codes_NGB.numpy(), "codes"),
        numpy_helper.from_array(scales_NG.float().flatten().numpy(), "scales"),
    ]
    sizes: dict[str, Any] = {"K": groups * size, "N": outputs, "bits": bits, "block_size": size, "accuracy_level": _INT8_INPUTS}
    node = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **sizes)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", w]) for n, w in (("x", groups * size), ("y", outputs))]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return session(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString(), arena=False)


def run_product(session: onnxruntime.InferenceSession, binding: onnxruntime.IOBinding, x: Tensor, out: Tensor) -> None:
    """Run a session of `nbits_session` on float32 rows ``x``, into ``out``, both contiguous: nothing is copied."""
    binding.bind_input("x", "cpu", 0, np.float32, x.shape, x.data_ptr())
    binding.bind_output("y", "cpu", 0, np.float32, out.shape, out.data_ptr())
    session.run_with_iobinding(binding)


@functools.lru_cache(maxsize=2)
def has_nbits(bits: int) -> bool:
    """Whether `MatMulNBits` works here with so many bits, found with a tiny product. A refusal is said once."""
    try:
        codes = torch.full((16, 2, 2 * bits), 0x99 if bits == 4 else 129, dtype=torch.uint8)  # each stands for 1
        opened = nbits_session(codes, torch.ones(16, 2, dtype=torch.float16), bits)
        out = torch.zeros(3, 16)
        run_product(opened, opened.io_binding(), torch.ones(3, 32), out)
    except (ImportError, RuntimeError, ValueError) as error:
        log.warning("weights in %d bits do not work here (%s)", bits, str(error).splitlines()[0])
        return False
    return bool((out - 32.0).abs().max() < 0.5)
