"""A session of the Realtime API with a model that says what it is given: settings, pace, limits, faults."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from osum_echat.serving.backend import Ended, Refused, Text
from osum_echat.serving.realtime import tasks
from osum_echat.serving.realtime.settings import SessionLimits
from tests.live_case import (
    CREATE,
    PTT,
    Client,
    Clock,
    FakeBackend,
    live,
    said,
    slow_answer,
    spoken,
    tone,
    update,
)


@live
async def test_the_first_event_is_a_whole_session() -> None:
    client = Client()
    created = client.sent[0]
    assert created["type"] == "session.created"
    session = created["session"]
    assert session["type"] == "realtime" and session["id"].startswith("sess_") and session["output_modalities"] == ["audio"]
    detection = session["audio"]["input"]["turn_detection"]
    assert detection["type"] == "server_vad" and detection["interrupt_response"] is True and detection["create_response"] is True
    assert session["audio"]["input"]["format"] == {"type": "audio/pcm", "rate": 24000}
    assert session["audio"]["input"]["transcription"], "transcription is on by default"


@live
async def test_partial_updates_are_merged_to_any_depth_and_answered_with_the_whole_session() -> None:
    client = Client()
    await client.send(
        update(audio={"input": {"turn_detection": {"type": "server_vad", "threshold": 0.3}}}, instructions="be kind")
    )
    await client.send(update(audio={"input": {"turn_detection": {"silence_duration_ms": 700}}, "output": {"voice": "marin"}}))
    session = client.last()["session"]
    assert client.last()["type"] == "session.updated"
    detection = session["audio"]["input"]["turn_detection"]
    assert (detection["type"], detection["threshold"], detection["silence_duration_ms"]) == ("server_vad", 0.3, 700)
    assert detection["interrupt_response"] is True
    assert session["instructions"] == "be kind" and session["audio"]["output"]["voice"] == "marin"
    assert session["audio"]["input"]["transcription"] and session["audio"]["input"]["format"]["rate"] == 24000
    assert client.session.turns.rules.threshold == 0.3 and client.session.turns.rules.silence_ms == 700


@live
async def test_another_kind_of_turn_detection_gets_its_own_defaults_and_null_switches_off() -> None:
    client = Client()
    await client.send(update(audio={"input": {"turn_detection": {"type": "semantic_vad", "eagerness": "high"}}}))
    detection = client.last()["session"]["audio"]["input"]["turn_detection"]
    assert detection == {"type": "semantic_vad", "eagerness": "high", "create_response": True, "interrupt_response": True}
    await client.send(PTT)
    assert client.last()["session"]["audio"]["input"]["turn_detection"] is None and client.session.turns.rules.mode == "none"
    await client.send(update(audio={"input": {"turn_detection": {"type": "server_vad"}, "transcription": None}}))
    audio = client.last()["session"]["audio"]["input"]
    assert audio["turn_detection"]["silence_duration_ms"] == 500 and audio["transcription"] is None


@live
async def test_what_is_not_supported_is_accepted_and_echoed_and_said_once() -> None:
    client = Client()
    odd = {
        "tools": [{"type": "function", "name": "weather", "parameters": {}}],
        "tool_choice": "required",
        "tracing": "auto",
        "truncation": {"type": "retention_ratio", "retention_ratio": 0.5},
        "prompt": {"id": "p"},
        "reasoning": {"effort": "low"},
        "include": ["item.input_audio_transcription.logprobs"],
        "a_key_of_tomorrow": 3,
        "x_echat": {"events": True},
    }
    await client.send(
        update(model="gpt-realtime", **odd), update(instructions="speak like a pirate"), update(instructions="again")
    )
    assert not client.all("error")
    session = client.all("session.updated")[-1]["session"]
    assert session["tools"] == odd["tools"] and session["a_key_of_tomorrow"] == 3 and session["model"] == "gpt-realtime"
    warnings = client.all("x_echat.warning")
    assert sorted(w["field"] for w in warnings) == ["instructions", "tools"], "each once"


@live
async def test_own_events_are_sent_only_to_those_who_asked() -> None:
    quiet, asking = Client(think="tag"), Client(think="tag")
    await asking.send(update(x_echat={"events": True}))
    for client in (quiet, asking):
        await client.send(*spoken())
        await client.until("response.done")
    assert not [e for e in quiet.sent if e["type"].startswith("x_echat")]
    assert {"x_echat.thought.delta", "x_echat.thought.done", "x_echat.speech_suspected"} <= {e["type"] for e in asking.sent}


@pytest.mark.parametrize(
    ("session", "param"),
    [
        ({"audio": {"input": {"format": {"type": "audio/opus"}}}}, "session.audio.input.format.type"),
        ({"audio": {"input": {"turn_detection": {"type": "psychic"}}}}, "session.audio.input.turn_detection.type"),
        ({"audio": {"input": {"turn_detection": {"type": "server_vad", "threshold": 7}}}}, "session.audio.input.turn_detection"),
        ({"output_modalities": ["smell"]}, "session.output_modalities.0"),
        ({"output_modalities": []}, "session.output_modalities"),
        ({"audio": {"input": 3}}, None),
        ({"audio": None}, None),
        ({"x_echat": {"think": "deep"}}, "session.x_echat.think"),
        ({"x_echat": None}, "session.x_echat.think"),
    ],
)
@live
async def test_a_wrong_update_changes_nothing_and_names_the_field(session: dict[str, Any], param: str | None) -> None:
    client = Client()
    before = client.session.session
    await client.send({"type": "session.update", "event_id": "e7", "session": {"type": "realtime", **session}})
    error = client.last()["error"]
    assert client.last()["type"] == "error" and error["event_id"] == "e7" and error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param
    assert client.session.session == before


# ---- pace, limits, faults ------------------------------------------------------------------------------------------------------------


@live
async def test_sound_stays_close_to_what_was_played_and_the_model_is_asked_to_pause() -> None:
    clock = Clock()
    backend = FakeBackend(lambda _: [Text("long"), *[tone(1.0) for _ in range(9)]])
    client = Client(backend, limits=SessionLimits(ahead_seconds=2.0), clock=clock)
    await client.send(said("talk"), CREATE)
    await asyncio.sleep(0.3)
    assert 2.0 <= client.session._answers.active.playback.sent <= 2.2
    assert backend.jobs[0].paused == [True]
    clock.now = 2.0
    await asyncio.sleep(0.7)
    assert client.session._answers.active.playback.sent == pytest.approx(4.0, abs=0.2)
    while client.session.busy:
        clock.now += 1.0
        await asyncio.sleep(0.05)
    assert backend.jobs[0].paused == [True, False]


@live
async def test_a_refusal_of_the_model_is_a_failed_response_with_a_sentence() -> None:
    backend = FakeBackend()
    backend.refuse = Refused("the server is full; try again in a moment")
    client = Client(backend)
    await client.send(*spoken())
    done = await client.until("response.done")
    assert done["response"]["status"] == "failed" and "full" in done["response"]["status_details"]["error"]["message"]
    backend.refuse = None
    await client.send(CREATE)
    assert (await client.until("response.done", 2))["response"]["status"] == "completed"


@pytest.mark.parametrize(
    ("reason", "status", "detail"),
    [("length", "incomplete", "max_output_tokens"), ("failed", "failed", None), ("stop", "completed", None)],
)
@live
async def test_how_the_model_ended_is_how_the_response_ends(reason: Any, status: str, detail: str | None) -> None:
    client = Client(FakeBackend(lambda _: [Text("a"), Ended(reason, message="out of memory")]))
    await client.send(said("x"), CREATE)
    response = (await client.until("response.done"))["response"]
    assert response["status"] == status and (response["status_details"] or {}).get("reason") == detail


@live
async def test_a_model_that_breaks_fails_the_response_and_not_the_session() -> None:
    def broken(_: Any) -> list[Any]:
        class Break:
            pass

        return [Text("a"), Break()]

    backend = FakeBackend(broken)
    client = Client(backend)

    class Bad:
        async def __aiter__(self):
            yield Text("a")
            raise RuntimeError("cuda")

        def cancel(self) -> None: ...

        def slow(self, on: bool) -> None: ...

    backend.start = lambda turn, memory=None: Bad()  # type: ignore[method-assign,assignment]
    await client.send(said("x"), CREATE)
    response = (await client.until("response.done"))["response"]
    assert response["status"] == "failed" and "cuda" not in json.dumps(response)


@live
async def test_closing_stops_the_model_and_gives_its_memory_back() -> None:
    client = Client(FakeBackend(slow_answer))
    await client.send(said("x"), CREATE)
    await client.until("response.output_audio.delta")
    await client.session.close()
    assert client.backend.jobs[0].cancelled.is_set() and client.backend.memories[0].closed


@live
async def test_a_task_that_misses_its_cancellation_is_cancelled_again() -> None:
    async def deaf() -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            await asyncio.sleep(30)

    task = asyncio.create_task(deaf())
    await asyncio.sleep(0)
    await tasks.end(task, None)
    assert task.cancelled()


@live
async def test_a_dialogue_forgets_its_oldest_items() -> None:
    client = Client(limits=SessionLimits(items=5))
    await client.send(*[said(str(i)) for i in range(9)])
    assert len(client.session.conversation) == 5
