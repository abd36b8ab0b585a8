"""HiFT vocoder: log-mel to samples. A predicted pitch drives a sine source; two upsampling stages shape it; an inverse
STFT ends it.

Parameter names are those of the released ``hift.pt`` after weight norm is folded in (``weight`` instead of two parts);
a trainer may put torch's parametrised weight norm back on. Random draws (phases, noise) are arguments, never taken
inside.

Shapes: B batch, T mel frames, M mel bins, C channels, S = 256 * T samples, H harmonics (fundamental included), W STFT
frames.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osum_echat import device as devices
from osum_echat.token2wav.config import MEL_HOP, VocoderConfig

PERIOD = 2**15
"""Entries of a table of one period, interpolated linearly: 64 harmonics are then exact to 2e-5."""


class Snake(nn.Module):
    """x + sin^2(alpha x) / alpha, alpha per channel (arXiv 2006.08195)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x_BCT: Tensor) -> Tensor:
        alpha = self.alpha[:, None]
        return x_BCT + (1.0 / (alpha + 1e-9)) * torch.sin(x_BCT * alpha).square()


class ResBlock(nn.Module):
    """Dilated and plain convolutions in pairs, each behind a Snake, with a shortcut around every pair."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel, dilation=d, padding=(kernel - 1) * d // 2) for d in dilations
        )
        self.convs2 = nn.ModuleList(nn.Conv1d(channels, channels, kernel, padding=(kernel - 1) // 2) for _ in dilations)
        self.activations1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in dilations)

    def reach(self) -> int:
        """Steps to either side that an output depends on."""
        return sum(int(conv.padding[0]) for conv in [*self.convs1, *self.convs2])

    def forward(self, x_BCT: Tensor) -> Tensor:
        for snake1, conv1, snake2, conv2 in zip(self.activations1, self.convs1, self.activations2, self.convs2, strict=True):
            x_BCT = x_BCT + conv2(snake2(conv1(snake1(x_BCT))))
        return x_BCT


class PitchPredictor(nn.Module):
    """Mel to fundamental frequency in Hz, [B, T]; near zero where unvoiced."""

    margin = 5
    """Frames to either side that a frame's pitch depends on: one for each convolution."""

    def __init__(self, mel_bins: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(self.margin):
            layers += [nn.Conv1d(mel_bins if index == 0 else channels, channels, 3, padding=1), nn.ELU()]
        self.condnet = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, 1)

    def forward(self, mel_BMT: Tensor) -> Tensor:
        return self.classifier(self.condnet(mel_BMT).transpose(1, 2)).squeeze(-1).abs()


class SineSource(nn.Module):
    """Sines at the harmonics of f0 where voiced, noise where not, mixed into one excitation signal."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.config = config
        self.l_linear = nn.Linear(config.nb_harmonics + 1, 1)

    def turns(self, f0_BT: Tensor, start_BH: Tensor | None = None, harmonics: int | None = None) -> tuple[Tensor, Tensor]:
        """Turns (cycles) of every harmonic after each sample, [B, S, H], and after the last one, [B, H], both modulo 1.

        ``harmonics``: of only so many, the fundamental first.

        ``start_BH`` continues an earlier signal. The sum runs over frames in float64, samples within a frame are added
        in float32: a sum over samples in float32, as published, loses the phase of long replies.
        """
        exact = torch.float64 if devices.sums_in_float64(f0_BT.device) else torch.float32
        harmonic_H = torch.arange(1, (harmonics or self.config.nb_harmonics + 1) + 1, dtype=exact, device=f0_BT.device)
        step_BTH = f0_BT.detach().to(exact)[..., None] * harmonic_H / self.config.sample_rate  # turns per sample
        frame_BTH = step_BTH * MEL_HOP
        # Without float64 whole turns are left out before they are summed: what is left is as exact.
        ends_BTH = torch.cumsum(frame_BTH if exact == torch.float64 else frame_BTH % 1, dim=1)
        if start_BH is not None:
            ends_BTH = ends_BTH + start_BH[:, None]
        begins_BT1H = ((ends_BTH - frame_BTH) % 1).to(f0_BT)[:, :, None]
        sample_N1 = torch.arange(1, MEL_HOP + 1, device=f0_BT.device, dtype=f0_BT.dtype)[:, None]
        turns_BSH = (begins_BT1H + step_BTH.to(f0_BT)[:, :, None] * sample_N1).flatten(1, 2)
        return turns_BSH % 1, ends_BTH[:, -1] % 1

    def forward(
        self, f0_BT: Tensor, phase_BH: Tensor, noise_BSH: Tensor, start_BH: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Excitation [B, 1, S] and the turns after it, [B, H], for the next piece's ``start_BH``.

        ``phase_BH`` in radians (the fundamental's is ignored), ``noise_BSH`` standard normal. Aligned harmonics may
        come with one noise for all of them (`VocoderConfig.source_noises`): then the turns are the fundamental's alone.
        """
        config = self.config
        if config.nsf_aligned and noise_BSH.shape[-1] == 1:
            return self._aligned(f0_BT, noise_BSH, start_BH)
        turns_BSH, end_BH = self.turns(f0_BT, start_BH)
        if config.nsf_aligned:
            phase_BH = torch.zeros_like(phase_BH)
        phase = torch.cat((torch.zeros_like(phase_BH[:, :1]), phase_BH[:, 1:]), dim=1)[:, None]
        sine = config.nsf_alpha * torch.sin(2.0 * math.pi * turns_BSH + phase)
        voiced_BS1 = (f0_BT > config.nsf_voiced_threshold).repeat_interleave(MEL_HOP, dim=1)[..., None].to(sine.dtype)
        amplitude = voiced_BS1 * config.nsf_sigma + (1.0 - voiced_BS1) * (config.nsf_alpha / 3.0)
        excitation = torch.tanh(self.l_linear(sine * voiced_BS1 + amplitude * noise_BSH))
        return excitation.transpose(1, 2), end_BH

    def _aligned(self, f0_BT: Tensor, noise_BS1: Tensor, start_B1: Tensor | None) -> tuple[Tensor, Tensor]:
        """The weighted sum of harmonics that start together is one waveform of the fundamental's turns: a table of one
        period."""
        config = self.config
        turns_BS1, end_B1 = self.turns(f0_BT, start_B1, harmonics=1)
        weight_H = self.l_linear.weight[0]
        spectrum = torch.cat((torch.zeros_like(weight_H[:1]), weight_H)) * (-0.5j * config.nsf_alpha * PERIOD)
        period_N = torch.fft.irfft(spectrum, n=PERIOD)
        position_BS = turns_BS1[..., 0] * PERIOD
        below_BS = position_BS.floor()
        index_BS = below_BS.long() % PERIOD  # turns just below 1 may round to a whole period
        sine_BS = torch.lerp(period_N[index_BS], period_N.roll(-1)[index_BS], position_BS - below_BS)
        voiced_BS = (f0_BT > config.nsf_voiced_threshold).repeat_interleave(MEL_HOP, dim=1).to(sine_BS.dtype)
        amplitude_BS = (voiced_BS * config.nsf_sigma + (1.0 - voiced_BS) * (config.nsf_alpha / 3.0)) * weight_H.norm()
        excitation_BS = torch.tanh(sine_BS * voiced_BS + amplitude_BS * noise_BS1[..., 0] + self.l_linear.bias)
        return excitation_BS[:, None], end_B1


def inverse_stft(complex_BFW: Tensor, n_fft: int, hop: int, window_N: Tensor) -> Tensor:
    """`torch.istft` of a centred STFT, [B, hop * (W - 1)], without its look at the values (it waits for the device to
    see that no sum of windows is 0)."""
    pieces_BWN = torch.fft.irfft(complex_BFW.transpose(1, 2), n=n_fft) * window_N
    count, length = pieces_BWN.shape[1], n_fft + hop * (pieces_BWN.shape[1] - 1)
    add: Any = torch.ops.aten.unfold_backward
    wave_BS = add(pieces_BWN, [len(pieces_BWN), length], 1, n_fft, hop)
    weight_1S = add(window_N.square().expand(1, count, n_fft), [1, length], 1, n_fft, hop)
    inner = slice(n_fft // 2, length - n_fft // 2)
    return wave_BS[:, inner] / weight_1S[:, inner]


class Vocoder(nn.Module):
    """Log-mel to samples."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.config = config
        self.m_source = SineSource(config)
        self.f0_predictor = PitchPredictor(config.in_channels, config.f0_channels)
        self.conv_pre = nn.Conv1d(config.in_channels, config.base_channels, 7, padding=3)
        self.ups = nn.ModuleList()
        self.source_downs = nn.ModuleList()
        self.source_resblocks = nn.ModuleList()
        self.resblocks = nn.ModuleList()

        below = [math.prod(config.upsample_rates[i + 1 :]) for i in range(len(config.upsample_rates))]
        channels = config.base_channels
        for index, (rate, kernel) in enumerate(zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True)):
            self.ups.append(nn.ConvTranspose1d(channels, channels // 2, kernel, stride=rate, padding=(kernel - rate) // 2))
            channels //= 2
            down = below[index]  # from the STFT's frame rate down to this stage's
            if down == 1:
                self.source_downs.append(nn.Conv1d(config.istft_n_fft + 2, channels, 1))
            else:
                self.source_downs.append(nn.Conv1d(config.istft_n_fft + 2, channels, 2 * down, stride=down, padding=down // 2))
            self.source_resblocks.append(
                ResBlock(channels, config.source_resblock_kernel_sizes[index], config.source_resblock_dilation_sizes[index])
            )
            for size, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True):
                self.resblocks.append(ResBlock(channels, size, dilations))
        self.conv_post = nn.Conv1d(channels, config.istft_n_fft + 2, 7, padding=3)
        self._recordings = devices.Recordings()

    def margin_frames(self) -> int:
        """Mel frames to either side that a sample depends on through `decode` (14 in the released size), the pitch not
        counted."""
        config = self.config
        reach, rate = 3.0, 1  # conv_pre, in frames; frames are divided by ``rate`` as the stages go up
        kinds = len(config.resblock_kernel_sizes)
        for stage, up in enumerate(config.upsample_rates):
            reach += 1.0 / rate  # the transposed convolution reaches one input to either side
            rate *= up
            blocks = [self.source_resblocks[stage], *list(self.resblocks)[stage * kinds : (stage + 1) * kinds]]
            reach += max(block.reach() for block in blocks) / rate  # type: ignore[operator]
        # conv_post; half a window for each of two STFTs
        return math.ceil(reach + 3.0 / rate) + math.ceil(config.istft_n_fft / MEL_HOP)

    def f0(self, mel_BMT: Tensor) -> Tensor:
        """Fundamental frequency in Hz per frame, [B, T]."""
        return self.f0_predictor(mel_BMT)

    def source(self, f0_BT: Tensor, phase_BH: Tensor, noise_BSH: Tensor) -> Tensor:
        """Excitation [B, 1, S] for `decode`; see `SineSource`."""
        return self.m_source(f0_BT, phase_BH, noise_BSH)[0]

    def spectrum(self, source_B1S: Tensor) -> Tensor:
        """Real and imaginary parts of the excitation's STFT, [B, n_fft + 2, W]."""
        complex_BFW = torch.stft(
            source_B1S[:, 0],
            self.config.istft_n_fft,
            self.config.istft_hop,
            window=self._window(source_B1S),
            return_complex=True,
        )
        return torch.cat((complex_BFW.real, complex_BFW.imag), dim=1)

    def decode(self, mel_BMT: Tensor, source_B1S: Tensor) -> Tensor:
        """Samples [B, S] in -0.99 .. 0.99 from a mel and its excitation."""
        spectrum_BFW = self.spectrum(source_B1S)
        return self.to_wave(self.shape(mel_BMT, spectrum_BFW), spectrum_BFW)

    def recorded_decode(self, mel_BMT: Tensor, source_B1S: Tensor) -> Tensor:
        """`decode` of pieces whose lengths come again."""
        return self._recordings(self.decode, mel_BMT, source_B1S)

    def shape(self, mel_BMT: Tensor, spectrum_BFW: Tensor) -> Tensor:
        """The network proper: mel and excitation spectrum to the log magnitude and phase of `to_wave`, [B, n_fft + 2,
        W]."""
        config = self.config
        x = self.conv_pre(mel_BMT)
        for stage, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, config.lrelu_slope))
            if stage == len(self.ups) - 1:
                x = F.pad(x, (1, 0), mode="reflect")  # the centred STFT has one frame more than hops
            x = self.stage(stage, x, self.source_downs[stage](spectrum_BFW))
        return self.conv_post(F.leaky_relu(x))  # torch's default slope here, not the configured one

    def stage(self, index: int, x_BCT: Tensor, source_BCT: Tensor) -> Tensor:
        """One stage after its upsampling: the excitation added, then the mean of the resblocks."""
        kinds = len(self.config.resblock_kernel_sizes)
        x_BCT = x_BCT + self.source_resblocks[index](source_BCT)
        mixed = self.resblocks[index * kinds](x_BCT)
        for block in list(self.resblocks)[index * kinds + 1 : (index + 1) * kinds]:
            mixed = mixed + block(x_BCT)
        return mixed / kinds

    def to_wave(self, shaped_BFW: Tensor, spectrum_BFW: Tensor | None = None) -> Tensor:
        """Inverse STFT of exp(first half) and the sine of the second half as phase, clipped; [B, S].

        With the "filter" head these are gain and phase shift of the excitation's own ``spectrum_BFW``. The excitation
        then brings the fine structure and the network only the envelope, which needs far less of it, at frames of tens
        of milliseconds instead of one.
        """
        n_fft, half = self.config.istft_n_fft, self.config.istft_n_fft // 2 + 1
        magnitude = torch.exp(shaped_BFW[:, :half].float()).clamp(max=100.0)
        phase = torch.sin(shaped_BFW[:, half:].float())
        complex_BFW = torch.polar(magnitude, phase)
        if self.config.head == "filter":
            assert spectrum_BFW is not None, "the filter head needs the excitation's spectrum"
            complex_BFW = complex_BFW * torch.complex(spectrum_BFW[:, :half].float(), spectrum_BFW[:, half:].float())
        wave = inverse_stft(complex_BFW, n_fft, self.config.istft_hop, self._window(magnitude))
        return wave.clamp(-self.config.audio_limit, self.config.audio_limit)

    def _window(self, like: Tensor) -> Tensor:
        return torch.hann_window(self.config.istft_n_fft, dtype=like.dtype, device=like.device)

    def forward(self, mel_BMT: Tensor, phase_BH: Tensor, noise_BSH: Tensor) -> tuple[Tensor, Tensor]:
        """Samples [B, S] and the excitation [B, 1, S] that they were made from."""
        source_B1S = self.source(self.f0(mel_BMT), phase_BH, noise_BSH)
        return self.decode(mel_BMT, source_B1S), source_B1S
