"""IFEval: whether an answer keeps instructions that can be checked, by the rules of the package ``lm-eval`` (its own,
unchanged)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from osum_echat.evaluation import ScorerUnavailable
from osum_echat.evaluation.items import Item
from osum_echat.evaluation.results import Result
from osum_echat.evaluation.scorers import PERCENT, Measure, Score, Tools


def _rules() -> Any:
    try:
        return importlib.import_module("lm_eval.tasks.ifeval.utils")
    except ImportError as error:
        raise ScorerUnavailable("IFEval needs lm-eval: pip install 'osum-echat[ifeval]'") from error


class InstructionFollowing:
    """Prompt- and instruction-level accuracy, strict and loose."""

    measures: Mapping[str, Measure] = {
        "prompt_strict": PERCENT,
        "instruction_strict": PERCENT,
        "prompt_loose": PERCENT,
        "instruction_loose": PERCENT,
    }

    def __init__(self, tools: Tools, _: str = "") -> None:
        self.rules = _rules()

    def score(self, item: Item, result: Result) -> Score | None:
        instructions = item.extra.get("instruction_id_list")
        if not instructions:
            return None
        kwargs = item.extra.get("kwargs") or [{} for _ in instructions]
        if not isinstance(instructions, list) or not isinstance(kwargs, list) or len(kwargs) != len(instructions):
            raise ValueError("instruction_id_list and kwargs must be lists of one length")
        if not all(isinstance(known, dict) for known in kwargs if known is not None):
            raise ValueError("kwargs must be a list of objects")
        example = self.rules.InputExample(
            item.extra.get("key", 0), list(instructions), item.text, [dict(k or {}) for k in kwargs]
        )
        values: dict[str, tuple[float, float]] = {}
        for kind in ("strict", "loose"):
            try:
                found = getattr(self.rules, f"test_instruction_following_{kind}")(example, result.text)
            except LookupError as error:  # the sentence splitter's data, which lm-eval tries to fetch when it is imported
                raise ScorerUnavailable(
                    "IFEval counts sentences with nltk's data: python -m nltk.downloader punkt_tab"
                ) from error
            kept = found.follow_instruction_list
            values[f"prompt_{kind}"] = (all(kept), 1)
            values[f"instruction_{kind}"] = (sum(kept), len(kept))
        return Score(values)
