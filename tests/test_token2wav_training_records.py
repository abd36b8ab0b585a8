"""Reading of record lists and the plan of batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_echat.training.token2wav.records import Batches, Features, ListConfig, Utterance, pad, read_lists, train_and_valid
from tests.token2wav_training_case import write_records


def _config(path: Path, **more: object) -> ListConfig:
    return ListConfig(lists=[path], **more)  # type: ignore[arg-type]


def test_unusable_records_are_counted_by_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_records(tmp_path, 4)
    (tmp_path / "broken.wav").write_bytes(b"not audio")
    good = json.loads(path.read_text().splitlines()[0])
    bad = [
        "{not json",
        json.dumps({"key": "no wav"}),
        json.dumps({**good, "wav": "gone.wav"}),
        json.dumps({**good, "wav": "broken.wav"}),
    ]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(bad) + "\n")
    caplog.set_level("INFO")
    assert len(read_lists([path], _config(path))) == 4
    assert "2 x not a readable record" in caplog.text
    assert "2 x audio cannot be read" in caplog.text
    assert f"{path}:5" in caplog.text


def test_what_a_training_needs_is_required(tmp_path: Path) -> None:
    path = write_records(tmp_path, 4)
    assert len(read_lists([path], _config(path), need=("voice", "phones"))) == 4
    with pytest.raises(ValueError, match="4 x has no tokens"):
        read_lists([path], _config(path), need=("tokens",))


def test_voices_choose_and_their_fields_name_them(tmp_path: Path) -> None:
    path = write_records(tmp_path, 6)
    assert {u.voice for u in read_lists([path], _config(path, voices=["low"]))} == {"low"}
    fields = _config(path, voice_fields=["voice", "age"])
    assert {u.voice for u in read_lists([path], fields)} == {"low", "high"}  # nobody has an age here


def test_lists_are_patterns_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    write_records(tmp_path, 4)
    assert len(read_lists([tmp_path / "*.jsonl"], _config(tmp_path / "*.jsonl"))) == 4
    with pytest.raises(ValueError, match="record list not found"):
        read_lists([tmp_path / "nothing*.jsonl"], _config(tmp_path))
    with pytest.raises(ValueError, match=r"data\.lists is empty"):
        ListConfig()


def test_lengths_outside_the_limits_are_left_out(tmp_path: Path) -> None:
    path = write_records(tmp_path, 6)  # 0.8, 1.0 and 1.2 s
    assert len(read_lists([path], _config(path, min_seconds=0.9, max_seconds=1.1))) == 2


def test_held_out_and_training_records_share_nothing(tmp_path: Path) -> None:
    path = write_records(tmp_path, 8)
    train, valid = train_and_valid(_config(path, held_out=2))
    assert len(valid) == 2
    assert {u.key for u in train}.isdisjoint({u.key for u in valid})
    assert len(train) + len(valid) == 8


def test_a_limit_takes_records_from_all_over_the_lists_not_only_the_first_voice(tmp_path: Path) -> None:
    lines = write_records(tmp_path, 12).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    for number, record in enumerate(records):
        record["extra"]["voice"] = "first" if number < 8 else "second"
    path = tmp_path / "by_voice.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    train, _ = train_and_valid(_config(path, held_out=2, max_records=4))
    assert len(train) == 4
    assert {u.voice for u in train} == {"first", "second"}


@given(count=st.integers(1, 60), size=st.integers(1, 9), seed=st.integers(0, 5), pool=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_an_epoch_uses_each_utterance_at_most_once_and_depends_on_the_seed_alone(
    count: int, size: int, seed: int, pool: int
) -> None:
    seconds = np.random.default_rng(1).random(count).tolist()
    batches = Batches(seconds, size, seed, pool)
    epoch = [batches(step) for step in range(batches.per_epoch)]
    flat = [i for batch in epoch for i in batch]
    assert len(flat) == len(set(flat))
    assert len(flat) > count - min(size, count)
    assert all(len(batch) == batches.size for batch in epoch)
    again = Batches(seconds, size, seed, pool)
    steps = list(np.random.default_rng(seed).permutation(2 * batches.per_epoch))
    assert all(again(int(s)) == Batches(seconds, size, seed, pool)(int(s)) for s in steps[:4])


def test_a_batch_holds_similar_lengths() -> None:
    seconds = np.random.default_rng(0).random(400).tolist()
    batches = Batches(seconds, 8, 0)
    spread = [np.ptp([seconds[i] for i in batches(step)]) for step in range(batches.per_epoch)]
    assert float(np.mean(spread)) < 0.25


def test_audio_that_fails_later_is_left_out_of_its_batch_and_counted() -> None:
    utterances = [Utterance(f"u{i}", Path(f"{i}.wav"), "", 1.0) for i in range(3)]
    calls = []

    def compute(utterance: Utterance) -> str:
        calls.append(utterance.key)
        if utterance.key == "u1":
            raise OSError("gone")
        return utterance.key

    features = Features(utterances, compute)
    assert features.batch([0, 1, 2]) == ["u0", "u2"]
    assert features.batch([1, 2]) == ["u2"]
    assert features.skips.counts == {"OSError": 1}
    assert calls == ["u0", "u1", "u2"]  # once each
    with pytest.raises(RuntimeError, match="u1"):
        features.batch([1])


def test_padding_rounds_up_and_keeps_the_rows() -> None:
    out, lengths = pad([np.ones((3, 2)), np.full((5, 2), 2.0)], multiple=4, value=-1.0)
    assert out.shape == (2, 8, 2)
    assert lengths.tolist() == [3, 5]
    assert out[0, :, 0].tolist() == [1, 1, 1, -1, -1, -1, -1, -1]
