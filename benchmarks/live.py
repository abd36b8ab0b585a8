#!/usr/bin/env python3
"""The live server with mini, measured from outside: time to first sound, time to stop, gaps, and what a session costs.

    python benchmarks/live.py                    # starts a server of its own; some minutes
    python benchmarks/live.py --quick --json     # one round of each; one JSON object
    python benchmarks/live.py --pool             # only the pool of voices, without a server
    python benchmarks/live.py --stops            # only the stop times
    python benchmarks/live.py --out live.json    # written after each case, so that a run that is cut short leaves what it has found

First sound is counted from the moment the turn is committed (push to talk, so that no silence is in it) to the first delta of sound, by the client's
clock, for each form of thought, with 1, 4 and 16 sessions that speak at the same moment; the silences inside their answers are counted by the
server. Stop time is counted from the message that completes the confirmed speech to `response.done`, or to `speech_started` where all of the answer has
been sent and is being played. The time that turn detection takes is shown apart.
What a session costs in the pool of voices is its time, with one worker and with one a core, and its processor time. Numbers of one run belong
together; machines differ.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import re
import statistics
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import missing_package  # noqa: F401 - first: it says what is missing
import numpy as np
import soxr
from common import serving
from websockets.asyncio.client import connect

from osum_echat.audio.io import to_mono_16k

ROOT = Path(__file__).resolve().parents[1]
SPEECH = ROOT / "assets" / "demo" / "1_adult_male_happy.ogg"
PIECE = 2400  # samples: 100 ms


def appends(samples: np.ndarray) -> list[str]:
    data = (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()
    pieces = [base64.b64encode(data[i : i + PIECE * 2]).decode() for i in range(0, len(data), PIECE * 2)]
    return [json.dumps({"type": "input_audio_buffer.append", "audio": piece}) for piece in pieces]


class Talker:
    """One client."""

    def __init__(self, address: str, speech: np.ndarray) -> None:
        self.url, self.speech = f"ws://{address}/v1/realtime", speech

    async def open(self, think: str | None, detection: dict[str, Any] | None) -> None:
        self.socket = await connect(self.url, max_size=None)
        session = {
            "type": "realtime",
            "audio": {"input": {"turn_detection": detection, "transcription": None}},
            "x_echat": {"think": think},
        }
        await self.socket.send(json.dumps({"type": "session.update", "session": session}))
        await self.until("session.updated")

    async def until(self, *kinds: str) -> dict[str, Any]:
        while True:
            event: dict[str, Any] = json.loads(await asyncio.wait_for(self.socket.recv(), 120))
            if event["type"] == "error":
                raise RuntimeError(event["error"]["message"])
            if event["type"] in kinds:
                return event

    async def turn(self, start: asyncio.Event) -> float:
        """A turn by push to talk; seconds from its commit to the first sound. The rest is heard too."""
        for message in appends(self.speech):
            await self.socket.send(message)
        await start.wait()
        began = time.perf_counter()
        await self.socket.send(json.dumps({"type": "input_audio_buffer.commit"}))
        await self.socket.send(json.dumps({"type": "response.create"}))
        await self.until("response.output_audio.delta")
        first = time.perf_counter() - began
        await self.until("response.done")
        return first

    async def interruption(self, at_once: bool) -> tuple[float, bool]:
        """Speak over an answer, from its first sound or (``at_once``) from when it is asked for.

        Returns seconds from the message that completes what confirms the speech to the moment at which nothing more is said, and whether the answer
        was still being made. Then that moment is the end of the response, else (all of it had been sent, and was being played) the event at which
        clients stop playing.
        """
        for message in appends(self.speech):
            await self.socket.send(message)
        await self.socket.send(json.dumps({"type": "input_audio_buffer.commit"}))
        await self.socket.send(json.dumps({"type": "response.create"}))
        await self.until("response.created" if at_once else "response.output_audio.delta")
        sent: list[float] = []

        async def speak() -> None:
            for message in appends(self.speech):
                sent.append(time.perf_counter())
                await self.socket.send(message)
                await asyncio.sleep(PIECE / 24000)

        speaking = asyncio.create_task(speak())
        first = await self.until("input_audio_buffer.speech_started", "response.done")
        in_progress = first["type"] == "input_audio_buffer.speech_started"
        if in_progress:
            done = await self.until("response.done")
            assert done["response"]["status"] == "cancelled", done
        else:
            await self.until("input_audio_buffer.speech_started")
        ended = time.perf_counter()
        speaking.cancel()
        return ended - sent[-1], in_progress

    async def close(self) -> None:
        await self.socket.close()


async def first_sounds(address: str, speech: np.ndarray, think: str | None, sessions: int, rounds: int) -> list[float]:
    talkers = [Talker(address, speech) for _ in range(sessions)]
    for talker in talkers:
        await talker.open(think, None)
    found: list[float] = []
    for _ in range(rounds):
        start = asyncio.Event()
        turns = [asyncio.create_task(talker.turn(start)) for talker in talkers]
        await asyncio.sleep(0.5)
        start.set()
        found += await asyncio.gather(*turns)
        await asyncio.sleep(0.3)
    for talker in talkers:
        await talker.close()
    return found


async def stops(address: str, speech: np.ndarray, count: int) -> list[tuple[float, bool]]:
    found = []
    for number in range(count):
        talker = Talker(address, speech)
        await talker.open(None, {"type": "server_vad", "create_response": False})
        found.append(await talker.interruption(at_once=number % 2 == 0))
        await talker.close()
    return found


def metric(address: str, name: str) -> float:
    text = urllib.request.urlopen(f"http://{address}/metrics", timeout=5).read().decode()
    return sum(float(v) for v in re.findall(rf"^osum_echat_{name}(?:{{[^}}]*}})? (\S+)$", text, re.M))


def pool_cost(counts: Sequence[int], workers: int, seconds: float = 4.0) -> dict[str, Any]:
    """For so many replies of ``seconds`` each, spoken at the same time by one pool: seconds by the clock and of the processor, and the ratios."""
    from osum_echat.pipeline import EChat
    from osum_echat.token2wav.pool import StreamPool

    echat = EChat.load(ROOT / "checkpoints" / "mini", device="cpu")
    assert echat.token2wav is not None and echat.voice is not None
    codes = list(echat.chat(str(SPEECH), speak=True).speech_tokens) * 4
    clock: dict[int, float] = {}
    processor: dict[int, float] = {}
    for count in counts:
        for _ in range(2):
            pool = StreamPool(echat.token2wav, workers=workers)
            voices = [pool.open(echat.voice, seed, lambda _: None) for seed in range(count)]
            for voice in voices:
                voice.push(codes[: round(seconds * 25)])
                voice.finish()
            began, used = time.perf_counter(), time.process_time()
            while pool.work():
                pass
            clock[count] = min(clock.get(count, float("inf")), time.perf_counter() - began)
            processor[count] = min(processor.get(count, float("inf")), time.process_time() - used)
            pool.close()
    return {
        "workers": workers,
        "seconds": {str(count): round(value, 3) for count, value in clock.items()},
        "processor_seconds": {str(count): round(value, 3) for count, value in processor.items()},
        "by_the_first": {str(count): round(value / clock[counts[0]], 2) for count, value in clock.items()},
        "processor_by_the_first": {str(count): round(value / processor[counts[0]], 2) for count, value in processor.items()},
    }


def turn_detection() -> dict[str, float]:
    """Milliseconds of the two networks: for 32 ms of sound, and for a pause."""
    from osum_echat.serving.vad import FRAME, TurnModels

    found, speech = TurnModels.load(), to_mono_16k(SPEECH)
    vad, frames = found.new_vad(), [speech[i : i + FRAME] for i in range(0, len(speech) - FRAME, FRAME)]
    began = time.perf_counter()
    for frame in frames:
        vad(frame)
    per_frame = (time.perf_counter() - began) / len(frames) * 1000
    assert found.end_of_turn is not None
    times = []
    for _ in range(8):
        began = time.perf_counter()
        found.end_of_turn(speech)
        times.append((time.perf_counter() - began) * 1000)
    return {"vad_ms_per_32ms": round(per_frame, 3), "end_of_turn_ms": round(statistics.median(times), 1)}


def spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50": round(statistics.median(ordered), 3),
        "p95": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))], 3),
    }


async def measure(
    address: str, rounds: int, quick: bool, only_stops: bool, result: dict[str, Any], keep: Callable[[], None]
) -> None:
    """Into ``result``; ``keep`` is called after each case."""
    speech = soxr.resample(to_mono_16k(SPEECH), 16000, 24000)
    await first_sounds(address, speech, None, 1, 2)  # warm
    if not only_stops:
        await measure_first_sounds(address, speech, rounds, quick, result, keep)
    stopped = await stops(address, speech, 5 if quick else 6 * rounds)
    result["stop"] = spread([seconds for seconds, _ in stopped])
    result["stop_in_progress"] = {
        "interruptions": len(stopped),
        "while_being_made": sum(in_progress for _, in_progress in stopped),
    }
    result["stop_inside"] = round(
        metric(address, "barge_in_stop_seconds_sum") / max(metric(address, "barge_in_stop_seconds_count"), 1), 4
    )
    keep()


async def measure_first_sounds(
    address: str, speech: np.ndarray, rounds: int, quick: bool, result: dict[str, Any], keep: Callable[[], None]
) -> None:
    result |= {"first_sound": {}, "server_first_sound": {}, "gaps": {}}
    inside = ("time_to_first_audio_seconds_sum", "time_to_first_audio_seconds_count")
    for think in (None, "tag", "language"):
        for sessions in (1,) if quick and think else (1, 4, 16):
            before = [metric(address, name) for name in (*inside, "audio_gaps_total", "audio_gap_seconds_total")]
            found = await first_sounds(address, speech, think, sessions, rounds * (4 if sessions == 1 else 1))
            after = [metric(address, name) for name in (*inside, "audio_gaps_total", "audio_gap_seconds_total")]
            total, count, gaps, seconds = (b - a for a, b in zip(before, after, strict=True))
            case = f"{think or 'no thought'}, {sessions}"
            result["first_sound"][case] = spread(found)
            result["server_first_sound"][case] = round(total / max(count, 1), 3)
            result["gaps"][case] = {"answers": len(found), "gaps": round(gaps), "seconds": round(seconds, 2)}
            keep()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of the server's language model (default: 1)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each kind (4 times as many of one session; default: 3)")
    parser.add_argument("--quick", action="store_true", help="one round, thoughts with one session only")
    parser.add_argument("--pool", action="store_true", help="only the pool of voices, without a server")
    parser.add_argument("--stops", action="store_true", help="only the stop times")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="file for the JSON object")
    args = parser.parse_args()
    import torch

    from osum_echat.device import cpu

    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {
        "cpus": os.cpu_count(),
        "machine": cpu.summary(),
        "load": os.getloadavg()[0],
    }

    def keep() -> None:
        if args.out:
            args.out.write_text(json.dumps(result, indent=2) + "\n")

    if not args.pool:
        with serving(args.threads) as address:
            asyncio.run(measure(address, 1 if args.quick else args.rounds, args.quick, args.stops, result, keep))
    if not args.stops:
        result["turn_detection"] = turn_detection()
        result["voices"] = []
        for workers in sorted({1, os.cpu_count() or 1}):
            result["voices"].append(pool_cost((1, 4, 16), workers))
            keep()
    print(json.dumps(result) if args.json else json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
