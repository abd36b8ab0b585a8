#!/usr/bin/env python3
"""Token2wav at full size against the published operations: load, synthesize 4 s, stream 20 s.

    python benchmarks/token2wav.py [--quick] [--json] [--directory DIR] [--output benchmarks/results/NAME.json]

Without ``--directory`` a directory of the released shape is made with random weights (cost does not depend on their values). Both sides
compute the same numbers with the same weights in one process, turn about, and the smallest of the repeated times counts. One-thread
times are CPU seconds, which other work on the machine disturbs least; two-thread times, and those of an accelerator (``--device``), are wall clock.

``speedup`` compares whole syntheses of 4 s in the voice of a 9 s prompt (3 s with --quick) at equal output: float32, one thread. What the
published code computes of the prompt in every call and ours keeps in a `Speaker` counts as far as it is features; its two ONNX models are
left out, since without the released files any stand-in's time would be our invention.

How much can be gained at equal output is bounded by arithmetic. One step with the 3 s prompt is 136 GFLOP of matrix products (linear 91,
attention 33, convolutions 12), ten steps 1.36 TFLOP. At the 100 GFLOP/s that one core of the machine in `benchmarks/results/` reaches in the
largest of these products, they take 13.6 s; the published operations take 18 to 20 s. Were all else free, the flow could be 1.5 times as fast in
float32 and no more; twice is out of reach without fewer or narrower products. ``products_s`` is this bound, counted and measured in the same
run. bfloat16 is narrower: its time stands beside it, with the difference that it makes to the mel.
``last_over_first_chunk`` compares the last with the first three of 20 chunks with a full window.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import missing_package  # noqa: F401 - first: it says what is missing
import token2wav_baseline as baseline
import torch
from common import add_device, commit, cpu_or_wall, device_of, now
from common import seconds as time_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from osum_echat import device as devices
from osum_echat.audio import features
from osum_echat.audio.resample import resample_sinc
from osum_echat.cpu_linear import PackedLinear
from osum_echat.device import cpu
from osum_echat.token2wav import Speaker, StreamConfig, Token2Wav, released_yaml
from osum_echat.token2wav.checkpoint import load_into, read_weights
from osum_echat.token2wav.config import Token2WavConfig, mel_frames
from osum_echat.token2wav.draws import Draws
from osum_echat.token2wav.estimator import Estimator
from osum_echat.token2wav.flow import FlowModel
from osum_echat.token2wav.streaming import FlowStream, SolverOptions, reply_noise
from osum_echat.token2wav.vocoder import Vocoder
from osum_echat.token2wav.vocoder_stream import VocoderStream

STEPS = 10
REPLY_TOKENS = 100  # 4 s
PROMPTS = {"no prompt": (0, 0), "3 s prompt": (75, 258), "9 s prompt": (231, 796)}
CPU = torch.device("cpu")


def write_random_directory(target: Path) -> None:
    """The released shape with random weights."""
    torch.manual_seed(0)
    config = Token2WavConfig()
    released_yaml.write(target / "cosyvoice.yaml", config)
    torch.save(FlowModel(config.flow).state_dict(), target / "flow.pt")
    torch.save(Vocoder(config.vocoder).state_dict(), target / "hift.pt")


def random_speaker(tokens: int, frames: int) -> Speaker:
    generator = torch.Generator().manual_seed(1)
    mel = torch.randn(frames, 80, generator=generator) - 5.0
    return Speaker(torch.randint(4096, (tokens,), generator=generator), mel, torch.randn(192, generator=generator))


def reply(tokens: int) -> Tensor:
    return torch.randint(4096, (tokens,), generator=torch.Generator().manual_seed(2))


def seconds(run: Callable[[], Any], wall: bool, device: torch.device = CPU) -> float:
    return time_of(run, lambda: now(device) if wall else cpu_or_wall(device))


def turn_about(runs: dict[str, Callable[[], Any]], repeats: int, wall: bool, device: torch.device = CPU) -> dict[str, float]:
    """The smallest time of each, taken in turns so that a busy moment meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, wall, device))
    return {name: min(values) for name, values in times.items()}


def product_flops(model: Token2Wav, frames: int) -> int:
    """Operations of one step's matrix products, both guidance rows, counted without computing them."""
    config, rows = model.config.flow, 2
    with torch.device("meta"):
        estimator = Estimator(config.output_size, config.estimator)
        x, speaker = torch.empty(rows, frames, config.output_size), torch.empty(rows, config.output_size)
        with FlopCounterMode(display=False) as counter:
            estimator(x, x, torch.empty(1), speaker, x)
    return counter.get_total_flops()


def product_rate(frames: int, device: torch.device) -> float:
    """Operations a second of the U-Net's largest product, as fast as this machine's kernels do it with the current threads."""
    rows, width, out = frames, 256, 3 * 512  # joined queries, keys and values at half rate, two rows
    x, weight = torch.randn(rows, width, device=device), torch.randn(out, width, device=device)
    packs = device.type == "cpu" and cpu.packs(torch.float32)
    product = PackedLinear(weight, None, rows_hint=rows) if packs else torch.nn.Linear(width, out, bias=False, device=device)
    repeats = 20
    wall = torch.get_num_threads() > 1
    best = min(seconds(lambda: [product(x) for _ in range(repeats)], wall, device) for _ in range(4))
    return repeats * 2.0 * rows * width * out / best


def measure_flow(
    plain: FlowModel, model: Token2Wav, half: FlowModel, prompt: str, threads: int, steps: int, repeats: int
) -> dict[str, float]:
    """Seconds of the flow for 4 s of speech (scaled to ten steps), ours and the baseline's, and how far they are apart."""
    state = model.prompt_state(random_speaker(*PROMPTS[prompt]))
    tokens = reply(REPLY_TOKENS)
    condition = model.flow.condition(tokens, state.tokens_P, state.mel_TM, state.spk_M)
    noise = reply_noise(Draws(0, 80, 9), condition).to(model.device)
    results: dict[str, Tensor] = {}

    def keep(name: str, run: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: results.__setitem__(name, run())

    def published() -> Tensor:
        with model.device:  # where its small tensors are made
            return baseline.solve(plain, condition, noise, steps)

    runs = {
        "baseline": keep("baseline", published),
        "ours": keep("ours", lambda: model.flow.solve([condition], [noise], steps)[0]),
    }
    runs["bfloat16"] = keep("bfloat16", lambda: half.solve([condition], [noise], steps)[0])
    with devices.threads(threads):
        encode = seconds(
            lambda: model.flow.condition(tokens, state.tokens_P, state.mel_TM, state.spk_M), threads > 1, model.device
        )
        times = turn_about(runs, repeats, threads > 1, model.device)
        rate = product_rate(condition.frames, model.device)
    scale = STEPS / steps
    out = {f"{name}_s": encode + scale * value for name, value in times.items()}
    out["speedup"] = out["baseline_s"] / out["ours_s"]
    out["max_difference"] = float((results["ours"] - results["baseline"]).abs().max())
    out["products_tflop"] = STEPS * product_flops(model, condition.frames) / 1e12
    out["products_s"] = 1e12 * out["products_tflop"] / rate
    error = results["bfloat16"] - results["ours"]
    out["bfloat16_speedup"] = out["baseline_s"] / out["bfloat16_s"]
    out["bfloat16_relative_rms"] = float(error.square().mean().sqrt() / results["ours"].std())
    return out


def measure_vocoder(model: Token2Wav, threads: int, repeats: int) -> dict[str, float]:
    """Seconds of the vocoder for 4 s of speech from mel to samples."""
    frames = mel_frames(REPLY_TOKENS)
    mel = (torch.randn(1, 80, frames, generator=torch.Generator().manual_seed(3)) - 5.0).to(model.device)
    draws = Draws(0, 80, 9)
    noise, phase_1H = draws.source(0, frames).to(model.device), draws.phase_1H.to(model.device)
    normed = baseline.NormedVocoder(model.vocoder)
    results: dict[str, Tensor] = {}

    def published() -> None:
        source = model.vocoder.source(normed.f0(mel), phase_1H, noise)
        results["baseline"] = normed.decode(mel, source)

    def ours() -> None:
        source = model.vocoder.source(model.vocoder.f0(mel), phase_1H, noise)
        results["ours"] = model.vocoder.decode(mel, source)

    with devices.threads(threads):
        times = turn_about({"baseline": published, "ours": ours}, repeats, threads > 1, model.device)
    return {
        "baseline_s": times["baseline"],
        "ours_s": times["ours"],
        "speedup": times["baseline"] / times["ours"],
        "max_difference": float((results["ours"] - results["baseline"]).abs().max()),
    }


def measure_prompt(threads: int) -> float:
    """Seconds that the published code spends on features of a 9.2 s prompt in every call, its two ONNX models not counted."""
    wave_48k = 0.1 * torch.randn(int(9.247 * 48_000), generator=torch.Generator().manual_seed(4))

    def run() -> None:
        wave_22k = resample_sinc(wave_48k, 48_000, 22_050)
        wave_16k = resample_sinc(wave_22k, 22_050, 16_000)
        features.mel_22k(wave_22k)
        features.kaldi_fbank(wave_16k)
        features.LogMel(128)(wave_16k)

    with devices.threads(threads):
        run()
        return seconds(run, threads > 1)


def measure_stream(model: Token2Wav, config: StreamConfig, steps: int, chunks: int) -> dict[str, Any]:
    """CPU seconds of each chunk (flow and vocoder) of a long reply: the starting ones, then ``chunks`` with a full window.

    Memory is the growth of the peak while these run.
    """
    draws = Draws(0, 80, 9)
    prompt = model.prompt_state(random_speaker(*PROMPTS["no prompt"]))
    flow = FlowStream(model.flow, prompt, draws, config, SolverOptions(steps))
    voice = VocoderStream(model.vocoder, draws)
    costs: list[float] = []
    frames: list[int] = []
    full: list[bool] = []
    start = cpu_or_wall(model.device)
    generator = torch.Generator().manual_seed(5)
    with devices.threads(1):
        while sum(full) < chunks + 1:  # the first with a full window still has a short piece in the vocoder
            begun = flow._start >= config.left_context and flow._hop >= config.hop
            mel = flow.push(int(torch.randint(4096, (1,), generator=generator)))
            if mel is None:
                continue
            samples = voice.push(mel)
            read = cpu_or_wall(model.device)
            costs.append(read - start)
            frames.append(len(samples) // 256)
            full.append(begun)
            start = cpu_or_wall(model.device)
    steady = [c for c, f in zip(costs, full, strict=True) if f][1:]
    first, last = sorted(steady[:3])[1], sorted(steady[-3:])[1]
    return {
        "chunk_s": [round(c, 3) for c in costs],
        "chunk_frames": frames,
        "steady_chunks": len(steady),
        "steps": steps,
        "streamed_s": sum(frames) * 256 / 22050,
        "last_over_first_chunk": last / first,
    }


def hardware() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit(),
        "cpu": cpu,
        "cores": torch.multiprocessing.cpu_count(),
        "memory_gib": round(devices.total_memory(CPU) / 2**30, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def run(directory: Path, quick: bool, device: torch.device = CPU) -> dict[str, Any]:
    """All measurements; see the module's docstring for the three headline numbers."""
    start = now(device)
    model = Token2Wav.load(directory, device=str(device))
    out: dict[str, Any] = {"quick": quick, **hardware(), "device": devices.describe(device), "load_s": now(device) - start}
    state = read_weights(directory, "flow")[0]
    # Ours is prepared for inference and has no layers left that the baseline could call.
    plain, half = (FlowModel(model.config.flow).eval() for _ in range(2))
    for other in (plain, half):
        load_into(other.to(device), state, "flow")
    half.prepare(torch.bfloat16)
    headline = "3 s prompt" if quick else "9 s prompt"
    flow: dict[str, Any] = {}
    vocoder: dict[str, Any] = {}
    for threads in (1,) if quick or device.type != "cpu" else (1, 2):
        vocoder[f"{threads} thread(s)"] = measure_vocoder(model, threads, 2 if quick else 3)
        for prompt in [headline] if quick else PROMPTS:
            flow[f"{prompt}, {threads} thread(s)"] = measure_flow(plain, model, half, prompt, threads, 1, 2 if quick else 3)
    out |= {"flow": flow, "vocoder": vocoder, "prompt_features_s": measure_prompt(1)}
    stream = StreamConfig(first_hop=8, hop=8, left_context=8, look_ahead=5) if quick else StreamConfig()
    out["stream"] = measure_stream(model, stream, 1 if quick else 2, 20)
    theirs, ours = (flow[f"{headline}, 1 thread(s)"][k] + vocoder["1 thread(s)"][k] for k in ("baseline_s", "ours_s"))
    spoken = mel_frames(REPLY_TOKENS) * 256 / 22050
    out["peak_memory_gib"] = devices.peak_memory(device) / 2**30
    out["speedup"] = (theirs + out["prompt_features_s"]) / ours
    out["last_over_first_chunk"] = out["stream"]["last_over_first_chunk"]
    out["rtf"] = ours / spoken
    out["total_s"] = now(device) - start
    return out


def report(result: dict[str, Any]) -> None:
    print(f"{result['cpu']}, {result['cores']} cores, torch {result['torch']}, commit {result['commit']}, {result['date']}")
    print(f"load {result['load_s']:.1f} s, peak memory {result['peak_memory_gib']:.2f} GiB")
    for part in ("flow", "vocoder"):
        for name, row in result[part].items():
            line = f"{part}, {name}: baseline {row['baseline_s']:.2f} s, ours {row['ours_s']:.2f} s, {row['speedup']:.2f} x"
            line += f" (largest difference {row['max_difference']:.1e})"
            if part == "flow":
                line += f"; bound of its products {row['products_s']:.2f} s; bfloat16 {row['bfloat16_s']:.2f} s, {row['bfloat16_speedup']:.2f} x, relative RMS {row['bfloat16_relative_rms']:.1e}"
            print(line)
    print(f"prompt features that a call no longer computes: {result['prompt_features_s']:.2f} s and two ONNX models")
    print(f"stream: chunks of {result['stream']['chunk_s']} s")
    print(
        f"speedup {result['speedup']:.2f}, last/first chunk {result['last_over_first_chunk']:.2f}, real-time factor {result['rtf']:.2f}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases and solver steps, within 50 s")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--directory", type=Path, default=None, help="a released token2wav directory instead of random weights")
    add_device(parser)
    parser.add_argument("--output", type=Path, default=None, help="also write the JSON object to this file")
    args = parser.parse_args(argv)
    device = device_of(args)
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        directory = args.directory
        if directory is None:
            directory = Path(scratch)
            with torch.inference_mode(False):
                write_random_directory(directory)
        result = run(directory, args.quick, device)
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result)) if args.json else report(result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
