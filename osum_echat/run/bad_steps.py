"""Steps that changed no weight because a loss or gradient was not finite: one is a sample's fault, many in a row are
the run's."""

from __future__ import annotations

from dataclasses import dataclass

EXIT_CODE = 3
"""Of a training command that stopped because of `TooManyBadSteps`."""


class TooManyBadSteps(RuntimeError):
    """The loss or the gradients were not finite for ``safety.max_bad_steps`` steps in a row."""


@dataclass
class BadSteps:
    """Counts them. ``in_a_row`` belongs into the checkpoint: a run that is continued in the middle of trouble still
    stops."""

    limit: int
    in_a_row: int = 0

    def good(self) -> None:
        """The update was made."""
        self.in_a_row = 0

    def bad(self, remedy: str) -> None:
        """The update was left out. Raises TooManyBadSteps at the limit; ``remedy`` ends its message."""
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            raise TooManyBadSteps(f"{self.in_a_row} steps in a row had a non-finite loss or gradient; {remedy}")
