"""The live server with the mini model: what is said over the wire is what the model says in Python, and several talk at once."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from openai.types.realtime import RealtimeServerEvent
from pydantic import TypeAdapter
from websockets.asyncio.client import connect

from osum_echat.audio.io import to_mono_16k
from osum_echat.generation.engine import EngineLimits
from osum_echat.pipeline import EChat
from osum_echat.serving.app import Server, ServerSettings
from osum_echat.serving.backend import Ended, Sound, Text, ThoughtDone, Turn
from osum_echat.serving.live import LiveModel
from osum_echat.serving.realtime.settings import SessionLimits
from osum_echat.serving.shared import SharedEChat
from tests.live_case import at_rest, live
from tests.test_live_server import _no_uname, serving  # noqa: F401  the fixture is used by being here

MINI = Path("checkpoints/mini")
SPEECH = Path("assets/demo/8_adult_male_happy_applause.ogg")
CHECK: TypeAdapter[Any] = TypeAdapter(RealtimeServerEvent)


@pytest.fixture(scope="module")
def echat() -> EChat:
    return EChat.load(MINI, device="cpu")


async def collect(model: LiveModel, turn: Turn) -> tuple[str, ThoughtDone | None, np.ndarray, Ended]:
    text, thought, sound = "", None, [np.zeros(0, dtype=np.float32)]
    async for event in model.start(turn):
        if isinstance(event, Text):
            text += event.text
        elif isinstance(event, ThoughtDone):
            thought = event
        elif isinstance(event, Sound):
            sound.append(event.samples)
        elif isinstance(event, Ended):
            return text.strip(), thought, np.concatenate(sound), event
    raise AssertionError("a job ends with Ended")


@live
async def test_a_turn_is_what_the_model_answers_alone_though_others_talk_too(echat: EChat) -> None:
    model = LiveModel(SharedEChat(echat, EngineLimits(piece=16), voice_workers=2))
    model.start_threads()
    try:
        heard = await model.hear(to_mono_16k(SPEECH))
        jobs = [collect(model, Turn(heard=heard, think="tag", seed=seed)) for seed in (0, 1)]
        (text, thought, sound, ended), other = await asyncio.gather(*jobs)
        assert thought is not None and thought.tags["emotion"] == "happy"
        assert ended.reason == "stop" and len(ended.codes) == ended.word_ends[-1] and len(ended.word_ends) == len(text.split())
        assert other[2].size, "the other was answered too"
        silent = await collect(model, Turn(heard=await model.hear(np.zeros(16000, dtype=np.float32)), speak=False))
        assert silent[0] == "I heard nothing." and silent[3].reason == "stop"
    finally:
        await asyncio.to_thread(model.close)
    alone = echat.chat(str(SPEECH), think="tag", speak=True, seed=0)
    assert (text, ended.codes) == (alone.text, alone.speech_tokens)
    assert alone.think is not None and thought.raw.strip() == alone.think.raw.strip()
    assert alone.audio is not None and abs(len(sound) - len(alone.audio)) <= 1024


@live
async def test_a_spoken_turn_over_the_wire_is_cut_when_the_client_cancels(echat: EChat) -> None:
    model = LiveModel(SharedEChat(echat))
    samples = soxr.resample(to_mono_16k(SPEECH), 16000, 24000)
    data = (np.concatenate([samples, np.zeros(24000)]) * 32767).astype("<i2").tobytes()
    async with serving(model, limits=SessionLimits()) as running, connect(f"{running.ws}/v1/realtime") as socket:
        seen: list[dict[str, Any]] = []

        async def until(kind: str) -> dict[str, Any]:
            while True:
                event = json.loads(await asyncio.wait_for(socket.recv(), 120))
                CHECK.validate_python(event)
                seen.append(event)
                assert event["type"] != "error", event
                if event["type"] == kind:
                    return event

        for start in range(0, len(data), 9600):
            await socket.send(
                json.dumps({"type": "input_audio_buffer.append", "audio": base64.b64encode(data[start : start + 9600]).decode()})
            )
        completed = await until("conversation.item.input_audio_transcription.completed")
        assert "the baby slept" in completed["transcript"]
        for _ in range(3):
            await until("response.output_audio.delta")
        await socket.send(json.dumps({"type": "response.cancel"}))
        done = await until("response.done")
        assert done["response"]["status"] == "cancelled"
        assert model.load().rows == 0 or model.load().rows + model.load().held <= 1
        for _ in range(100):
            if not model.load().rows and model.pool is not None and not len(model.pool):
                break
            await asyncio.sleep(0.02)
        assert model.load().rows == 0 and model.pool is not None and len(model.pool) == 0, "nothing works for it any more"


@live
async def test_the_second_turn_stands_behind_the_first_as_far_as_the_checkpoint_has_learnt_that(echat: EChat) -> None:
    model = LiveModel(SharedEChat(echat))
    samples = soxr.resample(to_mono_16k(SPEECH), 16000, 24000)
    audio = base64.b64encode((samples * 32767).astype("<i2").tobytes()).decode()
    session = {"type": "realtime", "output_modalities": ["text"], "audio": {"input": {"turn_detection": None}}}
    async with serving(model, limits=SessionLimits()) as running, connect(f"{running.ws}/v1/realtime") as socket:

        async def answered() -> dict[str, Any]:
            for message in (
                {"type": "input_audio_buffer.append", "audio": audio},
                {"type": "input_audio_buffer.commit"},
                {"type": "response.create"},
            ):
                await socket.send(json.dumps(message))
            while True:
                event = json.loads(await socket.recv())
                assert event["type"] != "error", event
                if event["type"] == "response.done":
                    return event["response"]

        await socket.send(json.dumps({"type": "session.update", "session": session}))
        first = await answered()
        await at_rest(model)  # the past is read while nobody waits
        second = await answered()
    assert first["status"] == second["status"] == "completed" and second["output"][0]["content"][0]["text"]
    read = [response["usage"]["input_tokens"] for response in (first, second)]
    cached = second["usage"]["input_token_details"]["cached_tokens"]
    if model.past_turns:
        heard = first["usage"]["input_token_details"]["audio_tokens"]
        assert read[1] > read[0] + heard and cached > heard, "the first turn stands in front, and is not read again"
    else:
        assert read[1] == read[0] and cached == 0 and "history" in model.warnings


@live
async def test_rest_with_the_openai_client(echat: EChat) -> None:
    model = LiveModel(SharedEChat(echat))
    async with serving(model) as running, running.openai() as client:
        with SPEECH.open("rb") as file:
            heard = await client.audio.transcriptions.create(model="any", file=file)
        assert "the baby slept" in heard.text
        said = await client.audio.speech.create(model="any", voice="alloy", input="How wonderful.", response_format="wav")
        samples, rate = soundfile.read(io.BytesIO(said.content[:44] + said.content[44:]))
        assert rate == 24000 and np.abs(samples).max() > 0.05
        reply = await client.chat.completions.create(model="any", messages=[{"role": "user", "content": "how are you?"}])
        assert reply.choices[0].message.content


def test_the_server_takes_the_model(echat: EChat) -> None:
    server = Server(LiveModel(SharedEChat(echat)), settings=ServerSettings())
    assert b"osum_echat_queue 0.0" in server.metrics.render()
