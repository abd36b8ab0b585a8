#!/usr/bin/env python3
"""`osum-echat convert-whisper` under its older name."""

from older_name import run

if __name__ == "__main__":
    raise SystemExit(run("convert-whisper"))
