"""The engine's arguments on a command line, the same for every command that works on a list."""

from __future__ import annotations

import argparse
import sys

from osum_echat.batch.local import LocalEngine
from osum_echat.batch.ray_data import RayEngine
from osum_echat.batch.work import TRIES, Engine


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that `make_engine` reads."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="local (default): this process, one device; ray: workers on the devices of a Ray cluster (docs/scale.md)",
    )
    group.add_argument(
        "--address", help="a running Ray cluster: auto, or HOST:PORT (default: start one on this machine for the run)"
    )
    group.add_argument("--workers", type=int, help="workers of the cluster (default: as many as it has devices for)")
    group.add_argument(
        "--share", type=float, default=1.0, help="devices a worker has (CPU: cores); 0.5: two workers on one device (default: 1)"
    )
    group.add_argument(
        "--block", type=int, default=64, help="records that are sent to a worker, and lost with it, together (default: 64)"
    )
    group.add_argument(
        "--tries",
        type=int,
        default=TRIES,
        help=f"a record that fails, or that ends its worker, so many times is counted as failed (default: {TRIES})",
    )


def check_engine_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the command (exit code 2) for what cannot be."""
    if args.block < 1:
        parser.error("--block must be at least 1")
    if args.tries < 2:
        parser.error("--tries must be at least 2: once with the block, once alone")
    if args.workers is not None and args.workers < 1:
        parser.error("--workers must be at least 1")
    if args.engine == "local" and (args.address or args.workers or args.share != 1):
        parser.error("--address, --workers and --share are for --engine ray")


def make_engine(args: argparse.Namespace, device: str) -> Engine:
    """The engine that the arguments name; ``device``: what it works on."""
    if args.engine == "local":
        return LocalEngine(device, args.block, args.tries)
    return RayEngine(args.address, device, args.share, args.workers, args.block, args.tries, say=_say)


def _say(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)  # beside the bar, not through it
