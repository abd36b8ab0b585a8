#!/usr/bin/env python3
"""`osum-echat tokens` under its older name."""

from older_name import run

if __name__ == "__main__":
    raise SystemExit(run("tokens"))
