"""Every suite of the evaluation on a small checkpoint, at small size: reports to look at, and processor seconds an answer.

    python -m recipes.mini.evaluation.small --out benchmarks/results/2026-11-28-evaluation --work out/evaluation-small [--only latency]
    python -m recipes.mini.evaluation.small ... --only live --live-priority 5

Data: mini's held-out sets and the demo's recordings. Speech is asked twice: in the model's own voice, and in the voices of the demo's recordings by a
``meta.lst`` of SEED-TTS-eval's form. Conversations of two turns are said by the demo's recordings, in the columns of VoiceBench's mtbench. ``live`` starts
``osum-echat serve`` and plays recordings to it with ``osum-echat duplex``'s client; the server's own metric of each answer stands beside the client's.

The judge of dialogue, mtbench and empathy is the rule-based stand-in `osum_echat.evaluation.judge.rule_judge` (its scores show the form of a report and say nothing about
the model), unless ``--judge URL`` names one. A run that was stopped goes on; what is finished in ``--work`` is not done again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import platform
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import commit, serving
from osum_echat.audio import io as audio_io
from osum_echat.audio.resample import resample
from osum_echat.evaluation.claim import fingerprint
from osum_echat.evaluation.duplex.client import RATE, Settings
from osum_echat.evaluation.duplex.run import play_all
from osum_echat.evaluation.judge import Judge
from osum_echat.evaluation.judge.rule_judge import Server
from osum_echat.evaluation.results import FILE, Lines
from osum_echat.evaluation.run import Plan, run_suite
from osum_echat.evaluation.suite import load_suite
from osum_echat.pipeline import EChat
from recipes.mini.evaluation import SUITE as MINI_SUITE
from recipes.mini.evaluation.__main__ import with_people

ROOT = Path(__file__).resolve().parents[3]
SETS, DEMO = ROOT / "assets/evaluation", ROOT / "assets/demo"
SENTENCES = (
    "I am so glad to hear that.",
    "We can go to the park together.",
    "Take a deep breath, my friend.",
    "Your teacher will help you learn.",
)
KEPT = ("report.md", "report.json", "latency.png", "bars.png", "confusion_*.png")
LIVE_CASES = 4
"""Recordings that are played alone; one more conversation interrupts the answer to the first by the third."""
INTERRUPTS_AFTER = 1.7
"""Seconds from the end of the first recording to the beginning of the one that interrupts."""


@dataclasses.dataclass
class Row:
    """A line of the table."""

    name: str
    answers: int
    holes: int
    seconds: float | None
    numbers: dict[str, float]
    notes: list[str] = dataclasses.field(default_factory=list)


def demo_records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DEMO / "demo.jsonl").read_text(encoding="utf-8").splitlines()]


def seed_tts_list(folder: Path) -> Path:
    """A meta file whose prompts are the demo's recordings."""
    lines = []
    for number, record in enumerate(demo_records()):
        shutil.copy(DEMO / record["wav"], folder / record["wav"])
        lines.append(f"{record['key']}|{record['txt']}|{record['wav']}|{SENTENCES[number % len(SENTENCES)]}")
    path = folder / "meta.lst"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def mtbench_list(folder: Path, conversations: int = 2) -> Path:
    """Conversations of two turns, with the columns of VoiceBench's mtbench."""
    records = demo_records()
    path = folder / "mtbench-demo.jsonl"
    with path.open("w", encoding="utf-8") as out:
        for number in range(conversations):
            turns = records[2 * number : 2 * number + 2]
            row = {"question_id": 81 + number, "category": "talk", "turns": [turn["txt"] for turn in turns], "reference": None}
            row |= {f"audio{place}": str(DEMO / turn["wav"]) for place, turn in enumerate(turns, start=1)}
            out.write(json.dumps(row) + "\n")
    return path


def live_recordings(folder: Path) -> Path:
    """``ID/input.wav`` of some of the demo's recordings, and of one that interrupts."""
    quiet = np.zeros(round(0.3 * RATE), np.float32)
    sounds: dict[str, Any] = {}
    for record in demo_records()[:LIVE_CASES]:
        audio = audio_io.read(DEMO / record["wav"])
        sounds[record["key"]] = np.asarray(resample(audio.mono(), audio.rate, RATE), dtype=np.float32)
    first, third = list(sounds.values())[0:3:2]
    sounds["interruption"] = np.concatenate([first, np.zeros(round(INTERRUPTS_AFTER * RATE), np.float32), third])
    for name, samples in sounds.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        audio_io.write(folder / name / "input.wav", np.concatenate([quiet, samples, quiet]), RATE)
    return folder


def finish(name: str, report: Any, work: Path, out: Path, began: float, before: int) -> Row:
    """Copy the report and make the table's line; seconds are those of this run, by the answers that it made."""
    target = out / folder_of(name)
    target.mkdir(parents=True, exist_ok=True)
    for pattern in KEPT:
        for kept in work.glob(pattern):
            shutil.copy(kept, target / kept.name)
    made = answered(work) - before
    seconds = (time.process_time() - began) / made if made > 0 else None
    numbers = {key: round(number.value, 2) for key, number in report.headline.items()}
    refused = sorted({re.sub(r"\d+", "N", row.hole) for row in report.rows if row.hole})
    return Row(name, report.reached, len(report.holes()), seconds, numbers, refused[:3])


def folder_of(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "_")


def answered(work: Path) -> int:
    return sum(1 for row in Lines(work / FILE).rows() if "error" not in row)


def plain_suite(name: str, suite: str, data: Path, limit: int | None, args: argparse.Namespace, work: Path, model: Callable[[], EChat], judges: Sequence[Judge]) -> Row:  # fmt: skip
    before, began = answered(work), time.process_time()
    plan = Plan(
        load_suite(suite),
        str(data),
        work,
        args.name,
        checkpoint=fingerprint(Path(args.checkpoint)),
        limit=limit,
        judges=judges,
        token2wav=f"{args.checkpoint}/token2wav",
        wheels=args.wheels,
        say=print,
    )
    return finish(name, run_suite(plan, model), work, args.out, began, before)


def own_suite(name: str, args: argparse.Namespace, work: Path, model: Callable[[], EChat]) -> Row:
    """The recipe's suite, the first items of each set."""
    before, began = answered(work), time.process_time()
    work.mkdir(parents=True, exist_ok=True)
    suite = with_people(load_suite(MINI_SUITE), args.people, work, limit=args.limit)
    mark = fingerprint(Path(args.checkpoint))
    plan = Plan(suite, str(SETS), work, args.name, checkpoint=mark, limit=args.limit, wheels=args.wheels, say=print)
    return finish(name, run_suite(plan, model), work, args.out, began, before)


class Metric:
    """The server's time to first audio of each answer, read from ``/metrics`` as it grows."""

    def __init__(self, url: str) -> None:
        self.url, self.values = url, list[float]()
        self._sum = self._count = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Metric:
        self.look()
        self.values.clear()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.look()

    def _watch(self) -> None:
        while not self._over.wait(0.25):
            self.look()

    def look(self) -> None:
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=30).read().decode()
        found = {
            kind: sum(float(v) for v in re.findall(rf"^osum_echat_time_to_first_audio_seconds_{kind}(?:{{[^}}]*}})? (\S+)$", text, re.M))
            for kind in ("sum", "count")
        }  # fmt: skip
        new = round(found["count"] - self._count)
        if new:
            self.values += [(found["sum"] - self._sum) / new] * new
        self._sum, self._count = found["sum"], found["count"]


def live(name: str, args: argparse.Namespace, work: Path) -> Row:
    """Conversations with the live server, and the delay of each answer by the server and by the client."""
    source, pairs = live_recordings(work / "in"), list[tuple[str, float, float]]()
    with serving(1, "--checkpoint", args.checkpoint, priority=args.live_priority, log=work / "serve.log") as place:
        settings = Settings(f"ws://{place}/v1/realtime")
        list(play_all(settings, source, work / "warm", limit=1))  # what is made on first use
        shutil.rmtree(work / "warm")
        (work / "out" / FILE).unlink(missing_ok=True)
        for _ in range(LIVE_CASES + 1):
            with Metric(f"http://{place}") as metric:
                result = next(iter(play_all(settings, source, work / "out")))
            turns = [turn for turn in result.timings.get("turns", ()) if "after_commit" in turn]
            if result.error or len(turns) != len(metric.values):
                print(f"{result.id}: {result.error or f'{len(turns)} answers heard, {len(metric.values)} counted by the server'}")
            for number, (turn, server) in enumerate(zip(turns, metric.values, strict=False), start=1):
                pairs.append((f"{result.id}, answer {number}" if len(turns) > 1 else result.id, server, turn["after_commit"]))
    plan = Plan(load_suite("live"), str(source), work / "out", f"{args.name}, osum-echat serve", results=work / "out" / FILE)
    row = finish(name, run_suite(plan), work / "out", args.out, time.process_time(), answered(work / "out"))
    table = ["| answer | server | client | client - server, ms |", "|---|---|---|---|"]
    table += [f"| {id} | {one:.4f} | {other:.4f} | {1000 * (other - one):+.1f} |" for id, one, other in pairs]
    apart = [1000 * abs(other - one) for _, one, other in pairs]
    how = f"at real-time priority (chrt -r {args.live_priority})" if args.live_priority else "at ordinary priority"
    said = f"They differ by {max(apart):.1f} ms at most, {sum(apart) / len(apart):.1f} ms in the mean." if apart else "No answer."
    row.notes = [*table, "", f"{said} Server and client ran {how}, load of the machine {_load()}."]
    return row


def _load() -> str:
    return f"{Path('/proc/loadavg').read_text().split()[0]}" if Path("/proc/loadavg").exists() else "unknown"


def head(args: argparse.Namespace) -> list[str]:
    cpu = (
        next(iter(re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())), "")
        if Path("/proc/cpuinfo").exists()
        else ""
    )
    about, data, judge = (" ".join(part.split()) for part in (__doc__ or "").split("\n\n") if not part.startswith("    "))
    what = [data, "", f"Judge: {args.judge[0]}." if args.judge else judge.partition(", unless")[0] + ".", ""]
    return [
        f"# Suites on {args.name}, small size",
        "",
        f"{about} `python -m recipes.mini.evaluation.small --limit {args.limit}`",
        "",
        *what,
        f"Checkpoint: {fingerprint(Path(args.checkpoint))}. {cpu or platform.machine()}, one thread, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, "
        f"commit {commit()}. Seconds an answer are processor seconds (generation, scoring, report), so other work on the machine does not count; waiting times are by the clock.",
        "",
    ]  # fmt: skip


def readme(args: argparse.Namespace, rows: dict[str, Row]) -> None:
    lines = [*head(args), "| suite | answers | holes | seconds an answer | numbers |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        seconds = "real time" if name == "live" else "-" if row.seconds is None else f"{row.seconds:.2f}"
        numbers = ", ".join(f"{key} {value:g}" for key, value in row.numbers.items())
        lines.append(f"| [{name}]({folder_of(name)}/report.md) | {row.answers} | {row.holes} | {seconds} | {numbers} |")
    whole = args.out / "mini_full" / "report.json"
    if whole.is_file():
        data = json.loads(whole.read_text(encoding="utf-8"))
        numbers = ", ".join(f"{key} {round(value, 2):g}" for key, value in data["headline"].items())
        about = f"mini, own suite, every item; a run of its own, {data['date']}"
        lines.append(f"| [{about}](mini_full/report.md) | see report | {data['holes']['count']} | - | {numbers} |")
    for name, row in rows.items():
        if row.notes:
            title = {"live": "delay to the first sound, seconds, by server and by client", "latency": "how it was measured"}
            notes = row.notes if name in title else [f"- {note}" for note in row.notes]
            lines += ["", f"## {name}: {title.get(name, 'what was not answered')}", "", *notes]
    (args.out / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of reports")
    parser.add_argument("--work", type=Path, required=True, help="folder of answers, for one checkpoint")
    parser.add_argument("--checkpoint", default=str(ROOT / "checkpoints/mini"))
    parser.add_argument("--name", default="mini")
    parser.add_argument("--judge", action="append", default=[], help="an OpenAI-compatible URL instead of the stand-in")
    parser.add_argument("--only", action="append", default=[], help="a suite of the table (repeatable)")
    parser.add_argument("--limit", type=int, default=24, help="items at most of each held-out set")
    parser.add_argument("--people", type=Path, help="folder of the recordings of people, for mini's own suite")
    parser.add_argument("--wheels", type=Path, help="folder with the recogniser's packages, instead of downloading them")
    parser.add_argument(
        "--live-priority", type=int, help="real-time priority of the server (the client's is that of this command)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    for folder in (args.out, args.work / "data"):
        folder.mkdir(parents=True, exist_ok=True)
    loaded: list[EChat] = []

    def model() -> EChat:
        if not loaded:
            loaded.append(EChat.load(args.checkpoint))
        return loaded[0]

    with contextlib.ExitStack() as stack:
        stand_in = [] if args.judge else [stack.enter_context(Server()).url]
        judges = [Judge(url, f"judge {n}" if args.judge else "stand-in") for n, url in enumerate(args.judge or stand_in, start=1)]
        suites: dict[str, tuple[str, Path, int | None]] = {
            "understanding": ("understanding", SETS / "grammar.tar.gz", args.limit),
            "speech, own voice": ("speech", SETS / "speech.tar.gz", args.limit),
            "speech, voices of prompts": ("speech", seed_tts_list(args.work / "data"), args.limit),
            "dialogue": ("dialogue", SETS / "grammar.tar.gz", args.limit),
            "mtbench": ("dialogue", mtbench_list(args.work / "data"), None),
            "empathy": ("empathy", DEMO / "demo.jsonl", args.limit if args.limit < 8 else None),
            "latency": ("latency", DEMO / "demo.jsonl", args.limit if args.limit < 8 else None),
        }
        rows: dict[str, Row] = {}
        for name in [*suites, "live", "mini, own suite"]:
            work, done = args.work / folder_of(name), args.work / f"{folder_of(name)}.json"
            if done.is_file():
                rows[name] = Row(**json.loads(done.read_text()))
                continue
            if args.only and name not in args.only:
                continue
            work.mkdir(parents=True, exist_ok=True)
            if name == "live":
                rows[name] = live(name, args, work)
            elif name in suites:
                suite, data, limit = suites[name]
                rows[name] = plain_suite(name, suite, data, limit, args, work, model, judges)
                if name == "latency":
                    rows[name].notes.append(f"Load of the machine when it was done: {_load()}.")
            else:
                rows[name] = own_suite(name, args, work, model)
            done.write_text(json.dumps(dataclasses.asdict(rows[name])))
            print(f"{name}: {rows[name]}", flush=True)
        readme(args, rows)


if __name__ == "__main__":
    main()
