"""Ending tasks of the event loop for certain."""

from __future__ import annotations

import asyncio
from typing import Any

_AGAIN_S = 0.2


async def end(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel tasks and wait until they have ended.

    A cancellation can be lost: `asyncio.wait_for` of Python below 3.12 gives the result instead, when what it waits for
    is ready at the same moment. So it is said again until it is heard.
    """
    while left := [task for task in tasks if task is not None and not task.done()]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=_AGAIN_S)
