#!/usr/bin/env python3
"""Many sessions with the live server, some rude: does anything stay stuck, does memory grow, is every refusal a sentence?

    python benchmarks/live_soak.py --sessions 500 --interruptions 200      # with mini: long
    python benchmarks/live_soak.py --url ws://127.0.0.1:8000/v1/realtime   # another server (its memory is not seen)
    python benchmarks/live_soak.py --fuzz 10000                            # frames of nonsense

5 % of the sessions are dropped without a goodbye, 2 % of the frames are garbage. A tenth (``--whole``) say a whole sentence and are answered with a
thought and a transcript, as long as the model likes; those that interrupt (half by a message, half by speech) are answered as long as it likes, too.
The others say a second and are answered by 30 ids at most. Before that three whole sessions for each place, which are not counted, bring memory to
where the work of that many at once has it. Exit code 0 when nothing was stuck, memory of the last tenth is at most 10 % above that of the first and
rises by 0.1 MiB a session at most in the second half (of 200 sessions or more), every refusal was a sentence, and the server still answers. The ratio alone would let a
leak pass that is small beside the weights.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
import urllib.request
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import missing_package  # noqa: F401 - first: it says what is missing
import psutil
import soxr
from common import serving
from live import SPEECH, appends
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from osum_echat.audio.io import to_mono_16k
from osum_echat.serving.conformance.nonsense import frame

WARM = 3
"""Whole sessions for each place before the count."""
SLICES, SLICE_S = 24, 10.0
"""A session is stuck when nothing came in so many waits of so many seconds."""
SLOPE_SESSIONS, SLOPE_MIB = 200, 0.1
"""Sessions from which on the rise of memory is judged, and what a session may leave behind."""
SHORT_PIECES, SHORT_IDS = 10, 30
"""Messages of 100 ms that a short turn has, and the ids of its answer at most."""


@dataclass
class Count:
    sessions: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    interrupted: dict[str, int] = field(default_factory=dict)
    dropped: int = 0
    garbage: int = 0
    refused: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


async def fuzz(url: str, count: int, seed: int) -> list[str]:
    """Frames of nonsense, 100 a connection; returns what went wrong."""
    dice, faults, left = random.Random(seed), list[str](), count
    while left > 0:
        try:
            async with connect(url, max_size=None) as socket:
                for _ in range(min(100, left)):
                    left -= 1
                    await socket.send(frame(dice))
                item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}], "id": "the_last"}
                await socket.send(json.dumps({"type": "conversation.item.create", "item": item}))
                while True:
                    event = json.loads(await asyncio.wait_for(socket.recv(), 60))
                    if event["type"] == "error" and not event["error"].get("message"):
                        faults.append(f"an error without a sentence: {event}")
                    if event.get("item", {}).get("id") == "the_last":
                        break
        except (ConnectionClosed, OSError, asyncio.TimeoutError) as error:
            faults.append(f"{type(error).__name__}: {error}")
    return faults


class Visitor:
    """One session: a spoken turn and its answer, which may be interrupted by a message or by speech."""

    def __init__(self, url: str, speech: list[str], dice: random.Random, count: Count, whole: bool) -> None:
        self.url, self.speech, self.dice, self.count, self.whole = url, speech, dice, count, whole

    async def visit(self, interrupt: str | None) -> None:
        """``interrupt``: None, ``cancel`` or ``speech``."""
        count = self.count
        count.sessions += 1
        rude = self.dice.random() < 0.05
        try:
            async with connect(self.url, max_size=None, ping_interval=None) as self.socket:
                await self._turn(interrupt, rude)
        except asyncio.TimeoutError:
            count.stuck.append(f"no event within {SLICES * SLICE_S:g} s")
        except (ConnectionClosed, OSError) as error:
            if not rude:
                count.refused.append(str(error))

    async def _turn(self, interrupt: str | None, rude: bool) -> None:
        await self._until("session.created")
        await self._settings(interrupt)
        for message in self.speech if self.whole else self.speech[:SHORT_PIECES]:
            await self.socket.send(message)
            if self.dice.random() < 0.02:
                await self.socket.send(frame(self.dice))
                self.count.garbage += 1
        await self._settings(interrupt)  # whatever the garbage has changed
        await self.socket.send(json.dumps({"type": "input_audio_buffer.commit"}))
        await self.socket.send(json.dumps({"type": "response.create"}))
        first = await self._until("response.output_audio.delta", "response.done")
        if rude:
            self.count.dropped += 1
            self.socket.transport.abort()
            return
        done = first
        if first["type"] != "response.done":
            if interrupt == "cancel":
                await self.socket.send(json.dumps({"type": "response.cancel"}))
            for message in self.speech if interrupt == "speech" else []:
                await self.socket.send(message)
            done = await self._until("response.done")
        status = done["response"]["status"]
        self.count.statuses[status] = self.count.statuses.get(status, 0) + 1
        if interrupt and status == "cancelled":
            self.count.interrupted[interrupt] = self.count.interrupted.get(interrupt, 0) + 1

    async def _settings(self, interrupt: str | None) -> None:
        detection = (
            {"type": "server_vad", "create_response": False, "interrupt_response": True} if interrupt == "speech" else None
        )
        heard = {"turn_detection": detection, "transcription": {"model": "any"} if self.whole else None}
        session = {
            "type": "realtime",
            "output_modalities": ["audio"],
            "audio": {"input": heard},
            "x_echat": {"think": "tag" if self.whole else None},
            "max_output_tokens": "inf" if self.whole or interrupt else SHORT_IDS,
        }
        await self.socket.send(json.dumps({"type": "session.update", "session": session}))

    async def _until(self, *kinds: str) -> dict[str, Any]:
        while True:
            event = json.loads(await self._receive())
            details = (event.get("response") or {}).get("status_details") or {}
            error = event.get("error") if event["type"] == "error" else details.get("error")
            if error:
                self.count.refused.append(str(error.get("message")))
            if event["type"] in kinds:
                return event

    async def _receive(self) -> str:
        """The next message. The wait is counted in slices, so that a machine on which both sides were stopped for a while is not taken for a
        server that is stuck."""
        for _ in range(SLICES):
            try:
                return str(await asyncio.wait_for(self.socket.recv(), SLICE_S))
            except asyncio.TimeoutError:
                continue
        raise asyncio.TimeoutError


async def soak(
    url: str, sessions: int, interruptions: int, together: int, whole: float, seed: int, server: psutil.Process | None
) -> Count:
    dice, count = random.Random(seed), Count()
    speech = appends(soxr.resample(to_mono_16k(SPEECH), 16000, 24000))
    cut = set(dice.sample(range(sessions), min(interruptions, sessions)))
    room = asyncio.Semaphore(together)
    for turn in range(WARM):
        await asyncio.gather(
            *(Visitor(url, speech, random.Random(-1 - turn), Count(), True).visit(None) for _ in range(together))
        )

    async def one(number: int) -> None:
        async with room:
            interrupt = ("cancel", "speech")[number % 2] if number in cut else None
            own = random.Random(seed + number)
            await Visitor(url, speech, own, count, own.random() < whole).visit(interrupt)
            if server is not None:
                count.memory.append(server.memory_info().rss)
            if number % 25 == 24:
                memory = f", {count.memory[-1] >> 20} MiB" if count.memory else ""
                print(f"{count.sessions} sessions, {len(count.stuck)} stuck{memory}", file=sys.stderr, flush=True)

    await asyncio.gather(*(one(number) for number in range(sessions)))
    return count


def growth(memory: list[int]) -> float:
    """Memory of the last tenth by that of the first full tenth behind the start."""
    tenth = max(1, len(memory) // 10)
    return statistics.mean(memory[-tenth:]) / statistics.mean(memory[tenth : 2 * tenth]) if len(memory) >= 20 else 1.0


def slope(memory: list[int]) -> float | None:
    """MiB a session in the second half, by least squares; None with too few sessions to tell it from the ups and downs of answers in progress."""
    if len(memory) < SLOPE_SESSIONS:
        return None
    half = [value / 2**20 for value in memory[len(memory) // 2 :]]
    return statistics.linear_regression(range(len(half)), half).slope


def own_server(address: str) -> psutil.Process:
    port = int(address.rsplit(":", 1)[1])
    for child in psutil.Process().children(recursive=True):
        if any(c.laddr.port == port for c in child.net_connections("tcp") if c.status == "LISTEN"):
            return child
    raise RuntimeError("the server's process was not found")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url")
    parser.add_argument("--sessions", type=int, default=500)
    parser.add_argument("--interruptions", type=int, default=200)
    parser.add_argument("--together", type=int, default=8)
    parser.add_argument("--whole", type=float, default=0.1, help="share of sessions with a whole turn (default: 0.1)")
    parser.add_argument("--fuzz", type=int, default=0, metavar="FRAMES", help="only send so many frames of nonsense")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with nullcontext(args.url) if args.url else serving(1) as address:
        url = args.url or f"ws://{address}/v1/realtime"
        result: dict[str, Any]
        if args.fuzz:
            faults = asyncio.run(fuzz(url, args.fuzz, args.seed))
            result, good = {"frames": args.fuzz, "faults": faults[:5]}, not faults
        else:
            server = None if args.url else own_server(address)
            began = time.monotonic()
            count = asyncio.run(soak(url, args.sessions, args.interruptions, args.together, args.whole, args.seed, server))
            sentences = all(" " in message for message in count.refused)
            ratio, rise = growth(count.memory), slope(count.memory)
            result = {
                "seconds": round(time.monotonic() - began),
                "sessions": count.sessions,
                "responses": count.statuses,
                "interrupted": count.interrupted,
                "dropped": count.dropped,
                "garbage_frames": count.garbage,
                "refusals": len(count.refused),
                "kinds_of_refusals": sorted({message[:60] for message in count.refused}),
                "refusals_are_sentences": sentences,
                "stuck": len(count.stuck),
                "memory_last_to_first_tenth": round(ratio, 3),
                "memory_mib_a_session": None if rise is None else round(rise, 3),
                "memory_mib": [value >> 20 for value in count.memory[:: max(1, len(count.memory) // 20)]],
            }
            good = not count.stuck and sentences and ratio <= 1.10 and (rise is None or rise <= SLOPE_MIB)
        if not args.url:
            time.sleep(1.0)  # the last goodbyes
            health = json.loads(urllib.request.urlopen(f"http://{address}/health", timeout=10).read())
            good, result["left_open"] = good and health["sessions"] == 0, health["sessions"]
    print(json.dumps(result))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
