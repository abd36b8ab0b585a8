#!/usr/bin/env python3
"""Machines and cost of the released 3.46 B model, on paper: a million utterances, and a thousand live sessions.

    python benchmarks/scale_paper.py            # seconds: shapes are counted on the meta device, nothing is computed

Counted here: operations and bytes of each part from its shapes. Measured elsewhere and taken over: what share of a device's bandwidth our decoding
reaches (docs/speed.md), how long the released token2wav takes on a CPU (benchmarks/results/2026-11-23-token2wav.md), and the rules' time a step
(`scale.py --rules`). Taken from data sheets: bandwidth and peak of accelerators, which nobody lent. Assumed: the shares of them that are reached, and
the price of an hour. docs/scale.md shows the result with the arithmetic; change the numbers of `Load` or `DEVICES` for your own.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

import missing_package  # noqa: F401 - first: it says what is missing
import torch
from torch.utils.flop_counter import FlopCounterMode

from osum_echat.model.checkpoint import build_meta
from osum_echat.model.config import load_config
from osum_echat.token2wav.config import Token2WavConfig
from osum_echat.token2wav.estimator import Estimator


@dataclass(frozen=True)
class Load:
    """One utterance, or one turn of a live session.

    Attributes:
        seconds: of the recording. instruction: positions around it. think, text, codes: ids of the reply (25 codes are one second).
        prompt_seconds: of the voice's prompt in token2wav. every: seconds between two turns of a live session, from commit to commit.
    """

    seconds: float
    instruction: int
    think: int
    text: int
    codes: int
    prompt_seconds: float = 3.0
    every: float = 20.0

    @property
    def prompt(self) -> int:
        return math.ceil(self.seconds * 12.5) + self.instruction

    @property
    def ids(self) -> int:
        return self.think + self.text + self.codes


LABELLING = Load(seconds=10, instruction=20, think=0, text=40, codes=0)
"""A transcript with tags: no speech."""
SPOKEN = Load(seconds=5, instruction=20, think=40, text=30, codes=150)
"""A live turn: 5 s heard, a tag thought, 6 s said."""


@dataclass(frozen=True)
class Device:
    """Data sheet: bandwidth in bytes a second, dense bfloat16 operations a second, memory in bytes; ``price``: dollars an hour (assumed)."""

    name: str
    bandwidth: float
    peak: float
    memory: float
    price: float


DEVICES = (
    Device("H200", 4.8e12, 989e12, 141e9, 3.5),
    Device("A100 80 GB", 2.0e12, 312e12, 80e9, 1.6),
    Device("L40S", 0.864e12, 362e12, 48e9, 1.0),
)
BANDWIDTH_SHARE = 0.5
"""Of the data sheet's bandwidth in decoding. Measured on two CPUs: 0.43 to 0.72 of the copy bandwidth (benchmarks/results/2026-11-28-decode-*.json)."""
PEAK_SHARE = {"dense": 0.35, "flow": 0.15}
"""Of the data sheet's operations: large products (encoder, prefill, decoding of many rows), and token2wav's U-Net of narrow layers."""
HOST_MS = {1: 0.5, 8: 1.0, 32: 2.0, 128: 6.5, 256: 13.0}
"""The rules' Python a step by rows (`scale.py --rules`), and nothing else of the host; it is not overlapped."""
VOCODER_SHARE = 0.11
"""Of the flow's time: 1.0 s beside 9.8 s on a CPU for 4 s of speech."""


@dataclass(frozen=True)
class Parts:
    """Counted from the released shapes: weights of each part, operations of token2wav's flow for a second of speech, bytes of a cached position."""

    encoder: int
    adapter: int
    blocks: int
    heads: int
    position_bytes: int

    def encode(self, load: Load) -> float:
        """Operations: two for each weight and position (attention adds some 3 % at these lengths, left out)."""
        return 2 * load.seconds * (50 * self.encoder + 25 * self.adapter)

    def prefill(self, load: Load) -> float:
        return 2.0 * self.blocks * load.prompt

    @property
    def step_bytes(self) -> float:
        """Of a step in bfloat16; vLLM computes both heads for every row."""
        return 2.0 * (self.blocks + self.heads)


def count_parts() -> Parts:
    config = load_config("package:ct_config.yaml")
    model = build_meta(config)
    llm = config.llm.transformers_config()
    head_dim = llm["hidden_size"] // llm["num_attention_heads"]
    return Parts(
        encoder=_weights(model.encoder),
        adapter=_weights(model.adapter),
        blocks=_weights(model.lm.llm.get_decoder().layers),
        heads=(config.vocabulary.audio_end + 1) * llm["hidden_size"],
        position_bytes=2 * llm["num_hidden_layers"] * llm["num_key_value_heads"] * head_dim * 2,
    )


def _weights(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def flow_flops(load: Load) -> float:
    """Operations of the flow for a reply with its prompt, 10 steps with guidance (two rows); 86 mel frames a second."""
    if not load.codes:
        return 0.0
    config = Token2WavConfig().flow
    frames = round((load.codes / 25 + load.prompt_seconds) * 22050 / 256)
    with torch.device("meta"):
        estimator = Estimator(config.output_size, config.estimator)
        x, speaker = torch.empty(2, frames, config.output_size), torch.empty(2, config.output_size)
        with FlopCounterMode(display=False) as counter:
            estimator(x, x, torch.empty(1), speaker, x)
    return 10.0 * counter.get_total_flops()


def step_seconds(parts: Parts, load: Load, device: Device, rows: int) -> float:
    """A step of ``rows`` rows in the middle of their replies: what memory needs, or arithmetic if that is more, and the host."""
    cached = rows * (load.prompt + load.ids / 2) * parts.position_bytes
    read = (parts.step_bytes + cached) / (device.bandwidth * BANDWIDTH_SHARE)
    compute = rows * parts.step_bytes / (device.peak * PEAK_SHARE["dense"])
    return max(read, compute) + HOST_MS[rows] / 1000


def turn_seconds(parts: Parts, load: Load, device: Device, rows: int, flow: float) -> dict[str, float]:
    """Seconds of one device that a turn takes, by part."""
    dense = device.peak * PEAK_SHARE["dense"]
    sound = flow / (device.peak * PEAK_SHARE["flow"]) * (1 + VOCODER_SHARE)
    return {
        "encoder": parts.encode(load) / dense,
        "prefill": parts.prefill(load) / dense,
        "decode": load.ids * step_seconds(parts, load, device, rows) / rows,
        "token2wav": sound,
    }


def labelling(parts: Parts, device: Device, load: Load, rows: int = 256, utterances: int = 1_000_000) -> dict[str, float]:
    """A list of a million: device-hours and dollars."""
    parts_seconds = turn_seconds(parts, load, device, rows, flow_flops(load))
    hours = utterances * sum(parts_seconds.values()) / 3600
    return {
        **{f"ms {name}": 1000 * value for name, value in parts_seconds.items()},
        "hours": hours,
        "dollars": hours * device.price,
    }


def live(parts: Parts, device: Device, load: Load, sessions: int = 1000, rows: int = 32) -> dict[str, float]:
    """Devices for so many sessions: with ``rows`` answers at once a device is full, and the mean load may be HEADROOM of that."""
    seconds = turn_seconds(parts, load, device, rows, flow_flops(load))
    seconds["token2wav"] *= STREAMING
    turns = sessions / load.every
    devices = math.ceil(turns * sum(seconds.values()) / HEADROOM)
    full = sum(seconds.values()) / seconds["decode"] * step_seconds(parts, load, device, rows)
    return {
        **{f"ms {name}": 1000 * value for name, value in seconds.items()},
        "turns a second": turns,
        "devices at full load": turns * sum(seconds.values()),
        "devices": devices,
        "dollars an hour": devices * device.price,
        "cents a session-hour": 100 * devices * device.price / sessions,
        "codes a second of a row on a full device": 1 / full,
    }


STREAMING = 1.6
"""A stream over the same reply at once: 20 s took 2.3 s for each second in windows, and 4 s took 1.4 (no prompt, 2 threads, CPU)."""
HEADROOM = 0.5
"""Mean load over what a full device does, so that turns that come together still answer at once."""


def row(device: Device, found: dict[str, float]) -> str:
    return (
        f"| {device.name} | "
        + " | ".join(f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in found.values())
        + " |"
    )


def main() -> None:
    parts = count_parts()
    print(json.dumps(asdict(parts)))
    print(
        f"operations of a live turn: encoder {parts.encode(SPOKEN):.2e}, prefill {parts.prefill(SPOKEN):.2e}, flow {flow_flops(SPOKEN):.2e}"
    )
    for title, find in {
        "a million transcripts": lambda device: labelling(parts, device, LABELLING),
        "a million spoken replies": lambda device: labelling(parts, device, SPOKEN),
        "a thousand sessions": lambda device: live(parts, device, SPOKEN),
    }.items():
        print(f"\n{title}")
        for number, device in enumerate(DEVICES):
            found = find(device)
            if not number:
                print(f"| device | {' | '.join(found)} |\n|{'---|' * (len(found) + 1)}")
            print(row(device, found))


if __name__ == "__main__":
    main()
