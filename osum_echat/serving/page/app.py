"""The page: gradio's components, what happens when they are used, and the server that shows them.

Everything that a visitor sees in words comes from `texts.yaml` and is set when the page is opened, in the visitor's
language.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from osum_echat.pipeline.words import words_of
from osum_echat.serving.page import feedback, menu, picture
from osum_echat.serving.page.conversation import Conversation, Form, make_ask, past_turns, sentence
from osum_echat.serving.page.live_sound import LiveSound
from osum_echat.serving.page.messages import Turn
from osum_echat.serving.page.texts import LANGUAGES, language_of, text
from osum_echat.serving.shared import SharedEChat

log = logging.getLogger(__name__)

BOTH = "both"
_VISITORS = 32
_SYSTEM_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Noto Sans CJK SC", "sans-serif"]


@dataclass(frozen=True)
class PageOptions:
    """What whoever starts the page decides.

    Attributes:
        feedback: folder for ratings; None: no ratings are asked for.
        examples: (title, recording) pairs to choose from.
    """

    feedback: Path | None = None
    examples: tuple[tuple[str, Path], ...] = ()


@dataclass
class Parts:
    """The page's components, by what they are for."""

    language: gr.Textbox
    language_choice: gr.Dropdown
    about: gr.Markdown
    mode: gr.Dropdown
    more: gr.Checkbox
    model: gr.Radio
    chats: list[gr.Chatbot]
    wav: gr.Audio
    text: gr.Textbox
    send: gr.Button
    stop: gr.Button
    clear: gr.Button
    example: gr.Dropdown
    picture_panel: gr.Accordion
    picture: gr.HTML
    settings: gr.Accordion
    think: gr.Radio
    play: gr.Checkbox
    auto_send: gr.Checkbox
    seed: gr.Number
    voice: gr.Audio
    consent: gr.Checkbox
    consent_about: gr.Markdown
    details_panel: gr.Accordion
    details: gr.JSON
    sound: gr.Textbox
    status: gr.Markdown
    conversation: gr.State = field(default_factory=lambda: gr.State(None))


class Page:
    """The page over loaded models. `blocks` is gradio's object; `sounds` serves what is being said."""

    def __init__(self, models: Mapping[str, SharedEChat], options: PageOptions | None = None) -> None:
        assert models, "the page needs a model"
        self.models, self.options, self.sounds = dict(models), options or PageOptions(), LiveSound()
        # Their files are copied by gradio after the answer.
        self._of_programs: deque[Conversation] = deque(maxlen=4 * _VISITORS)
        self.dialects = [shared.echat.dialect for shared in models.values()]
        self.thinks = [
            f for f in ("tag", "language") if any(d.learnt.think is None or f in d.learnt.think for d in self.dialects)
        ]
        with gr.Blocks(title="OSUM-EChat", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as self.blocks:
            self.parts = self._layout()
            self._connect()

    # ---- layout ------------------------------------------------------------------------------------------------------

    def _layout(self) -> Parts:
        names = list(self.models)
        with gr.Row(elem_id="osum-head"):
            about = gr.Markdown()
            languages = [(name, code) for code, name in LANGUAGES.items()]
            language_choice = gr.Dropdown(languages, value="en", elem_id="osum-language", scale=0, filterable=False)
        with gr.Row(elem_id="osum-menu"):
            mode = gr.Dropdown([], elem_id="osum-mode", scale=3)
            more = gr.Checkbox(False, scale=1, min_width=120)
            model = gr.Radio(names, value=names[0], visible=len(names) > 1, scale=2)
        with gr.Row():
            chats = [
                gr.Chatbot(
                    height=400, label=name, elem_id=f"osum-chat-{i}", visible=i == 0, buttons=["copy"], feedback_options=None
                )
                if self.options.feedback is None
                else gr.Chatbot(height=400, label=name, elem_id=f"osum-chat-{i}", visible=i == 0, buttons=["copy"])
                for i, name in enumerate(names)
            ]
        status = gr.Markdown(elem_id="osum-status")
        with gr.Row():
            wav = gr.Audio(sources=["microphone", "upload"], type="filepath", elem_id="osum-wav", scale=3, buttons=["download"])
            with gr.Column(scale=1, min_width=200):
                words = gr.Textbox(lines=2, elem_id="osum-text", visible=False)
                send = gr.Button(variant="primary", elem_id="osum-send")
                stop = gr.Button(elem_id="osum-stop", size="sm")
                clear = gr.Button(elem_id="osum-clear", size="sm")
                example = gr.Dropdown(
                    [title for title, _ in self.options.examples],
                    value=None,
                    visible=bool(self.options.examples),
                    elem_id="osum-example",
                )
        with gr.Accordion(open=True, elem_id="osum-picture-panel", visible=False) as picture_panel:
            image = gr.HTML(elem_id="osum-picture")
        with gr.Accordion(open=False, elem_id="osum-settings") as settings:
            with gr.Row():
                think = gr.Radio(self.thinks, value=self.thinks[0] if self.thinks else None, visible=len(self.thinks) > 1)
                play = gr.Checkbox(True)
                auto_send = gr.Checkbox(False)
                seed = gr.Number(0, precision=0)
            voice = gr.Audio(sources=["upload", "microphone"], type="filepath", elem_id="osum-voice")
            consent = gr.Checkbox(False, visible=self.options.feedback is not None)
            consent_about = gr.Markdown(visible=self.options.feedback is not None)
        with gr.Accordion(open=False) as details_panel:
            details = gr.JSON()
        language, sound = gr.Textbox("en", visible="hidden"), gr.Textbox("", visible="hidden", elem_id="osum-sound")
        return Parts(
            language, language_choice, about, mode, more, model, chats, wav, words, send, stop, clear, example, picture_panel, image, settings,
            think, play, auto_send, seed, voice, consent, consent_about, details_panel, details, sound, status,
        )  # fmt: skip

    # ---- what happens ------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        p = self.parts
        localised = [
            p.language, p.language_choice, p.about, p.mode, p.more, p.model, *p.chats, p.wav, p.text, p.send, p.stop, p.clear, p.example,
            p.picture_panel, p.settings, p.think, p.play, p.auto_send, p.seed, p.voice, p.consent, p.consent_about, p.details_panel, p.status,
        ]  # fmt: skip
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        self.blocks.load(
            self._localise,
            [p.language],
            localised,
            js="() => { window.osumPickSource(); return [window.osumLanguage()]; }",
            **quiet,
        )
        p.language_choice.input(None, [p.language_choice], None, js="(code) => window.osumChooseLanguage(code)")
        p.more.input(self._menu, [p.language, p.more, p.mode], [p.mode], **quiet)
        p.mode.change(self._fields, [p.language, p.mode], [p.wav, p.text], **quiet)
        p.model.input(self._show_chats, [p.model], p.chats, **quiet)
        p.example.input(dict(self.options.examples).get, [p.example], [p.wav], **quiet)
        asked = [p.mode, p.wav, p.text, p.think, p.model, p.voice, p.seed, p.play, p.language, p.conversation]
        shown = [*p.chats, p.sound, p.picture_panel, p.picture, p.details, p.conversation, p.send]
        sending: list[Any] = [
            trigger(self._respond, asked, shown, concurrency_limit=_VISITORS, **quiet)
            for trigger in (p.send.click, p.text.submit)
        ]
        sending.append(
            p.wav.stop_recording(self._respond_at_once, [p.auto_send, *asked], shown, concurrency_limit=_VISITORS, **quiet)
        )
        p.sound.change(None, [p.sound], None, js="(name) => window.osumPlay(name)")
        p.stop.click(None, None, None, cancels=sending, js="() => window.osumStop()")
        p.clear.click(self._clear, [p.language], [*p.chats, p.conversation, p.status, p.picture_panel], cancels=sending, **quiet)
        if self.options.feedback is not None:
            for name, chat in zip(self.models, p.chats, strict=True):
                chat.like(self._rate(name), [p.consent, p.language, p.conversation], [p.status], **quiet)
        self._programs()

    def _programs(self) -> None:
        """The same for programs: `gradio_client`'s ``predict(mode, wav, text, think, seed, api_name="/answer")``."""
        with gr.Row(visible=False):
            mode, think = gr.Textbox("s2s_think"), gr.Textbox("tag")
            wav, words, seed = gr.Audio(type="filepath"), gr.Textbox(), gr.Number(0, precision=0)
            reply, sound, run = gr.JSON(), gr.Audio(type="filepath"), gr.Button()
        run.click(self._program, [mode, wav, words, think, seed], [reply, sound], api_name="answer", concurrency_limit=_VISITORS)

    def _localise(self, tag: str) -> list[Any]:
        code = language_of(tag)

        def of(key: str, **values: object) -> str:
            return text(code, key, **values)

        names = [*self.models, *([BOTH] if len(self.models) > 1 else [])]
        models = [(of("both") if name == BOTH else name, name) for name in names]
        offered = menu.offered(self.dialects)
        choices = [(menu.title(code, name), name) for name in offered]
        titled = len(self.models) > 1
        chats = [gr.update(label=name if titled else of("conversation"), placeholder=of("empty")) for name in self.models]
        return [
            code,
            gr.update(value=code, label=of("language")),
            f"# {of('title')}\n{of('about')}",
            gr.update(choices=choices, value=offered[0], label=of("mode")),
            gr.update(label=of("more")),
            gr.update(choices=models, label=of("models")),
            *chats,
            gr.update(label=of("recording")),
            gr.update(label=of("text")),
            of("send"),
            of("stop"),
            of("clear"),
            gr.update(label=of("examples")),
            gr.update(label=of("picture")),
            gr.update(label=of("settings")),
            gr.update(label=of("think"), choices=[(of(f"think_{form}"), form) for form in self.thinks]),
            gr.update(label=of("play")),
            gr.update(label=of("auto_send")),
            gr.update(label=of("seed")),
            gr.update(label=of("voice")),
            gr.update(label=of("consent")),
            of("consent_about", folder=f"`{self.options.feedback}`"),
            gr.update(label=of("details")),
            self._past_note(code),
        ]

    def _past_note(self, language: str) -> str:
        turns = min(past_turns(shared) for shared in self.models.values())
        return text(language, "past_used", turns=turns) if turns else text(language, "past_unused")

    def _menu(self, language: str, more: bool, chosen: str) -> Any:
        names = menu.offered(self.dialects, more)
        value = chosen if chosen in names else names[0]
        return gr.update(choices=[(menu.title(language, name), name) for name in names], value=value)

    def _fields(self, language: str, name: str) -> tuple[Any, Any]:
        mode = menu.mode_of(name)
        label = "text_prompt" if name == menu.OWN else "text_speak" if mode.kind == "speak" else "text_answer"
        return gr.update(visible=mode.hears), gr.update(visible=mode.reads or name == menu.OWN, label=text(language, label))

    def _show_chats(self, model: str) -> list[Any]:
        return [gr.update(visible=model in (BOTH, name)) for name in self.models]

    def _respond_at_once(self, auto_send: bool, *asked: Any) -> Iterator[Any]:
        if auto_send:
            yield from self._respond(*asked)
        else:
            yield tuple(gr.skip() for _ in range(len(self.models) + 6))

    def _respond(
        self,
        mode: str,
        wav: str | None,
        words: str,
        think: Any,
        model: str,
        voice: str | None,
        seed: float | None,
        play: bool,
        language: str,
        conversation: Conversation | None,
    ) -> Iterator[Any]:
        conversation = conversation or Conversation()
        models = self.models if model == BOTH else {model: self.models[model]}
        takes = menu.mode_of(mode)
        form = Form(
            mode,
            wav if takes.hears else None,
            words if takes.reads or mode == menu.OWN else "",
            think or "tag",
            voice,
            int(seed or 0),
            language,
        )
        same = [gr.skip(), gr.skip(), gr.skip()]
        for sound in conversation.answer(models, form, self.sounds):
            yield (
                *self._views(conversation, language),
                sound if play else "",
                *same,
                conversation,
                gr.update(interactive=False),
            )
        last = conversation.turns[next(iter(models))][-1]
        image = self._picture(last, next(iter(models.values())), language)
        yield (
            *self._views(conversation, language),
            gr.skip(),
            gr.update(visible=bool(image)),
            image,
            last.details or None,
            conversation,
            gr.update(interactive=True),
        )

    def _views(self, conversation: Conversation, language: str) -> list[Any]:
        return [[m for turn in conversation.turns.get(name, ()) for m in turn.messages(language)] for name in self.models]

    def _picture(self, turn: Turn, shared: SharedEChat, language: str) -> str:
        wav = turn.wav
        if not wav or turn.error:
            return ""
        try:
            words = shared.engine.run(lambda: words_of(shared.echat, wav)).result()
            return picture.draw(language, wav, words, turn.think)
        except ValueError as error:
            log.info("no picture of a recording: %s", error)
            return ""

    def _clear(self, language: str) -> list[Any]:
        return [*([] for _ in self.models), None, self._past_note(language), gr.update(visible=False)]

    def _rate(self, name: str) -> Any:
        def rate(consent: bool, language: str, conversation: Conversation | None, data: gr.LikeData) -> str:
            folder = self.options.feedback
            assert folder is not None, "ratings are off"
            owners = [t for t in (conversation.turns.get(name, []) if conversation else []) for _ in t.messages(language)]
            index = data.index[0] if isinstance(data.index, (list, tuple)) else data.index
            if not 0 <= index < len(owners):
                return ""
            feedback.save(folder, owners[index], "right" if data.liked else "wrong", name, consent)
            return text(language, "saved_audio" if consent else "saved")

        return rate

    def _program(self, mode: str, wav: str | None, words: str, think: str, seed: float) -> tuple[Any, str | None]:
        form = Form(mode, wav, words or "", think or "tag", None, int(seed or 0))  # type: ignore[arg-type]
        [(name, shared), *_] = self.models.items()
        try:
            menu.mode_of(mode)
            make_ask(form)
        except (KeyError, ValueError) as error:
            known = ", ".join(menu.offered(self.dialects, more=True))
            raise gr.Error(f"{sentence(error, form, shared)} (modes: {known})", print_exception=False) from None
        conversation = Conversation()
        self._of_programs.append(conversation)
        for _ in conversation.answer({name: shared}, form, self.sounds):
            pass
        [turn] = conversation.turns[name]
        if turn.error:
            raise gr.Error(turn.error, print_exception=False)
        return turn.details, str(turn.reply_wav) if turn.reply_wav else None


def make_app(page: Page) -> FastAPI:
    """The page as a web application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    rates = {shared.echat.token2wav.sample_rate for shared in page.models.values() if shared.echat.token2wav is not None}
    app.include_router(page.sounds.router(rates.pop() if rates else 22050))
    here = files(__package__)
    return gr.mount_gradio_app(
        app,
        page.blocks.queue(default_concurrency_limit=_VISITORS),
        path="/",
        theme=gr.themes.Default(font=_SYSTEM_FONTS, font_mono=["ui-monospace", "monospace"]),
        css=(here / "page.css").read_text(encoding="utf-8"),
        head=f"<script>{(here / 'page.js').read_text(encoding='utf-8')}</script>",
        footer_links=["api"],
        show_error=True,
        max_file_size="64mb",
        allowed_paths=[str(path) for _, path in page.options.examples],
        ssr_mode=False,
    )


def serve(page: Page, host: str, port: int) -> None:
    """Show the page until it is stopped."""
    import uvicorn

    uvicorn.run(make_app(page), host=host, port=port, log_level="warning", timeout_graceful_shutdown=3)


def demo_examples(listed: Path | None) -> tuple[tuple[str, Path], ...]:
    """The recordings of the demo's list, which lie beside it, with their labels as titles; none without a list."""
    if listed is None:
        return ()
    rows = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
    names = [Path(row["wav"]) for row in rows]
    return tuple((name.stem.replace("_", " ").lstrip("0123456789 "), listed.parent / name.name) for name in names)
