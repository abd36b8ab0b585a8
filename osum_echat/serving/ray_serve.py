"""The live server on Ray Serve: replicas of one server, each with a model and a device (or a share of one) of its own.

A session is one WebSocket, and Ray Serve's proxy hands a WebSocket to one replica for its whole life, so a session
stays where its caches are. What a client may ask of any replica (a client secret that another one made) needs no memory
of its own (`safety.Keys`). A replica that dies ends its own sessions only: the proxy closes their sockets with code
1012 (`ray_proxy`), and Ray Serve starts the replica again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from osum_echat.serving.app import Server, build_app


def build(
    make_server: Callable[[], Server], replicas: int, actor_options: dict[str, Any], sessions: int, drain_seconds: float
) -> Any:
    """A Ray Serve application.

    Args:
        make_server: makes a replica's server with its model; can be pickled.
        actor_options: devices of a replica, such as ``{"num_gpus": 0.5}`` (`batch.ray_data.Placement.options`).
        sessions: of one replica; beside them there is room for as many requests.
        drain_seconds: how long a replica that is taken away may let answers in progress end.
    """
    from ray import serve

    def application() -> FastAPI:
        """The application of a replica, made in its process. Ray Serve takes a function for a builder, and nothing
        else."""
        return build_app(make_server(), single=False)

    class Live:
        """A replica; its requests are the application's."""

    deployment: Any = serve.deployment(
        serve.ingress(application)(Live),
        name="live",
        num_replicas=replicas,
        ray_actor_options=actor_options,
        max_ongoing_requests=2 * sessions,
        graceful_shutdown_timeout_s=drain_seconds + 5,
        health_check_period_s=5,
    )
    return deployment.bind()
