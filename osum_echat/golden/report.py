"""What a golden check returns: one line per case, and failure for a case that nobody understands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CaseResult:
    """One recorded case compared with this implementation.

    ``error`` is the largest absolute difference (or a count of mismatches), ``limit`` what is allowed; ``note`` says
    what was compared, or why the case failed, or which deliberate difference it is.
    """

    name: str
    error: float
    limit: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # NaN compares false, so NaN fails

    def line(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'} {self.name:<48} error {self.error:.3g} (limit {self.limit:.3g}) {self.note}".rstrip()


def not_understood(name: str, why: str) -> CaseResult:
    """A case or file that the checker has no rule for: always a failure."""
    return CaseResult(name, float("inf"), 0.0, f"not understood: {why}")
