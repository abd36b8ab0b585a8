#!/usr/bin/env python3
"""A LiveKit agent on a live server of this project: `osum-echat serve`, then this with `pip install livekit-agents livekit-plugins-openai`.

python examples/live_livekit.py console      # talk in the terminal
python examples/live_livekit.py dev          # serve rooms of a LiveKit server (LIVEKIT_URL, LIVEKIT_API_KEY, LIVEKIT_API_SECRET)
"""

from livekit.agents import Agent, AgentServer, AgentSession, JobContext, cli
from livekit.plugins import openai

server = AgentServer()


@server.rtc_session()
async def entry(job: JobContext) -> None:
    model = openai.realtime.RealtimeModel(base_url="http://127.0.0.1:8000/v1", api_key="any")
    session = AgentSession(llm=model)
    await session.start(agent=Agent(instructions="Be kind."), room=job.room)


if __name__ == "__main__":
    cli.run_app(server)
