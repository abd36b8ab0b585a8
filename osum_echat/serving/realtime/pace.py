"""How far the sound that was sent is ahead of what can have been played.

A client plays what it gets in real time, one reply behind the other, from the moment it gets it; when nothing is left
it waits, and what comes later is played later. From that follows what has been played by now, without any word from the
client. A server that stays close to it wastes little when it is interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable

_HEARD = 0.02
"""Seconds of silence inside an answer that are noticed at all; players hold that much back."""


class Playback:
    """Seconds of sound of one reply: sent, and played by now.

    Args:
        clock: seconds, rising.
        ahead: how far to be ahead at most; infinite: as fast as it comes.
        before: of the reply in front, which is played to its end first.
    """

    def __init__(self, clock: Callable[[], float], ahead: float, before: Playback | None = None) -> None:
        self._clock, self._ahead = clock, ahead
        self.sent: float = 0.0
        # Of one that has no sound the one in front of it is taken, so that no chain of them is kept.
        self._before: Playback | None = before if before is None or before.sent else before._before
        self.gaps: list[float] = []
        """Lengths of the silences inside the reply: sound came later than it was needed."""
        self._ends = -math.inf  # when all that was sent will have been played

    def send(self, seconds: float) -> None:
        """So much more sound goes out now."""
        now = self._clock()
        if self.sent and now - self._ends > _HEARD:
            self.gaps.append(now - self._ends)
        if self._before is not None:
            self._ends, self._before = self._before._ends, None
        self._ends = max(self._ends, now) + seconds
        self.sent += seconds

    def stop(self) -> None:
        """The client plays no more of it; `played` has no meaning from here on."""
        self._ends = min(self._ends, self._clock())

    @property
    def left(self) -> float:
        """Seconds until its end; of the reply in front too, while that is being played."""
        return max(0.0, self._ends - self._clock()) if self.sent else 0.0

    @property
    def played(self) -> float:
        return max(0.0, self.sent - self.left)

    def wait(self) -> float:
        """Seconds until more may be sent."""
        return max(0.0, self.left - self._ahead)
