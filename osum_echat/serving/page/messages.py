"""A turn of the conversation as messages of gradio's chatbot: recording, tags as chips, the thought folded, the reply
and its sound."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osum_echat.dialogue.think import Think
from osum_echat.serving.page.texts import has, text

if TYPE_CHECKING:
    import gradio as gr

_ICONS = {
    "child": "🧒", "adult": "🧑", "old": "🧓", "male": "♂", "female": "♀", "neutral": "😐", "happy": "😊", "sad": "😢", "angry": "😠",
    "surprised": "😮", "fear": "😨", "disgust": "🤢", "laugh": "😂", "cough": "😷", "sneeze": "🤧", "applause": "👏", "sigh": "😮‍💨",
    "other": "❓", "unsure": "❓", "none": "🔇",
}  # fmt: skip
_KINDS = {"age": "🎂", "gender": "⚧", "emotion": "🎭", "event": "🔊", "reply_emotion": "💬"}
TAGS = ("age", "gender", "emotion", "event", "reply_emotion")


def value_text(language: str, value: str) -> str:
    """A tag's value in the visitor's language; a value that the page does not know stays as the model wrote it."""
    key = f"value.{value.strip('<>').lower()}"
    return text(language, key) if has(key) else value


def chips(language: str, think: Think | None) -> str:
    """The tags of a thought as HTML: an icon, the kind (for screen readers and as a tooltip) and the value in words."""
    if think is None:
        return ""
    found = []
    for kind in TAGS:
        value = getattr(think, kind)
        if not value:
            continue
        # The reply's tone always has its own icon: with a face it would look like a second emotion of the speaker.
        icon = _KINDS[kind] if kind == "reply_emotion" else _ICONS.get(value.strip("<>").lower(), _KINDS[kind])
        name, word = text(language, f"tag.{kind}"), value_text(language, value)
        found.append(
            f'<span class="chip chip-{kind}" title="{html.escape(name)}"><span aria-hidden="true">{icon}</span> '
            f'<span class="chip-kind">{html.escape(name)}: </span>{html.escape(word)}</span>'
        )
    return " ".join(found)


@dataclass
class Turn:
    """One request and what has come of its reply so far.

    Attributes:
        wav, asked: what the visitor gave. mode: name of the menu's entry.
        reply_wav: file of the reply's sound, once it is whole. settings: everything the request was made with.
        error: a sentence instead of a reply.
    """

    number: int
    mode: str
    wav: str | None = None
    asked: str = ""
    think: Think | None = None
    thought: str = ""
    text: str = ""
    reply_wav: Path | None = None
    note: str = ""
    error: str = ""
    done: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def messages(self, language: str) -> list[dict[str, Any]]:
        """The turn for the chatbot. Text of model and visitor is shown as text, never as markup."""
        out: list[dict[str, Any]] = []
        if self.wav:
            out.append({"role": "user", "content": _player(self.wav)})
        heard = _plain(self.think.transcript) if self.think is not None and self.think.transcript else ""
        said = "<br>".join(part for part in (f"“{heard}”" if heard else "", chips(language, self.think)) if part)
        if said:
            out.append({"role": "user", "content": said})
        if self.asked:
            out.append({"role": "user", "content": _plain(self.asked)})
        if self.error:
            return [*out, {"role": "assistant", "content": f'<span class="problem" role="alert">{_plain(self.error)}</span>'}]
        if self.thought:
            status = "done" if self.text or self.done else "pending"
            metadata = {"title": text(language, "thought"), "status": status}
            out.append({"role": "assistant", "content": _plain(self.thought), "metadata": metadata})
        if self.text:
            note = f'<br><small class="note">{_plain(self.note)}</small>' if self.note else ""
            out.append({"role": "assistant", "content": _plain(self.text) + note})
        if self.reply_wav is not None:
            out.append({"role": "assistant", "content": _player(str(self.reply_wav))})
        return out


def _player(file: str) -> gr.Audio:
    """A player that offers the file for download, and nothing that leaves this computer."""
    import gradio as gr

    return gr.Audio(file, buttons=["download"], show_label=False)


def _plain(words: str) -> str:
    return html.escape(words).replace("\n", "<br>")
