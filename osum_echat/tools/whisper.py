"""Turn a published Whisper checkpoint into encoder weights of this model.

    osum-echat convert-whisper whisper-medium/          encoder.safetensors   # Hugging Face folder
    osum-echat convert-whisper tiny.en.pt               encoder.safetensors   # OpenAI's file
    osum-echat convert-whisper faster-whisper-tiny.en/  encoder.safetensors --dtype float16   # CTranslate2 folder

The file holds the encoder alone, named as in `osum_echat.model`; its sizes are printed as YAML for the model config and
kept in the file's metadata. `osum_echat.model.checkpoint.load_parts` puts it into a model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from osum_echat import config as config_io
from osum_echat import device as devices
from osum_echat.model.whisper import read_whisper


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="Whisper in any published form")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"], help="how weights are stored")
    args = parser.parse_args(argv)

    import torch
    from safetensors.torch import save_file

    try:
        config, state = read_whisper(args.source)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    dtype = devices.dtype(args.dtype, torch.device("cpu"))
    args.target.parent.mkdir(parents=True, exist_ok=True)
    partial = args.target.with_name(args.target.name + ".partial")
    metadata = {"format": "pt", "encoder": json.dumps(dataclasses.asdict(config))}
    save_file({f"encoder.{name}": tensor.to(dtype) for name, tensor in state.items()}, partial, metadata=metadata)
    partial.replace(args.target)
    print(config_io.to_yaml({"encoder": config_io.to_dict(config)}), end="")
    print(f"# {sum(t.numel() for t in state.values()) / 1e6:.1f} M parameters in {args.target}")
    return 0
