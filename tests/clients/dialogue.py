"""What the Python clients share: a recording that is sent as a microphone would, and what is printed at the end."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
import time
import wave
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

RATE = 24_000
PIECE = 960  # samples: 40 ms


@dataclass
class Report:
    """``turns``: answers that began; ``interrupted``: of those; ``completed``: that ended by themselves; ``errors``: what the client calls one.

    A server may have sent an answer to its end long before it has been played: speech over it interrupts it all the same (a client stops playing).
    ``sounds``, ``ended`` and ``over`` keep the counts so.
    """

    client: str
    turns: int = 0
    interrupted: int = 0
    completed: int = 0
    audio_seconds: float = 0.0
    transcripts: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    answering: bool = False
    seconds: float = 0.0  # of the current answer
    plays_until: float = 0.0

    def begins(self) -> None:
        """An answer begins."""
        self.turns, self.answering, self.seconds = self.turns + 1, True, 0.0

    def sounds(self, seconds: float) -> None:
        """So much of it came."""
        self.seconds, self.audio_seconds = self.seconds + seconds, self.audio_seconds + seconds
        self.plays_until = max(self.plays_until, time.monotonic()) + seconds

    def ended(self) -> None:
        """All of it has been sent."""
        if self.answering:
            self.answering, self.completed = False, self.completed + 1

    def over(self) -> bool:
        """Speech over an answer that is being made or played: whether there was one, which is interrupted now."""
        playing = time.monotonic() < self.plays_until
        if self.seconds == 0 or not (self.answering or playing):
            return False
        self.interrupted += 1
        self.completed -= not self.answering  # it has been sent to its end, and is not played to it
        self.answering, self.plays_until = False, 0.0
        return True

    def finish(self) -> None:
        print(json.dumps(asdict(self)), flush=True)


def arguments() -> tuple[str, bytes]:
    """The server's ws:// address, and the recording as 24 kHz PCM."""
    with wave.open(sys.argv[2], "rb") as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2), "give 24 kHz, mono, 16 bit"
        return sys.argv[1], file.readframes(file.getnframes())


class Microphone:
    """Sends silence, or what is being said, in real time."""

    def __init__(self, speech: bytes, send: Callable[[bytes], Awaitable[None]]) -> None:
        self.speech, self.send = speech, send
        self.left = b""
        self.said = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._running = asyncio.create_task(self.run())

    def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()

    def say(self) -> None:
        self.left = self.speech
        self.said.clear()

    async def run(self) -> None:
        begun, number = time.monotonic(), 0
        while True:
            piece, self.left = self.left[: PIECE * 2], self.left[PIECE * 2 :]
            if not self.left:
                self.said.set()
            await self.send(piece.ljust(PIECE * 2, b"\0"))
            number += 1
            await asyncio.sleep(max(0.0, begun + number * PIECE / RATE - time.monotonic()))


def example(name: str, url: str) -> ModuleType:
    """A script of examples/, imported, that speaks to the server at ``url``."""
    os.environ["OSUM_ECHAT_URL"] = url
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def until(test: Callable[[], object], what: str, seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not test():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come within {seconds:g} s")
        await asyncio.sleep(0.02)


async def three_turns(microphone: Microphone, report: Report) -> None:
    """Turn one is answered; turn two is interrupted by turn three, which is answered."""
    await asyncio.sleep(0.5)
    microphone.say()
    await until(lambda: report.completed >= 1, "the first answer")
    await asyncio.sleep(2.5)  # it is played
    microphone.say()
    await until(lambda: report.turns >= 2 and report.seconds > 0.2, "the second answer")
    microphone.say()
    await until(lambda: report.interrupted >= 1, "the interruption")
    await until(lambda: report.completed >= 2, "the third answer")
    await asyncio.sleep(0.5)
