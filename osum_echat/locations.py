"""Where to find what this project ships beside the package: the mini model and the recordings of the demo.

In a checkout they are in `checkpoints/mini` and `assets/demo`. An installed package has the recordings (a wheel puts
them under `share/`), but not the model, which is larger than a package should be: `OSUM_ECHAT_MINI` names its folder,
or every command and `EChat.load` take a path.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

MINI_VARIABLE = "OSUM_ECHAT_MINI"
CHECKOUT = Path(__file__).resolve().parents[1]  # of the repository, where this file is in one
_MINI = Path("checkpoints") / "mini"
_RECORDINGS = "demo/demo.jsonl"


def find_mini() -> Path:
    """The folder of the mini model: what ``OSUM_ECHAT_MINI`` names, the checkout's, or ``checkpoints/mini`` where one
    stands.

    Raises:
        FileNotFoundError: there is none; the message says where to get it.
    """
    named = os.environ.get(MINI_VARIABLE)
    if named:
        if not Path(named).expanduser().is_dir():
            raise FileNotFoundError(f"{MINI_VARIABLE} names {named}, which is no folder")
        return Path(named).expanduser()
    for folder in (CHECKOUT / _MINI, _MINI):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(
        "the mini model is not here: it comes with the repository (folder checkpoints/mini, or `make mini` there trains it), not with the "
        f"package; name its folder by --checkpoint or {MINI_VARIABLE}"
    )


def find_checkpoint(name: str | Path) -> str | Path:
    """``name`` as it is; ``mini`` where nothing of that name lies is the mini model. Raises FileNotFoundError as
    `find_mini`."""
    return find_mini() if str(name) == "mini" and not Path(name).exists() else name


def find_recordings() -> Path | None:
    """The list of the demo's recordings (they lie beside it), None where they are not installed."""
    if (CHECKOUT / "assets" / _RECORDINGS).is_file():
        return CHECKOUT / "assets" / _RECORDINGS
    try:
        files = importlib.metadata.files("osum-echat") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())).resolve() for file in files if str(file).endswith(_RECORDINGS)), None)
