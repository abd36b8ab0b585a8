"""The live server: a page to talk to, the OpenAI Realtime protocol, REST beside it, and metrics, on one port.

    osum-echat serve                                  http://127.0.0.1:8000/ on this machine
    osum-echat serve --host 0.0.0.0 --api-key KEY --ssl-certfile cert.pem --ssl-keyfile key.pem

A browser gives its microphone to pages of this machine and to HTTPS only. The first SIGTERM or Ctrl+C lets answers in
progress end, the second does not.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osum_echat.cli.common import UserError, add_model_arguments, load_echat, run
from osum_echat.cli.serve_ray import add_ray_arguments, make_application, serve_on_ray

if TYPE_CHECKING:
    from osum_echat.serving.app import Server


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only; others need --api-key)"
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key", help="key that clients must send (default: the environment's OSUM_ECHAT_API_KEY, else none)")
    parser.add_argument("--origin", action="append", default=[], help="another site whose pages may use this server; * for any")
    parser.add_argument("--ssl-certfile", help="certificate, for HTTPS")
    parser.add_argument("--ssl-keyfile", help="its key")
    parser.add_argument(
        "--think",
        choices=["tag", "language", "none"],
        default="tag",
        help="thought of sessions that do not choose (default: tag)",
    )
    parser.add_argument(
        "--interleaved",
        action="store_true",
        help="text and speech in turns, for a checkpoint that has learnt it and does not say so",
    )
    parser.add_argument(
        "--end-of-turn",
        choices=["auto", "head", "smart-turn", "silence"],
        default="auto",
        help="what ends a turn of sessions with semantic_vad (default: the checkpoint's turn head, else smart-turn)",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--sessions", type=int, default=64, help="real-time sessions at once (default: 64)")
    limits.add_argument("--rows", type=int, default=16, help="answers that are decoded together (default: 16)")
    limits.add_argument(
        "--positions", type=int, default=65536, help="cached positions of all answers and sessions (default: 65536)"
    )
    limits.add_argument("--queue", type=int, default=64, help="answers that may wait (default: 64)")
    limits.add_argument(
        "--voice-workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        help="threads that make the sound of several answers side by side on a CPU (default: one a core, 4 at most)",
    )
    limits.add_argument(
        "--turn-seconds", type=float, default=60.0, help="sound of one turn (default: 60, or what the model takes)"
    )
    limits.add_argument("--session-seconds", type=float, default=7200.0, help="length of a session (default: 7200)")
    limits.add_argument(
        "--idle-seconds", type=float, default=600.0, help="a session without a message is ended after (default: 600)"
    )
    limits.add_argument("--ahead-seconds", type=float, default=2.0, help="sound may be ahead of what was played (default: 2)")
    limits.add_argument("--drain-seconds", type=float, default=30.0, help="time for answers in progress at the end (default: 30)")
    add_ray_arguments(parser)
    add_model_arguments(parser)
    return parser


def api_key_of(args: argparse.Namespace) -> str | None:
    """The key that clients must send."""
    return args.api_key or os.environ.get("OSUM_ECHAT_API_KEY") or None


def build_server(args: argparse.Namespace) -> Server:
    """The server that the arguments describe, with its model loaded. Raises ValueError for what may not be."""
    from osum_echat.generation.engine import EngineLimits
    from osum_echat.serving.app import Server, ServerSettings
    from osum_echat.serving.live import LiveModel
    from osum_echat.serving.realtime.settings import SessionLimits
    from osum_echat.serving.safety import check_host
    from osum_echat.serving.shared import SharedEChat
    from osum_echat.serving.vad import TurnModels

    key = api_key_of(args)
    check_host(args.host, key)
    limits = SessionLimits(
        turn_seconds=args.turn_seconds,
        session_seconds=args.session_seconds,
        idle_seconds=args.idle_seconds,
        ahead_seconds=args.ahead_seconds,
    )
    settings = ServerSettings(
        host=args.host,
        api_key=key,
        origins=tuple(args.origin),
        sessions=args.sessions,
        **({"shared": args.shared} if getattr(args, "shared", None) else {}),
        think=None if args.think == "none" else args.think,
        drain_seconds=args.drain_seconds,
        limits=limits,
    )
    engine = EngineLimits(rows=args.rows, positions=args.positions, queue=args.queue)
    name = args.checkpoint if args.checkpoint == "mini" else Path(args.checkpoint).stem
    shared = SharedEChat(load_echat(args), engine, args.voice_workers)
    model = LiveModel(shared, name=f"osum-echat-{name}", interleaved=args.interleaved)
    if model.pool is None:
        logging.getLogger(__name__).warning("this checkpoint has no token2wav: answers are text; give --token2wav FOLDER")
    return Server(model, TurnModels.load(model.turn_head, args.end_of_turn), settings)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    args = parser(prog).parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    def command() -> int:
        from osum_echat.serving.safety import check_host

        if bool(args.ssl_certfile) != bool(args.ssl_keyfile):
            raise UserError("--ssl-certfile and --ssl-keyfile belong together")
        for path in (args.ssl_certfile, args.ssl_keyfile):
            if path and not Path(path).is_file():
                raise UserError(f"no such file: {path}")
        if args.replicas is not None:
            check_host(args.host, api_key_of(args))
            return serve_on_ray(args, build_server)
        server = build_server(args)
        return listen(server, args)

    return run(command)


def listen(server: Server, args: argparse.Namespace) -> int:
    """Serve until told to stop."""
    import gc

    import uvicorn

    from osum_echat.serving.app import build_app

    scheme = "https" if args.ssl_certfile else "http"
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"model     {server.backend.name}: thinks in {', '.join(server.backend.thinks) or 'no form'}")
    for message in server.backend.warnings.values():
        print(f"note      {message}")
    print(f"turns     VAD {server.turn_models.names[0]}, end of turn {server.turn_models.names[1]}")
    print(f"page      {scheme}://{host}:{args.port}/")
    print(f"realtime  {scheme.replace('http', 'ws')}://{host}:{args.port}/v1/realtime", flush=True)
    config = uvicorn.Config(
        build_app(server),
        host=args.host,
        port=args.port,
        log_level="warning",
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        ws="websockets-sansio",
        ws_max_size=server.settings.limits.message_bytes,
        ws_ping_interval=20.0,
        ws_ping_timeout=20.0,
        timeout_graceful_shutdown=int(args.drain_seconds) + 5,
    )
    gc.collect()
    # What was loaded stays: Python then looks at what came since, and often enough to give back what sessions held.
    gc.freeze()
    running = _Draining(config, server)
    running.run()
    return 0 if running.started else 1


def _Draining(config: Any, server: Server) -> Any:
    """uvicorn, told to stop: no new sessions at once; connections are closed once answers in progress have ended."""
    import uvicorn

    class Draining(uvicorn.Server):
        async def shutdown(self, sockets: Any = None) -> None:
            await server.drain()
            await super().shutdown(sockets)

    return Draining(config)


def application(options: Mapping[str, str]) -> Any:
    """For config files of Ray Serve (``import_path: osum_echat.cli.serve:application``): ``options`` are those of
    `osum-echat serve` without the dashes: ``{checkpoint: /models/echat, host: 0.0.0.0, replicas: "4"}``; a flag is
    ``"true"``."""
    words = [word for name, value in options.items() for word in (f"--{name}", *([] if value == "true" else [str(value)]))]
    return make_application(parser("osum-echat serve").parse_args(words), build_server)
