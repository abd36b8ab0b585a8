"""Mini's dialect (`dialect.yaml`): the strings that its lists, its tokenizer and its checkpoints agree on."""

from __future__ import annotations

from pathlib import Path

from osum_echat import config as config_io
from osum_echat.dialogue.dialect import Dialect

FILE = Path(__file__).with_name("dialect.yaml")
DIALECT = config_io.from_dict(Dialect, config_io.read_yaml(FILE)["dialect"], str(FILE))
