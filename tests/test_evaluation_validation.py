"""What a training run measures on its validation lists: the scorers of the suites, lists of any form, and errors that are said."""

from __future__ import annotations

import io
import json
import tarfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from osum_echat.config import ConfigError, from_dict
from osum_echat.data.config import DataConfig, StreamConfig
from osum_echat.evaluation import validation
from osum_echat.pipeline import Ask, Reply
from osum_echat.training.config import MeasureConfig, TrainConfig
from tests.evaluation_case import SAID, Listener, Parrot, think, write_wav


def trainer(lists: dict[str, str], **measure: Any) -> Any:
    """As much of a trainer as validators look at."""
    streams = {name: StreamConfig(path) for name, path in lists.items()}
    config = types.SimpleNamespace(validation=DataConfig(streams=streams), measure=MeasureConfig(**measure))
    return types.SimpleNamespace(config=config)


def rows(wav: Path) -> list[dict[str, Any]]:
    """Records of several tasks, each with a recording of its own (the same one would be asked about once)."""

    def copy(name: str) -> str:
        path = wav.with_name(f"{name}.wav")
        path.write_bytes(wav.read_bytes())
        return str(path)

    def thinking(key: str, **extra: str) -> dict[str, Any]:
        return {"key": key, "wav": copy(key), "txt": "<sad>I am sorry.", "task": "<S2TCHAT> <THINKER>", "extra": extra}

    return [
        *(thinking(f"t{n}", **SAID, q_txt="my dog ran away") for n in range(3)),
        thinking("n", q_txt="x", think_str="a man says x"),
        *({"key": f"w{n}", "wav": copy(f"w{n}"), "txt": "one two three four", "task": "<TRANSCRIBE>"} for n in range(3)),
        {"key": "s", "txt": "say this please now", "task": "<TEXT2TOKEN>", "extra": {"speech_token": [1, 2]}},
    ]


def raw(folder: Path, wav: Path) -> Path:
    path = folder / "validation.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(wav)))
    return path


def shard(folder: Path, wav: Path) -> Path:
    with tarfile.open(folder / "one.tar", "w") as archive:
        for row in rows(wav):
            members = {
                "txt": row["txt"].encode(),
                "task": row["task"].encode(),
                "extra": json.dumps(row.get("extra", {})).encode(),
            }
            if "wav" in row:
                members["wav"] = Path(row["wav"]).read_bytes()
            for kind, data in members.items():
                info = tarfile.TarInfo(f"{row['key']}.{kind}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    (folder / "shards_list.txt").write_text(f"{folder / 'one.tar'}\n")
    return folder / "shards_list.txt"


def answer(ask: Ask, n: int) -> Reply:
    if ask.kind == "understand":
        return Reply("one two three")
    return Reply("I am sorry.", think(transcript="my dog ran", age="old"))


@pytest.mark.parametrize("form", [raw, shard])
def test_hearing_counts_words_tags_and_thinks_on_lists_of_any_form(form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parrot = Parrot(answer)
    monkeypatch.setattr(validation, "_echat", lambda *_: parrot)
    values = validation.hearing(trainer({"all": str(form(tmp_path, write_wav(tmp_path / "a.wav")))}))
    assert values == pytest.approx(
        {"think_wer": 25, "gender": 100, "age": 0, "emotion": 100, "event": 100, "think_parsed": 0, "wer": 25}
    )
    # Natural thinks and texts to say are not asked.
    assert [ask.kind for ask in parrot.asked] == ["chat"] * 3 + ["understand"] * 3


def test_only_so_many_items_of_each_task_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parrot = Parrot(answer)
    monkeypatch.setattr(validation, "_echat", lambda *_: parrot)
    validation.hearing(trainer({"all": str(raw(tmp_path, write_wav(tmp_path / "a.wav")))}, items=2))
    assert len(parrot.asked) == 4


def test_own_speech_is_heard_and_needs_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = str(raw(tmp_path, write_wav(tmp_path / "a.wav")))
    with pytest.raises(ValueError, match=r"measure\.token2wav"):
        validation.own_speech(trainer({"all": path}))
    spoken = Reply("say this please now", audio=0.1 * np.ones(16000, np.float32), sample_rate=16000, speech_tokens=(1,) * 25)
    monkeypatch.setattr(validation, "_echat", lambda *_: Parrot([spoken]))
    monkeypatch.setitem(validation._recognisers, "whisper-base", Listener("say this please"))
    assert validation.own_speech(trainer({"all": path}, token2wav="somewhere")) == {"wer": 25, "cut_off": 0}


def test_a_list_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(validation, "_echat", lambda *_: Parrot(answer))
    with pytest.raises(ValueError, match="not found"):
        validation.hearing(trainer({"all": str(tmp_path / "none.jsonl")}))
    (tmp_path / "broken.jsonl").write_text('{"key": "a", "wav": "gone.wav", "txt": "x"}\n{"no": "key"}\n')
    with pytest.raises(ValueError, match=r"broken\.jsonl holds no record that can be used: .*gone\.wav"):
        validation.hearing(trainer({"all": str(tmp_path / "broken.jsonl")}))


def test_what_is_measured_is_a_section_of_the_config():
    config = from_dict(TrainConfig, {"measure": {"items": 5, "token2wav": "a/folder"}})
    assert (config.measure.items, config.measure.token2wav) == (5, "a/folder")
    with pytest.raises(ConfigError, match="items must be at least 1"):
        from_dict(TrainConfig, {"measure": {"items": 0}})
