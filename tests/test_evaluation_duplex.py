"""The paced client against a Realtime server on this machine: what is recorded, when, and what it comes to."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from osum_echat.audio import io as audio_io
from osum_echat.cli import main as command
from osum_echat.evaluation.duplex import run as duplex
from osum_echat.evaluation.duplex.client import RATE, Conversation, LiveError, Recording, Settings, hold
from osum_echat.evaluation.duplex.measures import Segment, read_segments, segments, turns
from osum_echat.evaluation.duplex.run import cases
from osum_echat.evaluation.duplex.timeline import Timeline
from osum_echat.evaluation.results import Result
from tests import virtual_time
from tests.evaluation_case import item, score
from tests.realtime_server import Server

ONE = np.ones(RATE, np.float32)


def spoken(*parts: tuple[float, bool]) -> np.ndarray:
    """Sound and silence of so many seconds."""
    return np.concatenate([(0.3 if loud else 0.0) * np.sin(np.arange(int(s * RATE)) / 9).astype(np.float32) for s, loud in parts])


# ---- timeline, measures --------------------------------------------------------------------------------------------------------------


def test_pieces_are_played_one_after_the_other_and_late_ones_leave_a_gap():
    line = Timeline(RATE)
    line.play(1.0, ONE, "r")
    line.play(1.2, 2 * ONE, "r")  # came early: waits for the first
    line.play(5.0, ONE, "s")
    line.play(6.5, ONE, "s")
    assert [(s.start, s.end) for s in line.answers()] == [(1.0, 3.0), (5.0, 7.5)] and line.gaps() == pytest.approx(0.5)
    line.pieces.pop(), line.stretches.pop()
    assert [(s.start, s.end, s.response) for s in line.stretches] == [(1.0, 3.0, "r"), (5.0, 6.0, "s")]
    samples = line.samples(7.0)
    assert len(samples) == 7 * RATE
    assert [samples[int(t * RATE)] for t in (0.5, 1.5, 2.5, 4.0, 5.5, 6.5)] == [0, 1, 2, 0, 1, 0]


def test_what_was_not_played_when_it_was_stopped_is_forgotten():
    line = Timeline(RATE)
    line.play(1.0, ONE, "r")
    line.play(1.0, ONE, "r")
    assert line.stop(1.5) == pytest.approx(1.5) and line.playhead == 1.5
    assert [(s.start, s.end) for s in line.stretches] == [(1.0, 1.5)]
    samples = line.samples(3.0)
    assert samples[int(1.4 * RATE)] == 1 and not samples[int(1.5 * RATE) :].any()
    assert line.stop(2.0) == 0.0


def test_a_persons_segments_are_heard_or_read(tmp_path: Path):
    sound = spoken((0.5, False), (1.0, True), (0.4, False), (0.5, True), (1.5, False), (0.6, True))
    found = read_segments(tmp_path, sound, RATE)
    assert [(round(s.start, 1), round(s.end, 1)) for s in found] == [(0.5, 2.4), (3.9, 4.5)]
    (tmp_path / "turns.json").write_text(json.dumps([{"start": 0.5, "end": 2.4}, {"start": 3.9, "end": 4.5, "kind": "reject"}]))
    assert [s.kind for s in read_segments(tmp_path, sound, RATE)] == ["say", "reject"]
    (tmp_path / "turns.json").write_text('[{"start": 1}]')
    with pytest.raises(ValueError, match="list of objects with start, end"):
        read_segments(tmp_path, sound, RATE)
    (tmp_path / "turns.json").write_text('[{"start": 1, "end": 2, "kind": "shout"}]')
    with pytest.raises(ValueError, match="'shout': use say, reject"):
        read_segments(tmp_path, sound, RATE)
    assert segments(np.zeros(RATE), RATE) == []


def recorded(pieces: list[tuple[float, float]], **events: list[float]) -> Recording:
    line = Timeline(RATE)
    for n, (start, end) in enumerate(pieces):
        line.play(start, np.ones(int((end - start) * RATE), np.float32), str(n))
    noted = [{"t": t, "from": "server", "type": f"input_audio_buffer.{kind}"} for kind, times in events.items() for t in times]
    return Recording(line, noted)


def test_delays_interruptions_and_rejections():
    answered, missed = turns([Segment(0, 1), Segment(4, 5)], recorded([(1.5, 2.5)], committed=[1.3]))
    assert (answered.answered, answered.delay, answered.after_commit) == (True, 0.5, pytest.approx(0.2))
    assert not missed.answered and missed.delay is None
    first, second = turns([Segment(0, 1), Segment(2, 3)], recorded([(1.5, 2.2), (3.4, 4.4)], speech_started=[0.1, 2.2]))
    assert not first.interrupts and second.interrupts and second.stop == pytest.approx(0.2) and second.delay == pytest.approx(0.4)
    late = Recording(Timeline(RATE), [{"t": 2.3, "from": "server", "type": "input_audio_buffer.speech_started"}])
    for at in (1.5, 1.9):  # the person begins in a gap of the answer
        late.timeline.play(at, ONE[: RATE // 10], "r")
    late.timeline.play(2.1, ONE, "r")
    late.timeline.stop(2.3)
    _, between = turns([Segment(0, 1), Segment(2.05, 3)], late)
    assert between.interrupts and between.stop == pytest.approx(0.25)
    (_, talked_over) = turns([Segment(0, 1), Segment(2, 3)], recorded([(1.5, 5.0)]))
    assert talked_over.interrupts and talked_over.stop is None and not talked_over.answered
    noise = [Segment(0, 1, "reject")]
    assert turns(noise, recorded([]))[0].rejected is True
    assert turns(noise, recorded([(2.0, 3.0)]))[0].rejected is False
    assert turns([Segment(2, 2.5, "reject")], recorded([(1.5, 5.0)]))[0].rejected is True  # it went on speaking
    assert turns([Segment(2, 2.5, "reject")], recorded([(1.5, 2.1)], speech_started=[2.1]))[0].rejected is False


def test_segments_are_counted_by_what_they_are_about():
    rows = [
        {"kind": "say", "answered": True, "delay": 0.4, "after_commit": 0.1, "interrupts": False},
        {"kind": "say", "answered": False, "interrupts": True, "stop": 0.2},
        {"kind": "say", "answered": True, "delay": 0.8, "interrupts": True},
        {"kind": "reject", "rejected": True},
    ]
    values = score("live", item(), Result("a", timings={"turns": rows})).values
    assert values["delay"] == (pytest.approx(1.2), 2) and values["answered"] == (2, 3) and values["after_commit"] == (0.1, 1)
    assert values["interrupted"] == (1, 2) and values["stop"] == (0.2, 1) and values["rejected"] == (1, 1)
    assert values["gaps"] == (0.0, 1)
    assert score("live", item(), Result("a")) is None


# ---- against a server: in virtual time, so that every time is exact on any machine -----------------------------------------------------

EXACT = 0.001


def held(server: Server, sound: np.ndarray, **settings: Any) -> Recording:
    async def talk() -> Recording:
        async with server.serving():
            return await Conversation(Settings(server.url, **settings)).hold(sound)

    return virtual_time.run(talk())


def test_a_turn_is_answered_and_the_delays_are_the_servers_own():
    sound = spoken((0.3, False), (0.7, True), (0.6, False))
    server = Server(latency=0.2, answer=0.5)
    recording = held(server, sound, key="secret", tail=0.3)
    (turn,) = turns(segments(sound, RATE), recording)
    assert server.after_commit == [pytest.approx(0.2)]
    assert turn.answered and turn.after_commit == pytest.approx(0.2, abs=EXACT)
    assert recording.times("input_audio_buffer.committed") == [pytest.approx(1.3, abs=EXACT)]  # 0.3 s of silence
    assert turn.delay == pytest.approx(0.5, abs=EXACT)
    assert recording.text == "la la la la la" and server.headers == ["Bearer secret"]
    out = recording.timeline.samples()
    assert np.flatnonzero(np.abs(out) > 0.05)[0] / RATE == pytest.approx(1.5, abs=EXACT)
    assert recording.seconds == pytest.approx(1.5 + 0.5 + 0.3, abs=0.02 + EXACT)  # the answer and the tail, to the chunk
    update = server.received[0]["session"]
    assert update["type"] == "realtime" and update["audio"]["input"]["format"] == {"type": "audio/pcm", "rate": 24000}


def test_a_person_is_heard_at_the_speed_of_life():
    sound = spoken((0.5, True), (0.5, False))
    server = Server(silence=99.0)
    recording = held(server, sound, patience=0.5, tail=0.2)
    # The first chunk has been spoken.
    assert recording.times("input_audio_buffer.speech_started") == [pytest.approx(0.02, abs=EXACT)]
    assert recording.seconds == pytest.approx(1.5, abs=0.02 + EXACT) and not recording.timeline.stretches  # patience is over


@pytest.mark.parametrize("paced", [True, False])
def test_an_interrupted_answer_is_stopped_and_the_server_is_told_what_was_heard(paced: bool):
    sound = spoken((0.6, True), (1.5, False), (0.6, True), (0.5, False))
    server = Server(latency=0.1, answer=5.0, paced=paced)
    recording = held(server, sound, tail=0.3, patience=12.0)
    first, second = turns(segments(sound, RATE), recording)
    assert first.answered and first.delay == pytest.approx(0.4, abs=EXACT) and second.interrupts and second.answered
    noticed = 2.1 + 0.02  # the chunk in which the person begins again
    assert recording.times("input_audio_buffer.speech_started")[1] == pytest.approx(noticed, abs=EXACT)
    assert second.stop == pytest.approx(0.02, abs=EXACT) and second.delay == pytest.approx(0.4, abs=EXACT)
    truncate = next(event for event in server.received if event["type"] == "conversation.item.truncate")
    assert truncate["item_id"] == "i0" and truncate["audio_end_ms"] == pytest.approx(1000 * (noticed - 1.0), abs=1)
    out = np.abs(recording.timeline.samples())
    assert out[int((noticed + EXACT) * RATE) : int((3.1 - EXACT) * RATE)].max() == 0  # silent until the next answer
    assert out[int((noticed - 0.1) * RATE) : int((noticed - EXACT) * RATE)].max() > 0.1


def test_sound_that_comes_too_late_is_a_gap():
    server = Server(latency=0.1, answer=0.5, paced=True, pace=1.5)
    recording = held(server, spoken((0.4, True), (0.4, False)), tail=0.3)
    assert recording.timeline.gaps() == pytest.approx(4 * 0.05, abs=EXACT)  # five pieces of 0.1 s, 0.15 s apart


def test_a_server_that_refuses_or_is_not_there_is_an_error_with_its_words():
    with pytest.raises(LiveError, match="no such voice"):
        held(Server(refuse="no such voice"), spoken((0.1, True)))
    with pytest.raises(LiveError, match="ws://127"):
        hold(Settings("ws://127.0.0.1:9/v1/realtime"), spoken((0.1, True)))


def test_cases_of_both_forms(tmp_path: Path):
    for name in ("b/input.wav", "a/input.wav", "a/output.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        audio_io.write(tmp_path / name, spoken((0.2, True)), RATE)
    assert [case.id for case in cases(tmp_path)] == ["a", "b"]
    flat = tmp_path / "flat"
    flat.mkdir()
    audio_io.write(flat / "x.wav", spoken((0.2, True)), RATE)
    assert [case.id for case in cases(flat)] == ["x"]
    with pytest.raises(ValueError, match="holds no"):
        cases(tmp_path / "none")


def test_the_command_writes_files_in_step_and_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    source, out = tmp_path / "in", tmp_path / "out"
    for name in ("one", "two", "broken"):
        (source / name).mkdir(parents=True)
        audio_io.write(source / name / "input.wav", spoken((0.2, False), (0.5, True), (0.5, False))[::3], 8000)
    (source / "broken" / "input.wav").write_bytes(b"no audio")
    (source / "two" / "turns.json").write_text(json.dumps([{"start": 0.2, "end": 0.7, "kind": "reject"}]))
    server = Server(latency=0.1, answer=0.4)
    monkeypatch.setattr(duplex, "hold", lambda settings, samples: held(server, samples, tail=settings.tail))
    arguments = ["duplex", "--url", server.url, "--in", str(source), "--out", str(out), "--tail", "0.3"]
    assert command(arguments) == 0
    assert command(arguments) == 0  # nothing is held again
    assert len(server.headers) == 2
    values = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert values["scored"] == 2 and values["holes"] == 1 and values["answered"] == 100 and values["rejected"] == 0
    # 0.3 s of silence and the latency; where speech ends is heard in frames of 20 ms.
    assert values["delay"] == pytest.approx(0.4, abs=0.03)
    heard, said = (soundfile.info(str(out / "one" / name)) for name in ("output.wav", "input.wav"))
    assert heard.frames == said.frames and heard.samplerate == 24000
    events = [json.loads(line) for line in (out / "one" / "events.jsonl").read_text().splitlines()]
    kinds = [event["type"] for event in events]
    assert kinds[0] == "session.update" and "response.output_audio.delta" in kinds
    assert all("delta" not in event for event in events if event["type"] == "response.output_audio.delta")
    assert (out / "report.html").is_file()


def test_a_conversation_that_failed_is_held_again_and_one_that_was_held_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("one", "two"):
        (tmp_path / "in" / name).mkdir(parents=True)
        audio_io.write(tmp_path / "in" / name / "input.wav", spoken((0.3, True), (0.4, False)), RATE)
    server = Server(latency=0.1, answer=0.1)
    known: list[str] = []

    def hold_one(settings: Settings, samples: np.ndarray) -> Recording:
        known.append("x")
        if len(known) == 2:
            raise LiveError("nobody there")
        return held(server, samples, tail=0.1)

    monkeypatch.setattr(duplex, "hold", hold_one)
    results = [list(duplex.play_all(Settings(server.url), tmp_path / "in", tmp_path / "out")) for _ in range(3)]
    assert [[(r.id, r.error) for r in found] for found in results] == [
        [("one", None), ("two", "nobody there")],
        [("two", None)],
        [],
    ]


def test_a_conversation_runs_by_the_clock_of_this_machine_too():
    """The one test in real time: how long it takes at least, and the order of what happens."""

    async def talk() -> Recording:
        async with server.serving():
            return await Conversation(Settings(server.url, tail=0.1)).hold(spoken((0.4, True), (0.4, False)))

    server = Server(latency=0.05, answer=0.2)
    began = time.perf_counter()
    recording = asyncio.run(talk())
    assert time.perf_counter() - began >= recording.seconds >= 0.7 + 0.05 + 0.2 + 0.1
    (started,), (committed,) = (recording.times(f"input_audio_buffer.{kind}") for kind in ("speech_started", "committed"))
    (answer,) = recording.timeline.answers()
    assert started < committed < answer.start and committed >= 0.7 and answer.start - committed >= server.after_commit[0] - 0.01


# ---- against this project's own server -------------------------------------------------------------------------------------------------


def test_delays_are_those_of_the_live_servers_own_metrics(monkeypatch: pytest.MonkeyPatch):
    """The whole server with a model that is a script: it thinks 0.25 s before the first sound."""
    from osum_echat.serving import app
    from tests.live_case import FakeBackend, answer
    from tests.test_live_server import serving

    async def talk() -> tuple[Recording, float, float]:
        async with serving(FakeBackend(lambda turn: [0.25, *answer(turn)])) as running:
            recording = await Conversation(Settings(f"{running.ws}/v1/realtime", tail=0.4)).hold(sound)
            metrics = running.server.metrics.registry
            names = [f"osum_echat_time_to_first_audio_seconds_{kind}" for kind in ("sum", "count")]
            found = [sum(s.value for m in metrics.collect() for s in m.samples if s.name == name) for name in names]
        return recording, *found

    sound = spoken((0.4, False), (1.2, True), (1.6, False), (1.0, True), (1.2, False))
    in_the_loops_time = functools.partial(app.RealtimeSession, clock=lambda: asyncio.get_running_loop().time())
    monkeypatch.setattr(app, "RealtimeSession", in_the_loops_time)
    recording, total, count = virtual_time.run(talk())
    found = turns(segments(sound, RATE), recording)
    assert [turn.answered for turn in found] == [True, True] and count == 2
    assert [turn.after_commit for turn in found] == [pytest.approx(total / count, abs=0.01)] * 2
    assert total / count == pytest.approx(0.25, abs=0.01)
    assert "Hello there, friend." in recording.text
