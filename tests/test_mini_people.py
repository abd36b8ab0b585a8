"""Recordings of people and neural voices: the lists that are committed, and what makes training recordings of them. Sounds are made here; nobody is heard."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from recipes.mini import augment, kokoro, measure, people, speakers, texts
from recipes.mini.packages import Package
from recipes.mini.people import build, collect

RATE = 16_000


def voice(seconds: float = 1.0, pitch: float = 120.0) -> np.ndarray:
    """A vowel-like buzz."""
    time = np.arange(int(RATE * seconds)) / RATE
    return (0.1 * sum(np.sin(2 * np.pi * pitch * h * time) / h for h in range(1, 20))).astype(np.float32)


# Lists --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["coffee", "wakewords"])
def test_no_speaker_cluster_is_in_two_sets(source: str):
    sets: dict[int, set[str]] = {}
    for clip in people.read_clips(source):
        sets.setdefault(clip.cluster, set()).add(clip.set)
    assert len(sets) > 20 and all(len(some) == 1 for some in sets.values())


def test_a_cluster_that_two_sources_share_is_in_one_set():
    sets = {s: {clip.cluster: clip.set for clip in people.read_clips(s)} for s in ("coffee", "wakewords")}
    shared = sets["coffee"].keys() & sets["wakewords"].keys()
    assert shared and all(sets["coffee"][number] == sets["wakewords"][number] for number in shared)


def test_the_reader_is_split_by_sentence_and_the_other_reader_is_never_trained_on():
    sets: dict[str, set[str]] = {}
    for clip in people.read_clips("kathleen"):
        sets.setdefault(clip.words, set()).add(clip.set)
    assert all(len(some) == 1 for some in sets.values())
    assert {clip.set for clip in people.read_clips("lj")} == {"report"}


def test_every_set_has_readers_orders_women_and_men():
    for name in people.SETS:
        clips = [clip for source in people.SOURCES for clip in people.read_clips(source, (name,))]
        assert {"kathleen", "coffee", "wakewords"} <= {clip.source for clip in clips}
        assert {"female", "male"} <= {clip.gender for clip in clips if clip.source != "kathleen"}


def test_orders_are_trained_on_with_words_that_agree_with_their_slots():
    clips = [clip for clip in people.read_clips("coffee", ("train",)) if clip.words]
    assert len(clips) > 150
    for clip in clips:
        assert collect.agreed(clip.words, clip.slots) == clip.words


def test_lists_are_written_as_they_are_read(tmp_path: Path):
    clips = people.read_clips("coffee")[:5]
    people.write_clips("coffee", clips, tmp_path)
    assert people.read_clips("coffee", directory=tmp_path) == clips


def test_a_missing_folder_of_recordings_is_said(tmp_path: Path):
    with pytest.raises(ValueError, match=people.FOLDER_VARIABLE):
        people.folder(tmp_path)


def test_words_that_lack_a_slot_are_not_believed():
    assert collect.agreed("Can I get a 12 ounce mocha?", "twelve ounce mocha") == "can i get a twelve ounce mocha"
    assert collect.agreed("Can I get a 16 ounce maca?", "sixteen ounce mocha") == ""


def test_groups_are_divided_near_to_the_quotas_whatever_their_order():
    sizes = {f"s{n}": 1 + n % 7 for n in range(200)}
    sets = collect.divide(sizes)
    assert sets == collect.divide(dict(reversed(sizes.items())))
    for name, quota in collect.QUOTAS.items():
        assert abs(sum(size for key, size in sizes.items() if sets[key] == name) / sum(sizes.values()) - quota) < 0.03


def test_a_cluster_has_a_gender_only_when_its_clips_agree():
    assert collect.majority(["male"] * 19 + ["female", ""]) == "male"
    assert collect.majority(["male", "male", "female"]) == ""
    assert collect.majority(["male"] + [""] * 9) == ""


# Speakers -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hertz", [95.0, 130.0, 210.0, 300.0])
def test_pitch_is_the_fundamental_not_a_multiple(hertz: float):
    assert speakers.pitch(voice(1.0, hertz)) == pytest.approx(hertz, rel=0.03)


def test_noise_has_no_pitch():
    noise = np.random.default_rng(0).standard_normal(RATE).astype(np.float32) * 0.1
    assert speakers.pitch(noise) == 0.0


def test_clusters_are_the_groups_that_were_made():
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((5, 32))
    truth = np.repeat(np.arange(5), 8)
    rows = centres[truth] + 0.15 * rng.standard_normal((40, 32))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    order = rng.permutation(40)
    found = np.array(speakers.clusters(rows[order], 0.7))
    assert len(set(found)) == 5
    for number in range(5):
        assert len(set(found[truth[order] == number])) == 1


def test_an_embedding_has_length_one_and_does_not_hear_the_level():
    torch.manual_seed(0)
    net = speakers.SpeakerNet().eval()
    first, second = net.embed(voice(2.0)), net.embed(voice(2.0) * np.float32(0.2))
    assert np.linalg.norm(first) == pytest.approx(1.0, abs=1e-5)
    assert np.allclose(first, second, atol=1e-4)


# Variants -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [change for _, change in augment.CHANGES.values()])
def test_a_change_keeps_the_length_and_is_the_same_for_the_same_seed(change):
    first, second = change(voice(), random.Random(2)), change(voice(), random.Random(2))
    assert len(first) == len(voice()) and np.array_equal(first, second)
    assert np.isfinite(first).all() and not np.array_equal(first, voice())


@pytest.mark.parametrize("decibels", [5.0, 20.0])
def test_a_sound_is_so_many_decibels_behind_the_speech(decibels: float):
    noise = np.random.default_rng(0).standard_normal(RATE // 3).astype(np.float32)
    mixed = augment.behind(voice(), noise, decibels)
    ratio = augment.power(voice()) / augment.power(mixed - voice())
    assert 10 * np.log10(ratio) == pytest.approx(decibels, abs=0.6)


def test_faster_speech_is_shorter():
    assert len(augment.speed(voice(), 1.1)) == pytest.approx(RATE / 1.1, abs=2)


def test_an_event_stands_beside_the_speech():
    event = augment.draw_event("cough", [], random.Random(1))
    whole = augment.with_event(voice(), event, random.Random(1))
    assert len(whole) > len(voice()) + 0.5 * len(event)


def test_variants_of_a_clip_keep_its_words_and_note_their_event(tmp_path: Path):
    clip = tmp_path / "a.wav"
    soundfile.write(clip, voice(1.0), RATE)

    sounds = SimpleNamespace(sneezes=[], noises=[np.random.default_rng(0).standard_normal(RATE).astype(np.float32)])
    records = list(
        build.with_variants("a", clip, "hello there", {"gender": "male"}, 12, sounds, tmp_path, random.Random(3))  # type: ignore[arg-type]
    )
    assert [r["txt"] for r in records] == ["hello there"] * 12 and records[0]["wav"] == str(clip)
    assert records[0]["extra"]["event"] == "none" and len({r["extra"]["event"] for r in records}) > 1
    for record in records:
        assert soundfile.info(record["wav"]).duration == pytest.approx(record["extra"]["duration"], abs=0.01)


def test_joined_clips_are_long_and_hold_all_words_in_their_order(tmp_path: Path):
    clips = []
    for number, words in enumerate(["one two", "three", "four five six"]):
        wav = tmp_path / f"{number}.wav"
        soundfile.write(wav, voice(3.0), RATE)
        clips.append(build.record(f"c_{number}_0", wav, words, 3.0, gender="female", voice="person-1"))
    long = list(build.joined(clips, 8, tmp_path, random.Random(1)))
    assert len(long) == 8 and {r["extra"]["gender"] for r in long} == {"female"}
    for record in long:
        assert 6 <= soundfile.info(record["wav"]).duration <= build.LONGEST
        rest = record["txt"]
        while rest:  # every text is made of whole clips
            part = next(c["txt"] for c in clips if rest.startswith(c["txt"]))
            rest = rest[len(part) :].strip()


# Neural voices ------------------------------------------------------------------------------------------------------------------------

VOICES = [
    "af_a",
    "af_b",
    "am_a",
    "am_b",
    "bf_a",
    "bf_b",
    "bm_a",
    "bm_b",
    *(f"{language}{sex}_a" for language in "eifpz" for sex in "fm"),
]


class Speaks:
    """In place of the network: a buzz that lasts as long as the text is."""

    def __init__(self) -> None:
        self.voices = dict.fromkeys(VOICES)
        self.languages: set[str | None] = set()
        self.calls = 0

    def speak(self, text: str, name: str, speed: float = 1.0, language: str | None = None) -> np.ndarray:
        self.languages.add(language)
        self.calls += 1
        if len(text) < 4:
            raise ValueError("too short")
        time = np.arange(int(24_000 * 0.05 * len(text) / speed)) / 24_000
        return (0.2 * np.sin(2 * np.pi * 150 * time)).astype(np.float32)


@pytest.fixture
def sentences(monkeypatch):
    pairs = texts.training_user_sentences()[:50]
    monkeypatch.setattr(kokoro, "sentences", lambda: kokoro.Sentences(["a plain sentence", "two words"], pairs))
    monkeypatch.setattr(kokoro, "PART", 12)


def test_a_part_is_made_once_and_the_same_everywhere(tmp_path: Path, sentences):
    first, second = Speaks(), Speaks()
    seconds = kokoro.make_part(first, 3, tmp_path / "one")  # type: ignore[arg-type]
    kokoro.make_part(second, 3, tmp_path / "two")  # type: ignore[arg-type]
    one, two = ((tmp_path / name / "part_0003.jsonl").read_text() for name in ("one", "two"))
    assert one == two and seconds > 5
    calls = first.calls
    assert kokoro.make_part(first, 3, tmp_path / "one") == pytest.approx(seconds) and first.calls == calls  # type: ignore[arg-type]
    for record in map(json.loads, one.splitlines()):
        assert (tmp_path / "one" / record["wav"]).is_file() and record["extra"]["gender"] in texts.GENDERS


def test_whole_parts_are_taken_from_another_cache(tmp_path: Path, sentences):
    kokoro.make_part(Speaks(), 0, tmp_path / "one")  # type: ignore[arg-type]
    (tmp_path / "one" / "part_0001").mkdir()  # begun, not whole
    (tmp_path / "two").mkdir()
    assert kokoro.take(tmp_path / "one", tmp_path / "two") == 1
    assert (tmp_path / "two" / "part_0000.jsonl").is_file() and not (tmp_path / "two" / "part_0001").exists()
    assert kokoro.take(tmp_path / "one", tmp_path / "two") == 0


def test_a_mixed_voice_keeps_the_gender_of_an_english_one():
    rng = random.Random(0)
    drawn = [kokoro.draw_voice(VOICES, rng) for _ in range(300)]
    assert any("+" in name for name in drawn) and any(f"+{l}" in name for name in drawn for l in "eifp")
    for name in drawn:
        first, *second = name.split("+")
        assert first[:2] in kokoro.ENGLISH and all(other[1] == first[1] and other[:2] not in kokoro.CHINESE for other in second)


def test_speech_that_is_not_english_is_noted_as_such(tmp_path: Path, sentences, monkeypatch):
    monkeypatch.setattr(kokoro, "SHARES", {"foreign": 1.0})
    voices = Speaks()
    kokoro.make_part(voices, 0, tmp_path)  # type: ignore[arg-type]
    records = [json.loads(line) for line in (tmp_path / "part_0000.jsonl").read_text().splitlines()]
    assert {record["txt"] for record in records} == {texts.NOT_ENGLISH} and len(voices.languages) > 2
    answer = texts.reply(None, texts.Labels(), random.Random(0), texts.NOT_ENGLISH)
    assert answer.endswith("I understand only English.")


def test_neural_sentences_are_never_held_out():
    held = {sentence for sentence, _ in texts.held_out_user_sentences()}
    held |= {texts.normalise(line) for line, _ in texts.hand_written("user")}
    drawn = kokoro.Sentences(["a plain sentence"], texts.training_user_sentences())
    rng = random.Random(4)
    said = [drawn.draw(rng)[0] for _ in range(2000)]
    assert not held & set(said) and len(set(said)) > 500


def test_a_package_with_another_hash_is_not_used(tmp_path: Path):
    (tmp_path / "a.whl").write_bytes(b"data")
    right = Package("pip", "a", "1", "a.whl", hashlib.sha256(b"data").hexdigest())
    assert right.fetch(tmp_path) == tmp_path / "a.whl"
    with pytest.raises(ValueError, match="expected 0000"):
        Package("pip", "a", "1", "a.whl", "0" * 64).fetch(tmp_path)


# Counting -----------------------------------------------------------------------------------------------------------------------------


def heard(words: str, gender: str = "female", emotion: str | None = "neutral", parsed: bool = True, **clip: str) -> measure.Heard:
    known = {"source": "kathleen", "key": "k", "set": "choice", "gender": "female", "words": "one two three four", **clip}
    return measure.Heard(people.Clip(cluster=0, **known), words, {"gender": gender, "emotion": emotion}, parsed, words)


def test_numbers_are_counted_as_they_are_named():
    rows = [
        heard("one two three"),
        heard("", emotion=None, parsed=False),
        heard("twelve ounce ounce", source="coffee", slots="twelve ounce mocha", gender="male"),
        heard("", gender="male", emotion="happy", source="wakewords"),
    ]
    rows[2] = measure.Heard(
        people.Clip("coffee", "c", "choice", 1, "male", "", "twelve ounce mocha"), "12 ounce", rows[2].tags, True, ""
    )
    numbers = measure.people_numbers(rows)
    assert numbers["people_read_wer"] == pytest.approx(100 * 5 / 8)
    assert numbers["people_order_recall"] == pytest.approx(100 * 2 / 3)
    assert numbers["people_neutral"] == pytest.approx(100 * 2 / 3) and numbers["people_unsure"] == pytest.approx(100 / 3)
    assert numbers["people_unparsed"] == pytest.approx(25)
    assert numbers["people_gender"] == pytest.approx(50)  # the man was called so, the woman not


def test_a_smaller_set_is_a_part_of_a_larger_one():
    small, large = measure.choose("choice", 5), measure.choose("choice", 20)
    assert {clip.key for clip in small} <= {clip.key for clip in large} and len(small) == 15
