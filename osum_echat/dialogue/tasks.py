"""Tasks as data, and the one function that turns a sample of any task into a sequence.

`OUTPUTS` says for each kind of sequence what the user's turn and the assistant's turn hold; `TASKS` maps each task
string of records to one of them. `build_layout` reads the tables: training uses the whole `Layout`, inference its first
``num_prefix`` segments, so the two cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from osum_echat.dialogue.interleave import IdRun, interleave_chunks, interleave_words
from osum_echat.dialogue.layout import Layout, Role, Segment
from osum_echat.dialogue.prompts import Profile, get_profile
from osum_echat.dialogue.think import ThinkForm
from osum_echat.dialogue.tokens import Tokenizer, encode_fixed
from osum_echat.dialogue.vocabulary import Vocabulary

Stream = Literal["s2t", "t2s", "s2s", "t2t"]
SpeechForm = Literal["plain", "word"]


@dataclass(frozen=True)
class Output:
    """A kind of sequence.

    Attributes:
        about: what it is for, to people.
        stream: mixing stream; its first letter says what is heard or read (s, t), its last what is answered.
        instruction: the user's turn may hold text in front of the audio (understanding) or is text (text2text).
        audio: the user's turn holds a recording.
        spoken_text: the user's turn holds the text to say (text to speech).
        reply_text: the assistant's turn holds text.
        speech: the assistant's turn holds speech: not at all, after the text, or interleaved 6:18.
        think: the reply begins with a think.
        history: past turns may stand in front of the user's turn.
    """

    name: str
    about: str
    stream: Stream
    instruction: bool = False
    audio: bool = True
    spoken_text: bool = False
    reply_text: bool = True
    speech: Literal["none", "after", "interleaved"] = "none"
    think: bool = False
    history: bool = False

    @property
    def text_softmax(self) -> bool:
        """Targets are scored over text classes only: there is no speech among them."""
        return self.speech == "none"


# `s2t_chat_fake` is in the published training code: text dialogue under the system prompt of spoken replies. Kept,
# because records of that task exist and must come out as published. The last row is ours: the published code has its
# strings and interleave, but no task for it.
_OUTPUT_ROWS = (
    Output("text", "understanding", "s2t", instruction=True),
    Output("s2t_chat", "a written reply to a recording", "s2t", history=True),
    Output("s2t_chat_fake", "a written reply to a recording, asked for in the words of a spoken one", "s2t", history=True),
    Output("s2t_chat_think", "a written reply to a recording, with a think", "s2t", think=True, history=True),
    Output("text2text", "a written reply to a text", "t2t", instruction=True, audio=False, history=True),
    Output("text2token", "text to speech", "t2s", audio=False, spoken_text=True, reply_text=False, speech="after"),
    Output(
        "text2token_streaming",
        "text to speech, text and speech in turns",
        "t2s",
        audio=False,
        spoken_text=True,
        speech="interleaved",
    ),
    Output("speech2text_token", "a spoken reply to a recording", "s2s", speech="after", history=True),
    Output(
        "speech2text_token_think", "a spoken reply to a recording, with a think", "s2s", speech="after", think=True, history=True
    ),
    Output("speech2text_token_history", "a spoken reply to a recording behind past turns", "s2s", speech="after", history=True),
    Output(
        "speech2text_token_streaming",
        "a spoken reply to a recording, text and speech in turns",
        "s2s",
        speech="interleaved",
        history=True,
    ),
    Output(
        "speech2text_token_streaming_think",
        "a spoken reply to a recording, with a think, text and speech in turns",
        "s2s",
        speech="interleaved",
        think=True,
        history=True,
    ),
)
OUTPUTS: Mapping[str, Output] = {row.name: row for row in _OUTPUT_ROWS}


@dataclass(frozen=True)
class Task:
    """A task string of records. ``prompted``: the user's turn asks for it in a sentence (see
    `Dialect.instructions`)."""

    name: str
    output_type: str
    prompted: bool = False

    @property
    def output(self) -> Output:
        return OUTPUTS[self.output_type]


# Understanding: what is asked for beside (or instead of) the words. Each has instruction sentences
# (`dialect.default_instructions`).
_PROMPTED = (
    "<TRANSCRIBE>",
    "<TRANSCRIBE> <ALIGN>",
    "<TRANSCRIBE> <S2TCHAT>",
    "<TRANSCRIBE> <EMOTION>",
    "<TRANSCRIBE> <STYLE>",
    "<TRANSCRIBE> <CAPTION>",
    "<TRANSCRIBE> <GENDER>",
    "<TRANSCRIBE> <AGE>",
    "<TRANSCRIBE> <PUNCTUATION>",
    "<EMOTION>",
    "<STYLE>",
    "<CAPTION>",
    "<GENDER>",
    "<AGE>",
    "<CAPTION> <AUDIO>",
    "<AGE> <GENDER>",
    "<STYLE> <AGE> <GENDER>",
    "<TRANSCRIBE> <AGE> <GENDER>",
    "<TRANSCRIBE> <STYLE> <AGE> <GENDER>",
    "<TRANSCRIBE> <CAPTION> <AGE> <GENDER>",
    "<TRANSCRIBE> <EMOTION> <AGE> <GENDER>",
    "<TRANSCRIBE> <AGE> <GENDER> <STYLE> <EMOTION>",
    "<TRANSCRIBE> <CAPTION> <AGE> <GENDER> <EMOTION> <STYLE>",
)


def begins_with_words(task: str) -> bool:
    """Whether the answer to an understanding task begins with what was said, and holds nothing but words until a tag
    comes."""
    marks = task.split()
    return marks[:1] == ["<TRANSCRIBE>"] and "<ALIGN>" not in marks


_TASK_ROWS = (
    *(Task(name, "text", prompted=True) for name in _PROMPTED),
    Task("<TEXT2TOKEN>", "text2token"),
    Task("TEXT2TOKEN", "text2token"),  # as written in published records; `data.processing.RENAMED_TASKS` reads it
    Task("<TEXT2TOKEN> <STREAMING>", "text2token_streaming"),
    Task("<TEXT2TEXT>", "text2text"),
    Task("<S2TCHAT>", "s2t_chat"),
    Task("<S2TCHAT_FAKE>", "s2t_chat_fake"),
    Task("<S2TCHAT> <THINKER>", "s2t_chat_think"),
    Task("<S2TCHAT> <TEXT2TOKEN>", "speech2text_token"),
    Task("<Speech2TEXTandTOKEN>", "speech2text_token"),
    Task("<S2TCHAT> <TEXT2TOKEN> <EMOTION>", "speech2text_token"),
    Task("<S2TCHAT> <TEXT2TOKEN> <STREAMING>", "speech2text_token_streaming"),
    Task("<S2TCHAT> <TEXT2TOKEN> <HISTORY>", "speech2text_token_history"),
    Task("<S2TCHAT> <TEXT2TOKEN> <THINK>", "speech2text_token_think"),
    Task("<S2TCHAT> <TEXT2TOKEN> <STREAMING> <THINK>", "speech2text_token_streaming_think"),
)
TASKS: Mapping[str, Task] = {row.name: row for row in _TASK_ROWS}


def find_task(name: str) -> Task:
    """The row of a task string; a string that is not in the table is understanding without an instruction, as in the
    reference."""
    return TASKS.get(name) or Task(name, "text")


@dataclass(frozen=True)
class PastTurn:
    """One earlier exchange: what the user said or wrote, what was replied. ``speech``: codes [0, S) without
    delimiters."""

    reply_ids: tuple[int, ...]
    speech: tuple[int, ...] = ()
    has_audio: bool = True
    user_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sample:
    """What a sequence is built from; recordings are numbered past turns first, the current one last.

    Attributes:
        output_type: a key of `OUTPUTS`.
        prompt_ids: the instruction (understanding) or the question (text2text).
        text_ids: the label as text ids: think, reply and eos; for text to speech the text to say (with or without eos).
        think_length: how many of ``text_ids`` are the think, marks included.
        speech: codes [0, S) of the reply, without delimiters.
        history: past turns, oldest first.
        words, word_lengths: for the word form of speech: words of the reply and how many codes each has.
        think: form of the think, None without one: some profiles ask for natural language in words of its own.
    """

    output_type: str
    prompt_ids: tuple[int, ...] = ()
    text_ids: tuple[int, ...] = ()
    think_length: int = 0
    speech: tuple[int, ...] = ()
    history: tuple[PastTurn, ...] = ()
    words: tuple[str, ...] = ()
    word_lengths: tuple[int, ...] = ()
    think: ThinkForm | None = None

    @property
    def num_recordings(self) -> int:
        return sum(turn.has_audio for turn in self.history) + OUTPUTS[self.output_type].audio


def build_layout(
    sample: Sample,
    tokenizer: Tokenizer,
    vocab: Vocabulary,
    profile: str | Profile = "as_trained",
    speech_form: SpeechForm = "plain",
    prefix_only: bool = False,
) -> Layout:
    """The sequence of ``sample``.

    Args:
        speech_form: how speech that is not interleaved 6:18 is written: codes, or ``word`` (see `interleave`).
        prefix_only: for inference, where there is no label: the assistant's turn is left out.

    Raises:
        ValueError: unknown output type or profile, or a field that the output type needs is absent or out of range.
        ImpossibleInterleave: text and speech do not fit together (a data pipeline drops the sample).
    """
    if sample.output_type not in OUTPUTS:
        raise ValueError(f"unknown output type {sample.output_type!r}: use one of {', '.join(OUTPUTS)}")
    output = OUTPUTS[sample.output_type]
    build = _Builder(tokenizer, vocab, get_profile(profile))
    build.user_side(sample, output)
    if output.spoken_text and not output.reply_text:
        # Text to speech always begins with the delimiter, so inference is given it and training still learns it.
        build.add("speech", (vocab.speech_delimiter,), supervised=True)
    num_prefix = len(build.segments)
    if not prefix_only:
        build.assistant_side(sample, output, speech_form)
    return Layout(tuple(build.segments), num_prefix, output.text_softmax)


class _Builder:
    """Collects segments; one method per part of a sequence."""

    def __init__(self, tokenizer: Tokenizer, vocab: Vocabulary, profile: Profile) -> None:
        self.tokenizer, self.vocab, self.profile = tokenizer, vocab, profile
        self.segments: list[Segment] = []
        self.recordings = 0

    def add(self, role: Role, ids: tuple[int, ...], supervised: bool = False, mask_unknown: bool = False) -> None:
        if ids:
            unknown = self.vocab.unknown_id if mask_unknown else None
            masked = tuple(i for i, token in enumerate(ids) if token == unknown) if unknown is not None else ()
            self.segments.append(Segment(role, ids, supervised=supervised, masked=masked))

    def add_fixed(self, role: Role, text: str) -> None:
        self.add(role, encode_fixed(self.tokenizer, text) if text else ())

    def add_audio(self, marks: bool) -> None:
        if marks:
            self.add("audio", (self.vocab.audio_begin,))
        self.segments.append(Segment("audio", audio=self.recordings))
        if marks:
            self.add("audio", (self.vocab.audio_end,))
        self.recordings += 1

    def user_side(self, sample: Sample, output: Output) -> None:
        profile = self.profile
        if sample.history and not output.history:
            raise ValueError(f"output type {output.name} takes no history")
        self.add_fixed("system", profile.opening(output.name, sample.think))
        for turn in sample.history:
            self.past_turn(turn)
        if output.name not in profile.headerless:
            self.add_fixed("header", profile.user_header)
        if output.instruction:
            self.add("prompt", sample.prompt_ids)
        if output.spoken_text:
            self.add("prompt", _without_end(sample.text_ids, self.vocab.eos_id))
        if output.audio:
            self.add_audio(marks=True)
        self.add_fixed("header", profile.turn_end + profile.assistant)

    def past_turn(self, turn: PastTurn) -> None:
        profile = self.profile
        if profile.history_headers:
            self.add_fixed("header", profile.user_header)
        self.add("history", turn.user_ids)
        if turn.has_audio:
            self.add_audio(marks=profile.history_audio_marks)
        self.add_fixed("header", profile.history_after_audio + profile.turn_end + profile.assistant)
        self.add("history", _without_end(turn.reply_ids, self.vocab.eos_id))
        if turn.speech:
            self.add("history", self.delimited(turn.speech))
        self.add_fixed("header", profile.history_after_reply)

    def assistant_side(self, sample: Sample, output: Output, speech_form: SpeechForm) -> None:
        if output.speech == "interleaved":
            for run in interleave_chunks(sample.text_ids, self.delimited(sample.speech), lead=sample.think_length):
                self.add(run.kind, run.ids, supervised=run.supervised)
            return
        if output.reply_text:
            self.add("think", sample.text_ids[: sample.think_length], supervised=True, mask_unknown=True)
            self.add("text", sample.text_ids[sample.think_length :], supervised=True, mask_unknown=True)
        if output.speech == "none":
            return
        speech = self.delimited(sample.speech)
        runs = [IdRun("speech", speech)]
        if speech_form == "word":
            runs = interleave_words(sample.words, sample.word_lengths, speech[1:-1], self.vocab.speech_delimiter, self.tokenizer)
        elif speech_form != "plain":
            raise ValueError(f"unknown speech form {speech_form!r}: use plain or word")
        if output.spoken_text:  # its first delimiter already stands in the prefix
            runs[0] = IdRun("speech", runs[0].ids[1:])
        for run in runs:
            self.add(run.kind, run.ids, supervised=run.supervised)

    def delimited(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        """Unified ids of codes between two delimiters. Raises ValueError for a code outside [0, S)."""
        vocab = self.vocab
        if codes and not (min(codes) >= 0 and max(codes) < vocab.speech_codes):
            raise ValueError(f"speech codes must be in [0, {vocab.speech_codes}), found {min(codes)}..{max(codes)}")
        delimiter = vocab.speech_delimiter
        return (delimiter, *(vocab.text_size + code for code in codes), delimiter)


def _without_end(ids: tuple[int, ...], eos_id: int) -> tuple[int, ...]:
    return ids[:-1] if ids and ids[-1] == eos_id else ids
