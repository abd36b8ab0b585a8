"""Bad data: each kind is left out, counted, and named by key, file, line and reason."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from osum_echat.data.convert import convert
from osum_echat.data.drops import TooManyBadSamples
from tests.data_case import loader, record, wav_bytes, write_raw, write_shard


def wav_of(samples: np.ndarray, subtype: str = "PCM_16", rate: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


def read(path: str, **changes: Any) -> tuple[list[str], list[dict[str, Any]], Any]:
    """(keys used, drops as told, loader)."""
    drops = Path(path).parent / "drops.jsonl"
    drops.unlink(missing_ok=True)
    reader = loader({"all": path}, drops_file=str(drops), **changes)
    used = [key for batch in reader for key in batch.keys]
    told = [json.loads(line) for line in drops.read_text().splitlines()] if drops.exists() else []
    assert reader.report.used == len(used) and sum(reader.report.reasons.values()) == len(told)
    return used, told, reader


AUDIO_FAULTS = {
    "audio_not_audio": b"this is text, not a recording" * 10,
    "audio_empty": wav_of(np.zeros(0)),
    "audio_not_finite": wav_of(np.full(8000, np.nan, np.float32), "FLOAT"),
    "audio_too_short": wav_of(np.zeros(400)),
}
SPEECH = "<S2TCHAT> <TEXT2TOKEN>"
RECORD_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no key": ({"key": None}, "missing_key"),
    "txt is a number": ({"txt": 5}, "bad_field"),
    "extra is a list": ({"extra": [1]}, "bad_extra"),
    "extra is broken JSON": ({"extra": "{"}, "bad_extra"),
    "end before start": ({"start": 2.0, "end": 1.0}, "bad_segment"),
    "segment behind the end": ({"start": 100.0, "end": 101.0}, "audio_empty"),
    "wav is not there": ({"wav": "gone/a.wav"}, "audio_missing"),
    "speech codes out of range": ({"task": SPEECH, "txt": "a", "extra": {"speech_token": [1] * 9 + [4096]}}, "bad_codes"),
    "speech codes that are words": ({"task": SPEECH, "extra": {"speech_token": ["x"]}}, "bad_codes"),
    "no speech codes": ({"task": SPEECH}, "missing_speech"),
    "think task without think": ({"task": "<S2TCHAT> <THINKER>"}, "missing_think"),
    "more text than speech": ({"task": SPEECH, "extra": {"speech_token": [1]}}, "text_speech_ratio"),
    "another assistant's name": ({"txt": "I am ChatGPT"}, "name_filter"),
    "too long a label": ({"txt": "a" * 1300}, "label_too_long"),
}


@pytest.mark.parametrize("fault", RECORD_FAULTS)
def test_a_faulty_record_is_left_out_and_named(tmp_path: Path, fault: str):
    change, reason = RECORD_FAULTS[fault]
    raw = write_raw(tmp_path, [record(0), {**record(1), **change}, record(2)])
    used, told, reader = read(raw)
    assert sorted(used) == ["k000", "k002"]
    assert [(d["file"], d["line"], d["reason"]) for d in told] == [(raw, 2, reason)]
    assert told[0]["key"] == ("" if fault == "no key" else "k001") and told[0]["detail"]
    filtered = reason in ("text_speech_ratio", "name_filter", "label_too_long")
    assert reader.report.bad == (0 if filtered else 1)


def test_lines_that_are_no_records_are_left_out(tmp_path: Path):
    raw = write_raw(tmp_path, [record(0)])
    with open(raw, "a") as file:
        file.write('\n{"key": "half\n[1, 2]\n' + "\n")
    used, told, _ = read(raw)
    assert used == ["k000"] and sorted((d["line"], d["reason"]) for d in told) == [(3, "bad_json"), (4, "bad_record")]


@pytest.mark.parametrize("form", ["raw", "shard"])
@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_recordings_are_left_out_with_exact_counts(tmp_path: Path, form: str, workers: int):
    faults = {**AUDIO_FAULTS, "audio_too_long": wav_of(np.zeros(16_000 * 3))}
    records = [record(n) for n in range(3 + len(faults))]
    wavs = {f"k{3 + n:03d}": data for n, data in enumerate(faults.values())}
    path = write_raw(tmp_path, records, wavs) if form == "raw" else write_shard(tmp_path, records, wavs=wavs)
    from osum_echat.data.config import LimitConfig

    used, told, reader = read(path, workers=workers, limits=LimitConfig(max_audio_seconds=2.0))
    assert sorted(used) == ["k000", "k001", "k002"]
    assert {d["key"]: d["reason"] for d in told} == {f"k{3 + n:03d}": reason for n, reason in enumerate(faults)}
    assert reader.report.reasons == dict.fromkeys(faults, 1)


def test_ten_hours_are_refused_before_they_are_decoded(tmp_path: Path):
    header = bytearray(wav_bytes(0.3)[:44])
    size = 10 * 3600 * 32_000
    header[4:8], header[40:44] = (size + 36).to_bytes(4, "little"), size.to_bytes(4, "little")
    with open(tmp_path / "long.wav", "wb") as file:  # a sparse file: its silence takes no room on disk
        file.write(header)
        file.truncate(44 + size)
    raw = write_raw(tmp_path, [record(0), {**record(1), "wav": str(tmp_path / "long.wav")}])
    used, told, _ = read(raw)
    assert used == ["k000"] and [(d["key"], d["reason"]) for d in told] == [("k001", "audio_too_long")]


def test_a_speech_task_without_recording_is_left_out_and_a_text_task_is_not(tmp_path: Path):
    raw = write_raw(tmp_path, [{**record(0), "wav": None}, {**record(1, "<TEXT2TEXT>", question="q"), "wav": None}])
    used, told, _ = read(raw)
    assert used == ["k001"] and [d["reason"] for d in told] == ["audio_missing"]


def test_a_truncated_tar_costs_its_last_sample(tmp_path: Path):
    shard = write_shard(tmp_path, [record(n) for n in range(8)])
    tar = tmp_path / "shard" / "shards_000000000.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[: data.index(b"k003.wav") + 512 + 1000])
    for workers in (0, 2):
        used, told, reader = read(shard, workers=workers)
        assert sorted(used) == ["k000", "k001", "k002", "k004", "k005", "k006", "k007"]
        assert [(d["key"], d["file"], d["reason"]) for d in told] == [("k003", str(tar), "truncated_tar")]
        assert reader.report.bad == 1


def test_a_corrupt_tar_costs_what_stands_at_the_damage(tmp_path: Path):
    shard = write_shard(tmp_path, [record(n) for n in range(8)], per_tar=8)
    tar = tmp_path / "shard" / "shards_000000000.tar"
    data = bytearray(tar.read_bytes())
    at = data.index(b"k004.txt")
    data[at : at + 512] = b"\xaa" * 512
    tar.write_bytes(bytes(data))
    used, told, _ = read(shard)
    assert sorted(used) == ["k000", "k001", "k002", "k003", "k005", "k006", "k007"]
    assert [(d["key"], d["reason"]) for d in told] == [("k004", "corrupt_tar")]


def test_a_tar_that_is_not_there_is_named_with_its_line(tmp_path: Path):
    shard = write_shard(tmp_path, [record(n) for n in range(8)])
    (tmp_path / "shard" / "shards_000000001.tar").unlink()
    for workers in (0, 3):
        used, told, _ = read(shard, workers=workers)
        assert len(used) == 4 and [(d["file"], d["line"], d["reason"]) for d in told] == [(shard, 2, "missing_file")]


def test_a_combined_set_tells_keys_that_one_side_lacks(tmp_path: Path):
    shard = write_shard(tmp_path, [record(n) for n in range(5)], per_tar=5)
    combine = convert(shard, str(tmp_path / "combine"), "combine", workers=1, progress=False).path
    side = tmp_path / "combine" / "shards_000000000.list"
    lines = side.read_text().splitlines()
    lines[1] = lines[1].replace("k001", "k999")
    lines[3] = "{broken"
    side.write_text("\n".join(lines))
    for workers in (0, 2):
        used, told, reader = read(combine, workers=workers)
        assert sorted(used) == ["k000", "k002", "k004"]
        assert sorted((d["key"], d["line"], d["reason"]) for d in told) == [
            ("", 4, "bad_json"), ("k001", 0, "not_in_list"), ("k003", 0, "not_in_list"), ("k999", 2, "missing_in_tar"),
        ]  # fmt: skip
        assert reader.report.bad == 2


def test_too_many_bad_samples_stop_the_run(tmp_path: Path):
    raw = write_raw(tmp_path, [record(0), record(1), {**record(2), "wav": "gone.wav"}, record(3)])
    assert len(read(raw, max_bad_fraction=0.25)[0]) == 3
    with pytest.raises(TooManyBadSamples, match=r"1 of 4 samples are bad \(3 used; left out: audio_missing 1\)"):
        read(raw, max_bad_fraction=0.2)


def test_counts_survive_a_restore(tmp_path: Path):
    raw = write_raw(tmp_path, [record(n) if n % 3 else {**record(n), "wav": "gone.wav"} for n in range(12)])

    def make() -> Any:
        reader = loader({"all": raw}, shuffle_buffer=2)
        reader.config.batch.pool = 2
        return reader

    whole = make()
    assert len(list(whole)) > 2
    part = make()
    running = iter(part)
    next(running)
    restored = make()
    restored.load_state_dict(part.state_dict())
    list(restored)
    assert restored.report == whole.report and restored.report.reasons == {"audio_missing": 4}
