"""What is asked for as the model can take it: refused, answered as silence, or in one or several parts, whose replies
are joined.

A checkpoint's `Dialect` says what it has learnt. Recordings that are too long for a transcript are cut at pauses, texts
that are too long to say at sentences; everything else that is too long is refused. Nothing is cut off silently.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from osum_echat import metrics
from osum_echat.audio.io import MAX_SECONDS, SAMPLE_RATE, AudioError, to_mono_16k
from osum_echat.audio.pauses import cut_at_pauses, is_silent
from osum_echat.dialogue.dialect import Dialect
from osum_echat.generation.events import Done, TextDelta
from osum_echat.generation.request import TooLong
from osum_echat.pipeline.ask import MODES, Ask, AudioChunk, Reply, StreamEvent

SAY_UNITS = 60
"""Words (Chinese characters count a third) that are said at once where a checkpoint does not state what it has learnt:
some 20 s of speech."""
PAUSE = 0.15
"""Seconds of silence between two parts of a text that is said."""
HEARD_NOTHING = {"en": "I heard nothing.", "zh": "我什么都没有听到。"}
_TRANSCRIPTS = ("<TRANSCRIBE>", "<TRANSCRIBE> <PUNCTUATION>")
_SENTENCE = re.compile(r"(?<=[.!?;:])\s+|(?<=[。！？；：…])|\n+")
_CLAUSE = re.compile(r"(?<=,)\s+|(?<=[，、])")
_SCRIPTS = {"zh": {"CJK"}, "ja": {"CJK", "HIRAGANA", "KATAKANA"}, "ko": {"HANGUL"}, "ru": {"CYRILLIC"}, "el": {"GREEK"}}
_SCRIPTS |= {"uk": {"CYRILLIC"}, "ar": {"ARABIC"}, "he": {"HEBREW"}, "hi": {"DEVANAGARI"}, "th": {"THAI"}}
_NAMES = {"en": "English", "zh": "Chinese", "CJK": "Chinese characters", "LATIN": "Latin letters"}


# ---- what is refused -------------------------------------------------------------------------------------------------


class NotLearnt(ValueError):
    """The checkpoint has not learnt what is asked; the message says what, and what it has."""


def is_refusal(error: BaseException) -> bool:
    """Whether an error says that this checkpoint cannot do what is asked, or not at this length; others are faults."""
    return isinstance(error, (NotLearnt, TooLong)) or (isinstance(error, AudioError) and error.reason == "too_long")


def check(ask: Ask, dialect: Dialect, past_turns: int = 0) -> None:
    """Raises NotLearnt for what `refusal` refuses."""
    why = refusal(ask, dialect, past_turns)
    if why is not None:
        raise NotLearnt(why)


def refusal(ask: Ask, dialect: Dialect, past_turns: int = 0) -> str | None:
    """Why this checkpoint cannot do what is asked, in a sentence; None when it can."""
    if ask.kind == "understand":
        if ask.prompt is None:
            why = dialect.refusal(ask.task)
            return why and f"{why}; prompt= asks in words of your own" if not dialect.refuse_unlisted else why
        if dialect.refuse_unlisted and not any(ask.prompt in dialect.sentences(task) for task in dialect.instructions):
            return f"this checkpoint follows its own instructions only, no others: {', '.join(dialect.instructions)}"
    why = dialect.refusal(ask.mode.output_type, past_turns, ask.think)
    if why is None and ask.mode.then is not None:
        why = dialect.refusal(MODES[ask.mode.then].output_type)
    if why is not None or not ask.mode.reads:
        return why
    says = ask.kind == "speak"
    return _wrong_script(ask.text or "", dialect.learnt.says if says else dialect.learnt.hears, "says" if says else "reads")


def _wrong_script(text: str, languages: Sequence[str] | None, verb: str) -> str | None:
    """Whether the text has letters of a script that none of the languages is written in (Latin letters: all may have
    them)."""
    if not languages:
        return None
    known = {"LATIN"}.union(*(_SCRIPTS.get(language, set()) for language in languages))
    for letter in text:
        if letter.isalpha():
            script = unicodedata.name(letter, "?").split()[0].removesuffix("-COMPATIBILITY")
            if script not in known:
                named = ", ".join(_NAMES.get(language, language) for language in languages)
                return (
                    f"this checkpoint {verb} {named}; the text has {_NAMES.get(script, f'{script.lower()} letters')} ({letter!r})"
                )
    return None


# ---- parts -----------------------------------------------------------------------------------------------------------


def parts(ask: Ask, dialect: Dialect, max_seconds: float) -> list[Ask]:
    """The ask as the model can take it, with its recording read: usually one, several for what is too long, none for a
    silent recording.

    Args:
        max_seconds: the longest recording that the model has room for.

    Raises:
        NotLearnt: what the checkpoint has not learnt. AudioError: a recording that cannot be used.
    """
    check(ask, dialect)
    if ask.kind == "speak":
        return [replace(ask, text=text) for text in split_text(ask.text or "", dialect.learnt.say_words or SAY_UNITS)]
    if ask.wav is None:
        return [ask]
    learnt = dialect.learnt.seconds
    longest = max_seconds if learnt is None else min(max_seconds, learnt)
    transcript = ask.kind == "understand" and ask.task in _TRANSCRIPTS
    samples = to_mono_16k(ask.wav, max_seconds=MAX_SECONDS if transcript else max_seconds)
    if is_silent(samples):
        return []
    seconds = len(samples) / SAMPLE_RATE
    if seconds > longest and not transcript:
        what = "this checkpoint has learnt recordings of" if longest == learnt else "the model has room for"
        raise AudioError("too_long", f"the recording has {seconds:.1f} s, {what} at most {longest:g} s; cut it into parts")
    pieces = cut_at_pauses(samples, longest) if seconds > longest else [samples]
    return [replace(ask, wav=(piece, SAMPLE_RATE)) for piece in pieces]


def split_text(text: str, longest: int) -> list[str]:
    """A text in pieces of at most ``longest`` units (words; three Chinese characters), cut between sentences, else
    between clauses, else words."""
    if _size(text) <= longest:
        return [text]
    pieces: list[str] = []
    for sentence in _units_of(text.strip(), longest):
        if pieces and _size(f"{pieces[-1]} {sentence}") <= longest:
            pieces[-1] = join_texts([pieces[-1], sentence])
        else:
            pieces.append(sentence)
    return pieces


def _units_of(text: str, longest: int) -> Iterator[str]:
    """Sentences; clauses of sentences that are too long; words of clauses that are too long."""
    for sentence in filter(None, (part.strip() for part in _SENTENCE.split(text))):
        if _size(sentence) <= longest:
            yield sentence
            continue
        for clause in filter(None, (part.strip() for part in _CLAUSE.split(sentence))):
            yield from [clause] if _size(clause) <= longest else re.findall(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+", clause)


def _size(text: str) -> int:
    units = [unit for unit in metrics.units(text) if any(letter.isalnum() for letter in unit)]
    chinese = sum("\u3400" <= unit <= "\u9fff" for unit in units)
    return len(units) - chinese + -(-chinese // 3)


def join_texts(texts: Sequence[str]) -> str:
    """Texts behind each other, with a blank but between Chinese characters."""
    out = ""
    for text in filter(None, texts):
        chinese = out[-1:] >= "\u2e80" and text[:1] >= "\u2e80"
        out += text if not out or chinese else f" {text}"
    return out


# ---- replies ---------------------------------------------------------------------------------------------------------


def silent_events(ask: Ask, dialect: Dialect) -> list[StreamEvent]:
    """The answer to a recording in which nothing is heard: a sentence in a dialogue, nothing in a transcript."""
    if ask.kind == "understand":
        return [Done("silence")]
    language = next((name for name in dialect.learnt.hears or () if name in HEARD_NOTHING), "en")
    return [TextDelta(HEARD_NOTHING[language]), Done("silence")]


def joined_reply(ask: Ask, replies: Sequence[Reply], total: float) -> Reply:
    """One reply of the replies to the parts of an ask; ``total``: seconds that all took."""
    if len(replies) == 1:
        return replies[0]
    done = joined_done([Done(r.finish_reason, guards=r.guards, timings=r.timings) for r in replies])  # type: ignore[arg-type]
    sounds = [reply.audio for reply in replies if reply.audio is not None]
    rate = replies[0].sample_rate
    gap = np.zeros(round(PAUSE * rate), np.float32)
    return Reply(
        text=(ask.text or "").strip() if ask.kind == "speak" else join_texts([reply.text for reply in replies]),
        speech_tokens=tuple(code for reply in replies for code in reply.speech_tokens),
        audio=np.concatenate([x for sound in sounds for x in (gap, sound)][1:]) if sounds else None,
        sample_rate=rate,
        finish_reason=done.reason,
        guards=done.guards,
        timings=replace(done.timings, total=total),
    )


def joined_stream(streams: Iterable[Iterator[StreamEvent]]) -> Iterator[StreamEvent]:
    """The events of several parts as those of one reply; each part begins when the one before it has ended."""
    ends: list[Done] = []
    text, sounded = "", False
    for stream in streams:
        new_text = new_sound = True
        for event in stream:
            if isinstance(event, Done):
                ends.append(event)
                break
            if isinstance(event, TextDelta):
                more = event.text
                if new_text and text:
                    more = join_texts([text[-1:], more.lstrip()])[1:]
                text, new_text = text + more, False
                event = TextDelta(more)
            if isinstance(event, AudioChunk):
                if new_sound and sounded:
                    yield AudioChunk(np.zeros(round(PAUSE * event.rate), np.float32), event.rate)
                sounded, new_sound = True, False
            yield event
    yield joined_done(ends)


def joined_done(ends: Sequence[Done]) -> Done:
    """One end of several that came one after the other."""
    first, before = ends[0], sum(end.timings.total for end in ends[:-1])
    return Done(
        next((end.reason for end in ends if end.reason != "stop"), "stop"),
        tuple(i for end in ends for i in end.text_ids),
        tuple(i for end in ends for i in end.generated),
        {name: sum(end.guards.get(name, 0) for end in ends) for end in ends for name in end.guards},
        replace(first.timings, total=before + ends[-1].timings.total),
    )
