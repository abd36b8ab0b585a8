"""vLLM itself, behind the few calls that `engine` makes of it. The only place that starts it.

vLLM runs in a process of its own; the calls here are made by one thread. No server of vLLM's is started, so embeddings
come from this process alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from osum_echat.generation.engine import EngineLimits
from osum_echat.generation.vllm.owner import claim
from osum_echat.generation.vllm.rules import RowPlan

ARGUMENT = "osum_echat"
ENTRY_POINTS, PROCESSOR = "vllm.logits_processors", "osum_echat.generation.vllm.processor:EChatLogitsProcessor"
_BLOCK = 128
"""Positions of a block of the cache at most (on CPUs; 16 on GPUs): a request wastes less than one."""


@dataclass(frozen=True)
class Step:
    """What came of a request in one step.

    Attributes:
        ids: new ids. values: the value at each of them (see `rules`): which guards acted.
        ended: vLLM's reason, where the request has ended.
    """

    name: str
    ids: tuple[int, ...]
    values: tuple[float, ...]
    ended: str | None


class Decoder(Protocol):
    """What is needed of vLLM. Tests have one of transformers' model and the same rules."""

    max_positions: int
    """Positions of a prompt and what is generated behind it."""

    def add(self, name: str, embeds_TD: Tensor, plan: RowPlan, max_tokens: int) -> None:
        """Raises ValueError for what it cannot take."""
        ...

    def abort(self, name: str) -> None: ...

    def step(self) -> list[Step]:
        """Wait for what comes next. Call it while there are requests."""
        ...

    def close(self) -> None: ...


class VllmDecoder:
    """vLLM on an exported folder.

    Args:
        limits: ``rows`` requests are decoded together, in a cache of ``positions``; what waits is held by the engine.
        settings: `rules.to_settings` of what this process decodes with.
        tensor_parallel: devices that share the model. options: further arguments of vLLM's engine.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        limits: EngineLimits,
        settings: Mapping[str, Any],
        tensor_parallel: int = 1,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # the second one takes no embeddings on CPUs
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is for what was asked for
        if _on_cpu():
            # Eager as all else there: the one function that vLLM would compile needs a C++ compiler and most of a
            # minute.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        self._end = int(config["eos_token_id"])
        arguments: dict[str, Any] = {
            "model": str(folder),
            "dtype": config["dtype"],
            "skip_tokenizer_init": True,
            "enable_prompt_embeds": True,
            "max_model_len": min(int(config["max_position_embeddings"]), limits.positions),
            "max_num_seqs": limits.rows,
            "kv_cache_memory_bytes": cache_bytes(config, limits),
            "logprobs_mode": "processed_logits",
            "async_scheduling": False,
            "tensor_parallel_size": tensor_parallel,
            "enforce_eager": _on_cpu(),
            "disable_log_stats": True,
            "additional_config": {ARGUMENT: dict(settings)},
            # An installed package is found by its entry point; from a mere PYTHONPATH it is named.
            "logits_processors": None if _has_entry_point() else [PROCESSOR],
        }
        claim()
        self._llm = LLMEngine.from_engine_args(EngineArgs(**arguments | dict(options or {})))
        self.max_positions = self._llm.model_config.max_model_len

    def add(self, name: str, embeds_TD: Tensor, plan: RowPlan, max_tokens: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            stop_token_ids=[self._end],
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={ARGUMENT: plan.to_plain()},
        )
        self._llm.add_request(name, {"prompt_embeds": embeds_TD.cpu()}, params)

    def abort(self, name: str) -> None:
        self._llm.abort_request([name])

    def step(self) -> list[Step]:
        steps = []
        for output in self._llm.step():
            [completion] = output.outputs
            ids = tuple(completion.token_ids)
            values = tuple(found[i].logprob for i, found in zip(ids, completion.logprobs or (), strict=True))
            steps.append(Step(output.request_id, ids, values, completion.finish_reason if output.finished else None))
        return steps

    def close(self) -> None:
        """End vLLM's process."""
        self._llm.engine_core.shutdown()


def cache_bytes(config: Mapping[str, Any], limits: EngineLimits) -> int:
    """Memory for the keys and values of ``limits.positions``, with the block that each row begins."""
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    itemsize = torch.empty(0, dtype=getattr(torch, config["dtype"])).element_size()
    return 2 * config["num_hidden_layers"] * heads * width * itemsize * (limits.positions + (limits.rows + 1) * _BLOCK)


def _has_entry_point() -> bool:
    return any(entry.value == PROCESSOR for entry in metadata.entry_points(group=ENTRY_POINTS))


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())
