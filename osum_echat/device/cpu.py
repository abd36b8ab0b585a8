"""The CPU: what it does well, and the types and kernels that follow. Nobody else asks the CPU what it can.

What it can is read once from PyTorch's own detection. The limits that PyTorch and oneDNN obey (``ATEN_CPU_CAPABILITY``,
``ONEDNN_MAX_CPU_ISA``) count here too, so a large machine can stand for a small one. A kernel is believed only after a
tiny one has run: builds differ in what they refuse. What is refused is replaced by something that works, and that is
said once.

    OSUM_ECHAT_CPU=avx2       decide as on a CPU with AVX2 and nothing newer (most laptops)
    OSUM_ECHAT_CPU=plain      no packed weights at all
    OSUM_ECHAT_CPU=bfloat16   compute in bfloat16 where it is asked for, however slow

Untested here: ARM (the rules are PyTorch's own), macOS and Windows.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from osum_echat.device import onnx

log = logging.getLogger(__name__)

Kernel = Literal["plain", "packed"]
"""A linear layer as PyTorch has it, or with its weights in the memory order of oneDNN's kernels
(`cpu_linear.packed`)."""

ROUNDED: tuple[Literal["int8", "int4"], ...] = ("int8", "int4")
LIMIT = "OSUM_ECHAT_CPU"
LIMITS = ("avx2", "plain", "bfloat16")
LARGE = 1.5e9
"""Weights of a model from which "auto" no longer means float32 in any case: 6 GB."""
_MEMORY_SHARE = 0.7  # of what is available: weights may take so much of it
# Fewest weights, and fewest inputs, for which packing float32 pays with a single row (measured)
_FLOAT32_WEIGHTS = 2**19
_FLOAT32_INPUTS = 128
_GRAPH_WEIGHTS = 2**26  # most weights of a decoder whose step is one graph: a quarter of a gigabyte twice
_PACKABLE = (torch.float32, torch.bfloat16)
_OPERATORS = ("_reorder_linear_weight", "_linear_pointwise")
_ISA_WITHOUT_AVX512 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX10_1_256", "AVX10_2_256")
_ISA_WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI")


@dataclass(frozen=True)
class Cpu:
    """What a CPU does well.

    Attributes:
        vector: the widest vector instructions that may be used.
        bfloat16: whether arithmetic in bfloat16 is at least about as fast as in float32. Without AVX-512, AMX,
            AVX-NE-CONVERT or ARM's BF16 it is four to six times slower (measured on AVX2), although it works.
        amx: matrix units for bfloat16 and int8.
        int8: dot products of bytes (VNNI, ARM's DOT).
    """

    name: str
    vector: Literal["avx512", "avx2", "sve", "neon", "none"]
    bfloat16: bool
    amx: bool
    int8: bool

    def __str__(self) -> str:
        units = [self.vector] + [what for what in ("bfloat16", "amx", "int8") if getattr(self, what)]
        return f"{self.name}: {', '.join(units)}"


def limit() -> str:
    """What ``OSUM_ECHAT_CPU`` says, "" when it is not set. Raises ValueError for what it does not know."""
    value = os.environ.get(LIMIT, "")
    if value and value not in LIMITS:
        raise ValueError(f"{LIMIT}={value} is unknown: use {', '.join(LIMITS)}, or leave it out")
    return value


def detect() -> Cpu:
    """This machine's CPU, within the limits that are set."""
    return _detect(limit())


@functools.lru_cache(maxsize=4)
def _detect(own_limit: str) -> Cpu:
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", ""))
    return judge(_flags(), torch.backends.cpu.get_cpu_capability(), isa.upper(), own_limit)


def judge(flags: Mapping[str, Any], aten: str, isa: str = "", own_limit: str = "") -> Cpu:
    """What a CPU does well.

    Args:
        flags: what it has, by the names of `torch.cpu.get_capabilities`.
        aten: what PyTorch's own kernels may use (`torch.backends.cpu.get_cpu_capability`).
        isa: what oneDNN may use (``ONEDNN_MAX_CPU_ISA``), "" for everything.
        own_limit: see `limit`.
    """
    name = str(flags.get("cpu_name") or flags.get("architecture") or platform.machine())
    if "neon" in flags or "asimd" in flags:  # ARM
        sve = bool(flags.get("sve")) and aten.startswith("SVE")
        dots = bool(flags.get("dot") or flags.get("asimddp"))
        return Cpu(name, "sve" if sve else "neon", bool(flags.get("bf16")) and _onednn_bfloat16(), False, dots)
    wide = all(flags.get(f"avx512_{part}") for part in ("f", "bw", "vl", "dq"))
    wide = wide and aten == "AVX512" and isa not in _ISA_WITHOUT_AVX512 and own_limit != "avx2"
    amx = wide and bool(flags.get("amx_bf16")) and (not isa or "AMX" in isa or isa == "DEFAULT")
    converts = bool(flags.get("avx_ne_convert")) and isa not in _ISA_WITHOUT_BFLOAT16 and own_limit != "avx2"
    vnni = bool(flags.get("avx_vnni")) or (wide and bool(flags.get("avx512_vnni")))
    vector: Literal["avx512", "avx2", "none"] = "avx512" if wide else "avx2" if flags.get("avx2") else "none"
    return Cpu(name, vector, wide or converts, amx, vnni)


def _onednn_bfloat16() -> bool:
    ops: Any = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(ops, "_is_mkldnn_bf16_supported")
        and bool(ops._is_mkldnn_bf16_supported())
    )


def _flags() -> Mapping[str, Any]:
    """PyTorch's table of what the CPU has; from the operating system where this release has none."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    found: dict[str, Any] = {}
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            found |= {_as_in_torch(word): True for word in value.split()}
        elif key.strip() == "model name":
            found["cpu_name"] = value.strip()
    return found or {"avx2": torch.cpu._is_avx2_supported()}


def _as_in_torch(flag: str) -> str:
    """Linux writes avx512bw where PyTorch writes avx512_bw."""
    return f"avx512_{flag[6:]}" if flag.startswith("avx512") and not flag.startswith("avx512_") else flag


# ---- what follows ----------------------------------------------------------------------------------------------------


def default_weights(count: int) -> Literal["float32", "bf16", "int8"]:
    """How to keep ``count`` weights of a model that answers: float32; of a large model bfloat16 where this CPU computes
    well in it, else 8 bits. Where these do not work: float32, or bfloat16 where that would not fit into memory. What is
    not obvious is said."""
    if count < LARGE:
        return "float32"
    if detect().bfloat16:
        return "bf16"
    if rounds("int8"):
        _say_once("this CPU is slow in bfloat16: weights are rounded to 8 bits (weights=float32 or bf16 keeps them as they are)")
        return "int8"
    import psutil

    if 4 * count <= _MEMORY_SHARE * psutil.virtual_memory().available:
        return "float32"
    _say_once(
        f"{4e-9 * count:.1f} GB of float32 weights do not fit into memory: bfloat16 is taken, in which this CPU computes "
        f"{slowdown(torch.bfloat16):.1f} times slower"
    )
    return "bf16"


def rounds(kind: Literal["int8", "int4"]) -> bool:
    """Whether linear layers with weights in 8 or 4 bits work here. A refusal is said once."""
    return onnx.has_nbits(4 if kind == "int4" else 8)


def arithmetic(wanted: torch.dtype) -> torch.dtype:
    """The type to do much arithmetic in where ``wanted`` is asked for: float32 (said once) where this CPU is slow in
    the other."""
    if wanted != torch.bfloat16 or detect().bfloat16 or limit() == "bfloat16":
        return wanted
    _say_once(f"bfloat16 arithmetic is {slowdown(wanted):.1f} times slower than float32 on this CPU: float32 is used")
    return torch.float32


@functools.lru_cache(maxsize=64)
def _say_once(sentence: str) -> None:
    log.warning("%s", sentence)


@functools.lru_cache(maxsize=4)
def slowdown(dtype: torch.dtype) -> float:
    """Time of a product of many rows in ``dtype`` over its time in float32, on one thread, measured once (some
    milliseconds)."""
    operands = {kind: (torch.ones(64, 512, dtype=kind), torch.ones(512, 512, dtype=kind)) for kind in (dtype, torch.float32)}
    best = dict.fromkeys(operands, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for kind, (x, weight) in [*operands.items()] * 9:  # in turns, on a machine that may be busy
                start = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                best[kind] = min(best[kind], time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return best[dtype] / best[torch.float32]


def packs(dtype: torch.dtype) -> bool:
    """Whether packed weights of this type work here. A refusal is said once."""
    return _packs(dtype, limit())


@functools.lru_cache(maxsize=16)
def _packs(dtype: torch.dtype, own_limit: str) -> bool:
    ops: Any = torch.ops.mkldnn
    if dtype not in _PACKABLE or own_limit == "plain" or not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(ops, name) for name in _OPERATORS) or (own_limit == "avx2" and dtype == torch.bfloat16):
        return False
    try:
        return _tiny_packed_product(ops, dtype)
    except RuntimeError as error:
        kind = str(dtype).removeprefix("torch.")
        log.warning("packed %s weights do not work on this CPU (%s): ordinary ones are used", kind, str(error).splitlines()[0])
        return False


def _tiny_packed_product(ops: Any, dtype: torch.dtype) -> bool:
    """Whether a packed weight gives the right product. Raises RuntimeError where the CPU has no kernel for it."""
    with torch.inference_mode():
        weight, x = torch.full((16, 32), 0.5, dtype=dtype), torch.ones(2, 32, dtype=dtype)
        packed = ops._reorder_linear_weight(weight, 2)
        return bool((ops._linear_pointwise.default(x, packed, None, "none", [], "none").float() == 16.0).all())


def linear_kernel(dtype: torch.dtype, inputs: int, weights: int, many_rows: bool) -> Kernel:
    """How to compute a linear layer for inference.

    Args:
        inputs: width of its input.
        weights: numbers of its weight, of all layers that are computed as one.
        many_rows: whether it is called with many rows (token2wav), or mostly with one (decoding). A small float32
            matrix stays in the processor's cache, where PyTorch's own kernel is faster for a single row.
    """
    small = dtype == torch.float32 and (weights < _FLOAT32_WEIGHTS or inputs < _FLOAT32_INPUTS)
    return "packed" if packs(dtype) and (many_rows or not small) else "plain"


def one_graph(weights: int) -> bool:
    """Whether the step of a float32 decoder with so many weights is run as one onnxruntime graph
    (`cpu_linear.step_graph`), which holds them a second time. Of a large model the products are nearly all of a step,
    and nothing is gained."""
    return weights <= _GRAPH_WEIGHTS and limit() != "plain"


def summary() -> list[str]:
    """What was found and what follows, a line each, for `osum-echat doctor`."""
    cpu = detect()
    packed = [str(dtype).removeprefix("torch.") for dtype in _PACKABLE if packs(dtype)]
    large = "bfloat16" if cpu.bfloat16 else "8 bits" if rounds("int8") else "float32 while it fits into memory"
    lines = [
        str(cpu),
        f"bfloat16 arithmetic takes {slowdown(torch.bfloat16):.1f} x the time of float32; checkpoints of over {LARGE / 1e9:.1f} G weights: {large}",
        f"packed weights: {', '.join(packed) or 'none'}; rounded weights: {', '.join(k for k in ROUNDED if rounds(k)) or 'none'}",
    ]
    return lines + ([f"{LIMIT}={limit()}"] if limit() else [])
