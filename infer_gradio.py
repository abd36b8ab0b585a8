#!/usr/bin/env python3
"""The web page: talk, look at the thought, listen to the reply. See --help; the code is osum_echat/serving/page.py."""

from osum_echat.cli.serve import main

if __name__ == "__main__":
    raise SystemExit(main(prog="infer_gradio.py"))
