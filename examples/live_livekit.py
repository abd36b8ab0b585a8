#!/usr/bin/env python3
"""A LiveKit agent on a live server of this project: `osum-echat serve`, then this with `pip install livekit-agents livekit-plugins-openai`.

python examples/live_livekit.py console      # talk in the terminal
python examples/live_livekit.py dev          # serve rooms of a LiveKit server (LIVEKIT_URL, LIVEKIT_API_KEY, LIVEKIT_API_SECRET)

OSUM_ECHAT_URL: another server.
"""

import os

from livekit.agents import Agent, AgentServer, AgentSession, JobContext, cli
from livekit.plugins import openai

server = AgentServer()


def conversation() -> AgentSession:
    url = os.environ.get("OSUM_ECHAT_URL", "http://127.0.0.1:8000/v1")
    return AgentSession(llm=openai.realtime.RealtimeModel(base_url=url, api_key="any"))


@server.rtc_session()
async def entry(job: JobContext) -> None:
    await conversation().start(agent=Agent(instructions="Be kind."), room=job.room)


if __name__ == "__main__":
    cli.run_app(server)
