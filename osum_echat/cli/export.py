"""A checkpoint's language model for another engine.

    osum-echat export --for vllm mini out/mini-vllm
    osum-echat export --for vllm language_think_final.pt out/released-vllm --dtype bfloat16

The folder holds a plain Qwen2 whose vocabulary is text and speech in one. `--llm-engine vllm --vllm-folder DIR` (serve,
batch, eval, infer) decodes with it; encoder, adapter and token2wav stay in the checkpoint. docs/scale.md says what runs
where.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from osum_echat.cli.common import find_checkpoint, run


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=prog or "osum-echat export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--for", dest="engine", choices=["vllm"], required=True, help="the engine")
    parser.add_argument("checkpoint", help="mini, a checkpoint folder, a released .pt or .safetensors")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--config", help="model config of a bare .pt or .safetensors (default: the released model's)")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="what vLLM computes in: auto (default: bfloat16 for large models, float32 for small ones), float32, bfloat16, float16",
    )
    parser.add_argument("--profile", help="published prompt profile: as_trained or as_released")
    args = parser.parse_args(argv)

    def write() -> int:
        from osum_echat.pipeline.load import export_vllm

        path = find_checkpoint(args.checkpoint)
        config = args.config or ("package:ct_config.yaml" if path.is_file() else None)
        folder = export_vllm(path, args.out, config, args.dtype, args.profile)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        print(f"{folder}: a Qwen2 for vLLM, {size / 1e6:.1f} MB of weights")
        return 0

    return run(write)
