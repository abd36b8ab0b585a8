"""Raw, shard and combine: the same records, and conversions that lose nothing."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from osum_echat.data.convert import convert, main
from osum_echat.data.sources import open_source
from osum_echat.data.tar import TarWriter
from osum_echat.dialogue.record import Record
from tests.data_case import loader, record, wav_bytes, write_raw, write_shard

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
EXTRA = st.fixed_dictionaries(
    {}, optional={"age": TEXT, "think_str": TEXT, "speech_token": st.lists(st.integers(0, 4095), max_size=5), "x": JSON}
)
KEY = st.text(st.characters(codec="utf-8", exclude_characters="\0\n/"), min_size=1, max_size=8)
RECORDS = st.lists(
    st.fixed_dictionaries(
        {"key": KEY, "txt": TEXT, "task": TEXT.filter(str.strip), "extra": EXTRA},
        optional={
            "lang": TEXT,
            "speaker": TEXT,
            "duration": st.floats(0, 100),
            "note": JSON,
            "wav_1": st.just("A"),
            "txt_1": TEXT,
        },
    ),
    min_size=1,
    max_size=7,
).map(lambda items: [{**i, "wav_1": "A"} if "txt_1" in i else {k: v for k, v in i.items() if k != "wav_1"} for i in items])


def content(path: str) -> list[dict[str, Any]]:
    """Fields of every record of a list, recordings as bytes."""
    source, out = open_source(path), []
    for item in source.items():
        assert not item.problems, item.problems
        if item.fields is None:
            continue
        fields = dict(item.fields)
        for name, value in fields.items():
            if name.startswith("wav") and isinstance(value, str):
                fields[name] = Path(source.resolve(value)).read_bytes()
        out.append(fields)
    return out


SAME_KEY = {"key": "0", "txt": "一", "task": "<AGE>", "extra": {}}


@settings(max_examples=25, deadline=None)
@given(records=RECORDS)
@example(records=[SAME_KEY, {**SAME_KEY, "txt": "二"}, {**SAME_KEY, "key": 7}])
def test_round_trip_through_all_forms_loses_nothing(records: list[dict[str, Any]]):
    folder = Path(tempfile.mkdtemp())
    try:
        past = folder / "past.wav"
        past.write_bytes(wav_bytes(0.2, 99))
        for item in records:
            if "wav_1" in item:
                item["wav_1"] = str(past)
        raw = write_raw(folder / "raw", records)
        before = content(raw)
        quiet = {"workers": 1, "progress": False}
        shard = convert(raw, str(folder / "shard"), "shard", per_tar=3, **quiet)
        combine = convert(shard.path, str(folder / "combine"), "combine", **quiet)
        shard2 = convert(combine.path, str(folder / "shard2"), "shard", **quiet)
        raw2 = convert(combine.path, str(folder / "raw2"), "raw", **quiet)
        for result in (shard, combine, shard2, raw2):
            assert result.drops == []
            assert content(result.path) == before
        tars = sorted(p.name for p in (folder / "shard").glob("*.tar"))
        assert all((folder / "shard" / t).read_bytes() == (folder / "shard2" / t).read_bytes() for t in tars)
    finally:
        shutil.rmtree(folder)


def test_the_fake_data_is_the_same_in_all_forms_and_covers_every_task(root_dir: Path, monkeypatch: pytest.MonkeyPatch):
    from osum_echat.dialogue.tasks import TASKS

    monkeypatch.chdir(root_dir)
    raw, shard, combine = (
        content(f"common_utils/fake_data/{name}")
        for name in ("raw/data.list", "shard/shards_list.txt", "combine/combines_list.txt")
    )
    assert raw == shard == combine
    assert {r["task"] for r in raw} == set(TASKS)
    assert any(len(Record.from_dict(r).history) == 2 for r in raw)


def test_the_readme_makers_convert_there_and_back(root_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(root_dir)
    raw = "common_utils/fake_data/raw/data.list"
    assert main([raw, str(tmp_path / "shard"), "--workers", "2"], to="shard") == 0
    assert main([str(tmp_path / "shard/shards_list.txt"), str(tmp_path / "raw"), "--workers", "2"], to="raw") == 0
    assert content(str(tmp_path / "raw/data.list")) == content("common_utils/fake_data/raw/data.list")


def test_a_stopped_conversion_goes_on_and_does_not_depend_on_workers(tmp_path: Path):
    raw = write_raw(tmp_path / "raw", [record(n) for n in range(10)])
    one = convert(raw, str(tmp_path / "one"), "shard", per_tar=3, workers=1, progress=False)
    two = convert(raw, str(tmp_path / "two"), "shard", per_tar=3, workers=3, progress=False)
    tars = sorted((tmp_path / "one").glob("*.tar"))
    assert [t.read_bytes() for t in tars] == [(tmp_path / "two" / t.name).read_bytes() for t in tars]
    (tmp_path / "two" / ".shards_000000001.job.json").unlink()  # as if it had been killed in this tar
    (tmp_path / "two" / "shards_000000001.tar").write_bytes(b"half")
    again = convert(raw, str(tmp_path / "two"), "shard", per_tar=3, workers=1, progress=False)
    assert (again.skipped_jobs, again.written) == (3, 10) and content(again.path) == content(one.path) == content(two.path)
    assert not list((tmp_path / "two").glob("*.tmp"))
    with pytest.raises(ValueError, match="holds another conversion"):
        convert(raw, str(tmp_path / "two"), "shard", per_tar=5, progress=False)


def test_what_cannot_be_converted_is_listed(tmp_path: Path):
    raw = write_raw(tmp_path, [record(0), {**record(1), "wav": "gone.wav"}, {"txt": "no key", "wav": None}])
    result = convert(raw, str(tmp_path / "out"), "shard", workers=1, progress=False)
    assert [(d.key, d.line, d.reason) for d in result.drops] == [("k001", 2, "audio_missing"), ("", 3, "missing_key")]
    assert len((tmp_path / "out" / "dropped.jsonl").read_text().splitlines()) == 2


def test_segments_are_cut_to_the_sample(tmp_path: Path):
    import io

    import soundfile

    whole = wav_bytes(1.0)
    (tmp_path / "a.wav").write_bytes(whole)
    raw = write_raw(tmp_path, [{**record(0), "wav": str(tmp_path / "a.wav"), "start": 0.25, "end": 0.5}])
    fields = content(convert(raw, str(tmp_path / "out"), "shard", workers=1, progress=False).path)[0]
    samples, _ = soundfile.read(io.BytesIO(whole), dtype="int16")
    cut, _ = soundfile.read(io.BytesIO(fields["wav"]), dtype="int16")
    assert (cut == samples[4000:8000]).all() and "start" not in fields


def test_labels_of_a_combined_set_win_over_the_tar(tmp_path: Path):
    shard = write_shard(tmp_path, [record(n) for n in range(3)])
    combine = convert(shard, str(tmp_path / "combine"), "combine", workers=1, progress=False).path
    side = tmp_path / "combine" / "shards_000000000.list"
    lines = [json.loads(line) for line in side.read_text().splitlines()]
    lines[1] |= {"txt": "corrected", "extra": {"age": "<CHILD>"}}
    side.write_text("\n".join(json.dumps(line) for line in lines))
    fixed = content(combine)[1]
    assert (fixed["txt"], fixed["extra"], fixed["wav"]) == ("corrected", {"age": "<CHILD>"}, content(shard)[1]["wav"])


def published_set(folder: Path) -> dict[str, str]:
    """Lists with the faults of the published fake data: wrong folders in every path, ``tas_tag`` for ``task``."""
    for form in ("raw/wav", "shard", "combine"):
        (folder / form).mkdir(parents=True)
    (folder / "raw/wav/random.wav").write_bytes(wav_bytes())
    base = "elsewhere/common/fake"
    raw = [{**record(n, "<S2TCHAT>"), "wav": f"./{base}/raw/wav/random.wav"} for n in range(3)]
    (folder / "raw/data.list").write_text("\n".join(json.dumps(r) for r in raw))
    with TarWriter(str(folder / "shard/s_000000000.tar")) as out:
        for r in raw:
            members = {"txt": r["txt"].encode(), "task": r["task"].encode(), "extra": b"{}", "wav": wav_bytes(), "lang": b"none"}
            out.add(r["key"], members)
    (folder / "shard/shards_list.txt").write_text(f"./{base}/shards/s_000000000.tar\n")
    side = [
        {
            "tas_tag": "<TRANSCRIBE>",
            "key": r["key"],
            "txt": r["txt"],
            "wav": "only-meta",
            "extra": {},
            "tar_path_key": "s_000000000",
        }
        for r in raw
    ]
    (folder / "combine/s_000000000.list").write_text("\n".join(json.dumps(r) for r in side))
    (folder / "combine/combines_list.txt").write_text(f"{base}/combine/s_000000000.list\n")
    (folder / "combine/combines_tar_root.txt").write_text(f"{base}/shard\n")
    return {"raw": "raw/data.list", "shard": "shard/shards_list.txt", "combine": "combine/combines_list.txt"}


@pytest.mark.parametrize("form", ["raw", "shard", "combine"])
def test_published_faults_are_read_with_a_warning_that_says_what_was_assumed(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = str(tmp_path / published_set(tmp_path)[form])
    with caplog.at_level(logging.WARNING):
        reader = loader({"all": path})
        batches = list(reader)
    assert reader.report.used == 3 and reader.report.bad == 0
    assert {s.task for b in batches for s in b.samples} == {"<TRANSCRIBE>" if form == "combine" else "<S2TCHAT>"}
    assert "which is not there; assumed" in caplog.text
    assert ("'tas_tag' read as 'task'" in caplog.text) == (form == "combine")


def test_lists_and_tars_may_be_urls(tmp_path: Path):
    shard = write_shard(tmp_path, [record(n) for n in range(3)], per_tar=3)
    files = fsspec.filesystem("memory")
    files.pipe("/set/a.tar", (tmp_path / "shard/shards_000000000.tar").read_bytes())
    files.pipe("/set/shards_list.txt", b"memory://set/a.tar\n")
    raw = [{**record(n), "wav": "memory://set/a.wav"} for n in range(2)]
    files.pipe("/set/a.wav", wav_bytes())
    files.pipe("/set/data.list", "\n".join(json.dumps(r) for r in raw).encode())
    assert content("memory://set/shards_list.txt") == content(shard)
    reader = loader({"all": "memory://set/data.list"})
    assert sum(len(b) for b in reader) == 2 and reader.report.bad == 0


def test_an_absent_or_empty_list_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"nowhere\.list"):
        open_source(str(tmp_path / "nowhere.list"))
    (tmp_path / "empty.list").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.list is an empty list"):
        open_source(str(tmp_path / "empty.list"))
