"""A suite from data to report: read, generate, score, judge, write. Each step goes on where it was, and can be left
out.

report = run_suite(Plan(load_suite("understanding"), "test/data.list", Path("out"), system="mini"), echat)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osum_echat import config as config_io
from osum_echat.config import ConfigError
from osum_echat.evaluation import generate as generation
from osum_echat.evaluation import judge as judging
from osum_echat.evaluation import maker, readers, results, score, summary
from osum_echat.evaluation.claim import claim
from osum_echat.evaluation.exports import EXPORTS, export
from osum_echat.evaluation.items import Entry, Item, ItemError
from osum_echat.evaluation.report import Report
from osum_echat.evaluation.scorers import Tools, scorer_class
from osum_echat.evaluation.suite import Suite

if TYPE_CHECKING:
    from osum_echat.batch.work import Engine
    from osum_echat.pipeline import EChat

log = logging.getLogger(__name__)
STEPS = ("generate", "score", "judge")
PAPER = Path(__file__).with_name("paper_results.yaml")


def quiet(_: str) -> None:
    """A progress that says nothing."""


@dataclass
class Plan:
    """One suite's run.

    Attributes:
        data: what is read, a file or folder. out: folder of results and report.
        system: name of what is measured, for reports. limit: items at most of each set.
        checkpoint: which weights answer (`claim.fingerprint`): answers of others in ``out`` are refused; "": not known.
        results: answers of another system, instead of generating. steps: which of `STEPS` to do.
        judges, budget: for the third step; without judges it is left out. Several plans may share a budget.
        exports: forms to write besides (`exports.EXPORTS`).
        token2wav: folder whose speaker network compares voices. wheels: folder of the recogniser's packages.
        engine, load: answers are generated on this engine instead of in this process, by models that ``load`` makes on
            a device.
        say, progress: lines for a person: what matters, and how far it is.
    """

    suite: Suite
    data: str
    out: Path
    system: str = "system"
    checkpoint: str = ""
    limit: int | None = None
    results: Path | None = None
    steps: Sequence[str] = STEPS
    judges: Sequence[judging.Judge] = ()
    budget: judging.Budget | None = None
    exports: Sequence[str] = ()
    token2wav: str | None = None
    wheels: Path | None = None
    recognisers: dict[str, Any] = field(default_factory=dict)
    engine: Engine | None = None
    load: Callable[[str], EChat] | None = None
    say: Callable[[str], None] = quiet
    progress: Callable[[str], None] = quiet


@dataclass
class Sets:
    """Items of each part, and what could not be used (each fault once, though several parts read the same file)."""

    items: dict[str, list[Item]] = field(default_factory=dict)
    faults: list[ItemError] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def read_sets(suite: Suite, data: str, limit: int | None = None) -> Sets:
    """Read what each part needs.

    A part of which no item has what it needs is skipped, with the reason; so one suite fits lists with few labels and
    with many.

    Raises:
        ValueError: data cannot be read, or no part has an item.
    """
    read: dict[tuple[str, str], list[Entry]] = {}
    found = Sets()
    told: set[tuple[str, int, str, str]] = set()
    for name, part in suite.parts.items():
        place, form = str(Path(data) / part.data) if part.data else data, part.format or suite.format
        if part.same_as in found.skipped:
            found.skipped[name] = f"it scores the answers of part {part.same_as!r}, which is left out"
            continue
        if part.optional and not Path(place).exists():
            found.skipped[name] = f"{place} is not there"
            continue
        if (place, form) not in read:
            entries: list[Entry] = readers.open_items(place, form)
            read[place, form] = list(maker.by_label(entries)) if suite.items == "labels" else entries
        good, bad = readers.usable(read[place, form], tuple(part.needs))
        chosen = [item for item in good if not part.groups or item.group in part.groups]
        if part.same_as:
            asked = {item.id for item in found.items[part.same_as]}
            chosen = [item for item in chosen if item.id in asked]
        chosen = chosen[: part.take][: None if part.same_as else limit]
        if chosen:
            found.items[name] = chosen
        else:
            found.skipped[name] = f"no item {'of its groups ' if good else 'with ' + ', '.join(part.needs) + ' '}in {place}"
        # A missing label is worth telling where others have it: not for a list that has no such label at all.
        for fault in bad if chosen else [entry for entry in bad if not entry.reason.startswith("no_label")]:
            key = (fault.source, fault.line, fault.id, fault.reason)
            if key not in told:
                told.add(key)
                found.faults.append(fault)
    if not found.items:
        raise ValueError(
            f"suite {suite.name} finds nothing to do in {data}: " + "; ".join(f"{k}: {v}" for k, v in found.skipped.items())
        )
    return found


def run_suite(plan: Plan, echat: Callable[[], EChat] | EChat | None = None) -> Report:
    """Do the plan's steps and write its report, which has what earlier runs of the other steps found for the same
    answers.

    Args:
        echat: the model, or a function that loads it (called only when something is left to generate).

    Raises:
        ValueError: data, results or settings that cannot be used at all.
    """
    check(plan)
    suite = plan.suite
    sets = read_sets(suite, plan.data, plan.limit)
    for name, why in sets.skipped.items():
        plan.say(f"{suite.name}: part {name!r} is left out: {why}")
    plan.out.mkdir(parents=True, exist_ok=True)
    source = plan.results or plan.out / results.FILE
    if plan.results is None and "generate" in plan.steps:
        claim(plan.out, suite, plan.checkpoint)
        _generate(plan, sets, echat)
    answers, faults = results.read_results(source, suite.name)
    rows, strange = score.join(suite, sets.items, answers, source)
    if plan.limit is None:
        faults += strange
    known_only = "score" not in plan.steps
    scored = score.score(suite, rows, plan.out, lambda items: _tools(plan, items), plan.progress, known_only)
    about = _about(plan, scored)
    if "judge" in plan.steps and plan.judges:
        about += judging.run(suite, rows, plan.out, plan.judges, plan.budget, plan.say, plan.progress)
    else:
        about += judging.known(suite, rows, plan.out)
    report = Report(
        suite,
        plan.system,
        summary.summarise(scored),
        rows,
        about,
        [*sets.faults, *faults],
        scored.unavailable,
        paper(suite.paper),
    )
    report.write(plan.out)
    if plan.exports:
        for path in export(rows, plan.out / "export", plan.exports, plan.system):
            plan.say(f"exported {path}")
    return report


def check(plan: Plan) -> None:
    """Look at everything that is named before anything is computed. Raises ConfigError for what is not there."""
    unknown = [step for step in plan.steps if step not in STEPS]
    if unknown:
        raise ConfigError(f"--steps {','.join(unknown)}: use {', '.join(STEPS)}")
    unknown = [name for name in plan.exports if name not in EXPORTS]
    if unknown:
        raise ConfigError(f"--export {','.join(unknown)}: use {', '.join(EXPORTS)}")
    if plan.limit is not None and plan.limit < 1:
        raise ConfigError(f"--limit {plan.limit}: use a number from 1 on")
    for part in plan.suite.parts.values():
        for spec in part.scorers:
            scorer_class(spec)
        if part.judge:
            judging.load_prompt(part.judge)
    paper(plan.suite.paper)
    if plan.suite.format == "duplex" and plan.results is None and "generate" in plan.steps:
        raise ConfigError(
            f"suite {plan.suite.name} scores conversations with a server: osum-echat duplex --url ws://... --in {plan.data} --out {plan.out} "
            "holds them and writes this report; --from scores those that were held before"
        )


def is_generated(suite: Suite, sets: Sets, out: Path) -> bool:
    """Whether nothing is left to ask."""
    done = {(row["part"], row["id"]) for row in results.Lines(out / results.FILE).rows()}
    asked = {name: items for name, items in sets.items.items() if not suite.parts[name].same_as}
    return all((name, item.id) in done for name, items in asked.items() for item in items)


def _generate(plan: Plan, sets: Sets, echat: Callable[[], EChat] | EChat | None) -> None:
    if is_generated(plan.suite, sets, plan.out):
        return
    if plan.engine is not None and plan.load is not None:
        from osum_echat.evaluation.on_engine import generate_on_engine

        generate_on_engine(plan.engine, plan.load, plan.suite, sets.items, plan.out, plan.progress)
        return
    if echat is None:
        raise ConfigError("there is no model to ask: give a checkpoint, or --from a file of results")
    model = echat() if callable(echat) else echat
    generation.generate(model, plan.suite, sets.items, plan.out, plan.progress)


def _tools(plan: Plan, items: Sequence[Item]) -> Tools:
    return Tools(plan.suite, items, plan.token2wav, plan.wheels, plan.recognisers)


def _about(plan: Plan, scored: score.Scored) -> list[str]:
    """How it was measured, for the report."""
    import torch

    from osum_echat import __version__

    lines = [f"data: {Path(plan.data).name}" + (f", the first {plan.limit} items of each set" if plan.limit is not None else "")]
    if plan.results is not None:
        lines.append(f"answers from {plan.results.name}")
    lines += [f"{name}: {'; '.join(sorted(values))}" for name, values in sorted(scored.made_with.items())]
    lines.append(
        f"osum-echat {__version__}, torch {torch.__version__}, CPU threads {torch.get_num_threads()}, {time.strftime('%Y-%m-%d')}"
    )
    return lines


def paper(table: str) -> dict[str, Any]:
    """A table of published numbers (``paper_results.yaml``, which docs/ shows too); empty without a name."""
    if not table:
        return {}
    tables = config_io.read_yaml(PAPER)
    if table not in tables:
        raise ConfigError(f"{PAPER.name} has no table {table!r}: {', '.join(tables)}")
    return dict(tables[table])
