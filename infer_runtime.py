#!/usr/bin/env python3
"""One utterance or one text through the model, every task. See --help; the code is osum_echat/cli/infer.py."""

import sys

from osum_echat.cli import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("infer", sys.argv[1:], prog="infer_runtime.py"))
