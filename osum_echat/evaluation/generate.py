"""Step one: ask a loaded model everything that a suite asks, in batches, and write `results.Result`s.

A run that was stopped goes on: what stands in the results file is not asked again. An item that spoils its batch (a recording that is no
audio) is asked alone and becomes a result with ``error``; the rest goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from osum_echat import device as devices
from osum_echat.evaluation.items import Item
from osum_echat.evaluation.labels import KINDS, canonical, read_label
from osum_echat.evaluation.results import FILE, Lines, Result
from osum_echat.evaluation.suite import Part, Suite
from osum_echat.generation.events import Done, SpeechToken, TextDelta
from osum_echat.pipeline import Ask, AudioChunk, EChat, Reply

Progress = Callable[[str], None]


def quiet(_: str) -> None:
    """A progress that says nothing."""


def ask_of(item: Item, part: Part, suite: Suite) -> Ask:
    """What is asked about an item. Raises ItemError when it lacks what the question needs."""
    fields = dict(part.ask)
    if isinstance(fields.get("prompt"), str):
        fields["prompt"] = fields["prompt"].replace("{text}", item.text)
    says = fields.get("kind") == "speak"
    if says or part.written or (item.wav is None and fields.get("kind", "chat") == "chat"):
        fields["text"] = item.text
        fields.pop("think", None)
    else:
        fields["wav"] = item.recording()
    if item.prompt_wav is not None:
        fields["speaker"] = item.prompt_wav
    return Ask(**fields, seed=suite.seed, greedy=suite.greedy)


def generate(
    echat: EChat,
    suite: Suite,
    sets: Mapping[str, Sequence[Item]],
    out: Path,
    progress: Progress = quiet,
    share: tuple[int, int] = (0, 1),
) -> Path:
    """Ask all parts that have items of their own (`Part.same_as` takes another's); returns the results file.

    Args:
        sets: items of each part.
        share: (i, n): only every n-th item from the i-th on, into ``results.IofN.jsonl``.
    """
    number, of = share
    path = out / (FILE if of == 1 else f"results.{number}of{of}.jsonl")
    lines = Lines(path)
    done = {(row["part"], row["id"]) for row in lines.rows()}
    with lines:
        for name, part in suite.parts.items():
            if part.same_as:
                continue
            mine = [item for at, item in enumerate(sets.get(name, ())) if at % of == number]
            todo = [item for item in mine if (name, item.id) not in done]
            alike = _alike(todo)
            count = len(mine) - len(todo)
            for result in _answers(echat, suite, part, [items[0] for items in alike.values()], _Writer(out, suite.name, name)):
                for item in alike[result.id]:
                    lines.write({**result.to_dict(), "id": item.id})
                    count += 1
                progress(f"{suite.name}, {name}: {count}/{len(mine)}")
    return path


def _alike(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Items that ask the very same (an empathy item for each label of one recording), by the first one's id: they are asked once."""
    first: dict[tuple[object, ...], str] = {}
    out: dict[str, list[Item]] = {}
    for item in items:
        sound = id(item.wav) if isinstance(item.wav, bytes) else item.wav
        key = (sound, item.start, item.end, item.prompt_wav, item.text)
        out.setdefault(first.setdefault(key, item.id), []).append(item)
    return out


class _Writer:
    """Makes results of replies, and files of their sound."""

    def __init__(self, out: Path, suite: str, part: str) -> None:
        self.out, self.suite, self.part = out, suite, part

    def failed(self, item: Item, error: Exception) -> Result:
        return Result(item.id, self.part, self.suite, error=str(error))

    def result(self, item: Item, reply: Reply, seconds: float) -> Result:
        wav = None
        if reply.audio is not None and len(reply.audio):
            wav = f"wav/{quote(self.part, safe='')}/{quote(item.id, safe='')[:150]}.wav"
            reply.save(self.out / wav)
        think = {} if reply.think is None else {k: v for k, v in asdict(reply.think).items() if v is not None}
        return Result(
            item.id,
            self.part,
            self.suite,
            reply.text,
            think,
            {kind: canonical(kind, think[kind]) for kind in KINDS if think.get(kind)},
            wav,
            {name: value if value is None else round(value, 4) for name, value in asdict(reply.timings).items()},
            reply.finish_reason,
            dict(reply.guards),
            list(reply.speech_tokens),
            round(seconds, 4),
        )


def _answers(echat: EChat, suite: Suite, part: Part, items: Sequence[Item], writer: _Writer) -> Iterator[Result]:
    if part.stream:
        yield from _one_by_one(echat, suite, part, items, writer)
        return
    for start in range(0, len(items), suite.batch_size):
        for result, reply in _batch(echat, suite, part, items[start : start + suite.batch_size], writer):
            if part.listen and reply is not None and reply.audio is not None and len(reply.audio):
                result.heard_emotion = _emotion(echat, part.listen, reply)
            yield result


def _batch(
    echat: EChat, suite: Suite, part: Part, items: Sequence[Item], writer: _Writer
) -> Iterator[tuple[Result, Reply | None]]:
    asks: list[tuple[Item, Ask]] = []
    failed: dict[str, Exception] = {}
    for item in items:
        try:
            asks.append((item, ask_of(item, part, suite)))
        except ValueError as error:
            failed[item.id] = error
    began = time.perf_counter()
    replies: list[Reply | ValueError]
    try:
        replies = list(echat.batch([ask for _, ask in asks], size=max(len(asks), 1)))
    except ValueError:  # one of them spoils the batch: each alone
        replies = [_alone(echat, ask) for _, ask in asks]
    each = (time.perf_counter() - began) / max(len(asks), 1)
    answered = {item.id: reply for (item, _), reply in zip(asks, replies, strict=True)}
    for item in items:
        reply = answered.get(item.id)
        if reply is None or isinstance(reply, ValueError):
            yield writer.failed(item, reply if reply is not None else failed[item.id]), None
        else:
            yield writer.result(item, reply, each), reply


def _alone(echat: EChat, ask: Ask) -> Reply | ValueError:
    try:
        return echat.batch([ask], size=1)[0]
    except ValueError as error:
        return error


def _emotion(echat: EChat, task: str, reply: Reply) -> str | None:
    assert reply.audio is not None
    try:
        heard = echat.batch([Ask(wav=(reply.audio, reply.sample_rate), kind="understand", task=task)], size=1)[0]
    except ValueError:  # too short a sound to be heard
        return None
    return read_label("emotion", heard.text)


def _one_by_one(echat: EChat, suite: Suite, part: Part, items: Sequence[Item], writer: _Writer) -> Iterator[Result]:
    """Streamed, with the times at which things came. The first item is asked once before, unrecorded: it pays for what is made on first use."""
    warm = False
    for item in items:
        try:
            ask = ask_of(item, part, suite)
            if not warm:
                _timed(echat, ask)
                warm = True
            reply, times = _timed(echat, ask)
        except ValueError as error:
            yield writer.failed(item, error)
            continue
        result = writer.result(item, reply, times["total"])
        result.timings |= times
        yield result


_FIRST = {TextDelta: "first_text", SpeechToken: "first_speech", AudioChunk: "first_audio"}


def _timed(echat: EChat, ask: Ask) -> tuple[Reply, dict[str, Any]]:
    """The reply of a streamed request and wall-clock seconds until its parts came, as a caller sees them."""
    times: dict[str, Any] = {}
    events = []
    began = time.perf_counter()
    for event in echat.stream_ask(ask):
        kind = _FIRST.get(type(event))
        if kind is not None:
            times.setdefault(kind, round(time.perf_counter() - began, 4))
        events.append(event)
    times["total"] = round(time.perf_counter() - began, 4)
    sound = sum(len(event.samples) / event.rate for event in events if isinstance(event, AudioChunk))
    times |= {"audio_seconds": round(sound, 4), "memory_mb": round(_memory_mb(echat), 1)}
    times["tokens"] = sum(len(event.generated) for event in events if isinstance(event, Done))
    return echat.reply(events, ask), times


def _memory_mb(echat: EChat) -> float:
    """Resident memory of this process, or what the accelerator's allocator has held at most."""
    import psutil

    device = echat.model.device
    held = psutil.Process().memory_info().rss if device.type == "cpu" else devices.peak_memory(device)
    return held / 2**20
