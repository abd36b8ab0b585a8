"""Decoding of many rows at once: prefill once, then a step at a time, each row in its own phase.

A step feeds every live row the ids it has accepted (usually one), asks the text head for the rows in text and the
speech head for the rows in speech, lets `choice` apply penalty, guards and sampling to each group, and lets
`phases.RowState` say what the ids mean. Rows that end leave the batch. `rows.UsualRows` does it where it runs
everywhere, `static_rows.StaticRows` on accelerators without waiting for them.

Speed: at batch 1 the weights have to be read once per id, so everything else is kept small. Masks are left out when
nothing is hidden, the cache is written in place, logits exist for the rows that choose and their last position only,
and ids that are given (spelled words, the begin of speech) go through the LLM several at a time. See
`cpu_linear.pack_linears` for the weights and `benchmarks/decode.py` for numbers.

B live rows, D width, R rows that choose from one head, V classes of that head.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence

import torch

from osum_echat import device as devices
from osum_echat.dialogue.dialect import Dialect
from osum_echat.dialogue.tokens import Tokenizer
from osum_echat.generation.cache import KeptCache
from osum_echat.generation.choice import Choice
from osum_echat.generation.config import GenerationConfig
from osum_echat.generation.decoder_state import DecoderState
from osum_echat.generation.decoder_step import DecoderStep, build_step
from osum_echat.generation.events import Event
from osum_echat.generation.live_row import LiveRow
from osum_echat.generation.request import Request
from osum_echat.generation.rows import OnLogits, Rows, UsualRows
from osum_echat.generation.static_rows import Sizes, StaticRows
from osum_echat.model.echat import AudioFeatures, EChatModel

log = logging.getLogger(__name__)

_ON_HOST = "ctc_weight > 0: the words of transcripts are chosen with the CTC head, which the static step does not do"


class Generator:
    """Runs requests on one model. It holds no state between calls, so it can be shared (but not by threads at the same
    moment).

    Args:
        dialect: how the model is spoken to, when not as its config says.
    """

    def __init__(
        self,
        model: EChatModel,
        tokenizer: Tokenizer,
        config: GenerationConfig | None = None,
        dialect: Dialect | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.dialect = dialect or model.config.dialect
        self.vocab = model.vocabulary
        self.config = config or GenerationConfig()
        self.choice = Choice(self.config, tokenizer, self.vocab)
        self._decoder: DecoderStep | None = None
        self._sizes: Sizes | None = None
        self._looked = False

    def compile(self, backend: str = "inductor") -> None:
        """Compile the LLM's decoder with `torch.compile`, in place; meant for accelerators. Of the static step one
        layer is compiled, for all of them.

        Else lengths are dynamic, so a few graphs serve all steps. The first steps wait for the compiler (minutes on a
        CPU, where `cpu_linear.pack_linears` gives more).
        """
        decoder = self._static_decoder()
        if decoder is not None:
            decoder.compile(dynamic=False, backend=backend)
        else:
            self.model.lm.llm.get_decoder().compile(dynamic=True, backend=backend)

    def generate(
        self, requests: Sequence[Request], on_logits: OnLogits | None = None, audio: AudioFeatures | None = None
    ) -> Iterator[tuple[int, Event]]:
        """Decode all requests together; yields (number of the request, event) as they happen, `Done` last for each.

        Stop iterating, or cancel a request, and no further step is made for it.

        Args:
            audio: the recordings of all requests, in their order and joined as the encoder gave them; else each request
                has its own (`heard`).

        Raises:
            ValueError: when prompts and recordings do not fit together.
        """
        if not requests:
            return
        started = time.perf_counter()
        begun = [self.begin(i, request, started) for i, request in enumerate(requests)]
        rows = self.rows(on_logits)
        with torch.inference_mode():
            rows.join(begun, DecoderState(self.model, requests, self.spare(requests), audio=audio))
        events = [event for row in begun for event in self.was_read(row)]
        while True:
            with torch.inference_mode():
                events += rows.choose()
            yield from events
            events = []
            if not rows.live:
                return
            with torch.inference_mode():
                rows.step()

    def rows(self, on_logits: OnLogits | None = None) -> Rows:
        """Rows that are decoded together, in the way that fits device, model and settings. ``on_logits`` wants the
        usual way."""
        decoder = None if on_logits is not None else self._static_decoder()
        if decoder is None:
            return UsualRows(self.model, self.choice, on_logits)
        return StaticRows(self.model, self.choice, decoder, self._sizes or Sizes.of(self.model.device))

    def spare(self, requests: Sequence[Request]) -> int:
        """Columns behind the prompts that a cache makes place for, where it is decoded on."""
        return 0 if self._static_decoder() is not None else min(max(r.mode.max_new for r in requests), 512)

    def use_static_step(self, sizes: Sizes | None = None) -> None:
        """Decode by the static step whatever the settings say; ``sizes``: not those that fit the device, for tests and
        measurements.

        Raises:
            ValueError: for a model that it does not take.
        """
        if self._joint:
            raise ValueError(_ON_HOST)
        self._decoder, self._sizes, self._looked = build_step(self.model), sizes, True

    def _static_decoder(self) -> DecoderStep | None:
        """Built when it is first wanted. What cannot be taken is said once."""
        if not self._looked:
            self._looked = True
            wanted = self.config.static_step
            if wanted == "always" or (wanted == "auto" and devices.overlaps(self.model.device)):
                try:
                    if self._joint:
                        raise ValueError(_ON_HOST)
                    self._decoder = build_step(self.model)
                except ValueError as error:
                    log.warning("decoding takes the usual way: %s", error)
        return self._decoder

    @property
    def _joint(self) -> bool:
        """The CTC head has a share in transcripts."""
        return self.config.ctc_weight > 0 and self.model.ctc is not None

    def read(self, request: Request) -> KeptCache | None:
        """Only read the prompt, for its cache; None where the cache is not ours to keep."""
        with torch.inference_mode():
            return DecoderState(self.model, [request], spare=0).keep(0)

    # ---- the parts of decoding, for those who mix rows themselves (`engine`) -----------------------------------------

    def begin(self, index: int, request: Request, started: float) -> LiveRow:
        """A row in work. ``index``: what its events are marked with; ``started``: the second it counts its times
        from."""
        state = request.state(self.config, self.tokenizer, self.vocab, self.dialect)
        return LiveRow(index, request, state, started, self.choice)

    def was_read(self, row: LiveRow) -> list[tuple[int, Event]]:
        """The prompt of a row has been read: what there is to say before its first step."""
        row.prefill = time.perf_counter() - row.started
        return row.reported(row.state.opening)
