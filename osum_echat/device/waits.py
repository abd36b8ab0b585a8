"""Counting, on a CPU, what a program would ask of an accelerator: kernels, and places where the host waits for the
device.

    with Waits() as waits:
        step()
    waits.total, waits.by_place, waits.kernels.total()
    a_step(run, 20, 40)     # what one more step costs in steady state

A kernel is an operator that computes or copies: views, new memory without content and reads of a value are none.
An operator that is made of others counts as those, but for the few for which accelerators have a kernel of their own
(`_JOINT`).

On an accelerator a wait stops the queue of kernels until it is empty: reading a value (`item`, `tolist`, `bool`, `int`,
`float`, `numpy`), a result whose size depends on values (`nonzero`, boolean indexing, `unique`), and a tensor made from
a Python list on the device (a blocking copy). On a CPU they cost nothing, so a count is the only way to see them there.
Tensors that live on the host by design are counted too: the count is an upper bound. What a CPU cannot show is
`tensor.to(device)` of a tensor of the host; `device.send` is the way that does not wait.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {"tolist", "numpy", "__array__", "cpu"}  # that reach the host without an operator
_FROM_LISTS = {"tensor", "as_tensor", "asarray"}
_OPERATORS = {
    "_local_scalar_dense",
    "nonzero",
    "nonzero_static",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "equal",
}
_NO_KERNEL = {
    "_local_scalar_dense",
    "_unsafe_view",
    "detach",
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "resize_",
    "set_",
}
_JOINT = {"rms_norm", "scaled_dot_product_attention"}
"""Operators that a CPU makes of several and an accelerator of one."""


class Waits:
    """A context in which waits and kernels are counted.

    Attributes:
        by_place: waits: (file:line that called, what) to how often.
        kernels: name of the operator to how often it ran.
    """

    def __init__(self) -> None:
        self.by_place: Counter[tuple[str, str]] = Counter()
        self.kernels: Counter[str] = Counter()
        self._functions, self._operators = _Functions(self), _Operators(self)

    @property
    def total(self) -> int:
        return sum(self.by_place.values())

    def add(self, what: str) -> None:
        """Count one, at the nearest line of this project."""
        frame = sys._getframe(1)
        while frame.f_back is not None and ("osum_echat" not in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
            frame = frame.f_back
        self.by_place[f"{frame.f_code.co_filename.rpartition('osum_echat/')[2]}:{frame.f_lineno}", what] += 1

    def __enter__(self) -> Waits:
        self._functions.__enter__()
        self._operators.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._operators.__exit__(kind, error, trace)
        self._functions.__exit__(kind, error, trace)

    def __str__(self) -> str:
        return "\n".join(f"{count:5d}  {what:<22} {place}" for (place, what), count in self.by_place.most_common())


class _Functions(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, options = getattr(func, "__name__", ""), kwargs or {}
        if name in _FROM_LISTS and options.get("device") is not None and not isinstance(args[0], Tensor):
            self._waits.add(f"{name} of a list")
        elif name in _READS and args and isinstance(args[0], Tensor):
            self._waits.add(name)
        return func(*args, **options)


class _Operators(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in _OPERATORS or masked:
            self._waits.add(f"{name} by a mask" if masked else name)
        if name not in _JOINT:
            with self:
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        if name not in _NO_KERNEL and not _is_view(func):
            self._waits.kernels[name] += 1
        return func(*args, **(kwargs or {}))


@functools.lru_cache(maxsize=4096)
def _is_view(func: Any) -> bool:
    """Whether the operator returns memory of its input without writing to it."""
    return any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)


class Cost(NamedTuple):
    """What a step costs: kernels that are launched, and how often the host waits."""

    kernels: float
    waits: float


def a_step(run: Callable[[int], object], few: int, many: int) -> Cost:
    """The cost of one more step in steady state, so that start and end fall out. ``run(n)`` does n steps."""
    run(few)  # what is made once
    counts = []
    for steps in (few, many):
        with Waits() as waits:
            run(steps)
        counts.append((waits.kernels.total(), waits.total))
    (kernels, waited), (more_kernels, more_waited) = counts
    return Cost((more_kernels - kernels) / (many - few), (more_waited - waited) / (many - few))
