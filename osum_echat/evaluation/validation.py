"""What a training run measures on held-out data beside its loss: real tasks, by real decoding.

    python -m osum_echat.training --stage empathy --config recipes/mini/conf/empathy.yaml --validators osum_echat.evaluation.validation:hearing

`hearing`: word error rate, tag accuracy, thinks (in tags) that parse, on the validation lists' recordings. `own_speech`: the model speaks the validation
texts, token2wav makes sound, a recogniser writes it down; needs `OSUM_ECHAT_TOKEN2WAV` (a token2wav folder) and the recogniser's data. Both
take the first `OSUM_ECHAT_VALIDATION_ITEMS` (32) records of the tasks they need, and decode greedily but for speech.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osum_echat.dialogue.record import Record
from osum_echat.evaluation import suites
from osum_echat.evaluation.judge import Recogniser
from osum_echat.evaluation.sets import TAGS, Item
from osum_echat.generation.config import GenerationConfig, Guards, Mode, Sampling
from osum_echat.pipeline import EChat

if TYPE_CHECKING:
    from osum_echat.training.loop import Trainer

THINK_TASKS = ("<S2TCHAT> <THINKER>", "<S2TCHAT> <TEXT2TOKEN> <THINK>")
_SPEECH = Sampling(temperature=0.3, top_k=5)
_recognisers: dict[str, Recogniser] = {}


def hearing(trainer: Trainer) -> dict[str, float]:
    """Transcript WER, tag accuracies, parsed thinks and transcript-task WER, in percent; what the lists have no records for is left out."""
    records = _records(trainer)
    thinks = _items([r for r in records if r.task in THINK_TASKS and "think_str" not in r.extra])
    transcripts = _items([r for r in records if r.task == "<TRANSCRIBE>"])
    echat = _echat(trainer)
    out: dict[str, float] = {}
    if thinks:
        summary = suites.summarise_answers("think", suites.hear_and_answer(echat, thinks))
        out |= {f"think_{name}" if name == "wer" else name: value for name, value in summary.values.items() if name != "seconds"}
    if transcripts:
        out["wer"] = suites.summarise_transcripts("transcripts", suites.understand(echat, transcripts)).values["wer"]
    return out


def own_speech(trainer: Trainer) -> dict[str, float]:
    """WER of the model's own speech after resynthesis, in percent. Raises ValueError without a token2wav folder."""
    folder = os.environ.get("OSUM_ECHAT_TOKEN2WAV")
    if not folder:
        raise ValueError("validation:own_speech makes sound: set OSUM_ECHAT_TOKEN2WAV to a token2wav folder")
    items = _items([r for r in _records(trainer) if r.task == "<TEXT2TOKEN>"])
    if not items:
        return {}
    rows = suites.say(_echat(trainer, folder), items)
    recogniser = _recognisers.setdefault("judge", Recogniser.load())
    suites.judge_speech(rows, recogniser, None)
    values = suites.summarise_speech("own speech", rows, lambda row: row.item.txt).values
    return {"wer": values["wer"], "cut_off": values["cut_off"]}


def _records(trainer: Trainer) -> list[Record]:
    """Records of the validation lists that are raw (one a line)."""
    records = []
    for stream in trainer.config.validation.streams.values() if trainer.config.validation is not None else ():
        path = Path(stream.list)
        if path.suffix == ".jsonl":
            lines = path.read_bytes().splitlines()
            records += [Record.from_json(line, str(path), number) for number, line in enumerate(lines, start=1) if line.strip()]
    return records


def _items(records: Sequence[Record]) -> list[Item]:
    limit = int(os.environ.get("OSUM_ECHAT_VALIDATION_ITEMS", "32"))
    return [_item(record) for record in records[:limit]]


def _item(record: Record) -> Item:
    extra: dict[str, Any] = dict(record.extra)
    tags = {name: str(extra[name]).strip("<>") for name in TAGS if extra.get(name) is not None}
    said = extra.get("q_txt") or extra.get("question") or record.txt
    return Item(record.key, str(said), record.wav, tags, tuple(extra.get("replies", ())), extra)


def _echat(trainer: Trainer, token2wav: str | None = None) -> EChat:
    """The model as it is now, asked in its own dialect."""
    greedy = Sampling(greedy=True)
    settings = GenerationConfig(
        modes={name: Mode(text=greedy, speech=_SPEECH, max_new=1000) for name in GenerationConfig().modes},
        guards=Guards.off(),
    )
    from osum_echat.token2wav.model import Token2Wav

    sound = Token2Wav.load(token2wav) if token2wav else None
    echat = EChat(trainer.objective.model.eval(), trainer.tokenizer, settings, sound)
    if sound is not None:
        echat.voice = next(iter(sound.speakers.values()), None)
    return echat
