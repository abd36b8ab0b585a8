"""What a training run is, as one typed config. YAML files in ``conf/`` are its written form.

Defaults are those the published checkpoints were trained with (8 accumulated micro-batches; optimiser and schedule:
`run.config`). What a small run changes stands in its own file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from osum_echat import config as config_io
from osum_echat.config import ConfigError, InputPath
from osum_echat.data.config import DataConfig, older_model_keys
from osum_echat.model.config import LoraConfig, ModelConfig, Recompute
from osum_echat.model.encoder_masks import EncoderMasks
from osum_echat.run import config as run_config
from osum_echat.run.config import OptimConfig

Stage = Literal["understanding", "generation", "empathy"]
EngineName = Literal["auto", "single", "ddp", "fsdp", "deepspeed"]
Precision = Literal["fp32", "autocast", "bf16", "fp16"]


@dataclass
class InitConfig:
    """What the weights start from. Later entries override earlier ones.

    Attributes:
        checkpoint: a checkpoint folder, ``.pt`` or ``.safetensors`` (every form that `model.checkpoint.load_model`
            reads), or a training folder of the stage before. None: a new model from ``model``.
        whisper: Whisper weights for the encoder (hub name such as ``openai/whisper-medium`` or a local folder).
        llm: causal LM weights and tokenizer (hub name such as ``Qwen/Qwen2.5-3B-Instruct`` or a local folder).
        tokenizer: tokenizer folder of a model from scratch, when not that of ``llm``.
        parts: part (`model.parts.PARTS`), or module such as ``ctc``, -> checkpoint to take it from.
    """

    RENAMED_KEYS: ClassVar[Mapping[str, str]] = {"rooms": "parts"}

    checkpoint: InputPath | None = None
    whisper: InputPath | None = None
    llm: InputPath | None = None
    tokenizer: InputPath | None = None
    parts: dict[str, InputPath] = field(default_factory=dict)


@dataclass
class PartRates:
    """Learning rate of each part (`model.parts.PARTS`). None: what the stage says, at ``optim.lr``; 0: frozen.

    ``adapter`` includes the projection, ``heads`` are the CTC and tag heads, ``llm`` includes the tied text table,
    ``speech`` is the speech embedding and head.
    """

    encoder: float | None = None
    adapter: float | None = None
    heads: float | None = None
    llm: float | None = None
    lora: float | None = None
    speech: float | None = None

    def __post_init__(self) -> None:
        for name, rate in vars(self).items():
            if rate is not None and rate < 0:
                raise ValueError(f"{name} must be a learning rate >= 0 (0 freezes the part), found {rate}")


@dataclass
class LossConfig:
    """Weights of the parts of the loss. ``stream``: extra weight of the targets of a mixing stream (s2t, t2s, s2s,
    t2t)."""

    lm: float = 1.0
    ctc: float = 0.0
    tags: float = 0.0
    stream: dict[str, float] = field(default_factory=dict)


@dataclass
class EngineConfig:
    """How the model is spread over processes.

    Attributes:
        name: ``auto`` = ddp under torchrun, else single.
        deepspeed_config: JSON for ``deepspeed`` (its numbers must agree with this file; ``"auto"`` there takes ours).
        reshard_after_forward: FSDP: free gathered weights after forward (less memory, one more gather).
        cpu_offload: FSDP: keep weight shards and optimiser states in host memory.
        compile: compile each repeated layer (`torch.compile`). The first steps then take minutes; for runs of hours on
            an accelerator.
        timeout_minutes: collectives that take longer fail.
    """

    name: EngineName = "auto"
    deepspeed_config: InputPath | None = None
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    compile: bool = False
    timeout_minutes: float = 30.0


@dataclass
class SafetyConfig(run_config.SafetyConfig):
    """What happens when something goes wrong.

    Attributes:
        max_bad_steps: stop after this many steps in a row with a non-finite loss or gradient.
        watchdog_seconds: say which rank is silent, and where, after this long without a step; 0: no watchdog.
        watchdog_abort: also end the process then (a job scheduler can restart it), after writing all stacks.
        try_largest_batch: run the largest batch that the data config allows forward and backward before step 1.
    """

    watchdog_seconds: float = 600.0
    watchdog_abort: bool = False
    try_largest_batch: bool = True


@dataclass
class MeasureConfig:
    """What validators of real tasks (``--validators``, `evaluation.validation`) work with.

    Attributes:
        items: records of each task that they take from the validation lists.
        token2wav: folder that makes sound of the model's speech, for those that listen to it.
    """

    items: int = 32
    token2wav: InputPath | None = None

    def __post_init__(self) -> None:
        if self.items < 1:
            raise ValueError("items must be at least 1")


@dataclass(kw_only=True)
class TrainConfig(run_config.RunConfig):
    """One training run (see the sections above; `RunConfig` has the keys that are not described here).

    Attributes:
        stage: decides which parts train by default (`stages.STAGES`).
        init, model: what the weights start from; ``model`` is a model config file, needed for a start from scratch or
            from a bare ``.pt``.
        model_changes: keys of the model config that this run changes (``llm: {attention: eager}``).
        data: the training lists and their batches.
        validation: the same for held-out lists, as far as it differs from ``data``: mostly ``streams``. None: no
            validation.
        measure: what validators of real tasks work with.
        lr, lora: which parts train, at which rate. LoRA freezes the LLM below it unless ``lr.llm`` says otherwise.
        precision: ``fp32``; ``autocast``: float32 weights, bfloat16 arithmetic; ``bf16``: bfloat16 weights with float32
            masters in the optimiser; ``fp16``: float32 weights, float16 arithmetic, scaled loss.
        accumulation: micro-batches a step on each rank. The update is the mean over all targets of all of them.
        checkpoint_activations: recompute each block in backward instead of storing it. ``selective``: all of it but
            products and attention, which costs some 6 % of a step instead of a quarter and keeps 9 GB of the released
            model's 24 (a row of 4,096; by arithmetic).
        max_steps, max_epochs, max_minutes: whichever comes first ends the run.
        keep: how many checkpoints are kept.
        save_frozen: write frozen weights too. False: they are read again from ``init`` at resume and checked by
            fingerprint.
        encoder_cache: folder in which the outputs of a frozen encoder are kept, by content (`model.encoder_cache`);
            only without augmentation is anything found there again.
        encoder_masks: spans and channels of the encoder's outputs that the adapter is not shown
            (`model.encoder_masks`); None: all is shown.
        input_noise: share of speech codes in the *inputs* replaced by random codes (targets stay).
    """

    RENAMED_KEYS: ClassVar[Mapping[str, str]] = {"rooms": "lr"}

    stage: Stage = "understanding"
    init: InitConfig = field(default_factory=InitConfig)
    model: InputPath | None = None
    model_changes: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    validation: DataConfig | None = None
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    lr: PartRates = field(default_factory=PartRates)
    lora: LoraConfig | None = None
    loss: LossConfig = field(default_factory=LossConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    precision: Precision = "bf16"  # type: ignore[assignment]  # more than every training knows
    accumulation: int = 8
    checkpoint_activations: Recompute = True
    max_epochs: int | None = 1
    expected_steps: int | None = None
    keep: int = 3
    save_frozen: bool = False
    validate_batches: int | None = None
    encoder_cache: str | None = None
    encoder_masks: EncoderMasks | None = None
    input_noise: float = 0.0

    @classmethod
    def read_older(cls, data: dict[str, Any], where: str) -> dict[str, Any]:
        """What a data section said of the model's dialect in older files becomes a change of the model's config."""
        for section in ("validation", "data"):
            if isinstance(data.get(section), Mapping):
                data[section], changes = older_model_keys(data[section], f"{where}: {section}")
                data["model_changes"] = config_io.merge(changes, data.get("model_changes") or {})
        return data

    @classmethod
    def fill_in(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Held-out records are read as the training records are, but for what ``validation`` says otherwise."""
        if isinstance(data.get("validation"), Mapping) and isinstance(data.get("data"), Mapping):
            shared = {key: value for key, value in data["data"].items() if key not in ("streams", "drops_file")}
            data["validation"] = config_io.merge(shared, data["validation"])
        return data

    def __post_init__(self) -> None:
        super().__post_init__()
        config_io.check(ModelConfig, self.model_changes, "model_changes")
        if self.accumulation < 1 or self.keep < 1:
            raise ValueError("accumulation and keep must be at least 1")
        if not 0 <= self.input_noise < 1:
            raise ValueError(f"input_noise is a share of codes in [0, 1), found {self.input_noise}")
        if self.max_steps is None and self.max_epochs is None and self.max_minutes is None:
            raise ValueError("state when to stop: max_steps, max_epochs or max_minutes")


__all__ = [
    "ConfigError",
    "EngineConfig",
    "InitConfig",
    "LossConfig",
    "MeasureConfig",
    "OptimConfig",
    "PartRates",
    "SafetyConfig",
    "TrainConfig",
]
