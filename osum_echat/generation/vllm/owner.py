"""vLLM's processes end with the process that started them, even where that one was killed.

vLLM ends them when our process closes it or ends by itself. After kill -9 (or out of memory) its engine would wait for
requests for ever and keep the device's memory, so that whatever is started in our process's place finds no room: a
worker of a Ray cluster, a replica.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Any

OWNER = "OSUM_ECHAT_VLLM_OWNER"
"""Environment variable with the process that starts vLLM."""


def claim() -> None:
    """This process is about to start vLLM."""
    os.environ[OWNER] = str(os.getpid())


def end_with_owner(every: float = 1.0) -> bool:
    """In a process of vLLM: end it, and those between it and the owner, once the owner is gone. False where the owner
    is no process above this one."""
    import psutil

    this = psutil.Process()
    line = [this]
    for process in this.parents():
        if str(process.pid) == os.environ.get(OWNER):
            threading.Thread(target=_wait, args=(line, process.pid, every), name="osum-echat-owner", daemon=True).start()
            return True
        line.append(process)
    return False


def _wait(line: list[Any], owner: int, every: float) -> None:
    """``line``: from this process up to the owner's child, which gets another parent when the owner ends."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        while line[-1].ppid() == owner:
            time.sleep(every)
    for process in reversed(line[1:]):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(1)
