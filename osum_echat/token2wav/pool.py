"""Several replies spoken at once: the windows that are ready are solved in one call.

    pool = StreamPool(token2wav)
    pool.start()
    voice = pool.open(speaker, seed, on_samples)     # on_samples(samples) on the pool's thread
    voice.push(codes); voice.finish()                # from any thread; on_samples(None) comes last

One thread owns the networks; on a CPU it may share the windows of a call out among workers, each on a core of its own
(``workers``): a packed call saves little there. A reply sounds as `Token2Wav.stream` makes it alone, to rounding. A
reply may be told to pause (`slow`): its windows wait, and the others have the time.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from osum_echat import device as devices
from osum_echat.token2wav.model import Samples, Token2Wav
from osum_echat.token2wav.prompt import Speaker
from osum_echat.token2wav.streaming import Draft, FlowStream, SolverOptions, StreamConfig, Window
from osum_echat.token2wav.vocoder_stream import Piece, VocoderStream, alike_together, decode

log = logging.getLogger(__name__)
OnSamples = Callable[["Samples | None"], None]


def _nobody(_: Samples | None) -> None:
    pass


class PooledVoice:
    """One reply. ``failed``: why it was given up, where it was."""

    def __init__(self, pool: StreamPool, flow: FlowStream, vocoder: VocoderStream, on_samples: OnSamples) -> None:
        self._pool, self._flow, self._vocoder, self.on_samples = pool, flow, vocoder, on_samples
        self._codes: deque[int] = deque()
        self._finished = False
        self._slow = False
        self.cancelled = False
        self.failed: BaseException | None = None

    def push(self, codes: Sequence[int]) -> None:
        self._codes.extend(codes)
        self._pool.wake()

    def finish(self) -> None:
        """No more codes come."""
        self._finished = True
        self._pool.wake()

    def cancel(self) -> None:
        """Nothing more is made; ``on_samples(None)`` comes within one call."""
        self.cancelled = True
        self._pool.wake()

    def slow(self, on: bool) -> None:
        self._slow = on
        self._pool.wake()

    # ---- the pool's thread -------------------------------------------------------------------------------------------

    def ready(self) -> bool:
        """A window can be solved, or the reply ended."""
        if self.cancelled:
            return True
        if self._slow:
            return False
        finished = self._finished  # read first: codes that were pushed before it are seen below
        while self._codes and not self._flow.ready:
            self._flow.add(self._codes.popleft())
        return self._flow.ready or (finished and not self._codes)

    @property
    def frames(self) -> int:
        """Of the next window; 0: the reply ends without one."""
        return 0 if self.cancelled else self._flow.window_frames

    def draft(self) -> Draft | None:
        """Its next window; None: the reply ends without one. Raises ValueError for codes that the network lacks."""
        if self.cancelled:
            return None
        return self._flow.draft() if self._flow.ready else self._flow.last_draft()

    def stretched(self, draft: Draft, h_LM: torch.Tensor) -> torch.Tensor:
        return self._flow.stretched(draft, h_LM)

    def window(self, draft: Draft, mu_TM: torch.Tensor) -> Window:
        return self._flow.regulated(draft, mu_TM)

    def piece(self, window: Window, mel_TM: torch.Tensor) -> tuple[Piece | None, bool]:
        """What is vocoded of a solved window, and whether it was the last."""
        was_last = not self._flow.ready
        return self._vocoder.piece(self._flow.settle(window, mel_TM), was_last), was_last

    def tell(self, wave_S: torch.Tensor) -> None:
        """Give out sound."""
        if len(wave_S) and not self.cancelled:
            self.on_samples(devices.fetch(wave_S.float()).wait().numpy())

    def end(self) -> None:
        """Say so, and let go of the networks' states: megabytes, which references in a circle would keep."""
        on_samples, self.on_samples = self.on_samples, _nobody
        on_samples(None)
        del self._flow, self._vocoder
        self._codes.clear()


class StreamPool:
    """See the module. Without `start`, `work` does one call, for tests."""

    def __init__(
        self, token2wav: Token2Wav, config: StreamConfig | None = None, solver: SolverOptions | None = None, workers: int = 1
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers} must be at least 1")
        self.token2wav, self.config, self.solver = token2wav, config or StreamConfig(), solver or SolverOptions()
        self._workers = (
            ThreadPoolExecutor(workers - 1, "osum-echat-voice") if workers > 1 and token2wav.device.type == "cpu" else None
        )
        self._shares = workers if self._workers is not None else 1
        self._voices: list[PooledVoice] = []
        self._changed = threading.Condition()
        self._awake = self._closed = False
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        """Replies in work."""
        return len(self._voices)

    def open(self, speaker: Speaker, seed: int, on_samples: OnSamples) -> PooledVoice:
        with torch.inference_mode(), self._changed:
            prompt = self.token2wav.prompt_state(speaker)
            draws = self.token2wav.draws(seed)
            flow = FlowStream(self.token2wav.flow, prompt, draws, self.config, self.solver)
            voice = PooledVoice(self, flow, VocoderStream(self.token2wav.vocoder, draws), on_samples)
            self._voices.append(voice)
        return voice

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="osum-echat-voice", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cancel everything and end the thread."""
        with self._changed:
            self._closed = True
            for voice in self._voices:
                voice.cancelled = True
        self.wake()
        if self._thread is not None:
            self._thread.join()
        if self._workers is not None:
            self._workers.shutdown()

    def wake(self) -> None:
        with self._changed:
            self._awake = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            more = self.work()
            with self._changed:
                if self._closed and not self._voices:
                    return
                if not more and not self._awake:
                    self._changed.wait(timeout=1.0)
                self._awake = False

    @torch.inference_mode()
    def work(self) -> bool:
        """Solve the windows that are ready, in one call; whether there were any."""
        ready = [voice for voice in list(self._voices) if voice.ready()]
        batch, longest = list[PooledVoice](), 0
        for voice in ready:
            frames = voice.frames
            if not frames:  # nobody waits for the end behind windows of others
                self._drop(voice)
            elif (len(batch) + 1) * max(longest, frames) <= self.token2wav.batch_frames or not batch:
                batch.append(voice)
                longest = max(longest, frames)
        if batch:
            self._solve_shares(batch)
            with self._changed:  # those that were served go behind those that were not
                served = [voice for voice in batch if voice in self._voices]
                self._voices = [voice for voice in self._voices if voice not in served] + served
        return bool(ready)

    def _solve_shares(self, batch: list[PooledVoice]) -> None:
        """The windows of these voices, shared out among the workers; one worker is this thread. Windows of similar
        length go together."""
        ordered = sorted(batch, key=lambda voice: voice.frames)
        size = -(-len(ordered) // self._shares)
        mine, *others = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        waiting = [self._workers.submit(self._solve, share) for share in others] if self._workers is not None else []
        self._solve(mine)
        for share in waiting:
            share.result()

    def _drafts(self, voices: list[PooledVoice]) -> list[tuple[PooledVoice, Draft]]:
        """Of each voice that still has a window (it may have been cancelled meanwhile); the others end."""
        found = []
        for voice in voices:
            try:
                draft = voice.draft()
            except ValueError as error:  # codes that the network does not have
                self._drop(voice, error)
                continue
            if draft is None:
                self._drop(voice)
            else:
                found.append((voice, draft))
        return found

    def _windows(self, drafts: list[tuple[PooledVoice, Draft]]) -> list[tuple[PooledVoice, Window]]:
        flow = self.token2wav.flow
        h_LMs = alike_together(flow.encode, [draft.tokens_L for _, draft in drafts])
        stretched = [voice.stretched(draft, h_LM) for (voice, draft), h_LM in zip(drafts, h_LMs, strict=True)]
        mu_TMs = alike_together(flow.length_regulator, stretched)
        return [(voice, voice.window(draft, mu_TM)) for (voice, draft), mu_TM in zip(drafts, mu_TMs, strict=True)]

    @torch.inference_mode()
    def _solve(self, voices: list[PooledVoice]) -> None:
        solver, drafts = self.solver, self._drafts(voices)
        if not drafts:
            return
        try:
            batch = self._windows(drafts)
            mels = self.token2wav.flow.solve(
                [w.condition for _, w in batch], [w.noise_TM for _, w in batch], solver.steps, solver.guidance, solver.schedule
            )
            pieces = [(voice, *voice.piece(w, mel_TM)) for (voice, w), mel_TM in zip(batch, mels, strict=True)]
            sounding = [(voice, piece) for voice, piece, _ in pieces if piece is not None]
            waves = decode(self.token2wav.vocoder, [piece for _, piece in sounding])
        except Exception as error:
            log.exception("token2wav failed; %d replies are given up", len(drafts))
            for voice, _ in drafts:
                self._drop(voice, error)
            return
        for (voice, _), wave_S in zip(sounding, waves, strict=True):
            try:
                voice.tell(wave_S)
            except Exception as error:
                log.exception("a voice failed; its reply is given up")
                self._drop(voice, error)
        for voice, _, was_last in pieces:
            if was_last and voice.failed is None:
                self._drop(voice)

    def _drop(self, voice: PooledVoice, error: BaseException | None = None) -> None:
        voice.failed = error
        with self._changed:
            if voice in self._voices:
                self._voices.remove(voice)
        voice.end()
