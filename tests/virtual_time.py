"""An event loop whose clock stands still while anything is computed: it jumps to the next thing that is due when nothing is left to do.

What runs in it keeps exact times on any machine, however busy, and waits for nothing. Both ends of a connection have to be in it.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
ON_ITS_WAY = 0.002
"""Real seconds in which what was sent to this machine itself must have come."""


class _Selector(selectors.DefaultSelector):  # type: ignore[valid-type,misc]
    """Instead of waiting until something is due, moves the loop's clock there."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        ready: list[Any] = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        ready = super().select(ON_ITS_WAY if timeout is not None else None)
        if not ready and timeout is not None:
            self.loop.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """The loop. Calls into threads are done at once, in no time."""

    def __init__(self) -> None:
        selector = _Selector()
        self.now = 1000.0
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - whoever waits for the call gets it
            future.set_exception(error)
        return future


def run(work: Coroutine[Any, Any, T]) -> T:
    """Like `asyncio.run`, in virtual time."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
