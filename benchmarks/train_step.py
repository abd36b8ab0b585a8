"""Supervised targets a second and peak memory of a training step, against a straightforward padded implementation, in one run.

    python benchmarks/train_step.py                 # tiny and mid-size, a few minutes
    python benchmarks/train_step.py --quick --json  # within 50 s

Both sides take the same samples (mixed length, four kinds of task), the same weights and AdamW; each runs in a process of its own with one
thread: time is that thread's CPU time, memory the peak of the resident set above what the process held before its first step. Ours packs the samples into rows
and runs them in one forward; the baseline is `padded_baseline`. Both give the same mean loss, which is checked. ``scaling_2p``: targets/s of two
ranks (ddp, gloo) with half of the samples each over those of one process with all.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.padded_baseline import Sample, by_task, loss_sum
from osum_echat import device as devices
from osum_echat.data.batch import Batch, Example, collate
from osum_echat.dialogue.layout import Segment, audio_positions, flatten
from osum_echat.dialogue.vocabulary import Vocabulary
from osum_echat.model.config import AdapterConfig, EncoderConfig, LlmConfig, ModelConfig
from osum_echat.model.echat import EChatModel
from osum_echat.training import stages
from osum_echat.training.config import LossConfig, OptimConfig, TrainConfig
from osum_echat.training.distributed import World
from osum_echat.training.engines.single import SingleEngine
from osum_echat.training.objective import Objective
from osum_echat.training.optimizer import Optimizer

SIZES = {  # encoder width and layers, LLM width, layers and text vocabulary; encoder to LLM as in the published model, about 3 : 10
    "tiny": (32, 2, 64, 2, 32_768),
    "mid": (128, 3, 256, 6, 32_768),
}
MELS = 80
ROW = 1024


def build(size: str) -> EChatModel:
    width, layers, dim, llm_layers, text_size = SIZES[size]
    llm = {
        "model_type": "qwen2",
        "vocab_size": text_size,
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
            vocabulary=Vocabulary(text_size=text_size, eos_id=2, unknown_id=None, speech_codes=4096),
        )
    ).train()


def make_samples(count: int, vocabulary: Vocabulary, seed: int) -> list[Sample]:
    """Recordings of 1 to 20 s, labels of 4 to 150 ids, replies of 1 to 14 s at 25 speech codes a second, short ones more often; four tasks."""
    rng = np.random.default_rng(seed)
    system = tuple(int(i) for i in rng.integers(3, 1000, 40))

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(np.exp(rng.uniform(np.log(low), np.log(high))))
        return (*(int(i) for i in rng.integers(3, vocabulary.text_size, length)), vocabulary.eos_id)

    def speech(low: float, high: float) -> tuple[int, ...]:
        codes = rng.integers(0, vocabulary.speech_codes, int(25 * np.exp(rng.uniform(np.log(low), np.log(high)))))
        return (vocabulary.speech_delimiter, *(vocabulary.speech_id(int(c)) for c in codes), vocabulary.speech_delimiter)

    out = []
    for number in range(count):
        task = ("s2t", "s2s", "t2s", "t2t")[number % 4]
        frames = int(100 * np.exp(rng.uniform(0, np.log(20))))
        feats = torch.from_numpy(rng.standard_normal((frames, MELS)).astype(np.float32)) if task in ("s2t", "s2s") else None
        prompt = system + (() if task == "s2s" else ids(4, 30))
        text = () if task == "t2s" else ids(4, 150)
        out.append(Sample(task, prompt, feats, system[:5], text, speech(1, 14) if task in ("s2s", "t2s") else ()))
    return out


def pack_samples(samples: list[Sample]) -> Batch:
    """The same samples, packed tightly: longest first, each into the first row that has room."""
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
        examples.append(Example(f"s{number}", sample.task, row, feats))
    rows: list[list[int]] = []
    for index in sorted(range(len(examples)), key=lambda i: -examples[i].positions):
        free = [r for r in rows if sum(examples[i].positions for i in r) + examples[index].positions <= ROW]
        (free[0] if free else rows.append([]) or rows[-1]).append(index)
    return collate(examples, MELS, rows)


class Ours:
    """Forward, backward and update as the loop does them."""

    def __init__(self, model: EChatModel):
        config = TrainConfig(stage="generation", optim=OptimConfig(lr=1e-4), precision="fp32")
        self.objective = Objective(model, LossConfig())
        self.engine = SingleEngine(self.objective, stages.assign(model, config), [], config, World(), torch.device("cpu"))

    def step(self, batches: list[list[Sample]]) -> float:
        micros = [self.objective.prepare(pack_samples(samples), torch.device("cpu")) for samples in batches]
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
            for group in by_task(samples):
                part = loss_sum(self.model, group) / total
                part.backward()
                loss += float(part.detach())
        self.optimizer.fill_missing_gradients()
        torch.nn.utils.clip_grad_norm_(self.optimizer.parameters, 5.0)
        self.optimizer.step(1.0)
        self.optimizer.zero_grad()
        return loss


def measure(side: str, size: str, count: int, steps: int, result: str) -> None:
    """In a process of its own: one step to warm up, then ``steps`` timed ones; the fastest counts (others share the machine)."""
    torch.set_num_threads(1)
    model = build(size)
    runner = Ours(model) if side == "ours" else Padded(model)
    cpu = torch.device("cpu")
    before = devices.memory_allocated(cpu)
    times, losses = [], []
    for number in range(steps + 1):
        samples = make_samples(count, model.vocabulary, number % 2)
        began = time.process_time()
        losses.append(runner.step([samples]))
        times.append((time.process_time() - began) / sum(s.targets for s in samples))
    memory = devices.peak_memory(cpu) - before
    Path(result).write_text(json.dumps({"targets_per_s": 1 / min(times[1:]), "memory": memory, "loss": losses[0]}))


def rank(size: str, count: int, steps: int, rank_: int, world: int, port: int, result: str) -> None:
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
    objective = Objective(model, LossConfig(), every_room=world > 1)
    engine = DdpEngine(objective, stages.assign(model, config), [], config, world_, cpu)
    batches = [objective.prepare(pack_samples(make_samples(count, model.vocabulary, 100 + i)), cpu) for i in range(world)]
    totals = {"lm": sum(b.counts["lm"] for b in batches)}
    times = []
    for _ in range(steps + 1):
        world_.barrier()
        began = time.perf_counter()
        engine.backward(engine.forward(batches[rank_], totals).loss, last=True)
        engine.step(1.0)
        world_.barrier()
        times.append(time.perf_counter() - began)
    if rank_ == 0:
        Path(result).write_text(json.dumps({"targets_per_s": totals["lm"] / min(times[1:])}))
    distributed.stop()


def in_processes(jobs: list[tuple[Any, tuple[Any, ...]]]) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=args) for target, args in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a measured process failed with exit code {process.exitcode}")


def scaling(size: str, count: int, steps: int, folder: Path) -> float:
    rates = []
    for world in (1, 2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        result = folder / f"scaling{world}.json"
        in_processes([(rank, (size, count, steps, r, world, port, str(result))) for r in range(world)])
        rates.append(json.loads(result.read_text())["targets_per_s"])
    return rates[1] / rates[0]


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or "unknown"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples and steps, within 50 s")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args(argv)
    count, steps = (8, 1) if args.quick else (32, 3)
    sizes: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in SIZES:
            found = {}
            for side in ("padded", "ours"):
                result = folder / f"{size}-{side}.json"
                in_processes([(measure, (side, size, count, steps, str(result)))])
                found[side] = json.loads(result.read_text())
            ours, padded = found["ours"], found["padded"]
            if abs(ours["loss"] - padded["loss"]) > 1e-3:
                raise SystemExit(f"{size}: losses differ, {ours['loss']:.6f} and {padded['loss']:.6f}: not the same work")
            sizes[size] = {
                "speedup": ours["targets_per_s"] / padded["targets_per_s"],
                "memory_ratio": ours["memory"] / padded["memory"],
                "targets_per_s": ours["targets_per_s"],
                "padded_targets_per_s": padded["targets_per_s"],
                "memory_mb": ours["memory"] / 2**20,
                "padded_memory_mb": padded["memory"] / 2**20,
            }
            print(f"{size:<5}" + "  ".join(f"{k} {v:.3g}" for k, v in sizes[size].items()), flush=True)
        scaling_2p = scaling("mid", count // 2, steps, folder)
    print(
        f"two processes: {scaling_2p:.2f} x the targets/s of one ({os.cpu_count()} cores, {platform.processor() or platform.machine()})"
    )
    if args.json:
        mid = sizes["mid"]
        print(json.dumps({
            "speedup": round(mid["speedup"], 3), "memory_ratio": round(mid["memory_ratio"], 3), "scaling_2p": round(scaling_2p, 3),
            "sizes": sizes, "commit": commit(), "cores": os.cpu_count(), "machine": platform.platform(), "quick": args.quick,
        }))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
