"""The points, one function each: its first line is what a client relies on. A `Failure` says what was seen instead."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed

from osum_echat.audio import g711
from osum_echat.serving.conformance.client import RATE, Client, Failure, Target, check

Point = Callable[[Target], Awaitable[None]]
POINTS: dict[str, Point] = {}
CREATE = {"type": "response.create"}
CANCEL = {"type": "response.cancel"}


def point(test: Point) -> Point:
    POINTS[test.__name__.replace("_", "-")] = test
    return test


def dig(data: Any, *path: str) -> Any:
    for name in path:
        data = data.get(name) if isinstance(data, dict) else None
    return data


# ---- connection ------------------------------------------------------------------------------------------------------


@point
async def both_paths(target: Target) -> None:
    """/v1/realtime and /realtime answer, with any model in the query and without one"""
    root = target.url.split("?")[0].removesuffix("/realtime").removesuffix("/v1")
    for path in ("/v1/realtime", "/v1/realtime?model=any-model", "/realtime?model=any-model"):
        try:
            async with target.open(root + path) as client:
                await client.until("session.created")
        except OSError as error:
            raise Failure(f"{path}: {error}") from error


@point
async def subprotocol(target: Target) -> None:
    """a browser's key comes as a subprotocol, and "realtime" is chosen"""
    offered = ["realtime", f"openai-insecure-api-key.{target.key}", "openai-agents-sdk.1"]
    async with target.open(key=None, subprotocols=offered) as client:
        await client.until("session.created")
        check(client.subprotocol == "realtime", f"the server chose {client.subprotocol!r}")


@point
async def first_event(target: Target) -> None:
    """the first event is session.created with a whole session"""
    async with target.open() as client:
        await client.until("session.created")
        check(client.seen[0]["type"] == "session.created", f"the first event is {client.seen[0]['type']}")
        session = client.seen[0]["session"]
        for path in (
            ("id",),
            ("output_modalities",),
            ("audio", "input", "format"),
            ("audio", "input", "turn_detection"),
            ("audio", "output", "voice"),
        ):
            check(dig(session, *path) is not None, f"session.{'.'.join(path)} is missing")
        check(
            dig(session, "audio", "input", "turn_detection", "interrupt_response") is not None,
            "turn_detection.interrupt_response is missing",
        )


@point
async def update_before_created(target: Target) -> None:
    """a session.update that is sent at once, before session.created was read, is answered after it"""
    async with target.open() as client:
        await client.send({"type": "session.update", "session": {"type": "realtime", "audio": {"output": {"voice": "marin"}}}})
        await client.until("session.updated")
        check(client.kinds()[:2] == ["session.created", "session.updated"], f"the order is {client.kinds()[:3]}")


# ---- session ---------------------------------------------------------------------------------------------------------


@point
async def deep_merge(target: Target) -> None:
    """a partial update is merged to any depth and answered by the whole session"""
    async with target.open() as client:
        await client.until("session.created")
        await client.update(
            audio={"input": {"turn_detection": {"type": "server_vad", "threshold": 0.31}}}, instructions="be brief"
        )
        session = await client.update(audio={"input": {"turn_detection": {"type": "server_vad", "silence_duration_ms": 650}}})
        detection = dig(session, "audio", "input", "turn_detection") or {}
        check(detection.get("threshold") == 0.31, f"the threshold of the first update is gone: {detection}")
        check(detection.get("silence_duration_ms") == 650, f"the silence of the second update is missing: {detection}")
        check(session.get("instructions") == "be brief", "the instructions of the first update are gone")
        check(dig(session, "audio", "output", "format") is not None, "session.audio.output.format is gone")


@point
async def detection_off(target: Target) -> None:
    """turn_detection: null switches it off: no speech events, no answer"""
    async with target.open() as client:
        await client.manual()
        check(
            dig(client.all("session.updated")[-1], "session", "audio", "input", "turn_detection") is None,
            "it is not null in the echo",
        )
        await client.speak()
        await client.quiet(1.5)
        found = [k for k in client.kinds() if k.startswith(("input_audio_buffer.speech", "response."))]
        check(not found, f"there was {found}")


@point
async def semantic_vad(target: Target) -> None:
    """semantic_vad and any voice are accepted"""
    async with target.open() as client:
        await client.until("session.created")
        audio = {"input": {"turn_detection": {"type": "semantic_vad", "eagerness": "medium"}}, "output": {"voice": "marin"}}
        session = await client.update(audio=audio)
        check(dig(session, "audio", "input", "turn_detection", "type") == "semantic_vad", "the echo is of another kind")
        check(not client.all("error"), "it was an error")


@point
async def ignored_fields(target: Target) -> None:
    """tools, tracing, truncation, prompt and unknown fields are no error"""
    async with target.open() as client:
        await client.until("session.created")
        tool = {"type": "function", "name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}
        await client.update(tools=[tool], tool_choice="auto", tracing="auto", truncation="auto", some_key_of_tomorrow=1)
        check(not client.all("error"), f"it was an error: {client.all('error')[:1]}")


# ---- a turn ----------------------------------------------------------------------------------------------------------

_TURN = [
    "input_audio_buffer.speech_started",
    "input_audio_buffer.speech_stopped",
    "input_audio_buffer.committed",
    "conversation.item.added",
    "response.created",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_audio.delta",
    "response.output_audio.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.done",
]


@point
async def order_of_a_turn(target: Target) -> None:
    """a spoken turn is answered by itself, and its events keep their order"""
    async with target.open() as client:
        await client.until("session.created")
        await client.speak()
        await client.until("response.done")
        kinds = [event["type"] for event in client.seen]
        missing = [kind for kind in _TURN if kind not in kinds]
        check(not missing, f"missing: {missing}")
        firsts = [kinds.index(kind) for kind in _TURN]
        wrong = [kind for kind, before, at in zip(_TURN[1:], firsts[:-1], firsts[1:], strict=True) if at < before]
        check(not wrong, f"too early: {wrong}")
        check(
            kinds.index("response.output_audio_transcript.delta") < len(kinds) - 1 - kinds[::-1].index("response.done"),
            "no transcript",
        )


@point
async def one_id_for_a_turn(target: Target) -> None:
    """speech_started, speech_stopped, committed and the item have one id; audio times rise, counted in samples"""
    async with target.open() as client:
        await client.until("session.created")
        await client.speak()
        committed = await client.until("input_audio_buffer.committed")
        started, stopped = client.all("input_audio_buffer.speech_started")[0], client.all("input_audio_buffer.speech_stopped")[0]
        added = await client.until("conversation.item.added")
        ids = {started["item_id"], stopped["item_id"], committed["item_id"], added["item"]["id"]}
        check(len(ids) == 1, f"ids: {ids}")
        seconds = len(target.speech) / RATE + 1.75
        check(
            0 <= started["audio_start_ms"] < stopped["audio_end_ms"] <= seconds * 1000 + 100,
            f"{started['audio_start_ms']}, {stopped['audio_end_ms']}",
        )


@point
async def input_transcript(target: Target) -> None:
    """what was said comes as input_audio_transcription.completed, for the item of the turn"""
    async with target.open() as client:
        await client.manual()
        await client.update(audio={"input": {"transcription": {"model": "gpt-4o-mini-transcribe"}}})
        await client.turn()
        completed = await client.until("conversation.item.input_audio_transcription.completed")
        item = next(e["item"]["id"] for e in client.all("conversation.item.added") if e["item"].get("role") == "user")
        check(completed["item_id"] == item, f"it is for {completed['item_id']}, the item is {item}")


@point
async def transcription_off(target: Target) -> None:
    """transcription: null switches transcripts off"""
    async with target.open() as client:
        await client.manual()
        await client.update(audio={"input": {"transcription": None}})
        await client.turn()
        await client.until("response.done")
        found = [k for k in client.kinds() if "input_audio_transcription" in k]
        check(not found, f"there was {found}")


@point
async def whole_audio(target: Target) -> None:
    """deltas of sound are small, belong together, and are 16-bit PCM; response.done holds the transcript"""
    async with target.open() as client:
        await client.manual()
        await client.turn()
        done = (await client.until("response.done"))["response"]
        deltas = client.all("response.output_audio.delta")
        sizes = [len(base64.b64decode(e["delta"])) for e in deltas]
        check(bool(sizes) and sum(sizes) % 2 == 0, f"{len(sizes)} deltas, {sum(sizes)} bytes")
        check(
            max(len(e["delta"]) for e in deltas) < 512 * 1024,
            f"a delta has {max(sizes)} bytes: clients with 1 MiB of buffer break",
        )
        check(len({(e["response_id"], e["item_id"]) for e in deltas}) == 1, "deltas of several items")
        check(done["status"] == "completed", f"the status is {done['status']}")
        said = "".join(e["delta"] for e in client.all("response.output_audio_transcript.delta")).strip()
        check(
            bool(said) and dig(done["output"][0]["content"][0], "transcript") == said,
            "the transcript of response.done is another",
        )


@point
async def text_only(target: Target) -> None:
    """output_modalities ["text"] is answered by response.output_text.* and no sound"""
    async with target.open() as client:
        await client.manual()
        await client.update(output_modalities=["text"])
        await client.say("How are you?")
        await client.send(CREATE)
        await client.until("response.done")
        kinds = client.kinds("response.")
        check("response.output_text.delta" in kinds and "response.output_text.done" in kinds, f"there was {kinds}")
        check(not any("audio" in k for k in kinds), f"there was {kinds}")


@point
async def metadata_echo(target: Target) -> None:
    """response.created and response.done echo the metadata of response.create"""
    async with target.open() as client:
        await client.manual()
        await client.say("How are you?")
        await client.send(
            {"type": "response.create", "response": {"metadata": {"client_event_id": "e1"}, "output_modalities": ["text"]}}
        )
        for kind in ("response.created", "response.done"):
            found = (await client.until(kind))["response"].get("metadata")
            check(found == {"client_event_id": "e1"}, f"{kind} has {found}")


@point
async def telephone(target: Target) -> None:
    """audio/pcmu and audio/pcma in and out, 8 kHz"""
    for kind, law in (("audio/pcmu", "mu"), ("audio/pcma", "a")):
        async with target.open() as client:
            await client.manual()
            session = await client.update(audio={"input": {"format": {"type": kind}}, "output": {"format": {"type": kind}}})
            check(dig(session, "audio", "output", "format", "type") == kind, f"{kind} is not echoed")
            import soxr

            slow = soxr.resample(target.speech, RATE, 8000).astype(np.float32)
            data = g711.encode(slow, law)  # type: ignore[arg-type]
            for start in range(0, len(data), 800):
                await client.send(
                    {"type": "input_audio_buffer.append", "audio": base64.b64encode(data[start : start + 800]).decode()}
                )
            await client.send({"type": "input_audio_buffer.commit"}, CREATE)
            await client.until("response.done")
            sound = b"".join(base64.b64decode(e["delta"]) for e in client.all("response.output_audio.delta"))
            check(len(sound) > 800, f"{len(sound)} bytes of {kind}")
            level = float(np.abs(g711.decode(sound, law)).mean())  # type: ignore[arg-type]
            check(level < 0.3, f"it is no {kind}: the mean level is {level:.2f}")


# ---- items -----------------------------------------------------------------------------------------------------------


@point
async def items(target: Target) -> None:
    """items keep their ids and places, are acknowledged, retrieved with their content and deleted"""
    async with target.open() as client:
        await client.manual()
        await client.say("one", "item_a")
        await client.say("three", "item_c")
        await client.say("two", "item_b", previous_item_id="item_a")
        await client.say("zero", "item_0", previous_item_id="root")
        places = [(e["item"]["id"], e.get("previous_item_id")) for e in client.all("conversation.item.added")]
        check(places == [("item_a", None), ("item_c", "item_a"), ("item_b", "item_a"), ("item_0", None)], f"places: {places}")
        await client.until("conversation.item.done", 4)
        await client.send({"type": "conversation.item.retrieve", "item_id": "item_b"})
        content = (await client.until("conversation.item.retrieved"))["item"]["content"]
        check(content and content[0].get("text") == "two", f"content: {content}")
        await client.send({"type": "conversation.item.delete", "item_id": "item_b"})
        check((await client.until("conversation.item.deleted"))["item_id"] == "item_b", "another item was deleted")
        error = await client.fault({"type": "conversation.item.retrieve", "item_id": "item_b", "event_id": "e2"})
        check(error.get("event_id") == "e2", f"the error is for {error.get('event_id')}")


@point
async def truncate(target: Target) -> None:
    """truncate is acknowledged; past the end it is clamped and no error"""
    async with target.open() as client:
        await client.manual()
        await client.turn()
        done = (await client.until("response.done"))["response"]
        length = sum(len(base64.b64decode(e["delta"])) for e in client.all("response.output_audio.delta")) / 48
        item_id = done["output"][0]["id"]
        request = {"type": "conversation.item.truncate", "item_id": item_id, "content_index": 0}
        await client.send({**request, "audio_end_ms": int(length) + 85})
        await client.until("conversation.item.truncated")
        check(not client.all("error"), f"{int(length) + 85} of {length:.0f} ms: {client.all('error')[:1]}")
        await client.send({**request, "audio_end_ms": 200})
        check((await client.until("conversation.item.truncated", 2))["audio_end_ms"] == 200, "another time is acknowledged")


# ---- interruption ----------------------------------------------------------------------------------------------------


@point
async def cancel(target: Target) -> None:
    """cancel ends a response: status cancelled, reason client_cancelled, and nothing of it afterwards"""
    async with target.open() as client:
        await client.manual()
        await client.turn()
        created = (await client.until("response.created"))["response"]["id"]
        await client.send(CANCEL)
        done = (await client.until("response.done"))["response"]
        details = done.get("status_details") or {}
        check(done["id"] == created and done["status"] == "cancelled", f"the status is {done['status']}")
        check(details.get("reason") == "client_cancelled", f"the reason is {details.get('reason')}")
        end = max(i for i, e in enumerate(client.seen) if e["type"] == "response.done")
        await client.quiet(1.0)
        late = [e["type"] for e in client.seen[end + 1 :] if e.get("response_id") == created]
        check(not late, f"afterwards came {late[:3]}")


@point
async def barge_in(target: Target) -> None:
    """who speaks while an answer is played interrupts it: reason turn_detected"""
    async with target.open() as client:
        await client.until("session.created")
        await client.speak()
        await client.until("response.output_audio.delta", 2)
        await client.append(target.speech)
        started = await client.until("input_audio_buffer.speech_started", 2)
        dones = client.all("response.done")
        if not dones:
            dones = [await client.until("response.done")]
        response = dones[0]["response"]
        if response["status"] == "completed":  # it had all been sent; the client stops playing by itself
            check(client.seen.index(dones[0]) < client.seen.index(started), "the response went on after somebody spoke")
            return
        reason = dig(response, "status_details", "reason")
        check(
            response["status"] == "cancelled" and reason == "turn_detected",
            f"the status is {response['status']}, the reason {reason}",
        )


@point
async def interrupt_off(target: Target) -> None:
    """with interrupt_response: false nobody is interrupted"""
    async with target.open() as client:
        await client.until("session.created")
        await client.update(
            audio={"input": {"turn_detection": {"type": "server_vad", "interrupt_response": False, "create_response": False}}}
        )
        await client.say("How are you?")
        await client.send(CREATE)
        await client.until("response.created")
        await client.append(target.speech)
        done = (await client.until("response.done"))["response"]
        check(done["status"] == "completed", f"the status is {done['status']}")


# ---- errors ----------------------------------------------------------------------------------------------------------


@point
async def cancel_nothing(target: Target) -> None:
    """cancel without a response: response_cancel_not_active, and a message that begins "Cancellation failed" """
    async with target.open() as client:
        await client.manual()
        error = await client.fault({**CANCEL, "event_id": "e3"})
        check(error.get("code") == "response_cancel_not_active", f"the code is {error.get('code')}")
        check(str(error.get("message")).startswith("Cancellation failed"), f"the message is {error.get('message')!r}")
        check(error.get("event_id") == "e3", f"the error is for {error.get('event_id')}")


@point
async def second_response(target: Target) -> None:
    """a second response.create: conversation_already_has_active_response"""
    async with target.open() as client:
        await client.manual()
        await client.turn()
        await client.until("response.created")
        error = await client.fault({**CREATE, "event_id": "e4"})
        check(error.get("code") == "conversation_already_has_active_response", f"the code is {error.get('code')}")
        check(error.get("event_id") == "e4", f"the error is for {error.get('event_id')}")


@point
async def empty_commit(target: Target) -> None:
    """a commit of nothing: input_audio_buffer_commit_empty"""
    async with target.open() as client:
        await client.manual()
        error = await client.fault({"type": "input_audio_buffer.commit", "event_id": "e5"})
        check(error.get("code") == "input_audio_buffer_commit_empty", f"the code is {error.get('code')}")
        check(error.get("event_id") == "e5", f"the error is for {error.get('event_id')}")


@point
async def wrong_events(target: Target) -> None:
    """unknown events, missing fields and wrong values are errors with the event's id, and the session lives on"""
    async with target.open() as client:
        await client.manual()
        wrong: list[dict[str, Any]] = [
            {"type": "no.such.event"},
            {"type": "conversation.item.create"},
            {"type": "session.update", "session": {"type": "realtime", "audio": {"input": {"format": {"type": "audio/opus"}}}}},
            {"type": "conversation.item.retrieve", "item_id": "no_such_item"},
        ]
        for number, event in enumerate(wrong):
            error = await client.fault({**event, "event_id": f"w{number}"})
            check(error.get("event_id") == f"w{number}", f"the error of {event['type']} is for {error.get('event_id')}")
        await client.fault("{ this is no JSON")
        await client.say("still here")


@point
async def clear(target: Target) -> None:
    """clear forgets what came, and says so"""
    async with target.open() as client:
        await client.manual()
        await client.append(target.speech)
        await client.send({"type": "input_audio_buffer.clear"})
        await client.until("input_audio_buffer.cleared")
        error = await client.fault({"type": "input_audio_buffer.commit"})
        check(error.get("code") == "input_audio_buffer_commit_empty", f"the code is {error.get('code')}")


@point
async def odd_bytes(target: Target) -> None:
    """sound may be cut in the middle of a sample"""
    async with target.open() as client:
        await client.manual()
        data = (np.clip(target.speech, -1, 1) * 32767).astype("<i2").tobytes()
        for start in range(0, len(data), 4801):
            await client.send(
                {"type": "input_audio_buffer.append", "audio": base64.b64encode(data[start : start + 4801]).decode()}
            )
        await client.send({"type": "input_audio_buffer.commit"})
        await client.until("input_audio_buffer.committed")
        check(not client.all("error"), f"it was an error: {client.all('error')[:1]}")


@point
async def large_message(target: Target) -> None:
    """a message of unreasonable size is refused, and the server lives on"""
    async with target.open() as client:
        await client.until("session.created")
        with contextlib.suppress(OSError, ConnectionClosed, Failure):  # however it refuses
            await client.send('{"type": "input_audio_buffer.append", "audio": "' + "A" * (40 * 2**20) + '"}')
            await client.until("error")
        await asyncio.sleep(0.2)
        check(client.closed is not None or bool(client.all("error")), "40 MiB were taken")
    async with target.open() as again:
        await again.until("session.created")


__all__ = ["POINTS", "Client", "Point"]
