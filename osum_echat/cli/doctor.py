"""What this machine has and what would run on it: versions, devices, memory, optional packages, checkpoints."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Sequence

from osum_echat import __version__, device
from osum_echat.cli.common import add_model_arguments, recording, run
from osum_echat.locations import find_mini

# package: what it is for
OPTIONAL = {
    "gradio": "the web page (infer_gradio.py): extra ui",
    "av": "m4a, aac and webm recordings (or an ffmpeg on the PATH): extra audio",
    "deepspeed": "training with ZeRO: extra deepspeed",
    "ray": "lists and servers on a cluster: extra ray",
    "vllm": "vLLM as the decoder: extra vllm",
    "torch_npu": "Ascend NPUs",
    "liger-kernel": "a fused loss on GPUs",
    "faster-whisper": "the judge of `make evaluate-mini`",
    "speechmos": "DNSMOS of `make evaluate-mini`",
}
PUBLISHED_WEIGHTS = 3_460_000_000  # docs/inference.md


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog or "osum-echat doctor",
        description=__doc__,
        epilog="With --checkpoint it checks that checkpoint as well and prints a report to paste into an issue; exit code 1 if it does not work here.",
    )
    parser.add_argument("--wav", help="a recording that the checkpoint shall answer (a few seconds of speech)")
    add_model_arguments(parser)
    parser.set_defaults(checkpoint=None)
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    args = make_parser(prog).parse_args(argv)
    machine()
    return 0 if args.checkpoint is None else run(lambda: report(args))


def report(args: argparse.Namespace) -> int:
    """Check a checkpoint and print what was found; 1 when it does not work here."""
    from osum_echat.cli.checkpoint_report import write_report

    if args.wav is not None:
        recording(args.wav)
    found = write_report(args, args.wav)
    print("checkpoint")
    print("\n".join(f"  {line}" for line in found.lines))
    print(
        "it works here" if not found.failed else f"{found.failed} check(s) failed: please paste this whole report into an issue"
    )
    return 1 if found.failed else 0


def machine() -> None:
    """Print what this machine has."""
    print(f"osum-echat {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for package in ("torch", "transformers", "peft", "onnxruntime", "soundfile", "soxr"):
        print(f"  {package:<16} {version_of(package) or 'MISSING: pip install osum-echat'}")
    print("devices")
    for kind in device.KINDS:
        if device.available(kind):
            chosen = device.resolve(kind)
            print(f"  {device.describe(chosen)}, collectives by {device.collectives_backend(chosen)}")
        else:
            print(f"  {kind}: none")
    print("cpu")
    for line in device.cpu.summary():
        print(f"  {line}")
    print(f"  {os.cpu_count()} cores; OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}")
    print("optional packages")
    for package, purpose in OPTIONAL.items():
        print(f"  {package:<16} {version_of(package) or 'not installed':<16} {purpose}")
    print("checkpoints")
    try:
        print(f"  mini             {find_mini()}")
    except FileNotFoundError as error:
        print(f"  mini             {error}")
    print(f"  published        {published_memory()}")


def published_memory() -> str:
    """Whether this machine has the memory that the published checkpoint needs."""
    from osum_echat.cli.checkpoint_report import memory

    target = device.resolve("auto")
    kept = device.model_weights("auto", "auto", target, PUBLISHED_WEIGHTS, None)
    needed, there = memory(PUBLISHED_WEIGHTS, kept.bytes_each, target)
    says = "it fits" if needed <= there else "too little memory"
    return f"{needed / 1e9:.1f} GB needed with its voice ({kept.kind or kept.dtype}), {there / 1e9:.1f} GB available on {target}: {says}"
