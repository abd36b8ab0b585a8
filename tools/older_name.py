"""The scripts in this folder are older names of `osum-echat` commands."""

import sys
from pathlib import Path


def run(command: str) -> int:
    """Run ``osum-echat COMMAND`` with the script's arguments. Exit code 2 when this Python lacks the package."""
    try:
        from osum_echat.cli import run_command
    except ModuleNotFoundError as error:
        print(
            f"{Path(sys.argv[0]).name}: this Python has no {error.name}; in the checkout run `make venv`, then .venv/bin/osum-echat {command}",
            file=sys.stderr,
        )
        return 2
    return run_command(command, sys.argv[1:])
