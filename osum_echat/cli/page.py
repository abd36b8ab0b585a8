"""The web page for recordings, files and conversations, on a port of this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from osum_echat.cli.common import UserError, add_model_arguments, load_echat, run
from osum_echat.locations import find_recordings

EXAMPLES = """examples:
  osum-echat page
  infer_gradio.py --checkpoint language_think_final.pt --second-checkpoint tag_think_final.pt --token2wav CosyVoice-300M-25Hz --speaker voice.wav

Ratings that visitors give are appended to FEEDBACK/feedback.jsonl; audio is stored there only if they agree. Delete the folder to delete both.
The page makes no connection to other computers.
"""


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument(
        "--feedback", type=Path, default=Path("out") / "feedback", help="folder for ratings (default: out/feedback)"
    )
    parser.add_argument("--no-feedback", action="store_true", help="ask for no ratings")
    parser.add_argument(
        "--second-checkpoint",
        help="another checkpoint to choose, or to see beside the first (with the same token2wav, which is loaded once)",
    )
    add_model_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    args = make_parser(prog).parse_args(argv)

    def command() -> int:
        from osum_echat.serving.page.app import Page, PageOptions, demo_examples, serve
        from osum_echat.serving.shared import SharedEChat

        first = load_echat(args)
        loaded = {Path(args.checkpoint).stem: first}
        if args.second_checkpoint:
            second = argparse.Namespace(**{**vars(args), "checkpoint": args.second_checkpoint, "token2wav": first.token2wav})
            name = Path(args.second_checkpoint).stem
            if name in loaded:
                raise UserError(f"both checkpoints are called {name}; rename one of them")
            loaded[name] = load_echat(second)
        feedback = None if args.no_feedback else args.feedback
        page = Page(
            {name: SharedEChat(echat).start() for name, echat in loaded.items()},
            PageOptions(feedback, demo_examples(find_recordings())),
        )
        print(f"http://{args.host}:{args.port}   (stop with Ctrl-C)", flush=True)
        serve(page, args.host, args.port)
        return 0

    return run(command)
