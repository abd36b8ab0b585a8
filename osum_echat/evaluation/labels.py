"""One name for a label that models and data sets spell differently: ``<HAPPY>``, ``joy`` and ``开心`` are all *happy*.

The table is data (`labels.yaml`). A spelling that is not in it is compared as it is written, without brackets and case.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from osum_echat.config import read_yaml
from osum_echat.metrics import bare_tag

KINDS = ("gender", "age", "emotion", "event")
_FILE = Path(__file__).with_name("labels.yaml")
_BRACKETED = re.compile(r"<([^<>]+)>")
_YEARS = re.compile(r"\d{1,3}")


@cache
def aliases(kind: str) -> dict[str, str]:
    """Spelling (lower case, no brackets) -> name, for one kind of label."""
    table = read_yaml(_FILE)[kind]
    return {bare_tag(str(spelling)): str(name) for name, spellings in table.items() for spelling in (name, *spellings)}


def canonical(kind: str, label: object) -> str:
    """The name of a label. An age in years becomes child (under 14), adult or old (60 and more)."""
    text = bare_tag(str(label))
    if kind == "age" and _YEARS.fullmatch(text):
        years = int(text)
        return "child" if years < 14 else "old" if years >= 60 else "adult"
    return aliases(kind).get(text, text)


def read_label(kind: str, text: str, among: frozenset[str] = frozenset()) -> str | None:
    """The label of ``kind`` that a reply names, or None.

    Tags in brackets come first (the last one that is known: transcripts stand in front of their tag); without any, a
    reply that is one label and nothing else counts, and then a label that stands as a word in it, if there is only one.

    Args:
        among: names that the data set uses; a tag that is unknown to the table counts when it is one of them.
    """
    known = aliases(kind)
    tags = [bare_tag(tag) for tag in _BRACKETED.findall(text)]
    for tag in reversed(tags):
        name = known.get(tag, tag)
        if tag in known or name in among:
            return name
    whole = bare_tag(text.rstrip(".。!！ "))
    if whole in known or whole in among:
        return known.get(whole, whole)
    lowered = text.lower()
    found = {name for spelling, name in known.items() if _stands_in(spelling, lowered)}
    return found.pop() if len(found) == 1 else None


def _stands_in(spelling: str, text: str) -> bool:
    if not spelling.isascii():
        return spelling in text
    return re.search(rf"\b{re.escape(spelling)}\b", text) is not None
