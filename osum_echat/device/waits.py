"""Counting, on a CPU, where a program would wait for an accelerator: numbers that go to the host, and lists that go to the device.

    with Waits() as waits:
        step()
    waits.total, waits.by_place

On an accelerator each of these stops the queue of kernels until it is empty: reading a value (`item`, `tolist`, `bool`, `int`, `float`, `numpy`), a result
whose size depends on values (`nonzero`, boolean indexing, `unique`), and a tensor made from a Python list on the device (a blocking copy). On a CPU they
cost nothing, so a count is the only way to see them there. Tensors that live on the host by design are counted too: the count is an upper bound.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

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


class Waits:
    """A context in which waits are counted.

    Attributes:
        by_place: (file:line that called, what) to how often.
    """

    def __init__(self) -> None:
        self.by_place: Counter[tuple[str, str]] = Counter()
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
        return func(*args, **(kwargs or {}))
