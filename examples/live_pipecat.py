#!/usr/bin/env python3
"""A voice bot with pipecat on a live server of this project: `osum-echat serve`, then this with `pip install "pipecat-ai[openai,webrtc,runner]"`.

Open http://localhost:7860/client and talk. The server hears, answers and is interrupted; pipecat moves the sound.
"""

from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.runner import PipelineRunner
from pipecat.pipeline.task import PipelineTask
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
from pipecat.runner.types import SmallWebRTCRunnerArguments
from pipecat.services.openai.realtime.llm import OpenAIRealtimeLLMService
from pipecat.transports.base_transport import TransportParams
from pipecat.transports.smallwebrtc.transport import SmallWebRTCTransport


async def bot(arguments: SmallWebRTCRunnerArguments) -> None:
    params = TransportParams(audio_in_enabled=True, audio_out_enabled=True)
    transport = SmallWebRTCTransport(webrtc_connection=arguments.webrtc_connection, params=params)
    model = OpenAIRealtimeLLMService(api_key="any", base_url="ws://127.0.0.1:8000/v1/realtime")
    context = LLMContextAggregatorPair(LLMContext([{"role": "user", "content": "hello"}]))
    stages = [transport.input(), context.user(), model, transport.output(), context.assistant()]
    await PipelineRunner(handle_sigint=False).run(PipelineTask(Pipeline(stages)))


if __name__ == "__main__":
    from pipecat.runner.run import main

    main()
