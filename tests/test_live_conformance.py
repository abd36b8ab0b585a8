"""The conformance kit: a right server passes, and for each point there is a wrong server that fails it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import uvicorn

from osum_echat.serving.app import Server, ServerSettings, build_app
from osum_echat.serving.backend import Text
from osum_echat.serving.conformance.client import Target
from osum_echat.serving.conformance.points import POINTS
from osum_echat.serving.conformance.runner import Result, run
from osum_echat.serving.realtime.settings import SessionLimits
from osum_echat.serving.vad import TurnModels
from tests.live_case import FakeBackend, live, tone

SPEECH = np.concatenate([(np.sin(np.arange(24000) / 15) * 0.9)]).astype(np.float32)
Out = Callable[["Wrong", dict[str, Any]], list[dict[str, Any]]]
In = Callable[["Wrong", dict[str, Any]], list[dict[str, Any]]]


@dataclass
class Wrong:
    """What a wrong server does with the events that go out and come in. ``session``: the machine; ``kept``: for what is held back."""

    out: Out = lambda _, event: [event]
    into: In = lambda _, event: [event]
    session: Any = None
    emit: Any = None
    kept: list[dict[str, Any]] = field(default_factory=list)

    def error(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        fault = {"type": "invalid_request_error", "message": "no", "code": "invalid_value", "event_id": event.get("event_id")}
        self.emit(json.dumps({"type": "error", "event_id": "event_x", "error": fault}))
        return []


class WrongServer(Server):
    """A server whose sessions are wrong in one way."""

    wrong: Callable[[], Wrong] = Wrong

    def new_session(self, emit: Any, model: Any, session: Any) -> Any:
        wrong = self.wrong()

        def out(text: str) -> None:
            for event in wrong.out(wrong, json.loads(text)):
                emit(json.dumps(event))

        made = super().new_session(out, model, session)
        wrong.session, wrong.emit = made, emit
        handle = made.handle

        async def into(text: str, arrived: float | None = None) -> None:
            try:
                event = json.loads(text)
            except ValueError:
                return await handle(text, arrived)
            for given in wrong.into(wrong, event):
                await handle(json.dumps(given), arrived)

        made.handle = into  # type: ignore[method-assign]
        return made


@contextlib.asynccontextmanager
async def serving(
    wrong: Callable[[], Wrong] = Wrong, change: Callable[[Any], None] = lambda _: None, size: int = 2**20
) -> AsyncIterator[Target]:
    def script(turn: Any) -> list[Any]:
        return [Text("a long answer"), *[step for _ in range(30) for step in (tone(0.1), 0.03) if turn.speak]]

    limits = SessionLimits(ahead_seconds=1000.0, message_bytes=size, turn_seconds=30.0)
    server = WrongServer(FakeBackend(script), TurnModels.energy(), ServerSettings(limits=limits, think=None, drain_seconds=0.1))
    server.wrong = wrong  # type: ignore[method-assign]
    app = build_app(server)
    change(app)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", ws="websockets-sansio", ws_max_size=size))
    task = asyncio.create_task(running.serve())
    while not running.started:
        await asyncio.sleep(0.01)
    try:
        yield Target(f"ws://127.0.0.1:{port}/v1/realtime", speech=SPEECH, timeout=2.5)
    finally:
        running.should_exit = True
        await task


async def results(target: Target, *only: str) -> list[Result]:
    return [result async for result in run(target, only)]


@live
async def test_a_right_server_passes_every_point() -> None:
    async with serving() as target:
        target.timeout = 60.0  # nothing is missing: a busy machine may take its time
        found = await results(target)
    assert [(r.name, r.why) for r in found if not r.holds] == []
    assert len(found) == len(POINTS) and all(r.about for r in found)


def events_out(kind: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[], Wrong]:
    """Events of one type go out changed; a change that returns a list replaces the event."""

    def out(_: Wrong, event: dict[str, Any]) -> list[dict[str, Any]]:
        if event["type"] != kind:
            return [event]
        made = change(event)
        return made if isinstance(made, list) else [event]

    return lambda: Wrong(out=out)


def events_in(kind: str, change: Callable[[Wrong, dict[str, Any]], Any]) -> Callable[[], Wrong]:
    def into(wrong: Wrong, event: dict[str, Any]) -> list[dict[str, Any]]:
        if event.get("type") != kind:
            return [event]
        made = change(wrong, event)
        return made if isinstance(made, list) else [event]

    return lambda: Wrong(into=into)


def swapped(first: str, second: str) -> Callable[[], Wrong]:
    """``first`` comes right behind ``second``."""

    def out(wrong: Wrong, event: dict[str, Any]) -> list[dict[str, Any]]:
        if event["type"] == first:
            wrong.kept.append(event)
            return []
        if event["type"] == second and wrong.kept:
            return [event, wrong.kept.pop()]
        return [event]

    return lambda: Wrong(out=out)


def dropped_input(*path: str) -> Callable[[Wrong, dict[str, Any]], None]:
    """A field of session.update is not seen."""

    def change(_: Wrong, event: dict[str, Any]) -> None:
        inner = event["session"]
        for name in path[:-1]:
            inner = inner.get(name) or {}
        inner.pop(path[-1], None)

    return change


def shallow(wrong: Wrong, event: dict[str, Any]) -> None:
    given = event["session"].get("audio", {}).get("input", {}).get("turn_detection")
    if given:
        wrong.session.session["audio"]["input"]["turn_detection"] = {"type": "server_vad"}


def late(event: dict[str, Any]) -> list[dict[str, Any]]:
    response = event["response"]
    delta = {"type": "response.output_audio.delta", "event_id": "e", "response_id": response["id"], "item_id": "i"}
    return [event, {**delta, "output_index": 0, "content_index": 0, "delta": "AAAA"}]


def change_error(**fields: Any) -> Callable[[], Wrong]:
    return events_out("error", lambda event: event["error"].update(fields))


def past_the_end(wrong: Wrong, event: dict[str, Any]) -> Any:
    return wrong.error(event) if event["audio_end_ms"] > 1000 else None


def swallow_busy(wrong: Wrong, event: dict[str, Any]) -> Any:
    return [] if wrong.session.busy else None


def no_interruption(wrong: Wrong, event: dict[str, Any]) -> Any:
    off = {"type": "server_vad", "interrupt_response": False}
    return [{"type": "session.update", "session": {"type": "realtime", "audio": {"input": {"turn_detection": off}}}}, event]


def always_interrupt(_: Wrong, event: dict[str, Any]) -> None:
    detection = event["session"].get("audio", {}).get("input", {}).get("turn_detection")
    if detection:
        detection["interrupt_response"] = True


def odd_is_wrong(wrong: Wrong, event: dict[str, Any]) -> Any:
    return wrong.error(event) if len(base64.b64decode(event["audio"])) % 2 else None


def cleared_only(wrong: Wrong, event: dict[str, Any]) -> list[dict[str, Any]]:
    wrong.emit(json.dumps({"type": "input_audio_buffer.cleared", "event_id": "e"}))
    return []


def unknown_is_silent(wrong: Wrong, event: dict[str, Any]) -> list[dict[str, Any]]:
    return []


def error_for_tools(event: dict[str, Any]) -> Any:
    fault = {
        "type": "error",
        "event_id": "e",
        "error": {"type": "invalid_request_error", "message": "tools", "code": "unsupported"},
    }
    return [fault, event] if event["session"].get("tools") else None


def semantic_is_wrong(wrong: Wrong, event: dict[str, Any]) -> Any:
    detection = event["session"].get("audio", {}).get("input", {}).get("turn_detection") or {}
    return wrong.error(event) if detection.get("type") == "semantic_vad" else None


WRONG: dict[str, Callable[[], Wrong]] = {
    "first-event": events_out("session.created", lambda e: e["session"]["audio"]["input"].pop("turn_detection")),
    "update-before-created": swapped("session.created", "session.updated"),
    "deep-merge": events_in("session.update", shallow),
    "detection-off": events_in("session.update", dropped_input("audio", "input", "turn_detection")),
    "semantic-vad": events_in("session.update", semantic_is_wrong),
    "ignored-fields": events_out("session.updated", error_for_tools),
    "order-of-a-turn": swapped("response.created", "response.output_item.added"),
    "one-id-for-a-turn": events_out("input_audio_buffer.speech_stopped", lambda e: e.update(item_id="item_other")),
    "input-transcript": events_out(
        "conversation.item.input_audio_transcription.completed", lambda e: e.update(item_id="item_other")
    ),
    "transcription-off": events_in("session.update", dropped_input("audio", "input", "transcription")),
    "whole-audio": events_out("response.done", lambda e: e["response"]["output"][0]["content"][0].update(transcript="else")),
    "text-only": events_in("session.update", dropped_input("output_modalities")),
    "metadata-echo": events_out("response.created", lambda e: e["response"].update(metadata=None)),
    "telephone": events_in("session.update", dropped_input("audio", "output", "format")),
    "items": events_out("conversation.item.added", lambda e: e.update(previous_item_id=None)),
    "truncate": events_in("conversation.item.truncate", past_the_end),
    "cancel": events_out("response.done", late),
    "barge-in": events_in("input_audio_buffer.append", no_interruption),
    "interrupt-off": events_in("session.update", always_interrupt),
    "cancel-nothing": change_error(message="nothing to cancel"),
    "second-response": events_in("response.create", swallow_busy),
    "empty-commit": change_error(event_id=None),
    "wrong-events": events_in("no.such.event", unknown_is_silent),
    "clear": events_in("input_audio_buffer.clear", cleared_only),
    "odd-bytes": events_in("input_audio_buffer.append", odd_is_wrong),
}


@pytest.mark.parametrize("name", sorted(WRONG))
@live
async def test_a_wrong_server_fails_its_point(name: str) -> None:
    async with serving(WRONG[name]) as target:
        [found] = await results(target, name)
    assert not found.holds and found.why, name


@live
async def test_servers_that_are_wrong_around_the_session_fail_too() -> None:
    def one_path(app: Any) -> None:
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") != "/realtime"]

    async with serving(change=one_path) as target:
        [found] = await results(target, "both-paths")
        assert not found.holds
    from starlette.websockets import WebSocket

    accept = WebSocket.accept
    try:
        WebSocket.accept = lambda self, subprotocol=None, headers=None: accept(self, None, headers)  # type: ignore[method-assign]
        async with serving() as target:
            [found] = await results(target, "subprotocol")
            assert not found.holds
    finally:
        WebSocket.accept = accept  # type: ignore[method-assign]
    async with serving(size=2**27) as target:
        [found] = await results(target, "large-message")
        assert not found.holds


def test_every_point_has_a_wrong_server() -> None:
    assert set(WRONG) | {"both-paths", "subprotocol", "large-message"} == set(POINTS)


@live
async def test_a_frame_that_the_openai_package_rejects_fails_any_point() -> None:
    async with serving(events_out("session.updated", lambda e: e.pop("event_id"))) as target:
        [found] = await results(target, "semantic-vad")
    assert "rejects a frame" in found.why


def test_the_list_of_points_and_an_unknown_one(capsys: pytest.CaptureFixture[str]) -> None:
    from osum_echat.serving.conformance.__main__ import main

    assert main(["--list"]) == 0 and "deep-merge" in capsys.readouterr().out
    assert main(["--only", "nonsense"]) == 2 and "nonsense" in capsys.readouterr().err
