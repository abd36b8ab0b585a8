"""The doctor finds what is wrong with a set, says where, and ends with a code that scripts can use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from osum_echat.data.convert import convert
from osum_echat.data.doctor import main
from tests.data_case import record, write_raw, write_shard


def test_a_clean_set_ends_with_zero(root_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(root_dir)
    assert main(["common_utils/fake_data/combine/combines_list.txt", "--workers", "2"]) == 0
    text = capsys.readouterr().out
    assert "54 samples, 54 usable" in text and "faults: none; duplicate keys: 0" in text


def test_faults_duplicates_and_labels_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    records = [record(n, "<EMOTION>") | {"txt": "<HAPPY>" if n % 2 else "<SAD>"} for n in range(6)]
    records[3]["key"] = "k001"
    records[4]["wav"] = "gone.wav"
    records[5]["extra"] = {"speech_token": ["x"]}
    raw = write_raw(tmp_path, records, {"k002": b"no wav"})
    assert main([raw, "--out", str(tmp_path / "out")]) == 1
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {(f["line"], f["key"], f["reason"]) for f in report["faults"]} == {
        (3, "k002", "audio_not_audio"), (5, "k004", "audio_missing"), (6, "k005", "bad_codes"),
    }  # fmt: skip
    assert report["duplicates"] == {"k001": [f"{raw}:2", f"{raw}:4"]}
    assert report["tasks"] == {"<EMOTION>": 3} and report["labels"]["emotion"] == {"HAPPY": 2, "SAD": 1}
    assert (report["samples"], report["usable"], report["recordings"]) == (6, 3, 3)
    assert (tmp_path / "out/report.png").read_bytes().startswith(b"\x89PNG")
    assert f"{raw}:3: k002: audio_not_audio" in capsys.readouterr().out


def test_disagreement_of_tar_and_list_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shard = write_shard(tmp_path, [record(n) for n in range(4)])
    combine = convert(shard, str(tmp_path / "combine"), "combine", workers=1, progress=False).path
    side = tmp_path / "combine/shards_000000000.list"
    lines = side.read_text().splitlines()
    side.write_text("\n".join([lines[0].replace("k000", "other"), *lines[1:], lines[1]]))
    assert main([combine]) == 1
    text = capsys.readouterr().out
    assert "tar and list disagree: 2" in text and f"{side}:1: other: missing_in_tar" in text
    assert f"{side}:2: k001: replaced_line: line 5 has the same key" in text


def test_a_list_that_cannot_be_read_ends_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path / "nowhere.list")]) == 2
    assert "list not found" in capsys.readouterr().err


def test_length_filters_are_judged_with_a_tokenizer_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import transformers

    from osum_echat.data.plain_tokenizer import PlainTokenizer

    raw = write_raw(tmp_path, [{**record(0), "txt": "a" * 1500}])
    assert main([raw]) == 0
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _: PlainTokenizer())
    assert main([raw, "--tokenizer", "some"]) == 1
