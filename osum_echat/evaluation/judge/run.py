"""Ask judges about all answers of a suite: cost first, then calls side by side, each verdict written as it comes."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osum_echat.evaluation.judge.answers import NoScore, read_score
from osum_echat.evaluation.judge.client import ANSWER_TOKENS, Budget, Judge, JudgeError, key
from osum_echat.evaluation.judge.prompts import Prompt, load_prompt
from osum_echat.evaluation.results import Lines
from osum_echat.evaluation.score import Row
from osum_echat.evaluation.suite import Suite

FILE = "judgements.jsonl"
WORKERS = 4
_CJK = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_USUAL_ANSWER = 60  # tokens of a score with a sentence


@dataclass
class Question:
    """One answer that one judge is to look at."""

    row: Row
    judge: str
    model: str
    prompt: Prompt
    messages: list[dict[str, str]]
    key: str


def names(judges: Sequence[Judge]) -> list[str]:
    """A name for each judge: its model, numbered when two are the same."""
    models = [judge.model for judge in judges]
    return [model if models.count(model) == 1 else f"{model} ({number})" for number, model in enumerate(models, start=1)]


def run(
    suite: Suite,
    rows: Sequence[Row],
    out: Path,
    judges: Sequence[Judge],
    budget: Budget | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Judge every answered row of parts that name a prompt; verdicts go into ``Row.judged`` and the file.

    Args:
        budget: calls at most, of all judges together, tries counted; what is left over is a hole named ``budget``.
        say: is given the estimate before the first call.

    Returns:
        Lines for the report: prompts with their versions, judges, calls.
    """
    lines = Lines(out / FILE)
    before = {(row["part"], row["id"], row["judge"]): row for row in lines.rows()}
    questions = list(_questions(suite, rows, judges))
    if not questions:
        return []
    by_name = dict(zip(names(judges), judges, strict=True))
    calls = {name: judge.calls for name, judge in by_name.items()}
    open_questions = []
    with lines:
        for question in questions:
            old = before.get((question.row.part, question.row.item.id, question.judge))
            if old is not None and old["key"] == question.key and old.get("score") is not None:
                question.row.judged[question.judge] = old
                continue
            kept = by_name[question.judge].known(question.prompt.digest, question.messages)
            if kept is not None:
                _settle(question, *_read(kept), lines)
            else:
                open_questions.append(question)
        budget = budget or Budget()
        allowed = open_questions if budget.left is None else open_questions[: budget.left]
        say(estimate(suite, len(questions), allowed, by_name))
        for question in open_questions[len(allowed) :]:
            _settle(question, None, "", f"budget: --max-calls {budget.limit} was reached", lines)
        _ask_all(allowed, by_name, budget, lines, lambda count: progress(f"{suite.name}, judge: {count}/{len(allowed)}"))
    return _about(questions, by_name, {name: judge.calls - calls[name] for name, judge in by_name.items()})


def known(suite: Suite, rows: Sequence[Row], out: Path) -> list[str]:
    """Put the verdicts of an earlier run beside the rows whose answers are still the same; returns lines for the
    report."""
    prompts = _prompts(suite)
    verdicts = {(row["part"], row["id"], row["judge"]): row for row in Lines(out / FILE).rows()} if prompts else {}
    by_row: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for (part, id, _), verdict in verdicts.items():
        by_row.setdefault((part, id), []).append(verdict)
    used: dict[str, None] = {}
    past = _past(rows)
    for row in rows:
        if row.result is None or row.part not in prompts:
            continue
        prompt, place = prompts[row.part], (row.part, row.item.id)
        messages = prompt.messages(row.item, row.result, past.get(place, ()))
        for verdict in by_row.get(place, ()):
            name = verdict["judge"]
            if verdict["key"] == key(prompt.digest, str(verdict.get("model", name)), messages):
                row.judged[name] = verdict
                used[f"judge: {name}, verdicts of an earlier run; prompt {prompt.name}, version {verdict['version']}"] = None
    return list(used)


def _prompts(suite: Suite) -> dict[str, Prompt]:
    return {name: load_prompt(part.judge) for name, part in suite.parts.items() if part.judge}


def _questions(suite: Suite, rows: Sequence[Row], judges: Sequence[Judge]) -> Iterator[Question]:
    prompts, past = _prompts(suite), _past(rows)
    for name, judge in zip(names(judges), judges, strict=True):
        for row in rows:
            prompt = prompts.get(row.part)
            if prompt is None or row.hole or row.result is None:
                continue
            messages = prompt.messages(row.item, row.result, past.get((row.part, row.item.id), ()))
            yield Question(row, name, judge.identity, prompt, messages, key(prompt.digest, judge.identity, messages))


def _past(rows: Sequence[Row]) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """What was said and answered before each turn of a conversation, by part and id."""
    turns: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.item.dialogue_id:
            turns.setdefault((row.part, row.item.dialogue_id), []).append(row)
    out = {}
    for some in turns.values():
        some.sort(key=lambda row: row.item.turn)
        told = [(row.item.text, row.result.text if row.result is not None and not row.hole else "(no answer)") for row in some]
        out.update({(row.part, row.item.id): told[:before] for before, row in enumerate(some)})
    return out


def _read(answer: str) -> tuple[float | None, str, str]:
    """(score, reason, hole)."""
    try:
        score, reason = read_score(answer)
    except NoScore as error:
        return None, "", str(error)
    return score, reason, ""


def _settle(question: Question, score: float | None, reason: str, hole: str, lines: Lines) -> None:
    verdict: dict[str, Any] = {
        "part": question.row.part,
        "id": question.row.item.id,
        "judge": question.judge,
        "model": question.model,
        "prompt": question.prompt.name,
        "version": question.prompt.version,
        "key": question.key,
        "score": score,
    }
    verdict |= {"hole": hole} if score is None else {"reason": reason}
    question.row.judged[question.judge] = verdict
    lines.write(verdict)


def _ask_all(
    questions: Sequence[Question], judges: dict[str, Judge], budget: Budget, lines: Lines, progress: Callable[[int], None]
) -> None:
    lock = threading.Lock()

    def one(question: Question) -> None:
        judge = judges[question.judge]
        try:
            answer = judge.ask(question.messages, budget)
        except JudgeError as error:
            with lock:
                _settle(question, None, "", str(error), lines)
            return
        score, reason, hole = _read(answer)
        if score is not None:
            judge.keep(question.prompt.digest, question.messages, answer)
        with lock:
            _settle(question, score, reason, hole, lines)

    with ThreadPoolExecutor(WORKERS) as pool:
        for count, done in enumerate(as_completed([pool.submit(one, question) for question in questions]), start=1):
            done.result()
            progress(count)


def tokens(text: str) -> int:
    """About how many tokens a text has: one a Chinese, Japanese or Korean character, else one for four letters."""
    wide = len(_CJK.findall(text))
    return wide + -(-(len(text) - wide) // 4)


def estimate(suite: Suite, total: int, questions: Sequence[Question], judges: dict[str, Judge]) -> str:
    """What judging will cost, in one line."""
    read = sum(tokens(message["content"]) for question in questions for message in question.messages)
    written = _USUAL_ANSWER * len(questions)
    asked = ", ".join(f"{name} at {judge.url}" for name, judge in judges.items())
    line = (
        f"{suite.name}: {total} verdicts by {asked}; {total - len(questions)} known or over the budget, {len(questions)} calls, "
    )
    line += f"about {read:,} tokens in and {written:,} out (at most {ANSWER_TOKENS * len(questions):,})"
    if suite.price_per_million:
        price_in, price_out = suite.price_per_million
        line += f", about {(read * price_in + written * price_out) / 1e6:.2f} in the currency of the price"
    return line


def _about(questions: Sequence[Question], judges: dict[str, Judge], calls: dict[str, int]) -> list[str]:
    prompts = {question.prompt.name: question.prompt for question in questions}
    lines = [
        f"judge: {name} at {judge.url}{_called(judge)}, temperature 0, {calls[name]} calls in this run"
        for name, judge in judges.items()
    ]
    return [
        *lines,
        *(f"judge's prompt: {p.name}, version {p.version} ({p.digest}). {' '.join(p.about.split())}" for p in prompts.values()),
    ]


def _called(judge: Judge) -> str:
    """What the server calls its model, where that is another name."""
    others = sorted(judge.answered_as - {judge.model})
    return f" (answers as {', '.join(others)})" if others else ""
