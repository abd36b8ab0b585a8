#!/usr/bin/env python3
"""A voice bot with pipecat on a live server of this project: `osum-echat serve`, then this with `pip install "pipecat-ai[openai,webrtc,runner]"`.

Open http://localhost:7860/client and talk. The server hears, answers and is interrupted; pipecat moves the sound. OSUM_ECHAT_URL: another server.
"""

import os

from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.runner import PipelineRunner
from pipecat.pipeline.task import PipelineParams, PipelineTask
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.services.openai.realtime.llm import OpenAIRealtimeLLMService


def conversation(microphone: FrameProcessor, loudspeaker: FrameProcessor) -> PipelineTask:
    model = OpenAIRealtimeLLMService(api_key="any", base_url=os.environ.get("OSUM_ECHAT_URL", "ws://127.0.0.1:8000/v1/realtime"))
    context = LLMContextAggregatorPair(LLMContext([{"role": "user", "content": "hello"}]))
    stages = [microphone, context.user(), model, loudspeaker, context.assistant()]
    return PipelineTask(Pipeline(stages), params=PipelineParams(audio_in_sample_rate=24000, audio_out_sample_rate=24000))


async def bot(arguments) -> None:  # a pipecat.runner.types.SmallWebRTCRunnerArguments
    from pipecat.transports.base_transport import TransportParams
    from pipecat.transports.smallwebrtc.transport import SmallWebRTCTransport

    params = TransportParams(audio_in_enabled=True, audio_out_enabled=True)
    transport = SmallWebRTCTransport(webrtc_connection=arguments.webrtc_connection, params=params)
    await PipelineRunner(handle_sigint=False).run(conversation(transport.input(), transport.output()))


if __name__ == "__main__":
    from pipecat.runner.run import main

    main()
