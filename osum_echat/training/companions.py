"""What stands beside the weights in a checkpoint folder that answers: decoding settings and token2wav.

A training does not touch them, so they come from the checkpoint that it started from, over as many trainings as lie
between. The dialect is part of the model's config and the tokenizer is saved with the run, so neither is looked for
here.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from osum_echat.dialogue.tasks import OUTPUTS
from osum_echat.model.config import ModelConfig
from osum_echat.training.folder import is_training_folder, read_state, step_folder

GENERATION = "generation.yaml"
TOKEN2WAV = "token2wav"


@dataclass(frozen=True)
class Companions:
    """``generation``: a file of decoding settings, None: the published ones. ``token2wav``: a folder, None: answers in
    text only."""

    generation: Path | None = None
    token2wav: Path | None = None

    def copy(self, folder: Path) -> None:
        """Put them into a checkpoint folder, under the names that `EChat.load` looks for."""
        if self.generation is not None:
            shutil.copyfile(self.generation, folder / GENERATION)
        if self.token2wav is not None:
            shutil.copytree(self.token2wav, folder / TOKEN2WAV, dirs_exist_ok=True)


def origin(run: Path) -> Path | None:
    """The checkpoint that a training run, or the first of a chain of them, started from; None for a start from
    nothing."""
    path = run
    while is_training_folder(path):
        start = read_state(step_folder(path))["config"]["init"].get("checkpoint")
        if start is None:
            return None
        path = Path(start)
    return path


def find(
    run: Path, model: ModelConfig, generation: Path | None = None, token2wav: Path | None = None, text_only: bool = False
) -> Companions:
    """The companions of a run's model. ``generation``, ``token2wav``: those, instead of the origin's.

    Raises:
        ValueError: the model speaks, there is no token2wav, and nobody said that text is enough.
    """
    start = origin(run)
    if generation is None and start is not None and (start / GENERATION).is_file():
        generation = start / GENERATION
    if text_only:
        return Companions(generation)
    if token2wav is None and start is not None and (start / TOKEN2WAV).is_dir():
        token2wav = start / TOKEN2WAV
    if token2wav is not None and not token2wav.is_dir():
        raise ValueError(f"token2wav folder {token2wav} is not there")
    if token2wav is None and speaks(model):
        raise ValueError(
            f"{run} has learnt to speak, and there is no token2wav to make sound with: name one (--token2wav FOLDER; for the published model that "
            "is CosyVoice-300M-25Hz), or write a checkpoint that answers in text only (--text-only)"
        )
    return Companions(generation, token2wav)


def speaks(model: ModelConfig) -> bool:
    """Whether a model may be asked for speech."""
    modes = model.dialect.learnt.modes
    return any(output.speech != "none" for name, output in OUTPUTS.items() if modes is None or name in modes)
