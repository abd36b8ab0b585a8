"""From a record to a sample: which task it is, what the model shall say, what it is asked.

One pipeline with named rules for what the published training code did in three copies of a file (`label_rules`). Its
steps, in order: names that must not appear, renamed tasks, merged labels, tasks that are randomly made smaller, leading
tag of the reply, think, clean-up, ids, instruction, speech. Whatever is random comes from the generator that is handed
in. A record that gives no sample raises a RecordError whose ``reason`` is counted. Where this differs from the
published code on purpose, docs/compatibility.md has a line.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from osum_echat.data import text
from osum_echat.data.config import LimitConfig, ProcessingConfig
from osum_echat.data.label_rules import get_rules
from osum_echat.dialogue.dialect import Dialect
from osum_echat.dialogue.interleave import split_words
from osum_echat.dialogue.record import Record, Turn
from osum_echat.dialogue.tasks import OUTPUTS, PastTurn, Sample, find_task
from osum_echat.dialogue.think import CLOSE, Think, ThinkForm
from osum_echat.dialogue.tokens import Tokenizer, decode, encode
from osum_echat.dialogue.vocabulary import Vocabulary
from osum_echat.rates import FRAMES_PER_POSITION

RENAMED_TASKS = {
    "TEXT2TOKEN": "<TEXT2TOKEN>",
    "<Speech2TEXTandTOKEN>": "<S2TCHAT> <TEXT2TOKEN>",
    "<S2TCHAT> <TEXT2TOKEN> <EMOTION>": "<S2TCHAT> <TEXT2TOKEN>",
}
# Transcript and one tag: half of the time the tag alone is asked for.
_TAG_ALONE = tuple(f"<TRANSCRIBE> <{tag}>" for tag in ("EMOTION", "STYLE", "CAPTION", "GENDER", "AGE"))
_TRANSCRIPT_AND_ANSWER = "<TRANSCRIBE> <S2TCHAT>"
_TAGGED_REPLIES = ("<S2TCHAT>", "<S2TCHAT> <THINKER>", "<S2TCHAT> <TEXT2TOKEN>", "<S2TCHAT> <TEXT2TOKEN> <THINK>")
_HISTORY_TASK = {"<S2TCHAT> <TEXT2TOKEN>": "<S2TCHAT> <TEXT2TOKEN> <HISTORY>"}
_UNKNOWN_END = "<&&>"  # a label that ends so is open-ended: no end of turn is learnt

TAG_OF_TASK = {"<EMOTION>": "emotion", "<STYLE>": "style", "<CAPTION>": "event", "<GENDER>": "gender", "<AGE>": "age"}
_TAG_FIELDS = {
    "age": ("age",),
    "gender": ("gender",),
    "emotion": ("q_emotion", "emotion"),
    "event": ("caption", "event"),
    "style": ("style",),
}


@dataclass(frozen=True)
class Processed:
    """A sample and what belongs to it.

    Attributes:
        task: the task string after renaming and drawing.
        label: the label as text, eos not included.
        prompt: the instruction or question as text, "" for none.
        transcripts: the words said in each recording of the sample, "" where the record does not say (targets of a CTC
            loss).
        tags: what is known of the current recording: age, gender, emotion, event, style, without brackets.
        recordings: the wav of each recording, in the order of the sample's numbers (past turns first).
    """

    record: Record
    task: str
    sample: Sample
    label: str
    prompt: str
    transcripts: tuple[str, ...]
    tags: Mapping[str, str]
    recordings: tuple[str | bytes | None, ...]


class Processor:
    """Makes samples of records, in the dialect of the model that they are for."""

    def __init__(self, config: ProcessingConfig, tokenizer: Tokenizer, vocab: Vocabulary, dialect: Dialect | None = None) -> None:
        self.config, self.tokenizer, self.vocab = config, tokenizer, vocab
        self.dialect = dialect or Dialect()
        self.rules = get_rules(config.label_rules)

    def __call__(self, record: Record, rng: random.Random) -> Processed:
        """The sample of ``record``. Raises RecordError with the reason why there is none."""
        name = text.mentioned_name(record.txt, self.rules.names)
        if name is not None:
            raise record.error("name_filter", f"the label names another assistant ({name!r})")
        if self.config.drop_none and any(tag in record.txt for tag in text.NONE_TAGS):
            raise record.error("none_label", "the label holds a tag <NONE>")
        task = RENAMED_TASKS.get(record.task, record.task)
        label = _merged_labels(task, record.txt.replace("\n", " "))
        said = _said(record, task, label)
        tags = _known_tags(record, task, label)
        task, label = self._smaller_task(record, task, label, rng)
        label, think = self._reply(record, task, label, rng)
        if record.history:
            task = _HISTORY_TASK.get(task, task)
        output = find_task(task).output
        open_ended = label.endswith(_UNKNOWN_END)
        label = text.clean(label, lower=task == "<TRANSCRIBE>")
        ids = encode(self.tokenizer, label)
        think_length = self._think_length(ids) if think else 0
        if not open_ended:
            ids = (*ids, self.vocab.eos_id)
        prompt = self._prompt(record, task, rng)
        speech = self._speech(record) if output.speech != "none" else ()
        history = record.history if output.history else ()
        sample = Sample(
            output_type=output.name,
            prompt_ids=encode(self.tokenizer, prompt) if prompt else (),
            text_ids=ids,
            think_length=think_length,
            speech=speech,
            history=tuple(self._past(record, turn) for turn in history),
            words=tuple(split_words(label.rpartition(CLOSE)[2])) if speech and record.word_lengths else (),
            word_lengths=record.word_lengths if speech else (),
            think=think,
        )
        recordings: list[str | bytes | None] = [turn.wav for turn in history]
        transcripts = [""] * len(recordings)
        if output.audio:
            recordings.append(record.wav)
            transcripts.append(said)
        return Processed(record, task, sample, label, prompt, tuple(transcripts), tags, tuple(recordings))

    def _smaller_task(self, record: Record, task: str, label: str, rng: random.Random) -> tuple[str, str]:
        """Tasks that are now and then turned into a part or a variant of themselves."""
        config = self.config
        if task in _TAG_ALONE and rng.random() < config.tag_alone_rate:
            tag = text.first_tag(label)
            if tag is None:
                raise record.error("tag_extraction", f"the label has no tag to ask for: {label!r:.80}")
            return task.removeprefix("<TRANSCRIBE> "), tag
        if task == _TRANSCRIPT_AND_ANSWER and rng.random() < config.tag_alone_rate:
            answer = text.answer_part(label)
            if answer is None:
                raise record.error("answer_extraction", f"the label does not hold {text.ANSWER_MARK} once: {label!r:.80}")
            return "<S2TCHAT>", answer
        if task == "<TEXT2TOKEN>" and config.streaming_tts_rate and rng.random() < config.streaming_tts_rate:
            return "<TEXT2TOKEN> <STREAMING>", label
        return task, label

    def _reply(self, record: Record, task: str, label: str, rng: random.Random) -> tuple[str, ThinkForm | None]:
        """The label with its leading tag as the rules want it and with its think, and the form of that (None: no
        think)."""
        rules = self.rules
        tag, rest = text.split_leading_tag(label)
        if rules.strip_leading_tag:
            # A label that is nothing but tags is an answer of its own, not a reply with an emotion in front.
            label = label if text.only_tags(label) else rest
        elif tag is None and task in _TAGGED_REPLIES:
            tag, label = rules.neutral_tag, rules.neutral_tag + label
        if not find_task(task).output.think:
            return label, None
        if self._think_form(record) == "language":
            think = record.extra.get("think_str")
            if think is None:
                raise record.error("missing_think", "a think task needs extra.think_str")
            return self.dialect.strings.language_think.write(Think(raw=str(think))) + label, "language"
        tag = tag or rules.neutral_tag
        if rules.reply_tags and tag not in rules.reply_tags:
            label = label.replace(tag, rules.neutral_tag)
            tag = rules.neutral_tag
        return self.dialect.strings.tag_think.write(self._tag_think(record, tag, rng)) + label, "tag"

    def _think_form(self, record: Record) -> ThinkForm:
        """The form in which a think of this record is written."""
        form = self.rules.think
        if form == "either":
            return "language" if record.extra.get("think_str") is not None else "tag"
        return form

    def _tag_think(self, record: Record, reply_tag: str, rng: random.Random) -> Think:
        extra = record.extra
        transcript = extra.get("q_txt")
        if transcript is None:
            transcript = extra.get("question")
        if transcript is None:
            raise record.error("missing_think", "a think task needs extra.q_txt or extra.question: what the user said")
        unknown = rng.random() < self.config.unknown_rate

        def tag(name: str) -> str | None:
            value = next((extra[key] for key in _TAG_FIELDS[name] if extra.get(key) is not None), None)
            stand_in = None if unknown else self.rules.stand_ins.get(name)
            return stand_in if value is None else self._bare(str(value))

        return Think(
            transcript=str(transcript),
            age=tag("age"),
            gender=tag("gender"),
            emotion=tag("emotion"),
            event=tag("event"),
            reply_emotion=self._bare(reply_tag),
        )

    def _bare(self, tag: str) -> str:
        """Tags without brackets where the template writes none."""
        return tag if self.dialect.strings.tag_think.brackets else tag.strip("<>")

    def _think_length(self, ids: Sequence[int]) -> int:
        """Ids up to the one that completes the closing mark of the think."""
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            if CLOSE in decode(self.tokenizer, ids[:middle]):
                high = middle
            else:
                low = middle + 1
        return low

    def _prompt(self, record: Record, task: str, rng: random.Random) -> str:
        if "question" in record.extra:
            question = record.extra["question"]
            if not isinstance(question, str) or not question:
                raise record.error("empty_question", "extra.question is there but empty")
            return question
        sentences = self.dialect.sentences(task)
        return sentences[rng.randrange(len(sentences))] if sentences else ""

    def _speech(self, record: Record) -> tuple[int, ...]:
        codes = record.speech_token
        if not codes:
            raise record.error("missing_speech", f"task {record.task} needs extra.speech_token")
        self._check_codes(record, codes)
        return codes

    def _check_codes(self, record: Record, codes: Sequence[int]) -> None:
        if codes and max(codes) >= self.vocab.speech_codes:
            raise record.error("bad_codes", f"speech code {max(codes)} is not below {self.vocab.speech_codes}")

    def _past(self, record: Record, turn: Turn) -> PastTurn:
        if turn.wav is None:
            raise record.error("bad_history", "a past turn has no recording")
        self._check_codes(record, turn.speech_token)
        reply = turn.txt.replace("\n", " ")
        if self.rules.strip_leading_tag and not text.only_tags(reply):
            reply = text.split_leading_tag(reply)[1]
        reply = text.clean(reply, lower=False)
        return PastTurn(reply_ids=encode(self.tokenizer, reply), speech=turn.speech_token)


def _merged_labels(task: str, label: str) -> str:
    if "<AGE>" in task:
        label = text.merge_ages(label)
    return text.map_styles(label) if "<STYLE>" in task else label


def _said(record: Record, task: str, label: str) -> str:
    """The words of the current recording: the label itself for transcription, what the record says of the question for
    dialogue."""
    if "<TRANSCRIBE>" in task:
        words = label.partition(text.ANSWER_MARK)[0]
        return text.without_tags(words)
    if find_task(task).output_type == "text":
        return ""
    said = record.extra.get("q_txt") or record.extra.get("question") or ""
    return said if isinstance(said, str) else ""


def _known_tags(record: Record, task: str, label: str) -> dict[str, str]:
    """Tags of the current recording from ``extra`` and, for understanding tasks, from the label."""
    tags = {}
    for name, keys in _TAG_FIELDS.items():
        value = next((record.extra[key] for key in keys if isinstance(record.extra.get(key), str)), None)
        if value:
            tags[name] = value.strip("<> ")
    asked = [TAG_OF_TASK[part] for part in task.split() if part in TAG_OF_TASK]
    found = text.all_tags(label)
    if asked and len(asked) == len(found):
        tags |= dict(zip(asked, found, strict=True))
    return tags


_OF_LAST_TURN = ("question", "q_txt", "think_str", "q_emotion", "caption", "event", "word_lengths")


def expand_dialogue(record: Record, min_turns: int = 1, max_turns: int = 0) -> list[Record]:
    """One record for each turn of a dialogue, with the turns before it as history (key ``<key>#<turn>``); the last is
    the record itself.

    Earlier turns keep what is true of the speaker (age, gender), not what was said in the last turn. ``max_turns`` 0:
    no limit.
    """
    out = []
    turns = len(record.history) + 1
    for number in range(max(1, min_turns), (min(turns, max_turns) if max_turns else turns) + 1):
        if number == turns:
            out.append(record)
            continue
        turn = record.history[number - 1]
        extra = {k: v for k, v in record.extra.items() if k not in _OF_LAST_TURN and not k.startswith("speech_token")}
        out.append(
            replace(
                record,
                key=f"{record.key}#{number}",
                wav=turn.wav,
                txt=turn.txt,
                start=None,
                end=None,
                extra={**extra, "speech_token": list(turn.speech_token)},
                history=record.history[: number - 1],
            )
        )
    return out


# The published filter counts this much for system prompt and headers.
_FIXED_POSITIONS = 58
_MIN_SPEECH_PER_LABEL = 0.8


def check_limits(processed: Processed, frames: Sequence[float], limits: LimitConfig) -> None:
    """Raise RecordError for a sample outside ``limits``.

    Args:
        frames: log-mel frames (100 a second) of each of ``processed.recordings``.
    """
    record, sample = processed.record, processed.sample
    output = OUTPUTS[sample.output_type]
    label = len(sample.text_ids)
    speech = len(sample.speech) + 2 if sample.speech else 0
    if output.speech != "none" and label * _MIN_SPEECH_PER_LABEL >= speech:
        raise record.error("text_speech_ratio", f"{label} text ids against {speech} speech ids")
    total = sum(frames)
    if output.audio and total < limits.min_frames:
        raise record.error("too_short", f"{total:.0f} frames, at least {limits.min_frames} are needed")
    if total > limits.max_frames:
        raise record.error("too_long", f"{total:.0f} frames, at most {limits.max_frames} are taken")
    if label > limits.max_label:
        raise record.error("label_too_long", f"{label} label ids, at most {limits.max_label} are taken")
    past = sum(len(turn.reply_ids) + len(turn.speech) for turn in sample.history)
    positions = len(sample.prompt_ids) + total / FRAMES_PER_POSITION + label + speech + past + _FIXED_POSITIONS
    if positions > limits.max_positions:
        raise record.error("sequence_too_long", f"{positions:.0f} positions, at most {limits.max_positions} are taken")
