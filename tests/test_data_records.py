"""One way to read a record: `open_source(list).records()`, whatever the form of the list and wherever its files lie."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from osum_echat.data.convert import convert
from osum_echat.data.sources import open_source
from osum_echat.dialogue.record import Record, RecordError
from osum_echat.training.token2wav.records import ListConfig, read_lists
from tests.data_case import record, wav_bytes, write_raw

FAKE = Path("common_utils/fake_data")
FAKE_LISTS = (FAKE / "raw/data.list", FAKE / "shard/shards_list.txt", FAKE / "combine/combines_list.txt")


def read(path: Path | str) -> list[Record]:
    """All records, which must be good ones."""
    found = list(open_source(str(path)).records())
    assert all(isinstance(item, Record) for item in found), found
    return [item for item in found if isinstance(item, Record)]


def plain(item: Record) -> Record:
    """Without what says where it was read."""
    wavs = [wav if not isinstance(wav, str) else Path(wav).read_bytes() for wav in (item.wav, *(t.wav for t in item.history))]
    history = tuple(replace(turn, wav=wav) for turn, wav in zip(item.history, wavs[1:], strict=True))
    return replace(item, wav=wavs[0], history=history, source="", line=0)


def test_the_fake_lists_of_every_form_hold_the_same_records():
    raw, shard, combine = ([plain(item) for item in read(path)] for path in FAKE_LISTS)
    assert len(raw) == len(combine) and raw == shard
    assert [item.key for item in combine] == [item.key for item in raw]
    assert [item.wav for item in combine] == [item.wav for item in raw]


def test_every_item_of_a_combined_set_is_a_record_or_says_why_not():
    for item in open_source(str(FAKE_LISTS[2])).items():
        assert item.fields is not None or item.problems
        assert isinstance(item.record(), Record)


@pytest.mark.parametrize("form", ["raw", "shard", "combine"])
def test_the_form_of_a_list_is_found_whatever_its_name(form: str, tmp_path: Path):
    raw = write_raw(tmp_path / "raw", [record(n) for n in range(3)])
    shard = convert(raw, str(tmp_path / "shard"), "shard", per_tar=2, workers=1, progress=False).path
    combine = convert(shard, str(tmp_path / "combine"), "combine", workers=1, progress=False).path
    path = Path({"raw": raw, "shard": shard, "combine": combine}[form])
    other = path.with_name("my_training_set")
    shutil.copy(path, other)
    assert open_source(str(other)).form == form
    assert [plain(item) for item in read(other)] == [plain(item) for item in read(raw)]


def test_a_tar_is_a_list_of_its_samples(tmp_path: Path):
    raw = write_raw(tmp_path / "raw", [record(n) for n in range(3)])
    convert(raw, str(tmp_path / "shard"), "shard", per_tar=9, workers=1, progress=False)
    tar = next((tmp_path / "shard").glob("*.tar"))
    packed = tmp_path / "set.tar.gz"
    packed.write_bytes(gzip.compress(tar.read_bytes()))
    assert [plain(item) for item in read(tar)] == [plain(item) for item in read(packed)] == [plain(item) for item in read(raw)]


def one_record(folder: Path, wav: str) -> Path:
    path = folder / "data.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"key": "a", "wav": wav, "txt": "x", "task": "<TRANSCRIBE>"}) + "\n", encoding="utf-8")
    return path


def test_a_recording_is_looked_for_beside_its_list_then_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "wav").mkdir(parents=True)
    (there / "wav").mkdir(parents=True)
    monkeypatch.chdir(here)
    (here / "wav/a.wav").write_bytes(wav_bytes(seed=1))
    with caplog.at_level(logging.WARNING):
        [item] = read(one_record(there, "wav/a.wav"))
        assert item.wav == "wav/a.wav"
        (there / "wav/a.wav").write_bytes(wav_bytes(seed=2))
        [item] = read(there / "data.jsonl")
        assert item.wav == str(there / "wav/a.wav"), "the list's folder goes first"
        [item] = read(one_record(there, str(here / "wav/a.wav")))
        assert item.wav == str(here / "wav/a.wav")
        monkeypatch.chdir(there)
        [item] = read(one_record(Path("."), "wav/a.wav"))
        assert item.wav == "wav/a.wav"
    assert not caplog.records, "the usual cases need no word"


def test_a_path_of_another_machine_is_searched_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "set/wav").mkdir(parents=True)
    (tmp_path / "set/wav/a.wav").write_bytes(wav_bytes())
    with caplog.at_level(logging.WARNING):
        [item] = read(one_record(tmp_path / "set", "/data/elsewhere/set/wav/a.wav"))
    assert item.wav is not None and str(item.wav).endswith("set/wav/a.wav") and Path(str(item.wav)).is_file()
    assert "which is not there; assumed" in caplog.text


def test_recordings_at_urls_come_as_bytes(tmp_path: Path):
    files = fsspec.filesystem("memory")
    files.pipe("/one/a.wav", wav_bytes())
    files.pipe("/one/data.list", json.dumps({"key": "a", "wav": "a.wav", "txt": "x"}).encode())
    [remote] = read("memory://one/data.list")
    [local] = read(one_record(tmp_path, "memory://one/a.wav"))
    assert remote.wav == local.wav == wav_bytes()
    [missing] = open_source(str(one_record(tmp_path, "memory://one/none.wav"))).records()
    assert isinstance(missing, RecordError) and missing.reason == "audio_missing"


def test_what_cannot_be_used_is_told_in_its_place(tmp_path: Path):
    raw = Path(write_raw(tmp_path, [record(0), record(1)]))
    lines = raw.read_text(encoding="utf-8").splitlines()
    gone = {**json.loads(lines[0]), "key": "gone", "wav": "gone.wav"}
    spoken = {**gone, "key": "spoken", "task": "<TEXT2TOKEN>"}
    raw.write_text("\n".join([lines[0], "{not json", json.dumps(gone), json.dumps(spoken), lines[1]]), encoding="utf-8")
    found = list(open_source(str(raw)).records())
    assert [item.reason if isinstance(item, RecordError) else item.key for item in found] == [
        "k000",
        "bad_json",
        "audio_missing",
        "spoken",  # its task takes no recording
        "k001",
    ]
    assert "gone.wav" in str(found[2]) and f"{raw}:3" in str(found[2])


def test_token2wav_trains_on_every_form_and_on_segments():
    utterances = [read_lists([path], ListConfig(lists=[path], min_seconds=0.1)) for path in FAKE_LISTS]
    assert [u.key for u in utterances[0]] == [u.key for u in utterances[1]] == [u.key for u in utterances[2]]
    for one, other in zip(utterances[0], utterances[1], strict=True):
        assert one.seconds == other.seconds and (one.samples_16k() == other.samples_16k()).all()


def test_a_segment_is_as_long_as_it_says(tmp_path: Path):
    raw = write_raw(tmp_path, [{**record(0), "start": 0.05, "end": 0.2}])
    [utterance] = read_lists([Path(raw)], ListConfig(lists=[Path(raw)], min_seconds=0.1))
    assert utterance.seconds == pytest.approx(0.15) and len(utterance.samples_16k()) == 2400
