#!/usr/bin/env python3
"""A dialogue of several recordings, one reply wav a round. See --help; the code is osum_echat/cli/multiturn.py."""

import sys

from osum_echat.cli import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("multiturn", sys.argv[1:], prog="infer_multiturn.py"))
