#!/usr/bin/env python3
"""A dialogue of several recordings, one reply wav a round. See --help; the code is osum_echat/cli/multiturn.py."""

from osum_echat.cli.multiturn import main

if __name__ == "__main__":
    raise SystemExit(main(prog="infer_multiturn.py"))
