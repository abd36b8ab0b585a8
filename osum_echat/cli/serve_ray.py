"""`osum-echat serve --replicas N`: the live server on Ray Serve (`serving.ray_serve`)."""

from __future__ import annotations

import argparse
import functools
import os
import secrets
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from osum_echat.batch.ray_data import connected, nodes, place
from osum_echat.cli.common import UserError, find_checkpoint
from osum_echat.serving.ray_proxy import PROXY_CALLBACK
from osum_echat.serving.ray_serve import build

if TYPE_CHECKING:
    from osum_echat.serving.app import Server

BuildServer: TypeAlias = "Callable[[argparse.Namespace], Server]"
CALLBACK = "osum_echat.serving.ray_proxy:proxy_callback"


def add_ray_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of a service of several replicas."""
    group = parser.add_argument_group("Ray Serve (docs/scale.md)")
    group.add_argument("--replicas", type=int, help="serve with so many models on a Ray cluster (default: one, without Ray)")
    group.add_argument("--address", help="a running Ray cluster: auto, or HOST:PORT (default: start one on this machine)")
    group.add_argument(
        "--share", type=float, default=1.0, help="devices of a replica (CPU: cores); 0.5: two replicas on one device"
    )


def serve_on_ray(args: argparse.Namespace, build_server: BuildServer) -> int:
    """Serve until told to stop. The service ends with this command; ``build_server`` makes the server of a replica, in
    its process."""
    os.environ.setdefault(PROXY_CALLBACK, CALLBACK)  # for the nodes that are started here
    if args.ssl_certfile:
        raise UserError("on Ray Serve the load balancer in front has the certificate; leave --ssl-certfile out")
    stop = threading.Event()
    with connected(args.address, dashboard=True) as where:
        for number in (signal.SIGINT, signal.SIGTERM):  # behind Ray, which sets handlers of its own
            signal.signal(number, lambda *_: stop.set())
        try:
            from ray import serve
            from ray.serve.config import HTTPOptions
        except ImportError as error:
            raise UserError("this needs Ray Serve: pip install 'osum-echat[ray]'") from error
        serve.start(http_options=HTTPOptions(host=args.host, port=args.port))
        serve.run(make_application(args, build_server), name="osum-echat", route_prefix="/")
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"service   {args.replicas} replicas{where}")
        print(f"page      http://{host}:{args.port}/")
        print(f"realtime  ws://{host}:{args.port}/v1/realtime", flush=True)
        stop.wait()
        serve.shutdown()
    return 0


def make_application(args: argparse.Namespace, build_server: BuildServer) -> Any:
    """The application of a parsed command line; a connection to the cluster must be there, whose devices decide where
    replicas are placed."""
    placement = place(args.device, args.share, args.replicas, nodes())
    checkpoint = (
        args.checkpoint if "/" in args.checkpoint and not os.path.exists(args.checkpoint) else find_checkpoint(args.checkpoint)
    )
    values = {**vars(args), "device": placement.kind, "checkpoint": str(checkpoint), "shared": secrets.token_hex(32)}
    make = functools.partial(build_server, argparse.Namespace(**values))
    return build(make, placement.workers, placement.options, args.sessions, args.drain_seconds)
