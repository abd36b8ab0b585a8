"""Mel from tokens that arrive one by one: windows over the reply with a bounded past and a short look-ahead.

A window sees ``left_context`` tokens before it and ``look_ahead`` tokens after it, and the whole prompt. Windows lie at
fixed positions of the reply, so that audio does not depend on how tokens arrive. All windows start from the same noise,
frame by frame, and neighbours are cross-faded over a few frames with weights that sum to one. The vocoder behind
(`vocoder_stream`) has no seams at all.

The trade-off: a window costs (left_context + hop + look_ahead) / hop of the same tokens offline, and the prompt again.
Exact equality with offline synthesis is out of reach, since encoder, U-Net and the regulator's norm see the whole reply
there. A reply that ends inside the first window is computed as offline.

Shapes: N tokens, T mel frames, M mel bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from osum_echat import device as devices
from osum_echat.token2wav.config import MEL_HOP, SAMPLE_RATE, mel_frames
from osum_echat.token2wav.draws import Draws
from osum_echat.token2wav.encoder import stretch
from osum_echat.token2wav.flow import Condition, FlowModel


@dataclass(frozen=True)
class StreamConfig:
    """Where windows lie, in tokens (40 ms each).

    The first two windows advance ``first_hop`` tokens, each later one ``growth`` times more, up to ``hop``: sound
    starts early and the cost per second falls as soon as there is some sound in hand. The second may not be longer than
    the first, because the vocoder holds 19 frames (5.5 tokens) of the first back: what sounds while the second is made
    is ``first_hop - 5.5`` tokens long, so sound goes on where a window takes at most 0.65 of the time of its own
    speech. `sound_in_hand` computes this for other values. ``fade_frames`` mel frames of the look-ahead are
    cross-faded.
    """

    first_hop: int = 16
    hop: int = 40
    growth: float = 1.5
    left_context: int = 30
    look_ahead: int = 8
    fade_frames: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.first_hop <= self.hop or self.growth < 1.0:
            raise ValueError("stream: needs 1 <= first_hop <= hop and growth >= 1")
        if self.left_context < 0 or self.look_ahead < 1 or self.fade_frames < 1:
            raise ValueError("stream: left_context must not be negative; look_ahead and fade_frames must be at least 1")
        if self.fade_frames > mel_frames(min(self.look_ahead, self.first_hop)):
            raise ValueError(f"stream: {self.fade_frames} fade frames do not fit into look_ahead or first_hop; take fewer")

    @property
    def tokens_to_first_sound(self) -> int:
        return self.first_hop + self.look_ahead

    def hops(self, windows: int) -> list[int]:
        """Tokens that each of the first windows advances."""
        hop, hops = float(self.first_hop), list[int]()
        for window in range(windows):
            hops.append(int(hop))
            hop = self.next_hop(window, hop)
        return hops

    def next_hop(self, window: int, hop: float) -> float:
        """Of the window behind number ``window`` (0 the first), which advanced ``hop``."""
        return min(hop * self.growth, float(self.hop)) if window > 0 else hop


def sound_in_hand(config: StreamConfig, pace: float, held_back: float, windows: int = 12) -> list[float]:
    """Tokens' worth of sound that is left to play when each window after the first is ready; below 0 playback stands
    still.

    Args:
        pace: time that a window takes, from the one before it, over the time that its own tokens sound: 1 is real time.
        held_back: tokens of the first window that the vocoder holds back (its delay).
    """
    first, *rest = config.hops(windows)
    left, found = first - held_back, list[float]()
    for hop in rest:
        left -= pace * hop
        found.append(left)
        left = max(left, 0.0) + hop
    return found


@dataclass(frozen=True)
class PromptState:
    """All that depends only on the speaker, on the device of the networks. ``spk_M`` is the projected embedding."""

    tokens_P: Tensor
    mel_TM: Tensor
    spk_M: Tensor


@dataclass(frozen=True)
class SolverOptions:
    """How the ODE is solved; None means the directory's own value."""

    steps: int | None = None
    guidance: float | None = None
    schedule: str | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, found {self.steps}")
        if self.guidance is not None and self.guidance < 0:
            raise ValueError(f"guidance must not be negative, found {self.guidance}")


@dataclass(frozen=True)
class Window:
    """What is to be solved for the next frames of a reply.

    Attributes:
        condition, noise_TM: for `FlowModel.solve`.
        own, stop: frames of the solution that are settled, own .. stop (None: to the end, and nothing comes behind).
        end: token of the reply behind the settled frames.
    """

    condition: Condition
    noise_TM: Tensor
    own: int
    stop: int | None
    end: int


@dataclass(frozen=True)
class Draft:
    """A window before its tokens are encoded.

    Attributes:
        tokens_L: what the encoder reads, the prompt's tokens first.
        seen: token of the reply behind the last of them.
        end: token of the reply behind the frames that it settles.
        whole: the reply is all here and was not begun before: computed as offline.
    """

    tokens_L: Tensor
    seen: int
    end: int
    whole: bool = False


class FlowStream:
    """One reply: `push` tokens, get the mel frames that became settled; `finish` gives the rest."""

    def __init__(self, flow: FlowModel, prompt: PromptState, draws: Draws, config: StreamConfig, solver: SolverOptions) -> None:
        self.flow, self.prompt, self.draws, self.config, self.solver = flow, prompt, draws, config, solver
        self._rate = flow.config.input_frame_rate
        self._tokens: list[int] = []  # from ``_kept`` on
        self._kept = 0
        self._start = 0  # first token of the next window's own part
        self._hop = float(config.first_hop)
        self._windows = 0
        self._tail_TM: Tensor | None = None  # the last window's version of the frames at ``_start``

    def push(self, token: int) -> Tensor | None:
        """The frames [T, M] of a window that this token completed, else None."""
        self.add(token)
        return self._frames(self.window()) if self.ready else None

    def finish(self) -> Tensor:
        """The frames [T, M] of all tokens that are left, after which the total is `mel_frames` of the reply. May be
        empty."""
        window = self.last_window()
        return torch.zeros(0, self.flow.config.output_size) if window is None else self._frames(window)

    def _frames(self, window: Window) -> Tensor:
        solver = self.solver
        [mel_TM] = self.flow.solve([window.condition], [window.noise_TM], solver.steps, solver.guidance, solver.schedule)
        return self.settle(window, mel_TM)

    # ---- the parts of the above, for those who solve windows of several replies in one call (`pool`) -----------------

    def add(self, token: int) -> None:
        self._tokens.append(token)

    @property
    def ready(self) -> bool:
        """The tokens of the next window are there."""
        return self._total >= self._end + self.config.look_ahead

    @property
    def window_frames(self) -> int:
        """Frames that the next window is solved over, the prompt's included; 0 when no token is left for one."""
        if self._total == self._start:
            return 0
        seen = min(self._end + self.config.look_ahead, self._total)
        return len(self.prompt.mel_TM) + mel_frames(seen, self._rate) - mel_frames(self._kept, self._rate)

    def window(self) -> Window:
        """The next window, which is `ready`."""
        return self._encoded(self.draft())

    def last_window(self) -> Window | None:
        """The window of all tokens that are left; None when there is nothing left to say."""
        draft = self.last_draft()
        return None if draft is None else self._encoded(draft)

    def draft(self) -> Draft:
        """`window`, not yet encoded. Raises ValueError for ids outside the codebook."""
        return self._draft(self._end, self._end + self.config.look_ahead)

    def last_draft(self) -> Draft | None:
        """`last_window`, not yet encoded. Raises as `draft` does."""
        total = self._total
        return None if total == self._start else self._draft(total, total, whole=self._start == 0)

    def stretched(self, draft: Draft, h_LM: Tensor) -> Tensor:
        """What `FlowModel.encode` made of a draft's tokens at mel rate, [T, M], for `FlowModel.length_regulator`."""
        prompt = self.prompt
        if draft.whole:
            return self.flow.stretch_whole(h_LM[None], len(prompt.tokens_P), len(prompt.mel_TM))[0]
        return self._stretched(h_LM, mel_frames(self._kept, self._rate), mel_frames(draft.seen, self._rate))

    def regulated(self, draft: Draft, mu_TM: Tensor) -> Window:
        """The window of a draft, from what the length regulator made of `stretched`."""
        condition = self.flow.condition_of(mu_TM, self.prompt.mel_TM, self.prompt.spk_M)
        if draft.whole:
            return Window(condition, reply_noise(self.draws, condition), 0, None, draft.end)
        first = mel_frames(self._kept, self._rate)
        own, stop = mel_frames(self._start, self._rate), mel_frames(draft.end, self._rate)
        return Window(condition, reply_noise(self.draws, condition, first), own - first, stop - first, draft.end)

    def _encoded(self, draft: Draft) -> Window:
        stretched = self.stretched(draft, self.flow.encode(draft.tokens_L[None])[0])
        return self.regulated(draft, self.flow.length_regulator(stretched[None])[0])

    def _draft(self, end: int, seen: int, whole: bool = False) -> Draft:
        """Frames of tokens _start .. end, computed from all kept tokens before ``seen``."""
        tokens_N = self.flow.checked(self._tokens[: seen - self._kept])
        return Draft(torch.cat((self.prompt.tokens_P, tokens_N)), seen, end, whole)

    def settle(self, window: Window, mel_TM: Tensor) -> Tensor:
        """The settled frames of a window that was solved; the next window comes behind it."""
        frames_TM = mel_TM[window.own : window.stop]
        if self._tail_TM is not None:
            frames_TM = cross_fade(self._tail_TM, frames_TM)
        self._tail_TM = None if window.stop is None else mel_TM[window.stop : window.stop + self.config.fade_frames]
        self._start = window.end
        self._hop = self.config.next_hop(self._windows, self._hop)
        self._windows += 1
        forget = max(0, self._start - self.config.left_context) - self._kept
        del self._tokens[: max(0, forget)]
        self._kept += max(0, forget)
        return frames_TM

    @property
    def _total(self) -> int:
        """Tokens that have come."""
        return self._kept + len(self._tokens)

    @property
    def _end(self) -> int:
        """Token behind the next window's own part, where that is a whole one."""
        return self._start + int(self._hop)

    def _stretched(self, h_LM: Tensor, first: int, stop: int) -> Tensor:
        """As `FlowModel.stretch_whole`, with frames first .. stop of the reply on one even time grid: where a frame lies
        between tokens does not depend on where the window begins."""
        prompt, frames = self.prompt, len(self.prompt.mel_TM)
        reply_NM = h_LM[len(prompt.tokens_P) :]
        per_token = SAMPLE_RATE / MEL_HOP / self._rate
        at_T = (torch.arange(first, stop, device=h_LM.device) + 0.5) / per_token - 0.5 - self._kept
        at_T = at_T.clamp(0, len(reply_NM) - 1)
        below_T = at_T.floor().long()
        above_T = (below_T + 1).clamp(max=len(reply_NM) - 1)
        stretched = torch.lerp(reply_NM[below_T], reply_NM[above_T], (at_T - below_T)[:, None].to(h_LM))
        if frames:
            stretched = torch.cat((stretch(h_LM[None, : len(prompt.tokens_P)], frames)[0], stretched))
        return stretched


def reply_noise(draws: Draws, condition: Condition, first: int = 0) -> Tensor:
    """Starting noise [T, M] of a condition whose reply part begins at frame ``first`` of the reply."""
    frames = condition.frames - condition.prompt_frames
    prompt, reply = draws.prompt.rows(0, condition.prompt_frames), draws.reply.rows(first, first + frames)
    return devices.send(torch.cat((prompt, reply)), condition.mu_TM.device, condition.mu_TM.dtype)


def change_speed(mel_TM: Tensor, speed: float) -> Tensor:
    """The mel resampled in time to int(T / speed) frames."""
    if speed == 1.0:
        return mel_TM
    frames = max(1, int(len(mel_TM) / speed))
    return F.interpolate(mel_TM.T[None], size=frames, mode="linear")[0].T


def cross_fade(old_TM: Tensor, new_TM: Tensor) -> Tensor:
    """``new_TM`` with its first frames blended from ``old_TM``; the weights of the two sum to one."""
    count = min(len(old_TM), len(new_TM))
    weight_T1 = ((torch.arange(count, device=new_TM.device) + 0.5) / count)[:, None]
    return torch.cat((torch.lerp(old_TM[:count], new_TM[:count], weight_T1), new_TM[count:]))
