"""Measuring any checkpoint: suites as data (`suite`), items (`items`, `readers`), and three steps with plain jsonl
between them: `generate`, `score`, `judge`.

See docs/evaluation.md.
"""

from __future__ import annotations


class ScorerUnavailable(ValueError):
    """A scorer's data or package is not there; the message says how to get it."""
