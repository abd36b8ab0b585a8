"""Is somebody speaking, and has the turn ended: the two small networks of turn taking, and a plain measure of energy
where they are absent. A checkpoint with a turn head of its own (`turn_head`) takes the place of the second.

All are replaceable: anything with the methods of `Vad` or `EndOfTurn` will do. Samples are 16 kHz, [-1, 1].

Costs of one thread on an AVX2 core: silero 0.3 ms for 32 ms of sound; smart-turn about 120 ms a pause, features
included, so it is run once a pause and never on the event loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from osum_echat.audio.features import LogMel
from osum_echat.device.onnx import session_options
from osum_echat.serving import models

if TYPE_CHECKING:
    from osum_echat.serving.turn_head import TurnHeadDetector

log = logging.getLogger(__name__)
Samples = npt.NDArray[np.float32]
RATE = 16_000
FRAME = 512
"""Samples of a frame, 32 ms."""


class Backchannel(Protocol):
    """Probability that speech during a reply is a listener's "mm-hm", which interrupts nobody."""

    def __call__(self, speech: Samples) -> float: ...


class Vad(Protocol):
    """Speech probability of one frame of `FRAME` samples after the other."""

    def __call__(self, frame: Samples) -> float: ...

    def reset(self) -> None: ...


class EndOfTurn(Protocol):
    """Probability that the speaker has finished, from the turn so far (its pause included)."""

    def __call__(self, turn: Samples) -> float: ...


def _session(data: bytes) -> Any:
    import onnxruntime

    options = session_options(threads=1)
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


class SileroVad:
    """Silero VAD 6.2, 16 kHz. The network is shared, the state belongs to one stream.

    Source of the calling convention (64 samples of the past before each frame, a state [2, 1, 128]):
    snakers4/silero-vad, utils_vad.py.
    """

    _CONTEXT = 64

    def __init__(self, network: Any) -> None:
        self._network = network
        self._rate = np.array(RATE, dtype=np.int64)
        self.reset()

    def reset(self) -> None:
        self._state = np.zeros((2, 1, 128), dtype=np.float32)
        self._past = np.zeros(self._CONTEXT, dtype=np.float32)

    def __call__(self, frame: Samples) -> float:
        given = np.concatenate([self._past, frame])[None]
        out, self._state = self._network.run(None, {"input": given, "state": self._state, "sr": self._rate})
        self._past = frame[-self._CONTEXT :]
        return float(out[0, 0])


class EnergyVad:
    """Loudness above the quietest of the last seconds, as a number that behaves like a probability. It takes any sound
    for speech."""

    def __init__(self, margin_db: float = 12.0, quiet_db: float = -50.0) -> None:
        self.margin_db, self.quiet_db = margin_db, quiet_db
        self.reset()

    def reset(self) -> None:
        self._background: float | None = None

    def __call__(self, frame: Samples) -> float:
        level = 10 * float(np.log10(np.mean(np.square(frame, dtype=np.float64)) + 1e-10))
        if self._background is None:
            self._background = min(level, self.quiet_db)
        # The background falls at once and rises by 1 dB a second, so that speech does not lift it.
        self._background = min(level, self._background + FRAME / RATE)
        above = level - max(self._background, self.quiet_db)
        return float(1 / (1 + np.exp(-(above - self.margin_db) / 2)))


class SmartTurn:
    """smart-turn v3.2: the last 8 s, normalised, as a Whisper log-mel. Source of the preparation: pipecat-ai 1.14.0
    (BSD-2-Clause)."""

    _SAMPLES = 8 * RATE

    def __init__(self, network: Any) -> None:
        self._network = network
        self._log_mel = LogMel(80)

    def features(self, turn: Samples) -> Samples:
        """[1, 80, 800]: padded with silence in front."""
        x = np.zeros(self._SAMPLES, dtype=np.float32)
        turn = turn[-self._SAMPLES :]
        x[self._SAMPLES - len(turn) :] = turn
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-7)
        return np.ascontiguousarray(self._log_mel(x).numpy().T[None])

    def __call__(self, turn: Samples) -> float:
        return float(self._network.run(None, {"input_features": self.features(turn)})[0].ravel()[0])


class TurnModels:
    """What a server takes: ``new_vad()`` for each stream, ``end_of_turn`` for all (None: only silence decides),
    ``backchannel`` for all (None: every speech of some length interrupts). ``names``: of VAD and end of turn."""

    def __init__(
        self,
        new_vad: Callable[[], Vad],
        end_of_turn: EndOfTurn | None,
        names: tuple[str, str],
        backchannel: Backchannel | None = None,
    ) -> None:
        self.new_vad, self.end_of_turn, self.names, self.backchannel = new_vad, end_of_turn, names, backchannel

    @classmethod
    def load(
        cls, head: TurnHeadDetector | None = None, end_of_turn: Literal["auto", "head", "smart-turn", "silence"] = "auto"
    ) -> TurnModels:
        """The networks of this package; energy, and silence alone, where one is absent.

        Args:
            head: the checkpoint's turn head, where it has one. end_of_turn: what ends a turn; auto: the head, else
                smart-turn, else silence.

        Raises:
            ValueError: for what is asked for and not there.
        """
        vad = models.read(models.VAD)
        if end_of_turn == "head" and head is None:
            raise ValueError("this checkpoint has no turn head; take --end-of-turn smart-turn")
        if vad is None:
            log.warning("silero VAD is not there; sound above the background is taken for speech")
        network = None if vad is None else _session(vad)
        new_vad = EnergyVad if network is None else lambda: SileroVad(network)
        name = "energy" if vad is None else "silero"
        if head is not None and end_of_turn in ("auto", "head"):
            return cls(new_vad, head, (name, "the checkpoint's turn head"), head.backchannel)
        turn = None if end_of_turn == "silence" else models.read(models.END_OF_TURN)
        if turn is not None:
            return cls(new_vad, SmartTurn(_session(turn)), (name, "smart-turn v3.2"))
        if end_of_turn != "silence":
            log.warning("smart-turn is not there; semantic_vad ends a turn after its time limit")
        return cls(new_vad, None, (name, "silence"))

    @classmethod
    def energy(cls) -> TurnModels:
        """Without networks."""
        return cls(EnergyVad, None, ("energy", "silence"))
