"""One visitor's conversation: turns go in, the page's view of them comes out, as often as there is something new to
see."""

from __future__ import annotations

import contextlib
import logging
import queue
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from osum_echat.audio.io import AudioError
from osum_echat.generation.engine import EngineFull
from osum_echat.generation.events import Done, TextDelta, ThinkDelta
from osum_echat.pipeline.ask import Ask, AudioChunk, StreamEvent, ThinkForm
from osum_echat.pipeline.echat import Dialogue
from osum_echat.serving.page.live_sound import LiveSound
from osum_echat.serving.page.menu import OWN, mode_of
from osum_echat.serving.page.messages import Turn
from osum_echat.serving.page.texts import text
from osum_echat.serving.shared import SharedEChat

log = logging.getLogger(__name__)

_REDRAW_SECONDS = 0.08


@dataclass(frozen=True)
class Form:
    """What the visitor sent.

    Attributes:
        mode: name of the menu's entry. think: form of the thought, where the mode thinks.
        voice: a recording to speak like. language: of the page.
    """

    mode: str
    wav: str | None = None
    text: str = ""
    think: ThinkForm = "tag"
    voice: str | None = None
    seed: int = 0
    language: str = "en"


@dataclass
class Conversation:
    """Turns of one visitor by model, and what the models remember of them. The sounds of its replies are files that go
    with it."""

    turns: dict[str, list[Turn]] = field(default_factory=dict)
    dialogues: dict[str, Dialogue] = field(default_factory=dict)
    number: int = 0
    files: tempfile.TemporaryDirectory[str] = field(
        default_factory=lambda: tempfile.TemporaryDirectory(prefix="osum-echat-page-", ignore_cleanup_errors=True), repr=False
    )

    def answer(self, models: Mapping[str, SharedEChat], form: Form, sounds: LiveSound) -> Iterator[str]:
        """Let each of ``models`` answer; yields whenever the view has changed, with the name of the reply's sound once
        it has begun (the first model's; "" before). What comes while a view is drawn is in the next one: a slow drawing
        delays nothing by more than itself."""
        self.number += 1
        turns = {name: Turn(self.number, form.mode, form.wav, form.text) for name in models}
        for name, turn in turns.items():
            self.turns.setdefault(name, []).append(turn)
        came: queue.SimpleQueue[tuple[str, StreamEvent | None]] = queue.SimpleQueue()
        stopped = threading.Event()
        sound, first = "", next(iter(models))

        def run(name: str) -> None:
            try:
                self._run(name, models[name], form, turns[name], came, stopped)
            finally:
                came.put((name, None))

        for name in models:
            threading.Thread(target=run, args=(name,), name=f"page-{name}", daemon=True).start()
        yield ""
        running, drawn = set(models), 0.0
        try:
            while running:
                at_once = False
                for name, event in _waiting(came):
                    if event is None:
                        running.discard(name)
                        at_once = True
                    elif isinstance(event, AudioChunk) and name == first:
                        if not sound:
                            sound, at_once = sounds.new(), True
                        sounds.push(sound, event.samples)
                if at_once or time.monotonic() - drawn > _REDRAW_SECONDS:
                    drawn = time.monotonic()
                    yield sound
        finally:
            stopped.set()
            sounds.end(sound)

    def _run(
        self,
        name: str,
        shared: SharedEChat,
        form: Form,
        turn: Turn,
        came: queue.SimpleQueue[tuple[str, StreamEvent | None]],
        stopped: threading.Event,
    ) -> None:
        try:
            ask = make_ask(form)
            turn.settings = {"think": ask.think, "seed": ask.seed, "own_voice": form.voice is not None}
            events: list[StreamEvent] = []
            began = time.perf_counter()
            first: dict[str, float] = {}
            with closing(shared.stream(ask, self._dialogue(name, shared, ask))) as stream:
                for event in stream:
                    if stopped.is_set():
                        return
                    events.append(event)
                    first.setdefault(type(event).__name__, time.perf_counter() - began)
                    _add(turn, shared, ask, event)
                    came.put((name, event))
            target = Path(self.files.name) / f"{turn.number}-{list(self.turns).index(name)}" / "reply.wav"
            _finish(turn, shared, ask, events, first, time.perf_counter() - began, form.language, target)
        except (ValueError, EngineFull) as error:
            turn.error = sentence(error, form, shared)
        except Exception:
            log.exception("the page could not answer")
            turn.error = text(form.language, "failed")
        finally:
            turn.done = True

    def _dialogue(self, name: str, shared: SharedEChat, ask: Ask) -> Dialogue | None:
        """The past for this turn: for dialogue modes of a checkpoint that has learnt to use it."""
        turns = past_turns(shared)
        if not turns or ask.kind != "chat" or ask.mode.then is not None:
            return None
        if name not in self.dialogues:
            self.dialogues[name] = shared.dialogue(turns)
        return self.dialogues[name]


def _waiting(
    came: queue.SimpleQueue[tuple[str, StreamEvent | None]],
) -> Iterator[tuple[str, StreamEvent | None]]:
    """Everything that is there now, at least one (which is waited for)."""
    yield came.get()
    with contextlib.suppress(queue.Empty):
        while True:
            yield came.get_nowait()


def past_turns(shared: SharedEChat) -> int:
    """Past turns that the checkpoint has learnt to use."""
    learnt = shared.echat.dialect.learnt.past_turns
    return 5 if learnt is None else learnt


def make_ask(form: Form) -> Ask:
    """The request of a form. Raises ValueError, whose text is a key of the page's texts, for what is missing."""
    mode, words = mode_of(form.mode), form.text.strip()
    if mode.hears and not form.wav:
        raise ValueError("need_recording")
    if (mode.reads or form.mode == OWN) and not words:
        raise ValueError("need_text")
    voice = form.voice if mode.speaks else None
    prompt = words if form.mode == OWN else None
    return mode.ask(form.wav, words, prompt=prompt, think=form.think, seed=form.seed, speaker=voice)


def sentence(error: Exception, form: Form, shared: SharedEChat) -> str:
    """An error for the visitor: in the page's language, without paths of the server."""
    if isinstance(error, EngineFull):
        return text(form.language, "full")
    if str(error) in ("need_recording", "need_text"):
        return text(form.language, str(error))
    if isinstance(error, AudioError):
        if error.reason == "too_long":
            learnt = shared.echat.dialect.learnt.seconds or shared.echat.max_seconds
            return text(form.language, "too_long", most=f"{min(learnt, shared.echat.max_seconds):g}")
        return text(form.language, "unreadable")
    message = str(error)
    for path in (form.wav, form.voice):
        if path:
            message = message.replace(path, Path(path).name)
    return text(form.language, "refused", why=message)


def _add(turn: Turn, shared: SharedEChat, ask: Ask, event: StreamEvent) -> None:
    if isinstance(event, ThinkDelta):
        turn.thought += event.text
    elif isinstance(event, TextDelta):
        if turn.think is None and turn.thought:
            turn.think = shared.echat.reply([ThinkDelta(turn.thought), Done("stop")], ask).think
        turn.text = (turn.text + event.text).lstrip()


def _finish(
    turn: Turn,
    shared: SharedEChat,
    ask: Ask,
    events: list[StreamEvent],
    first: Mapping[str, float],
    total: float,
    language: str,
    target: Path,
) -> None:
    reply = shared.echat.reply(events, ask)
    turn.text, turn.think = reply.text, reply.think
    if reply.finish_reason == "silence":
        turn.text = text(language, "nothing_heard")
    turn.details = {**reply.as_json(), "speech_tokens": len(reply.speech_tokens)}
    times = {"first_text": f"{first.get('TextDelta', total):.1f}", "total": f"{total:.1f}"}
    if reply.audio is not None:
        reply.save(target)
        turn.reply_wav = target
        turn.note = text(language, "timing", first_sound=f"{first.get('AudioChunk', total):.1f}", **times)
    else:
        turn.note = text(language, "timing_text", **times)
    turn.details["seconds"] = {name: round(value, 3) for name, value in first.items()} | {"total": round(total, 3)}
    if reply.finish_reason == "length":
        turn.note += " " + text(language, "cut")
