#!/usr/bin/env python3
"""How fast decoding is: tokens a second and time to the first token at batch 1, 4 and 16, for a random model of Qwen2 shape.

Compared in the same run with transformers' own `generate` on the same weights (text phase, greedy), and with the limit that memory sets: at batch 1
every step reads every weight once, so a step takes (bytes of weights) / (copy bandwidth) at least. Copy bandwidth is measured in the same run and
counts what is read and what is written, as STREAM does: the stricter of the two usual ways (bytes copied alone would double the fraction).
Steps are measured in steady state, from the first id to the last, so neither prefill nor the first id is in their time.

The same weights are also measured in 8 and 4 bits (`EChat.load(weights="int8")`), and the prefill of 128 positions with each.

    python benchmarks/decode.py                 # the 0.5 B shape, minutes
    python benchmarks/decode.py --quick --json  # 0.3 B, within 50 s; one JSON object
    python benchmarks/decode.py --wide          # as wide as the released model (2,048), 12 of its 36 layers; with --quick 4 of them

    python benchmarks/decode.py --device cuda   # by the static step; weights as they are (8 and 4 bits are for CPUs)

With ``--threads 1`` seconds are CPU time, which other work on the machine disturbs least; else wall clock. The machine may be noisy: what is compared is measured in turns, and medians over the rounds are reported. An utterance is PROMPT positions read and
UTTERANCE ids written; its time is that of so many positions, as the prefill was measured, and of so many measured steps. What the measured rows are
given to read before is shorter with ``--quick``: on a CPU without bfloat16 units sixteen prompts would take a minute.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import missing_package  # noqa: F401 - first: it says what is missing
import torch
from common import NoText, add_device, commit, cpu_or_wall, device_of, now, seconds
from torch import nn

from osum_echat import device as devices
from osum_echat.cpu_linear import QuantizedLinear, lighten, pack_linears
from osum_echat.device import cpu
from osum_echat.dialogue.layout import Segment, flatten
from osum_echat.dialogue.vocabulary import Vocabulary
from osum_echat.generation.config import GenerationConfig, Guards, Mode, Sampling
from osum_echat.generation.events import Done
from osum_echat.generation.generator import Generator
from osum_echat.generation.request import Request
from osum_echat.model import quantized
from osum_echat.model.checkpoint import assign, build_meta
from osum_echat.model.config import AdapterConfig, EncoderConfig, LlmConfig, ModelConfig
from osum_echat.model.echat import EChatModel
from osum_echat.model.storage import DictSource

ROOT = Path(__file__).resolve().parent.parent
PROMPT = 64
UTTERANCE = 200
LIMITS = (cpu.LIMIT, "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
"""Variables that hold a CPU to fewer instructions than it has. onnxruntime knows none of them."""
BATCHES = (1, 4, 16)
PREFILL = 128
_STEPS_OF_A_ROUND = 16
"""About how many batch-1 steps a round costs for each id of a row, prefills included."""
_SHAPE: dict[str, Any] = {  # Qwen2.5-0.5B
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
_WIDE = _SHAPE | {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16}  # Qwen2.5-3B


Clock = Callable[[], float]


def random_model(layers: int, dtype: torch.dtype, shape: dict[str, Any] = _SHAPE) -> EChatModel:
    """The model in memory; encoder and adapter are tiny, decoding does not use them."""
    config = ModelConfig(
        encoder=EncoderConfig(dim=64, heads=2, ffn=64, layers=1),
        adapter=AdapterConfig(dim=64, heads=2, ffn=64, layers=1),
        llm=LlmConfig(config={**shape, "num_hidden_layers": layers}),
        # The end has an id that this model does not choose.
        vocabulary=Vocabulary(text_size=shape["vocab_size"], eos_id=shape["vocab_size"] - 1, unknown_id=None),
    )
    model = build_meta(config)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                weight = torch.empty(parameter.shape, dtype=dtype)
                module._parameters[name] = nn.Parameter(_fill(weight, generator), requires_grad=False)
    model.lm.llm.tie_weights()
    return model.eval()


def _fill(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Norms 1, matrices from one random block repeated (drawing every number would take longer than the benchmark)."""
    if weight.ndim == 1:
        return weight.fill_(1.0)
    flat = weight.view(-1)
    block = torch.empty(min(len(flat), 2**20)).uniform_(-0.03, 0.03, generator=generator).to(weight.dtype)
    for start in range(0, len(flat), len(block)):
        part = flat[start : start + len(block)]
        part.copy_(block[: len(part)])
    return weight


def twin(model: EChatModel) -> EChatModel:
    """Another model object on the same weights."""
    other = build_meta(model.config)
    weights = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in other.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = weights[f"{prefix}.{name}" if prefix else name]
    return other.eval()


def rounded(model: EChatModel, kind: quantized.Kind) -> EChatModel:
    """The model with its weights in 8 or 4 bits, as `EChat.load` makes it."""
    other = build_meta(model.config)
    weights = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    keys = {name: name for name in weights}
    table = "lm.llm.model.embed_tokens.weight"
    keys["lm.llm.lm_head.weight"] = table
    placed = quantized.put(other, DictSource(weights), keys, kind)
    assign(
        other,
        {name: (weights[name], key) for name, key in keys.items() if name not in placed},
        torch.device("cpu"),
        torch.float32,
    )
    lighten(other.lm.llm.get_decoder())
    return other.eval()


def bytes_read(model: EChatModel) -> int:
    """Bytes of the rounded weights that a step in the text phase reads: codes and float32 scales."""
    layers = {id(m): m for m in _products(model) if m.out_features != model.vocabulary.speech_classes}
    return sum(
        m.out_features * m.in_features * m.bits // 8 + 4 * m.out_features * m.in_features // m.group for m in layers.values()
    )


def _products(model: EChatModel) -> list[QuantizedLinear]:
    joints = [m.joint.product for m in model.lm.modules() if hasattr(m, "joint")]
    return [m for m in [*model.lm.modules(), *joints] if isinstance(m, QuantizedLinear)]


def prefill(model: EChatModel, clock: Clock) -> float:
    """Seconds to read `PREFILL` positions."""
    ids = torch.arange(1000, 1000 + PREFILL, device=model.device)[None]
    with torch.inference_mode():
        embeds = model.embed(ids)
        return seconds(lambda: model.hidden(embeds), clock)


def requests(batch: int, new: int, prompt: int) -> list[Request]:
    mode = Mode(text=Sampling(greedy=True), max_new=new)
    rows = [flatten([Segment("prompt", tuple(range(1000 + i, 1000 + i + prompt)))], []) for i in range(batch)]
    return [Request("text2text", row, mode=mode) for row in rows]


def decode(generator: Generator, batch: int, new: int, prompt: int, clock: Clock) -> tuple[float, float]:
    """Seconds to the first token and for one step of the whole batch, through `Generator`: of two calls, one with the first id only."""

    def run(count: int) -> None:
        done = [event for _, event in generator.generate(requests(batch, count, prompt)) if isinstance(event, Done)]
        assert all(len(event.generated) == count for event in done), "the random model ended early"

    return first_and_step(run, new, clock)


def decode_with_transformers(llm: Any, new: int, prompt: int, clock: Clock) -> float:
    """Seconds for a step of `generate` at batch 1, in the same way."""
    ids = torch.arange(1000, 1000 + prompt, device=llm.device)[None]
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def run(count: int) -> None:
        with torch.inference_mode():
            llm.generate(ids, max_new_tokens=count, **options)

    return first_and_step(run, new, clock)[1]


def first_and_step(run: Callable[[int], None], new: int, clock: Clock) -> tuple[float, float]:
    first, whole = (seconds(lambda: run(count), clock) for count in (1, new))  # noqa: B023 - called at once
    return first, (whole - first) / (new - 1)


def copy_bandwidth(device: torch.device, clock: Clock, size: int = 2**28) -> float:
    """Bytes a second, read and written."""
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    target.copy_(source)
    return 2 * size / min(seconds(lambda: target.copy_(source), clock) for _ in range(4))


Task = Callable[[int], Any]
"""A measurement; its argument is how many ids a single row gets."""


def tasks_of(
    layers: int, dtype: torch.dtype, shape: dict[str, Any], prompt: int, device: torch.device, clock: Clock
) -> tuple[dict[str, Task], dict[str, Any]]:
    """What is measured, by name, and facts about the models."""
    plain = random_model(layers, dtype, shape).to(device)
    model = twin(plain)
    on_cpu = device.type == "cpu"
    facts: dict[str, Any] = {
        "bytes": sum(p.numel() * p.element_size() for p in plain.lm.llm.parameters()),
        "packed": pack_linears(model.lm) if on_cpu else 0,
    }
    if on_cpu:
        lighten(model.lm.llm.get_decoder())
    config = GenerationConfig(guards=Guards.off())
    generator = Generator(model, NoText(), config)
    tasks: dict[str, Task] = {
        "copy": lambda _: copy_bandwidth(device, clock),
        "batch1": lambda new: decode(generator, 1, new, prompt, clock),
        "generate": lambda new: decode_with_transformers(plain.lm.llm, new, prompt, clock),
        "batch4": lambda new: decode(generator, 4, max(new // 2, 8), prompt, clock),
        "batch16": lambda new: decode(generator, 16, max(new // 3, 8), prompt, clock),
        "prefill": lambda _: prefill(model, clock),
    }
    if facts["packed"]:
        tasks["generate_packed"] = lambda new: decode_with_transformers(model.lm.llm, new, prompt, clock)
    for kind in cpu.ROUNDED:
        if on_cpu and cpu.rounds(kind):
            small = rounded(plain, kind)
            facts[kind] = bytes_read(small)
            _add_rounded(tasks, kind, Generator(small, NoText(), config), prompt, clock)
    return tasks, facts


def _add_rounded(tasks: dict[str, Task], kind: str, generator: Generator, prompt: int, clock: Clock) -> None:
    tasks[f"batch1_{kind}"] = lambda new: decode(generator, 1, new, prompt, clock)
    tasks[f"batch16_{kind}"] = lambda new: decode(generator, 16, max(new // 3, 8), prompt, clock)
    tasks[f"prefill_{kind}"] = lambda _: prefill(generator.model, clock)


def measure(tasks: dict[str, Task], facts: dict[str, Any], rounds: int, new: int, budget: float) -> dict[str, Any]:
    """All measurements, in turns; ``budget`` seconds are not exceeded by another round."""
    started = time.perf_counter()
    for name, task in tasks.items():
        if not name.startswith(("copy", "batch16", "batch4")):
            task(2)  # warm up
    begun = time.perf_counter()
    tasks["batch1"](new)
    step_seconds = (time.perf_counter() - begun) / new
    left = budget - (time.perf_counter() - started)
    new = max(8, min(new, int(left / (_STEPS_OF_A_ROUND * step_seconds))))  # a busy machine gets shorter rounds, not a longer run
    found: dict[str, list[Any]] = {name: [] for name in tasks}
    first_round = time.perf_counter()
    for done in range(rounds):
        took = (time.perf_counter() - first_round) / max(done, 1)
        if done and time.perf_counter() - started + took > budget:
            break
        for name, task in tasks.items():
            found[name].append(task(new))
    return summary(found, facts) | {"rounds": len(found["copy"]), "seconds": round(time.perf_counter() - started, 1)}


def summary(found: dict[str, list[Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """Medians, and their ratios."""
    one = {n: statistics.median(v) for n, v in found.items() if not n.startswith("batch")}
    step = {n: statistics.median(s for _, s in v) for n, v in found.items() if n.startswith("batch")}
    first = {n: statistics.median(f for f, _ in v) for n, v in found.items() if n.startswith("batch")}
    rows = {n: int(n.removeprefix("batch").partition("_")[0]) for n in step}
    read = {n: one[f"prefill_{n.partition('_')[2]}" if "_" in n else "prefill"] / PREFILL for n in step}
    utterances = {n: 1 / (PROMPT * read[n] + UTTERANCE * step[n] / rows[n]) for n in step}
    limit = facts["bytes"] / one["copy"]
    result = {
        "ratio_to_generate": round(one["generate"] / step["batch1"], 3),
        "fraction_of_bandwidth": round(limit / step["batch1"], 3),
        "batch16_speedup": round(utterances["batch16"] / utterances["batch1"], 2),
        "ratio_to_generate_on_packed_weights": round(one.get("generate_packed", one["generate"]) / step["batch1"], 3),
    }
    for kind in (k for k in cpu.ROUNDED if k in facts):
        result |= {
            f"ratio_to_generate_{kind}": round(one["generate"] / step[f"batch1_{kind}"], 3),
            f"fraction_of_bandwidth_{kind}": round(facts[kind] / one["copy"] / step[f"batch1_{kind}"], 3),
            f"batch16_speedup_{kind}": round(utterances[f"batch16_{kind}"] / utterances[f"batch1_{kind}"], 2),
            f"batch16_over_unrounded_{kind}": round(utterances[f"batch16_{kind}"] / utterances["batch16"], 2),
            f"prefill_speedup_{kind}": round(one["prefill"] / one[f"prefill_{kind}"], 2),
        }
    if "int4" in facts:
        result["prefill_speedup"] = result["prefill_speedup_int4"]
    return result | {
        "tokens_per_second": {n: round(rows[n] / step[n], 1) for n in step} | {"generate": round(1 / one["generate"], 1)},
        "first_token_ms": {n: round(1e3 * first[n], 1) for n in step},
        "utterances_per_second": {n: round(utterances[n], 3) for n in step},
        "prefill_ms": {n: round(1e3 * one[n], 1) for n in one if n.startswith("prefill")},
        "copy_gb_per_second": round(one["copy"] / 1e9, 2),
        "weights_gb": round(facts["bytes"] / 1e9, 3),
        "bytes_read_gb": {k: round(facts[k] / 1e9, 3) for k in cpu.ROUNDED if k in facts},
        "limit_ms": round(1e3 * limit, 2),
        "step_ms": {n: round(1e3 * step[n], 2) for n in step} | {"generate": round(1e3 * one["generate"], 2)},
        "packed_linears": facts["packed"],
    }


def about() -> dict[str, Any]:
    """Date, commit, hardware, versions."""
    import transformers

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "decided": str(cpu.detect()),
        "limits": {name: os.environ[name] for name in LIMITS if name in os.environ},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="12 layers instead of 24, few steps, within 50 s")
    parser.add_argument("--wide", action="store_true", help="the released model's width, 12 layers (with --quick 4)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--budget", type=float, help="seconds after which no further round begins (default: 32 with --quick, 600)"
    )
    add_device(parser)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--save", type=Path, help="also write the result, with date, commit and hardware, to this file")
    args = parser.parse_args()
    device = device_of(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    layers, rounds, new, budget, prompt = (12, 3, 24, 32.0, 8) if args.quick else (24, 5, 64, 600.0, PROMPT)
    budget = args.budget or budget
    shape = _WIDE if args.wide else _SHAPE
    if args.wide:
        layers = layers // 3 if args.quick else layers // 2
    one_thread = torch.get_num_threads() == 1

    def clock() -> float:
        return cpu_or_wall(device) if one_thread else now(device)

    tasks, facts = tasks_of(layers, dtype, shape, prompt, device, clock)
    result = {
        "model": f"qwen2 {layers} x {shape['hidden_size']}, {args.dtype}",
        "device": devices.describe(device),
        "clock": "CPU seconds" if one_thread and device.type == "cpu" else "wall clock",
        **measure(tasks, facts, rounds, new, budget),
        **about(),
    }
    text = json.dumps(result, ensure_ascii=False)
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        args.save.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(text if args.json else "\n".join(f"{name:<36} {value}" for name, value in result.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
