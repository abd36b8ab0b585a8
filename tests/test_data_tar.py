"""Tar streams: every header form, reading from the middle, damage."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_echat.data import tar


def archive(samples: dict[str, dict[str, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
        for key, members in samples.items():
            for name, data in members.items():
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


SAMPLES = {f"键{n}": {"txt": f"文本 {n}".encode(), "wav": bytes([n]) * (700 + 100 * n)} for n in range(5)}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_every_tar_format_with_long_and_foreign_names(form: int):
    samples = dict(SAMPLES) | {"folder/" * 12 + "长" * 20: {"txt": b"x", "wav": b""}}
    groups = list(tar.groups(io.BytesIO(archive(samples, form))))
    assert {g.key: g.members for g in groups} == samples
    assert [g.index for g in groups] == list(range(6)) and not any(g.damage for g in groups)


def test_sizes_beyond_eight_gigabytes_are_read():
    info = tarfile.TarInfo("big.wav")
    info.size = 10 * 2**30
    header = tar.TarStream(io.BytesIO(info.tobuf(tarfile.GNU_FORMAT))).next()
    assert header is not None and (header.name, header.size) == ("big.wav", 10 * 2**30)


def test_each_group_can_be_read_alone_from_its_offset():
    data = archive(SAMPLES)
    for group in list(tar.groups(io.BytesIO(data))):
        again = next(tar.groups(io.BytesIO(data), group.offset, group.index))
        assert (again.key, again.members, again.index) == (group.key, group.members, group.index)


def test_streams_that_cannot_seek_are_read_too():
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: int) -> int:
            raise io.UnsupportedOperation

    assert [g.key for g in tar.groups(Pipe(archive(SAMPLES)), part=1, parts=2)] == ["键1", "键3"]


@given(parts=st.integers(1, 7))
def test_parts_cover_an_archive_once(parts: int):
    data = archive(SAMPLES)
    seen = [g.key for part in range(parts) for g in tar.groups(io.BytesIO(data), part=part, parts=parts)]
    assert sorted(seen) == sorted(SAMPLES)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10**6))
def test_a_truncated_archive_gives_what_is_whole_and_one_damaged_group(cut: int):
    data = archive(SAMPLES)
    starts = [g.offset for g in tar.groups(io.BytesIO(data))]
    cut %= len(data.rstrip(b"\0"))
    groups = list(tar.groups(io.BytesIO(data[:cut])))
    # A group is known to be whole once the header behind it is read; until then more members might have come.
    complete = sum(start + tar.BLOCK <= cut for start in starts[1:])
    assert [g.key for g in groups if not g.damage] == list(SAMPLES)[:complete]
    assert [g.damage.reason for g in groups if g.damage] == ["truncated_tar"]


def test_a_broken_header_costs_its_neighbours_only():
    data = bytearray(archive(SAMPLES))
    groups = list(tar.groups(io.BytesIO(bytes(data))))
    data[groups[2].offset + 10] ^= 0xFF  # the first header of group 2
    after = list(tar.groups(io.BytesIO(bytes(data))))
    assert [(g.key, g.damage.reason if g.damage else "") for g in after] == [
        ("键0", ""), ("键1", "corrupt_tar"), ("键2", "corrupt_tar"), ("键3", ""), ("键4", ""),
    ]  # fmt: skip
    again = list(tar.groups(io.BytesIO(bytes(data)), after[1].next_offset, 2))
    assert [(g.key, bool(g.damage)) for g in again] == [("键2", True), ("键3", False), ("键4", False)]


def test_bytes_that_are_no_tar_give_one_damaged_group():
    groups = list(tar.groups(io.BytesIO(b"not a tar at all " * 100)))
    assert [(g.key, g.damage.reason) for g in groups] == [("", "corrupt_tar")]


def test_writing_is_the_same_on_every_machine(tmp_path):
    for name in ("a.tar", "b.tar"):
        with tar.TarWriter(str(tmp_path / name)) as out:
            out.add("键", {"wav": b"123", "txt": "文".encode()})
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as file:
        assert [(m.name, m.mtime, m.uid, m.uname) for m in file] == [("键.txt", 0, 0, ""), ("键.wav", 0, 0, "")]
