"""What was said in the user's items: from the thought of the response where there is one, else by the transcript
task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from osum_echat.serving.backend import Backend, Heard, Refused
from osum_echat.serving.realtime import tasks
from osum_echat.serving.realtime.conversation import Item
from osum_echat.serving.realtime.response import Emit, Response


class Transcripts:
    """Those of one session; each is found by a task of its own.

    Args:
        wanted: whether the session asks for them now.
    """

    def __init__(self, backend: Backend, emit: Emit, wanted: Callable[[], bool]) -> None:
        self._backend, self._emit, self._wanted = backend, emit, wanted
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def find(self, item: Item, response: Response | None) -> None:
        """Find out what was said in it. ``response``: the one whose thought will say so; None: none does."""
        if not self._wanted() or item.heard is None or item.text is not None:
            return
        if item.id not in self._tasks:
            task = asyncio.create_task(self._find(item, item.heard, response))
            self._tasks[item.id] = task
            task.add_done_callback(lambda _: self._tasks.pop(item.id, None))

    def of(self, items: Sequence[Item]) -> list[asyncio.Task[None]]:
        """The tasks that are still busy with these items."""
        return [self._tasks[item.id] for item in items if item.id in self._tasks]

    async def end(self) -> None:
        await tasks.end(*self._tasks.values())

    async def _find(self, item: Item, heard: Heard, response: Response | None) -> None:
        text = ""
        try:
            if response is not None:
                await response.thought_ready.wait()
                text = response.thought.tags.get("transcript", "") if response.thought is not None else ""
            text = text or await self._backend.transcribe(heard)
        except (Refused, ValueError) as error:
            self._emit(
                "conversation.item.input_audio_transcription.failed",
                item_id=item.id,
                content_index=0,
                error={"type": "server_error", "code": "transcription_failed", "message": str(error)},
            )
            return
        item.text = text
        where = {"item_id": item.id, "content_index": 0}
        if text:
            self._emit("conversation.item.input_audio_transcription.delta", delta=text, **where)
        usage = {"type": "duration", "seconds": round(heard.seconds, 3)}
        self._emit("conversation.item.input_audio_transcription.completed", transcript=text, usage=usage, **where)
