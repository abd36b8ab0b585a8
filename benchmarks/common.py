"""What benchmarks share: ``--device``, a clock that waits for the device's work, the commit, a tokenizer without text, a server."""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from osum_echat import device as devices

ROOT = Path(__file__).resolve().parent.parent


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


def commit() -> str:
    """Of this checkout, in short."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


class NoText:
    """Stands for the tokenizer: turning ids into text is not what is measured."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return []

    def decode(self, ids: list[int], **kwargs: object) -> str:
        return ""


@contextlib.contextmanager
def serving(threads: int, *options: str, priority: int | None = None, log: Path | None = None) -> Iterator[str]:
    """``osum-echat serve`` on the CPU and a free port, as ``host:port``.

    Args:
        options: more options of the command.
        priority: real-time priority of the server (``chrt``).
        log: file for what it prints.

    Raises:
        SystemExit: it did not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "osum_echat.cli", "serve", "--port", str(port), "--device", "cpu", "--threads", str(threads)]
    command = [*(["chrt", "-r", str(priority)] if priority else []), *command, *options]
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(log.open("w")) if log is not None else subprocess.DEVNULL
        server = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            _wait_for(server, f"http://127.0.0.1:{port}/health", log)
            yield f"127.0.0.1:{port}"
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=60)


def _wait_for(server: subprocess.Popen[bytes], health: str, log: Path | None) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(health, timeout=5).read()
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server did not start" + (f", see {log}" if log is not None else ""))
