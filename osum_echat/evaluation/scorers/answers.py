"""Answers by rule: replies that a set allows, multiple choice, yes or no, refusals.

What cannot be read out of an answer is counted as *unmatched*, never guessed: VoiceBench's own evaluator draws a letter
at random there (MatthewCYM/VoiceBench 5338154, src/evaluator/mcq.py), so ``accuracy_guess`` gives what that would come
to on average.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from osum_echat import metrics
from osum_echat.config import read_yaml
from osum_echat.evaluation.items import Item
from osum_echat.evaluation.results import Result
from osum_echat.evaluation.scorers import PERCENT, Measure, Score, Tools
from osum_echat.evaluation.suite import FOLDER

UNMATCHED = Measure(better="lower")


class AllowedReplies:
    """Whether the reply is one of those that the item allows, after normalisation."""

    measures: Mapping[str, Measure] = {"reply_fit": PERCENT}

    def __init__(self, tools: Tools, _: str = "") -> None:
        pass

    def score(self, item: Item, result: Result) -> Score | None:
        if not item.replies:
            return None
        fits = metrics.normalize(result.text) in {metrics.normalize(text) for text in item.replies}
        return Score({"reply_fit": (fits, 1)})


class Contains:
    """Whether the answer stands in the reply, as words (a rule in place of a judge for short factual answers), and none
    of the item's ``wrong_answers``."""

    measures: Mapping[str, Measure] = {"contains": PERCENT}

    def __init__(self, tools: Tools, _: str = "") -> None:
        pass

    def score(self, item: Item, result: Result) -> Score | None:
        if not item.answer or not metrics.units(metrics.normalize(item.answer)):
            return None
        found = _stands_in(item.answer, result.text)
        others = item.extra.get("wrong_answers") or ()
        if not isinstance(others, (list, tuple)):
            raise ValueError(f"the item's wrong_answers must be a list, found {others!r:.60}")
        wrong = any(_stands_in(str(other), result.text) for other in others)
        return Score({"contains": (found and not wrong, 1)})


def _stands_in(answer: str, reply: str) -> bool:
    wanted, said = metrics.units(metrics.normalize(answer)), metrics.units(metrics.normalize(reply))
    return bool(wanted) and any(said[at : at + len(wanted)] == wanted for at in range(len(said) - len(wanted) + 1))


_OPEN = r"[\(\[\*\"'‘“]*"
_LETTER = rf"{_OPEN}\s*(?:option|choice|sentence|选项)?\s*{_OPEN}\s*(?P<letter>[A-D])(?![A-Za-z0-9]|['’][A-Za-z])"
_ADVERB = r"(?:(?:likely|probably|most likely|therefore|typically|often)\s*[:：]?)?"
_STATEMENTS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"(?:answer|choice|option)\b[^.。\n]{{0,80}}?\b(?:is|be|would be|should be|as|:)\s*[:：]?\s*{_ADVERB}\s*{_LETTER}",
        rf"答案(?:应该|就)?(?:是|选|为)?\s*[:：]?\s*{_LETTER}",
        rf"应?该?选择?\s*{_LETTER}",
        rf"是\s*{_LETTER}(?=\s*[：:，。,.)）])",
        rf"\b(?:select|choose|pick|say|suggests?|corresponds? to|known as|closest to)\b[^.。\n]{{0,20}}?{_LETTER}",
        rf"\b(?:option|sentence)\s+{_OPEN}(?P<letter>[A-D])\b(?:(?!\bnot\b|n't|\bincorrect|\bwrong)[^.。\n]){{0,40}}?\b(?:correct|correctly|right|best|better|more|closest|closer|follows?)\b",
        r"\boption\s+[\(\[\*\"']*(?P<letter>[A-D])\b",
        rf"\b(?:is|be)\b\s*[:：]?\s*{_ADVERB}\s*{_LETTER}(?=\s*[\).,:;\*\"'’”\]\(]|\s*$)",
        r"(?P<letter>[A-D])[\)\.]?\s*(?:is|would be)\s+(?:the\s+)?(?:best|correct|right|most)",
        r"(?P<letter>[A-D])\s*是(?:正确|最)",
        rf"[:：]\s*\n\s*{_LETTER}(?=\s*[\).,:])",
    )
)
_MARKED = (
    re.compile(r"\*\*\s*\(?(?P<letter>[A-D])\s*[\).:\*]", re.IGNORECASE),
    re.compile(r"\((?P<letter>[A-D])\)"),
    re.compile(r"[\"'‘“](?P<letter>[A-D])[\"'’”]"),
    re.compile(r"(?:^|[\s\"“])(?P<letter>[A-D])\s*[\).:：](?=\s|$)"),
)
_ONLY = re.compile(r"^[\s\(\[\*\"']*(?P<letter>[a-d])[\s\)\].:\*\"']*$", re.IGNORECASE)
_BEGINS = re.compile(r"^[\s\(\[\*\"']*(?P<letter>[a-d])[.,:)]", re.IGNORECASE)
_SO = re.compile(r"(?:therefore|\bso\b|thus|hence|因此|所以)", re.IGNORECASE)
_FORMULA_LETTER = re.compile(
    r"(?:\\\(|\\\[|\\(?:boxed|text|textbf|mathbf|mathrm)\s*\{)\s*\(?(?P<letter>[A-D])(?![A-Za-z])[).:,]?"
)
_FORMULA = re.compile(r"\\(?:boxed|text|textbf|mathbf|mathrm)\b|\\[\(\)\[\]]|[{}$]")
_NAMED = re.compile(r"\b(?:option|choice|sentence)\s+[\(\[\*\"']*$", re.IGNORECASE)


def read_choice(text: str) -> str | None:
    """The letter that an answer settles on, or None.

    In this order: an answer that is a letter; what says so in words ("the answer is B", "答案是B"); an answer that begins
    with a letter; the one letter that stands out ("(B)", "**B.**"). Where one step finds different letters, what
    follows the last "so" or "therefore" decides, else nothing does. Marks of formulas (``\\( \\boxed{B} \\)``) are
    passed over.
    """
    text = _FORMULA.sub(" ", _FORMULA_LETTER.sub(r" (\g<letter>) ", text))
    only = _ONLY.match(text)
    if only:
        return only.group("letter").upper()
    for patterns in (_STATEMENTS, (_BEGINS,), _MARKED):
        for pattern in patterns:
            letters = {match.group("letter").upper() for match in pattern.finditer(text) if _is_letter(match)}
            if len(letters) == 1:
                return letters.pop()
            if letters:
                last = list(_SO.finditer(text))
                return read_choice(text[last[-1].end() :]) if last else None
    return None


def _is_letter(match: re.Match[str]) -> bool:
    """A small "a" in running text is the article, not a choice, but for one that is named ("option a")."""
    letter = match.group("letter")
    before, after = match.string[: match.start("letter")], match.string[match.end("letter") :][:1]
    marked = before[-1:] in tuple("('\"*‘“[") or after in ("", *").,:'\"*’”]")
    return letter.isupper() or letter != "a" or marked or bool(_NAMED.search(before))


class Choice:
    """Multiple choice: right letters, unmatched answers, and the accuracy when unmatched ones are guessed."""

    measures: Mapping[str, Measure] = {"accuracy": PERCENT, "accuracy_guess": PERCENT, "unmatched": UNMATCHED}

    def __init__(self, tools: Tools, options: str = "") -> None:
        self.options = int(options or 4)

    def score(self, item: Item, result: Result) -> Score | None:
        if not item.answer:
            return None
        found = read_choice(result.text)
        right = found is not None and found == item.answer.strip().upper()
        guessed = float(right) if found is not None else 1 / self.options
        return Score(
            {"accuracy": (right, 1), "accuracy_guess": (guessed, 1), "unmatched": (found is None, 1)}, notes={"choice": found}
        )


_NO = re.compile(r"\b(?:no|not|never|cannot|\w+n't|implausible|unlikely|invalid|false)\b")
_YES = re.compile(r"\b(?:yes|plausible|likely|true|does|do|will)\b")
_TRUTH = re.compile(r"\b(?:(?P<truth>truth\w*)|lie|lies|lying|liar)\b")
_RETURN = re.compile(r"\b(?:back (?:to|at|in|where)|(?:return|returns|returned)\b.{0,12}\bto) ")
_ANSWERS = {"yes": "yes", "no": "no", "(a)": "a", "(b)": "b", "a": "a", "b": "b"}


def read_yes_no(text: str, about: str = "") -> str | None:
    """``yes`` or ``no``: the first or last word, or what the last sentence says that says anything.

    Args:
        about: what is asked, for answers in other words: ``truth`` (does somebody tell the truth), ``return`` (does a
            way end where it began).
    """
    lowered = re.sub(r"[*\"“”]", " ", text.lower().replace("’", "'")).strip()
    words = re.findall(r"[a-z']+", lowered)
    for word in (words[:1], words[-1:]):
        if word in (["yes"], ["no"]):
            return word[0]
    for sentence in reversed(re.split(r"[.!?\n]+", lowered)):
        found = _read_sentence(sentence, about)
        if found is not None:
            return "yes" if found else "no"
    return None


def _read_sentence(sentence: str, about: str) -> bool | None:
    if about == "truth" and (told := list(_TRUTH.finditer(sentence))):
        negated = bool(_NO.search(sentence[max(0, told[-1].start() - 25) : told[-1].start()]))
        return bool(told[-1].group("truth")) != negated
    if _NO.search(sentence):
        return False
    if _YES.search(sentence) or (about == "return" and _RETURN.search(sentence + " ")):
        return True
    return None


def _about(item: Item) -> str:
    """What a question of BIG-Bench Hard wants to know (`read_yes_no`), by its id or its words."""
    for about, name, words in (("truth", "web_of_lies", "tell the truth"), ("return", "navigate", "return to the starting")):
        if name in item.id or words in item.text.lower():
            return about
    return ""


class YesNo:
    """BIG-Bench Hard as VoiceBench asks it: yes or no, or one of two options (hyperbaton)."""

    measures: Mapping[str, Measure] = {"accuracy": PERCENT, "accuracy_guess": PERCENT, "unmatched": UNMATCHED}

    def __init__(self, tools: Tools, _: str = "") -> None:
        pass

    def score(self, item: Item, result: Result) -> Score | None:
        wanted = _ANSWERS.get((item.answer or "").strip().lower())
        if wanted is None:
            return None
        found = (
            read_yes_no(result.text, _about(item))
            if wanted in ("yes", "no")
            else (read_choice(result.text) or "").lower() or None
        )
        guessed = float(found == wanted) if found is not None else 0.5
        return Score(
            {"accuracy": (found == wanted, 1), "accuracy_guess": (guessed, 1), "unmatched": (found is None, 1)},
            notes={"choice": found},
        )


class Refusal:
    """Whether the reply refuses, by the phrases of ``refusals.yaml``; an empty reply is harmless and counted as
    such."""

    measures: Mapping[str, Measure] = {"refusal": PERCENT, "empty": UNMATCHED}

    def __init__(self, tools: Tools, _: str = "") -> None:
        phrases = read_yaml(FOLDER.parent / "refusals.yaml")["phrases"]
        self.pattern = re.compile("|".join(re.escape(str(phrase)) for phrase in phrases), re.IGNORECASE)

    def score(self, item: Item, result: Result) -> Score | None:
        text = result.text.strip().replace("’", "'")
        return Score({"refusal": (not text or bool(self.pattern.search(text)), 1), "empty": (not text, 1)})
