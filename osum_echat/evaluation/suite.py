"""What a suite is: a YAML file that says which data is read, what the system is asked, and which scorers look at the
answer.

    name: understanding
    parts:
      words: {ask: {kind: understand, task: <TRANSCRIBE>}, needs: [wav, text], scorers: [wer, cer]}

The library's suites are in ``osum_echat/evaluation/suites``; a path to another YAML file is as good. Every key can be
changed on the command line (``normalizer=own``, ``parts.words.take=20``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from osum_echat import config as config_io
from osum_echat.config import ConfigError

FOLDER = Path(__file__).with_name("suites")


@dataclass(frozen=True)
class Bar:
    """What a number should reach. ``lower_is_better`` for error rates."""

    bar: float
    aim: float
    lower_is_better: bool = False

    def verdict(self, value: float) -> str:
        def reached(limit: float) -> bool:
            return value <= limit if self.lower_is_better else value >= limit

        return "aim reached" if reached(self.aim) else "bar reached" if reached(self.bar) else "below the bar"


@dataclass
class Part:
    """One question that is put to every item of a set.

    Attributes:
        about: a sentence for the report.
        ask: fields of `pipeline.Ask` but the recording and the text: kind, task, prompt, think, speak, interleaved,
            temperature, max_tokens. ``{text}`` in a prompt stands for the item's text.
        written: the system reads the item's text instead of hearing its recording.
        data: file or folder below ``--data``; empty: ``--data`` itself. format: its form when the suite's does not
            hold.
        needs: fields without which an item is left out and counted (`items.Item.has`).
        groups: groups that this part takes; empty: all.
        scorers: names of `scorers.SCORERS`, with an argument behind a colon (``tag:emotion``).
        judge: name of a judge's prompt; empty: no judge.
        take: only the first so many items.
        stream: ask one after the other and take the time of what comes (latency).
        listen: the task by which the system then hears its own spoken reply (empathy: ``<EMOTION>``); its answer goes
            to the judge.
        same_as: results are those of another part, so that the question is put once and scored twice; only items of
            that part are taken.
        optional: the part is left out, with a sentence, when its data are not there.
        count_refusals: what the checkpoint refuses (past turns, the length of a recording) counts as an answer without
            words, so that a refusal is never better than a wrong answer; else it is a hole, as everything that could
            not be asked for another reason.
    """

    RENAMED_KEYS: ClassVar[Mapping[str, str]] = {"refusals_count": "count_refusals"}

    about: str = ""
    ask: dict[str, Any] = field(default_factory=dict)
    written: bool = False
    data: str = ""
    format: str | None = None
    needs: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    scorers: list[str] = field(default_factory=list)
    judge: str = ""
    take: int | None = None
    stream: bool = False
    listen: str = ""
    same_as: str = ""
    optional: bool = False
    count_refusals: bool = False

    def __post_init__(self) -> None:
        known = {"kind", "task", "prompt", "think", "speak", "interleaved", "temperature", "max_tokens"}
        if unknown := sorted(set(self.ask) - known):
            raise ValueError(f"ask has unknown key(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}")


@dataclass
class Suite:
    """A whole suite.

    Attributes:
        name, about: for the report. format: form of the data (`readers.FORMS`), ``auto`` looks.
        parts: by name; run in order.
        items: ``labels``: each item is put once into the group of every label that it has, and into ``multi`` with two
            or more (EChat-eval).
        normalizer: text normalisation before words are compared: ``own`` (`metrics.normalize`), ``standard`` (Whisper's
            for English, WeText for Chinese), ``auto``: standard where its packages are installed; the report says
            which.
        recogniser: who writes down spoken replies (`recogniser.load`): a name for each language, or one for all.
        speaker_net: an ONNX speaker network (80 mel filter banks in, one vector out) in place of the checkpoint's own.
        batch_size, seed, greedy: of the generation.
        headline: number of the report -> ``part.measure`` or ``part/group.measure``. bars: what such numbers should
            reach.
        paper: table of docs/paper_results.yaml that is printed beside.
        price_per_million: what a million tokens in and out cost at the judge, for the estimate; empty: only tokens are
            told.
    """

    name: str
    about: str = ""
    format: str = "auto"
    parts: dict[str, Part] = field(default_factory=dict)
    items: Literal["", "labels"] = ""
    normalizer: Literal["auto", "own", "standard"] = "auto"
    recogniser: dict[str, str] = field(default_factory=lambda: {"en": "whisper-base", "zh": "whisper-base"})
    speaker_net: str | None = None
    batch_size: int = 16
    seed: int = 0
    greedy: bool = False
    headline: dict[str, str] = field(default_factory=dict)
    bars: dict[str, Bar] = field(default_factory=dict)
    paper: str = ""
    price_per_million: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a suite needs parts")
        if self.batch_size < 1:
            raise ValueError("batch_size must be at least 1")
        if len(self.price_per_million) not in (0, 2):
            raise ValueError("price_per_million is two numbers: for tokens in and out")
        before: list[str] = []
        for name, part in self.parts.items():
            if part.same_as and part.same_as not in before:
                raise ValueError(f"parts.{name}.same_as: there is no part {part.same_as} before it")
            before.append(name)


def known_suites() -> list[str]:
    """Names of the suites that come with the library."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_suite(name: str | Path, changes: Sequence[str] = ()) -> Suite:
    """A suite of the library by its name, or a YAML file. Raises ConfigError."""
    path = _file(name)
    known = config_io.read_yaml(path).get("parts") or {}
    for part in config_io.parse_overrides(changes).get("parts") or {}:
        if part not in known:
            raise ConfigError(f"{path.name}: parts.{part}: there is no such part to change; parts are {', '.join(known)}")
    return config_io.load(Suite, path, changes)


def changes_of(name: str | Path, others: Sequence[str | Path], changes: Sequence[str]) -> list[str]:
    """Those of the changes that a suite takes, where the same ones are given for several: a part that only ``others``
    have is theirs."""
    known, theirs = _parts(name), {part for other in others for part in _parts(other)}
    out = []
    for change in changes:
        section, _, rest = change.partition("=")[0].partition(".")
        part = rest.rpartition(".")[0]
        if section != "parts" or part in known or part not in theirs:
            out.append(change)
    return out


def _file(name: str | Path) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return path
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"there is no suite {name!r}: use {', '.join(known_suites())}, or a path to a .yaml file")
    return path


def _parts(name: str | Path) -> set[str]:
    return set(config_io.read_yaml(_file(name)).get("parts") or {})
