"""How far the sound that was sent is ahead of what can have been played.

A client plays what it gets in real time, from the moment it gets it; when nothing is left it waits, and what comes later is played later. From that
follows what has been played by now, without any word from the client. A server that stays close to it wastes little when it is interrupted.
"""

from __future__ import annotations

from collections.abc import Callable

_HEARD = 0.02
"""Seconds of silence inside an answer that are noticed at all; players hold that much back."""


class Playback:
    """Seconds of sound of one reply: sent, and played by now.

    Args:
        clock: seconds, rising.
        ahead: how far to be ahead at most; infinite: as fast as it comes.
    """

    def __init__(self, clock: Callable[[], float], ahead: float) -> None:
        self._clock, self._ahead = clock, ahead
        self.sent = 0.0
        self.gaps: list[float] = []
        """Lengths of the silences inside the reply: sound came later than it was needed."""
        self._ends = 0.0  # when all that was sent will have been played

    def send(self, seconds: float) -> None:
        """So much more sound goes out now."""
        now = self._clock()
        if self.sent and now - self._ends > _HEARD:
            self.gaps.append(now - self._ends)
        self._ends = max(self._ends, now) + seconds if self.sent else now + seconds
        self.sent += seconds

    @property
    def left(self) -> float:
        """Seconds that are still to be played."""
        return max(0.0, self._ends - self._clock()) if self.sent else 0.0

    @property
    def played(self) -> float:
        return self.sent - self.left

    def wait(self) -> float:
        """Seconds until more may be sent."""
        return max(0.0, self.left - self._ahead)
