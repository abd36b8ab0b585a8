"""What fits a sentence outside the topics: a rule over its form and its words (`open_replies.yaml`), written before any training on it.

A question is not answered as a statement, a request not as a question, and the answer names a thing that was spoken of. So answers to different sentences
differ, and a model can only give them when it has heard the words. The trade-off: an honest "I do not know much about the lighthouse" is no knowledge.
"""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path
from typing import Any, Literal

from osum_echat.config import read_yaml

_VERBAL = ("ed", "ly", "ing")
Kind = Literal["small_talk", "question", "request", "statement"]


@functools.cache
def _rules() -> dict[str, Any]:
    return read_yaml(Path(__file__).parent / "open_replies.yaml")


def _small_talk(sentence: str) -> list[str] | None:
    for row in _rules()["small_talk"]:
        if re.search(row["pattern"], sentence):
            return list(row["clauses"])
    return None


def kind_of(sentence: str) -> Kind:
    """Of a normalised sentence: small talk by its words, else a request or question by its beginning, else a statement."""
    if _small_talk(sentence) is not None:
        return "small_talk"
    if any(re.match(rf"{opening}\b", sentence) for opening in _rules()["request_openings"]):
        return "request"
    return "question" if sentence.split(" ", 1)[0] in _rules()["question_words"] else "statement"


def things(sentence: str) -> list[str]:
    """What a sentence names, the most natural to take up first: phrases with a determiner from the last on, then single content words likewise.

    A phrase is a determiner, as it is said back, and up to three content words; the last of several is a verb when an object follows ("the captain
    repaired the engine"), and is left out. Words that look like a past form or an adverb come at the end.
    """
    rules = _rules()
    words, never, determiners = sentence.split(), set(rules["not_things"]), rules["determiners"]
    phrases, single = [], []
    for start, word in enumerate(words):
        if word in determiners:
            run = list(itertools.takewhile(lambda w: w not in never, words[start + 1 : start + 4]))
            after = words[start + 1 + len(run)] if start + 1 + len(run) < len(words) else ""
            if len(run) > 1 and (after in determiners or run[-1].endswith(_VERBAL)):
                run.pop()
            if run:
                phrases.append(" ".join([determiners[word], *run]))
        elif word not in never and len(word) > 2:
            single.append(word)
    single.sort(key=lambda word: not word.endswith(_VERBAL))  # stable: read from its end, the last plain word comes first
    return list(dict.fromkeys([*reversed(phrases), *reversed(single)]))


def clauses(sentence: str, mood: str) -> list[str]:
    """Every clause that fits, the most natural thing first; [] when the sentence names nothing that could be taken up.

    Args:
        sentence: normalised.
        mood: good, bad or plain; only statements depend on it.
    """
    kind = kind_of(sentence)
    if kind == "small_talk":
        return _small_talk(sentence) or []
    templates = _rules()["kinds"][kind]
    if kind == "statement":
        templates = templates[mood]
    return [template.replace("{thing}", thing) for thing in things(sentence) for template in templates]


def natural_clauses(sentence: str, mood: str) -> list[str]:
    """Those of `clauses` that training teaches: about the most natural thing (small talk: all)."""
    found = clauses(sentence, mood)
    if kind_of(sentence) == "small_talk" or not found:
        return found
    return found[: len(found) // len(things(sentence))]
