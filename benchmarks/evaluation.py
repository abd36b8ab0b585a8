"""Each suite of the evaluation on mini, at small size: reports to look at, and seconds per item.

    python -m benchmarks.evaluation --out benchmarks/results/2026-11-28-evaluation [--judge URL] [--only latency]

Data: mini's held-out sets and the demo's recordings. Speech is asked twice: in the model's own voice, and in the voices of the demo's recordings by a
``meta.lst`` of SEED-TTS-eval's form. ``--judge`` for dialogue and empathy; without one the rules stand alone. Judge of the committed result:
``python -m tests.judge_server 8001 --calls calls.txt``.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import time
from pathlib import Path

import sentences  # noqa: F401 - first: it says what is missing
import torch

from osum_echat.evaluation.judge import Judge
from osum_echat.evaluation.run import Plan, run_suite
from osum_echat.evaluation.suite import load_suite
from osum_echat.pipeline import EChat

ROOT = Path(__file__).resolve().parents[1]
SETS, DEMO = ROOT / "assets/evaluation", ROOT / "assets/demo"
SENTENCES = (
    "I am so glad to hear that.",
    "We can go to the park together.",
    "Take a deep breath, my friend.",
    "Your teacher will help you learn.",
)


def seed_tts_list(folder: Path) -> Path:
    """A meta file whose prompts are the demo's recordings."""
    lines = []
    records = [json.loads(line) for line in (DEMO / "demo.jsonl").read_text(encoding="utf-8").splitlines()]
    for number, record in enumerate(records):
        shutil.copy(DEMO / record["wav"], folder / record["wav"])
        lines.append(f"{record['key']}|{record['txt']}|{record['wav']}|{SENTENCES[number % len(SENTENCES)]}")
    path = folder / "meta.lst"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint", default=str(ROOT / "checkpoints/mini"))
    parser.add_argument("--judge", action="append", default=[])
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--limit", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    echat = EChat.load(args.checkpoint)
    judges = [Judge(url, f"judge {number}") for number, url in enumerate(args.judge, start=1)]
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "understanding": ("understanding", SETS / "grammar.tar.gz", args.limit),
            "speech, own voice": ("speech", SETS / "speech.tar.gz", args.limit),
            "speech, voices of prompts": ("speech", seed_tts_list(Path(folder)), args.limit),
            "dialogue": ("dialogue", SETS / "grammar.tar.gz", args.limit),
            "empathy": ("empathy", DEMO / "demo.jsonl", None),
            "latency": ("latency", DEMO / "demo.jsonl", None),
        }
        rows = []
        for name, (suite, data, limit) in runs.items():
            if args.only and name not in args.only:
                continue
            work = Path(folder) / name
            began = time.perf_counter()
            plan = Plan(
                load_suite(suite),
                str(data),
                work,
                "mini",
                limit,
                judges=judges,
                token2wav=f"{args.checkpoint}/token2wav",
                say=print,
            )
            report = run_suite(plan, echat)
            seconds = time.perf_counter() - began
            target = args.out / name.replace(", ", "-").replace(" ", "_")
            target.mkdir(parents=True, exist_ok=True)
            for kept in (
                *work.glob("report.md"),
                *work.glob("report.json"),
                *work.glob("latency.png"),
                *work.glob("confusion_*.png"),
            ):
                shutil.copy(kept, target / kept.name)
            found = ", ".join(f"{key} {number.value:.2f}" for key, number in list(report.headline.items())[:8])
            rows.append(
                f"| [{name}]({target.name}/report.md) | {report.reached} | {len(report.holes())} | {seconds / max(report.reached, 1):.2f} | {found} |"
            )
            print(rows[-1], flush=True)
    lines = ["# Suites on mini, small size", "", __doc__.split("\n\n")[2].strip(), ""]
    lines += [
        f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}; seconds an item: everything (generation, scoring, report) by answers.",
        "",
    ]
    if args.judge:
        lines += [
            "The judge is the rule-based stand-in of tests/judge_server.py: its scores show the form of a report and say nothing about mini.",
            "",
        ]
    lines += ["| suite | answers | holes | seconds an item | numbers |", "|---|---|---|---|---|", *rows]
    (args.out / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
