"""A recording as a picture: its log-mel spectrogram, the words where they were heard, and the tags. SVG, with no
network and no scripts."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from osum_echat.audio.features import LogMel
from osum_echat.audio.io import to_mono_16k
from osum_echat.dialogue.think import Think
from osum_echat.pipeline.words import Word
from osum_echat.serving.page.messages import TAGS, value_text
from osum_echat.serving.page.texts import text

WIDTH, HEIGHT, WORDS = 900, 150, 46


def spectrogram_png(samples: npt.NDArray[np.float32]) -> bytes:
    """PNG of the log-mel of samples [n] at 16 kHz, low frequencies at the bottom."""
    from matplotlib import pyplot

    mel_TF = LogMel(80)(samples).numpy()
    out = io.BytesIO()
    pyplot.imsave(out, mel_TF.T[::-1], cmap="magma", format="png")
    return out.getvalue()


def draw(language: str, wav: str, words: Sequence[Word], think: Think | None) -> str:
    """The picture as an ``<svg>`` element with a description for screen readers."""
    samples = to_mono_16k(wav)
    seconds = len(samples) / 16000
    tags = [f"{text(language, f'tag.{k}')}: {value_text(language, v)}" for k in TAGS if (v := getattr(think, k, None))]
    about = text(
        language,
        "picture_about",
        seconds=f"{seconds:.1f}",
        words=", ".join(f"{w.text} {w.start:.1f}" for w in words) or text(language, "no_words"),
        tags=", ".join(tags) or text(language, "no_tags"),
    )
    image = base64.b64encode(spectrogram_png(np.asarray(samples, np.float32))).decode()
    scale = WIDTH / max(seconds, 0.1)
    marks, free_from = [], [0.0, 0.0]
    for word in words:
        x = word.start * scale
        line = 0 if x >= free_from[0] or x - free_from[0] > x - free_from[1] else 1
        free_from[line] = x + 8.5 * len(word.text) + 6
        y = HEIGHT + 17 + 19 * line
        marks.append(f'<line x1="{x:.0f}" x2="{x:.0f}" y1="0" y2="{y - 12}" stroke="#fff" stroke-opacity=".45"/>')
        marks.append(f'<text x="{x:.0f}" y="{y}">{html.escape(word.text)}</text>')
    labels = html.escape(" · ".join(tags))
    return (
        f'<svg class="sound" viewBox="0 0 {WIDTH} {HEIGHT + WORDS + 24}" role="img" aria-label="{html.escape(about)}">'
        f'<image href="data:image/png;base64,{image}" width="{WIDTH}" height="{HEIGHT}" preserveAspectRatio="none"/>'
        f'{"".join(marks)}<text class="tags" x="0" y="{HEIGHT + WORDS + 16}">{labels}</text></svg>'
    )
