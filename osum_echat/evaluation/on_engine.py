"""The generate step on an engine (`osum_echat.batch`), such as a Ray cluster: each worker does `generate.generate` for
its block of items."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from osum_echat.batch.output import write_files
from osum_echat.batch.work import Engine, Outcome, Unit, Work
from osum_echat.evaluation.generate import Progress, generate, question_of, quiet
from osum_echat.evaluation.items import Item
from osum_echat.evaluation.results import FILE, Lines, Result
from osum_echat.evaluation.suite import Suite
from osum_echat.pipeline import EChat


@dataclass(frozen=True)
class Generating:
    """The work. A unit's payload is the name of a part and items of it that belong together (`units_of`).

    Attributes:
        load: makes the model on a device; can be pickled.
    """

    suite: Suite
    load: Callable[[str], EChat]

    def open(self, device: str) -> GenerateWorker:
        return GenerateWorker(self.load(device), self.suite)


class GenerateWorker:
    """A loaded model that is asked a suite's questions."""

    def __init__(self, echat: EChat, suite: Suite) -> None:
        self.echat, self.suite = echat, suite

    def run(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        """For each unit the lines of its items; ``wav`` files beside them."""
        sets: dict[str, list[Item]] = {}
        for unit in units:
            part, items = unit.payload
            sets.setdefault(part, []).extend(items)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            path = generate(self.echat, self.suite, sets, folder)
            rows = {(row["part"], row["id"]): row for row in Lines(path).rows()}
            for unit in units:
                part, items = unit.payload
                mine = [rows[part, item.id] for item in items]
                files = {row["wav"]: (folder / row["wav"]).read_bytes() for row in mine if row.get("wav")}
                yield Outcome(unit.number, mine, files)


def generate_on_engine(
    engine: Engine,
    load: Callable[[str], EChat],
    suite: Suite,
    sets: Mapping[str, Sequence[Item]],
    out: Path,
    progress: Progress = quiet,
) -> Path:
    """`generate.generate` on an engine, into the same files; what is written is not asked again.

    Raises:
        ValueError: see `Engine.run`.
    """
    path = out / FILE
    lines = Lines(path)
    done = {(row["part"], row["id"]) for row in lines.rows()}
    units = [unit for unit in units_of(suite, sets) if any((unit.payload[0], item.id) not in done for item in unit.payload[1])]
    asked = {unit.number: unit.payload for unit in units}
    work: Work = Generating(suite, load)
    with lines:
        for count, outcome in enumerate(engine.run(work, units), start=1):
            part, items = asked[outcome.number]
            write_files(out, outcome)
            failed = [Result(item.id, part, suite.name, error=outcome.error).to_dict() for item in items]
            for row in failed if outcome.error is not None else outcome.value:
                if (part, row["id"]) not in done:
                    lines.write(row)
            progress(f"{suite.name}: {count}/{len(units)}")
    return path


def units_of(suite: Suite, sets: Mapping[str, Sequence[Item]]) -> list[Unit]:
    """Items of all parts that are asked; those of one conversation, and those that ask the same, are one unit."""
    units: list[Unit] = []
    for name, part in suite.parts.items():
        together: dict[object, list[Item]] = {}
        for item in () if part.same_as else sets.get(name, ()):
            together.setdefault(item.dialogue_id or question_of(item), []).append(item)
        units += [Unit(len(units) + n, f"{name} {items[0].id}", (name, items)) for n, items in enumerate(together.values())]
    return units
