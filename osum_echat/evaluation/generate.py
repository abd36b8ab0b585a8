"""Step one: ask a loaded model everything that a suite asks, in batches, and write `results.Result`s.

A run that was stopped goes on: what stands in the results file is not asked again. An item that spoils its batch (a
recording that is no audio) is asked alone and becomes a result with ``error``; the rest goes on.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
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
from osum_echat.pipeline.parts import is_refusal

Progress = Callable[[str], None]


def quiet(_: str) -> None:
    """A progress that says nothing."""


def ask_of(item: Item, part: Part, suite: Suite) -> Ask:
    """What is asked about an item. Raises ItemError when it lacks what the question needs."""
    asked = dict(part.ask)
    if isinstance(asked.get("prompt"), str):
        asked["prompt"] = asked["prompt"].replace("{text}", item.text)
    says = asked.get("kind") == "speak"
    if says or part.written or (item.wav is None and asked.get("kind", "chat") == "chat"):
        asked["text"] = item.text
        asked.pop("think", None)
    else:
        asked["wav"] = item.recording()
    if item.prompt_wav is not None:
        asked["speaker"] = item.prompt_wav
    return Ask(**asked, seed=suite.seed, greedy=suite.greedy)


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
        share: (i, n): only every n-th item from the i-th on, into ``results.IofN.jsonl``; what stands in the whole file
            is not asked again.
    """
    number, of = share
    path = out / (FILE if of == 1 else f"results.{number}of{of}.jsonl")
    lines = Lines(path)
    done = {(row["part"], row["id"]) for known in {path, out / FILE} for row in Lines(known).rows()}
    with lines:
        for name, part in suite.parts.items():
            if part.same_as:
                continue
            mine = _share(sets.get(name, ()), number, of)
            todo = [item for item in mine if (name, item.id) not in done]
            alike = _alike([item for item in todo if not _in_conversation(item, part)])
            count = len(mine) - len(todo)
            writer = _Writer(out, suite.name, name)
            for result in itertools.chain(
                _answers(echat, suite, part, [items[0] for items in alike.values()], writer),
                _conversations(echat, suite, part, mine, {item.id for item in todo}, writer),
            ):
                for id in [item.id for item in alike.get(result.id, ())] or [result.id]:
                    lines.write({**result.to_dict(), "id": id})
                    count += 1
                progress(f"{suite.name}, {name}: {count}/{len(mine)}")
    return path


def _share(items: Sequence[Item], number: int, of: int) -> list[Item]:
    """Every n-th item; the turns of a conversation stay together."""
    places: dict[str, int] = {}
    return [item for item in items if places.setdefault(item.dialogue_id or f"/{item.id}", len(places)) % of == number]


def _alike(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Items that ask the very same (an empathy item for each label of one recording), by the first one's id: they are
    asked once."""
    first: dict[tuple[object, ...], str] = {}
    out: dict[str, list[Item]] = {}
    for item in items:
        out.setdefault(first.setdefault(question_of(item), item.id), []).append(item)
    return out


def question_of(item: Item) -> tuple[object, ...]:
    """What two items share that ask the very same."""
    return (id(item.wav) if isinstance(item.wav, bytes) else item.wav, item.start, item.end, item.prompt_wav, item.text)


class _Writer:
    """Makes results of replies, and files of their sound."""

    def __init__(self, out: Path, suite: str, part: str) -> None:
        self.out, self.suite, self.part = out, suite, part

    def failed(self, item: Item, error: Exception, refused: bool = False) -> Result:
        """``refused``: whatever the error is, the item counts as one that the checkpoint refused."""
        return Result(item.id, self.part, self.suite, error=str(error), refused=refused or is_refusal(error))

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
            yield _listened(echat, part, result, reply)


def _batch(
    echat: EChat, suite: Suite, part: Part, items: Sequence[Item], writer: _Writer
) -> Iterator[tuple[Result, Reply | None]]:
    asks: list[tuple[Item, Ask]] = []
    failed: dict[str, Result] = {}
    for item in items:
        try:
            asks.append((item, ask_of(item, part, suite)))
        except ValueError as error:
            failed[item.id] = writer.failed(item, error)
    began = time.perf_counter()
    replies: list[Reply | ValueError]
    try:
        replies = list(echat.batch([ask for _, ask in asks], size=max(len(asks), 1)))
    except ValueError:  # one of them spoils the batch: each alone
        replies = [_alone(echat, ask) for _, ask in asks]
    each = (time.perf_counter() - began) / max(len(asks), 1)
    answered: dict[str, Reply] = {}
    for (item, _), reply in zip(asks, replies, strict=True):
        if isinstance(reply, ValueError):
            failed[item.id] = writer.failed(item, reply)
        else:
            answered[item.id] = reply
    for item in items:
        if item.id in failed:
            yield failed[item.id], None
        else:
            yield writer.result(item, answered[item.id], each), answered[item.id]


def _alone(echat: EChat, ask: Ask) -> Reply | ValueError:
    try:
        return echat.batch([ask], size=1)[0]
    except ValueError as error:
        return error


def _in_conversation(item: Item, part: Part) -> bool:
    return bool(item.dialogue_id) and part.ask.get("kind", "chat") == "chat" and not part.stream


def _conversations(
    echat: EChat, suite: Suite, part: Part, items: Sequence[Item], wanted: set[str], writer: _Writer
) -> Iterator[Result]:
    """Each conversation turn after turn, in a session that remembers the system's own answers. Of one that was stopped
    in the middle the answered turns are asked again (the same seed gives the same answers), so that the next ones find
    them, and not written again.

    A turn that fails (a checkpoint that takes no past turns refuses the second) fails those behind it, each with the
    reason; they are refused where it was.
    """
    turns: dict[str, list[Item]] = {}
    for item in items:
        if _in_conversation(item, part):
            turns.setdefault(item.dialogue_id, []).append(item)
    for some in turns.values():
        some.sort(key=lambda item: item.turn)
        while some and some[-1].id not in wanted:
            some.pop()
        if not some:
            continue
        session, broken, refused = echat.session(), "", False
        for place, item in enumerate(some, start=1):
            began = time.perf_counter()
            try:
                if broken or item.turn != place:
                    raise ValueError(broken or f"turn {place} of conversation {item.dialogue_id!r} is not among the items")
                ask = ask_of(item, part, suite)
                reply = session.chat(**{field.name: getattr(ask, field.name) for field in fields(ask) if field.init})
            except ValueError as error:
                broken = broken or f"turn {item.turn} of conversation {item.dialogue_id!r} was not answered: {error}"
                refused = refused or is_refusal(error)
                result = writer.failed(item, error, refused)
            else:
                if item.id not in wanted:
                    continue
                result = _listened(echat, part, writer.result(item, reply, time.perf_counter() - began), reply)
            if item.id in wanted:
                yield result


def _listened(echat: EChat, part: Part, result: Result, reply: Reply | None) -> Result:
    """The result with the emotion that the system hears in its own reply, where the part wants it."""
    if part.listen and reply is not None and reply.audio is not None and len(reply.audio):
        result.heard_emotion = _emotion(echat, part.listen, reply)
    return result


def _emotion(echat: EChat, task: str, reply: Reply) -> str | None:
    assert reply.audio is not None
    try:
        heard = echat.batch([Ask(wav=(reply.audio, reply.sample_rate), kind="understand", task=task)], size=1)[0]
    except ValueError:  # too short a sound to be heard
        return None
    return read_label("emotion", heard.text)


def _one_by_one(echat: EChat, suite: Suite, part: Part, items: Sequence[Item], writer: _Writer) -> Iterator[Result]:
    """Streamed, with the times at which things came. The first item is asked once before, unrecorded: it pays for what
    is made on first use."""
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
