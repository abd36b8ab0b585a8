"""The sections of `tools/gpu_check.py`: what this project does on one accelerator, measured there.

    python benchmarks/on_accelerator.py SECTION ... --device cuda --out result.json
    python benchmarks/on_accelerator.py train --device cpu --tiny --out result.json   # the same code on small random models

It needs torch, transformers and numpy; `mini` sections also soundfile, soxr and kaldi-native-fbank. Everything is synchronised before a clock is read. Shapes are the
released ones with random weights made on the device; ``--tiny`` takes small ones, to try the code.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import missing_package  # noqa: F401 - first: it says what is missing
import torch
from common import NoText, now, seconds
from torch import nn

from osum_echat import config as config_io
from osum_echat import device as devices
from osum_echat.data.batch import Batch
from osum_echat.device.waits import Waits
from osum_echat.dialogue.layout import Segment, flatten
from osum_echat.dialogue.vocabulary import Vocabulary
from osum_echat.generation.config import GenerationConfig, Guards, Mode, Sampling
from osum_echat.generation.events import Done
from osum_echat.generation.generator import Generator
from osum_echat.generation.request import Request
from osum_echat.model.checkpoint import build_meta
from osum_echat.model.config import AdapterConfig, EncoderConfig, LlmConfig, LoraConfig, ModelConfig
from osum_echat.model.echat import EChatModel
from osum_echat.training import memory, report, stages
from osum_echat.training.build import compile_blocks
from osum_echat.training.config import TrainConfig
from osum_echat.training.distributed import World
from osum_echat.training.engines.single import SingleEngine
from osum_echat.training.objective import Objective

ROOT = Path(__file__).resolve().parent.parent
MINI = ROOT / "checkpoints/mini"
GIB = 2**30
CPU = torch.device("cpu")
_TINY_LLM = {
    "model_type": "qwen2",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a section runs, and whether only its code is tried."""

    device: torch.device
    tiny: bool

    def seconds(self, run: Callable[[], Any], repeats: int = 3) -> float:
        """Of the fastest of ``repeats`` calls, after one to warm up."""
        run()
        return min(seconds(run, lambda: now(self.device)) for _ in range(1 if self.tiny else repeats))


# ---- models --------------------------------------------------------------------------------------------------------------------------


def model_config(tiny: bool, **changes: Any) -> ModelConfig:
    """The released sizes, or small ones."""
    if not tiny:
        return dataclasses.replace(ModelConfig(), **changes)
    small = ModelConfig(
        encoder=EncoderConfig(mels=16, dim=16, heads=2, ffn=32, layers=2, max_positions=800, dropout=0.0),
        adapter=AdapterConfig(dim=16, heads=2, ffn=32, layers=1, max_positions=200, dropout=0.0),
        llm=LlmConfig(config=_TINY_LLM),
        vocabulary=Vocabulary(text_size=96, eos_id=95, unknown_id=None, speech_codes=24),
    )
    return dataclasses.replace(small, **changes)


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> EChatModel:
    """Weights drawn on the device, tied ones once; buffers as they are built."""
    torch.manual_seed(0)
    model = build_meta(config)
    placed: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in list(module._parameters.items()):
            if param is None:
                continue
            if id(param) not in placed:
                value = torch.ones(param.shape, dtype=dtype, device=device)
                if param.ndim > 1:
                    value.normal_(std=0.02)
                elif name == "bias":
                    value.zero_()
                placed[id(param)] = nn.Parameter(value)
            module._parameters[name] = placed[id(param)]
    return model.to(device)


def requests(batch: int, new: int, text_size: int) -> list[Request]:
    mode = Mode(text=Sampling(greedy=True), max_new=new)
    rows = [flatten([Segment("prompt", tuple((7 * i + n) % (text_size - 8) for n in range(64)))], []) for i in range(batch)]
    return [Request("text2text", row, mode=mode) for row in rows]


def generated(generator: Generator, batch: int, new: int) -> list[list[int]]:
    done = {i: e for i, e in generator.generate(requests(batch, new, generator.vocab.text_size)) if isinstance(e, Done)}
    return [list(done[i].generated) for i in range(batch)]


# ---- sections ------------------------------------------------------------------------------------------------------------------------


def box(place: Place) -> dict[str, Any]:
    """What the machine is, and what it can do: the measures that everything else is held against."""
    size, numbers = (256, 2**16) if place.tiny else (8192, 2**30)
    half = devices.dtype("auto", place.device)
    source, target = (torch.zeros(numbers, dtype=torch.uint8, device=place.device) for _ in range(2))
    a, b = (torch.randn(size, size, device=place.device, dtype=half) for _ in range(2))
    small = torch.zeros(1, device=place.device)

    def launches() -> None:
        for _ in range(1000):
            small.add_(1)

    versions = {}
    for name in ("torch", "transformers", "numpy", "soundfile", "soxr", "kaldi_native_fbank", "triton", "peft"):
        found = importlib.util.find_spec(name) is not None
        versions[name] = getattr(importlib.import_module(name), "__version__", "yes") if found else "missing"
    return {
        "device": devices.describe(place.device),
        "python": platform.python_version(),
        "versions": versions,
        "copy_gb_s": 2 * numbers / place.seconds(lambda: target.copy_(source)) / 1e9,
        "product_tflops": 2 * size**3 / place.seconds(lambda: a @ b) / 1e12,
        "launch_us": place.seconds(launches) * 1000,
        "varlen_attention": devices.varlen_attention(torch.zeros(1, 1, 1, 128, device=place.device, dtype=half)) is not None,
    }


LIMITS = {"loss_difference": 1e-4, "gradient_norm_difference": 1e-3, "update_difference": 1e-2}
"""The largest relative differences to the CPU that count as rounding. For comparison: weights that all differ in their last bit (3e-7)
give 1e-7, 7e-7 and 4e-5; an update that was not made differs by 1, one in the wrong direction by 2."""


def correctness(place: Place) -> dict[str, Any]:
    """The device ("here") against a CPU ("reference"), in float32: ids, loss, gradients, an update; ``failed`` says what is wrong."""
    torch.set_float32_matmul_precision("highest")
    config = model_config(True)
    devices_of = {"reference": CPU, "here": place.device}
    models = {name: random_model(config, device, torch.float32) for name, device in devices_of.items()}
    models["here"].load_state_dict(models["reference"].state_dict())
    start = [p.detach().clone() for p in models["reference"].parameters()]
    ids, steps = {}, {}
    for name, model in models.items():
        ids[name] = generated(Generator(model.eval(), NoText(), GenerationConfig(guards=Guards.off())), 3, 12)
        steps[name] = one_step(model.train(), devices_of[name])
    static = Generator(models["here"].eval(), NoText(), GenerationConfig(guards=Guards.off()))
    static.use_static_step()
    again, usual = generated(static, 3, 12), Generator(models["here"], NoText(), GenerationConfig(guards=Guards.off()))
    reference, here = steps["reference"], steps["here"]
    found = {
        "ids_equal": ids["reference"] == ids["here"],
        "static_step_ids_equal": again == generated(usual, 3, 12),
        "loss_difference": abs(reference["loss"] - here["loss"]) / abs(reference["loss"]),
        "gradient_norm_difference": abs(reference["norm"] - here["norm"]) / reference["norm"],
        "update_difference": distance(reference["weights"], here["weights"]) / distance(reference["weights"], start),
    }
    wrong = [name for name in ("ids_equal", "static_step_ids_equal") if not found[name]]
    wrong += [f"{name} {found[name]:.3g}, at most {most}" for name, most in LIMITS.items() if not found[name] <= most]
    return found | ({"failed": "; ".join(wrong)} if wrong else {})


def distance(one: list[torch.Tensor], two: list[torch.Tensor]) -> float:
    """Euclidean, over all tensors."""
    return math.sqrt(sum(float((a.double() - b.double()).square().sum()) for a, b in zip(one, two, strict=True)))


def engine_for(model: EChatModel, device: torch.device, data: dict[str, Any], **changes: Any) -> SingleEngine:
    plain = {
        "stage": "generation",
        "out": "unused",
        "precision": "fp32",
        "optim": {"lr": 1e-3, "clip": 1.0},
        "data": data,
        **changes,
    }
    config = config_io.from_dict(TrainConfig, plain, where="this check")
    groups = stages.assign(model, config)
    return SingleEngine(Objective(model, config.loss), groups, stages.blocks(model), config, World(), device)


def one_step(model: EChatModel, device: torch.device) -> dict[str, Any]:
    data = {"batch": {"rows": 2, "row_positions": 64, "max_frames": 200}, "limits": {"max_frames": 100, "max_positions": 64}}
    engine = engine_for(model, device, data)
    batch = memory.largest_batch(engine.config.data, model.vocabulary, model.config.encoder.mels)
    micro = engine.module.prepare(batch, device)
    outcome = engine.forward(micro, dict(micro.counts))
    engine.backward(outcome.loss, last=True)
    norm, [read] = report.read(engine.step(1.0).norm, [outcome])
    return {"loss": float(read.loss), "norm": norm, "weights": [p.detach().cpu().clone() for p in model.parameters()]}


def waits(place: Place) -> dict[str, Any]:
    """Waits and kernels of a token (usual and static step) and of a training micro-batch, by place in the code."""
    model = random_model(model_config(place.tiny), place.device, devices.dtype("auto", place.device)).eval()
    out: dict[str, Any] = {}
    for name in ("usual", "static"):
        generator = Generator(model, NoText(), GenerationConfig(guards=Guards.off(), static_step="never"))
        if name == "static":
            generator.use_static_step()
        generated(generator, 1, 24)
        counts = []
        for new in (8, 24):
            with Waits() as seen:
                generated(generator, 1, new)
            counts.append(seen)
        few, many = counts
        out[f"waits_a_token_{name}"] = (many.total - few.total) / 16
        out[f"kernels_a_token_{name}"] = (sum(many.kernels.values()) - sum(few.kernels.values())) / 16
    engine, batch = training(place, model.train(), lora=False)
    micro = engine.module.prepare(batch, place.device)
    with Waits() as seen:
        outcome = engine.forward(micro, dict(micro.counts))
        engine.backward(outcome.loss, last=True)
        report.read(engine.step(1.0).norm, [outcome])
    return out | {
        "waits_a_training_step": seen.total,
        "kernels_a_training_step": sum(seen.kernels.values()),
        "places": str(seen)[:2000],
    }


def decode(place: Place) -> dict[str, Any]:
    """Tokens a second in the text phase, usual and static step."""
    dtype = devices.dtype("auto", place.device)
    model = random_model(model_config(place.tiny), place.device, dtype).eval()
    weights = sum(p.numel() for p in model.lm.llm.parameters()) * dtype.itemsize
    out: dict[str, Any] = {"weights_gb": weights / 1e9}
    for name in ("usual", "static"):
        generator = Generator(model, NoText(), GenerationConfig(guards=Guards.off(), static_step="never"))
        if name == "static":
            generator.use_static_step()
        for batch in (1, 2) if place.tiny else (1, 8, 64):
            few, many = (4, 8) if place.tiny else (16, 144)
            seconds = [place.seconds(lambda n=n, b=batch, g=generator: generated(g, b, n), 2) for n in (few, many)]
            step = max(seconds[1] - seconds[0], 1e-9) / (many - few)
            out[f"{name}_batch{batch}_tokens_s"] = batch / step
            out[f"{name}_batch{batch}_gb_s"] = weights / step / 1e9
    return out | {"peak_gib": devices.peak_memory(place.device) / GIB}


def token2wav(place: Place) -> dict[str, Any]:
    """Seconds of work for a second of sound, whole replies and the first window of a stream; the released size with random weights, or mini's."""

    from osum_echat.token2wav import Speaker, Token2Wav, released_yaml
    from osum_echat.token2wav.config import Token2WavConfig
    from osum_echat.token2wav.flow import FlowModel
    from osum_echat.token2wav.vocoder import Vocoder

    generator = torch.Generator().manual_seed(1)
    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if place.tiny:
            folder = MINI / "token2wav"
        else:
            config = Token2WavConfig()
            released_yaml.write(folder / "cosyvoice.yaml", config)
            torch.save(FlowModel(config.flow).state_dict(), folder / "flow.pt")
            torch.save(Vocoder(config.vocoder).state_dict(), folder / "hift.pt")
        for dtype in ("float32",) if place.tiny else ("float32", "bfloat16"):
            model = Token2Wav.load(folder, str(place.device), dtype)
            codes, mel = model.config.flow.vocab_size, torch.randn(86, 80, generator=generator) - 5.0
            speaker = Speaker(torch.randint(codes, (25,), generator=generator), mel, torch.randn(192, generator=generator))
            reply = torch.randint(codes, (20 if place.tiny else 100,), generator=generator).tolist()
            whole = place.seconds(lambda m=model, r=reply, s=speaker: m.synthesize(r, s))
            first = place.seconds(lambda m=model, r=reply, s=speaker: next(iter(m.stream(r, s))))
            out |= {f"{dtype}_real_time_factor": whole / (len(reply) / 25), f"{dtype}_first_sound_s": first}
    return out


def first_sound(place: Place) -> dict[str, Any]:
    """Mini answers a recording: seconds to the first text, the first sound and the end."""
    from osum_echat import EChat
    from osum_echat.generation.events import TextDelta
    from osum_echat.pipeline.ask import AudioChunk

    echat = EChat.load(MINI, device=str(place.device))
    samples = (0.1 * torch.randn(32_000, generator=torch.Generator().manual_seed(0))).numpy()
    found: list[dict[str, float]] = []
    for _ in range(1 if place.tiny else 6):
        began, seen = time.perf_counter(), dict[str, float]()
        for event in echat.stream((samples, 16_000), speak=True, think="tag"):
            name = {TextDelta: "first_text_s", AudioChunk: "first_sound_s"}.get(type(event))
            if name and name not in seen:
                seen[name] = time.perf_counter() - began
        found.append(seen | {"whole_s": time.perf_counter() - began})
    best = found[1:] or found
    return {name: sorted(f[name] for f in best if name in f)[len(best) // 2] for name in best[0]}


def training(place: Place, model: EChatModel, lora: bool, **changes: Any) -> tuple[SingleEngine, Batch]:
    """An engine and its largest batch: a row of 4,096 positions with a recording, all of it targets behind that."""
    row, frames = (64, 100) if place.tiny else (4096, 1000)
    data = {
        "batch": {"rows": 1, "row_positions": row, "max_frames": frames},
        "limits": {"max_frames": frames, "max_positions": row},
    }
    low = devices.dtype("auto", place.device) == torch.bfloat16
    part = {"encoder": 0.0, "llm": 0.0} if lora else {}
    engine = engine_for(model, place.device, data, precision="bf16" if low else "fp32", lr=part, accumulation=1, **changes)
    return engine, memory.largest_batch(engine.config.data, model.vocabulary, model.config.encoder.mels)


ARMS: dict[str, dict[str, Any]] = {
    "lora_checkpointed": {"lora": True, "recompute": True},
    "lora_selective": {"lora": True, "recompute": "selective"},
    "lora_selective_compiled": {"lora": True, "recompute": False, "compile": True},
    "full_checkpointed": {"lora": False, "recompute": True},
    "full_selective": {"lora": False, "recompute": "selective"},
}


def train(place: Place) -> dict[str, Any]:
    """Steps of one full row: positions a second, useful arithmetic (without what is recomputed), peak memory beside what was rehearsed."""
    out: dict[str, Any] = {}
    for name, arm in ARMS.items():
        if arm["lora"] and importlib.util.find_spec("peft") is None:
            out[name] = "peft is missing"
            continue
        if arm.get("compile") and not devices.runs_triton(place.device):
            out[name] = "needs a compiler on the device"
            continue
        try:
            out[name] = arm_of(place, **arm)
        except torch.OutOfMemoryError as error:
            out[name] = {"failed": str(error).splitlines()[0]}
        devices.empty_cache(place.device)
    failed = [name for name, found in out.items() if isinstance(found, dict) and "failed" in found]
    return out | ({"failed": f"out of memory: {', '.join(failed)}"} if failed else {})


def arm_of(place: Place, lora: bool, recompute: Any, compile: bool = False) -> dict[str, Any]:
    config = model_config(
        place.tiny, activation_checkpointing=recompute, lora=LoraConfig(rank=4 if place.tiny else 64) if lora else None
    )
    model = random_model(config, place.device, devices.dtype("auto", place.device)).train()
    if compile:
        compile_blocks(stages.blocks(model))
    engine, batch = training(place, model, lora)
    micro = engine.module.prepare(batch, place.device)
    devices.reset_peak_memory(place.device)
    engine.rehearse([micro], dict(micro.counts))
    rehearsed = devices.peak_memory(place.device)
    devices.reset_peak_memory(place.device)

    def step() -> None:
        outcome = engine.forward(micro, dict(micro.counts))
        engine.backward(outcome.loss, last=True)
        norm, _ = report.read(engine.step(1e-6).norm, [outcome])
        assert math.isfinite(norm), norm

    seconds = place.seconds(step)
    positions, targets = batch.num_positions, batch.num_targets
    return {
        "positions_s": positions / seconds,
        "targets_s": targets / seconds,
        "useful_tflops": useful_flops(model, positions, targets) / seconds / 1e12,
        "peak_gib": devices.peak_memory(place.device) / GIB,
        "rehearsed_gib": rehearsed / GIB,
    }


def useful_flops(model: EChatModel, positions: int, targets: int) -> float:
    """Of forward and backward: 2 a weight and position forward, 2 for the inputs' gradients, 2 more where the weight is trained. Attention,
    encoder and what is recomputed are left out."""
    blocks = [p for layer in model.lm.llm.get_decoder().layers for p in layer.parameters() if p.ndim > 1]
    heads = [model.lm.text_head.weight, model.lm.speech_head.weight]
    per = [(p, positions) for p in blocks] + [(p, targets) for p in heads]
    return float(sum((6 if p.requires_grad else 4) * p.numel() * count for p, count in per))


def mini(place: Place) -> dict[str, Any]:
    """Training steps a second of the mini model, all of it, in its own batches: what `make mini` needs by arithmetic."""
    from osum_echat.model.checkpoint import load_model

    model = (
        random_model(model_config(True), place.device, torch.float32)
        if place.tiny
        else load_model(MINI)[0].float().to(place.device)
    )
    mels = model.config.encoder.mels
    data = {"batch": {"rows": 8, "row_positions": 512, "max_frames": 8000}, "limits": {"max_frames": 1000, "max_positions": 512}}
    if place.tiny:
        data = {"batch": {"rows": 2, "row_positions": 64, "max_frames": 200}, "limits": {"max_frames": 100, "max_positions": 64}}
    engine = engine_for(model.train(), place.device, data, accumulation=1)
    batch = memory.largest_batch(engine.config.data, model.vocabulary, mels)

    def step() -> None:
        micro = engine.module.prepare(batch, place.device)
        outcome = engine.forward(micro, dict(micro.counts))
        engine.backward(outcome.loss, last=True)
        report.read(engine.step(1e-6).norm, [outcome])

    seconds = place.seconds(step)
    return {"steps_s": 1 / seconds, "targets_s": batch.num_targets / seconds, "targets_a_step": batch.num_targets}


SECTIONS: dict[str, Callable[[Place], dict[str, Any]]] = {
    section.__name__: section for section in (box, correctness, waits, decode, token2wav, first_sound, train, mini)
}
"""In the order of their worth; the limits are in `tools/gpu_check.py`."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="+", choices=SECTIONS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="small models: tries the code, measures nothing")
    parser.add_argument("--out", type=Path, help="write the result as JSON to this file")
    args = parser.parse_args(argv)
    place = Place(devices.resolve(args.device), args.tiny)
    devices.activate(place.device)
    found: dict[str, Any] = {}
    for section in args.sections:
        began = time.perf_counter()
        found[section] = SECTIONS[section](place) | {"seconds": round(time.perf_counter() - began, 2)}
    text = json.dumps(found, indent=1)
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")
    print(text)
    return 1 if any("failed" in values for values in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
