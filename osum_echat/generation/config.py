"""Decoding settings as data: sampling per kind of sequence, guards, limits. The written form is `conf/generation.yaml`.

The numbers are those of the published inference code where it has any. A checkpoint folder may bring its own
`generation.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from osum_echat.config import warn_older
from osum_echat.dialogue.tasks import OUTPUTS


@dataclass(frozen=True)
class Sampling:
    """How an id is drawn. Order: repetition penalty, guards, temperature, top_k, top_p (as in transformers 4.44).

    Args:
        greedy: take the most likely id; the penalty and the guards still count, the rest does not.
        temperature: logits are divided by it.
        top_k: only the k most likely ids (0: all).
        top_p: only the smallest set of most likely ids whose probability reaches p (1: all).
        repetition_penalty: logits of ids that this reply already holds are divided (multiplied if negative) by it. Text
            and speech ids are kept apart; the prompt never counts.
    """

    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive; for the most likely id set greedy: true")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (off) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")
        if not self.repetition_penalty >= 1:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be 1 (off) or more")


@dataclass(frozen=True)
class Mode:
    """Settings of one kind of sequence (a key of `dialogue.tasks.OUTPUTS`). ``max_new``: ids generated at most, text
    and speech together."""

    text: Sampling = field(default_factory=Sampling)
    speech: Sampling = field(default_factory=Sampling)
    max_new: int = 2000

    def __post_init__(self) -> None:
        if self.max_new < 1:
            raise ValueError(f"max_new={self.max_new} must be at least 1")

    def greedy(self) -> Mode:
        """The same with the most likely id always taken."""
        return replace(self, text=replace(self.text, greedy=True), speech=replace(self.speech, greedy=True))

    def tuned(self, greedy: bool = False, temperature: float | None = None, max_new: int | None = None) -> Mode:
        """The same with what a request wants otherwise. ``temperature`` is that of text and speech; 0 is greedy. Raises
        ValueError."""
        mode = self if max_new is None else replace(self, max_new=max_new)
        if greedy or temperature == 0:
            return mode.greedy()
        if temperature is None:
            return mode
        text, speech = (replace(sampling, greedy=False, temperature=temperature) for sampling in (mode.text, mode.speech))
        return replace(mode, text=text, speech=speech)


@dataclass(frozen=True)
class RepetitionGuard:
    """Bans a speech code that repeats: ``run`` times without a break, or ``count`` times among the last ``window`` ids.

    Codes of ``frequent_codes`` (silence, long vowels) have limits of their own. The numbers are the published ones.
    """

    run: int = 5
    window: int = 8
    count: int = 5
    frequent_codes: tuple[int, ...] = (1446,)
    frequent_run: int = 10
    frequent_window: int = 13
    frequent_count: int = 10

    @property
    def memory(self) -> int:
        """How many of the last ids must be known."""
        return max(self.window, self.frequent_window, self.run, self.frequent_run)


@dataclass(frozen=True)
class AgeGuard:
    """When a text has come to ``trigger``, the next id must begin one of ``choices``; once per reply.

    ``&&`` (not known) is one of them, as in the training data; the published code leaves it out, and guards spoken
    replies only.
    """

    trigger: str = "年龄为:<"
    choices: tuple[str, ...] = ("CHILD>", "ADULT>", "OLD>", "&&>")
    spoken_only: bool = False


@dataclass(frozen=True)
class SilenceGuard:
    """At most ``longest`` codes of ``codes`` in a row (25 codes are one second)."""

    codes: tuple[int, ...] = (1446,)
    longest: int = 25


@dataclass(frozen=True)
class LengthGuard:
    """Speech ends after ``base + per_text_id * (text ids of the reply)`` codes. Human speech needs 3 to 12 codes for a
    text id."""

    base: int = 50
    per_text_id: int = 25


@dataclass(frozen=True)
class ThinkGuard:
    """A think is closed after ``longest`` ids; until it is closed the text cannot end."""

    longest: int = 400


@dataclass(frozen=True)
class Guards:
    """Which guards are on; None is off."""

    repetition: RepetitionGuard | None = field(default_factory=RepetitionGuard)
    age: AgeGuard | None = field(default_factory=AgeGuard)
    silence: SilenceGuard | None = field(default_factory=SilenceGuard)
    length: LengthGuard | None = field(default_factory=LengthGuard)
    think: ThinkGuard | None = field(default_factory=ThinkGuard)

    @classmethod
    def off(cls) -> Guards:
        return cls(None, None, None, None, None)

    @classmethod
    def as_released(cls) -> Guards:
        """What the published code really had: its age guard. Its repetition blocker was never switched on."""
        return replace(cls.off(), age=AgeGuard(choices=("CHILD>", "ADULT>", "OLD>"), spoken_only=True))


_S2S = Sampling(temperature=1.2, top_k=10, top_p=0.9)
_CHAT = Mode(text=Sampling(temperature=0.4, top_k=2, repetition_penalty=1.05), max_new=8000)
_TTS = Mode(speech=Sampling(temperature=1.2, top_k=15, top_p=0.8))
_MODES = {
    "text": Mode(text=Sampling(top_k=5, top_p=0.9, repetition_penalty=1.05), max_new=8000),
    "s2t_chat": _CHAT,
    "s2t_chat_fake": _CHAT,
    "s2t_chat_think": _CHAT,
    "text2text": Mode(text=Sampling(greedy=True), max_new=200),
    "text2token": _TTS,
    "text2token_streaming": _TTS,
}


def _default_modes() -> dict[str, Mode]:
    return {name: _MODES.get(name, Mode(text=_S2S, speech=_S2S)) for name in OUTPUTS}


@dataclass(frozen=True)
class GenerationConfig:
    """Everything that decoding needs to know beside the model and its dialect (`dialogue.dialect`).

    Args:
        modes: settings by output type; types that are not named keep the published settings.
        guards: see `Guards`.
        force_speech_begin: the delimiter that begins speech is given after the text, as training always had it there;
            otherwise the model must choose it itself.
        max_codes_per_word: for the word form: a word's speech ends after this many codes.
        ctc_weight: share of the CTC head in choosing the words of a transcript, from 0 (the LLM alone) to below 1; see
            `generation.transcript`. For models with a CTC head; they are decoded in the usual way then, not by the
            static step.
        static_step: decode by a step of fixed shape that stays on the device (`generation.static_rows`): auto (on
            accelerators), always, never. It gives the same ids. A model that it does not take is decoded in the usual
            way, which is said once.
    """

    modes: dict[str, Mode] = field(default_factory=_default_modes)
    guards: Guards = field(default_factory=Guards)
    force_speech_begin: bool = True
    max_codes_per_word: int = 50
    ctc_weight: float = 0.0
    static_step: Literal["auto", "always", "never"] = "auto"

    def __post_init__(self) -> None:
        if self.static_step not in ("auto", "always", "never"):
            raise ValueError(f"static_step={self.static_step!r}: use auto, always or never")
        if not 0 <= self.ctc_weight < 1:
            raise ValueError(f"ctc_weight must be 0 or more and below 1, found {self.ctc_weight}")
        unknown = sorted(set(self.modes) - set(OUTPUTS))
        if unknown:
            raise ValueError(f"modes: unknown output type {unknown[0]!r}; use {', '.join(OUTPUTS)}")

    def mode(self, output_type: str) -> Mode:
        """Settings of an output type. Raises ValueError for an unknown one."""
        if output_type in self.modes:
            return self.modes[output_type]
        if output_type in OUTPUTS:
            return _default_modes()[output_type]
        raise ValueError(f"unknown output type {output_type!r}; use {', '.join(OUTPUTS)}")

    def as_released(self) -> GenerationConfig:
        """The same with what the published code did about guards and begin of speech, for the dialect
        ``as_released``."""
        return replace(self, guards=Guards.as_released(), force_speech_begin=False)


_OLDER_KEYS = {
    "profile": "profile",
    "speech_form": "speech_form",
    "instructions": "instructions",
    "only_instructed": "refuse_unlisted",
}


def older_dialect_keys(data: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take out of generation settings what older files said there of the dialect, which the checkpoint's config.yaml
    says now.

    Returns:
        The settings without those keys, and the changes of the dialect that they come to.
    """
    changes: dict[str, Any] = {}
    for key, name in _OLDER_KEYS.items():
        if key in data:
            warn_older(where, key, f"{name} under dialect: in the checkpoint's config.yaml")
            changes[name] = data[key]
    return {key: value for key, value in data.items() if key not in _OLDER_KEYS}, changes


Reason = Literal["stop", "length", "cancelled", "silence"]
