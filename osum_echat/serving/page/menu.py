"""What the page offers: the modes that a checkpoint has learnt, at most eight at first, the rest under "more"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from osum_echat.pipeline.ask import MODES, AskMode
from osum_echat.serving.page.texts import has, text

if TYPE_CHECKING:
    from osum_echat.dialogue.dialect import Dialect

OWN = "own"
"""Name of the entry in which the visitor writes the instruction; its mode is ``asr`` with a prompt."""
FIRST = ("s2s_think", "s2s", "s2t_chat_think", "s2t_chat", "asr", "asr+emotion+age+gender", "tts", "t2t")
"""Names of the modes that are offered at first, in this order."""


def mode_of(name: str) -> AskMode:
    """The mode of an entry."""
    return MODES["asr" if name == OWN else name]


def offered(dialects: Sequence[Dialect], more: bool = False) -> list[str]:
    """Names of the entries that every one of the loaded checkpoints has learnt; without ``more`` those of `FIRST`
    only."""
    names = [*FIRST, *(name for name in MODES if name not in FIRST), OWN] if more else list(FIRST)
    return [name for name in names if not any(refused(dialect, name) for dialect in dialects)]


def refused(dialect: Dialect, name: str) -> bool:
    """Whether the checkpoint has not learnt the entry."""
    if name == OWN:
        return dialect.refuse_unlisted
    mode = MODES[name]
    steps = [mode, *([MODES[mode.then]] if mode.then else [])]
    return any(dialect.refusal(step.task or step.output_type) is not None for step in steps)


def title(language: str, name: str) -> str:
    """The entry's text in the menu."""
    if has(f"mode.{name}"):
        return text(language, f"mode.{name}")
    return text(language, "understand", what=", ".join(text(language, f"aspect.{aspect}") for aspect in MODES[name].aspects))
