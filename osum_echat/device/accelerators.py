"""cuda, npu (Ascend) or cpu: the only file that knows accelerators; see the package for who asks.

`torch_npu` is imported here alone, and only when an NPU is asked for or when nothing else is there.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from osum_echat.device import cpu

KINDS = ("cuda", "npu", "cpu")
WEIGHTS = ("auto", "float32", "bf16", "int8", "int4")
_ROUNDED: dict[str, Literal["int8", "int4"]] = {"int8": "int8", "int4": "int4"}
VARLEN_KINDS = ("cuda",)
"""Where torch's attention of sequences of different length runs (`varlen`)."""
_BACKENDS = {"cuda": "nccl", "npu": "hccl", "cpu": "gloo"}
CLUSTER_RESOURCES = {"cuda": "GPU", "npu": "NPU", "cpu": "CPU"}
"""Ray's resource for each kind of device. NPU is a custom one: nodes name it themselves, or Ray finds Ascend cards."""


def _accelerator(kind: str) -> ModuleType | None:
    """The torch module that drives ``kind`` (`torch.cuda`, `torch.npu`), or None for cpu."""
    if kind == "cpu":
        return None
    if kind == "npu" and not hasattr(torch, "npu") and importlib.util.find_spec("torch_npu") is not None:
        importlib.import_module("torch_npu")  # registers torch.npu
    return getattr(torch, kind, None)


def available(kind: str) -> bool:
    """Whether a device of this kind can be used now."""
    if kind == "cpu":
        return True
    module = _accelerator(kind)
    return bool(module is not None and module.is_available())


def resolve(name: str = "auto", local_rank: int | None = None) -> torch.device:
    """The device for ``name``: auto, cpu, cuda, npu, or one with an index (cuda:1).

    Without an index, ``local_rank`` (default: torchrun's LOCAL_RANK, else 0) chooses the card.
    Raises ValueError for an unknown name or a device that is not there.
    """
    if name == "auto":
        name = next(kind for kind in KINDS if available(kind))
    kind, _, index = name.partition(":")
    if kind not in KINDS or (index and not index.isdigit()):
        raise ValueError(f"unknown device {name!r}: use auto, {', '.join(KINDS)}, or one with an index such as cuda:0")
    if not available(kind):
        raise ValueError(f"device {name!r} is not available on this machine; use --device cpu or auto")
    if kind == "cpu":
        return torch.device("cpu")
    rank = int(index) if index else int(os.environ.get("LOCAL_RANK", "0")) if local_rank is None else local_rank
    return torch.device(kind, rank)


def count(kind: str = "auto") -> int:
    """Devices of this kind that this machine offers; 1 for cpu."""
    if kind == "auto":
        kind = next(k for k in KINDS if available(k))
    module = _accelerator(kind)
    return int(module.device_count()) if module is not None else 1


def activate(device: torch.device) -> None:
    """Make ``device`` the current one of this process (needed once per rank before collectives)."""
    module = _accelerator(device.type)
    if module is not None:
        module.set_device(device)


def dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype for ``name``: float32, bfloat16, float16 or auto (bfloat16 on accelerators, float32 on CPU)."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    table = {
        "float32": torch.float32,
        "fp32": torch.float32,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
        "float16": torch.float16,
        "fp16": torch.float16,
    }
    if name not in table:
        raise ValueError(f"unknown dtype {name!r}: use auto, float32, bfloat16 or float16")
    return table[name]


@dataclass(frozen=True)
class Weights:
    """How a model's weights are kept: the type of what is not rounded (and of arithmetic), and "int8" or "int4" for
    what is (`cpu_linear.nbits`)."""

    dtype: torch.dtype
    kind: Literal["int8", "int4"] | None = None

    @property
    def bytes_each(self) -> float:
        """Memory of a weight, scales included; with int4 a quarter of the released model stays in 8 bits."""
        return {"int8": 1.05, "int4": 0.75}[self.kind] if self.kind else self.dtype.itemsize


def model_weights(weights: str, dtype_name: str, device: torch.device, count: int, stored: str | None) -> Weights:
    """How to keep the weights of a model that answers.

    Args:
        weights: one of `WEIGHTS`. "auto" is what the file holds where it is rounded, else the CPU's rule by size
            (`cpu.default_weights`), else bfloat16.
        dtype_name: "auto" or a type that says the same in another word; with it nothing is rounded unless ``weights``
            asks.
        count: how many weights the model has.
        stored: what the file has rounded them to.

    Raises:
        ValueError: an unknown word, two words that contradict, or rounded weights on an accelerator.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"unknown weights {weights!r}: use {', '.join(WEIGHTS)}")
    if weights == "auto" and (dtype_name != "auto" or device.type != "cpu"):
        return Weights(dtype(dtype_name, device))
    if weights == "auto":
        weights = stored or cpu.default_weights(count)
    kind = _ROUNDED.get(weights)
    wanted = torch.float32 if kind else dtype(weights, device)
    if dtype_name != "auto" and dtype(dtype_name, device) != wanted:
        raise ValueError(f"weights={weights} computes in {wanted}, dtype={dtype_name} contradicts; leave one of them out")
    if kind and device.type != "cpu":
        raise ValueError(f"weights={weights} is for CPUs; on {device} use bf16")
    return Weights(wanted, kind if kind and cpu.rounds(kind) else None)


def arithmetic(wanted: torch.dtype, device: torch.device) -> torch.dtype:
    """The type to do much arithmetic in where ``wanted`` is asked for: float32 on a CPU that is slow in it, which is
    said once."""
    return cpu.arithmetic(wanted) if device.type == "cpu" else wanted


def training_precision(precision: str, device: torch.device) -> str:
    """``precision`` of a training run (`training.config`), or ``fp32`` on a CPU that is slow in bfloat16, which is said
    once."""
    if precision in ("bf16", "autocast") and arithmetic(torch.bfloat16, device) == torch.float32:
        return "fp32"
    return precision


def linear_kernel(device: torch.device, dtype: torch.dtype, inputs: int, weights: int, many_rows: bool = False) -> cpu.Kernel:
    """How to compute a linear layer for inference on ``device`` (`cpu.linear_kernel`); "plain" on accelerators."""
    return cpu.linear_kernel(dtype, inputs, weights, many_rows) if device.type == "cpu" else "plain"


def autocast(device: torch.device, to: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast to ``to`` on ``device``; does nothing for None or float32, and on a CPU that is slow in ``to`` (see
    `arithmetic`)."""
    if to is None or arithmetic(to, device) == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device_type=device.type, dtype=to)


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries still read the global state
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """All random states that a restart must restore (Python, NumPy, torch CPU and this device)."""
    module = _accelerator(device.type)
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": torch.get_rng_state(),
        "device": module.get_rng_state(device) if module is not None else None,
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `rng_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    module = _accelerator(device.type)
    if module is not None and state.get("device") is not None:
        module.set_rng_state(state["device"], device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished what was queued."""
    module = _accelerator(device.type)
    if module is not None:
        module.synchronize(device)


def sums_in_float64(device: torch.device) -> bool:
    """Whether the device computes in float64 at all."""
    return device.type != "npu"


@contextlib.contextmanager
def short_products(device: torch.device, on: bool = True) -> Iterator[None]:
    """A block in which products of float32 numbers round them to 10 bits of mantissa, where the device has units for
    that (TF32, HF32): several times faster. Elsewhere nothing happens. The switches are those of the whole process, so
    what runs beside may be rounded too."""
    module = _accelerator(device.type) if on else None
    backends: Any = (
        {"cuda": [torch.backends.cuda.matmul, torch.backends.cudnn]}.get(device.type, []) if module is not None else []
    )
    name = "allow_tf32"
    if device.type == "npu" and module is not None:
        backends, name = [part for part in (getattr(module, "matmul", None), getattr(module, "conv", None)) if part], "allow_hf32"
    before = [getattr(part, name) for part in backends]
    try:
        for part in backends:
            setattr(part, name, True)
        yield
    finally:
        for part, value in zip(backends, before, strict=True):
            setattr(part, name, value)


def send(values: Tensor | Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host on ``device``, without waiting for it: a copy from memory that the device reads by itself. A
    tensor of the host is not to be written to afterwards."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def overlaps(device: torch.device) -> bool:
    """Whether two threads' work on the device runs at the same time; on a CPU they would only share its cores."""
    return device.type != "cpu"


def side_stream(device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Enters a queue of work beside the device's usual one, behind what is queued there now; on a CPU there is none and
    nothing happens."""
    module = _accelerator(device.type)
    if module is None:
        return contextlib.nullcontext
    stream = module.Stream(device)
    stream.wait_stream(module.current_stream(device))
    return lambda: module.stream(stream)


def fuses_optimizer(device: torch.device) -> bool:
    """Whether torch's fused AdamW runs on ``device``."""
    return device.type in ("cuda", "cpu")


def send_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """`send` for flat tensors of one type, in a single copy."""
    if device.type == "cpu" or not tensors:
        return list(tensors)
    sizes = [len(tensor) for tensor in tensors]
    return list(send(torch.cat(list(tensors)), device).split(sizes))


def empty_cache(device: torch.device) -> None:
    """Give cached device memory back."""
    module = _accelerator(device.type)
    if module is not None:
        module.empty_cache()


def memory_allocated(device: torch.device) -> int:
    """Bytes in use now: device memory, or this process's resident set on CPU."""
    module = _accelerator(device.type)
    if module is not None:
        return int(module.memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes in use so far: device memory since `reset_peak_memory`, or peak resident set on CPU."""
    module = _accelerator(device.type)
    if module is not None:
        return int(module.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():  # Linux; getrusage begins with the parent's peak after a fork
        return next(int(line.split()[1]) * 1024 for line in status.read_text("ascii").splitlines() if line.startswith("VmHWM"))
    import psutil

    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return int(memory.peak_wset)
    import resource  # other Unix

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak (has no effect on CPU, where the operating system keeps the process's peak)."""
    module = _accelerator(device.type)
    if module is not None:
        module.reset_peak_memory_stats(device)


def total_memory(device: torch.device) -> int:
    """Bytes of memory of the device (of the machine, on CPU)."""
    module = _accelerator(device.type)
    if module is not None:
        return int(module.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def collectives_backend(device: torch.device) -> str:
    """The torch.distributed back end that belongs to the device: nccl, hccl or gloo."""
    return _BACKENDS[device.type]


def cluster_options(kind: str, share: float) -> dict[str, Any]:
    """What a Ray actor asks for that has ``share`` devices of ``kind`` (CPU: cores); beside an accelerator it has one
    core."""
    if kind == "cpu":
        return {"num_cpus": share}
    if kind == "cuda":
        return {"num_gpus": share, "num_cpus": 1}
    return {"resources": {CLUSTER_RESOURCES[kind]: share}, "num_cpus": 1}


def deepspeed_accelerator(device: torch.device) -> str:
    """DeepSpeed's name of the device, for DS_ACCELERATOR."""
    return device.type


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run a block with ``count`` intra-op CPU threads (None: leave as it is)."""
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe(device: torch.device) -> str:
    """One line for the start of a run: name, memory, threads."""
    gib = total_memory(device) / 2**30
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads, {gib:.0f} GiB)"
    module = _accelerator(device.type)
    assert module is not None
    return f"{device} ({module.get_device_name(device)}, {gib:.0f} GiB)"


def runs_triton(device: torch.device) -> bool:
    """Whether kernels written in Triton can be launched on ``device`` (and Triton is installed)."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None
