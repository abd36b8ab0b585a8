"""Step three: a language model behind an OpenAI-compatible URL says how good an answer is, 1 to 5;
``judgements.jsonl``.

    judge = Judge("http://localhost:8000/v1", model="qwen")
    run(suite, rows, out, [judge])

Only ``POST /chat/completions`` is used, at temperature 0. Answers are kept on disk by prompt, its version, model and
what was asked, so the same question is never paid for twice. What could not be judged (the server refused, the answer
was no score, the budget was spent) is a counted hole, never a zero.
"""

from osum_echat.evaluation.judge.answers import NoScore, read_score
from osum_echat.evaluation.judge.client import Budget, Judge, JudgeError
from osum_echat.evaluation.judge.prompts import Prompt, load_prompt
from osum_echat.evaluation.judge.run import FILE, known, run

__all__ = ["FILE", "Budget", "Judge", "JudgeError", "NoScore", "Prompt", "known", "load_prompt", "read_score", "run"]
