"""Speech tokens to samples: flow matching and a HiFT vocoder in the voice of a prompt recording, offline or as a
stream.

`Token2Wav` and `Speaker` are the public objects; see docs/token2wav.md. They are imported on first use, so that reading
a config or training a part does not load the ONNX runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osum_echat.token2wav.model import Token2Wav
    from osum_echat.token2wav.prompt import Speaker
    from osum_echat.token2wav.streaming import StreamConfig

_WHERE = {"Token2Wav": "model", "Speaker": "prompt", "StreamConfig": "streaming"}

__all__ = ["Speaker", "StreamConfig", "Token2Wav"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
