"""The published streaming, reproduced for comparison with recorded numbers. Use `Token2Wav.stream` for anything that is
heard.

Chunks of 70 tokens advance by 50. What it does that ours does not: the solver's cache holds 34 frames where the overlap
has 68, so old noise and condition are pasted 0.4 s too early; Hamming halves add up to 1.08 in the overlaps; the sine
source restarts in each chunk.

Shapes: T mel frames, M mel bins, S samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from osum_echat.token2wav.config import MEL_HOP, mel_frames
from osum_echat.token2wav.flow import FlowModel
from osum_echat.token2wav.streaming import PromptState, SolverOptions, change_speed
from osum_echat.token2wav.vocoder import Vocoder

HOP_TOKENS = 50
OVERLAP_TOKENS = 20
SOLVER_CACHE_FRAMES = 34
"""The published value, half of the overlap at 25 Hz."""
MEL_CACHE_FRAMES = 20
SOURCE_CACHE = MEL_CACHE_FRAMES * MEL_HOP


class ChunkDraws(Protocol):
    """Where random numbers of a chunk come from."""

    def flow(self, chunk: int, frames: int) -> Tensor:
        """Starting noise of chunk ``chunk``, [frames, M], prompt included."""

    def vocoder(self, chunk: int, samples: int) -> tuple[Tensor, Tensor]:
        """Phases [1, H] and noise [1, samples, H] of the sine source."""


class SeededChunkDraws:
    """Fresh draws for every chunk from one generator."""

    def __init__(self, seed: int, mel_bins: int, harmonics: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._bins, self._harmonics = mel_bins, harmonics

    def flow(self, chunk: int, frames: int) -> Tensor:
        return torch.randn(frames, self._bins, generator=self._generator)

    def vocoder(self, chunk: int, samples: int) -> tuple[Tensor, Tensor]:
        phase = (torch.rand(1, self._harmonics, generator=self._generator) * 2 - 1) * torch.pi
        return phase, torch.randn(1, samples, self._harmonics, generator=self._generator)


@dataclass(frozen=True)
class Chunk:
    """One chunk with what golden checks compare: ``mel_TM`` from the flow, ``vocoded_TM`` what the vocoder read, its
    excitation and raw output, ``flow_cache`` [2, T, M] (noise, condition), and the samples ``wave_S`` that are given
    out."""

    mel_TM: Tensor
    vocoded_TM: Tensor
    source_S: Tensor
    raw_S: Tensor
    wave_S: Tensor
    flow_cache: Tensor


def solve_with_cache(
    flow: FlowModel,
    prompt: PromptState,
    tokens_N: Tensor,
    noise_TM: Tensor,
    cache: Tensor | None,
    solver: SolverOptions,
) -> tuple[Tensor, Tensor]:
    """Mel [T, M] of one chunk, and the cache [2, prompt + 34, M] for the next: noise and condition of the prompt and
    the last frames."""
    condition = flow.condition(tokens_N, prompt.tokens_P, prompt.mel_TM, prompt.spk_M)
    noise_TM, mu_TM = noise_TM.clone(), condition.mu_TM.clone()
    if cache is not None:
        noise_TM[: cache.shape[1]], mu_TM[: cache.shape[1]] = cache[0], cache[1]
    both = torch.stack((noise_TM, mu_TM))
    cache = torch.cat((both[:, : condition.prompt_frames], both[:, -SOLVER_CACHE_FRAMES:]), dim=1)
    mel_TM = flow.solve([replace(condition, mu_TM=mu_TM)], [noise_TM], solver.steps, solver.guidance, solver.schedule)[0]
    return mel_TM, cache


def hamming_fade(old: Tensor, new: Tensor, count: int) -> Tensor:
    """``new`` with its first ``count`` entries (along dimension 0) mixed with the last of ``old`` by the halves of a
    Hamming window."""
    window = torch.from_numpy(np.hamming(2 * count)).to(new.device)
    window = window.view(-1, *[1] * (new.ndim - 1))
    faded = new.clone()
    faded[:count] = (new[:count] * window[:count] + old[-count:] * window[count:]).to(new.dtype)
    return faded


class ReferenceStream:
    """The published chunk loop over one reply."""

    def __init__(self, flow: FlowModel, vocoder: Vocoder, prompt: PromptState, draws: ChunkDraws, solver: SolverOptions) -> None:
        self.flow, self.vocoder, self.prompt, self.draws, self.solver = flow, vocoder, prompt, draws, solver
        self._overlap = mel_frames(OVERLAP_TOKENS, flow.config.input_frame_rate)
        self._count = 0
        self._flow_cache: Tensor | None = None
        self._mel_overlap: Tensor | None = None
        self._mel_cache: Tensor | None = None
        self._source_cache: Tensor | None = None
        self._speech_cache: Tensor | None = None

    def run(self, tokens: Iterator[int]) -> Iterator[Chunk]:
        """Chunks of a reply; one token at least."""
        pending: list[int] = []
        for token in tokens:
            pending.append(token)
            if len(pending) == HOP_TOKENS + OVERLAP_TOKENS:
                yield self._chunk(pending, last=False)
                del pending[:HOP_TOKENS]
        if pending:
            yield self._chunk(pending, last=True)

    def whole(self, tokens: list[int], speed: float = 1.0) -> Chunk:
        """A reply as one chunk, which is the published offline path."""
        return self._chunk(tokens, last=True, speed=speed)

    def _chunk(self, tokens: list[int], last: bool, speed: float = 1.0) -> Chunk:
        frames = len(self.prompt.mel_TM) + mel_frames(len(tokens), self.flow.config.input_frame_rate)
        noise_TM = self.draws.flow(self._count, frames).to(self.prompt.mel_TM)
        tokens_N = torch.tensor(tokens, device=self.prompt.tokens_P.device)
        flow_mel, self._flow_cache = solve_with_cache(self.flow, self.prompt, tokens_N, noise_TM, self._flow_cache, self.solver)
        mel_TM = flow_mel
        if self._mel_overlap is not None:
            mel_TM = hamming_fade(self._mel_overlap, mel_TM, min(self._overlap, len(mel_TM)))
        if self._mel_cache is not None:
            mel_TM = torch.cat((self._mel_cache, mel_TM))
        if not last:
            mel_TM, self._mel_overlap = mel_TM[: -self._overlap], mel_TM[-self._overlap :]
        mel_TM = change_speed(mel_TM, speed)
        raw_S, source_S = self._vocode(mel_TM)
        wave_S = raw_S
        if self._speech_cache is not None:
            wave_S = hamming_fade(self._speech_cache, raw_S, SOURCE_CACHE)
        if not last:
            self._mel_cache = mel_TM[-MEL_CACHE_FRAMES:]
            self._source_cache = source_S[-SOURCE_CACHE:]
            wave_S, self._speech_cache = wave_S[:-SOURCE_CACHE], wave_S[-SOURCE_CACHE:]
        self._count += 1
        return Chunk(flow_mel, mel_TM, source_S, raw_S, wave_S, self._flow_cache)

    def _vocode(self, mel_TM: Tensor) -> tuple[Tensor, Tensor]:
        mel_1MT = mel_TM.T[None]
        phase_1H, noise_1SH = self.draws.vocoder(self._count, len(mel_TM) * MEL_HOP)
        source_11S = self.vocoder.source(self.vocoder.f0(mel_1MT), phase_1H.to(mel_TM), noise_1SH.to(mel_TM))
        if self._source_cache is not None:
            source_11S[0, 0, : len(self._source_cache)] = self._source_cache
        return self.vocoder.decode(mel_1MT, source_11S)[0], source_11S[0, 0]
