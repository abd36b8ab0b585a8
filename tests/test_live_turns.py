"""Turn taking: counted in samples, whatever the pieces; strict limits; short sounds during a reply are no interruption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_echat.audio import g711
from osum_echat.audio.io import to_mono_16k
from osum_echat.serving.realtime.audio import Input, Output, from_pcm16, to_pcm16
from osum_echat.serving.realtime.pace import Playback
from osum_echat.serving.realtime.turns import Dismissed, Move, Started, Stopped, Suspected, TurnDetector, TurnRules
from osum_echat.serving.vad import FRAME, RATE, EnergyVad, TurnModels


class LoudVad:
    """Probability is the loudest sample."""

    def __call__(self, frame: np.ndarray) -> float:
        return float(np.abs(frame).max())

    def reset(self) -> None: ...


def sound(*parts: tuple[float, float]) -> np.ndarray:
    """(seconds, loudness) one after the other."""
    return np.concatenate([np.full(round(seconds * RATE), loud, dtype=np.float32) for seconds, loud in parts])


def detector(end_of_turn=None, **rules) -> TurnDetector:
    return TurnDetector(LoudVad(), end_of_turn, TurnRules(**rules))


def push(to: TurnDetector, samples: np.ndarray, piece: int = 480) -> list[Move]:
    moves: list[Move] = []
    for start in range(0, len(samples), piece):
        moves += to.push(samples[start : start + piece])
    return moves


def plain(moves: list[Move]) -> list[tuple]:
    return [(type(m).__name__, m.at, len(m.samples) if isinstance(m, Stopped) else None) for m in moves]


SPOKEN = sound((0.5, 0), (1.0, 0.9), (0.3, 0), (0.6, 0.9), (2.0, 0), (0.4, 0.9), (1.5, 0))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 9000), min_size=1, max_size=30), st.sampled_from(["server_vad", "semantic_vad"]))
def test_moves_do_not_depend_on_how_the_sound_is_cut(pieces: list[int], mode: str) -> None:
    whole, cut = detector(mode=mode), detector(mode=mode)
    expected = plain(whole.push(SPOKEN))
    found, start = [], 0
    for piece in [*pieces, len(SPOKEN)]:
        found += cut.push(SPOKEN[start : start + piece])
        start += piece
    assert plain(found) == expected


@pytest.mark.parametrize("silence_ms", [200, 500, 900])
def test_server_vad_ends_a_turn_strictly_after_its_silence(silence_ms: int) -> None:
    moves = push(detector(silence_ms=silence_ms), sound((0.48, 0), (0.96, 0.9), (2.0, 0)))
    assert [type(m) for m in moves] == [Suspected, Started, Stopped]
    stopped = moves[-1]
    assert isinstance(stopped, Stopped)
    end_of_speech = round(1.44 * RATE)
    assert end_of_speech + silence_ms * 16 <= stopped.at <= end_of_speech + silence_ms * 16 + FRAME
    assert moves[1].at == stopped.start and abs(stopped.start - round(0.18 * RATE)) <= FRAME, "300 ms of prefix"


def test_a_pause_shorter_than_the_silence_does_not_end_a_turn() -> None:
    moves = push(detector(silence_ms=500), SPOKEN)
    stops = [m for m in moves if isinstance(m, Stopped)]
    assert len(stops) == 2 and len(stops[0].samples) > 1.9 * RATE, "1.0 s, a pause of 0.3 s, 0.6 s"


def test_the_end_of_turn_model_is_asked_once_for_each_pause_and_can_end_the_turn() -> None:
    asked: list[int] = []

    def finished(turn: np.ndarray) -> float:
        asked.append(len(turn))
        return 0.9 if len(asked) == 2 else 0.1

    moves = push(detector(finished, mode="semantic_vad"), sound((1.0, 0.9), (0.6, 0), (1.0, 0.9), (3.0, 0)))
    assert len(asked) == 2
    stopped = moves[-1]
    assert isinstance(stopped, Stopped) and stopped.asked and stopped.at < 2.9 * RATE


def test_the_end_of_turn_model_hears_exactly_the_turn_that_is_answered() -> None:
    asked: list[np.ndarray] = []

    def finished(turn: np.ndarray) -> float:
        asked.append(turn)
        return 1.0

    [*_, stopped] = push(detector(finished, mode="semantic_vad"), sound((0.5, 0), (1.0, 0.9), (1.0, 0)))
    assert isinstance(stopped, Stopped) and stopped.asked
    np.testing.assert_array_equal(stopped.samples, asked[0])


def interrupting(mode: str, likely: float, *parts: tuple[float, float]) -> tuple[list[str], int]:
    """Moves of sound during a reply, and how often the backchannel model was asked."""
    asked: list[int] = []

    def backchannel(speech: np.ndarray) -> float:
        asked.append(len(speech))
        return likely

    listening = TurnDetector(LoudVad(), None, TurnRules(mode=mode), backchannel)
    listening.playing = True
    return [type(m).__name__ for m in push(listening, sound(*parts))], len(asked)


def test_a_backchannel_needs_twice_as_long_to_interrupt() -> None:
    said, silence = (0.7, 0.9), (3.0, 0)
    assert interrupting("semantic_vad", 0.9, said, silence) == (["Suspected", "Dismissed"], 1)
    assert interrupting("semantic_vad", 0.1, said, silence) == (["Suspected", "Started", "Stopped"], 1)
    assert interrupting("semantic_vad", 0.9, (1.2, 0.9), silence) == (["Suspected", "Started", "Stopped"], 1), "longer than any"
    assert interrupting("server_vad", 0.9, said, silence) == (["Suspected", "Started", "Stopped"], 0), "by length alone"
    assert interrupting("semantic_vad", 0.9, (0.3, 0.9), silence) == (["Suspected", "Dismissed"], 0), (
        "too short to be asked about"
    )


@pytest.mark.parametrize(("eagerness", "limit"), [("low", 8.0), ("medium", 4.0), ("auto", 4.0), ("high", 2.0)])
def test_a_turn_ends_after_a_limit_when_the_model_never_says_so(eagerness: str, limit: float) -> None:
    moves = push(detector(lambda _: 0.0, mode="semantic_vad", eagerness=eagerness), sound((1.024, 0.9), (9.0, 0)))
    stopped = moves[-1]
    assert isinstance(stopped, Stopped) and not stopped.asked
    assert 0 <= stopped.at - (1.024 + limit) * RATE <= FRAME


def test_a_short_sound_during_a_reply_is_no_interruption_and_leaves_nothing_behind() -> None:
    listening = detector()
    listening.playing = True
    assert [type(m) for m in push(listening, sound((0.5, 0), (0.3, 0.9), (1.0, 0)))] == [Suspected, Dismissed]
    assert listening.buffered <= (0.3 + 0.1) * RATE
    moves = push(listening, sound((0.7, 0.9), (1.0, 0)))
    assert [type(m) for m in moves] == [Suspected, Started, Stopped]
    started = moves[1]
    assert isinstance(started, Started) and 0.45 * RATE <= started.confirmed - started.at - 0.3 * RATE <= 0.55 * RATE


def test_the_threshold_is_raised_while_a_reply_is_played() -> None:
    for playing in (False, True):
        listening = detector(threshold=0.5)
        listening.playing = playing
        assert any(isinstance(m, Started) for m in push(listening, sound((0.3, 0), (1.0, 0.6)))) != playing


def test_without_detection_nothing_happens_and_the_client_takes_all() -> None:
    listening = detector(mode="none")
    assert push(listening, SPOKEN) == []
    start, samples = listening.take()
    assert start == 0 and np.array_equal(samples, SPOKEN) and listening.buffered == 0


def test_a_turn_cannot_be_longer_than_its_limit_nor_memory_grow_in_silence() -> None:
    moves = push(detector(max_turn_s=2.0), sound((7.0, 0.9)))
    stops = [m for m in moves if isinstance(m, Stopped)]
    assert len(stops) >= 2 and all(len(m.samples) <= 2.1 * RATE for m in stops)
    listening = detector()
    push(listening, sound((60.0, 0)))
    assert listening.buffered < RATE


def test_the_networks_hear_the_speech_of_a_recording_and_its_end() -> None:
    turn_models = TurnModels.load()
    assert turn_models.names == ("silero", "smart-turn v3.2")
    speech = to_mono_16k(Path("assets/demo/1_adult_male_happy.ogg"))
    silence = np.zeros(RATE, dtype=np.float32)
    given_sound = np.concatenate([silence, speech, silence])
    moves = push(TurnDetector(turn_models.new_vad(), turn_models.end_of_turn, TurnRules(mode="server_vad")), given_sound)
    assert [type(m) for m in moves] == [Suspected, Started, Stopped]
    stopped = moves[-1]
    assert isinstance(stopped, Stopped) and abs(len(stopped.samples) - len(speech)) < 0.8 * RATE


def test_the_end_of_turn_model_says_what_it_says_to_its_makers() -> None:
    """Probabilities computed with the preparation of pipecat-ai 1.14.0."""
    end_of_turn = TurnModels.load().end_of_turn
    assert end_of_turn is not None
    for name, expected in (("1_adult_male_happy", 0.9042), ("4_child_female_surprised", 0.1028)):
        assert end_of_turn(to_mono_16k(Path(f"assets/demo/{name}.ogg"))) == pytest.approx(expected, abs=0.02)


def test_energy_serves_where_the_networks_are_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("osum_echat.serving.models.FOLDER", tmp_path)
    turn_models = TurnModels.load()
    assert turn_models.names == ("energy", "silence") and isinstance(turn_models.new_vad(), EnergyVad)
    speech = to_mono_16k(Path("assets/demo/1_adult_male_happy.ogg"))
    given_sound = np.concatenate([np.zeros(RATE, dtype=np.float32), speech, np.zeros(2 * RATE, dtype=np.float32)])
    moves = push(TurnDetector(turn_models.new_vad(), None, TurnRules(mode="semantic_vad")), given_sound)
    assert isinstance(moves[-1], Stopped)


def test_a_changed_model_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("osum_echat.serving.models.FOLDER", tmp_path)
    (tmp_path / "silero_vad_16k_op15.onnx").write_bytes(b"something else")
    with pytest.raises(ValueError, match="install the package again"):
        TurnModels.load()


@pytest.mark.parametrize("law", ["mu", "a"])
def test_g711_bytes_survive_and_samples_come_close(law: g711.Law) -> None:
    every = bytes(range(256))
    again = g711.encode(g711.decode(every, law), law)
    assert np.array_equal(g711.decode(again, law), g711.decode(every, law))
    samples = np.linspace(-0.98, 0.98, 4001, dtype=np.float32)
    error = np.abs(g711.decode(g711.encode(samples, law), law) - samples)
    assert (error <= np.maximum(np.abs(samples) / 16, 0.002)).all()
    assert g711.decode(b"\xff" if law == "mu" else b"\xd5", law)[0] == pytest.approx(0, abs=3e-4), "silence"


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=20), st.sampled_from(["audio/pcm", "audio/pcmu", "audio/pcma"]))
def test_input_does_not_depend_on_where_the_bytes_are_cut(cuts: list[int], kind: str) -> None:
    wave = np.sin(np.arange(6000) / 9).astype(np.float32) / 2
    data = to_pcm16(wave) if kind == "audio/pcm" else g711.encode(wave, "mu" if kind == "audio/pcmu" else "a")
    whole = Input(kind)
    expected = np.concatenate([whole.push(data), whole.flush()])
    pieces, start, found = Input(kind), 0, []
    for cut in [*cuts, len(data)]:
        found.append(pieces.push(data[start : start + cut]))
        start += cut
    assert np.allclose(np.concatenate([*found, pieces.flush()]), expected, atol=1e-4)


def test_output_is_as_long_as_the_samples() -> None:
    for kind, rate in (("audio/pcm", 24000), ("audio/pcmu", 8000), ("audio/pcma", 8000)):
        out = Output(kind, 22050)
        data = b"".join(out.push(np.zeros(2205, dtype=np.float32), last=i == 9) for i in range(10))
        assert abs(out.seconds(data) - 1.0) < 0.01 and out.rate == rate
    assert np.allclose(from_pcm16(to_pcm16(np.array([0.5, -1.0, 1.0], dtype=np.float32))), [0.5, -1, 1], atol=1e-4)


def test_playback_follows_the_clock_and_notices_gaps() -> None:
    now = 0.0
    playback = Playback(lambda: now, ahead=2.0)
    playback.send(3.0)
    assert playback.wait() == pytest.approx(1.0) and playback.played == 0
    now = 1.5
    assert playback.played == pytest.approx(1.5) and playback.wait() == 0
    now = 4.0
    assert playback.played == pytest.approx(3.0)
    playback.send(1.0)
    assert playback.gaps == [pytest.approx(1.0)] and playback.left == pytest.approx(1.0)
    now = 4.5
    assert playback.played == pytest.approx(3.5)


def test_a_reply_that_is_sent_while_another_sounds_is_played_behind_it() -> None:
    now = 10.0
    first = Playback(lambda: now, ahead=2.0)
    first.send(1.5)
    between = Playback(lambda: now, 2.0, first)  # a reply without sound
    second = Playback(lambda: now, 2.0, between)
    second.send(1.0)
    assert second.left == pytest.approx(2.5) and second.wait() == pytest.approx(0.5) and second.played == 0
    now = 11.0
    assert first.played == pytest.approx(1.0) and second.played == 0
    now = 11.75
    assert first.left == 0 and second.played == pytest.approx(0.25) and not second.gaps
    second.stop()
    third = Playback(lambda: now, 2.0, second)
    third.send(1.0)
    assert second.left == 0 and third.left == pytest.approx(1.0), "what was stopped is waited for by nobody"
