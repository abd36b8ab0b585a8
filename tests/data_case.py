"""Small data sets for the tests of the data package."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from osum_echat.data.batch import Batch
from osum_echat.data.config import DataConfig, StreamConfig
from osum_echat.data.convert import convert
from osum_echat.data.loader import Loader, build_loader
from osum_echat.data.plain_tokenizer import PlainTokenizer, plain_vocabulary
from osum_echat.dialogue.dialect import Dialect

DIALECT = Dialect(
    instructions={"<TRANSCRIBE>": ("write it down", "写下来"), "<EMOTION>": "how does it sound"}, refuse_unlisted=True
)
MELS = 8


def wav_bytes(seconds: float = 0.3, seed: int = 0, rate: int = 16_000) -> bytes:
    """A short tone with noise, 16 bit."""
    time = np.arange(round(seconds * rate)) / rate
    sound = 0.3 * np.sin(2 * np.pi * (200 + 10 * seed) * time) + 0.01 * np.random.default_rng(seed).standard_normal(len(time))
    buffer = io.BytesIO()
    soundfile.write(buffer, sound, rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def record(number: int, task: str = "<TRANSCRIBE>", **extra: Any) -> dict[str, Any]:
    """A valid record without its recording; labels differ in length."""
    return {"key": f"k{number:03d}", "txt": "好 word " * (1 + number % 7) + str(number), "task": task, "extra": extra}


def write_raw(folder: Path, records: Iterable[Mapping[str, Any]], wavs: Mapping[str, bytes] | None = None) -> str:
    """A raw list whose records without ``wav`` get a recording of their own (``wavs`` by key overrides it; None in a record: none)."""
    (folder / "wav").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, item in enumerate(records):
        item = dict(item)
        if "wav" not in item:
            path = folder / "wav" / f"{number}.wav"
            path.write_bytes((wavs or {}).get(item["key"]) or wav_bytes(0.25 + 0.05 * (number % 9), number))
            item["wav"] = str(path)
        lines.append(json.dumps({k: v for k, v in item.items() if v is not None}, ensure_ascii=False))
    path = folder / "data.list"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def write_shard(folder: Path, records: Iterable[Mapping[str, Any]], per_tar: int = 4, **kwargs: Any) -> str:
    raw = write_raw(folder / "raw", records, **kwargs)
    return convert(raw, str(folder / "shard"), "shard", per_tar=per_tar, workers=1, progress=False).path


def config(streams: Mapping[str, StreamConfig | str], **changes: Any) -> DataConfig:
    """Settings for small lists: no filter on length, prompts given by hand."""
    named = {name: stream if isinstance(stream, StreamConfig) else StreamConfig(stream) for name, stream in streams.items()}
    settings: dict[str, Any] = {"workers": 0, "shuffle_buffer": 5}
    made = DataConfig(streams=named, **(settings | changes))
    made.batch.pool = 8
    made.batch.rows, made.batch.row_positions = 2, 2000
    return made


def loader(
    streams: Mapping[str, StreamConfig | str], rank: int = 0, world_size: int = 1, train: bool = True, **changes: Any
) -> Loader:
    return build_loader(config(streams, **changes), PlainTokenizer(), plain_vocabulary(), DIALECT, MELS, rank, world_size, train)


def same(one: Batch, two: Batch) -> bool:
    """Equal to the bit."""
    tensors = [(getattr(one.rows, n), getattr(two.rows, n)) for n in vars(one.rows)]
    tensors += [(one.feats_NTF, two.feats_NTF), (one.feats_lengths_N, two.feats_lengths_N), (one.sample_N, two.sample_N)]
    return all(torch.equal(a, b) for a, b in tensors) and one.samples == two.samples
