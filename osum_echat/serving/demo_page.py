"""What the demo found, and the page that shows it: one HTML file with sounds and pictures inside, which asks the
network for nothing.

Sounds are MP3, because every browser plays it, on phones too (Ogg Opus is missing in iPhones before 2025); 40 kbit/s or
so.
"""

from __future__ import annotations

import base64
import difflib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import soundfile

from osum_echat import metrics
from osum_echat.audio.features import LogMel
from osum_echat.audio.io import SAMPLE_RATE, Audio, read
from osum_echat.audio.resample import resample
from osum_echat.pipeline.ask import AskMode, Reply

TAGS = ("age", "gender", "emotion", "event")
TEMPLATE = "demo.html"
_WIDTH, _MELS, _COLOURS = 480, 64, 64
"""Pixels of a spectrogram: wide, high; colours of its palette."""

Mark = Literal["right", "wrong", "missing", ""]


@dataclass(frozen=True)
class Recording:
    """A recording and, when it is one of ours, what was said and how, and the replies that fit."""

    path: Path
    words: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    replies: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.stem.replace("_", " ")


@dataclass(frozen=True)
class Tag:
    """A tag that the model found; ``expected`` is empty where nobody knows the right one."""

    name: str
    found: str
    expected: str = ""

    @property
    def mark(self) -> Mark:
        if not self.expected:
            return ""
        return "right" if metrics.bare_tag(self.found) == metrics.bare_tag(self.expected) else "wrong"


@dataclass(frozen=True)
class Result:
    """What the model made of a recording.

    Attributes:
        reply: with thought in tags and speech. thought: the thought in natural language, or empty.
        first_text, first_sound, total: seconds after the request; None where it never came to that.
    """

    recording: Recording
    reply: Reply
    thought: str = ""
    first_text: float | None = None
    first_sound: float | None = None
    total: float = 0.0

    @property
    def heard(self) -> str:
        return (self.reply.think.transcript or "") if self.reply.think is not None else ""

    @cached_property
    def words(self) -> list[tuple[str, Mark]]:
        """The words that were heard; where the right ones are known each is marked, and those that are missing stand
        where they belong."""
        if not self.recording.words:
            return [(word, "") for word in self.heard.split()]
        said, heard = metrics.normalize(self.recording.words).split(), metrics.normalize(self.heard).split()
        out: list[tuple[str, Mark]] = []
        for kind, i, j, k, m in difflib.SequenceMatcher(a=said, b=heard, autojunk=False).get_opcodes():
            out += [(word, "right" if kind == "equal" else "wrong") for word in heard[k:m]]
            out += [(word, "missing") for word in said[i:j] if kind == "delete"]
        return out

    @cached_property
    def tags(self) -> list[Tag]:
        think = self.reply.think
        found = {name: getattr(think, name) for name in TAGS} if think is not None else {}
        return [
            Tag(name, found.get(name) or "?", self.recording.tags.get(name, ""))
            for name in TAGS
            if found.get(name) or name in self.recording.tags
        ]

    @property
    def fits(self) -> bool | None:
        """Whether the reply is one of those that fit; None where nobody knows."""
        if not self.recording.replies:
            return None
        return metrics.normalize(self.reply.text) in {metrics.normalize(text) for text in self.recording.replies}


@dataclass(frozen=True)
class Shown:
    """A mode that was tried, with what was given."""

    mode: AskMode
    given: str
    reply: Reply


@dataclass(frozen=True)
class Summary:
    """Counts over the recordings whose answers are known. Seconds are medians."""

    word_errors: metrics.ErrorCount
    tags_right: int
    tags: int
    fits: int
    judged: int
    first_sound: float | None
    total: float

    @classmethod
    def of(cls, results: Sequence[Result]) -> Summary:
        known = [result for result in results if result.recording.words]
        tags = [tag for result in known for tag in result.tags if tag.expected]
        fits = [result.fits for result in known if result.fits is not None]
        sounds = [result.first_sound for result in results if result.first_sound is not None]
        return cls(
            metrics.total_errors([result.recording.words for result in known], [result.heard for result in known]),
            sum(tag.mark == "right" for tag in tags),
            len(tags),
            sum(fits),
            len(fits),
            float(np.median(sounds)) if sounds else None,
            float(np.median([result.total for result in results])) if results else 0.0,
        )

    @property
    def words_right(self) -> int:
        return max(0, self.word_errors.units - self.word_errors.errors)


def render(results: Sequence[Result], shown: Sequence[Shown], facts: dict[str, str]) -> str:
    """The page. ``facts``: what stands at its end (model, machine ...)."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))
    cards = [
        {"result": result, "recording": sound_of(read(result.recording.path)), "reply": _sound_of_reply(result.reply)}
        for result in results
    ]
    modes = [{"shown": each, "reply": _sound_of_reply(each.reply)} for each in shown]
    return template.render(cards=cards, modes=modes, summary=Summary.of(results), facts=facts)


def _sound_of_reply(reply: Reply) -> dict[str, Any] | None:
    return None if reply.audio is None else sound_of(Audio(reply.audio[None], reply.sample_rate))


def sound_of(audio: Audio) -> dict[str, Any]:
    """A sound for the template: ``audio`` and ``picture`` as data URIs, ``seconds``."""
    mono = audio.mono()
    return {
        "audio": _uri("audio/mpeg", _mp3(mono, audio.rate)),
        "picture": _uri("image/png", spectrogram(resample(mono, audio.rate, SAMPLE_RATE))),
        "seconds": audio.seconds,
    }


def _mp3(samples: npt.NDArray[np.float32], rate: int) -> bytes:
    out = io.BytesIO()
    wanted = min(rate, 22_050)  # nothing above 11 kHz is worth its bytes here
    soundfile.write(out, np.clip(resample(samples, rate, wanted), -1, 1), wanted, format="MP3", subtype="MPEG_LAYER_III")
    return out.getvalue()


def spectrogram(samples: npt.NDArray[np.float32]) -> bytes:
    """Log-mel of samples [n] at 16 kHz as a PNG of few colours: time to the right, low sounds at the bottom."""
    import matplotlib
    from PIL import Image

    mel_TM = LogMel(_MELS)(samples).numpy()
    columns = min(_WIDTH, len(mel_TM))
    mel_TM = np.stack([part.max(axis=0) for part in np.array_split(mel_TM, columns)])
    low, high = np.quantile(mel_TM, 0.05), mel_TM.max()
    levels = np.clip((mel_TM - low) / max(float(high - low), 1e-6), 0, 1)
    picture = Image.fromarray(np.round(levels.T[::-1] * (_COLOURS - 1)).astype(np.uint8), mode="P")
    palette = matplotlib.colormaps["magma"](np.linspace(0, 1, _COLOURS))[:, :3]
    picture.putpalette(np.round(palette * 255).astype(np.uint8).tobytes())
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return out.getvalue()


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
