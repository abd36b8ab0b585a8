"""Sizes and rates of a token2wav directory: flow, vocoder and the prompt mel, as dataclasses.

The defaults are CosyVoice-300M-25Hz. A directory's own ``cosyvoice.yaml`` overrides them (see `released_yaml`), so that
a smaller model with other widths, vocabulary or frame rate is the same code with other numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from osum_echat.rates import CODES_PER_SECOND

SAMPLE_RATE = 22050
"""Samples per second of what comes out. The length formula below fixes it together with `MEL_HOP`, so a directory
cannot change it."""

MEL_HOP = 256
"""Samples per mel frame (86.13 frames per second)."""


def mel_frames(tokens: int, token_rate: int = CODES_PER_SECOND) -> int:
    """Mel frames for ``tokens`` speech tokens, truncated. 25 Hz: 1 -> 3, 20 -> 68, 100 -> 344.

    The order of the divisions is part of the format: another order rounds differently for some lengths.
    """
    return int(tokens / token_rate * SAMPLE_RATE / MEL_HOP)


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value <= 0:
            raise ValueError(f"{name} must be positive, found {value}")


@dataclass(frozen=True)
class EncoderConfig:
    """Conformer-shell token encoder: pre-norm self-attention with relative positions, no convolution module."""

    output_size: int = 512
    attention_heads: int = 8
    linear_units: int = 2048
    num_blocks: int = 6

    def __post_init__(self) -> None:
        _positive(self, "output_size", "attention_heads", "linear_units", "num_blocks")
        if self.output_size % self.attention_heads:
            raise ValueError(f"output_size {self.output_size} is not a multiple of attention_heads {self.attention_heads}")


@dataclass(frozen=True)
class EstimatorConfig:
    """The 1-D U-Net that predicts the velocity. ``channels`` has one entry per resolution."""

    channels: tuple[int, ...] = (256, 256)
    attention_head_dim: int = 64
    num_heads: int = 8
    n_blocks: int = 4
    num_mid_blocks: int = 12
    groups: int = 8

    def __post_init__(self) -> None:
        _positive(self, "attention_head_dim", "num_heads", "n_blocks", "num_mid_blocks", "groups")
        if not self.channels or any(c % self.groups for c in self.channels):
            raise ValueError(f"channels {self.channels} must be non-empty and multiples of the {self.groups} GroupNorm groups")


@dataclass(frozen=True)
class SolverConfig:
    """Flow matching: how the ODE is trained and solved."""

    sigma_min: float = 1e-6
    t_scheduler: str = "cosine"
    training_cfg_rate: float = 0.2
    inference_cfg_rate: float = 0.7
    # Scale of the noise that the ODE starts from; less is smoother, for a flow that was trained briefly.
    temperature: float = 1.0
    steps: int = 10  # Euler steps of synthesis
    # The flow was taught to take exactly these steps, without guidance (training.token2wav.distill)
    distilled: bool = False

    def __post_init__(self) -> None:
        if self.t_scheduler not in ("cosine", "linear"):
            raise ValueError(f"t_scheduler must be cosine or linear, found {self.t_scheduler!r}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, found {self.temperature}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, found {self.steps}")
        if self.distilled and self.inference_cfg_rate:
            raise ValueError(f"a distilled flow has no guidance: inference_cfg_rate must be 0, found {self.inference_cfg_rate}")

    def chosen(self, steps: int | None, guidance: float | None, schedule: str | None) -> tuple[int, float, str]:
        """Steps, guidance and schedule of a synthesis that asks for these (None: the directory's own).

        Raises:
            ValueError: a distilled flow is asked for what it was not taught.
        """
        steps = self.steps if steps is None else steps
        guidance = self.inference_cfg_rate if guidance is None else guidance
        schedule = self.t_scheduler if schedule is None else schedule
        if self.distilled and (steps, guidance, schedule) != (self.steps, 0.0, self.t_scheduler):
            raise ValueError(
                f"this flow was distilled to {self.steps} steps ({self.t_scheduler}) without guidance, found {steps} steps ({schedule}), "
                f"guidance {guidance:g}; leave steps, guidance and schedule out, or take the flow that it was distilled from"
            )
        return steps, guidance, schedule


@dataclass(frozen=True)
class FlowConfig:
    """Speech tokens to log-mel."""

    vocab_size: int = 4096
    input_size: int = 512
    output_size: int = 80
    spk_embed_dim: int = 192
    input_frame_rate: int = CODES_PER_SECOND
    regulator_blocks: int = 4
    regulator_groups: int = 1
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "input_size", "output_size", "spk_embed_dim", "input_frame_rate", "regulator_blocks")

    def mel_frames(self, tokens: int) -> int:
        """Mel frames of a reply of ``tokens`` tokens."""
        return mel_frames(tokens, self.input_frame_rate)


@dataclass(frozen=True)
class VocoderConfig:
    """HiFT: log-mel to samples through a sine source, two transposed convolutions and an inverse STFT."""

    in_channels: int = 80
    base_channels: int = 512
    nb_harmonics: int = 8
    nsf_alpha: float = 0.1
    nsf_sigma: float = 0.003
    nsf_voiced_threshold: float = 10.0
    upsample_rates: tuple[int, ...] = (8, 8)
    upsample_kernel_sizes: tuple[int, ...] = (16, 16)
    istft_n_fft: int = 16
    istft_hop: int = 4
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    source_resblock_kernel_sizes: tuple[int, ...] = (7, 11)
    source_resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5))
    lrelu_slope: float = 0.1
    audio_limit: float = 0.99
    f0_channels: int = 512
    nsf_aligned: bool = False  # harmonics start in phase (a pulse train) instead of at random phases
    head: str = "spectrum"  # what conv_post gives: the output's spectrum, or a "filter" on the excitation's
    sample_rate: int = SAMPLE_RATE

    def __post_init__(self) -> None:
        _positive(self, "in_channels", "base_channels", "nb_harmonics", "istft_n_fft", "istft_hop", "f0_channels")
        if self.head not in ("spectrum", "filter"):
            raise ValueError(f"head must be spectrum or filter, found {self.head!r}")
        hop = self.istft_hop
        for rate in self.upsample_rates:
            hop *= rate
        if hop != MEL_HOP:
            raise ValueError(
                f"upsample_rates {self.upsample_rates} and istft_hop {self.istft_hop} give {hop} samples per frame, not {MEL_HOP}"
            )
        if self.sample_rate != SAMPLE_RATE:
            raise ValueError(f"sample rate {self.sample_rate} is not supported: the length formula needs {SAMPLE_RATE}")
        if len(self.upsample_rates) != len(self.upsample_kernel_sizes):
            raise ValueError("upsample_rates and upsample_kernel_sizes differ in length")
        if len(self.source_resblock_kernel_sizes) != len(self.upsample_rates):
            raise ValueError("source_resblock_kernel_sizes needs one entry per upsampling stage")
        if len(self.resblock_kernel_sizes) != len(self.resblock_dilation_sizes) or len(self.source_resblock_kernel_sizes) != len(
            self.source_resblock_dilation_sizes
        ):
            raise ValueError("every resblock kernel size needs its own list of dilations")

    @property
    def source_noises(self) -> int:
        """Independent noises that the excitation takes a sample: one for each harmonic, or one in all where harmonics
        are aligned (a weighted sum of independent normals is one normal)."""
        return 1 if self.nsf_aligned else self.nb_harmonics + 1


@dataclass(frozen=True)
class Token2WavConfig:
    """Everything that ``cosyvoice.yaml`` says about sound."""

    flow: FlowConfig = field(default_factory=FlowConfig)
    vocoder: VocoderConfig = field(default_factory=VocoderConfig)

    def __post_init__(self) -> None:
        if self.flow.output_size != self.vocoder.in_channels:
            raise ValueError(f"the flow makes {self.flow.output_size} mel bins but the vocoder reads {self.vocoder.in_channels}")
