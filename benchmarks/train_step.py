"""Supervised targets a second and peak memory of a training step, against a straightforward padded implementation, in one run.

    python benchmarks/train_step.py                 # tiny and mid-size, a few minutes
    python benchmarks/train_step.py --quick --json  # within 50 s

Both sides take the same samples, weights and AdamW, all parts trained, float32, no activation checkpointing; each runs in a process of its own with one
thread. Time is that thread's CPU time of a whole step (collation, forward, backward, clipping, update), memory the peak of the resident set above what
the process held after a small step to warm up. Ours packs all samples of the step into rows and runs them in one forward; the baseline is `padded_baseline`,
one micro-batch a task, cut by the published loader's limits. Both must give the same mean loss, which is checked. ``scaling_2p``: targets/s of two ranks
(ddp, gloo, on the CPU) over those of one process, each rank with the same number of samples; wall time. With ``--device`` the other numbers are of an
accelerator: its wall clock and its memory. With ``--quick`` both sizes run at the same time, one a core.

What is assumed:

* Samples: the six kinds of task that the published loader tells apart, equally often; user recordings of 2 to 15 s (recognition) and 2 to 8 s (dialogue),
  lengths log-uniform; transcripts of about 4 ids a second, replies of 12 to 60 ids (text chat 20 to 200), a think of 40 to 120 ids more, 100 to 400 speech codes in
  a reply, 4 to 8 codes for each id of a text to speak. Drawn independently: the published loader sorts 500 samples by frames first, which would save it a
  part of the padded *audio*; text and speech would stay as mixed as here.
* Vocabulary: the published one, 151,936 text ids and 4,097 speech classes, at every size (Qwen2.5 has it from 0.5B to 72B). So the heads are most of the work
  of models this small, and that is where most of the gain is. P padded positions, Q real ones, M targets, h the heads' share of the baseline's
  work: the gain is about 1 / (h M/P + (1 - h) Q/P). The output has P/M and P/Q of the samples drawn. At the size of the released model (3B: h about 0.1) it would be little
  more than P/Q: the aim of 4 x holds for small models, and memory (no [positions x classes] matrix) for all.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import missing_package  # noqa: F401 - first: it says what is missing

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from common import add_device, commit, cpu_or_wall, device_of
from padded_baseline import Sample, loss_sum, micro_batches, padded_positions

from osum_echat import device as devices
from osum_echat.data.batch import Batch, Example, SampleInfo, collate
from osum_echat.dialogue.layout import Segment, audio_positions, flatten
from osum_echat.dialogue.vocabulary import Vocabulary
from osum_echat.model.config import AdapterConfig, EncoderConfig, LlmConfig, ModelConfig
from osum_echat.model.echat import EChatModel
from osum_echat.run.config import OptimConfig
from osum_echat.training import stages
from osum_echat.training.config import LossConfig, TrainConfig
from osum_echat.training.distributed import World
from osum_echat.training.engines.single import SingleEngine
from osum_echat.training.objective import Objective
from osum_echat.training.optimizer import Optimizer

SIZES = {  # encoder width and layers, LLM width and layers
    "tiny": (32, 2, 64, 2),
    "mid": (128, 3, 256, 6),
}
TASKS = ("text", "s2t_chat", "text2text", "text2token", "speech2text_token", "speech2text_token_think")
QUICK_TASKS = ("text", "text2text", "speech2text_token")
TEXT_SIZE = 151_936
MELS = 80
ROW = 1024


def build(size: str) -> EChatModel:
    width, layers, dim, llm_layers = SIZES[size]
    llm = {
        "model_type": "qwen2",
        "vocab_size": TEXT_SIZE,
        "hidden_size": dim,
        "intermediate_size": 4 * dim,
        "num_hidden_layers": llm_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    return EChatModel(
        ModelConfig(
            encoder=EncoderConfig(mels=MELS, dim=width, heads=4, ffn=4 * width, layers=layers, max_positions=1500, dropout=0.0),
            adapter=AdapterConfig(dim=width, heads=4, ffn=2 * width, layers=1, max_positions=400, dropout=0.0),
            llm=LlmConfig(config=llm),
            vocabulary=Vocabulary(text_size=TEXT_SIZE, eos_id=2, unknown_id=None, speech_codes=4096),
        )
    ).train()


def make_samples(count: int, vocabulary: Vocabulary, seed: int, tasks: Sequence[str] = TASKS) -> list[Sample]:
    """Samples as the docstring of this file describes them, tasks in turn."""
    rng = np.random.default_rng(seed)

    def between(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    def ids(length: float) -> tuple[int, ...]:
        return tuple(int(i) for i in rng.integers(3, vocabulary.text_size, round(length)))

    def speech(length: float) -> tuple[int, ...]:
        codes = rng.integers(0, vocabulary.speech_codes, round(length))
        return (vocabulary.speech_delimiter, *(vocabulary.speech_id(int(c)) for c in codes), vocabulary.speech_delimiter)

    system, header = ids(45), ids(5)
    out = []
    for number in range(count):
        task = tasks[number % len(tasks)]
        seconds = {"text": between(2, 15), "text2text": 0.0, "text2token": 0.0}.get(task, between(2, 8))
        feats = torch.from_numpy(rng.standard_normal((round(100 * seconds), MELS)).astype(np.float32)) if seconds else None
        prompt, text, codes = system, ids(between(12, 60)), ()
        if task == "text":
            prompt, text = system + ids(between(8, 20)), ids(4 * seconds)
        elif task == "s2t_chat":
            text = ids(between(20, 200))
        elif task == "text2text":
            prompt, text = system + ids(between(8, 60)), ids(between(20, 200))
        elif task == "text2token":
            prompt, text, codes = system + text, (), speech(len(text) * between(4, 8))
        else:
            text = ids(between(40, 120)) + text if task.endswith("think") else text
            codes = speech(between(100, 400))
        out.append(Sample(task, prompt, feats, header, (*text, vocabulary.eos_id) if text else (), codes))
    return out


def pack_samples(samples: list[Sample]) -> Batch:
    """The same samples, packed tightly: longest first, each into the first row that it fits into."""
    examples = []
    for number, sample in enumerate(samples):
        segments = [Segment("prompt", sample.prompt)]
        if sample.feats is not None:
            segments.append(Segment("audio", audio=0))
        segments.append(Segment("header", sample.header))
        segments += [Segment("text", sample.text, supervised=True)] if sample.text else []
        segments += [Segment("speech", sample.speech, supervised=True)] if sample.speech else []
        feats = [sample.feats] if sample.feats is not None else []
        row = flatten(segments, [audio_positions(len(f)) for f in feats], text_softmax=not sample.speech)
        examples.append(Example(SampleInfo(f"s{number}", sample.task), row, feats))
    rows: list[list[int]] = []
    for index in sorted(range(len(examples)), key=lambda i: -examples[i].positions):
        free = [r for r in rows if sum(examples[i].positions for i in r) + examples[index].positions <= ROW]
        (free[0] if free else rows.append([]) or rows[-1]).append(index)
    return collate(examples, MELS, rows)


class Ours:
    """Forward, backward and update as the loop does them."""

    def __init__(self, model: EChatModel, device: torch.device):
        config = TrainConfig(stage="generation", optim=OptimConfig(lr=1e-4), precision="fp32")
        self.objective, self.device = Objective(model, LossConfig()), device
        self.engine = SingleEngine(self.objective, stages.assign(model, config), [], config, World(), device)

    def step(self, batches: list[list[Sample]]) -> float:
        micros = [self.objective.prepare(pack_samples(samples), self.device) for samples in batches]
        totals = {"lm": sum(m.counts["lm"] for m in micros)}
        loss = 0.0
        for i, micro in enumerate(micros):
            outcome = self.engine.forward(micro, totals)
            self.engine.backward(outcome.loss, last=i == len(micros) - 1)
            loss += float(outcome.loss.detach())
        self.engine.step(1.0)
        return loss


class Padded:
    """The baseline with the same optimiser."""

    def __init__(self, model: EChatModel):
        config = TrainConfig(stage="generation", optim=OptimConfig(lr=1e-4), precision="fp32")
        self.model = model
        self.optimizer = Optimizer(stages.assign(model, config), config.optim)

    def step(self, batches: list[list[Sample]]) -> float:
        total, loss = sum(s.targets for samples in batches for s in samples), 0.0
        for samples in batches:
            for group in micro_batches(samples):
                with self.model.device:  # where it makes its tensors
                    part = loss_sum(self.model, group) / total
                part.backward()
                loss += float(part.detach())
        self.optimizer.update(1.0, clip=5.0)
        return loss


def measure(side: str, size: str, tasks: Sequence[str], count: int, steps: int, device_name: str, result: str) -> None:
    """In a process of its own: a small step to warm up, then ``steps`` timed ones; the fastest counts (others share the machine)."""
    torch.set_num_threads(1)
    device = devices.resolve(device_name)
    model = build(size).to(device)
    runner = Ours(model, device) if side == "ours" else Padded(model)
    runner.step([make_samples(1, model.vocabulary, 1, tasks[-1:])])
    devices.reset_peak_memory(device)
    before = devices.memory_allocated(device)
    times, losses = [], []
    for _ in range(steps):
        samples = make_samples(count, model.vocabulary, 0, tasks)
        began = cpu_or_wall(device)
        losses.append(runner.step([samples]))
        times.append((cpu_or_wall(device) - began) / sum(s.targets for s in samples))
    memory = devices.peak_memory(device) - before
    Path(result).write_text(json.dumps({"targets_per_s": 1 / min(times), "memory": memory, "loss": losses[0]}))


def padding(count: int, tasks: Sequence[str]) -> dict[str, float]:
    """Positions of the baseline over real ones (P/Q) and over targets (P/M)."""
    samples = make_samples(count, Vocabulary(text_size=TEXT_SIZE, eos_id=2, unknown_id=None, speech_codes=4096), 0, tasks)
    padded = sum(padded_positions(group) for group in micro_batches(samples))
    return {
        "padded_over_real": padded / sum(s.positions for s in samples),
        "padded_over_targets": padded / sum(s.targets for s in samples),
    }


def rank(size: str, tasks: Sequence[str], count: int, steps: int, rank_: int, world: int, port: int, result: str) -> None:
    """One rank of the scaling run: `count` samples a rank through the real loop's step."""
    from osum_echat.training import distributed
    from osum_echat.training.engines.ddp import DdpEngine

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank_), WORLD_SIZE=str(world), LOCAL_RANK=str(rank_), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    cpu = torch.device("cpu")
    world_ = distributed.start(cpu, needs_group=True)
    config = TrainConfig(stage="generation", optim=OptimConfig(lr=1e-4), precision="fp32")
    model = build(size)
    objective = Objective(model, LossConfig(), run_all_parts=world > 1)
    engine = DdpEngine(objective, stages.assign(model, config), [], config, world_, cpu)
    batches = [objective.prepare(pack_samples(make_samples(count, model.vocabulary, 100 + i, tasks)), cpu) for i in range(world)]
    totals = {"lm": sum(b.counts["lm"] for b in batches)}
    small = objective.prepare(pack_samples(make_samples(1, model.vocabulary, 1, tasks[-1:])), cpu)
    times = []
    for batch in [small] + [batches[rank_]] * steps:
        world_.barrier()
        began = time.perf_counter()
        engine.backward(engine.forward(batch, totals).loss, last=True)
        engine.step(1.0)
        world_.barrier()
        times.append(time.perf_counter() - began)
    if rank_ == 0:
        Path(result).write_text(json.dumps({"targets_per_s": totals["lm"] / min(times[1:])}))
    distributed.stop()


def in_processes(jobs: list[tuple[Any, tuple[Any, ...]]]) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["benchmarks.train_step", "transformers.models.qwen2.modeling_qwen2", "osum_echat.training.engines.ddp"]
    )
    processes = [context.Process(target=target, args=args) for target, args in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a measured process failed with exit code {process.exitcode}")


def scaling(size: str, tasks: Sequence[str], count: int, steps: int, folder: Path) -> float:
    rates = []
    for world in (1, 2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        result = folder / f"scaling{world}.json"
        in_processes([(rank, (size, tasks, count, steps, r, world, port, str(result))) for r in range(world)])
        rates.append(json.loads(result.read_text())["targets_per_s"])
    return rates[1] / rates[0]


def both_sides(
    sizes: Sequence[str], tasks: Sequence[str], count: int, steps: int, device: str, folder: Path
) -> dict[str, dict[str, float]]:
    """Measure ``sizes`` at the same time, first padded, then ours."""
    found: dict[str, dict[str, dict[str, float]]] = {size: {} for size in sizes}
    for side in ("padded", "ours"):
        files = {size: folder / f"{size}-{side}.json" for size in sizes}
        in_processes([(measure, (side, size, tasks, count, steps, device, str(file))) for size, file in files.items()])
        for size, file in files.items():
            found[size][side] = json.loads(file.read_text())
    out = {}
    for size, sides in found.items():
        ours, padded = sides["ours"], sides["padded"]
        if abs(ours["loss"] - padded["loss"]) > 1e-3:
            raise SystemExit(f"{size}: losses differ, {ours['loss']:.6f} and {padded['loss']:.6f}: not the same work")
        out[size] = {
            "speedup": ours["targets_per_s"] / padded["targets_per_s"],
            "memory_ratio": ours["memory"] / padded["memory"],
            "targets_per_s": ours["targets_per_s"],
            "padded_targets_per_s": padded["targets_per_s"],
            "memory_mb": ours["memory"] / 2**20,
            "padded_memory_mb": padded["memory"] / 2**20,
        }
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="three kinds of task, fewer samples, one step, both sizes at the same time: within 50 s",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    add_device(parser)
    args = parser.parse_args(argv)
    device = device_of(args)
    tasks, count, steps = (QUICK_TASKS, 6, 1) if args.quick else (TASKS, 36, 2)
    sizes: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for together in [tuple(SIZES)] if args.quick and device.type == "cpu" else [(size,) for size in SIZES]:
            sizes |= both_sides(together, tasks, count, steps, str(device), Path(name))
        scaling_2p = scaling("mid", tasks, count // 3, steps, Path(name))
    shape = padding(count, tasks)
    for size, numbers in sizes.items():
        print(f"{size:<5}" + "  ".join(f"{k} {v:.3g}" for k, v in numbers.items()), flush=True)
    print("  ".join(f"{k} {v:.3g}" for k, v in shape.items()))
    print(
        f"two processes: {scaling_2p:.2f} x the targets/s of one ({os.cpu_count()} cores, {platform.processor() or platform.machine()})"
    )
    if args.json:
        mid = sizes["mid"]
        print(json.dumps({
            "speedup": round(mid["speedup"], 3), "memory_ratio": round(mid["memory_ratio"], 3), "scaling_2p": round(scaling_2p, 3),
            "sizes": sizes, **shape, "commit": commit(), "cores": os.cpu_count(), "machine": platform.platform(), "device": devices.describe(device), "quick": args.quick,
        }))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
