"""Turn a checkpoint of any form into another.

    osum-echat convert language_think_final.pt  model.safetensors              # one file, names of this project
    osum-echat convert language_think_final.pt  checkpoints/language           # folder for EChat.load and the hub (shards)
    osum-echat convert checkpoints/language     language_think.pt              # the published form, 888 keys
    osum-echat convert exp/run/step_1250        step_1250.pt                   # DeepSpeed folder (either naming)
    osum-echat convert out/stage3               checkpoints/stage3             # training run of this project, ready to answer

The kind of the target is told by its name: .pt is the published form, .safetensors one file, anything else a checkpoint
folder (config.yaml, model.safetensors or shards, tokenizer/). A folder made of a training run also gets the decoding
settings and the token2wav of the checkpoint that the run started from, so that it answers as it is, and LoRA is merged.
Tensors are read one by one from memory-mapped files; nothing is unpickled but tensors.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from osum_echat.model import checkpoint as model_io
from osum_echat.model.config import ModelConfig, load_config
from osum_echat.model.echat import EChatModel
from osum_echat.model.lora import merge_lora
from osum_echat.model.released import spec_of
from osum_echat.model.storage import Storage, open_source, stored, write_safetensors
from osum_echat.training.folder import is_training_folder

FULL_SIZE = "package:ct_config.yaml"


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Exit code 0, or 2 with a message when a file or an argument cannot be used."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--config", type=Path, help="model config (default: the source folder's own, else the released model's)")
    parser.add_argument("--tokenizer", help="folder or hub name of the tokenizer to put into a folder (default: the source's)")
    parser.add_argument("--no-tokenizer", action="store_true", help="write a folder without a tokenizer")
    parser.add_argument("--merge-lora", action="store_true", help="add LoRA adapters to the weights they adapt")
    parser.add_argument(
        "--storage",
        default="keep",
        choices=["keep", "float32", "bfloat16", "float16", "int8"],
        help="data type on disk; int8 keeps a scale a row and is expanded when loaded (not for .pt)",
    )
    parser.add_argument("--keep-lora", action="store_true", help="of a training run: leave LoRA adapters as they are")
    parser.add_argument("--generation", type=Path, help="of a training run: decoding settings (default: those of its start)")
    parser.add_argument("--token2wav", type=Path, help="of a training run: token2wav folder (default: that of its start)")
    parser.add_argument("--text-only", action="store_true", help="of a training run: without token2wav, for answers in text")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="a folder's files are not larger than this")
    args = parser.parse_args(argv)
    try:
        convert(args)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {args.target}")
    return 0


def convert(args: argparse.Namespace) -> None:
    """Convert as the arguments say. Raises ValueError for what cannot be done."""
    if args.target.suffix == ".pt" and args.storage == "int8":
        raise ValueError("the published form has no 8-bit storage; take float16 or bfloat16")
    if is_training_folder(args.source):
        _convert_run(args)
        return
    config, tensors = _from_file(args)
    write(config, tensors, None, args)


def _convert_run(args: argparse.Namespace) -> None:
    from osum_echat.training import companions
    from osum_echat.training.weights import load_run

    model, tokenizer = load_run(args.source)
    to_folder = args.target.suffix not in (".pt", ".safetensors")
    beside = companions.Companions()
    if to_folder:  # before anything is written
        beside = companions.find(args.source, model.config, args.generation, args.token2wav, args.text_only)
    config, tensors = _in_memory(model, not args.keep_lora)
    write(config, tensors, tokenizer, args)
    if to_folder:
        beside.copy(args.target)


def write(config: ModelConfig, tensors: Mapping[str, Tensor], tokenizer: Any, args: argparse.Namespace) -> None:
    """Write lazily read clean tensors as the target's name asks."""
    model = model_io.build_meta(config)
    target: Path = args.target
    if target.suffix == ".pt":
        state = {name: stored(name, tensor, args.storage)[name] for name, tensor in tensors.items()}
        model_io.save_released(state, spec_of(model), target)
        return
    if target.suffix == ".safetensors":
        _write_file(tensors.items(), target, args.storage)
        return
    if not args.no_tokenizer:
        tokenizer = tokenizer if tokenizer is not None and args.tokenizer is None else _tokenizer(args, config)
    model_io.save_model(
        model,
        None if args.no_tokenizer else tokenizer,
        target,
        args.storage,
        max_shard_bytes=int(args.max_shard_gb * 2**30),
        state=tensors,
    )


def _tokenizer(args: argparse.Namespace, config: ModelConfig) -> Any:
    try:
        return model_io.load_tokenizer(args.source, config, args.tokenizer)
    except ValueError as error:
        raise ValueError(f"{error}; or write the folder without one (--no-tokenizer)") from error


def _from_file(args: argparse.Namespace) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    own = args.source / model_io.CONFIG_FILE
    config = load_config(args.config or (own if own.is_file() else FULL_SIZE))
    if args.merge_lora:
        if config.lora is None:
            raise ValueError("--merge-lora: the config has no lora: section; add the one that the adapters were trained with")
        return _in_memory(model_io.load_weights(args.source, config), True)
    tensors = model_io.clean_tensors(open_source(args.source), spec_of(model_io.build_meta(config)))
    return config, tensors


def _in_memory(model: EChatModel, merge: bool) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    config = model.config
    if merge and config.lora is not None:
        merge_lora(model)
        config = dataclasses.replace(config, lora=None)
    return config, model_io.clean_state(model)


def _write_file(tensors: Iterable[tuple[str, Tensor]], target: Path, storage: Storage) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_safetensors(tensors, partial, storage, max_shard_bytes=2**62)
    (partial / "model.safetensors").replace(target)
    partial.rmdir()
