"""A list's records, told by place and fetched again, are its records."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from osum_echat.data import tar
from osum_echat.data.convert import convert
from osum_echat.data.sources import Source, open_source
from osum_echat.dialogue.record import Record, RecordError
from tests.data_case import record, wav_bytes, write_raw


@pytest.fixture(params=["raw", "shard", "combine"])
def listed(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    """Ten records, one of them twice the key of another, in each form; in the combine list one has no line, and one no recording."""
    records = [{**record(number), "txt_1": "before", "wav_1": str(tmp_path / "past.wav")} for number in range(10)]
    (tmp_path / "past.wav").write_bytes(wav_bytes())
    path = write_raw(tmp_path / "raw", records)
    for form in ("shard", "combine")[: ("raw", "shard", "combine").index(request.param)]:
        path = convert(path, str(tmp_path / form), form, per_tar=4, workers=1, progress=False).path  # type: ignore[arg-type]
    if request.param == "raw":
        with open(path, "a", encoding="utf-8") as file:
            file.write('{broken\n{"key": "none", "wav": "none.wav"}\n')
    if request.param == "combine":
        side = next(Path(path).parent.rglob("*0.list"))
        lines = side.read_text(encoding="utf-8").splitlines()
        side.write_text("\n".join([*lines[1:], json.dumps(record(99))]) + "\n", encoding="utf-8")
    return open_source(path)


def told(found: Record | RecordError) -> Any:
    return str(found) if isinstance(found, RecordError) else found


def test_records_by_place_are_the_records_of_the_list(listed: Source) -> None:
    whole = [told(found) for found in listed.records()]
    places = list(listed.places())
    keys = [found.key if isinstance(found, RecordError) else found[1] for found in places]
    assert keys == [found.key for found in listed.records()]
    good = [found[0] for found in places if not isinstance(found, RecordError)]
    faults = [str(found) for found in places if isinstance(found, RecordError)]
    fetched = [told(found) for found in listed.at(good)]
    assert sorted(map(str, [*fetched, *faults])) == sorted(map(str, whole))
    assert [told(found) for found in listed.at(good[1::3])] == fetched[1::3], "some of them, with gaps"
    assert [told(found) for place in reversed(good) for found in listed.at([place])] == fetched[::-1], "each by itself"


def test_places_are_told_without_reading_recordings(listed: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    data, opened = tar.TarStream.data, builtins.open

    def watched(self: tar.TarStream, header: tar.Header) -> bytes:
        read.append(header.name)
        return data(self, header)

    monkeypatch.setattr(tar.TarStream, "data", watched)
    monkeypatch.setattr(builtins, "open", lambda name, *rest, **more: (read.append(str(name)), opened(name, *rest, **more))[1])
    assert len(list(listed.places())) >= 10
    assert not [name for name in read if name.rpartition(".")[2].startswith("wav")]


def test_a_list_that_changes_between_is_told(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", [record(number) for number in range(4)])
    path = Path(convert(raw, str(tmp_path / "shard"), "shard", per_tar=4, workers=1, progress=False).path)
    places = [found[0] for found in open_source(str(path)).places() if not isinstance(found, RecordError)]
    archive = next(path.parent.rglob("*.tar"))
    with tar.TarWriter(str(archive)) as writer:
        writer.add("k000", {"wav": wav_bytes(), "txt": b"a"})
    found = list(open_source(str(path)).at(places))
    assert isinstance(found[0], Record) and all(isinstance(one, RecordError) and one.reason == "moved" for one in found[1:])
