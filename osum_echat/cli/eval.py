"""Measure a checkpoint, or the answers of any other system: suites of questions, scored by rules and by a judge, as a
report with intervals.

Three steps with plain jsonl between them, each of which goes on where it was: generate (results.jsonl), score
(scores.jsonl), judge (judgements.jsonl). The report is report.md, report.json and report.html in the output folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osum_echat.batch.options import add_engine_arguments, check_engine_arguments, make_engine
from osum_echat.cli.common import UserError, add_model_arguments, find_checkpoint, load_echat, run

if TYPE_CHECKING:
    from osum_echat.evaluation.judge import Budget, Judge
    from osum_echat.evaluation.report import Report
    from osum_echat.evaluation.run import Plan
    from osum_echat.evaluation.suite import Suite
    from osum_echat.pipeline import EChat

EXAMPLES = """examples:
  osum-echat eval checkpoints/mini --suite understanding --data test/data.list --out out/eval --limit 20
  osum-echat eval mini --suite speech --data seedtts_testset/en/meta.lst --out out/speech
  osum-echat eval mini --suite empathy --data test/data.list --out out/empathy --judge http://localhost:8000/v1 --judge-model qwen
  osum-echat eval --suite dialogue --data voicebench/ --from other/results.jsonl --out out/other
  osum-echat eval --compare out/one out/other
  osum-echat eval --make-items test/data.list --out items.jsonl
"""


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "system", nargs="*", metavar="CHECKPOINT | key=value", help="the checkpoint (as --checkpoint), and changes to the suite"
    )
    parser.add_argument("--suite", action="append", default=[], help="a suite's name or a YAML file (repeatable)")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="[SUITE=]PATH",
        help="list, file or folder of any form that suites read; with several suites SUITE=PATH gives each its own",
    )
    parser.add_argument("--out", type=Path, help="folder of results and reports (--make-items: the file)")
    parser.add_argument("--limit", type=int, help="only the first so many items of each set")
    parser.add_argument("--steps", default="generate,score,judge", help="which steps to do (default: all; judging needs --judge)")
    parser.add_argument(
        "--from", dest="results", type=Path, help="a results file of this or another system, instead of generating"
    )
    parser.add_argument("--name", help="what the report calls the system (default: the checkpoint's or the file's name)")
    parser.add_argument("--wheels", type=Path, help="folder with the recogniser's packages, instead of downloading them")
    parser.add_argument("--export", default="", help="also write forms of other kits: voicebench,kimi,eibench,mtalk,versa")
    parser.add_argument("--devices", help="generate with one process a device, such as cuda:0,cuda:1 or cpu,cpu")
    parser.add_argument("--part", default="0/1", help=argparse.SUPPRESS)
    judge = parser.add_argument_group("judge")
    judge.add_argument(
        "--judge", action="append", default=[], metavar="URL", help="an OpenAI-compatible URL (repeatable: judges are compared)"
    )
    judge.add_argument("--judge-model", action="append", default=[], metavar="M", help="its model (default: what the server has)")
    judge.add_argument(
        "--max-calls",
        type=int,
        help="calls of judges at most, tries and all suites counted; what is left over is counted as missing",
    )
    judge.add_argument("--judge-cache", type=Path, help="folder of kept answers (default: in the cache folder)")
    other = parser.add_argument_group("without a model")
    other.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two runs of one suite side by side, and stop")
    other.add_argument("--make-items", metavar="LIST", help="write items of the empathy suite from a labelled list, and stop")
    other.add_argument("--list-suites", action="store_true", help="names of the suites, and stop")
    add_engine_arguments(parser)
    add_model_arguments(parser)
    return parser


@dataclass(frozen=True)
class Loading:
    """Makes the model of a command on a device; can be sent to another process."""

    args: argparse.Namespace

    def __call__(self, device: str) -> EChat:
        return load_echat(argparse.Namespace(**{**vars(self.args), "device": device}))


class Model:
    """The checkpoint, loaded when it is first asked for."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    @cached_property
    def echat(self) -> EChat:
        return load_echat(self.args)

    def __call__(self) -> EChat:
        return self.echat


def progress(line: str) -> None:
    print(f"\r{line:<78}", end="", file=sys.stderr, flush=True)


def say(line: str) -> None:
    print(f"\r{line:<78}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = make_parser(prog)
    args = parser.parse_intermixed_args(argv)
    changes = [word for word in args.system if "=" in word and not Path(word).exists()]
    named = [word for word in args.system if word not in changes]
    if len(named) > 1:
        parser.error(f"one checkpoint at a time, found {', '.join(named)}")
    if named:
        args.checkpoint = named[0]
    check_engine_arguments(parser, args)
    if args.list_suites or args.compare or args.make_items:
        return run(lambda: _without_model(args))
    if not args.suite or not args.data or args.out is None:
        parser.error("--suite, --data and --out are needed (or --compare, --make-items, --list-suites)")
    return run(lambda: _evaluate(args, changes))


def _without_model(args: argparse.Namespace) -> int:
    from osum_echat.evaluation import compare, maker, readers
    from osum_echat.evaluation.suite import known_suites, load_suite

    if args.list_suites:
        for name in known_suites():
            print(f"{name:<14} {' '.join(load_suite(name).about.split())}")
        return 0
    if args.compare:
        a, b = args.compare
        path = compare.write(a, b, args.out or b)
        print(path.read_text(encoding="utf-8"))
        return 0
    if args.out is None:
        raise UserError("--make-items needs --out FILE.jsonl")
    entries = list(maker.by_label(readers.open_items(args.make_items, limit=args.limit)))
    made, left_out = maker.write_items(args.out, entries)
    print(json.dumps({"items": made, "left_out": left_out, "file": str(args.out)}))
    return 0 if made else 1


def _evaluate(args: argparse.Namespace, changes: Sequence[str]) -> int:
    from osum_echat.evaluation.judge import Budget
    from osum_echat.evaluation.run import check, run_suite
    from osum_echat.evaluation.suite import changes_of, load_suite

    mine = {given: changes_of(given, args.suite, changes) for given in args.suite}
    suites = [load_suite(given, mine[given]) for given in args.suite]
    names = [suite.name for suite in suites]
    if len(set(names)) < len(names):
        raise UserError(f"each suite once, found {', '.join(names)}")
    model = None if args.results is not None else Model(args)
    judges, budget = _judges(args), Budget(args.max_calls)
    recognisers: dict[str, Any] = {}
    failed = 0
    for given, suite in zip(args.suite, suites, strict=True):
        out = args.out / suite.name if len(suites) > 1 else args.out
        plan = _plan(args, suite, _data_of(args.data, suite.name, names), out, judges, budget, recognisers)
        if args.part != "0/1":
            return _share(plan, Model(args), args.part)
        try:
            check(plan)
            if args.devices and args.results is None and "generate" in plan.steps:
                _on_devices(plan, args, [given, *mine[given]])
            report = run_suite(plan, model)
        except (ValueError, UserError) as error:
            if len(suites) == 1:
                raise
            say(f"{suite.name}: {error}")
            failed += 1
            continue
        print(file=sys.stderr)
        _print(report, out)
        failed += not report.reached
    return 1 if failed == len(suites) else 0


def _data_of(given: Sequence[str], suite: str, suites: Sequence[str]) -> str:
    """The data of a suite: its own ``SUITE=PATH``, else the one that is for all."""
    own = {name: path for name, _, path in (text.partition("=") for text in given) if path and name in suites}
    common = [text for text in given if text.partition("=")[0] not in suites or "=" not in text]
    if suite in own:
        return own[suite]
    if len(common) != 1:
        raise UserError(f"no data for suite {suite}: give --data PATH, or --data {suite}=PATH")
    return common[0]


def _plan(
    args: argparse.Namespace,
    suite: Suite,
    data: str,
    out: Path,
    judges: Sequence[Judge],
    budget: Budget,
    recognisers: dict[str, Any],
) -> Plan:
    from osum_echat.evaluation.run import Plan

    return Plan(
        suite,
        data,
        out,
        system=args.name or (args.results.parent.name or args.results.stem if args.results else Path(args.checkpoint).name),
        checkpoint="" if args.results else _fingerprint(args.checkpoint),
        limit=args.limit,
        results=args.results,
        steps=[step.strip() for step in args.steps.split(",") if step.strip()],
        judges=judges,
        budget=budget,
        exports=[name.strip() for name in args.export.split(",") if name.strip()],
        token2wav=args.token2wav or (None if args.results else _own_token2wav(args.checkpoint)),
        wheels=args.wheels,
        recognisers=recognisers,
        engine=make_engine(args, args.device) if args.engine != "local" else None,
        load=Loading(args),
        say=say,
        progress=progress,
    )


def _own_token2wav(checkpoint: str) -> str | None:
    """The checkpoint's own token2wav folder, whose speaker network compares voices."""
    with contextlib.suppress(UserError, FileNotFoundError):  # said when the model is loaded, if it is
        folder = find_checkpoint(checkpoint) / "token2wav"
        return str(folder) if folder.is_dir() else None
    return None


def _fingerprint(checkpoint: str) -> str:
    from osum_echat.evaluation.claim import fingerprint

    with contextlib.suppress(UserError, FileNotFoundError):  # said when the model is loaded
        return fingerprint(find_checkpoint(checkpoint))
    return ""


def _judges(args: argparse.Namespace) -> list[Judge]:
    from osum_echat.evaluation.judge import Judge
    from osum_echat.evaluation.recogniser import cache_folder

    if len(args.judge_model) > len(args.judge):
        raise UserError("--judge-model without its --judge URL")
    cache = args.judge_cache or cache_folder() / "judge"
    models: list[str | None] = [*args.judge_model, *[None] * (len(args.judge) - len(args.judge_model))]
    return [Judge(url, model, cache) for url, model in zip(args.judge, models, strict=True)]


def _print(report: Report, out: Path) -> None:
    text = (out / "report.md").read_text(encoding="utf-8")
    print(text.partition("## Pictures")[0].partition("## What is missing")[0].partition("## Examples")[0])
    holes = report.holes()
    if holes:
        print(f"{len(holes)} holes, see report.md; the first: {holes[0]['message']}", file=sys.stderr)
    print(f"report: {out / 'report.html'}")
    values = {name: round(number.value, 2) for name, number in report.headline.items()}
    print(json.dumps({"suite": report.suite.name, "scored": report.reached, "holes": len(holes), **values}))


def _share(plan: Plan, model: Model, part: str) -> int:
    """One process of several: generate its share of the items, and stop."""
    from osum_echat.cli.batch import part_of
    from osum_echat.evaluation.generate import generate
    from osum_echat.evaluation.run import read_sets

    sets = read_sets(plan.suite, plan.data, plan.limit)
    generate(model(), plan.suite, sets.items, plan.out, share=part_of(part))
    return 0


def _on_devices(plan: Plan, args: argparse.Namespace, suite: Sequence[str]) -> None:
    """Generate with one process a device, then put their results together. ``suite``: as it was given, with its
    changes.

    Raises:
        UserError: a process failed.
    """
    from osum_echat.evaluation.claim import claim
    from osum_echat.evaluation.parallel import generate_on
    from osum_echat.evaluation.run import is_generated, read_sets

    claim(plan.out, plan.suite, plan.checkpoint)
    if is_generated(plan.suite, read_sets(plan.suite, plan.data, plan.limit), plan.out):
        return
    name, *changes = suite
    options = ["--suite", name, "--data", plan.data, "--out", str(plan.out), "--checkpoint", args.checkpoint, *changes]
    for name in ("config", "token2wav", "speaker", "dtype", "profile", "threads", "limit", "llm_engine", "vllm_folder"):
        if getattr(args, name, None) is not None:
            options += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    devices = [device.strip() for device in args.devices.split(",") if device.strip()]
    failed = generate_on(devices, options, plan.out, say)
    if failed:
        raise UserError("; ".join(failed))
