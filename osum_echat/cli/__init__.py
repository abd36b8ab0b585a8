"""The `osum-echat` command: one name for everything that a person does with this project.

Each sub-command is a module with ``main(argv, prog) -> exit code``; it is imported when it is called. The scripts at
the top of the checkout and in `tools/` call the same functions.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence

# name: (module with a main, what it does)
COMMANDS = {
    "infer": ("osum_echat.cli.infer", "one utterance or text, every task"),
    "multiturn": ("osum_echat.cli.multiturn", "a dialogue of several recordings"),
    "batch": ("osum_echat.cli.batch", "a whole list (raw, shard or combine) to a results file"),
    "demo": ("osum_echat.cli.demo", "the seven modes on recordings of this repository"),
    "serve": ("osum_echat.cli.serve", "the live server: talk in real time, OpenAI Realtime and REST, metrics"),
    "page": ("osum_echat.cli.page", "a web page: recordings, files, conversations"),
    "train": ("osum_echat.training.__main__", "train a stage"),
    "eval": ("osum_echat.cli.eval", "measure a checkpoint: understanding, speech, dialogue, empathy, latency"),
    "duplex": ("osum_echat.cli.duplex", "talk to a live server with recordings and measure how it takes turns"),
    "data": ("osum_echat.cli.data", "look at data and convert it: data doctor, data show, data convert"),
    "inspect": ("osum_echat.model.inspect", "parts, parameters and keys of a model config or checkpoint"),
    "quantize": ("osum_echat.cli.quantize", "a checkpoint with its weights rounded to 8 or 4 bits, for CPUs"),
    "convert": ("osum_echat.tools.convert", "a checkpoint of any form to another"),
    "export": ("osum_echat.cli.export", "a checkpoint's language model for another engine (vLLM)"),
    "average": ("osum_echat.tools.average", "the mean of several training checkpoints"),
    "hub": ("osum_echat.tools.hub", "checkpoint folders to and from the Hugging Face hub"),
    "tokens": ("osum_echat.tools.tokens", "speech tokens of the recordings of a list"),
    "convert-whisper": ("osum_echat.tools.whisper", "a published Whisper to encoder weights"),
    "draw-streaming": ("osum_echat.tools.draw_streaming", "offline and streamed synthesis beside each other, as a picture"),
    "golden": ("osum_echat.golden.check", "compare this implementation with recorded numbers"),
    "doctor": ("osum_echat.cli.doctor", "what this machine has and what would run on it"),
}

# Package that may be missing: the extra that brings it.
EXTRAS = {
    "gradio": "ui",
    "deepspeed": "deepspeed",
    "av": "audio",
    "faster_whisper": "evaluation",
    "speechmos": "evaluation",
    "wetext": "evaluation",
    "whisper_normalizer": "evaluation",
    "lm_eval": "ifeval",
    "nltk": "ifeval",
    "webdataset": "dev",
    "vllm": "vllm",
}


def table(commands: Mapping[str, tuple[str, str]]) -> str:
    """A line for each command: its name and what it does."""
    width = max(map(len, commands))
    return "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in commands.items())


def usage() -> str:
    return f"usage: osum-echat COMMAND [arguments]      (osum-echat COMMAND --help tells more)\n\n{table(COMMANDS)}"


def missing_package(error: ModuleNotFoundError) -> str | None:
    """What to install for a package that is not there; None for an error that is ours."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "osum_echat"):
        return None
    if package == "recipes":
        return "this needs a checkout of the repository: start it there"
    wanted = f"osum-echat[{EXTRAS[package]}]" if package in EXTRAS else "osum-echat"
    return f"the package {package} is missing: pip install '{wanted}'"


def run_command(name: str, argv: Sequence[str], prog: str | None = None) -> int:
    """Run one sub-command; exit code 2 with a sentence when a package is missing. ``prog``: its name in help and
    messages."""
    return run_module(COMMANDS[name][0], argv, prog or f"osum-echat {name}")


def run_module(module: str, argv: Sequence[str], prog: str) -> int:
    """Run ``main`` of a module of ``COMMANDS``."""
    try:
        return int(importlib.import_module(module).main(list(argv), prog=prog) or 0)
    except ModuleNotFoundError as error:
        sentence = missing_package(error)
        if sentence is None:
            raise
        print(f"{prog}: {sentence}", file=sys.stderr)
        return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command. Exit code 2 for an unknown one."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"osum-echat: unknown command {name!r}; osum-echat --help lists them: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run_command(name, rest)
