"""What a training run measures on held-out data beside its loss: real tasks, by real decoding, with the scorers of the
suites.

    python -m osum_echat.training --stage empathy --config recipes/mini/conf/empathy.yaml --validators osum_echat.evaluation.validation:hearing

`hearing`: word error rate, tag accuracy, thinks (in tags) that parse, on the validation lists' recordings.
`own_speech`: the model speaks the validation texts, token2wav makes sound, a recogniser writes it down; it needs
``measure.token2wav`` (a token2wav folder) and the recogniser's data. Both take the first ``measure.items`` records of
the tasks they need from lists of any form, and decode greedily but for speech.

    python -m osum_echat.training.token2wav.vocoder --config V.yaml --validators osum_echat.evaluation.validation:resynthesis

`resynthesis`, for the training of a part of token2wav that makes sound: what a recogniser hears in its held-out
recordings, and how they sound.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osum_echat.audio import io as audio_io
from osum_echat.data.lists import Stream
from osum_echat.dialogue.record import Record, RecordError
from osum_echat.evaluation import generate, results, score, summary
from osum_echat.evaluation.items import Item
from osum_echat.evaluation.labels import KINDS
from osum_echat.evaluation.readers.lists import item_of
from osum_echat.evaluation.scorers import Tools
from osum_echat.evaluation.suite import Part, Suite
from osum_echat.generation.config import GenerationConfig, Guards, Mode, Sampling
from osum_echat.pipeline import EChat
from osum_echat.token2wav.config import SAMPLE_RATE

if TYPE_CHECKING:
    from osum_echat.training.loop import Trainer
    from osum_echat.training.token2wav.loop import Trainer as PartTrainer

THINK_TASKS = ("<S2TCHAT> <THINKER>", "<S2TCHAT> <TEXT2TOKEN> <THINK>")
_SPEECH = Sampling(temperature=0.3, top_k=5)
_recognisers: dict[str, Any] = {}

HEARING = Suite(
    "hearing",
    normalizer="own",
    parts={
        "think": Part(ask={"think": "tag"}, scorers=["think_words", "think_tags", "think_parsed", "replies"]),
        "words": Part(ask={"kind": "understand", "task": "<TRANSCRIBE>"}, scorers=["wer"]),
    },
)
OWN_SPEECH = Suite(
    "own speech", normalizer="own", parts={"say": Part(ask={"kind": "speak"}, scorers=["own_speech:item", "speech_faults"])}
)

RESYNTHESIS = Suite(
    "resynthesis", normalizer="own", parts={"again": Part(scorers=["own_speech:item", "dnsmos", "speech_faults"])}
)


def hearing(trainer: Trainer) -> dict[str, float]:
    """Transcript WER, tag accuracies, parsed thinks and transcript-task WER, in percent; what the lists have no records
    for is left out."""
    wanted: dict[str, Callable[[Record], bool]] = {
        "think": lambda record: record.task in THINK_TASKS and "think_str" not in record.extra,
        "words": lambda record: record.task == "<TRANSCRIBE>",
    }
    found = measure(_echat(trainer), HEARING, _items(trainer, wanted))
    out = {}
    for name, key in (("wer", "think_wer"), *((n, n) for n in (*KINDS, "think_parsed", "reply_fit"))):
        number = summary.find(found, f"think.{name}")
        if number is not None:
            out[key] = number.value
    words = summary.find(found, "words.wer")
    return out | ({"wer": words.value} if words is not None else {})


def own_speech(trainer: Trainer) -> dict[str, float]:
    """WER of the model's own speech after resynthesis, in percent. Raises ValueError without a token2wav folder."""
    folder = trainer.config.measure.token2wav
    if not folder:
        raise ValueError("validation:own_speech makes sound: set measure.token2wav to a token2wav folder")
    items = _items(trainer, {"say": lambda record: record.task == "<TEXT2TOKEN>"})
    if not items["say"]:
        return {}
    found = measure(_echat(trainer, folder), OWN_SPEECH, items)
    numbers = {name: summary.find(found, f"say.{name}") for name in ("wer", "cut_off")}
    return {name: number.value for name, number in numbers.items() if number is not None}


def resynthesis(trainer: PartTrainer) -> dict[str, float]:
    """WER and DNSMOS of held-out recordings as the trained part makes them again (as far as recogniser and DNSMOS can
    be had); empty for a part that makes no sound."""
    items, answers = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, (utterance, samples) in enumerate(trainer.recipe.sounds()):
            path = Path(folder) / f"{number}.wav"
            audio_io.write(path, samples, SAMPLE_RATE)
            items.append(Item(f"{number}", utterance.text))
            answers.append(results.Result(f"{number}", "again", text=utterance.text, wav=str(path)))
        rows, _ = score.join(RESYNTHESIS, {"again": items}, answers, Path(folder))
        found = summary.summarise(score.score(RESYNTHESIS, rows, Path(folder), lambda items: _tools(RESYNTHESIS, items)))
    numbers = {name: summary.find(found, f"again.{name}") for name in ("wer", "dnsmos", "silence")}
    return {name: number.value for name, number in numbers.items() if number is not None}


def measure(echat: EChat, suite: Suite, sets: dict[str, list[Item]]) -> list[summary.Summary]:
    """A suite's numbers without a report: its files are made in a temporary folder and thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        path = generate.generate(echat, suite, sets, Path(folder))
        answers, _ = results.read_results(path, suite.name)
        rows, _ = score.join(suite, sets, answers, path)
        return summary.summarise(score.score(suite, rows, Path(folder), lambda items: _tools(suite, items)))


def _tools(suite: Suite, items: Sequence[Item]) -> Tools:
    return Tools(suite, items, recognisers=_recognisers)


def _items(trainer: Trainer, wanted: dict[str, Callable[[Record], bool]]) -> dict[str, list[Item]]:
    """The first records of the validation lists that each part wants. Raises ValueError for a list that cannot be
    read."""
    limit = trainer.config.measure.items
    found: dict[str, list[Item]] = {name: [] for name in wanted}
    for record in _records(trainer):
        for name, takes in wanted.items():
            if len(found[name]) < limit and takes(record):
                found[name].append(item_of(record))
        if all(len(items) >= limit for items in found.values()):
            break
    return found


def _records(trainer: Trainer) -> Iterator[Record]:
    """Records of the validation lists, of any form. Raises ValueError for a list without a usable record."""
    config = trainer.config.validation
    for name, settings in config.streams.items() if config is not None else ():
        for source in Stream(name, settings).sources:
            problem, good = None, 0
            for record in source.records():
                if isinstance(record, RecordError):
                    problem = problem or record
                    continue
                good += 1
                yield record
            if not good:
                raise ValueError(f"validation list {source.name} holds no record that can be used: {problem}")


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
