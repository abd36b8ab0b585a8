"""What belongs to a checkpoint beside its model: decoding settings, dialect, token2wav, the reply's voice."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from osum_echat import config as config_io
from osum_echat import device as devices
from osum_echat.cpu_linear import lighten, pack_linears
from osum_echat.dialogue.dialect import Dialect
from osum_echat.generation.config import GenerationConfig, older_dialect_keys
from osum_echat.generation.generator import Generator
from osum_echat.model.checkpoint import config_for, load_model
from osum_echat.model.config import ModelConfig
from osum_echat.model.echat import EChatModel

if TYPE_CHECKING:
    from osum_echat.token2wav import Speaker, Token2Wav

GENERATION_FILE = "generation.yaml"
TOKEN2WAV_FOLDER = "token2wav"
SPEAKER_FILE = "speaker.safetensors"


def load_llm(
    checkpoint: str | Path, config: str | Path | ModelConfig | None, target: torch.device, dtype: str, weights: str, pack: bool
) -> tuple[EChatModel, Any]:
    """Model and tokenizer, ready to decode; arguments as of `EChat.load`."""
    config = config_for(Path(checkpoint), config)
    if weights == "auto" and dtype == "auto" and target.type == "cpu":
        weights = config.weights
    chosen = functools.partial(devices.model_weights, weights, dtype, target)
    model, tokenizer = load_model(checkpoint, config, device=target, dtype=chosen)
    if model.lm.llm.config._attn_implementation == "eager":
        # Eager is a choice for training; a step of one id is faster without.
        model.lm.llm.set_attn_implementation("sdpa")
    if pack:
        pack_linears(model.lm)
        if target.type == "cpu":
            lighten(model.lm.llm.get_decoder())
    return model, tokenizer


LLM_ENGINES = ("own", "vllm")


def uses_vllm(llm_engine: str, vllm_folder: str | Path | None, weights: str) -> bool:
    """Whether vLLM is asked for. Raises ValueError for what contradicts."""
    if llm_engine not in LLM_ENGINES:
        raise ValueError(f"unknown engine {llm_engine!r}: use {' or '.join(LLM_ENGINES)}")
    if llm_engine == "own" and vllm_folder is not None:
        raise ValueError(
            "a folder for vLLM was given, and our own engine asked for: add llm_engine vllm, or leave the folder out"
        )
    if llm_engine == "vllm" and weights != "auto":
        raise ValueError(f"weights={weights} is for our own engine; with vLLM give a dtype, or leave it out")
    return llm_engine == "vllm"


def load_generator(
    model: EChatModel,
    tokenizer: Any,
    settings: GenerationConfig,
    dialect: Dialect,
    vllm_folder: Path | None,
) -> Generator:
    """What decodes: our own generator, or one whose LLM runs in vLLM on an exported folder."""
    if vllm_folder is None:
        return Generator(model, tokenizer, settings, dialect)
    from osum_echat.generation.vllm.client import VllmDecoder
    from osum_echat.generation.vllm.engine import VllmGenerator
    from osum_echat.generation.vllm.rules import to_settings

    decoding = to_settings(settings, dialect)
    return VllmGenerator(model, tokenizer, settings, dialect, lambda limits: VllmDecoder(vllm_folder, limits, decoding))


def load_for_vllm(
    checkpoint: Path,
    config: str | Path | ModelConfig | None,
    target: torch.device,
    dtype: str,
    vllm_folder: str | Path | None,
) -> tuple[EChatModel, Any, Path]:
    """Model (without the layers of its LLM), tokenizer, and the folder for vLLM: the one given, else one that is
    exported now and removed when the program ends.

    Raises:
        ModuleNotFoundError: vLLM is not installed. ValueError: the LLM cannot be exported, or the folder is another
            checkpoint's.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ModuleNotFoundError("vLLM is not installed", name="vllm")
    from osum_echat.generation.vllm import export
    from osum_echat.generation.vllm.engine import drop_decoder

    if vllm_folder is not None:
        dtype = export.folder_dtype(vllm_folder)
    model, tokenizer = load_model(checkpoint, config, device=target, dtype=_vllm_dtype(dtype))
    if vllm_folder is None:
        folder = Path(tempfile.mkdtemp(prefix="osum-echat-vllm-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        settings, dialect = read_settings(checkpoint, None, model.config.dialect, None)
        export.export_for_vllm(model, tokenizer, settings, dialect, folder)
    else:
        folder = Path(vllm_folder)
        export.check_folder(folder, model)
    drop_decoder(model)
    return model, tokenizer, folder


def _vllm_dtype(name: str) -> Callable[[int, str | None], devices.Weights]:
    """What vLLM is to compute in, for `load_model`: ``auto`` goes by the number of weights, whatever the checkpoint
    holds them in."""
    if name != "auto":
        chosen = devices.Weights(devices.dtype(name, torch.device("cpu")))
        return lambda count, stored: chosen
    return lambda count, stored: devices.Weights(torch.float32 if count < devices.cpu.LARGE else torch.bfloat16)


def export_vllm(
    checkpoint: Path, out: Path, config: str | Path | ModelConfig | None = None, dtype: str = "auto", profile: str | None = None
) -> Path:
    """`export.export_for_vllm` of any checkpoint. ``dtype``: ``auto`` is bfloat16 for large models, float32 for small
    ones. Raises ValueError."""
    from osum_echat.generation.vllm.export import export_for_vllm

    model, tokenizer = load_model(checkpoint, config, dtype=_vllm_dtype(dtype))
    settings, dialect = read_settings(checkpoint, None, model.config.dialect, profile)
    return export_for_vllm(model, tokenizer, settings, dialect, out)


def read_settings(
    checkpoint: Path, generation: str | Path | GenerationConfig | None, dialect: Dialect, profile: str | None
) -> tuple[GenerationConfig, Dialect]:
    """Decoding settings (those given, else the checkpoint's own file, else the defaults), and the dialect to ask in.

    Args:
        dialect: the checkpoint's own. profile: a published one instead of its strings; ``as_released`` has decoding
            settings of its own.
    """
    settings = generation if isinstance(generation, GenerationConfig) else GenerationConfig()
    own = checkpoint / GENERATION_FILE
    file = own if generation is None and own.is_file() else generation
    if isinstance(file, (str, Path)):
        data, older = older_dialect_keys(config_io.read_yaml(file), str(file))
        settings = config_io.from_dict(GenerationConfig, data, str(file))
        if older:
            dialect = config_io.from_dict(Dialect, config_io.merge(config_io.to_dict(dialect), older), str(file))
    if profile is not None:
        if not isinstance(dialect.profile, str):
            raise ValueError(
                f"this checkpoint has strings of its own; profile {profile!r} is for those that were trained with the published ones"
            )
        dialect = dialect.with_profile(profile)
    return (settings.as_released() if dialect.as_released else settings), dialect


def load_token2wav(
    checkpoint: Path, given: str | Path | Token2Wav | None, device: torch.device, dtype: str = "float32"
) -> Token2Wav | None:
    """The one given, else the checkpoint's own, if it has one."""
    if given is None and (checkpoint / TOKEN2WAV_FOLDER).is_dir():
        given = checkpoint / TOKEN2WAV_FOLDER
    if given is None or not isinstance(given, (str, Path)):
        return given
    from osum_echat.token2wav import Token2Wav

    return Token2Wav.load(given, device=str(device), dtype=dtype)


def default_voice(checkpoint: Path, token2wav: Token2Wav) -> Speaker | None:
    """The checkpoint's saved speaker, else the first name of ``spk2info.pt``."""
    from osum_echat.token2wav import Speaker

    saved = checkpoint / TOKEN2WAV_FOLDER / SPEAKER_FILE
    return Speaker.load(saved) if saved.is_file() else next(iter(token2wav.speakers.values()), None)
