"""Speech codes of replies as sound: which voice, a batch at once, and a stream in which decoder and vocoder are
joined."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from osum_echat import device as devices
from osum_echat.generation.events import Done, speech_codes
from osum_echat.pipeline.ask import Ask, AudioChunk, StreamEvent, Voice
from osum_echat.pipeline.stages import ahead, speak_along

if TYPE_CHECKING:
    from osum_echat.token2wav import Speaker, Token2Wav


class Sound:
    """Token2wav and the voice that replies have by default. Without token2wav nothing makes a sound, and nothing is an
    error.

    ``overlap``: in a stream the decoder has a thread of its own; on where the device does both at once.
    """

    def __init__(self, token2wav: Token2Wav | None = None, voice: Speaker | None = None) -> None:
        self.token2wav, self.voice = token2wav, voice
        self.overlap = token2wav is not None and devices.overlaps(token2wav.device)

    def speaker(self, voice: Voice) -> Speaker:
        """A voice: a `Speaker`, a saved one (``.safetensors``), a name of ``spk2info.pt``, or a recording. Raises
        ValueError."""
        from osum_echat.token2wav import Speaker

        if isinstance(voice, Speaker):
            return voice
        if self.token2wav is None:
            raise ValueError("a voice needs token2wav: load with token2wav=FOLDER")
        if str(voice) in self.token2wav.speakers:
            return self.token2wav.speakers[str(voice)]
        if not Path(voice).is_file():
            known = f"; known voices: {', '.join(self.token2wav.speakers)}" if self.token2wav.speakers else ""
            raise ValueError(f"no such voice: {voice} is neither a recording, nor a saved speaker{known}")
        return Speaker.load(voice) if Path(voice).suffix == ".safetensors" else Speaker.from_wav(str(voice), self.token2wav)

    def voice_of(self, ask: Ask) -> Speaker | None:
        """The voice of a reply; None where it makes no sound. Raises ValueError when there is no voice."""
        if self.token2wav is None or not ask.mode.speaks:
            return None
        voice = self.speaker(ask.speaker) if ask.speaker is not None else self.voice
        if voice is None:
            raise ValueError("no voice is loaded: give speaker= (a recording of 1 to 30 s, or a saved speaker)")
        return voice

    def render(
        self, rows: Sequence[list[StreamEvent]], seeds: Sequence[int], voices: Sequence[Speaker | None], started: float
    ) -> list[list[StreamEvent]]:
        """Finished rows of events with their sound, an `AudioChunk` before `Done`, which takes the time of it.

        Args:
            rows: events of each row, `Done` last. seeds, voices: of each row; without a voice there is no sound.
            started: `time.perf_counter` when the rows were asked.
        """
        codes = [speech_codes(row) for row in rows]
        spoken = [i for i, row in enumerate(rows) if codes[i] and voices[i] is not None]
        began = time.perf_counter()
        chunks: dict[int, AudioChunk] = {}
        for seed in sorted({seeds[i] for i in spoken}):
            group = [i for i in spoken if seeds[i] == seed]
            assert self.token2wav is not None
            waves, rate = self.token2wav.synthesize(
                [codes[i] for i in group], [v for i in group if (v := voices[i]) is not None], seed=seed
            )
            chunks |= {i: AudioChunk(samples, rate) for i, samples in zip(group, waves, strict=True)}
        now = time.perf_counter()
        return [
            [*row[:-1], chunks[i], _timed(row[-1], now - began, now - started)] if i in chunks else list(row)
            for i, row in enumerate(rows)
        ]

    def stream(self, events: Iterator[StreamEvent], seed: int, voice: Speaker | None) -> Iterator[StreamEvent]:
        """The events of one row with `AudioChunk`s between them, made from the codes as they come (see `stages`)."""
        if voice is None or self.token2wav is None:
            return events
        return self._spoken(self.token2wav, events, seed, voice)

    def _spoken(self, token2wav: Token2Wav, events: Iterator[StreamEvent], seed: int, voice: Speaker) -> Iterator[StreamEvent]:
        vocoder = token2wav.open_stream(voice, seed=seed)
        if not self.overlap:
            yield from speak_along(events, vocoder, token2wav.sample_rate)
            return
        with closing(ahead(events)) as decoded:  # the thread has ended when this stream has
            yield from speak_along(decoded, vocoder, token2wav.sample_rate, devices.side_stream(token2wav.device))


def _timed(done: StreamEvent, synthesis: float, total: float) -> Done:
    assert isinstance(done, Done), f"a row's last event is Done, found {done}"
    return replace(done, timings=replace(done.timings, synthesis=synthesis, total=total))
