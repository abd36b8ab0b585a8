"""SIGTERM and Ctrl-C end a run after the step that is being made, so that it can save."""

from __future__ import annotations

import contextlib
import logging
import signal
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)


class StopRequest:
    """``wanted`` is True once a signal came. Inside the ``with`` block the first signal is noted, the second raises
    KeyboardInterrupt.

    Outside the main thread nothing is installed: there signals belong to the caller.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        with contextlib.suppress(ValueError):
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
        log.warning("signal %d: finishing this step, saving, stopping (once more: stop at once)", number)
