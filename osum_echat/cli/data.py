"""Data tools: `osum-echat data doctor LIST` looks a whole set over without training, `data show LIST` prints what
training would see."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from osum_echat.cli import run_module, table

# name: (module with a main, what it does)
COMMANDS = {
    "doctor": ("osum_echat.data.doctor", "schema errors, durations, label counts, duplicates, tar against jsonl"),
    "show": ("osum_echat.data.show", "samples as training sees them: tasks, shapes, labels, what is left out"),
    "convert": ("osum_echat.data.convert", "raw to shard, shard to combine, and back"),
}


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a data tool. Exit code 2 for an unknown one."""
    prog = prog or "osum-echat data"
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"usage: {prog} COMMAND [arguments]\n\n{table(COMMANDS)}")
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        named = f"unknown command {arguments[0]!r}" if arguments else "a command is missing"
        print(f"{prog}: {named}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run_module(COMMANDS[arguments[0]][0], arguments[1:], f"{prog} {arguments[0]}")
