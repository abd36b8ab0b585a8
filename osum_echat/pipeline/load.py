"""What belongs to a checkpoint beside its model: decoding settings, token2wav, the reply's voice, instructions."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from osum_echat import config as config_io
from osum_echat import device as devices
from osum_echat.cpu_linear import pack_linears
from osum_echat.dialogue.tasks import find_task
from osum_echat.generation.config import GenerationConfig
from osum_echat.model.checkpoint import load_model
from osum_echat.model.config import ModelConfig
from osum_echat.model.echat import EChatModel

if TYPE_CHECKING:
    from osum_echat.token2wav import Speaker, Token2Wav

GENERATION_FILE = "generation.yaml"
TOKEN2WAV_FOLDER = "token2wav"
SPEAKER_FILE = "speaker.safetensors"
INSTRUCTIONS = "package:prompt_config.yaml"


def load_llm(
    checkpoint: str | Path, config: str | Path | ModelConfig | None, target: torch.device, dtype: str, pack: bool
) -> tuple[EChatModel, Any]:
    """Model and tokenizer, ready to decode; arguments as of `EChat.load`."""
    chosen = functools.partial(devices.model_dtype, dtype, target)
    model, tokenizer = load_model(checkpoint, config, device=target, dtype=chosen)
    if model.lm.llm.config._attn_implementation == "eager":
        model.lm.llm.set_attn_implementation("sdpa")  # eager is a choice for training; a step of one id is faster without
    if pack:
        pack_linears(model.lm)
    return model, tokenizer


def read_settings(checkpoint: Path, generation: str | Path | GenerationConfig | None, profile: str | None) -> GenerationConfig:
    """Decoding settings: those given, else the checkpoint's own file, else the defaults."""
    if isinstance(generation, GenerationConfig):
        settings = generation
    else:
        own = checkpoint / GENERATION_FILE
        settings = config_io.load(GenerationConfig, own if generation is None and own.is_file() else generation)
    return settings if profile is None else settings.with_profile(profile)


def load_token2wav(checkpoint: Path, given: str | Path | Token2Wav | None, device: torch.device) -> Token2Wav | None:
    """The one given, else the checkpoint's own, if it has one."""
    if given is None and (checkpoint / TOKEN2WAV_FOLDER).is_dir():
        given = checkpoint / TOKEN2WAV_FOLDER
    if given is None or not isinstance(given, (str, Path)):
        return given
    from osum_echat.token2wav import Token2Wav

    return Token2Wav.load(given, device=str(device))


def default_voice(checkpoint: Path, token2wav: Token2Wav) -> Speaker | None:
    """The checkpoint's saved speaker, else the first name of ``spk2info.pt``."""
    from osum_echat.token2wav import Speaker

    saved = checkpoint / TOKEN2WAV_FOLDER / SPEAKER_FILE
    return Speaker.load(saved) if saved.is_file() else next(iter(token2wav.speakers.values()), None)


def instruction(settings: GenerationConfig, task: str) -> str:
    """What the user asks for. A task without an instruction of its own is asked without one, as in training.

    Raises:
        ValueError: a task that the checkpoint has not learnt, or one that lacks its instruction.
    """
    known = settings.instructions
    if task in known:
        return known[task]
    prompted = find_task(task).prompted
    if settings.only_instructed and prompted:
        raise ValueError(f"this checkpoint has not learnt {task}, only {', '.join(known)}; prompt= asks in words of your own")
    sentences = _published_instructions().get(task)
    if sentences is None and prompted:
        raise ValueError(f"there is no instruction for {task}: give prompt=, or instructions in {GENERATION_FILE}")
    return str(sentences[0]) if sentences else ""


@functools.lru_cache(maxsize=1)
def _published_instructions() -> dict[str, Any]:
    return config_io.read_yaml(INSTRUCTIONS)
