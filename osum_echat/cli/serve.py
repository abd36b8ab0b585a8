"""The gradio page on a port of this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from osum_echat.cli.common import add_model_arguments, load_echat, run

if TYPE_CHECKING:
    from osum_echat.pipeline import EChat


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument(
        "--feedback", type=Path, default=Path("out") / "feedback.jsonl", help="where right/wrong clicks are appended"
    )
    parser.add_argument(
        "--second-checkpoint",
        help="another checkpoint to choose on the page, for example tag_think_final.pt beside language_think_final.pt",
    )
    add_model_arguments(parser)
    args = parser.parse_args(argv)

    def command() -> int:
        from osum_echat.serving.page import build_page

        names = [args.checkpoint] + ([args.second_checkpoint] if args.second_checkpoint else [])

        def load(name: str) -> EChat:
            return load_echat(argparse.Namespace(**{**vars(args), "checkpoint": name}))

        page = build_page(names, load, args.feedback)
        page.launch(server_name=args.host, server_port=args.port)
        return 0

    return run(command)
