"""Round a checkpoint's weights to 8 or 4 bits: small on disk, small in memory, fast on CPUs.

    osum-echat quantize checkpoints/mini out/mini-int8
    osum-echat quantize language_think_final.pt out/released-int4 --weights int4 --config conf/ct_config.yaml

The folder is loaded like any other (`--checkpoint OUT`); on an accelerator its weights are expanded. docs/speed.md says
what it costs and gains.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from osum_echat.cli.common import find_checkpoint, run
from osum_echat.model.checkpoint import save_quantized
from osum_echat.model.config import load_config


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=prog or "osum-echat quantize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="mini, a checkpoint folder, a released .pt or .safetensors")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--weights", choices=["int8", "int4"], default="int8", help="bits of the weights (default int8)")
    parser.add_argument("--config", type=Path, help="model config of a bare .pt or .safetensors")
    args = parser.parse_args(argv)

    def write() -> int:
        path = find_checkpoint(args.checkpoint)
        config = load_config(args.config) if args.config is not None else None
        folder = save_quantized(path, args.out, args.weights, config)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        print(f"{folder}: {size / 1e6:.1f} MB of weights in {args.weights}")
        return 0

    return run(write)
