#!/usr/bin/env python3
"""The web page: talk, look at the thought, listen to the reply. See --help; the code is osum_echat/serving/page/."""

import sys

from osum_echat.cli import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("page", sys.argv[1:], prog="infer_gradio.py"))
