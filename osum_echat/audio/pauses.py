"""Silence and pauses of a recording: whether anything was said, and where a long one can be cut."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from osum_echat.audio.io import SAMPLE_RATE, Samples

FRAME = SAMPLE_RATE // 50
"""20 ms."""
SILENT_DB = -50.0
"""Level (of full scale) under which a frame is silent. The room of a quiet microphone lies near -60, soft speech near
-40."""
_HEARD_FRAMES = 5  # 0.1 s: nobody says anything in less
_PAUSE_FRAMES = 15  # 0.3 s: what a cut looks at


def levels(samples: Samples) -> Samples:
    """Root mean square of each 20 ms of mono samples [n] at 16 kHz; the rest of a frame counts as one."""
    count = -(-len(samples) // FRAME)
    padded = np.pad(samples, (0, count * FRAME - len(samples)))
    return np.sqrt(np.mean(padded.reshape(count, FRAME).astype(np.float64) ** 2, axis=1)).astype(np.float32)


def is_silent(samples: Samples) -> bool:
    """Nothing is to be heard in samples [n] at 16 kHz."""
    return int((levels(samples) > 10 ** (SILENT_DB / 20)).sum()) < _HEARD_FRAMES


def cut_at_pauses(samples: Samples, longest: float) -> list[Samples]:
    """Pieces of at most ``longest`` seconds, cut in the quietest 0.3 s of the second half of each; silent pieces are
    left out.

    All samples are in one piece each, in order; what is short enough stays whole.
    """
    most = int(longest * SAMPLE_RATE) // FRAME
    assert most > 2 * _PAUSE_FRAMES, f"pieces of {longest} s are too short to cut"
    power = levels(samples) ** 2
    smooth = np.convolve(power, np.ones(_PAUSE_FRAMES) / _PAUSE_FRAMES, mode="same")
    cuts = [0]
    while len(power) - cuts[-1] > most:
        first = cuts[-1] + most // 2
        cuts.append(first + int(smooth[first : cuts[-1] + most].argmin()))
    pieces = [samples[a * FRAME : b * FRAME] for a, b in pairwise([*cuts, len(power)])]
    return [piece for piece in pieces if not is_silent(piece)]
