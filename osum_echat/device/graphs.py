"""Work that is recorded once and replayed, and values that come back without stopping the device.

    step = record(compute, device)      # CUDA or NPU graph of `compute`; on a CPU `compute` itself
    step()
    packet = fetch(result)              # its copy to the host is on its way
    other_work()
    values = packet.wait()              # a tensor of the host

A graph replays the same kernels on the same memory, so `compute` reads and writes tensors that stay where they are, has
no shape that depends on values and does not wait. It runs twice before it is recorded (compilers, libraries and lazily
made tensors want that): it must leave no trace then.
"""

from __future__ import annotations

import gc
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from osum_echat.device import accelerators

_WARM_UP = 2
_recording = threading.Lock()


def records(device: torch.device) -> bool:
    """Whether work on this device can be recorded."""
    return _graph_class(accelerators._accelerator(device.type)) is not None


def record(compute: Callable[[], None], device: torch.device, pool: Any = None) -> Callable[[], None]:
    """A call that does what ``compute`` does. ``pool``: see `memory_pool`."""
    module = accelerators._accelerator(device.type)
    graph_class = _graph_class(module)
    if module is None or graph_class is None:
        return compute
    with _recording:
        return _record(compute, device, pool, module, graph_class)


def _record(compute: Callable[[], None], device: torch.device, pool: Any, module: Any, graph_class: Any) -> Callable[[], None]:
    side = module.Stream(device)
    side.wait_stream(module.current_stream(device))
    with module.stream(side):
        for _ in range(_WARM_UP):
            compute()
    module.current_stream(device).wait_stream(side)
    module.synchronize(device)
    gc.collect()
    graph = graph_class()
    with module.graph(graph, pool=pool, capture_error_mode="thread_local"):
        compute()
    replay: Callable[[], None] = graph.replay
    return replay


def memory_pool(device: torch.device) -> Any:
    """Memory that several graphs share, for `record`; such graphs must not run at the same time."""
    module = accelerators._accelerator(device.type)
    handle = getattr(module, "graph_pool_handle", None)
    return handle() if handle is not None else None


def _graph_class(module: Any) -> Any:
    """The class of graphs of an accelerator's torch module; None where it has none."""
    if module is None or getattr(module, "graph", None) is None:
        return None
    return getattr(module, "CUDAGraph", None) or getattr(module, "NPUGraph", None)


class Recordings:
    """Functions of tensors that give a tensor, recorded for each set of shapes when it comes a second time.

        wave = recordings(self.decode, mel, source)

    A shape that comes once (the end of a reply) is not worth it. What was not used for longest is forgotten when there
    are more than ``limit``.

    Args:
        limit: recordings that are kept.
        always: go through the steps on a device that cannot record as well (tests).
    """

    def __init__(self, limit: int = 24, always: bool = False) -> None:
        self._limit, self._always = limit, always
        self._seen: Counter[Hashable] = Counter()
        self._known: OrderedDict[Hashable, tuple[list[Tensor], list[Tensor], Callable[[], None]]] = OrderedDict()

    def __deepcopy__(self, memo: object) -> Recordings:
        return Recordings(self._limit, self._always)  # recordings belong to the tensors that they were made with

    def __call__(self, compute: Callable[..., Tensor], *tensors: Tensor, fixed: tuple[Hashable, ...] = ()) -> Tensor:
        """``compute``: a method that is fit for `record`. ``fixed``: further arguments that a recording holds for
        ever."""
        device = tensors[0].device
        if torch.is_grad_enabled() or not (self._always or records(device)):
            return compute(*tensors, *fixed)
        key = (getattr(compute, "__name__", ""), fixed, tuple((tensor.shape, tensor.dtype) for tensor in tensors))
        self._seen[key] += 1
        if self._seen[key] < 2:
            return compute(*tensors, *fixed)
        if key not in self._known:
            self._known[key] = self._recorded(compute, tensors, fixed)
            while len(self._known) > self._limit:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        inputs, output, replay = self._known[key]
        for mine, theirs in zip(inputs, tensors, strict=True):
            mine.copy_(theirs)
        replay()
        return output[0].clone()

    @staticmethod
    def _recorded(
        compute: Callable[..., Tensor], tensors: tuple[Tensor, ...], fixed: tuple[Hashable, ...]
    ) -> tuple[list[Tensor], list[Tensor], Callable[[], None]]:
        inputs, output = [tensor.clone() for tensor in tensors], list[Tensor]()

        def run() -> None:
            output[:] = [compute(*inputs, *fixed)]

        return inputs, output, record(run, tensors[0].device)


class Packet:
    """A tensor on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        module = accelerators._accelerator(tensor.device.type)
        self._event: Any = None
        if module is None:
            self._values = tensor.clone()
            return
        self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._values.copy_(tensor, non_blocking=True)
        self._event = module.Event()
        self._event.record(module.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """The values, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._values


def fetch(tensor: Tensor) -> Packet:
    """Start copying to the host; the tensor may be written to again behind it."""
    return Packet(tensor)
