"""Ask mini about a recording and print what it heard, how, and what it answers.

python examples/chat.py [me.wav]
"""

import sys

from osum_echat import EChat

wav = sys.argv[1] if len(sys.argv) > 1 else "assets/demo/8_adult_male_happy_applause.ogg"
echat = EChat.load("checkpoints/mini")
reply = echat.chat(wav, think="tag")
print("heard:  ", reply.think.transcript)
print("how:    ", reply.think.age, reply.think.gender, reply.think.emotion, reply.think.event)
print("answer: ", reply.text)
