"""Devices: cuda, npu (Ascend) or cpu. The only place that knows accelerators (`accelerators`) and what the CPU does well (`cpu`).

Everything else asks here for a device, a type to compute in, kernels, autocast, seeding, synchronisation, memory figures and the collectives
back end.
"""

from osum_echat.device import cpu
from osum_echat.device.accelerators import (
    KINDS,
    activate,
    arithmetic,
    autocast,
    available,
    collectives_backend,
    count,
    deepspeed_accelerator,
    describe,
    dtype,
    empty_cache,
    linear_kernel,
    memory_allocated,
    model_dtype,
    peak_memory,
    reset_peak_memory,
    resolve,
    rng_state,
    runs_triton,
    seed_all,
    set_rng_state,
    synchronize,
    threads,
    total_memory,
    training_precision,
)

__all__ = [
    "KINDS",
    "activate",
    "arithmetic",
    "autocast",
    "available",
    "collectives_backend",
    "count",
    "cpu",
    "deepspeed_accelerator",
    "describe",
    "dtype",
    "empty_cache",
    "linear_kernel",
    "memory_allocated",
    "model_dtype",
    "peak_memory",
    "reset_peak_memory",
    "resolve",
    "rng_state",
    "runs_triton",
    "seed_all",
    "set_rng_state",
    "synchronize",
    "threads",
    "total_memory",
    "training_precision",
]
