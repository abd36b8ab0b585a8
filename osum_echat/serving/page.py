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

from osum_echat.dialogue.tasks import TASKS

if TYPE_CHECKING:
    from osum_echat.pipeline import EChat, Reply, ThinkForm

DIALOGUE = {
    "talk, think first (speech out)": ("s2s", True),
    "talk (speech out)": ("s2s", False),
    "chat, think first (text out)": ("s2t", True),
    "chat (text out)": ("s2t", False),
}
SPEAK = "say my text"
WRITE = "answer my text"
FREE = "understand, with my instruction"
UNDERSTAND = {"understand: " + name: name for name, task in TASKS.items() if task.prompted}
TASK_MENU = [*DIALOGUE, *UNDERSTAND, FREE, SPEAK, WRITE]


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
    if task in (SPEAK, WRITE, FREE) and not text.strip():
        raise ValueError("this task needs a text")
    options: dict[str, Any] = {"seed": seed}
    if voice and (task == SPEAK or (task in DIALOGUE and DIALOGUE[task][0] == "s2s")):
        options["speaker"] = echat.speaker(voice)
    reply: Reply
    if task == SPEAK:
        reply = echat.speak(text, **options)
    elif task == WRITE:
        reply = echat.chat(text=text, **options)
    elif not wav:
        raise ValueError("this task needs a recording: use the microphone or upload a file")
    elif task in DIALOGUE:
        kind, thinks = DIALOGUE[task]
        reply = echat.chat(wav, think=think if thinks else None, speak=kind == "s2s", **options)
    else:
        reply = echat.understand(wav, UNDERSTAND.get(task, "<TRANSCRIBE>"), prompt=text.strip() or None, **options)
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
                task = gr.Dropdown(TASK_MENU, value=TASK_MENU[0], label="task")
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
