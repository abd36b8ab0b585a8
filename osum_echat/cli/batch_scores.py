"""What a batch run can count by itself: words that were heard, labels, and how speech ended. Everything else is
`osum-echat eval`.

A reply is never compared with what the user said: words are scored where words were asked for, or where the thought
writes them down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from osum_echat import metrics
from osum_echat.evaluation.labels import canonical
from osum_echat.pipeline.ask import AskMode, find_mode
from osum_echat.rates import CODES_PER_SECOND


def scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts and, in percent, the scores that make sense for the task of these results."""
    answered = [row for row in rows if row.get("error") is None]
    out: dict[str, Any] = {"records": len(rows), "failed": len(rows) - len(answered)}
    out["failed_percent"] = _percent(out["failed"], len(rows))
    if not answered:
        return out
    mode = find_mode(str(answered[0]["task"]))
    out |= {"task": answered[0]["task"], "finish": dict(Counter(str(row["finish"]) for row in answered))}
    return out | _words(mode, answered) | _tags(answered) | (_speech(answered) if mode.speaks else {})


def _words(mode: AskMode, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Word errors of the transcript, or of the words in the thought (thoughts in tags; those in natural language quote
    no transcript)."""
    if "words" in mode.aspects:
        heard = [(row["reference"]["words"], row["text"]) for row in rows]
    elif mode.thinks:
        heard = [(row["reference"]["words"], (row["think"] or {}).get("transcript") or "") for row in rows]
        if not any(said for _, said in heard):
            return {}
    else:
        return {}
    known = [(reference, said) for reference, said in heard if reference]
    if not known:
        return {}
    errors = metrics.total_errors([reference for reference, _ in known], [said for _, said in known])
    return {"scored": len(known), "wer": round(100 * errors.rate, 2)}


def _tags(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy of each kind of label that was asked for and whose right value the list has."""
    kinds = sorted({kind for row in rows for kind in row["tags"]})
    out: dict[str, Any] = {}
    for kind in kinds:
        known = [(row["reference"]["tags"][kind], row["tags"].get(kind)) for row in rows if kind in row["reference"]["tags"]]
        right = sum(found is not None and canonical(kind, found) == canonical(kind, true) for true, found in known)
        if known:
            out[kind] = {"right": right, "of": len(known), "accuracy": _percent(right, len(known))}
    return {"tags": out} if out else {}


def _speech(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Length of the model's own speech, and the shares that were cut off by a limit or came to nothing."""
    lengths = [len(row["speech_tokens"]) / CODES_PER_SECOND for row in rows]
    return {
        "speech": {
            "seconds": round(sum(lengths) / len(lengths), 2),
            "cut_off_percent": _percent(sum(row["finish"] == "length" for row in rows), len(rows)),
            "without_percent": _percent(sum(not row["speech_tokens"] for row in rows), len(rows)),
        }
    }


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 2) if whole else 0.0
