"""Runs the points one after the other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from osum_echat.serving.conformance.client import Failure, Target
from osum_echat.serving.conformance.points import POINTS


@dataclass(frozen=True)
class Result:
    """``why``: what was seen instead; empty when the point holds."""

    name: str
    about: str
    why: str
    seconds: float

    @property
    def holds(self) -> bool:
        return not self.why


async def run(target: Target, only: Sequence[str] = (), limit: float = 120.0) -> AsyncIterator[Result]:
    """Results as they come. Raises ValueError for a name that there is not."""
    unknown = sorted(set(only) - set(POINTS))
    if unknown:
        raise ValueError(f"there is no point {unknown[0]!r}; use {', '.join(POINTS)}")
    for name, test in POINTS.items():
        if only and name not in only:
            continue
        began, why = time.monotonic(), ""
        try:
            await asyncio.wait_for(test(target), limit)
        except Failure as failure:
            why = str(failure)
        except asyncio.TimeoutError:
            why = f"it took longer than {limit:g} s"
        except Exception as error:  # noqa: BLE001  whatever a server does to us is its result
            why = f"{type(error).__name__}: {error}"
        about = (test.__doc__ or "").strip().splitlines()[0].strip()
        yield Result(name, about, why, time.monotonic() - began)
