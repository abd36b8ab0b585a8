"""What this machine has and what would run on it: versions, devices, memory, optional packages, checkpoints."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Sequence

from osum_echat import __version__, device
from osum_echat.locations import find_mini

# package: what it is for
OPTIONAL = {
    "gradio": "the web page (infer_gradio.py)",
    "deepspeed": "training with ZeRO",
    "torch_npu": "Ascend NPUs",
    "liger-kernel": "a fused loss on GPUs",
    "faster-whisper": "the judge of `make evaluate-mini`",
    "speechmos": "DNSMOS of `make evaluate-mini`",
}


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    argparse.ArgumentParser(prog=prog or "osum-echat doctor", description=__doc__).parse_args(argv)
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
    return 0
