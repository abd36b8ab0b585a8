"""When somebody speaks, when a turn has ended, and what is no turn: everything counted in samples received, never by
the clock.

`TurnDetector.push` takes 16 kHz samples of any length and returns what happened in them, in order. Rules:

- Speech is confirmed after `TurnRules.confirm_ms` of it, and while a reply is being played only after `barge_in_ms`,
  above a raised threshold: a short "mm" is no interruption, and what the loudspeaker sends back into the microphone is
  fainter than its owner. Under ``semantic_vad``, what the backchannel model takes for a listener's "mm-hm" needs twice
  as long.
- ``server_vad`` ends a turn when ``silence_ms`` have passed without speech, never before.
- ``semantic_vad`` asks the end-of-turn model once for each pause, and ends the turn when it says so or when the limit
  of its eagerness has passed.
- Without turn detection only the client ends turns.

What is kept of the silence at the end of a turn is ``TAIL_MS``: more would only be read by the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from osum_echat.serving.vad import FRAME, RATE, Backchannel, EndOfTurn, Vad

Samples = npt.NDArray[np.float32]
TAIL_MS = 200
PAUSE_MS = 200
"""Silence after which the end-of-turn model is asked."""
_GAP_MS = 250
"""Silence that ends speech which was not confirmed."""
_RAISED = 0.7
_HYSTERESIS = 0.15
_LIMITS_S = {"low": 8.0, "medium": 4.0, "auto": 4.0, "high": 2.0}
_SURE = {"low": 0.7, "medium": 0.5, "auto": 0.5, "high": 0.3}
_WITHOUT_MODEL_S = {"low": 1.5, "medium": 0.8, "auto": 0.8, "high": 0.5}


def samples_of(milliseconds: float) -> int:
    return round(milliseconds * RATE / 1000)


def milliseconds_of(samples: int) -> int:
    return samples * 1000 // RATE


@dataclass(frozen=True)
class TurnRules:
    """How turns are found; the defaults are those of the Realtime API where it names any."""

    mode: Literal["server_vad", "semantic_vad", "none"] = "server_vad"
    threshold: float = 0.5
    prefix_ms: int = 300
    silence_ms: int = 500
    eagerness: Literal["low", "medium", "high", "auto"] = "auto"
    confirm_ms: int = 96
    barge_in_ms: int = 480
    max_turn_s: float = 30.0


@dataclass(frozen=True)
class Started:
    """Speech is confirmed; it began at sample ``at`` (the prefix included). ``confirmed``: the sample at which that was
    known."""

    at: int
    confirmed: int


@dataclass(frozen=True)
class Stopped:
    """The turn has ended: its samples [n], which began at ``start``; ``at`` is where it was ended, silence included."""

    start: int
    at: int
    samples: Samples
    asked: bool = False
    """The end-of-turn model decided."""


@dataclass(frozen=True)
class Dismissed:
    """Sound that was no turn: too short for what was being played."""

    at: int


@dataclass(frozen=True)
class Suspected:
    """The first frame of what may become speech; a page may lower its loudspeaker."""

    at: int


Move: TypeAlias = Started | Stopped | Dismissed | Suspected


class TurnDetector:
    """One stream. ``position``: samples received since it began.

    Args:
        vad: of this stream.
        end_of_turn: may be shared. None: silence alone decides.
        backchannel: may be shared. None: length alone decides what interrupts.
    """

    def __init__(self, vad: Vad, end_of_turn: EndOfTurn | None, rules: TurnRules, backchannel: Backchannel | None = None) -> None:
        self.vad, self.end_of_turn, self.rules, self.backchannel = vad, end_of_turn, rules, backchannel
        self.playing = False
        self.position = 0
        self._frames = 0  # samples that went through the VAD
        self._buffer = np.zeros(0, dtype=np.float32)
        self._start = 0  # position of the buffer's first sample
        self._forget_speech()

    def _forget_speech(self) -> None:
        self._began: int | None = None
        self._voiced = 0  # samples above the threshold in this stretch of speech
        self._last_voice = 0
        self.speaking = False  # confirmed
        self._asked = False
        self._backchannel: bool | None = None  # whether it sounds like one; None: nobody has been asked

    # ---- what the session does ---------------------------------------------------------------------------------------

    @property
    def buffered(self) -> int:
        return len(self._buffer)

    def set_rules(self, rules: TurnRules) -> None:
        """Other rules from now on; sound that has come stays."""
        if rules.mode != self.rules.mode:
            self.vad.reset()
            self._frames = self.position
            self._forget_speech()
        self.rules = rules

    def clear(self) -> None:
        """Throw away what has come."""
        self._buffer, self._start, self._frames = np.zeros(0, dtype=np.float32), self.position, self.position
        self.vad.reset()
        self._forget_speech()

    def keep_last(self, seconds: float) -> None:
        """Forget what came earlier than that, where only the client ends turns."""
        assert self.rules.mode == "none", self.rules
        drop = len(self._buffer) - samples_of(seconds * 1000)
        if drop > 0:
            self._buffer = self._buffer[drop:]
            self._start += drop

    def take(self) -> tuple[int, Samples]:
        """All that has come since the last turn, and where it began: the client ends its turn itself."""
        start, samples = self._start, self._buffer
        self.clear()
        return start, samples

    def push(self, samples: Samples) -> list[Move]:
        """What happened. Runs the networks: not for an event loop."""
        self._buffer = np.concatenate([self._buffer, samples])
        self.position += len(samples)
        if self.rules.mode == "none":
            self._frames = self.position
            return []
        moves: list[Move] = []
        while self.position - self._frames >= FRAME:
            first = self._frames - self._start
            probability = self.vad(self._buffer[first : first + FRAME])
            self._frames += FRAME
            self._frame(probability, moves)
        self._trim()
        return moves

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _frame(self, probability: float, moves: list[Move]) -> None:
        """``probability`` of the frame that ends at ``_frames``."""
        rules = self.rules
        need = max(rules.threshold, _RAISED) if self.playing and not self.speaking else rules.threshold
        if self._began is not None:
            need = max(need - _HYSTERESIS, 0.01)
        if probability >= need:
            if self._began is None:
                self._began, self._voiced = self._frames - FRAME, 0
                moves.append(Suspected(self._began))
            self._voiced += FRAME
            self._last_voice = self._frames
            self._asked = False
            self._confirm(moves)
        elif self._began is not None:
            self._silence(moves)
        if self.speaking and self._frames - self._turn_start() >= rules.max_turn_s * RATE:
            self._stop(moves)

    def _confirm(self, moves: list[Move]) -> None:
        needed = self.rules.barge_in_ms * (2 if self._backchannel else 1) if self.playing else self.rules.confirm_ms
        if self.speaking or self._voiced < samples_of(needed):
            return
        semantic = self.playing and self.rules.mode == "semantic_vad"
        if semantic and self.backchannel is not None and self._backchannel is None:
            self._backchannel = self.backchannel(self._turn()[1]) >= 0.5
            if self._backchannel:
                return
        self.speaking = True
        moves.append(Started(self._turn_start(), self._frames))

    def _silence(self, moves: list[Move]) -> None:
        silence = self._frames - self._last_voice
        if not self.speaking:
            if silence >= samples_of(_GAP_MS):
                moves.append(Dismissed(self._frames))
                self._forget_speech()
            return
        if self.rules.mode == "server_vad":
            if silence >= samples_of(self.rules.silence_ms):
                self._stop(moves)
            return
        limits = _LIMITS_S if self.end_of_turn is not None else _WITHOUT_MODEL_S
        if silence >= limits[self.rules.eagerness] * RATE:
            self._stop(moves)
        elif self.end_of_turn is not None and not self._asked and silence >= samples_of(PAUSE_MS):
            self._asked = True
            if self.end_of_turn(self._turn()[1]) >= _SURE[self.rules.eagerness]:
                self._stop(moves, asked=True)

    def _turn_start(self) -> int:
        assert self._began is not None
        return max(self._start, self._began - samples_of(self.rules.prefix_ms))

    def _turn(self) -> tuple[int, Samples]:
        """Where the turn began, and its samples so far: the same when the end-of-turn model is asked and when the turn
        ends there."""
        start, end = self._turn_start(), min(self._last_voice + samples_of(TAIL_MS), self._frames)
        return start, self._buffer[start - self._start : end - self._start]

    def _stop(self, moves: list[Move], asked: bool = False) -> None:
        start, samples = self._turn()
        moves.append(Stopped(start, self._frames, samples, asked))
        self._buffer = self._buffer[self._frames - self._start :]
        self._start = self._frames
        self._forget_speech()

    def _trim(self) -> None:
        """Forget what no turn can hold any more."""
        keep_from = self._frames if self._began is None else self._began
        drop = keep_from - samples_of(self.rules.prefix_ms) - self._start
        if drop > 0 and not self.speaking:
            self._buffer = self._buffer[drop:]
            self._start += drop
