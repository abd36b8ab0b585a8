"""``cosyvoice.yaml`` of a directory that is being made: each training writes the sizes of its own part beside its
weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from osum_echat.run.files import write_atomically
from osum_echat.token2wav import released_yaml
from osum_echat.token2wav.config import Token2WavConfig

NAME = "cosyvoice.yaml"


def describe(directory: Path, **parts: Any) -> Path:
    """Set ``flow`` and/or ``vocoder`` in the directory's ``cosyvoice.yaml``, keeping the other part (released sizes if
    there is none yet)."""
    path = directory / NAME
    before = released_yaml.load_config(path) if path.is_file() else Token2WavConfig()
    after = dataclasses.replace(before, **parts)
    write_atomically(path, lambda temporary: released_yaml.write(temporary, after))
    return path
