"""Where a benchmark runs and how its time is read: ``--device``, and a clock that waits for the device's work."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from osum_echat import device as devices


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option ``--device``; `device_of` reads it."""
    parser.add_argument(
        "--device",
        default="cpu",
        help="cpu (default), cuda, npu or auto; on an accelerator a clock is read when its work is done",
    )


def device_of(args: argparse.Namespace) -> torch.device:
    """The device that was asked for.

    Raises:
        SystemExit: it is not there, with the reason.
    """
    try:
        return devices.resolve(args.device)
    except ValueError as error:
        raise SystemExit(str(error)) from error


def now(device: torch.device) -> float:
    """Wall-clock seconds, read when all work on the device is done."""
    devices.synchronize(device)
    return time.perf_counter()


def cpu_or_wall(device: torch.device) -> float:
    """Seconds that other work on the machine disturbs least: of this process's CPU time, or of an accelerator's wall clock."""
    return time.process_time() if device.type == "cpu" else now(device)


def seconds(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Of one call."""
    start = clock()
    run()
    return clock() - start
