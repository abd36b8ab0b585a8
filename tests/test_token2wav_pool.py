"""Replies that are spoken in company sound as they do alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from osum_echat.token2wav import Speaker, Token2Wav
from osum_echat.token2wav.pool import PooledVoice, StreamPool
from osum_echat.token2wav.vocoder_stream import alike_together
from tests.token2wav_case import write_directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Token2Wav:
    return Token2Wav.load(write_directory(tmp_path_factory.mktemp("t2w") / "tiny"), device="cpu")


@pytest.fixture(scope="module")
def speaker(model: Token2Wav) -> Speaker:
    return Speaker(
        tokens=torch.zeros(0, dtype=torch.int64),
        mel=torch.zeros(0, model.config.flow.output_size),
        embedding=torch.linspace(-1, 1, model.config.flow.spk_embed_dim),
    )


def codes(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 64, count).tolist()


def listen(pool: StreamPool, speaker: Speaker, seed: int) -> tuple[PooledVoice, list[np.ndarray | None]]:
    heard: list[np.ndarray | None] = []
    return pool.open(speaker, seed, heard.append), heard


def sound(heard: list[np.ndarray | None]) -> np.ndarray:
    assert heard[-1] is None and heard.count(None) == 1 if all(h is None for h in heard) else heard[-1] is None
    return np.concatenate([np.zeros(0, dtype=np.float32), *[h for h in heard if h is not None]])


def work(pool: StreamPool) -> int:
    calls = 0
    while pool.work():
        calls += 1
        assert calls < 200
    return calls


def test_replies_in_company_sound_as_alone_and_share_calls(model: Token2Wav, speaker: Speaker) -> None:
    pool = StreamPool(model, workers=2)
    replies = [codes(count, i) for i, count in enumerate((90, 15, 61, 0))]
    voices = [listen(pool, speaker, seed=i) for i in range(4)]
    for (voice, _), reply in zip(voices, replies, strict=True):
        voice.push(reply)
        voice.finish()
    calls = work(pool)
    assert calls <= 5 and len(pool) == 0
    for i, ((_, heard), reply) in enumerate(zip(voices, replies, strict=True)):
        alone = list(model.stream(reply, speaker, seed=i))
        expected = np.concatenate([np.zeros(0, dtype=np.float32), *alone])
        assert np.abs(sound(heard) - expected).max(initial=0) < 2e-3 and len(sound(heard)) == len(expected)


def test_windows_of_one_length_go_through_each_network_together(
    model: Token2Wav, speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: dict[str, list[int]] = {"encode": [], "length_regulator": [], "recorded_decode": []}

    def counted(name: str, network: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(first: Tensor, *more: Tensor) -> Tensor:
            rows[name].append(len(first))
            return network(first, *more)

        return call

    monkeypatch.setattr(model.flow, "encode", counted("encode", model.flow.encode))
    monkeypatch.setattr(model.flow.length_regulator, "forward", counted("length_regulator", model.flow.length_regulator.forward))
    monkeypatch.setattr(model.vocoder, "recorded_decode", counted("recorded_decode", model.vocoder.recorded_decode))
    pool = StreamPool(model)
    for seed in range(3):
        voice, _ = listen(pool, speaker, seed)
        voice.push(codes(90, seed))
        voice.finish()
    odd, _ = listen(pool, speaker, 7)
    odd.push(codes(10, 7))
    odd.finish()
    calls = work(pool)
    for name, found in rows.items():
        assert found.count(3) >= calls - 1 and found.count(1) == 1 and set(found) == {1, 3}, (name, found)


def test_codes_that_come_late_and_pauses_change_nothing(model: Token2Wav, speaker: Speaker) -> None:
    pool = StreamPool(model)
    reply = codes(70, 5)
    (voice, heard), (other, other_heard) = listen(pool, speaker, 1), listen(pool, speaker, 2)
    for start in range(0, 70, 7):
        voice.push(reply[start : start + 7])
        voice.slow(start in (21, 28, 35))
        other.push(reply[start : start + 3])
        work(pool)
    assert heard and heard[-1] is not None, "sound comes while codes come"
    voice.slow(False)
    voice.finish()
    other.finish()
    work(pool)
    assert np.abs(sound(heard) - np.concatenate(list(model.stream(reply, speaker, seed=1)))).max() < 2e-3
    assert len(sound(other_heard))


def test_a_cancelled_reply_makes_no_more_sound_and_a_wrong_code_ends_its_reply_only(model: Token2Wav, speaker: Speaker) -> None:
    pool = StreamPool(model)
    (cancelled, heard), (wrong, wrong_heard), (good, good_heard) = (listen(pool, speaker, i) for i in range(3))
    for voice in (cancelled, good):
        voice.push(codes(60, 1))
    wrong.push([10**6] * 30)
    pool.work()
    before = len(heard)
    cancelled.cancel()
    good.finish()
    work(pool)
    assert heard[before:] == [None] and cancelled.failed is None
    assert wrong_heard == [None] and isinstance(wrong.failed, ValueError)
    assert len(sound(good_heard)) and len(pool) == 0


def test_a_cancelled_reply_ends_in_one_call_however_many_windows_fill_it(
    model: Token2Wav, speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Token2Wav, "batch_frames", 1)  # a call solves one window
    pool = StreamPool(model)
    (first, first_heard), (second, second_heard) = (listen(pool, speaker, i) for i in range(2))
    for voice in (first, second):
        voice.push(codes(60, 1))
    second.cancel()
    pool.work()
    assert len(sound([*first_heard, None])) and second_heard == [None] and list(pool._voices) == [first]


def test_the_thread_serves_and_closes(model: Token2Wav, speaker: Speaker) -> None:
    import threading

    pool = StreamPool(model)
    pool.start()
    ended = threading.Event()
    heard: list[np.ndarray] = []

    def take(samples: np.ndarray | None) -> None:
        if samples is None:
            ended.set()
        else:
            heard.append(samples)

    voice = pool.open(speaker, 0, take)
    voice.push(codes(30, 0))
    voice.finish()
    assert ended.wait(30) and heard
    ended.clear()
    pool.open(speaker, 0, take).push(codes(5, 0))
    pool.close()
    assert ended.is_set()


@pytest.mark.parametrize("cancel", [False, True], ids=["said to its end", "cancelled"])
def test_a_reply_that_has_ended_holds_no_state_of_the_networks(model: Token2Wav, speaker: Speaker, cancel: bool) -> None:
    """Megabytes for each reply: they may not wait for Python's search for circles of references."""
    pool = StreamPool(model)
    voice, heard = listen(pool, speaker, 3)
    states = [weakref.ref(voice._flow), weakref.ref(voice._vocoder)]
    gc.disable()
    try:
        voice.push(codes(40, 3))
        if cancel:
            voice.cancel()
        else:
            voice.finish()
        work(pool)
        assert heard[-1] is None and [state() for state in states] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize(("few_shapes", "sizes"), [(False, [11, 2]), (True, [8, 2, 1, 2])])
def test_inputs_of_one_shape_go_in_one_call_or_in_few_shapes(few_shapes: bool, sizes: list[int]) -> None:
    called = []

    def twice(x: Tensor) -> Tensor:
        called.append(len(x))
        return 2 * x

    inputs = [torch.full((3 if n in (4, 9) else 2,), float(n)) for n in range(13)]
    made = alike_together(twice, inputs, few_shapes=few_shapes)
    assert called == sizes and all(torch.equal(found, 2 * given) for found, given in zip(made, inputs, strict=True))
