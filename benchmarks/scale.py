#!/usr/bin/env python3
"""Throughput of the engines on mini: our own in one process, our own on a Ray cluster of this machine, and vLLM.

    python benchmarks/scale.py                             # 1, 8 and 32 requests, three rounds; needs ray and vllm in this environment
    python benchmarks/scale.py --engines local,vllm --requests 1,8 --json
    python benchmarks/scale.py --rules                     # only what phases, guards and sampling cost a step beside the model

A request is a recording of `assets/demo` that is heard, thought about in tags and answered in text and speech codes, greedily (so that every engine has
the same ids to make); no sound is made of the codes, which is the same work in all of them. All engines go through `osum_echat.batch`: the requests
of one measurement are one block for each worker. Start-up, loading and a first request are not counted. Engines take turns, round after round, and
medians are compared; ids that differ between engines are counted, not hidden.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import missing_package  # noqa: F401 - first: it says what is missing

ROOT = Path(__file__).resolve().parent.parent
DEMO = sorted((ROOT / "assets" / "demo").glob("*.ogg"))
ENGINES = ("local", "ray", "vllm")


@dataclass(frozen=True)
class Answers:
    """The work of `osum_echat.batch`: a unit is a request; its outcome says when its block began and ended, and what came of it."""

    llm_engine: str
    folder: str | None
    threads: int

    def open(self, device: str) -> AnswerWorker:
        import torch

        from osum_echat.pipeline import EChat

        torch.set_num_threads(self.threads)
        options = {"llm_engine": "vllm", "vllm_folder": self.folder} if self.llm_engine == "vllm" else {}
        worker = AnswerWorker(EChat.load(ROOT / "checkpoints" / "mini", device=device, dtype="float32", **options))
        list(worker.run([0]))  # the first request starts vLLM and warms up
        return worker


class AnswerWorker:
    def __init__(self, echat: Any) -> None:
        self.echat = echat

    def run(self, units: Sequence[Any]) -> Iterator[Any]:
        from osum_echat.batch.work import Outcome
        from osum_echat.generation.events import Done
        from osum_echat.pipeline import Ask

        began = time.time()
        asks = [
            Ask(str(DEMO[number % len(DEMO)]), think="tag", speak=True, seed=number, greedy=True)
            for number in map(_number, units)
        ]
        heard = self.echat.hear([ask.wav for ask in asks])
        requests = [self.echat.request(ask, [one]) for ask, one in zip(asks, heard, strict=True)]
        ends: dict[int, Any] = {}
        for row, event in self.echat.generator.generate(requests):
            if isinstance(event, Done):
                ends[row] = event
        ended = time.time()
        for row, unit in enumerate(units):
            done = ends[row]
            value = {"began": began, "ended": ended, "ids": list(done.generated), "first_speech": done.timings.first_speech}
            yield Outcome(_number(unit), value)


def _number(unit: Any) -> int:
    return unit if isinstance(unit, int) else int(unit.number)


class Local:
    """An engine of one process whose worker stays."""

    def __init__(self, work: Answers) -> None:
        self.worker = work.open("cpu")

    def outcomes(self, count: int) -> list[Any]:
        return list(self.worker.run(list(range(count))))

    def close(self) -> None:
        close = getattr(self.worker.echat.generator, "close", None)
        if close is not None:
            close()


class Ray:
    """`RayEngine` on a cluster that stays; its workers are made anew for each list, which is not counted."""

    def __init__(self, work: Answers, workers: int) -> None:
        from osum_echat.batch.ray_data import connected

        self.work, self.workers = work, workers
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(connected(None, dashboard=False))

    def outcomes(self, count: int) -> list[Any]:
        from osum_echat.batch.ray_data import RayEngine
        from osum_echat.batch.work import Unit

        size = -(-count // self.workers)
        engine = RayEngine(None, "cpu", workers=min(self.workers, count), block_size=size, dashboard=False)
        return list(engine.run(self.work, [Unit(number, str(number)) for number in range(count)]))

    def close(self) -> None:
        self.stack.close()


def measure(engine: Any, count: int) -> dict[str, Any]:
    outcomes = sorted(engine.outcomes(count), key=lambda outcome: outcome.number)
    wrong = [outcome.error for outcome in outcomes if outcome.value is None]
    assert not wrong and len(outcomes) == count, wrong
    values = [outcome.value for outcome in outcomes]
    seconds = max(value["ended"] for value in values) - min(value["began"] for value in values)
    ids = [value["ids"] for value in values]
    total = sum(map(len, ids))
    first = statistics.median(value["first_speech"] for value in values if value["first_speech"] is not None)
    return {"seconds": seconds, "ids": total, "ids_per_second": total / seconds, "first_speech": first, "replies": ids}


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Medians of all engines and their ratios to ``local``."""
    counts = [int(text) for text in args.requests.split(",")]
    names = args.engines.split(",")
    engines = {name: _engine(name, args) for name in names}
    found: dict[str, dict[int, list[dict[str, Any]]]] = {name: {count: [] for count in counts} for name in names}
    for _ in range(args.rounds):
        for count in counts:
            for name in names:
                found[name][count].append(measure(engines[name], count))
                print(f"{name} {count}: {found[name][count][-1]['ids_per_second']:.0f} ids/s", file=sys.stderr, flush=True)
    for engine in engines.values():
        engine.close()
    rows = []
    for count in counts:
        base = found[names[0]][count]
        for name in names:
            runs = found[name][count]
            rate = statistics.median(run["ids_per_second"] for run in runs)
            rows.append(
                {
                    "engine": name,
                    "requests": count,
                    "seconds": round(statistics.median(run["seconds"] for run in runs), 3),
                    "ids": runs[0]["ids"],
                    "ids_per_second": round(rate, 1),
                    "ratio": round(
                        statistics.median(r["ids_per_second"] / b["ids_per_second"] for r, b in zip(runs, base, strict=True)), 3
                    ),
                    "first_speech": round(statistics.median(run["first_speech"] for run in runs), 3),
                    "replies_that_differ": sum(a != b for a, b in zip(runs[0]["replies"], base[0]["replies"], strict=True)),
                    "all_rates": [round(run["ids_per_second"], 1) for run in runs],
                }
            )
    return {"measured": rows, "rounds": args.rounds, "threads": args.threads, **machine()}


def _engine(name: str, args: argparse.Namespace) -> Any:
    if name == "local":
        return Local(Answers("own", None, args.threads))
    if name == "ray":
        return Ray(Answers("own", None, 1), args.threads)
    if name == "vllm":
        folder = args.folder or _export()
        return Local(Answers("vllm", str(folder), args.threads))
    raise SystemExit(f"unknown engine {name!r}: use {', '.join(ENGINES)}")


def _export() -> Path:
    import atexit
    import shutil
    import tempfile

    from osum_echat.pipeline.load import export_vllm

    folder = Path(tempfile.mkdtemp(prefix="osum-echat-scale-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return export_vllm(ROOT / "checkpoints" / "mini", folder / "mini", dtype="float32")


def machine() -> dict[str, Any]:
    import torch
    from common import commit

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": date.today().isoformat(),
        "load": round(os.getloadavg()[0], 1),
    }


# ---- the rules by themselves -----------------------------------------------------------------------------------------------------------


def rules_cost(rows: int, steps: int = 60) -> float:
    """Milliseconds that phases, guards and sampling of ``rows`` rows take a step on this CPU, beside the model: mini's vocabulary, spoken replies
    without a thought, sampled. On an accelerator the same Python runs; the tensors are there."""
    import torch

    from osum_echat.generation.vllm.rules import BatchRules, RowPlan
    from osum_echat.model.checkpoint import load_tokenizer
    from osum_echat.model.config import load_config
    from osum_echat.pipeline.load import read_settings

    path = ROOT / "checkpoints" / "mini"
    config = load_config(path / "config.yaml")
    tokenizer, vocab = load_tokenizer(path, config), config.vocabulary
    settings, dialect = read_settings(path, None, config.dialect, None)
    rules = BatchRules(vocab, tokenizer, settings, dialect.speech_form, torch.zeros(vocab.speech_classes))
    mode = settings.mode("text2token")
    outputs: list[list[int]] = [[] for _ in range(rows)]
    for place, output in enumerate(outputs):
        rules.add(place, RowPlan("text2token", mode, seed=place, words=("one", "two", "three") * 200), output)
    generator, times = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        logits = torch.randn(rows, vocab.audio_end + 1, generator=generator)
        began = time.perf_counter()
        ids = rules.apply(logits).argmax(1).tolist()
        for output, token in zip(outputs, ids, strict=True):
            output.append(token)
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--engines", default="local,ray,vllm", help="the first is what others are compared with (default: local,ray,vllm)"
    )
    parser.add_argument("--requests", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--threads", type=int, default=min(os.cpu_count() or 1, 2), help="CPU threads of each engine; Ray: workers of one"
    )
    parser.add_argument("--folder", help="what osum-echat export --for vllm wrote (default: exported now)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rules", action="store_true", help="measure the rules alone")
    args = parser.parse_args()
    if args.rules:
        print(json.dumps({"rules_ms": {rows: round(rules_cost(rows), 3) for rows in (1, 8, 32, 128, 256)}, **machine()}))
        return
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # vLLM's process takes it from here
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the cores are the same for all engines, which take turns
    result = compare(args)
    if args.json:
        print(json.dumps(result))
        return
    for row in result["measured"]:
        print(
            "{engine:<6} {requests:>3} requests  {ids_per_second:>8.1f} ids/s  {ratio:>6.2f} x  first speech {first_speech:.2f} s".format(
                **row
            )
        )


if __name__ == "__main__":
    main()
