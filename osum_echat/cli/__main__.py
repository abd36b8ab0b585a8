"""`python -m osum_echat.cli COMMAND ...`, the same as `osum-echat COMMAND ...`."""

from osum_echat.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
