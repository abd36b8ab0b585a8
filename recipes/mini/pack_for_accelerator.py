"""The lists of a mini training as one small folder that trains elsewhere: log-mels instead of recordings, one byte a number.

    python -m recipes.mini.pack_for_accelerator --config out/mini/conf/stage.yaml --out packed --hours 5
    python tools/pack_tree.py tree.tar.gz --add packed          # then, on the other machine, in the tree:
    python -m recipes.mini.pack_for_accelerator --train packed --steps 2000 --out out/longest device=auto

A training list becomes batches as the loader makes them (one epoch, augmentation included, or several), stored shard by
shard: ids as they are, log-mels in 8 bits a recording (scale and offset each; the error is at most half a 255th of its
range, 0.004 of the features' unit, below what spec-augment changes). A shard that is there is not written again; a folder
of another config or another list is refused. ``--train`` runs the ordinary loop on them, and resumes as it does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from osum_echat import config as config_io
from osum_echat.data.batch import Batch, SampleInfo
from osum_echat.dialogue.packing import PackedRows
from osum_echat.run.files import write_atomically

log = logging.getLogger(__name__)
FRAMES_PER_HOUR = 360_000
BATCHES_PER_SHARD = 64
_INDEX = "index.json"


def rounded(feats_NTF: Tensor, lengths_N: Tensor) -> dict[str, Tensor]:
    """Log-mels in 8 bits: codes of all valid frames end to end, scale and offset of each recording."""
    valid = [feats_NTF[n, :length] for n, length in enumerate(lengths_N.tolist())]
    lows = torch.tensor([float(f.min()) for f in valid])
    scales = torch.tensor([max(float(f.max() - f.min()), 1e-6) / 255 for f in valid])
    codes = [((f - low) / scale).round().clamp(0, 255).to(torch.uint8) for f, low, scale in zip(valid, lows, scales, strict=True)]
    none = torch.zeros(0, feats_NTF.shape[2], dtype=torch.uint8)
    return {"codes": torch.cat(codes) if codes else none, "low": lows, "scale": scales, "lengths": lengths_N}


def restored(packed: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What `rounded` made, as padded features [N, T, F] and lengths [N]."""
    lengths_N = packed["lengths"]
    longest = int(lengths_N.max()) if len(lengths_N) else 0
    feats_NTF = torch.zeros(len(lengths_N), longest, packed["codes"].shape[1])
    for n, codes in enumerate(packed["codes"].split(lengths_N.tolist())):
        feats_NTF[n, : len(codes)] = codes.float() * packed["scale"][n] + packed["low"][n]
    return feats_NTF, lengths_N


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """A batch as small tensors."""
    small = {f"rows.{name}": value if value.dtype == torch.bool else value.int() for name, value in vars(batch.rows).items()}
    return {**small, **rounded(batch.feats_NTF, batch.feats_lengths_N), "sample": batch.sample_N.int()}


def batch_of(tensors: dict[str, Tensor], samples: list[dict[str, Any]]) -> Batch:
    rows = {name[5:]: t if t.dtype == torch.bool else t.long() for name, t in tensors.items() if name.startswith("rows.")}
    infos = [SampleInfo(**{**s, "transcripts": tuple(tuple(t) for t in s["transcripts"])}) for s in samples]
    return Batch(PackedRows(**rows), *restored(tensors), infos, tensors["sample"].long())


def pack(batches: Iterator[Batch], out: Path, hours: float, made_of: str) -> int:
    """Write shards until ``hours`` of sound are packed or nothing is left; one that is there is not written again. Shards in all.

    Args:
        made_of: the fingerprint of what the batches come from.

    Raises:
        ValueError: the folder holds shards of something else.
    """
    index = json.loads((out / _INDEX).read_text(encoding="utf-8")) if (out / _INDEX).is_file() else {}
    if index.get("made_of") != made_of and (index or any(out.glob("shard_*.safetensors"))):
        raise ValueError(f"{out} holds shards of another config or another list: give another --out, or remove it")
    _write_index(out, {**index, "made_of": made_of})
    frames, number = 0, 0
    while frames < hours * FRAMES_PER_HOUR:
        group = [batch for _, batch in zip(range(BATCHES_PER_SHARD), batches, strict=False)]
        if not group:
            break
        frames += sum(int(batch.feats_lengths_N.sum()) for batch in group)
        file = _shard(out, number)
        if not file.is_file():
            tensors = {f"{i}/{name}": t.contiguous() for i, b in enumerate(group) for name, t in tensors_of(b).items()}
            facts = {"samples": json.dumps([[asdict(s) for s in b.samples] for b in group], ensure_ascii=False)}
            write_atomically(file, lambda path, t=tensors, f=facts: save_file(t, path, f))
        number += 1
    _write_index(out, {"shards": number, "frames": frames, "made_of": made_of})
    return number


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:04d}.safetensors"


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    write_atomically(folder / _INDEX, lambda path: path.write_text(json.dumps(index), encoding="utf-8"))


class PackedLoader:
    """Batches of a packed folder, another order of shards each epoch; a `training.loop.Loader`."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8")) if (folder / _INDEX).is_file() else {}
        if "shards" not in index:
            raise ValueError(f"{folder} holds no whole {_INDEX}: packing has not ended; start it again with the same command")
        self._files = [_shard(folder, number) for number in range(index["shards"])]
        self._epoch = self._done = 0

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self._files), generator=torch.Generator().manual_seed(self._epoch)).tolist()
        at = 0
        for number in order:
            for batch in _read(self._files[number]):
                at += 1
                if at > self._done:
                    self._done = at
                    yield batch
        self._epoch, self._done = self._epoch + 1, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch, self._done = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch, self._done = state["epoch"], state["done"]


def _read(file: Path) -> Iterator[Batch]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        samples = json.loads(opened.metadata()["samples"])
    tensors = load_file(file)
    for number, infos in enumerate(samples):
        yield batch_of({k.split("/", 1)[1]: t for k, t in tensors.items() if k.startswith(f"{number}/")}, infos)


def make(config_file: Path, overrides: list[str], out: Path, hours: float) -> int:
    """Pack the training list of a config."""
    from osum_echat.data.loader import build_loader
    from osum_echat.training.config import TrainConfig
    from osum_echat.training.weights import load_start

    config = config_io.load(TrainConfig, config_file, overrides)
    config = replace(config, data=replace(config.data, features="torch"))  # here, and the same whatever is installed
    model, tokenizer = load_start(config)
    loader = build_loader(config.data, tokenizer, model.vocabulary, model.config.dialect, model.config.encoder.mels)
    out.mkdir(parents=True, exist_ok=True)

    def epochs() -> Iterator[Batch]:
        while True:
            yield from loader

    settings = [config.data, model.vocabulary, model.config.dialect, model.config.encoder]
    lists = [source.name for stream in loader.streams for source in stream.sources]
    shards = pack(epochs(), out, hours, fingerprint(settings, lists))
    without_lists = replace(config, data=replace(config.data, streams={}), validation=None, encoder_cache=None)
    (out / "config.yaml").write_text(config_io.to_yaml(without_lists), encoding="utf-8")
    return shards


def fingerprint(settings: Sequence[Any], lists: Sequence[str]) -> str:
    """Of the config sections that batches depend on, and of the files of all lists."""
    digest = hashlib.sha256("".join(config_io.to_yaml(section) for section in settings).encode())
    for name in lists:
        digest.update(name.encode())
        with open(name, "rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
    return digest.hexdigest()


def train(folder: Path, overrides: list[str], out: Path, steps: int) -> int:
    """Train on a packed folder as its config says; goes on where it stopped."""
    from osum_echat.training.build import make_trainer
    from osum_echat.training.config import TrainConfig
    from osum_echat.training.weights import load_start

    settings = [f"out={out}", f"max_steps={steps}", "max_epochs=null", *overrides]
    config = config_io.load(TrainConfig, folder / "config.yaml", settings)
    model, tokenizer = load_start(config)
    trainer = make_trainer(config, model, tokenizer, PackedLoader(folder))
    trainer.resume()
    return trainer.fit().step


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="training config whose lists are packed")
    parser.add_argument("--hours", type=float, default=5.0, help="of sound: 29 MB an hour with 80 mels")
    parser.add_argument("--train", type=Path, help="a packed folder to train on")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="key=value")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if (args.config is None) == (args.train is None):
        parser.error("give --config to pack, or --train to train on what was packed")
    if args.config is not None:
        print(f"{args.out}: {make(args.config, args.overrides, args.out, args.hours)} shards")
    else:
        print(f"{args.out}: step {train(args.train, args.overrides, args.out, args.steps)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
