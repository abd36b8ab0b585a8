#!/usr/bin/env python3
"""Load a checkpoint of the published size: peak memory over the weights' bytes, and seconds, for .pt and safetensors.

    python benchmarks/load_full.py --json                 # makes both files once (14 GB), then loads each in a fresh process
    python benchmarks/load_full.py --dir CACHE --delete   # files in CACHE, removed afterwards
    python benchmarks/load_full.py --quick                # the same with a model of a few layers

The weights are noise in bfloat16, the keys are the published ones (.pt) and this project's (safetensors). Peak memory is the process's largest
resident set, interpreter and libraries included, after *every* page of the weights has been read: a file that is only mapped would look like
nothing otherwise. "load" ends when the model is there, "read" when all its weights have been touched; how long these take depends on whether
the file is in the page cache, which the first of the two runs shows ("first": as found, "again": right after).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import missing_package  # noqa: F401 - first: it says what is missing
import torch
from common import commit

from osum_echat.config import to_yaml
from osum_echat.model import checkpoint as model_io
from osum_echat.model.config import ModelConfig, load_config
from osum_echat.model.released import ModelSpec, spec_of
from osum_echat.model.storage import open_source

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["encoder.layers=2", "encoder.max_positions=3000", "llm.config.num_hidden_layers=2"]
LIMIT = 1.15
_PAGE_NUMBERS = 2048  # bfloat16 numbers in a memory page


def make_safetensors(spec: ModelSpec, file: Path) -> None:
    """Write noise for every entry: the format's 8-byte header size, JSON header, then the tensors, streamed."""
    names = [name for name in spec.shapes if not (spec.tied and name == spec.text_head)]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + 2 * torch.Size(spec.shapes[name]).numel()
        header[name] = {"dtype": "BF16", "shape": list(spec.shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = (0.02 * torch.randn(2**23)).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    partial = file.with_name(file.name + ".partial")
    with partial.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for first in range(0, end, len(noise)):
            stream.write(noise[: min(len(noise), end - first)])
    partial.replace(file)


def make_files(config: ModelConfig, folder: Path) -> tuple[Path, Path]:
    """The two files, made when they are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    safetensors, pt = folder / "model.safetensors", folder / "language_think_final.pt"
    spec = spec_of(model_io.build_meta(config))
    if not safetensors.exists():
        make_safetensors(spec, safetensors)
    if not pt.exists():
        model_io.save_released(model_io.clean_tensors(open_source(safetensors), spec), spec, pt)
    return pt, safetensors


def load_once(file: Path, config_file: Path) -> dict[str, float]:
    """In this process: load, touch everything, report (run in a fresh process by `measure`)."""
    model_io.build_meta(load_config(config_file))  # imports of transformers are not what is timed
    imported = _peak()
    start = time.perf_counter()
    model = model_io.load_weights(file, config_file, dtype=torch.bfloat16)
    loaded = time.perf_counter()
    total = sum(int(p.detach().view(torch.int16).reshape(-1)[::_PAGE_NUMBERS].sum()) for p in model.parameters())
    read = time.perf_counter()
    assert total != 0
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "weights_gb": weights / 1e9,
        "peak_gb": _peak() / 1e9,
        "imports_gb": imported / 1e9,
        "peak_over_weights": _peak() / weights,
        "load_seconds": loaded - start,
        "read_seconds": read - loaded,
    }


def _peak() -> int:
    """Largest resident set of this program (getrusage's figure would start from that of the process which started it)."""
    line = next(line for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def measure(file: Path, config_file: Path) -> dict[str, float]:
    """`load_once` in a fresh process."""
    command = [sys.executable, __file__, "--child", str(file), str(config_file)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if run.returncode:
        raise RuntimeError(f"loading {file.name} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when both peaks are within the limit, 1 when one is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--dir", type=Path, default=Path(tempfile.gettempdir()) / "osum-echat-load-full", help="where the files stand"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a model of a few layers; its ratio holds the interpreter's share and has no limit"
    )
    parser.add_argument("--delete", action="store_true", help="remove the files afterwards")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-load_full.json and .md")
    parser.add_argument("--child", nargs=2, metavar=("FILE", "CONFIG"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(load_once(Path(args.child[0]), Path(args.child[1]))))
        return 0
    config = load_config(ROOT / "conf" / "ct_config.yaml", QUICK if args.quick else [])
    folder = args.dir / ("quick" if args.quick else "full")
    start = time.perf_counter()
    pt, safetensors = make_files(config, folder)
    made = time.perf_counter() - start
    result: dict[str, Any] = {"quick": args.quick, "make_seconds": made}
    for name, file in (("pt", pt), ("safetensors", safetensors)):
        first, again = measure(file, folder / "config.yaml"), measure(file, folder / "config.yaml")
        result[f"{name}_peak_over_weights"] = max(first["peak_over_weights"], again["peak_over_weights"])
        result[f"{name}_seconds"] = again["load_seconds"] + again["read_seconds"]
        result[name] = {"first": first, "again": again, "file_gb": file.stat().st_size / 1e9}
    result |= {"limit": LIMIT, **about()}
    if args.delete:
        shutil.rmtree(folder)
    if args.save:
        save(result)
    print(json.dumps(result) if args.json else table(result))
    over = max(result["pt_peak_over_weights"], result["safetensors_peak_over_weights"]) > LIMIT
    return int(over and not args.quick)


def about() -> dict[str, Any]:
    """Date, commit and hardware."""
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor()
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "hardware": f"{model}, {os.cpu_count()} cores, {memory:.0f} GB",
        "torch": torch.__version__,
    }


def _lines(file: str) -> list[str]:
    return Path(file).read_text(encoding="utf-8").splitlines() if Path(file).exists() else []


def table(result: dict[str, Any]) -> str:
    """The result for people (Markdown)."""
    lines = [
        f"# Loading a full-size checkpoint ({result['date']}, commit {result['commit']})",
        "",
        f"{result['hardware']}; torch {result['torch']}; bfloat16, every weight read after loading; a fresh process each.",
        "",
        "| file | GB | run | peak / weights | peak GB | of it imports GB | load s | read all s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ("pt", "safetensors"):
        for run in ("first", "again"):
            r = result[name][run]
            lines.append(
                f"| {name} | {result[name]['file_gb']:.2f} | {run} | {r['peak_over_weights']:.3f} | {r['peak_gb']:.2f} | "
                f"{r['imports_gb']:.2f} | {r['load_seconds']:.1f} | {r['read_seconds']:.1f} |"
            )
    return "\n".join([*lines, "", f"Limit: {result['limit']} x the weights."])


def save(result: dict[str, Any]) -> None:
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{result['date']}-load_full"
    (folder / f"{stem}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (folder / f"{stem}.md").write_text(table(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
