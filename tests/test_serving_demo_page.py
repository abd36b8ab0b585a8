"""The demo's page: words and tags are marked right or wrong, sounds and pictures are inside, nothing is asked of the network."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from osum_echat.audio.io import Audio
from osum_echat.dialogue.think import Think
from osum_echat.generation.events import Timings
from osum_echat.pipeline import MODES, Reply
from osum_echat.serving.demo_page import Recording, Result, Shown, Summary, Tag, render, sound_of

TONE = (np.sin(np.arange(22_050) / 22_050 * 2 * np.pi * 440) * 0.3).astype(np.float32)


def result(words: str, heard: str, path: Path = Path("a_b.wav"), **fields: object) -> Result:
    reply = Reply("Hello <b>you</b>.", Think("raw", heard, age="ADULT", emotion="sad"), audio=TONE, timings=Timings(total=1.0))
    tags = {"age": "<adult>", "emotion": "happy"} if words else {}
    replies = ("hello  you", "bye") if words else ()
    return Result(Recording(path, words, tags, replies), reply, **fields)  # type: ignore[arg-type]


def test_each_word_that_was_heard_is_marked_and_missing_ones_stand_where_they_belong() -> None:
    found = result("we watched that film last night", "we washed film last nights ago").words
    assert found == [
        ("we", "right"),
        ("washed", "wrong"),
        ("film", "right"),
        ("last", "right"),
        ("nights", "wrong"),
        ("ago", "wrong"),
    ]
    assert result("a b c", "a c").words == [("a", "right"), ("b", "missing"), ("c", "right")]
    assert result("", "what a person said").words[0] == ("what", "")


def test_tags_are_compared_without_brackets_and_case_and_unknown_ones_are_not_judged() -> None:
    marks = {tag.name: tag.mark for tag in result("a", "a").tags}
    assert marks == {"age": "right", "emotion": "wrong"}
    assert Tag("age", "adult").mark == "" and Tag("age", "?", "old").mark == "wrong"


def test_numbers_are_counted_over_recordings_whose_answer_is_known() -> None:
    summary = Summary.of([result("a b c", "a c", total=2.0, first_sound=1.0), result("", "x y", total=4.0)])
    assert (summary.words_right, summary.word_errors.units, summary.tags_right, summary.tags) == (2, 3, 1, 2)
    assert (summary.fits, summary.judged, summary.first_sound, summary.total) == (1, 1, 1.0, 3.0)
    assert Summary.of([result("", "x")]).word_errors.units == 0


def test_the_page_is_whole_and_escapes_what_the_model_wrote(tmp_path: Path) -> None:
    wav = tmp_path / "a_b.wav"
    soundfile.write(wav, TONE, 22_050)
    shown = [Shown(MODES["tts"], "say <this>", Reply("say <this>", audio=TONE))]
    page = render([result("a b c", "a c", wav), result("", "", wav)], shown, {"Seed": "0"})
    assert "Hello &lt;b&gt;you&lt;/b&gt;." in page and "say &lt;this&gt;" in page and "<b>you" not in page
    assert (
        page.count("<article") == 2 and page.count("data:audio/mpeg;base64,") == 5 and page.count("data:image/png;base64,") == 4
    )
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page and "://" not in page
    assert "nothing" in page and "a recording of your own" in page


def test_a_sound_for_the_page_plays_and_is_small() -> None:
    sound = sound_of(Audio(TONE[None], 22_050))
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(sound["audio"].partition(",")[2])))
    assert rate == 22_050 and abs(len(samples) / rate - 1.0) < 0.1 and len(sound["audio"]) < 20_000
    spectrum = np.abs(np.fft.rfft(samples[2000:18_000] * np.hanning(16_000)))
    assert abs(np.argmax(spectrum) * rate / 16_000 - 440) < 3
    picture = Image.open(io.BytesIO(base64.b64decode(sound["picture"].partition(",")[2])))
    assert picture.mode == "P" and picture.size[1] == 64 and picture.size[0] <= 480
    rows = np.asarray(picture.convert("L")).astype(float).mean(axis=1)
    assert rows[int(rows.argmax())] > 3 * np.median(rows) and rows.argmax() > 32, "a low tone is a line in the lower half"
