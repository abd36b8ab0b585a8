"""What a listener hears of a system that sends sound in pieces: each piece is played when the one before it has ended,
or at once."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]


@dataclass
class Stretch:
    """Sound without a gap, from ``start`` to ``end`` seconds of the recording, of one response."""

    start: float
    end: float
    response: str = ""


@dataclass
class Timeline:
    """The output channel of a recording.

    Attributes:
        rate: samples a second. playhead: when what has come so far will have been played.
        pieces: (start in samples, samples). stretches: the same without the sound.
    """

    rate: int
    playhead: float = 0.0
    pieces: list[tuple[int, Samples]] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)

    def play(self, now: float, samples: Samples, response: str = "") -> None:
        """Sound that came at ``now``."""
        if not len(samples):
            return
        start = max(now, self.playhead)
        end = start + len(samples) / self.rate
        last = self.stretches[-1] if self.stretches else None
        if last is not None and last.response == response and start - last.end < 1e-6:
            last.end = end
        else:
            self.stretches.append(Stretch(start, end, response))
        self.pieces.append((round(start * self.rate), samples))
        self.playhead = end

    def stop(self, now: float) -> float:
        """Stop at ``now`` and forget what was not played yet; returns how many seconds that was."""
        left = max(0.0, self.playhead - now)
        if not left:
            return 0.0
        cut = round(now * self.rate)
        kept = [(start, samples[: max(0, cut - start)]) for start, samples in self.pieces if start < cut]
        self.pieces = [(start, samples) for start, samples in kept if len(samples)]
        self.stretches = [stretch for stretch in self.stretches if stretch.start < now]
        for stretch in self.stretches:
            stretch.end = min(stretch.end, now)
        self.playhead = now
        return left

    def answers(self) -> list[Stretch]:
        """Each response from its first sound to its last, gaps included."""
        spans: dict[str, Stretch] = {}
        for stretch in self.stretches:
            span = spans.setdefault(stretch.response, Stretch(stretch.start, stretch.end, stretch.response))
            span.end = max(span.end, stretch.end)
        return list(spans.values())

    def gaps(self) -> float:
        """Seconds of silence inside responses: sound that came too late to follow what was being played."""
        played = sum(stretch.end - stretch.start for stretch in self.stretches)
        return max(0.0, sum(span.end - span.start for span in self.answers()) - played)

    def samples(self, seconds: float = 0.0) -> Samples:
        """The whole channel [n], silent where nothing was played, at least ``seconds`` long."""
        length = max([round(seconds * self.rate), *(start + len(samples) for start, samples in self.pieces)])
        out = np.zeros(length, np.float32)
        for start, samples in self.pieces:
            out[start : start + len(samples)] = samples
        return out
