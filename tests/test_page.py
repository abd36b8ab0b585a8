"""The web page without a browser: texts, menu, messages, ratings, sound on its way, conversations, and its API (see also tests/browser)."""

from __future__ import annotations

import gc
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import soundfile
import uvicorn

from osum_echat.dialogue.dialect import Learnt
from osum_echat.dialogue.tasks import OUTPUTS
from osum_echat.dialogue.think import Think
from osum_echat.generation.config import GenerationConfig
from osum_echat.locations import find_recordings
from osum_echat.pipeline import MODES, Ask, EChat
from osum_echat.serving.page import feedback, menu, picture
from osum_echat.serving.page.app import Page, PageOptions, demo_examples, make_app
from osum_echat.serving.page.conversation import Conversation, Form
from osum_echat.serving.page.live_sound import LiveSound
from osum_echat.serving.page.messages import Turn, chips
from osum_echat.serving.page.texts import language_of, tables, text
from osum_echat.serving.shared import SharedEChat
from osum_echat.token2wav import Token2Wav
from tests.generation_case import DATA, tiny
from tests.token2wav_case import recorded_speaker, write_directory

SHORT = GenerationConfig(modes={name: replace(GenerationConfig().mode(name), max_new=12) for name in OUTPUTS})


@pytest.fixture(autouse=True)
def without_ffmpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    """gradio looks at every sound with ffprobe where this machine has one."""
    monkeypatch.setattr("gradio.processing_utils.ffmpeg_installed", lambda: False)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedEChat]:
    model, tokenizer, _ = tiny()
    folder = tmp_path_factory.mktemp("token2wav")
    write_directory(folder)
    found = SharedEChat(EChat(model, tokenizer, SHORT, Token2Wav.load(folder, device="cpu"), recorded_speaker())).start()
    yield found
    found.close()


@pytest.fixture(scope="module")
def wav(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("wav") / "u0.wav"
    with np.load(DATA / "cases.npz") as arrays:
        soundfile.write(path, arrays["wav0_int16"], 16000)
    return str(path)


# ---- texts and menu ------------------------------------------------------------------------------------------------------------------


def test_every_text_is_there_in_every_language_with_the_same_places():
    english = tables()["en"]
    for language, table in tables().items():
        assert set(table) == set(english), language
        for key, words in table.items():
            assert set(re.findall(r"\{(\w+)\}", words)) == set(re.findall(r"\{(\w+)\}", english[key])), (language, key)


def test_chinese_texts_use_full_width_punctuation():
    for key, words in tables()["zh"].items():
        assert not re.search(r"[\u4e00-\u9fff][,;:!?()]", words), (key, words)


def test_the_language_is_the_first_one_that_the_page_has():
    assert [language_of(h) for h in ("zh-CN,en;q=0.8", "fr-FR, zh;q=0.5", "pt-BR", None)] == ["zh", "zh", "en", "en"]


def test_the_menu_begins_with_at_most_eight_entries_and_offers_only_what_was_learnt(shared):
    dialect = shared.echat.dialect
    everything = menu.offered([dialect], more=True)
    assert set(everything) == {*MODES, menu.OWN} and len(menu.offered([dialect])) <= 8
    less = replace(dialect, learnt=Learnt(modes=("s2t_chat", "text2token")))
    assert menu.offered([less]) == ["s2t_chat", "tts"]
    assert menu.offered([dialect, less]) == ["s2t_chat", "tts"]  # two checkpoints: what both have learnt
    one_task = replace(dialect, refuse_unlisted=True, instructions={"<EMOTION>": ("emotion",)})
    assert [name for name in menu.offered([one_task], more=True) if MODES.get(name) and MODES[name].task] == ["emotion"]


def test_every_entry_has_a_title_in_every_language():
    titles = [[menu.title(language, name) for name in (*MODES, menu.OWN)] for language in tables()]
    for found in titles:
        assert len(set(found)) == len(found) and not any("{" in title or "<" in title for title in found)


# ---- messages, picture, ratings -------------------------------------------------------------------------------------------------------


def test_tags_are_chips_in_the_visitors_language():
    think = Think(age="old", gender="FEMALE", emotion="angry", event="cough")
    assert [word in chips("zh", think) for word in ("老年", "女", "生气", "咳嗽", "情感")] == [True] * 5
    assert "old" in chips("en", think) and chips("en", None) == ""
    both = chips("en", Think(emotion="happy", reply_emotion="happy"))
    assert both.count("😊") == 1 and "💬" in both, "the reply's tone does not look like a second emotion of the speaker"


def test_text_of_model_and_visitor_is_never_markup():
    turn = Turn(
        1, "t2t", asked="<img src=x onerror=1>", text="<TRANSCRIBE> & more", think=Think(transcript="<b>", age="<script>")
    )
    shown = json.dumps([m["content"] for m in turn.messages("en")])
    assert "<img" not in shown and "<TRANSCRIBE>" not in shown and "<b>" not in shown and "<script>" not in shown
    assert "&lt;TRANSCRIBE&gt; &amp; more" in shown


def test_the_picture_names_words_and_tags_for_screen_readers(wav):
    drawn = picture.draw("en", wav, [picture.Word("hello", 0.4)], Think(emotion="happy"))
    assert drawn.startswith("<svg") and "http" not in drawn
    about = re.search(r'aria-label="([^"]*)"', drawn)
    assert about and "hello 0.4" in about[1] and "emotion: happy" in about[1]


def test_a_rating_keeps_the_request_it_belongs_to_and_audio_only_with_consent(tmp_path, wav):
    turn = Turn(1, "s2s_think", wav=wav, reply_wav=Path(wav), settings={"seed": 7}, details={"text": "你好"})
    feedback.save(tmp_path, turn, "wrong", "mini", with_audio=False)
    assert not (tmp_path / "audio").exists()
    feedback.save(tmp_path, turn, "right", "mini", with_audio=True)
    first, second = (json.loads(line) for line in (tmp_path / "feedback.jsonl").read_text(encoding="utf-8").splitlines())
    assert first["rating"] == "wrong" and first["mode"] == "s2s_think" and first["settings"] == {"seed": 7}
    assert first["reply"] == {"text": "你好"} and first["audio"] == {}
    assert {(tmp_path / file).is_file() for file in second["audio"].values()} == {True} and set(second["audio"]) == {
        "recording",
        "reply",
    }


# ---- several people on one model --------------------------------------------------------------------------------------------------------


def test_replies_in_company_are_those_of_a_single_visitor(shared, wav):
    asks = [Ask(wav=wav, speak=True, seed=s) for s in range(3)] + [
        Ask(text="hello", speak=True, seed=5),
        Ask(wav=wav, think="tag"),
    ]
    alone = shared.engine.run(lambda: [list(shared.echat.stream_ask(ask)) for ask in asks]).result()
    found: dict[int, list] = {}

    def visit(number: int) -> None:
        found[number] = list(shared.stream(asks[number]))

    threads = [threading.Thread(target=visit, args=(n,)) for n in range(len(asks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for number, ask in enumerate(asks):
        mine, theirs = (shared.echat.reply(events, ask) for events in (found[number], alone[number]))
        assert (mine.text, mine.think, mine.speech_tokens, mine.finish_reason) == (
            theirs.text, theirs.think, theirs.speech_tokens, theirs.finish_reason,
        )  # fmt: skip
        if theirs.audio is None:
            assert mine.audio is None
        else:
            assert mine.audio is not None
            np.testing.assert_array_equal(mine.audio, theirs.audio)


def test_a_closed_stream_frees_its_place(shared, wav):
    stream = shared.stream(Ask(wav=wav, speak=True))
    next(stream)
    stream.close()
    for _ in range(200):
        if shared.engine.load().rows == 0:
            break
        time.sleep(0.01)
    assert shared.engine.load().rows == 0


def answered(shared: SharedEChat, form: Form, talk: Conversation, sounds: LiveSound | None = None) -> tuple[Turn, list[str]]:
    seen = list(talk.answer({"tiny": shared}, form, sounds or LiveSound()))
    return talk.turns["tiny"][-1], seen


@pytest.mark.parametrize("name", ["s2s_think", "s2t_chat", "emotion", menu.OWN, "tts", "t2t", "t2s"])
def test_every_kind_of_entry_is_answered(shared, wav, name):
    talk = Conversation()
    turn, _ = answered(shared, Form(name, wav, "what is said?"), talk)
    assert turn.done and not turn.error and turn.text and turn.details["finish_reason"] in ("stop", "length")
    assert turn.messages("en")[-1]["role"] == "assistant"
    if name == "tts":
        assert turn.reply_wav is not None and turn.details["speech_tokens"]


def test_the_sound_comes_while_it_is_made_and_is_that_of_the_file(shared):
    sounds, talk = LiveSound(), Conversation()
    turn, seen = answered(shared, Form("tts", None, "hello there"), talk, sounds)
    assert seen[0] == "" and seen[-1] and len(set(seen)) == 2 and turn.reply_wav
    sent = b"".join(sounds.chunks(seen[-1]))
    samples, rate = soundfile.read(turn.reply_wav, dtype="int16")
    assert rate == 22050 and len(sent) == 2 * len(samples)


def test_a_slow_drawing_delays_nothing_by_more_than_itself(shared):
    """What came while a view was drawn is in the next one: views do not queue up behind each other."""
    views, talk, sounds = 0, Conversation(), LiveSound()
    for sound in talk.answer({"tiny": shared}, Form("tts", None, "hello there"), sounds):
        if not views:
            deadline = time.monotonic() + 60
            while not talk.turns["tiny"][-1].done:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        elif views == 1:
            assert sound, "the sound is named in the view after it began"
        views += 1
    assert views <= 3


def test_a_reply_to_download_says_that_it_is_synthetic_and_goes_with_its_conversation(shared):
    talk = Conversation()
    turn, _ = answered(shared, Form("tts", None, "hello there"), talk)
    assert turn.reply_wav is not None
    with soundfile.SoundFile(turn.reply_wav) as file:
        assert "synthetic" in file.comment
    folder = Path(talk.files.name)
    assert folder in turn.reply_wav.parents
    del talk
    gc.collect()
    assert not folder.exists()


def test_a_conversation_remembers_its_turns(shared, wav):
    talk = Conversation()
    for number in (1, 2):
        turn, _ = answered(shared, Form("s2t_chat", wav, seed=number), talk)
        assert turn.number == number and len(talk.dialogues["tiny"]) == number
    past = shared.dialogue()
    expected = [list(shared.stream(Ask(wav=wav, seed=s), past)) for s in (1, 2)]
    texts = [shared.echat.reply(events, Ask(wav=wav)).text for events in expected]
    assert [turn.text for turn in talk.turns["tiny"]] == texts


@pytest.mark.parametrize(
    ("form", "key"),
    [
        (Form("s2s", None), "need_recording"),
        (Form("tts", None, "  "), "need_text"),
        (Form("own", "x.wav", ""), "need_text"),
        (Form("asr", "{file}", language="zh"), "unreadable"),
    ],
)
def test_what_is_missing_is_said_in_the_visitors_language_without_paths(shared, tmp_path, form, key):
    bad = tmp_path / "bad.wav"
    bad.write_text("this is no audio")
    form = replace(form, wav=str(bad) if form.wav == "{file}" else form.wav)
    talk = Conversation()
    for _ in talk.answer({"tiny": shared}, form, LiveSound()):
        pass
    [turn] = talk.turns["tiny"]
    assert turn.error == text(form.language, key) and str(tmp_path) not in turn.error
    assert turn.messages("en")[-1]["content"].count('role="alert"') == 1


def test_silence_and_long_recordings_are_answered_in_the_visitors_language(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(shared.echat, "max_seconds", 30.0)
    rate = 16000
    noise = np.random.default_rng(0).normal(0, 0.1, 40 * rate)
    for name, samples in (("silent", np.zeros(rate)), ("long", noise)):
        soundfile.write(tmp_path / f"{name}.wav", samples, rate)
    turn, _ = answered(shared, Form("s2s", str(tmp_path / "silent.wav"), language="zh"), Conversation())
    assert turn.text == text("zh", "nothing_heard") and turn.details["finish_reason"] == "silence"
    turn, _ = answered(shared, Form("s2s", str(tmp_path / "long.wav"), language="zh"), Conversation())
    assert turn.error == text("zh", "too_long", most="30")


# ---- over HTTP ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(shared: SharedEChat, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    page = Page({"tiny": shared}, PageOptions(tmp_path_factory.mktemp("feedback"), demo_examples(find_recordings())))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_app(page), host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(timeout=60)


def test_programs_get_the_reply_of_the_python_interface(url, shared, wav):
    from gradio_client import Client, handle_file

    client = Client(url, verbose=False)
    for ask, arguments in (
        (MODES["s2s_think"].ask(wav, think="tag", seed=3), ("s2s_think", handle_file(wav), None, "tag", 3)),
        (MODES["tts"].ask(text="hello there", seed=1), ("tts", None, "hello there", "tag", 1)),
    ):
        reply, sound = client.predict(*arguments, api_name="/answer")
        [expected] = shared.engine.run(lambda ask=ask: shared.echat.batch([ask])).result()
        known = expected.as_json()
        assert {key: reply[key] for key in ("text", "think", "finish_reason", "guards")} == {
            key: known[key] for key in ("text", "think", "finish_reason", "guards")
        }
        assert reply["speech_tokens"] == len(expected.speech_tokens)
        if expected.audio is not None:
            assert soundfile.info(sound).frames == len(expected.audio)
    assert expected.audio is not None  # the last one speaks
    with pytest.raises(Exception, match=r"needs a recording.*modes: .*s2s_think"):
        client.predict("s2s", None, None, "tag", 0, api_name="/answer")


def test_a_sound_can_be_fetched_once_and_only_by_its_name(url, shared):
    assert httpx.get(f"{url}/osum/sound/anything").status_code == 404
    sounds = LiveSound()
    name = sounds.new()
    sounds.push(name, np.array([0.5, -2.0], np.float32))
    sounds.end(name)
    assert np.frombuffer(b"".join(sounds.chunks(name)), "<i2").tolist() == [16383, -32767]
    with pytest.raises(KeyError):
        next(sounds.chunks(name))


def test_sounds_that_nobody_fetches_are_forgotten(monkeypatch):
    """A visitor with "play at once" switched off asks for none."""
    sounds, now = LiveSound(), [0.0]
    monkeypatch.setattr("osum_echat.serving.page.live_sound.time", SimpleNamespace(monotonic=lambda: now[0]))
    for _ in range(20):
        name = sounds.new()
        sounds.push(name, np.zeros(9, np.float32))
        sounds.end(name)
        now[0] += 30
    assert len(sounds._open) <= 4 and next(sounds.chunks(name)), "the last ones are there"


def test_the_page_names_no_other_computer(url):
    served = httpx.get(url).text
    outside = set(re.findall(r'(?:src|href)="(https?://[^"]+)"', served)) - {url}
    assert not {link for link in outside if not link.startswith(url)}, outside
    assert "window.osumLanguage" in served and "fonts.googleapis" not in served


def test_examples_are_named_without_the_places_of_their_files(url):
    served = httpx.get(f"{url}/config").text
    listed = find_recordings()
    assert listed is not None and str(listed.parent) not in served
    assert demo_examples(listed)[0][0] == "adult male happy" and "adult male happy" in served


def test_without_ratings_nobody_is_asked_for_one(shared):
    with_ratings, without = (Page({"tiny": shared}, PageOptions(folder)) for folder in (Path("somewhere"), None))
    for page, asks in ((with_ratings, True), (without, False)):
        assert page.parts.consent.visible is asks and page.parts.consent_about.visible is asks
        assert any("like" in str(target) for function in page.blocks.fns.values() for target in function.targets) is asks
