"""One real optimisation step of the full-size model (3,458.8 M parameters), on a CPU by default: memory and seconds.

    python benchmarks/full_size_step.py                      # adapter only
    python benchmarks/full_size_step.py --lora --threads 2   # LoRA (rank 64) and adapter

The published sizes (`conf/ct_config.yaml`), weights in bfloat16, float32 masters, activation checkpointing, AdamW, clipping: the training code
as it is, with one short made-up sample (a recording of two seconds and twenty target ids). Weights are random numbers of the usual size,
drawn once and repeated, because drawing 3.5 billion takes longer than the step. Needs about 10 GB of free memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import missing_package  # noqa: F401 - first: it says what is missing

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from common import add_device, device_of, now
from torch import nn

from osum_echat import config as config_io
from osum_echat import device as devices
from osum_echat.data.batch import Batch, Example, SampleInfo, collate
from osum_echat.dialogue.layout import Segment, audio_positions, flatten
from osum_echat.model.checkpoint import build_meta
from osum_echat.model.config import LoraConfig, load_config
from osum_echat.model.echat import EChatModel
from osum_echat.training.build import make_trainer
from osum_echat.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
GB = 2**30


def made_up(config: Any) -> EChatModel:
    """The model with bfloat16 weights in memory, without ever holding them in float32."""
    torch.manual_seed(0)
    pattern = torch.randn(1_000_003).mul_(0.02).bfloat16()
    model = build_meta(config)
    placed: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if id(param) not in placed:
                value = torch.empty(param.shape, dtype=torch.bfloat16)
                flat = value.view(-1)
                for start in range(0, flat.numel(), len(pattern)):
                    part = flat[start : start + len(pattern)]
                    part.copy_(pattern[: len(part)])
                if param.dim() == 1 and "norm" in f"{type(module).__name__}".lower() and name == "weight":
                    value.fill_(1.0)
                placed[id(param)] = nn.Parameter(value)
            setattr(module, name, placed[id(param)])
    return model


def sample(model: EChatModel) -> Batch:
    """A transcription of two seconds: instruction, recording, twenty target ids."""
    vocabulary, rng = model.vocabulary, np.random.default_rng(0)
    frames = 200

    def ids(count: int) -> tuple[int, ...]:
        return tuple(int(i) for i in rng.integers(0, 100_000, count))

    segments = [
        Segment("system", ids(40)),
        Segment("audio", (vocabulary.audio_begin,)),
        Segment("audio", audio=0),
        Segment("audio", (vocabulary.audio_end,)),
        Segment("header", ids(5)),
        Segment("text", (*ids(19), vocabulary.eos_id), supervised=True),
    ]
    feats = torch.from_numpy(rng.standard_normal((frames, model.config.encoder.mels)).astype(np.float32))
    row = flatten(segments, [audio_positions(frames)])
    return collate([Example(SampleInfo("made-up", "<TRANSCRIBE>"), row, [feats])], model.config.encoder.mels)


class OneBatch:
    """A loader of one batch an epoch."""

    def __init__(self, batch: Batch):
        self.batch = batch

    def __iter__(self) -> Iterator[Batch]:
        yield self.batch

    def set_epoch(self, epoch: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state, state


def build(layers: int | None, lora: bool, device: torch.device) -> EChatModel:
    """The published model, or one with fewer LLM layers, with LoRA on the LLM if wanted, on the device."""
    fewer = [f"llm.config.num_hidden_layers={layers}"] if layers else []
    model = made_up(load_config(ROOT / "conf/ct_config.yaml", ["activation_checkpointing=true", *fewer]))
    if lora:
        from osum_echat.model.lora import add_lora

        add_lora(model.lm.llm, LoraConfig())
    return model.to(device)


def step(model: EChatModel, device: torch.device, threads: int) -> dict[str, Any]:
    """One step of the trainer's engine: its loss and gradients, seconds of its parts, how many trained numbers it moved."""
    with tempfile.TemporaryDirectory() as out:
        plain = {
            "stage": "understanding",
            "out": out,
            "device": str(device),
            "precision": "bf16",
            "accumulation": 1,
            "max_steps": 1,
            "max_epochs": None,
            "threads": threads,
            "lr": {"encoder": 0.0},
            "safety": {"try_largest_batch": False, "watchdog_seconds": 0.0},
        }
        train = config_io.from_dict(TrainConfig, plain, where="this benchmark")
        trainer = make_trainer(train, model, None, OneBatch(sample(model)), bar=False)  # type: ignore[arg-type]
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        micro = trainer.objective.prepare(trainer.run.loader.batch, device)  # type: ignore[attr-defined]
        times = [now(device)]
        outcome = trainer.engine.forward(micro, micro.counts)
        times.append(now(device))
        trainer.engine.backward(outcome.loss, last=True)
        times.append(now(device))
        result = trainer.engine.step(1.0)
        times.append(now(device))
    # A rate of 1e-6 moves every float32 master, but few of the bfloat16 weights rounded from them.
    masters = {name: master for name, _, master in trainer.engine.optimizer.pairs}  # type: ignore[attr-defined]
    spans = [round(end - begin, 1) for begin, end in itertools.pairwise(times)]
    return {
        "trained": sum(b.numel() for b in before.values()),
        "moved": sum(int((masters[f"model.{n}"] != b.float()).sum()) for n, b in before.items()),
        "updated": result.updated,
        "loss": float(outcome.loss.detach()),
        "grad_norm": result.grad_norm,
        "seconds": dict(zip(("forward", "backward", "update"), spans, strict=True)),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", action="store_true", help="train LoRA on the LLM beside the adapter")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--layers", type=int, help="fewer LLM layers than the published 36, to try the script itself")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    add_device(parser)
    args = parser.parse_args(argv)
    device = device_of(args)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    began = now(device)
    model = build(args.layers, args.lora, device)
    built, weights = now(device) - began, devices.memory_allocated(device)
    done = step(model, device, args.threads)
    found = {
        "parameters": sum(p.numel() for p in model.parameters()),
        **done,
        "seconds": {"build": round(built, 1), **done["seconds"]},
        "memory_gb": {"weights": round(weights / GB, 2), "peak": round(devices.peak_memory(device) / GB, 2)},
        "threads": args.threads,
        "machine": platform.platform(),
        "device": devices.describe(device),
    }
    report(found, args.json)
    return 0 if done["moved"] and done["updated"] else 1


def report(found: dict[str, Any], as_json: bool) -> None:
    for key, value in found.items():
        print(f"{key:<12}{value}")
    if as_json:
        print(json.dumps(found))


if __name__ == "__main__":
    raise SystemExit(main())
