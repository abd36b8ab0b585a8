"""The web page: choose a model and a task, speak or upload, look at the thought, listen to the reply, say whether it was right.

`answer` is the whole logic, one call of the pipeline a request; `build_page` is gradio around it. Nothing is parsed out of the model's text:
thought, reply and speech arrive as separate fields.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osum_echat.pipeline.ask import MODES

if TYPE_CHECKING:
    from osum_echat.pipeline import EChat, ThinkForm

FREE = "Understand: with my instruction"
TASK_MENU = {mode.title: mode for mode in sorted(MODES.values(), key=lambda mode: mode.kind)} | {FREE: MODES["asr"]}


@dataclass(frozen=True)
class Answer:
    """What the page shows. ``audio``: (rate, samples) as gradio takes it."""

    text: str
    thought: str
    audio: tuple[int, Any] | None
    details: dict[str, Any]


def answer(echat: EChat, task: str, wav: str | None, text: str, think: ThinkForm, voice: str | None, seed: int) -> Answer:
    """Run one request. Raises ValueError with a sentence for the page when something is missing."""
    if task not in TASK_MENU:
        raise ValueError(f"unknown task {task!r}")
    mode = TASK_MENU[task]
    if (mode.reads or task == FREE) and not text.strip():
        raise ValueError("this task needs a text")
    if mode.hears and not wav:
        raise ValueError("this task needs a recording: use the microphone or upload a file")
    speaker = voice if voice and mode.speaks else None
    [reply] = echat.batch([mode.ask(wav, text, text.strip() or None, think, seed=seed, speaker=speaker)])
    audio = None if reply.audio is None else (reply.sample_rate, reply.audio)
    thought = reply.think.raw if reply.think is not None else ""
    return Answer(reply.text, thought, audio, reply.as_json())


def save_feedback(path: Path, right: bool, request: dict[str, Any], details: dict[str, Any]) -> None:
    """Append one judged reply to a jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"time": time.time(), "right": right, **request, "reply": details}, ensure_ascii=False)
    with path.open("a", encoding="utf-8") as out:
        out.write(line + "\n")


class Models:
    """Loads each checkpoint once, when it is first chosen."""

    def __init__(self, names: Sequence[str], load: Callable[[str], EChat]) -> None:
        self.names = list(names)
        self._load, self._loaded, self._lock = load, dict[str, "EChat"](), threading.Lock()

    def __getitem__(self, name: str) -> EChat:
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self._load(name)
            return self._loaded[name]


def build_page(names: Sequence[str], load: Callable[[str], EChat], feedback: Path) -> Any:
    """The gradio page (a `gradio.Blocks`, not launched)."""
    import gradio as gr

    models = Models(names, load)

    def respond(
        name: str, task: str, wav: str | None, text: str, think: ThinkForm, voice: str | None, seed: float
    ) -> tuple[Any, ...]:
        try:
            result = answer(models[name], task, wav, text or "", think, voice, int(seed))
        except ValueError as error:
            raise gr.Error(str(error)) from error
        return result.text, result.thought, result.audio, result.details

    def judge(right: bool) -> Callable[..., str]:
        def save(name: str, task: str, wav: str | None, text: str, details: dict[str, Any] | None) -> str:
            if not details:
                return "Nothing to judge yet."
            save_feedback(feedback, right, {"model": name, "task": task, "wav": wav, "text": text}, details)
            return "Saved, thank you."

        return save

    with gr.Blocks(title="OSUM-EChat", analytics_enabled=False) as page:
        gr.Markdown("# OSUM-EChat\nIt hears what is said and how, thinks about both, and answers in text and speech.")
        with gr.Row():
            with gr.Column():
                name = gr.Dropdown(models.names, value=models.names[0], label="model")
                task = gr.Dropdown(list(TASK_MENU), value=next(iter(TASK_MENU)), label="task")
                think = gr.Radio(["tag", "language"], value="tag", label="form of the thought")
                wav = gr.Audio(sources=["microphone", "upload"], type="filepath", label="your recording")
                text = gr.Textbox(label="text or instruction", lines=2)
                voice = gr.Audio(
                    sources=["upload", "microphone"], type="filepath", label="voice of the reply (optional, 1 to 30 s)"
                )
                seed = gr.Number(value=0, precision=0, label="seed")
                send = gr.Button("Send", variant="primary")
            with gr.Column():
                out_text = gr.Textbox(label="reply", lines=4)
                out_thought = gr.Textbox(label="thought", lines=4)
                out_audio = gr.Audio(label="reply, spoken", type="numpy", buttons=["download"])
                details = gr.JSON(label="details")
                with gr.Row():
                    good, bad = gr.Button("right"), gr.Button("wrong")
                thanks = gr.Markdown()
        send.click(respond, [name, task, wav, text, think, voice, seed], [out_text, out_thought, out_audio, details])
        for button, right in ((good, True), (bad, False)):
            button.click(judge(right), [name, task, wav, text, details], thanks)
    return page
