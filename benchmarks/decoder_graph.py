#!/usr/bin/env python3
"""What one onnxruntime graph for a decoder's step (`cpu_linear.step_graph`) gives over the same step through our layers. Both do the same steps with the same weights, in turns.

    python benchmarks/decoder_graph.py [--wide] [--json]

Heads, embedding, choice and guards are outside both. ``graph_speedup`` is the layers' over the graph's seconds of a step (CPU time of one thread, the smallest mean of the rounds); a graph was to be
taken from 1.3 on. ``--wide`` has two layers as wide as the released model's, for which no graph is used: nearly all of their step is products.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import missing_package  # noqa: F401 - first: it says what is missing
import torch
from decode import _WIDE, about, random_model
from torch import Tensor

from osum_echat.cpu_linear import lighten, pack_linears
from osum_echat.device import cpu
from osum_echat.generation.cache import BatchCache

_MINI: dict[str, Any] = {  # checkpoints/mini
    "model_type": "qwen2",
    "hidden_size": 320,
    "intermediate_size": 832,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
START = 128
"""Positions that are in the cache before the first step that is timed."""


class Steps:
    """Steps of a decoder over one cache, again and again from the same position."""

    def __init__(self, decoder: Any, inputs_T11D: Tensor) -> None:
        self._decoder, self._inputs_T11D = decoder, inputs_T11D
        self._cache = BatchCache(len(decoder.layers), capacity=len(inputs_T11D))
        prompt_1TD = inputs_T11D[:START, 0].transpose(0, 1)
        decoder(inputs_embeds=prompt_1TD, position_ids=torch.arange(START)[None], past_key_values=self._cache.cache)

    def run(self) -> tuple[float, Tensor]:
        """CPU seconds of a step, and the last hidden state."""
        for layer in self._cache.layers:
            layer.length = START
        begun = time.process_time()
        for at in range(START, len(self._inputs_T11D)):
            where = torch.tensor([[at]])
            out = self._decoder(inputs_embeds=self._inputs_T11D[at], position_ids=where, past_key_values=self._cache.cache)
        return (time.process_time() - begun) / (len(self._inputs_T11D) - START), out.last_hidden_state


@torch.inference_mode()
def measure(shape: dict[str, Any], layers: int, steps: int, rounds: int) -> dict[str, Any]:
    model = random_model(layers, torch.float32, shape)
    pack_linears(model.lm)
    decoder = model.lm.llm.get_decoder()
    limit, cpu._GRAPH_WEIGHTS = cpu._GRAPH_WEIGHTS, 2**40  # of any size, to see what it gives
    try:
        assert lighten(decoder)
    finally:
        cpu._GRAPH_WEIGHTS = limit
    graph = decoder.forward.graph
    if graph is None:
        raise SystemExit("the graph does not run here; osum-echat doctor says what this CPU has")
    inputs_T11D = torch.randn(START + steps, 1, 1, shape["hidden_size"], generator=torch.Generator().manual_seed(1))
    side = Steps(decoder, inputs_T11D)
    seconds: dict[str, list[float]] = {"layers": [], "graph": []}
    last: dict[str, Tensor] = {}
    for _ in range(rounds):
        for name, taken in (("layers", None), ("graph", graph)):
            decoder.forward.graph = taken
            taken_seconds, last[name] = side.run()
            seconds[name].append(taken_seconds)
    best = {name: min(values) for name, values in seconds.items()}
    return {
        "model": f"qwen2 {layers} x {shape['hidden_size']}, float32",
        "graph_speedup": round(best["layers"] / best["graph"], 3),
        "step_ms": {name: round(1e3 * value, 3) for name, value in best.items()},
        "largest_difference": float((last["layers"] - last["graph"]).abs().max() / last["layers"].abs().max()),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wide", action="store_true", help="2 layers as wide as the released model's, instead of mini's 6")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    shape, layers = (_WIDE, 2) if args.wide else (_MINI, 6)
    result = measure(shape | {"vocab_size": 800}, layers, args.steps, args.rounds) | about()
    print(json.dumps(result) if args.json else "\n".join(f"{name:<20} {value}" for name, value in result.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
