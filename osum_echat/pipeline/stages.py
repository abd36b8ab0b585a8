"""Two stages joined by a bounded queue: the decoder makes events, the vocoder makes sound of their codes.

    decoder  ->  queue of at most QUEUE events  ->  vocoder, in the reader's thread

`ahead` runs the decoder on a thread of its own, so that on an accelerator the next codes are decoded while sound is
made; on a CPU, where the two would only share the same cores, `speak_along` reads the decoder directly. The order of
what comes out is the same either way, and does not depend on timing: every event in its place, every chunk of sound
right behind the code that completed it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, Protocol, TypeVar

from osum_echat.generation.events import Done, SpeechToken
from osum_echat.pipeline.ask import AudioChunk, Samples, StreamEvent

T = TypeVar("T")
QUEUE = 64
"""Events that the decoder may be ahead of the vocoder: at most 2.5 s of speech."""


class Vocoder(Protocol):
    """One reply's sound (`token2wav.model.ReplyStream`)."""

    def push(self, token: int) -> Samples | None: ...

    def finish(self) -> Samples | None: ...


def speak_along(
    events: Iterator[StreamEvent],
    vocoder: Vocoder,
    rate: int,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Iterator[StreamEvent]:
    """The events of one row with its sound between them; `Done` is the last. ``context`` is entered around the
    vocoder's work."""
    for event in events:
        if isinstance(event, Done):
            with context():
                samples = vocoder.finish()
            if samples is not None:
                yield AudioChunk(samples, rate)
        yield event
        if isinstance(event, SpeechToken):
            with context():
                samples = vocoder.push(event.code)
            if samples is not None:
                yield AudioChunk(samples, rate)


def ahead(items: Iterator[T], size: int = QUEUE) -> Generator[T, None, None]:
    """The same items, made by a thread that is at most ``size`` of them ahead.

    The thread starts with the first item asked for. An error of it is raised here, after the items before it. Closing
    this iterator stops the thread (within the item it is at), closes ``items`` on it, and waits for it.
    """
    stage = _Stage(items, size)
    stage.thread.start()
    try:
        yield from stage
    finally:
        stage.stop()


class _Stage(Generic[T]):
    """The thread, its queue, and how it ended."""

    def __init__(self, items: Iterator[T], size: int) -> None:
        assert size > 0, f"a queue of {size} items holds nothing"
        self.items, self.size = items, size
        self.queue: deque[T] = deque()
        self.changed = threading.Condition()
        self.ended = self.stopped = False
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="decoder", daemon=True)

    def __iter__(self) -> Iterator[T]:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.queue or self.ended)
                if not self.queue:
                    break
                item = self.queue.popleft()
                self.changed.notify_all()
            yield item
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()
        self.thread.join()

    def _run(self) -> None:
        try:
            for item in self.items:
                if not self._put(item):
                    break
        except BaseException as error:  # noqa: BLE001 - carried to the reader, who raises it
            self.error = error
        finally:
            close = getattr(self.items, "close", None)
            if close is not None:
                close()
            with self.changed:
                self.ended = True
                self.changed.notify_all()

    def _put(self, item: T) -> bool:
        """Wait for room; False when nobody reads any more."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.queue) < self.size or self.stopped)
            if self.stopped:
                return False
            self.queue.append(item)
            self.changed.notify_all()
            return True
