"""One row of a batch: where it is in think, text and speech, and what every chosen id means there.

    text only      think? text eos
    after          think? text eos, delimiter codes delimiter
    word           think? text eos, delimiter w1 w2 codes(w1) delimiter w3 codes(w2) delimiter ... codes(wn) delimiter
    interleaved    think? (6 text ids, 18 speech ids) ... eos, the rest of the speech

Text to speech begins behind the first delimiter. In the interleaved form the two delimiters count as speech.

Ids that are not the model's to choose (the begin of speech, spelled words, the text of text to speech, what a limit
ends) are *given*: they are fed like chosen ones, without asking the model. The machine sees ids only; logits and rows
beside it are the generator's.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from osum_echat.dialogue import think
from osum_echat.dialogue.interleave import SPEECH_CHUNK, TEXT_CHUNK, spell, split_words
from osum_echat.dialogue.tasks import OUTPUTS, SpeechForm
from osum_echat.dialogue.tokens import Tokenizer, encode_fixed
from osum_echat.dialogue.vocabulary import Vocabulary
from osum_echat.generation.config import GenerationConfig, Reason
from osum_echat.generation.events import Event, SpeechToken
from osum_echat.generation.text_stream import TextStream

Form = Literal["none", "after", "word", "interleaved"]


@dataclass
class Words:
    """Progress of the word form: which word is being spoken, and how many codes it has so far."""

    words: tuple[str, ...]
    index: int = 0
    codes: int = 0


class RowState:
    """Feed it every id with `accept`; it says which head comes next, which ids to feed, and what to tell the caller.

    Attributes:
        in_speech: the next id comes from the speech head.
        pending: ids that were accepted and not fed to the model yet.
        finished: why the row ended, None while it goes on.
        generated: ids accepted so far, all kinds.
        text_ids, codes: text without its end, speech without delimiters.
        acted: how often each guard acted.
        opening: what there is to tell before the first step (text that is given).
    """

    def __init__(
        self,
        output_type: str,
        max_new: int,
        config: GenerationConfig,
        tokenizer: Tokenizer,
        vocab: Vocabulary,
        text_to_say: Sequence[int] = (),
        words: Sequence[str] = (),
        speech_form: SpeechForm = "plain",
    ) -> None:
        output = OUTPUTS[output_type]
        self.config, self.tokenizer, self.vocab = config, tokenizer, vocab
        self.max_new = max_new
        self.form: Form = output.speech
        if output.speech == "after" and speech_form == "word":
            self.form = "word"
        self.text = TextStream(tokenizer, output.think)
        self.in_speech = not output.reply_text
        self.text_done = not output.reply_text
        self.delimiters = int(not output.reply_text)  # text to speech is given the first one with the prompt
        self.chunk = 0
        self.pending: deque[int] = deque()
        self.finished: Reason | None = None
        self.generated: list[int] = []
        self.text_ids: list[int] = []
        self.codes: list[int] = []
        self.think_ids = 0
        self.acted: Counter[str] = Counter()
        self._reply_ids = len(text_to_say)
        self._say = deque((*text_to_say, vocab.eos_id)) if output.spoken_text and output.reply_text else None
        self._words: Words | None = None
        self._given: deque[int] = deque()
        if self.form == "word" and output.spoken_text:
            self._start_words(words)
        self._give_text()
        self.opening: list[Event] = self._take_given()

    # ---- what the generator asks -------------------------------------------------------------------------------------

    @property
    def thinking(self) -> bool:
        """Text is being written and the think in it is not closed."""
        return not self.text_done and self.text.waiting_for_close

    @property
    def may_end_speech(self) -> bool:
        """False where the layout has no delimiter: a word without a code, or interleaved speech before its text has
        ended."""
        if self._words is not None:
            return self._words.codes > 0
        return self.form != "interleaved" or self.text_done or self.delimiters == 0

    def expected(self) -> tuple[bool, bool, bool]:
        """`in_speech`, `thinking` and `may_end_speech` after one more id, if that is an ordinary one: no end, no
        delimiter, no mark of a think."""
        in_speech, may_end = self.in_speech, self.may_end_speech
        if self.form == "interleaved" and not (in_speech and self.text_done):
            changes = self.chunk + 1 >= (SPEECH_CHUNK if in_speech else TEXT_CHUNK) and (in_speech or not self.thinking)
            in_speech = in_speech != changes
        if self._words is not None and in_speech:
            may_end = True
        return in_speech, self.thinking, may_end

    def accept(self, token: int) -> list[Event]:
        """Take the next id (unified), and the given ids that follow from it."""
        return [*self._accept(token), *self._take_given()]

    def finish(self, reason: Reason) -> list[Event]:
        """End the row; what text was held back comes out."""
        self.finished = reason
        return [*self.text.finish()]

    # ---- transitions -------------------------------------------------------------------------------------------------

    def _take_given(self) -> list[Event]:
        events: list[Event] = []
        while self._given and self.finished is None:
            events += self._accept(self._given.popleft())
        return events

    def _accept(self, token: int) -> list[Event]:
        assert self.finished is None, f"the row has ended ({self.finished}), {token} comes too late"
        self.generated.append(token)
        self.pending.append(token)
        events = self._accept_speech(token) if token >= self.vocab.text_size else self._accept_text(token)
        if self.finished is None and len(self.generated) >= self.max_new:
            events += self.finish("length")
        return events

    def _accept_text(self, token: int) -> list[Event]:
        if self._words is not None:
            return []  # a spelled word
        if token == self.vocab.eos_id:
            return self._end_text()
        self.text_ids.append(token)
        before = self.text.waiting_for_close
        events: list[Event] = [*self.text.push(token)]
        if before and (self.text.opened or self.text.waiting_for_close):
            self.think_ids += 1
            self._limit_think()
        else:
            self.think_ids = self.think_ids if self.text.opened else 0  # a think was expected and did not come
            self._reply_ids += self._say is None
            if self.form == "interleaved":
                self._count_chunk(TEXT_CHUNK)
        return events

    def _end_text(self) -> list[Event]:
        self.text_done = True
        events: list[Event] = [*self.text.finish()]
        if self.form == "none":
            return events + self.finish("stop")
        self._enter_speech()
        if self.form == "word":
            words = split_words(self.text.reply)
            if not words:
                return events + self.finish("stop")
            self._given.append(self.vocab.speech_delimiter)
            self._start_words(words)
        return events

    def _enter_speech(self) -> None:
        self.in_speech, self.chunk = True, 0
        if self.delimiters == 0 and self.config.force_speech_begin and self.form != "word":
            self._given.append(self.vocab.speech_delimiter)

    def _accept_speech(self, token: int) -> list[Event]:
        events: list[Event] = []
        if token == self.vocab.speech_delimiter:
            self.delimiters += 1
            if self._ends_speech():
                return self.finish("stop")
        else:
            code = token - self.vocab.text_size
            self.codes.append(code)
            events.append(SpeechToken(code))
            self._limit_speech()
        if self.form == "interleaved":
            self._count_chunk(SPEECH_CHUNK)
        return events

    def _ends_speech(self) -> bool:
        if self._words is None:
            return self.delimiters >= 2 and self.text_done
        if self.delimiters == 1 and not self.codes and self._words.index == 0:
            return False  # the begin of speech
        self._words.index, self._words.codes = self._words.index + 1, 0
        self._spell(self._words.index + 1)
        return self._words.index >= len(self._words.words)

    def _count_chunk(self, size: int) -> None:
        """Change over after a full chunk; when the text has ended, the rest is speech."""
        self.chunk += 1
        if self.chunk < size or (self.in_speech and self.text_done):
            return
        if self.in_speech:
            self.in_speech, self.chunk = False, 0
            self._give_text()
        elif not self.text_done:
            self._enter_speech()

    # ---- given ids ---------------------------------------------------------------------------------------------------

    def _give_text(self) -> None:
        """Streaming text to speech: the text is known, so it is not the model's to choose."""
        if self._say is not None:
            self._given.extend(self._say.popleft() for _ in range(min(TEXT_CHUNK, len(self._say))))

    def _start_words(self, words: Iterable[str]) -> None:
        self._words = Words(tuple(words))
        self._spell(0)
        self._spell(1)

    def _spell(self, index: int) -> None:
        assert self._words is not None
        if index < len(self._words.words):
            self._given.extend(spell(self._words.words[index], self.tokenizer))

    # ---- limits ------------------------------------------------------------------------------------------------------

    def _limit_think(self) -> None:
        guard = self.config.guards.think
        if guard is not None and self.think_ids == guard.longest and self.text.waiting_for_close:
            self.acted["think"] += 1
            self._given.extend(encode_fixed(self.tokenizer, think.CLOSE))

    def _limit_speech(self) -> None:
        """A word, or all speech after the text, has had its codes: end it."""
        if self._words is not None:
            self._words.codes += 1
            if self._words.codes >= self.config.max_codes_per_word:
                self.acted["word"] += 1
                self._given.append(self.vocab.speech_delimiter)
            return
        guard = self.config.guards.length
        if guard is not None and self.text_done and len(self.codes) >= guard.base + guard.per_text_id * self._reply_ids:
            self.acted["length"] += 1
            self._given.append(self.vocab.speech_delimiter)
