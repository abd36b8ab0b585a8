"""Play the reply while it is being made (`pip install sounddevice`); without a sound card it is written to out/stream.wav.

python examples/stream_to_speakers.py [me.wav]
"""

import sys
import time
from pathlib import Path

import numpy as np

from osum_echat import EChat
from osum_echat.audio.io import write
from osum_echat.generation.events import TextDelta
from osum_echat.pipeline import AudioChunk

wav = sys.argv[1] if len(sys.argv) > 1 else "assets/demo/1_adult_male_happy.ogg"
echat = EChat.load("checkpoints/mini")
try:
    import sounddevice

    speakers = sounddevice.OutputStream(samplerate=echat.token2wav.sample_rate, channels=1)
    speakers.start()
except (ImportError, OSError):  # the package or its library is not there
    speakers = None
except Exception as error:  # noqa: BLE001  PortAudioError: there is no sound card
    print("no sound card:", error)
    speakers = None

began, chunks = time.perf_counter(), []
for event in echat.stream(wav, speak=True):
    if isinstance(event, TextDelta):
        print(event.text, end="", flush=True)
    if isinstance(event, AudioChunk):
        if not chunks:
            print(f"\n[first sound after {time.perf_counter() - began:.2f} s]")
        chunks.append(event.samples)
        if speakers is not None:
            speakers.write(event.samples.reshape(-1, 1))
print()
if speakers is None:
    Path("out").mkdir(exist_ok=True)
    write("out/stream.wav", np.concatenate(chunks), echat.token2wav.sample_rate)
    print("written: out/stream.wav")
