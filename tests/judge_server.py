"""The judge by rule as a program that tells its calls, and one with recorded answers.

python -m tests.judge_server 8001 --calls calls.txt
"""

from __future__ import annotations

import argparse
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from osum_echat.evaluation.judge.rule_judge import Answer, Server, by_rule


def recorded(answers: list[Answer]) -> Callable[[dict[str, Any]], Answer]:
    """The answers in their order, whatever is asked."""
    waiting = iter(answers)
    lock = threading.Lock()

    def answer(_: dict[str, Any]) -> Answer:
        with lock:
            return next(waiting)

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--calls", type=Path, required=True, help="a line is written here for every call")
    parser.add_argument("--hold", type=Path, help="answer nothing more, after so many calls, until this file is there")
    parser.add_argument("--after", type=int, default=0)
    args = parser.parse_args()
    lock, calls = threading.Lock(), itertools.count()

    def answer(body: dict[str, Any]) -> Answer:
        with lock, args.calls.open("a") as out:
            out.write("call\n")
            number = next(calls)
        while args.hold is not None and number >= args.after and not args.hold.exists():
            time.sleep(0.02)
        return by_rule(body)

    Server(answer, args.port).server.serve_forever()


if __name__ == "__main__":
    main()
