#!/usr/bin/env python3
"""Many sessions with the live server, some rude: does anything stay stuck, does memory grow, is every refusal a sentence?

    python benchmarks/live_soak.py --sessions 500 --interruptions 200      # with mini: long
    python benchmarks/live_soak.py --url ws://127.0.0.1:8000/v1/realtime   # another server (its memory is not seen)
    python benchmarks/live_soak.py --fuzz 10000                            # frames of nonsense

5 % of the sessions are dropped without a goodbye, 2 % of the frames are garbage. Exit code 0 when nothing was stuck, memory of the last tenth is at
most 10 % above that of the first, every refusal was a sentence, and the server still answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import string
import time
import urllib.request
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import psutil
import soxr
from live import SPEECH, appends, serving
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from osum_echat.audio.io import to_mono_16k

KINDS = [
    "session.update",
    "input_audio_buffer.append",
    "input_audio_buffer.commit",
    "input_audio_buffer.clear",
    "conversation.item.create",
    "conversation.item.delete",
    "conversation.item.retrieve",
    "conversation.item.truncate",
    "response.create",
    "response.cancel",
    "no.such",
]
NAMES = [
    "type",
    "session",
    "audio",
    "input",
    "output",
    "format",
    "turn_detection",
    "item",
    "id",
    "content",
    "role",
    "text",
    "response",
    "item_id",
    "event_id",
    "audio_end_ms",
]


@dataclass
class Count:
    sessions: int = 0
    answered: int = 0
    interrupted: int = 0
    dropped: int = 0
    refused: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


def nonsense(dice: random.Random, depth: int = 0) -> Any:
    kind = dice.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return dice.choice([None, True, False, -1, 0, 1e300, 3, "", "audio", "message", "realtime", "AAAA", "server_vad"])
    if kind < 5:
        return "".join(dice.choices(string.printable + "你好\u0000\ud83d", k=dice.randrange(12)))
    if kind < 6:
        return [nonsense(dice, depth + 1) for _ in range(dice.randrange(4))]
    return {dice.choice(NAMES): nonsense(dice, depth + 1) for _ in range(dice.randrange(5))}


def frame(dice: random.Random) -> str | bytes:
    kind = dice.randrange(10)
    if kind == 0:
        return dice.randbytes(dice.randrange(200))
    if kind == 1:
        return "".join(dice.choices(string.printable, k=dice.randrange(200)))
    if kind == 2:
        return "[" * dice.randrange(2000)
    event = nonsense(dice)
    event = event if isinstance(event, dict) else {"item": event}
    return json.dumps({**event, "type": dice.choice(KINDS)}, ensure_ascii=True)


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


async def session(url: str, speech: list[str], interrupt: bool, dice: random.Random, count: Count) -> None:
    count.sessions += 1
    rude = dice.random() < 0.05
    try:
        async with connect(url, max_size=None) as socket:

            async def until(*kinds: str) -> dict[str, Any]:
                while True:
                    event = json.loads(await asyncio.wait_for(socket.recv(), 120))
                    error = (
                        event.get("error") if event["type"] == "error" else (event.get("response") or {}).get("status_details")
                    )
                    if event["type"] == "error" or (error or {}).get("error"):
                        count.refused.append(str((error.get("error") or error).get("message")))  # type: ignore[union-attr]
                    if event["type"] in kinds:
                        return event

            await until("session.created")
            off = {"type": "realtime", "audio": {"input": {"turn_detection": None}}}
            await socket.send(json.dumps({"type": "session.update", "session": off}))
            for message in speech:
                await socket.send(message)
                if dice.random() < 0.02:
                    await socket.send(frame(dice))
            await socket.send(json.dumps({"type": "session.update", "session": off}))
            await socket.send(json.dumps({"type": "input_audio_buffer.commit"}))
            await socket.send(json.dumps({"type": "response.create"}))
            first = await until("response.output_audio.delta", "response.done")
            if rude:
                count.dropped += 1
                socket.transport.abort()
                return
            if interrupt and first["type"] != "response.done":
                await socket.send(json.dumps({"type": "response.cancel"}))
                count.interrupted += 1
            if first["type"] != "response.done":
                await until("response.done")
            count.answered += 1
    except asyncio.TimeoutError:
        count.stuck.append("no event within 120 s")
    except (ConnectionClosed, OSError) as error:
        if not rude:
            count.refused.append(str(error))


async def soak(url: str, sessions: int, interruptions: int, together: int, seed: int, server: psutil.Process | None) -> Count:
    dice, count = random.Random(seed), Count()
    speech = appends(soxr.resample(to_mono_16k(SPEECH), 16000, 24000))
    cut = set(dice.sample(range(sessions), min(interruptions, sessions)))
    room = asyncio.Semaphore(together)

    async def one(number: int) -> None:
        async with room:
            await session(url, speech, number in cut, random.Random(seed + number), count)
            if server is not None:
                count.memory.append(server.memory_info().rss)

    await asyncio.gather(*(one(number) for number in range(sessions)))
    return count


def growth(memory: list[int]) -> float:
    """Memory of the last tenth by that of the first full tenth behind the start."""
    tenth = max(1, len(memory) // 10)
    return statistics.mean(memory[-tenth:]) / statistics.mean(memory[tenth : 2 * tenth]) if len(memory) >= 20 else 1.0


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
            count = asyncio.run(soak(url, args.sessions, args.interruptions, args.together, args.seed, server))
            sentences = all(" " in message for message in count.refused)
            ratio = growth(count.memory)
            result = {
                "sessions": count.sessions,
                "answered": count.answered,
                "interrupted": count.interrupted,
                "dropped": count.dropped,
                "refusals": len(count.refused),
                "refusals_are_sentences": sentences,
                "stuck": len(count.stuck),
                "memory_last_to_first_tenth": round(ratio, 3),
                "memory_mib": round(max(count.memory, default=0) / 2**20),
            }
            good = not count.stuck and sentences and ratio <= 1.10
        if not args.url:
            time.sleep(1.0)  # the last goodbyes
            health = json.loads(urllib.request.urlopen(f"http://{address}/health", timeout=10).read())
            good, result["left_open"] = good and health["sessions"] == 0, health["sessions"]
    print(json.dumps(result))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
