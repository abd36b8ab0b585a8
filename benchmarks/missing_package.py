"""A sentence instead of a traceback where a package is missing. Imported first by every script in this folder."""

from __future__ import annotations

import sys
from types import TracebackType


def _say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    package = error.name.partition(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else ""
    if package and (package != "osum_echat" or error.name == package):  # a part of ours that is missing is an error of ours
        where = "in the checkout, with its environment: .venv/bin/python (make venv-dev makes it)"
        print(
            f"the Python package {package!r} is missing: run this {where}, or install it there: pip install {package}",
            file=sys.stderr,
        )
        return
    sys.__excepthook__(kind, error, trace)


sys.excepthook = _say
