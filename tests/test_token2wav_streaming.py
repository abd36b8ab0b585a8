"""Streaming laws: any grouping of tokens gives the same audio, as long as offline, close to it, without seams, at bounded cost."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_echat.token2wav import Speaker, StreamConfig, Token2Wav
from osum_echat.token2wav.compat import hamming_fade
from osum_echat.token2wav.config import mel_frames
from osum_echat.token2wav.draws import Draws
from osum_echat.token2wav.streaming import FlowStream, SolverOptions, cross_fade, reply_noise, sound_in_hand
from osum_echat.token2wav.vocoder_stream import VocoderStream, vocode
from tests.token2wav_case import recorded_speaker, recorded_tokens, tiny_model

MEL_TOLERANCE = 0.40
"""RMS of the difference between streamed and offline mel, in standard deviations of the mel, for the tiny random weights. Untrained
attention looks everywhere, which a trained one does not: docs/token2wav.md has the number of a trained model."""

SMALL = StreamConfig(first_hop=6, hop=12, left_context=8, look_ahead=4, fade_frames=6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Token2Wav:
    return tiny_model(tmp_path_factory.mktemp("t2w"))


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return recorded_speaker()


@functools.cache
def one_by_one(model: Token2Wav, speaker: Speaker, count: int) -> np.ndarray:
    return np.concatenate(list(model.stream(recorded_tokens(count), speaker, steps=1, config=SMALL)))


@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(0, 47), max_size=6).map(sorted))
def test_any_grouping_of_tokens_gives_the_same_audio(model: Token2Wav, speaker: Speaker, cuts: list[int]) -> None:
    tokens = recorded_tokens(47)
    groups = [tokens[a:b] for a, b in itertools.pairwise([0, *cuts, 47])]
    audio = np.concatenate(list(model.stream(groups, speaker, steps=1, config=SMALL)))
    assert np.array_equal(audio, one_by_one(model, speaker, 47))


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 75))
def test_streamed_length_is_the_offline_length(model: Token2Wav, speaker: Speaker, count: int) -> None:
    assert len(one_by_one(model, speaker, count)) == 256 * mel_frames(count)


def test_a_reply_within_the_first_window_equals_offline(model: Token2Wav, speaker: Speaker) -> None:
    count = StreamConfig().tokens_to_first_sound - 1
    streamed = np.concatenate(list(model.stream(recorded_tokens(count), speaker)))
    assert np.array_equal(streamed, model.synthesize(recorded_tokens(count), speaker)[0])


def test_sound_starts_when_it_should(model: Token2Wav, speaker: Speaker) -> None:
    taken = 0

    def tokens() -> Iterator[int]:
        nonlocal taken
        for token in recorded_tokens(60):
            taken += 1
            yield token

    stream = model.stream(tokens(), speaker, steps=1)
    first = next(stream)
    assert taken == StreamConfig().tokens_to_first_sound == 24
    assert len(first) == 256 * (mel_frames(16) - 19)  # the vocoder holds back 19 frames
    stream.close()


def test_sound_once_begun_goes_on_where_windows_are_made_faster_than_they_sound(model: Token2Wav) -> None:
    """The plan of windows against the time that they take: up to 0.65 of real time nothing stops."""
    held_back = VocoderStream(model.vocoder, Draws(0, 80, 9)).delay / mel_frames(1000) * 1000
    assert held_back == pytest.approx(19 / 3.445, rel=0.01)
    for pace in (0.1, 0.3, 0.5, 0.65):
        assert min(sound_in_hand(StreamConfig(), pace, held_back)) >= 0, pace
    assert StreamConfig().hops(6) == [16, 16, 24, 36, 40, 40]


def test_windows_lie_where_the_plan_says(model: Token2Wav, speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[int] = []
    window = FlowStream.window
    monkeypatch.setattr(FlowStream, "window", lambda self: (ends.append(window(self).end), window(self))[1])
    list(model.stream(recorded_tokens(110), speaker, steps=1))
    assert ends == [16, 32, 56, 92]


def test_streamed_mel_agrees_with_offline(model: Token2Wav, speaker: Speaker) -> None:
    tokens, solver = recorded_tokens(110), SolverOptions(steps=4)
    with torch.inference_mode():
        prompt = model.prompt_state(speaker)
        condition = model.flow.condition(torch.tensor(tokens), prompt.tokens_P, prompt.mel_TM, prompt.spk_M)
        offline = model.flow.solve([condition], [reply_noise(Draws(0, 80, 9), condition)], solver.steps)[0]

        def streamed(seed: int, config: StreamConfig) -> torch.Tensor:
            stream = FlowStream(model.flow, prompt, Draws(seed, 80, 9), config, solver)
            windows = [mel for token in tokens if (mel := stream.push(token)) is not None]
            return torch.cat([*windows, stream.finish()])

        def distance(mel: torch.Tensor) -> float:
            return float((mel - offline).square().mean().sqrt() / offline.std())

        assert distance(streamed(0, StreamConfig())) < MEL_TOLERANCE
        assert distance(streamed(1, StreamConfig())) > 2 * MEL_TOLERANCE  # what another noise would do
        wide = StreamConfig(first_hop=40, hop=40, left_context=110, look_ahead=60)
        assert distance(streamed(0, wide)) < distance(streamed(0, StreamConfig()))


def test_all_windows_are_bounded(model: Token2Wav, speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the reply: the flow sees at most left context + hop + look-ahead tokens, the vocoder a bounded piece."""
    seen, vocoded = [], []
    encode, decode = model.flow.encode, model.vocoder.decode
    monkeypatch.setattr(model.flow, "encode", lambda t, m=None: seen.append(t.shape[1]) or encode(t, m))
    monkeypatch.setattr(model.vocoder, "decode", lambda m, s: vocoded.append(m.shape[2]) or decode(m, s))
    list(model.stream(recorded_tokens(200), speaker, steps=1, config=SMALL))
    prompt = len(speaker.tokens)
    widest = prompt + SMALL.left_context + SMALL.hop + SMALL.look_ahead
    assert len(seen) == 18 and max(seen) <= widest
    assert seen[3:-1] == [widest] * (len(seen) - 4)
    assert max(vocoded) <= mel_frames(SMALL.hop) + 2 * 14 + 19 + 2


def test_memory_of_a_stream_does_not_grow(model: Token2Wav, speaker: Speaker) -> None:
    with torch.inference_mode():
        draws = Draws(0, 80, 9)
        flow = FlowStream(model.flow, model.prompt_state(speaker), draws, SMALL, SolverOptions(steps=1))
        voice = VocoderStream(model.vocoder, draws)
        for token in recorded_tokens(200):
            mel = flow.push(token)
            if mel is not None:
                voice.push(mel)
        kept = len(flow._tokens)
        assert kept <= SMALL.left_context + SMALL.hop + SMALL.look_ahead
        assert len(draws.reply._rows) < 200 and len(draws._source._rows) < 100
        assert len(voice._mel_TM) <= 2 * voice.delay + 50


def test_seams_are_no_louder_and_no_rougher_than_the_rest(model: Token2Wav, speaker: Speaker) -> None:
    tokens = recorded_tokens(150)
    chunks = list(model.stream(tokens, speaker, steps=4))
    audio = np.concatenate(chunks)
    seams = np.cumsum([len(c) for c in chunks])[:-1]
    jumps = np.abs(np.diff(audio))
    at_seams = np.array([jumps[s - 1] for s in seams])
    assert at_seams.max() <= np.quantile(jumps, 0.999)
    energy = np.array([np.sqrt(np.mean(audio[i : i + 2048] ** 2)) for i in range(0, len(audio) - 2048, 256)])
    frames = np.abs(np.diff(np.log(energy)))
    around = np.concatenate([frames[max(0, s // 256 - 9) : s // 256 + 2] for s in seams])
    assert np.median(around) <= 1.5 * np.median(frames)


def test_vocoder_pieces_have_no_seam_at_all(model: Token2Wav) -> None:
    mel = torch.randn(90, 80, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = vocode(model.vocoder, mel, Draws(0, 80, 9))
        stream = VocoderStream(model.vocoder, Draws(0, 80, 9))
        sizes = [1, 30, 2, 5, 33, 19]
        parts = [stream.push(p, last=i == len(sizes) - 1) for i, p in enumerate(mel.split(sizes))]
    assert [len(p) // 256 for p in parts] == [0, 12, 2, 5, 33, 38]
    assert (torch.cat(parts) - whole).abs().max() < 1e-3


def test_cross_fade_weights_sum_to_one_where_the_published_ones_do_not() -> None:
    ones = torch.ones(68, 80)
    assert torch.allclose(cross_fade(ones[:8], ones), ones)
    gain = hamming_fade(ones, ones, 68)
    assert gain.min() > 1.069 and gain.max() < 1.081


def test_compat_reproduces_the_published_chunk_sizes(model: Token2Wav, speaker: Speaker) -> None:
    chunks = list(model.stream(recorded_tokens(120), speaker, steps=1, compat=True))
    assert [len(c) for c in chunks] == [39168, 44288, 22528]


@pytest.mark.parametrize(
    "options",
    [{"first_hop": 0}, {"first_hop": 50}, {"growth": 0.5}, {"look_ahead": 0}, {"left_context": -1}, {"fade_frames": 40}],
)
def test_windows_that_cannot_be_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="stream:"):
        StreamConfig(**options)
