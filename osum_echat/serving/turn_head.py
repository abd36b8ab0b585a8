"""The turn head of a loaded checkpoint (`model.turn`) as what turn detection asks.

The encoder reads the turn when a pause is noticed, and the head says how the turn stands. What was heard is kept: a
turn that ends there is answered from it, without being read again.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

from osum_echat.generation.engine import EngineFull
from osum_echat.model.echat import AudioFeatures

Samples = npt.NDArray[np.float32]
_KEPT = 64  # turns, of all sessions together


class TurnHeadDetector:
    """End of turn and backchannels, see `vad.EndOfTurn` and `vad.Backchannel`. Called from the threads of turn
    detection.

    Args:
        hear: as `SharedEChat.hear`: 16 kHz samples as the language model hears them, with the logits of the turn head.
        labels: of the turn head.
    """

    def __init__(self, hear: Callable[[Samples], Future[AudioFeatures]], labels: tuple[str, ...]) -> None:
        self._hear, self._labels = hear, labels
        self._kept: OrderedDict[bytes, AudioFeatures] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, turn: Samples) -> float:
        """Probability that the speaker has finished: neither inside a sentence, nor asking for time."""
        heard = self._heard(turn)
        if heard is None:
            return 0.0
        with self._lock:
            self._kept[_digest(turn)] = heard
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        found = self._probabilities(heard)
        return 1.0 - found["incomplete"] - found["wait"]

    def backchannel(self, speech: Samples) -> float:
        """Probability that this is a listener's "mm-hm"."""
        heard = self._heard(speech)
        return 0.0 if heard is None else self._probabilities(heard)["backchannel"]

    def take(self, turn: Samples) -> AudioFeatures | None:
        """What was heard of exactly these samples, once."""
        with self._lock:
            return self._kept.pop(_digest(turn), None)

    def _heard(self, turn: Samples) -> AudioFeatures | None:
        """None where the model cannot hear this (too short, or closing down): the limits of silence decide then."""
        try:
            return self._hear(turn).result()
        except (ValueError, EngineFull):
            return None

    def _probabilities(self, heard: AudioFeatures) -> dict[str, float]:
        assert heard.turn_logits_NC is not None, "a checkpoint without a turn head"
        return dict(zip(self._labels, heard.turn_logits_NC[0].softmax(dim=0).tolist(), strict=True))


def _digest(turn: Samples) -> bytes:
    return hashlib.blake2b(turn.tobytes(), digest_size=16).digest()
