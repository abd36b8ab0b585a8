"""A few seconds of made-up speech and tiny configurations for the tests of token2wav training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from osum_echat import config
from osum_echat.audio import io
from osum_echat.token2wav import released_yaml
from osum_echat.token2wav.config import FlowConfig, Token2WavConfig
from osum_echat.token2wav.flow import FlowModel

PHONES = {"a": (700.0, 1200.0), "i": (300.0, 2200.0), "u": (320.0, 800.0)}
TINY_RUN = {
    "max_steps": 4,
    "threads": 1,
    "log_every": 2,
    "save_every": 100,
    "validate_every": 100,
    "tensorboard": False,
    "ema": 0.9,
}
TINY_TOKENIZER = {"width": 16, "expansion": 2, "blocks_50": 1, "blocks_25": 1, "decoder_blocks": 1}
TINY_FLOW = {
    "vocab_size": 256,
    "input_size": 16,
    "encoder": {"output_size": 16, "attention_heads": 2, "linear_units": 32, "num_blocks": 1},
    "estimator": {
        "channels": [16, 16],
        "attention_head_dim": 8,
        "num_heads": 2,
        "n_blocks": 1,
        "num_mid_blocks": 1,
        "groups": 4,
    },
}
TINY_VOCODER = {
    "base_channels": 16,
    "nb_harmonics": 7,
    "nsf_aligned": True,
    "head": "filter",
    "upsample_rates": [2],
    "upsample_kernel_sizes": [4],
    "istft_n_fft": 512,
    "istft_hop": 128,
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1]],
    "source_resblock_kernel_sizes": [3],
    "source_resblock_dilation_sizes": [[1]],
    "f0_channels": 8,
}
TINY_CRITICS = {"periods": [2], "period_channels": [4, 4], "resolutions": [256], "resolution_channels": 4}


def vowels(names: str, pitch: float, rate: int = 16000, seconds: float = 0.2) -> np.ndarray:
    """Harmonics of ``pitch`` with two resonances a vowel."""
    t = np.arange(int(rate * seconds * len(names))) / rate
    out = np.zeros_like(t)
    which = np.minimum((t / seconds).astype(int), len(names) - 1)
    for k in range(1, int(4000 / pitch)):
        hertz = k * pitch
        gains = [sum(1 / (1 + ((hertz - f) / 120) ** 2) for f in PHONES[n]) for n in names]
        out += np.array(gains)[which] * np.sin(2 * np.pi * hertz * t)
    return (0.3 * out / np.abs(out).max()).astype(np.float32)


def write_records(folder: Path, count: int = 8, tokens: bool = False) -> Path:
    """``list.jsonl`` with ``count`` utterances of two voices (pitch 110 and 200 Hz) and their phone times."""
    rng = np.random.default_rng(0)
    lines = []
    for index in range(count):
        names = "".join(rng.choice(list(PHONES), size=4 + index % 3))
        voice, pitch = (("low", 110.0), ("high", 200.0))[index % 2]
        wav = folder / f"{index}.wav"
        io.write(wav, vowels(names, pitch), 16000)
        extra: dict[str, Any] = {"voice": voice, "phones": [[n, 0.2 * (i + 1)] for i, n in enumerate(names)]}
        if tokens:
            extra["speech_token"] = rng.integers(0, 256, 5 * len(names)).tolist()
        lines.append(json.dumps({"key": f"u{index}", "wav": wav.name, "txt": names, "task": "<TRANSCRIBE>", "extra": extra}))
    path = folder / "list.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_flow(folder: Path, **more: Any) -> Token2WavConfig:
    """A directory with a flow of random weights and tiny size, with guidance, and no other part."""
    folder.mkdir(parents=True)
    found = Token2WavConfig(flow=config.from_dict(FlowConfig, {**TINY_FLOW, **more}))
    released_yaml.write(folder / "cosyvoice.yaml", found)
    torch.manual_seed(1)
    torch.save(FlowModel(found.flow).state_dict(), folder / "flow.pt")
    return found
