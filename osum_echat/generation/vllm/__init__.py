"""vLLM as the decoder: its scheduler, paged cache and kernels run the LLM; what an id may be and means stays ours.

    export      the LLM with its speech rows as a plain Qwen2 of one vocabulary, in a folder that vLLM loads
    rules       phases, guards and sampling over the logits of a batch: pure torch, no vLLM
    processor   the same as a vLLM logits processor (entry point ``vllm.logits_processors``)
    client      vLLM itself, behind the few calls that are needed of it; the only module that starts it
    engine      `VllmEngine` and `VllmGenerator`, with the interfaces of `generation.engine` and `generation.generator`

Our process keeps encoder, layouts, sessions and token2wav, and sends prompt embeddings to vLLM's. Nothing but
`processor` and `client` imports vLLM.
"""
