"""The sound of a reply on its way to the browser, while it is made: raw 16 bit samples over one HTTP response.

Gradio's own streaming of audio needs ffmpeg on the server, which newcomers do not have; the page's script plays these
samples instead.
"""

from __future__ import annotations

import queue
import secrets
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, HTTPException
from fastapi.responses import StreamingResponse

ROUTE = "/osum/sound"
_WAIT_SECONDS = 120.0
_KEPT_SECONDS = 60.0  # whole sounds that nobody has asked for: the visitor has "play at once" switched off


class LiveSound:
    """Sounds that are being made, by a name that cannot be guessed. Each can be fetched once."""

    def __init__(self) -> None:
        self._open: dict[str, queue.SimpleQueue[bytes | None]] = {}
        self._fetched: set[str] = set()
        self._ended: dict[str, float] = {}

    def new(self) -> str:
        """A new sound; returns its name. Forgets those that ended a while ago and that nobody asked for."""
        before = time.monotonic() - _KEPT_SECONDS
        for old in [old for old, ended in list(self._ended.items()) if ended < before and old not in self._fetched]:
            self.drop(old)
        name = secrets.token_urlsafe(16)
        self._open[name] = queue.SimpleQueue()
        return name

    def push(self, name: str, samples: npt.NDArray[np.float32]) -> None:
        """More samples [n] in [-1, 1]."""
        if name in self._open:
            self._open[name].put((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())

    def end(self, name: str) -> None:
        """No more samples will come."""
        if name in self._open:
            self._open[name].put(None)
            self._ended[name] = time.monotonic()

    def drop(self, name: str) -> None:
        """Forget a sound."""
        self._open.pop(name, None)
        self._ended.pop(name, None)
        self._fetched.discard(name)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The samples as they come, until `end` (or nothing more comes)."""
        waiting = self._open[name]
        self._fetched.add(name)
        try:
            while (chunk := waiting.get(timeout=_WAIT_SECONDS)) is not None:
                yield chunk
        except queue.Empty:
            return
        finally:
            self.drop(name)

    def router(self, rate: int) -> APIRouter:
        """The HTTP route ``GET /osum/sound/NAME``."""
        router = APIRouter()

        @router.get(ROUTE + "/{name}")
        def sound(name: str) -> StreamingResponse:
            if name not in self._open or name in self._fetched:
                raise HTTPException(404, "no such sound")
            headers = {"X-Sample-Rate": str(rate), "Cache-Control": "no-store"}
            return StreamingResponse(self.chunks(name), media_type="application/octet-stream", headers=headers)

        return router
