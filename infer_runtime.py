#!/usr/bin/env python3
"""One utterance or one text through the model, every task. See --help; the code is osum_echat/cli/infer.py."""

from osum_echat.cli.infer import main

if __name__ == "__main__":
    raise SystemExit(main(prog="infer_runtime.py"))
