"""Save a voice from a recording once, then let replies use it. Ask the person before you copy a voice.

python examples/own_voice.py [voice.wav] [text]
"""

import sys
from pathlib import Path

from osum_echat import EChat
from osum_echat.audio.io import write

recording = sys.argv[1] if len(sys.argv) > 1 else "assets/demo/5_adult_female_neutral.ogg"
words = sys.argv[2] if len(sys.argv) > 2 else "I am glad to hear that."
echat = EChat.load("checkpoints/mini")
Path("out").mkdir(exist_ok=True)
echat.speaker(recording).save("out/voice.safetensors")
reply = echat.speak(words, speaker="out/voice.safetensors")
write("out/own_voice.wav", reply.audio, reply.sample_rate)
print(f"written: out/own_voice.wav ({len(reply.audio) / reply.sample_rate:.1f} s), out/voice.safetensors")
