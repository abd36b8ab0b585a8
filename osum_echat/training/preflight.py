"""What can be known to be missing before anything is loaded: said at once, by the name of the key, with what to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from osum_echat.data.config import DataConfig
from osum_echat.model import download
from osum_echat.training.config import ConfigError, TrainConfig


def check(config: TrainConfig) -> None:
    """Raises ConfigError for weights and lists that are not there."""
    if config.init.checkpoint is None and config.model is None:
        raise ConfigError("state where to start: init.checkpoint, or model: (a model config file) for a new model")
    for key, name, what in _weights(config):
        if Path(name).exists():
            continue
        # Where trainings write.
        if not download.is_hub_name(name) or name.startswith(("out/", f"{config.out.parts[0]}/")):
            raise ConfigError(f"{key}: {name} is not there; {what}")
        try:
            download.check(name, key)
        except download.NotFound as error:
            raise ConfigError(f"{error}; then {key}=FOLDER") from error
    _check_lists("data", config.data)
    if config.validation is not None:
        _check_lists("validation", config.validation)


def _weights(config: TrainConfig) -> Iterator[tuple[str, str, str]]:
    """(key, value, remedy) of everything that the weights start from."""
    init = config.init
    stage = (
        "it is what an earlier training writes (train that stage first), or name a checkpoint that you have, such as "
        "init.checkpoint=language_think_final.pt"
    )
    if init.checkpoint is not None:
        yield "init.checkpoint", init.checkpoint, stage
    for part, path in init.parts.items():
        yield f"init.parts.{part}", path, "train the run that writes it first, or leave the part out (init.parts={} for none)"
    for key, name in (("init.whisper", init.whisper), ("init.llm", init.llm), ("init.tokenizer", init.tokenizer)):
        if name is not None:
            yield key, name, "name a folder of this machine or a repository on the hub"


def _check_lists(section: str, data: DataConfig) -> None:
    if not data.streams:
        remedy = (
            "name at least one list, such as data.streams={s2t: {list: conf/data_s2t.yaml}}"
            if section == "data"
            else "name held-out lists, or leave the section out for a run without validation (validation=null)"
        )
        raise ConfigError(f"{section}.streams is empty: {remedy}")
    for name, stream in data.streams.items():
        if "://" not in stream.list and not Path(stream.list).exists():
            raise ConfigError(f"{section}.streams.{name}.list: {stream.list} is not there")
