"""Data tools: `osum-echat data doctor LIST` looks a whole set over without training."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# name: (module with a main, what it does)
COMMANDS = {
    "doctor": ("osum_echat.data.doctor", "schema errors, durations, label counts, duplicates, tar against jsonl"),
    "convert": ("osum_echat.data.convert", "raw to shard, shard to combine, and back"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a data tool. Exit code 2 for an unknown one."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        print("usage: osum-echat data COMMAND [arguments]\n", file=sys.stderr)
        print("\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()), file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    return int(importlib.import_module(COMMANDS[arguments[0]][0]).main(arguments[1:]) or 0)
