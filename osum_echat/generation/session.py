"""A dialogue of several turns that keeps what the LLM has read.

The next prompt is laid out in full every time, and what it has in common with the kept cache is not read again; so a
session answers exactly as if everything were encoded anew. A past turn stands in another form than the same turn when
it was answered (in the trained layout its recording has no marks), so `commit` reads the history form while nobody
waits, and the next answer reads its own turn only. When a limit drops old turns, all positions behind them change, and
what is left is read again.
"""

from __future__ import annotations

from collections.abc import Sequence

from osum_echat.dialogue.layout import flatten
from osum_echat.dialogue.tasks import OUTPUTS, PastTurn, Sample
from osum_echat.dialogue.think import ThinkForm
from osum_echat.dialogue.tokens import encode
from osum_echat.generation.cache import KeptCache
from osum_echat.generation.events import Done, Event, speech_codes
from osum_echat.generation.generator import Generator
from osum_echat.generation.request import Request, TooLong, build_request
from osum_echat.model.echat import AudioFeatures


class Session:
    """Past turns and their cache ``kept``, which may be set to None to make place: the past is read anew then.

    Args:
        max_turns: past turns that are kept (the published code keeps 5).
        max_tokens: positions of a prompt at most, past and present; old turns are dropped until it fits.
    """

    def __init__(self, generator: Generator, max_turns: int = 5, max_tokens: int = 2000) -> None:
        if max_turns < 0 or max_tokens < 1:
            raise ValueError(f"max_turns={max_turns} and max_tokens={max_tokens} must not be negative")
        self.generator = generator
        self.max_turns, self.max_tokens = max_turns, max_tokens
        self.turns: list[PastTurn] = []
        self.heard: list[tuple[AudioFeatures, ...]] = []
        self.kept: KeptCache | None = None

    def __len__(self) -> int:
        return len(self.turns)

    def clear(self) -> None:
        """Begin a new conversation."""
        self.turns, self.heard, self.kept = [], [], None

    def request(
        self,
        output_type: str,
        heard: Sequence[AudioFeatures] = (),
        text: str = "",
        seed: int = 0,
        greedy: bool = False,
        think: ThinkForm | None = None,
    ) -> Request:
        """The request of the next turn, with the past in front.

        Raises:
            ValueError: an output type that takes no history. TooLong: the turn has more than ``max_tokens`` by itself.
        """
        if not OUTPUTS[output_type].history:
            raise ValueError(f"{output_type} takes no past turns, so it has no place in a session")
        self._forget(len(self.turns) - self.max_turns)
        while True:
            request = build_request(
                output_type,
                self.generator.config,
                self.generator.tokenizer,
                self.generator.vocab,
                prompt_text=text,
                heard=[h for turn in self.heard for h in turn] + list(heard),
                history=self.turns,
                seed=seed,
                greedy=greedy,
                dialect=self.generator.dialect,
                think=think,
            )
            if len(request.prompt) <= self.max_tokens:
                break
            if not self.turns:
                raise TooLong(
                    f"this turn alone has {len(request.prompt)} positions, the session allows {self.max_tokens} (max_tokens); "
                    "ask with a shorter recording or text"
                )
            self._forget(1)
        request.past, request.keep_cache = self.kept, True
        return request

    def commit(self, request: Request, events: Sequence[Event], heard: Sequence[AudioFeatures] = (), text: str = "") -> None:
        """Add a finished turn to the past, and read it in its history form.

        Args:
            events: of the turn, `Done` last. heard, text: what the user said or wrote.

        A turn that was cancelled before it had any text leaves no trace.
        """
        reading = self.record(request, events, heard, text)
        if reading is not None:
            self.kept = self.generator.read(reading)

    def record(
        self, request: Request, events: Sequence[Event], heard: Sequence[AudioFeatures] = (), text: str = ""
    ) -> Request | None:
        """`commit` without work of the model: returns what is to be read, whose cache belongs in `kept`; None when
        there is nothing."""
        done = events[-1]
        assert isinstance(done, Done), f"a turn's last event is Done, found {done}"
        reply_ids = done.text_ids[done.timings.think_tokens :]
        if done.reason == "cancelled" and not reply_ids:
            return None
        user_ids = encode(self.generator.tokenizer, text) if text else ()
        self.turns.append(PastTurn(tuple(reply_ids), speech_codes(events), has_audio=bool(heard), user_ids=user_ids))
        self.heard.append(tuple(heard))
        self.kept = request.cache
        self._forget(len(self.turns) - self.max_turns)
        return self.past_request(request)

    def _forget(self, count: int) -> None:
        if count > 0:
            del self.turns[:count], self.heard[:count]

    def replace_past(self, turns: Sequence[PastTurn], heard: Sequence[tuple[AudioFeatures, ...]]) -> None:
        """Another past, for those who keep the dialogue themselves. What it has in common with the kept cache is not
        read again."""
        assert len(turns) == len(heard), f"{len(turns)} turns with the recordings of {len(heard)}"
        self.turns, self.heard = list(turns), list(heard)

    def past_request(self, last: Request) -> Request | None:
        """What is to be read so that the past stands as the next turn will show it, if it is of the kind of the last
        one."""
        if not self.turns:
            return None
        generator = self.generator
        heard = tuple(h for turn in self.heard for h in turn)
        sample = Sample(last.output_type, history=tuple(self.turns), think=last.think)
        layout = generator.dialect.layout(sample, generator.tokenizer, generator.vocab, prefix_only=True)
        slots = [i for i, segment in enumerate(layout.prefix) if segment.audio == len(heard)]
        past = layout.prefix[: slots[0]] if slots else layout.prefix[:-1]
        row = flatten(past, [int(h.lengths_N[0]) for h in heard])
        if len(row) > self.max_tokens:
            return None  # the next request will drop turns, so there is nothing worth reading yet
        return Request(last.output_type, row, heard, past=self.kept)
