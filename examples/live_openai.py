#!/usr/bin/env python3
"""A spoken turn with the openai package: `osum-echat serve`, then `python examples/live_openai.py me.wav answer.wav`."""

import asyncio
import base64
import sys

import soundfile
import soxr
from openai import AsyncOpenAI


async def main(wav: str, out: str) -> None:
    samples, rate = soundfile.read(wav, dtype="float32")
    pcm = (soxr.resample(samples, rate, 24000) * 32767).astype("<i2").tobytes()
    client, sound = AsyncOpenAI(api_key="any", base_url="http://127.0.0.1:8000/v1"), b""
    async with client.realtime.connect(model="osum-echat") as connection:
        # 1 s of silence ends the turn.
        await connection.input_audio_buffer.append(audio=base64.b64encode(pcm + bytes(48000)).decode())
        async for event in connection:
            if event.type == "conversation.item.input_audio_transcription.completed":
                print("heard:   ", event.transcript)
            elif event.type == "response.output_audio.delta":
                sound += base64.b64decode(event.delta)
            elif event.type == "response.done":
                print("answered:", event.response.output[0].content[0].transcript)
                break
    with soundfile.SoundFile(out, "w", 24000, 1, "PCM_16") as file:
        file.buffer_write(sound, "int16")


asyncio.run(main(sys.argv[1], sys.argv[2]))
