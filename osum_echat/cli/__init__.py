"""The `osum-echat` command: one name for everything that a person does with this project.

Each sub-command is a module with ``main(argv) -> exit code``; it is imported when it is called. The scripts at the top of the checkout call
the same functions.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# name: (module with a main, what it does)
COMMANDS = {
    "infer": ("osum_echat.cli.infer", "one utterance or text, every task"),
    "multiturn": ("osum_echat.cli.multiturn", "a dialogue of several recordings"),
    "batch": ("osum_echat.cli.batch", "a whole list (raw, shard or combine) to a results file"),
    "demo": ("osum_echat.cli.demo", "the seven modes on recordings of this repository"),
    "serve": ("osum_echat.cli.serve", "the gradio page"),
    "train": ("osum_echat.training.__main__", "train a stage"),
    "eval": ("recipes.mini.evaluation", "evaluate the mini model"),
    "data": ("osum_echat.cli.data", "look at data: data doctor LIST, data show LIST"),
    "inspect": ("osum_echat.model.inspect", "parts, parameters and keys of a model config or checkpoint"),
    "doctor": ("osum_echat.cli.doctor", "what this machine has and what would run on it"),
}


def usage() -> str:
    lines = ["usage: osum-echat COMMAND [arguments]      (osum-echat COMMAND --help tells more)", ""]
    return "\n".join(lines + [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command. Exit code 2 for an unknown one."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"osum-echat: unknown command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    return int(importlib.import_module(COMMANDS[name][0]).main(rest) or 0)
