"""How much memory tensors take at the peak of a piece of work.

An accelerator's allocator counts it. On a CPU the resident set holds libraries and what the allocator has not given
back, so there PyTorch's own events are counted: every block of memory that a tensor takes or gives back.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from osum_echat.device.accelerators import peak_memory, reset_peak_memory


class PeakMemory:
    """A context; afterwards ``bytes`` is the most that was in use at a time.

    Args:
        held: tensors that exist before and stay, for a CPU, where only what is taken inside the context is seen.
    """

    def __init__(self, device: torch.device, held: Iterable[Tensor] = ()) -> None:
        self.bytes = 0
        self._device = device
        self._before = bytes_of(held) if device.type == "cpu" else 0
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True) if device.type == "cpu" else None

    def __enter__(self) -> PeakMemory:
        if self._profile is None:
            reset_peak_memory(self._device)
        else:
            self._profile.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._profile is None:
            self.bytes = peak_memory(self._device)
            return
        self._profile.__exit__(kind, error, trace)
        results: Any = self._profile.profiler.kineto_results if self._profile.profiler is not None else None
        assert results is not None, "the profiler has no results"
        events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
        now = most = 0
        for _, count in events:
            now += count
            most = max(most, now)
        self.bytes = self._before + most


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Memory of tensors, each block counted once."""
    blocks = {}
    for tensor in tensors:
        whole = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storage = whole.untyped_storage()
        blocks[storage.data_ptr()] = storage.nbytes()
    return sum(blocks.values())
