"""Compare this implementation with recorded numbers, a line per case.

    osum-echat golden osum      tests/data/osum
    osum-echat golden token2wav tests/data/token2wav
    osum-echat golden data      tests/data/osum

Exit code 0 when every case is within its limit, 1 when one is not or is not understood, 2 for a wrong call.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

FAMILIES = {"osum": "osum_echat.golden.osum", "token2wav": "osum_echat.golden.token2wav", "data": "osum_echat.golden.data"}


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("directory", type=Path, help="a folder in the format of the recorded cases")
    args = parser.parse_args(argv)
    if not args.directory.is_dir():
        parser.error(f"no such folder: {args.directory}")
    results = importlib.import_module(FAMILIES[args.family]).run(args.directory)
    for result in results:
        print(result.line(), flush=True)
    failed = sum(not r.ok for r in results)
    print(f"{len(results) - failed} of {len(results)} cases within their limits")
    return 1 if failed or not results else 0
