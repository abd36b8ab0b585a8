"""A conformance kit for OpenAI Realtime servers, usable against any of them.

    python -m osum_echat.serving.conformance URL [--key KEY] [--wav SPEECH.wav] [--only NAME]

URL is such as ``ws://127.0.0.1:8000/v1/realtime``.

One line for each point: what clients rely on, and whether the server does it. The points come from reading released
clients (openai, openai-agents, pipecat, livekit, @openai/agents-realtime): see docs/serving.md. `points.POINTS` is the
list; `runner.run` runs it.
"""
