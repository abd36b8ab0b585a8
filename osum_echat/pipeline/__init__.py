"""`EChat`: the public object. It joins audio, dialogue, model, generation and token2wav.

    echat = EChat.load("checkpoints/mini")
    echat.understand("me.wav", "<TRANSCRIBE> <EMOTION>").text
    reply = echat.chat("me.wav", think="tag", speak=True)
    for event in echat.stream("me.wav", speak=True): ...
    replies = echat.batch([Ask(wav="a.wav"), Ask(text="hello")])

A recording is a path, the bytes of a file, or (samples, rate). What cannot be used is a ValueError that says why
(`audio.io.AudioError`). `ask.MODES` is the table of everything that can be asked. The names below are imported on first
use, so that the table can be read without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osum_echat.pipeline.ask import (
        MODES,
        Ask,
        AskMode,
        AskOptions,
        AudioChunk,
        Options,
        Reply,
        StreamEvent,
        ThinkForm,
        Voice,
        find_mode,
    )
    from osum_echat.pipeline.echat import Dialogue, EChat

_WHERE = {
    **dict.fromkeys(
        "MODES Ask AskMode AskOptions AudioChunk Options Reply StreamEvent ThinkForm Voice find_mode".split(),  # noqa: SIM905
        "ask",
    ),
    "Dialogue": "echat",
    "EChat": "echat",
}

__all__ = [
    "MODES",
    "Ask",
    "AskMode",
    "AskOptions",
    "AudioChunk",
    "Dialogue",
    "EChat",
    "Options",
    "Reply",
    "StreamEvent",
    "ThinkForm",
    "Voice",
    "find_mode",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
