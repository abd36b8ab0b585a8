"""Whose answers a folder holds, and to which questions, so that a run never takes those of another checkpoint for its
own (``asked.json``)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from osum_echat.config import ConfigError
from osum_echat.evaluation.results import FILE as RESULTS
from osum_echat.evaluation.suite import Part, Suite

FILE = "asked.json"
_WEIGHTS = ("*.safetensors", "*.pt", "*.bin")


def fingerprint(checkpoint: Path) -> str:
    """A checkpoint as it is now: its name, and date and size of its newest file of weights. "" when there is none."""
    files = [checkpoint] if checkpoint.is_file() else [path for kind in _WEIGHTS for path in checkpoint.glob(kind)]
    if not files:
        return ""
    newest = max(files, key=lambda path: path.stat().st_mtime)
    facts = newest.stat()
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts.st_mtime))
    return f"{checkpoint.resolve().name} ({newest.name}, {facts.st_size:,} bytes, written {written})"


def claim(out: Path, suite: Suite, checkpoint: str) -> None:
    """Note whose answers will be in ``out``. Raises ConfigError when answers are there that are another checkpoint's,
    or to other questions.

    Args:
        checkpoint: as `fingerprint` gives it; "": not known, so it is not compared.
    """
    path = out / FILE
    mine: dict[str, Any] = {"suite": suite.name, "checkpoint": checkpoint}
    mine["parts"] = {name: _question(suite, part) for name, part in suite.parts.items() if not part.same_as}
    if path.is_file() and (out / RESULTS).is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        _compare(out, before, mine)
        mine["parts"] = {**before["parts"], **mine["parts"]}
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mine, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _compare(out: Path, before: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    remedy = "choose another --out, or delete it"
    if before["suite"] != mine["suite"]:
        raise ConfigError(f"{out} holds answers of suite {before['suite']}, not {mine['suite']}; {remedy}")
    if before["checkpoint"] and mine["checkpoint"] and before["checkpoint"] != mine["checkpoint"]:
        raise ConfigError(f"{out} holds the answers of {before['checkpoint']}, not of {mine['checkpoint']}; {remedy}")
    changed = [name for name, asked in mine["parts"].items() if before["parts"].get(name, asked) != asked]
    if changed:
        raise ConfigError(
            f"{out} holds answers to part {changed[0]!r} with other settings (ask, written, seed, greedy); {remedy}"
        )


def _question(suite: Suite, part: Part) -> str:
    """What of a suite shapes the answers of a part."""
    made_of = [part.ask, part.written, part.stream, part.listen, suite.seed, suite.greedy]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()[:12]
