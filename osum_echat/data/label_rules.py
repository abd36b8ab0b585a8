"""What differs between the published processors: how a label is turned into what the model shall say. Data, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from osum_echat.config import warn_older
from osum_echat.data import text


@dataclass(frozen=True)
class LabelRules:
    """How labels are read.

    Attributes:
        think: form of a think: ``language``, the record's own sentence (``extra.think_str``); ``tag``, the template
            filled with tags; ``either``: the sentence where the record has one, else tags.
        strip_leading_tag: a tag in front of a label (the emotion of a reply) is taken off.
        neutral_tag: put in front of a dialogue reply that has no tag; in a think it stands for a tag that is not known.
        reply_tags: reply emotions that are known; empty: all.
        stand_ins: what may stand for a missing tag in a think instead of "unknown".
        names: a label that holds one of these is dropped.
    """

    think: Literal["tag", "language", "either"]
    strip_leading_tag: bool
    neutral_tag: str = "<中立>"
    reply_tags: frozenset[str] = frozenset()
    stand_ins: Mapping[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = text.OTHER_NAMES

    @classmethod
    def read_older(cls, data: dict[str, Any], where: str) -> dict[str, Any]:
        if data.get("think") == "natural":
            warn_older(where, "think: natural", "think: language")
            data["think"] = "language"
        return data


_REPLY_EMOTIONS = ("愉悦", "抱歉", "开心", "愤怒", "惊讶", "厌恶", "悲伤", "害怕", "哭腔", "安慰鼓励", "中立")

LABEL_RULES: Mapping[str, LabelRules] = {
    "language_think": LabelRules(think="language", strip_leading_tag=True),
    "tag_think": LabelRules(
        think="tag",
        strip_leading_tag=False,
        reply_tags=frozenset(f"<{name}>" for name in _REPLY_EMOTIONS),
        stand_ins={"age": "<ADULT>", "gender": "<MALE>", "emotion": "<NEUTRAL>", "event": "<OTHER>"},
        names=("MOSS", *text.OTHER_NAMES),
    ),
}
"""The published processors by name. Two of the three published files follow the same rules (``language_think``)."""

OLDER_NAMES = {"processor": "language_think"}


def get_rules(rules: str | LabelRules) -> LabelRules:
    """Label rules by name. Raises ValueError for an unknown one."""
    if isinstance(rules, LabelRules):
        return rules
    if rules not in LABEL_RULES:
        raise ValueError(f"unknown label rules {rules!r}: use {' or '.join(LABEL_RULES)}, or write rules of your own out")
    return LABEL_RULES[rules]
