"""Look at a model without allocating it: parts, parameters, memory; and whether a checkpoint fits.

    python -m osum_echat.model.inspect conf/ct_config.yaml
    python -m osum_echat.model.inspect conf/ct_config.yaml --checkpoint language_think_final.pt
    python -m osum_echat.model.inspect checkpoints/mini

Shapes come from the meta device and from file headers; no weight is read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from osum_echat.model.checkpoint import CONFIG_FILE, build_meta
from osum_echat.model.config import ModelConfig, load_config
from osum_echat.model.echat import EChatModel
from osum_echat.model.parts import PARTS, part_of
from osum_echat.model.released import is_released, match, spec_of
from osum_echat.model.storage import open_source
from osum_echat.rates import ENCODER_FRAMES_PER_SECOND, POSITIONS_PER_SECOND

_CACHE_POSITIONS = 1000


def parts_of(model: EChatModel) -> dict[str, int]:
    """Distinct parameters of each part that the model has; a tied head counts once, in the LLM."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return {part: count for part, count in counts.items() if count}


def kv_bytes_per_position(model: EChatModel, bytes_per_number: int = 2) -> int:
    """Bytes that one position takes in the key/value cache."""
    config = model.lm.llm.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * bytes_per_number


def report(config: ModelConfig) -> list[str]:
    """The lines that are printed for a config."""
    model = build_meta(config)
    parts = parts_of(model)
    total = sum(parts.values())
    lines = [f"{'part':<18}{'parameters':>16}{'share':>8}{'bf16 GB':>9}"]
    for name, count in [*parts.items(), ("all", total)]:
        lines.append(f"{name:<18}{count:>16,}{count / total:>8.1%}{count * 2 / 1e9:>9.2f}")
    buffers = sum(b.numel() for b in model.buffers())
    cache = kv_bytes_per_position(model) * _CACHE_POSITIONS / 1e6
    lines += [
        "",
        f"inference   weights {_gb(2 * total)} in bfloat16, {_gb(4 * total)} in float32; tables {_gb(4 * buffers)}; "
        f"cache {cache:.1f} MB for each {_CACHE_POSITIONS} positions of a row (bfloat16)",
        f"training    all of it in bfloat16 with float32 master weights and AdamW: {_gb(16 * total)} "
        "(2 weights + 2 gradients + 4 master + 8 moments a parameter), plus activations",
        f"vocabulary  {config.vocabulary.text_size:,} text + {config.vocabulary.speech_classes:,} speech classes; "
        f"audio {POSITIONS_PER_SECOND:.1f} positions a second, at most {config.encoder.max_positions / ENCODER_FRAMES_PER_SECOND:.0f} s",
    ]
    return lines


def check(config: ModelConfig, checkpoint: Path) -> list[str]:
    """Compare a checkpoint's keys and shapes with a config. Raises CheckpointError when they do not fit."""
    source = open_source(checkpoint)
    spec = spec_of(build_meta(config))
    chosen = match(source.shapes, spec)
    names = "published names" if is_released(source.shapes) else "names of this project"
    return [f"{checkpoint}: {len(source.shapes)} tensors, {names}; all {len(chosen)} entries of the model are there and fit"]


def _gb(number: int) -> str:
    return f"{number / 1e9:.2f} GB"


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Exit code 0; 1 when the checkpoint does not fit; 2 for a config that cannot be read."""
    parser = argparse.ArgumentParser(
        prog=prog or "osum_echat.model.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="a model config, or a checkpoint folder with one")
    parser.add_argument(
        "--checkpoint", type=Path, help="a checkpoint whose keys and shapes are compared (default: the folder's own)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the config, for example adapter.layers=2")
    args = parser.parse_intermixed_args(argv)
    checkpoint = args.checkpoint or (args.config if args.config.is_dir() else None)
    try:
        config = load_config(args.config / CONFIG_FILE if args.config.is_dir() else args.config, args.overrides)
        print("\n".join(report(config)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if checkpoint is None:
        return 0
    try:
        print("\n" + "\n".join(check(config, checkpoint)))
    except ValueError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
