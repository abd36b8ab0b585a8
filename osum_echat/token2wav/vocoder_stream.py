"""The vocoder over a mel that arrives in pieces, equal to the vocoder over the whole mel.

The network sees a bounded number of frames to either side, so a piece is vocoded with that much of its neighbours and
only the part is kept that would not change. The sine source is carried over: phases continue, noise comes from a field
over absolute time. Nothing is cross-faded, there is no seam. The same pieces keep the memory of a long offline reply
flat.

Shapes: T mel frames, M mel bins, S = 256 * T samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from osum_echat import device as devices
from osum_echat.token2wav.config import MEL_HOP
from osum_echat.token2wav.draws import Draws
from osum_echat.token2wav.vocoder import Vocoder

PIECE_FRAMES = 600
"""Frames that an offline reply is vocoded at once (7 s)."""


@dataclass(frozen=True)
class Piece:
    """What is decoded next: mel [T, M], excitation [1, S], and which of its samples are settled."""

    mel_TM: Tensor
    source_1S: Tensor
    settled: slice


class VocoderStream:
    """One reply: `push` mel frames, get samples as far as they are settled; the last push says so."""

    def __init__(self, vocoder: Vocoder, draws: Draws) -> None:
        self.vocoder = vocoder
        self.draws = draws
        self.margin = vocoder.margin_frames()
        device = vocoder.conv_pre.weight.device
        self._phase_1H = draws.phase_1H.to(device)
        self._turns_1H: Tensor | None = None
        self._mel_TM = torch.zeros(0, vocoder.config.in_channels, device=device)
        self._source_1S = torch.zeros(1, 0, device=device)
        self._kept = 0  # absolute frame at which the two buffers begin
        self._emitted = 0  # frames whose samples have been given out

    @property
    def delay(self) -> int:
        """Frames that are held back until more mel is there."""
        return self.margin + self.vocoder.f0_predictor.margin

    def push(self, mel_TM: Tensor, last: bool = False) -> Tensor:
        """Samples [S] of the frames that became settled (may be none)."""
        piece = self.piece(mel_TM, last)
        return self._source_1S.new_zeros(0) if piece is None else decode(self.vocoder, [piece])[0]

    def piece(self, mel_TM: Tensor, last: bool = False) -> Piece | None:
        """What `push` decodes, for those who decode pieces of several replies in one call (`pool`)."""
        self._mel_TM = torch.cat((self._mel_TM, mel_TM.to(self._mel_TM)))
        available = self._kept + len(self._mel_TM)
        pitched = available if last else max(self._sourced, available - self.vocoder.f0_predictor.margin)
        self._extend_source(pitched)
        settled = available if last else max(self._emitted, pitched - self.margin)
        if settled == self._emitted:
            return None
        left = max(0, self._emitted - self.margin)
        right = min(settled + self.margin, pitched)
        mel = self._mel_TM[left - self._kept : right - self._kept]
        source = self._source_1S[:, (left - self._kept) * MEL_HOP : (right - self._kept) * MEL_HOP]
        piece = Piece(mel, source, slice((self._emitted - left) * MEL_HOP, (settled - left) * MEL_HOP))
        self._emitted = settled
        keep = max(0, settled - self.delay)
        self._mel_TM = self._mel_TM[keep - self._kept :]
        self._source_1S = self._source_1S[:, (keep - self._kept) * MEL_HOP :]
        self._kept = keep
        return piece

    @property
    def _sourced(self) -> int:
        """Absolute frame up to which the excitation has been made."""
        return self._kept + self._source_1S.shape[1] // MEL_HOP

    def _extend_source(self, stop: int) -> None:
        start = self._sourced
        if stop <= start:
            return
        left = max(self._kept, start - self.vocoder.f0_predictor.margin)
        f0_1T = self.vocoder.f0(self._mel_TM[left - self._kept :].T[None])[:, start - left : stop - left]
        noise = devices.send(self.draws.source(start, stop), f0_1T.device, f0_1T.dtype)
        source_11S, self._turns_1H = self.vocoder.m_source(f0_1T, self._phase_1H.to(f0_1T), noise, self._turns_1H)
        self._source_1S = torch.cat((self._source_1S, source_11S[0].to(self._source_1S)), dim=1)


def decode(vocoder: Vocoder, pieces: Sequence[Piece]) -> list[Tensor]:
    """Settled samples [S] of each piece; pieces of one length are decoded in one call (in 8, 4, 2 or 1 where calls are
    recorded by their shape, so that there are few shapes)."""
    mels, sources = [piece.mel_TM.T for piece in pieces], [piece.source_1S for piece in pieces]
    few_shapes = devices.records(vocoder.conv_pre.weight.device)
    waves = alike_together(vocoder.recorded_decode, mels, sources, few_shapes=few_shapes)
    return [wave_S[piece.settled] for wave_S, piece in zip(waves, pieces, strict=True)]


def alike_together(network: Callable[..., Tensor], *inputs: Sequence[Tensor], few_shapes: bool = False) -> list[Tensor]:
    """What a network of rows makes of each input (of each of several arguments); inputs of one shape go in one call, so
    that nothing is padded and every row is what it would be alone, to rounding. ``few_shapes``: 8, 4, 2 or 1 in a
    call."""
    alike: dict[torch.Size, list[int]] = {}
    for index, tensor in enumerate(inputs[0]):
        alike.setdefault(tensor.shape, []).append(index)
    found: dict[int, Tensor] = {}
    for waiting in alike.values():
        while waiting:
            size = min(8, 1 << (len(waiting).bit_length() - 1)) if few_shapes else len(waiting)
            rows, waiting = waiting[:size], waiting[size:]
            made = network(*(torch.stack([tensors[i] for i in rows]) for tensors in inputs))
            found |= dict(zip(rows, made, strict=True))
    return [found[index] for index in range(len(inputs[0]))]


def vocode(vocoder: Vocoder, mel_TM: Tensor, draws: Draws) -> Tensor:
    """Samples [256 * T] of a whole mel, a piece at a time."""
    stream = VocoderStream(vocoder, draws)
    pieces = mel_TM.split(PIECE_FRAMES)
    return torch.cat([stream.push(piece, last=index == len(pieces) - 1) for index, piece in enumerate(pieces)])
