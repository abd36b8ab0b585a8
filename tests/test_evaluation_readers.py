"""Sets of every form as items; the made-up folders have the names and columns of the published ones (cited in the readers)."""

from __future__ import annotations

import base64
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from osum_echat.audio import io as audio_io
from osum_echat.config import ConfigError
from osum_echat.evaluation import maker, readers
from osum_echat.evaluation.items import Item, ItemError
from osum_echat.evaluation.labels import canonical, read_label
from osum_echat.evaluation.readers.lists import write_tar

EXTRA = {"age": "child", "gender": "<MALE>", "emotion": "sad", "event": "none", "replies": ["Yes.", "No."]}


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    path = tmp_path / "sound.wav"
    audio_io.write(path, 0.1 * np.sin(np.arange(16000) / 20), 16000)
    return path


def put(wav: Path, *places: Path) -> None:
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(wav, place)


def split(entries: list[Any]) -> tuple[list[Item], list[ItemError]]:
    return [e for e in entries if isinstance(e, Item)], [e for e in entries if isinstance(e, ItemError)]


def jsonl(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows))
    return path


# ---- this project's lists ------------------------------------------------------------------------------------------------------------


def test_a_set_written_as_tar_is_read_back_equal_and_always_has_the_same_bytes(tmp_path: Path):
    items = [Item("a", "hello there", b"OggS...", extra=EXTRA), Item("b", "a text to say")]
    write_tar(tmp_path / "one.tar.gz", items)
    write_tar(tmp_path / "two.tar.gz", items)
    assert (tmp_path / "one.tar.gz").read_bytes() == (tmp_path / "two.tar.gz").read_bytes()
    first, second = readers.open_items(tmp_path / "one.tar.gz")
    assert (first.id, first.text, first.wav, first.replies) == ("a", "hello there", b"OggS...", ("Yes.", "No."))
    assert first.labels == {"age": "child", "gender": "male", "emotion": "sad", "event": "none"}
    assert (second.text, second.wav, second.labels) == ("a text to say", None, {})


def test_a_list_finds_recordings_beside_itself(tmp_path: Path, wav: Path):
    jsonl(tmp_path / "set.jsonl", {"key": "x", "wav": "sound.wav", "txt": "hello", "extra": EXTRA})
    assert readers.open_items(tmp_path / "set.jsonl")[0].wav == str(wav)


def test_a_list_names_the_voice_to_copy(tmp_path: Path, wav: Path):
    voice = {"prompt_wav": "sound.wav", "prompt_text": "a prompt"}
    rows = [{"key": f"k{n}", "txt": "say this", "task": "<TEXT2TOKEN>", "extra": extra} for n, extra in enumerate(
        (voice, {"prompt_wav": "gone.wav"}, {"prompt_wav": 5}, {"replies": 5}, {})
    )]  # fmt: skip
    items, faults = split(readers.open_items(jsonl(tmp_path / "l.jsonl", *rows)))
    assert [(item.id, item.prompt_wav, item.prompt_text) for item in items] == [("k0", str(wav), "a prompt"), ("k4", None, "")]
    assert [(fault.line, fault.reason) for fault in faults] == [(2, "missing_file"), (3, "bad_field"), (4, "bad_field")]


def test_text_in_another_encoding_is_an_error_that_names_the_file(tmp_path: Path):
    (tmp_path / "meta.lst").write_bytes("u1|grüße".encode("latin-1"))
    with pytest.raises(ValueError, match=r"meta\.lst \(read as form seed_tts\) is not UTF-8"):
        readers.open_items(tmp_path / "meta.lst")


def test_a_missing_or_empty_set_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(ValueError, match="not found"):
        readers.open_items(tmp_path / "none.tar.gz")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty"):
        readers.open_items(tmp_path / "empty.jsonl")
    with pytest.raises(ConfigError, match="format=nonsense"):
        readers.open_items(tmp_path / "empty.jsonl", "nonsense")


def test_raw_shard_and_combine_lists_give_the_same_items(tmp_path: Path, wav: Path):
    record = {
        "key": "k1",
        "wav": str(wav),
        "txt": "好的",
        "task": "<S2TCHAT>",
        "extra": {"q_txt": "你好", "q_emotion": "<HAPPY>"},
    }
    raw = jsonl(tmp_path / "raw.jsonl", record)
    with tarfile.open(tmp_path / "one.tar", "w") as archive:
        for name, data in (
            ("k1.txt", "好的".encode()),
            ("k1.task", b"<S2TCHAT>"),
            ("k1.extra", json.dumps(record["extra"]).encode()),
            ("k1.wav", wav.read_bytes()),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (tmp_path / "shards_list.txt").write_text(f"{tmp_path / 'one.tar'}\n")
    jsonl(tmp_path / "one.jsonl", {**record, "wav": "only-meta"})
    (tmp_path / "combines_list.txt").write_text(f"{tmp_path / 'one.jsonl'}\n")
    found = [readers.open_items(path)[0] for path in (raw, tmp_path / "shards_list.txt", tmp_path / "combines_list.txt")]
    assert {(item.id, item.text, item.labels["emotion"], item.extra["reference_reply"]) for item in found} == {
        ("k1", "你好", "happy", "好的")
    }
    assert [type(item.wav) for item in found] == [str, bytes, bytes]


def test_words_and_tags_of_an_understanding_record_are_taken_apart(tmp_path: Path, wav: Path):
    task = "<TRANSCRIBE> <EMOTION> <AGE>"
    path = jsonl(tmp_path / "l.jsonl", {"key": "x", "wav": str(wav), "txt": "i am fine <JOY> <MIDDLE_AGE>", "task": task})
    (item,) = readers.open_items(path)
    assert (item.text, item.labels) == ("i am fine", {"emotion": "happy", "age": "adult"})


def test_bad_lines_are_named_with_file_and_line_and_the_rest_goes_on(tmp_path: Path, wav: Path):
    path = jsonl(
        tmp_path / "l.jsonl",
        {"key": "a", "wav": str(wav), "txt": "one"},
        "{broken",
        {"key": "b", "wav": "nowhere.wav", "txt": "two"},
        {"key": "a", "wav": str(wav), "txt": "again"},
        {"key": "c", "wav": str(wav), "txt": "three"},
    )
    items, faults = split(readers.open_items(path))
    assert [item.id for item in items] == ["a", "c"]
    assert [fault.reason for fault in faults] == ["bad_json", "audio_missing", "same_id"]
    assert f"{path}:2" in str(faults[0]) and f"{path}:3" in str(faults[1]) and "nowhere.wav" in str(faults[1])
    good, bad = readers.usable(readers.open_items(path), ("wav", "label.emotion"))
    assert not good and {fault.reason for fault in bad} >= {"no_label.emotion"}


def test_a_limit_counts_items_that_can_be_used(tmp_path: Path, wav: Path):
    path = jsonl(tmp_path / "l.jsonl", "{broken", *({"key": str(n), "wav": str(wav), "txt": "x"} for n in range(5)))
    items, faults = split(readers.open_items(path, limit=2))
    assert len(items) == 2 and len(faults) == 1


def test_items_are_written_and_read_back(tmp_path: Path, wav: Path):
    item = Item("a/1", "hi", "sound.wav", {"emotion": "sad"}, "emotion", ("ok",), "B", extra={"lang": "en"}, start=0.1, end=0.5)
    (back,) = readers.open_items(jsonl(tmp_path / "items.jsonl", item.to_dict()))
    assert (back.id, back.labels, back.group, back.replies, back.answer) == ("a/1", {"emotion": "sad"}, "emotion", ("ok",), "B")
    samples, rate = back.recording()
    assert (len(samples), rate) == (6400, 16000)
    _, faults = split(
        readers.open_items(jsonl(tmp_path / "bad.jsonl", {"id": "x", "text": "t"}, {"id": 5, "labels": "sad"}, {"text": "t"}))
    )
    assert [fault.reason for fault in faults] == ["bad_field", "missing_id"]


# ---- published sets ------------------------------------------------------------------------------------------------------------------


def test_aishell(tmp_path: Path, wav: Path):
    root = tmp_path / "data_aishell"
    put(wav, root / "wav/test/S0764/BAC009S0764W0121.wav", root / "wav/test/S0764/BAC009S0764W0122.wav")
    put(wav, root / "wav/train/S0002/BAC009S0002W0122.wav")
    (root / "transcript").mkdir()
    text = "BAC009S0002W0122 而 对 楼市\nBAC009S0764W0121 甚至 出现 交易 几乎 停滞 的 情况\n"
    (root / "transcript" / "aishell_transcript_v0.8.txt").write_text(text)
    items, faults = split(readers.open_items(root))
    assert [(item.id, item.text, item.line) for item in items] == [("BAC009S0764W0121", "甚至出现交易几乎停滞的情况", 2)]
    assert [fault.id for fault in faults] == ["BAC009S0764W0122"]
    (item,) = readers.open_items(root / "wav" / "train", "aishell")
    assert item.text == "而对楼市"


def test_librispeech(tmp_path: Path, wav: Path):
    folder = tmp_path / "test-clean/1089/134686"
    put(wav, folder / "1089-134686-0000.flac")
    (folder / "1089-134686.trans.txt").write_text("1089-134686-0000 HE HOPED THERE WOULD BE STEW\n1089-134686-0001 STUFF IT\n")
    items, faults = split(readers.open_items(tmp_path / "test-clean"))
    assert [(item.id, item.text) for item in items] == [("1089-134686-0000", "HE HOPED THERE WOULD BE STEW")]
    assert faults[0].line == 2 and faults[0].reason == "missing_file"


def test_wenetspeech_segments_of_one_subset(tmp_path: Path, wav: Path):
    put(wav, tmp_path / "audio/test_net/Y1.opus")
    segments = [
        {"sid": "Y1_S1", "begin_time": 0.1, "end_time": 0.4, "text": "你好", "subsets": ["TEST_NET"]},
        {"sid": "Y1_S2", "begin_time": 0.4, "end_time": 0.9, "text": "再见", "subsets": ["L"]},
        {"sid": "Y1_S3", "begin_time": 0.4, "text": "缺", "subsets": ["TEST_NET"]},
    ]
    audios = [
        {"aid": "Y1", "path": "audio/test_net/Y1.opus", "duration": 1.0, "segments": segments},
        {"aid": "Y2", "path": "audio/none.opus", "segments": []},
    ]
    (tmp_path / "WenetSpeech.json").write_text(json.dumps({"audios": audios}))
    items, faults = split(readers.open_items(tmp_path))
    assert [item.id for item in items] == ["Y1_S1", "Y1_S2"] and items[0].group == "TEST_NET"
    assert len(items[0].recording()[0]) == 4800
    assert sorted(fault.reason for fault in faults) == ["bad_segment", "missing_file"]
    from osum_echat.evaluation.readers.folders import read_wenetspeech

    only, _ = split(list(read_wenetspeech(f"{tmp_path}#TEST_NET")))
    assert [item.id for item in only] == ["Y1_S1"]


def test_common_voice(tmp_path: Path, wav: Path):
    put(wav, tmp_path / "clips/common_voice_en_1.mp3")
    header = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccents\tlocale\tsegment\n"
    rows = 'c\tcommon_voice_en_1.mp3\tHe said "no".\t2\t0\tfourties\tmale_masculine\t\ten\t\nc\tcommon_voice_en_2.mp3\tGone.\t2\t0\t\t\t\ten\t\n'
    (tmp_path / "test.tsv").write_text(header + rows)
    items, faults = split(readers.open_items(tmp_path / "test.tsv"))
    assert [(item.text, item.labels) for item in items] == [('He said "no".', {"gender": "male", "age": "adult"})]
    assert faults[0].line == 3
    (tmp_path / "bad.tsv").write_text("path\twords\nx\ty\n")
    with pytest.raises(ValueError, match="no column sentence"):
        readers.open_items(tmp_path / "bad.tsv")


def test_vocalsound(tmp_path: Path, wav: Path):
    put(
        wav,
        tmp_path / "audio_16k/f0003_0_cough.wav",
        tmp_path / "audio_16k/m0004_0_throatclearing.wav",
        tmp_path / "audio_16k/odd.wav",
    )
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/all_meta.json").write_text(json.dumps([["f0003", "Female", "62", "USA", "English", "no"]]))
    items, faults = split(readers.open_items(tmp_path))
    assert [item.labels for item in items] == [
        {"event": "cough", "gender": "female", "age": "old"},
        {"event": "throat clearing", "gender": "male"},
    ]
    assert faults[0].reason == "bad_name"
    (tmp_path / "datafiles").mkdir()
    data = [{"wav": "/data/audio_16k/f0003_0_cough.wav", "labels": "/m/01b_21"}]
    (tmp_path / "datafiles/te.json").write_text(json.dumps({"data": data}))
    assert [item.id for item in readers.open_items(tmp_path)] == ["f0003_0_cough"]


def test_meld(tmp_path: Path, wav: Path):
    put(wav, tmp_path / "output_repeated_splits_test/dia0_utt0.wav")
    header = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime\n"
    rows = '1,"Oh, no.",Mark,surprise,positive,0,0,3,19,"00:14:38,127","00:14:40,378"\n2,Hey,Rachel,anger,negative,0,1,3,19,,\n'
    (tmp_path / "test_sent_emo.csv").write_text(header + rows)
    items, faults = split(readers.open_items(tmp_path))
    assert [(item.id, item.text, item.labels) for item in items] == [("dia0_utt0", "Oh, no.", {"emotion": "surprised"})]
    assert "dia0_utt1" in str(faults[0]) and faults[0].line == 3


def test_mer(tmp_path: Path, wav: Path):
    put(wav, tmp_path / "audio-labeled/samplenew_00001.wav")
    (tmp_path / "label-disdim.csv").write_text("name,discrete,valence\nsamplenew_00001,worried,-1.2\nsamplenew_00002,happy,1\n")
    (tmp_path / "label-transcription.csv").write_text("name,english,chinese\nsamplenew_00001,what to do,怎么办\n")
    items, faults = split(readers.open_items(tmp_path))
    assert [(item.text, item.labels) for item in items] == [("怎么办", {"emotion": "worried"})]
    assert faults[0].reason == "missing_file"


def test_seed_tts_meta_lines_of_all_lengths(tmp_path: Path, wav: Path):
    put(wav, tmp_path / "prompt-wavs/p.wav")
    lines = [
        "u1|a prompt|prompt-wavs/p.wav|say this|wavs/u1.wav",
        "u2|say that",
        "u3.wav|and that|prompt-wavs/p.wav",
        "u4",
        "u5|x|none.wav|y",
    ]
    (tmp_path / "meta.lst").write_text("\n".join(lines))
    items, faults = split(readers.open_items(tmp_path / "meta.lst"))
    assert [(item.id, item.text, bool(item.prompt_wav)) for item in items] == [
        ("u1", "say this", True),
        ("u2", "say that", False),
        ("u3", "and that", True),
    ]
    assert items[0].prompt_text == "a prompt" and [(f.line, f.reason) for f in faults] == [(4, "bad_line"), (5, "missing_file")]


def test_all_eleven_voicebench_subsets_are_told_apart_by_name_and_keep_their_columns(tmp_path: Path, wav: Path):
    from osum_echat.evaluation.readers.benchmarks import SUBSETS, subset_of

    assert len(SUBSETS) == 11
    for subset in SUBSETS:
        assert subset_of(f"naive-{subset}-test-audio.jsonl") == subset
    with pytest.raises(ValueError, match="must hold the subset"):
        subset_of("results.jsonl")
    bytes_64 = base64.b64encode(wav.read_bytes()).decode()
    jsonl(
        tmp_path / "bbh.jsonl", {"id": "navigate_3", "prompt": "If you ...?", "reference": "yes", "audio": {"path": "sound.wav"}}
    )
    jsonl(
        tmp_path / "ifeval.jsonl",
        {
            "key": 7,
            "prompt": "No commas.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
            "audio": {"bytes": bytes_64},
        },
        {"key": 8, "prompt": "x", "audio": {"bytes": "???"}},
    )
    jsonl(tmp_path / "sd-qa-usa.jsonl", {"prompt": "who?", "reference": "Bell", "audio": "gone.wav"}, {"reference": "x"})
    items, faults = split(readers.open_items(tmp_path, "voicebench"))
    assert [(item.id, item.group, item.answer) for item in items] == [
        ("bbh/navigate_3", "bbh", "yes"),
        ("ifeval/7", "ifeval", None),
    ]
    assert items[1].wav == wav.read_bytes() and items[1].extra["instruction_id_list"] == ["punctuation:no_comma"]
    assert [fault.reason for fault in faults] == ["missing_file", "missing_file", "no_text"]
    assert [item.group for item in readers.open_items(tmp_path / "bbh.jsonl")] == ["bbh"]


def test_files_of_one_subset_have_ids_of_their_own(tmp_path: Path):
    """sd-qa has a file for each region, mmsu one for each field."""
    for region in ("usa", "aus"):
        jsonl(tmp_path / f"sd-qa-{region}.jsonl", {"prompt": "who?", "reference": "Bell"})
    jsonl(tmp_path / "advbench-test.jsonl", {"prompt": "how?"})
    items, faults = split(readers.open_items(tmp_path, "voicebench"))
    assert [item.id for item in items] == ["advbench/0", "sd-qa/sd-qa-aus/0", "sd-qa/sd-qa-usa/0"] and not faults
    assert [item.group for item in items] == ["advbench", "sd-qa", "sd-qa"]


def test_both_turns_of_mtbench_become_items_of_one_conversation(tmp_path: Path, wav: Path):
    """Columns of hlt-lab/voicebench, config mtbench."""
    talk = {"question_id": 81, "category": "writing", "turns": ["Write it.", "Again, with every word in a."], "reference": None}
    sums = {"question_id": 111, "category": "math", "turns": ["One and one?", "Twice that?"], "reference": ["2", "4"]}
    path = jsonl(
        tmp_path / "mtbench.jsonl",
        {**talk, "audio1": {"path": "sound.wav"}, "audio2": {"path": "sound.wav"}},
        {**sums, "audio1": "sound.wav", "audio2": "gone.wav"},
        {"question_id": 112, "audio1": "sound.wav"},
    )
    items, faults = split(readers.open_items(path))
    assert [(item.id, item.group, item.text) for item in items] == [
        ("mtbench/81/1", "mtbench turn 1", "Write it."),
        ("mtbench/81/2", "mtbench turn 2", "Again, with every word in a."),
        ("mtbench/111/1", "mtbench turn 1", "One and one?"),
    ]
    assert {(item.dialogue_id, item.turn) for item in items[:2]} == {("mtbench/81", 1), ("mtbench/81", 2)}
    assert [item.answer for item in items] == [None, None, "2"] and items[0].extra["category"] == "writing"
    assert [(fault.reason, fault.line, fault.id) for fault in faults] == [
        ("missing_file", 2, "mtbench/111/2"),
        ("no_text", 3, "mtbench/112"),
    ]


def test_a_folder_of_no_known_form_says_so(tmp_path: Path):
    with pytest.raises(ValueError, match="no known form"):
        readers.open_items(tmp_path)


# ---- labels and the maker ------------------------------------------------------------------------------------------------------------


def test_spellings_of_labels_come_to_one_name():
    assert canonical("emotion", "<HAPPY>") == canonical("emotion", "joy") == canonical("emotion", "开心") == "happy"
    assert [canonical("age", years) for years in ("9", 30, "71", "<YOUTH>")] == ["child", "adult", "old", "adult"]
    assert canonical("event", "Throatclearing") == "throat clearing" and canonical("emotion", "<Grumpy>") == "grumpy"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("i lost my dog <SAD>", "sad"),
        ("<happy> <angry>", "angry"),
        ("Sad.", "sad"),
        ("The speaker sounds sad.", "sad"),
        ("either sad or happy", None),
        ("<grumpy>", None),
        ("她听起来很悲伤", "sad"),
        ("saddle", None),
        ("", None),
    ],
)
def test_a_label_is_read_out_of_a_reply(text: str, label: str | None):
    assert read_label("emotion", text) == label


def test_a_label_that_only_the_set_knows_counts():
    assert read_label("emotion", "<grumpy>", frozenset({"grumpy"})) == "grumpy"


def test_a_labelled_list_becomes_items_one_for_each_label_and_one_for_all(tmp_path: Path, wav: Path):
    known = {"emotion": "sad", "age": "child", "event": "none"}
    entries = [
        Item("a", "hi", b"RIFFx", known),
        Item("b", "ho", b"RIFFy", {"emotion": "neutral"}),
        Item("c", "x", b"", known, "emotion"),
    ]
    made = list(maker.by_label(entries))
    items, faults = split(made)
    assert [(item.id, item.group, dict(item.labels)) for item in items] == [
        ("a/emotion", "emotion", {"emotion": "sad"}),
        ("a/age", "age", {"age": "child"}),
        ("a/multi", "multi", {"emotion": "sad", "age": "child"}),
        ("c", "emotion", known),
    ]
    assert [fault.id for fault in faults] == ["b"]
    assert maker.write_items(tmp_path / "items.jsonl", made[:4]) == (3, 1)
    back = readers.open_items(tmp_path / "items.jsonl")
    assert len({item.wav for item in back}) == 1 and Path(back[0].wav).read_bytes() == b"RIFFx"
