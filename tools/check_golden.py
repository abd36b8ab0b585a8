#!/usr/bin/env python3
"""Compare this implementation with recorded numbers, a line per case.

    python tools/check_golden.py osum      ../shared/golden/osum
    python tools/check_golden.py token2wav ../shared/golden/token2wav
    python tools/check_golden.py data      ../shared/golden/osum

Exit code 0 when every case is within its limit, 1 when one is not or is not understood, 2 for a wrong call.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

FAMILIES = {"osum": "tools.golden.osum", "token2wav": "tools.golden.token2wav", "data": "tools.golden.data"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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


if __name__ == "__main__":
    raise SystemExit(main())
