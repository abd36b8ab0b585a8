"""Each kind of use of the gradio page, as a visitor meets it. Screenshots go to out/browser/, to be looked at."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, ROOT, start_browser
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

ANGRY = DEMO / "6_old_male_angry_cough.ogg"
WORDS = "we watched that film last night"


def wait_for(found: Callable[[], Any], seconds: float = 120, what: str = "") -> Any:
    """The first true value of ``found`` within the time."""
    end, last = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            last = found()
            if last:
                return last
        except Exception as error:  # noqa: BLE001  elements come and go while the page draws itself
            last = error
        time.sleep(0.1)
    raise AssertionError(f"{what or found} did not come: {last!r}")


def opened(browser: webdriver.Chrome, url: str, send: str = "Send") -> None:
    browser.get(url)
    wait_for(lambda: browser.find_element(By.ID, "osum-send").text == send, what="the page in its language")
    wait_for(lambda: browser.find_element(By.CSS_SELECTOR, "#osum-mode input").get_attribute("value"), what="the menu")


def choose(browser: webdriver.Chrome, element_id: str, title: str) -> None:
    """An entry of a drop-down list, by the keyboard."""
    box = browser.find_element(By.CSS_SELECTOR, f"#{element_id} input")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
    box.click()
    for option in wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "[role=option]"), what="the list"):
        if title in (option.get_attribute("aria-label") or option.text):
            option.click()
            return
    raise AssertionError(f"{title} is not in the list")


def upload(browser: webdriver.Chrome, file: Path) -> None:
    source = browser.find_elements(
        By.CSS_SELECTOR, "#osum-wav button[aria-label='Upload file'], #osum-wav .source-selection button"
    )
    if not browser.find_elements(By.CSS_SELECTOR, "#osum-wav input[type=file]"):
        source[0].click()
    wait_for(lambda: browser.find_element(By.CSS_SELECTOR, "#osum-wav input[type=file]")).send_keys(str(file))
    wait_for(lambda: "0:0" in browser.find_element(By.ID, "osum-wav").text, what="the uploaded recording")


def press(browser: webdriver.Chrome, element_id: str) -> None:
    button = wait_for(lambda: _enabled(browser.find_element(By.ID, element_id)), what=f"{element_id} enabled")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", button)


def _enabled(element: WebElement) -> WebElement | None:
    return element if element.is_enabled() else None


def chat(browser: webdriver.Chrome) -> str:
    return browser.find_element(By.ID, "osum-chat-0").text


def sounds(browser: webdriver.Chrome) -> list[dict[str, Any]]:
    return browser.execute_script("return window.osumSounds || []")


def picture(browser: webdriver.Chrome, folder: Path, name: str) -> None:
    time.sleep(0.7)
    browser.save_screenshot(str(folder / f"{name}.png"))


def outside(browser: webdriver.Chrome) -> set[str]:
    """Addresses of other computers that the page asked for."""
    found = set()
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if url.startswith(("http", "ws")) and "127.0.0.1" not in url:
                found.add(url)
    return found


def test_talking_streams_text_and_sound_and_shows_what_was_heard(browser, page_url, pictures):
    opened(browser, page_url)
    upload(browser, ANGRY)
    began = time.monotonic()
    press(browser, "osum-send")
    wait_for(lambda: "grandpa" in chat(browser), what="the reply")
    first_text = time.monotonic() - began
    wait_for(lambda: sounds(browser) and sounds(browser)[0]["samples"], what="the first sound")
    first_sound = time.monotonic() - began
    wait_for(lambda: "total" in chat(browser), what="the end of the reply")
    whole = time.monotonic() - began
    said = chat(browser)
    assert WORDS in said and all(word in said for word in ("old", "male", "angry", "cough", "Thought"))
    wait_for(lambda: sounds(browser)[0].get("done"), what="the end of the sound")
    assert sounds(browser)[0]["samples"] > 22050, "more than a second was played"
    assert first_sound < whole, "sound began before the reply was whole"
    drawn = wait_for(lambda: browser.find_element(By.CSS_SELECTOR, "#osum-picture svg"), what="the picture")
    about = drawn.get_attribute("aria-label")
    assert "film" in about and "cough" in about
    print(f"on the page: first text {first_text:.2f} s, first sound {first_sound:.2f} s, whole {whole:.2f} s")
    picture(browser, pictures, "talk")
    browser.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    picture(browser, pictures, "talk_picture")
    assert not outside(browser)


@pytest.mark.parametrize(
    ("title", "needs", "shown"),
    [
        ("Chat - think first, then answer in text", "wav", "grandpa"),
        ("Talk - answer in speech", "wav", "total"),
        ("Chat - answer in text", "wav", "total"),
        ("Write down what I say", "wav", WORDS),
        ("Say my text", "text", "first sound"),
        ("Answer my text", "text", "total"),
    ],
)
def test_every_entry_of_the_menu_works(browser, page_url, title, needs, shown):
    opened(browser, page_url)
    choose(browser, "osum-mode", title)
    if needs == "wav":
        upload(browser, ANGRY)
    else:
        box = wait_for(lambda: browser.find_element(By.CSS_SELECTOR, "#osum-text textarea"))
        box.send_keys("I am glad to hear that.")
    press(browser, "osum-send")
    wait_for(lambda: shown in chat(browser), what=shown)


# The library's own stream, once for each line of standard input.
STREAM = """
import json, sys, time
from osum_echat import EChat
echat = EChat.load("checkpoints/mini", device="cpu")
for line in iter(sys.stdin.readline, ""):
    began, first = time.perf_counter(), {}
    for event in echat.stream(sys.argv[1], think="tag", speak=True, seed=0):
        first.setdefault(type(event).__name__, time.perf_counter() - began)
    print(json.dumps(first | {"whole": time.perf_counter() - began}), flush=True)
"""
# Notes when the page first shows the reply's first word, and the press of the button.
WATCH = """
window.osumSeen = {pressed: performance.now()};
const chat = document.getElementById("osum-chat-0");
const look = () => {
  if (!window.osumSeen.text && chat.textContent.includes(arguments[0])) window.osumSeen.text = performance.now();
};
new MutationObserver(look).observe(chat, {subtree: true, childList: true, characterData: true});
document.getElementById("osum-send").click();
"""


def test_first_text_and_first_sound_beside_those_of_the_library(browser, page_url):
    """Turn about, so that both meet the same load; what the page adds is gradio, HTTP and drawing."""
    python = os.environ.get("OSUM_ECHAT_PYTHON", sys.executable)
    library = subprocess.Popen(
        [python, "-c", STREAM, str(ANGRY)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    )
    assert library.stdin and library.stdout
    rows: list[dict[str, float]] = []
    try:
        opened(browser, page_url)
        for number in range(6):
            print("go", file=library.stdin, flush=True)
            own = json.loads(library.stdout.readline())
            if number:
                press(browser, "osum-clear")
                wait_for(lambda: "total" not in chat(browser), what="an empty conversation")
            else:
                upload(browser, ANGRY)
            before = len(sounds(browser))
            wait_for(lambda: _enabled(browser.find_element(By.ID, "osum-send")), what="the button")
            browser.execute_script(WATCH, "That ")
            wait_for(lambda before=before: len(sounds(browser)) > before and sounds(browser)[-1].get("done"), what="the sound")
            wait_for(lambda: "total" in chat(browser), what="the end of the reply")
            seen, sound = browser.execute_script("return [window.osumSeen, window.osumSounds.at(-1)]")
            rows.append(
                {
                    "library text": own["TextDelta"],
                    "page text": (seen["text"] - seen["pressed"]) / 1000,
                    "library sound": own["AudioChunk"],
                    "page sound": (sound["first"] - seen["pressed"]) / 1000,
                    "library whole": own["whole"],
                    "page sound whole": (sound["done"] - seen["pressed"]) / 1000,
                }
            )
            print({name: round(value, 2) for name, value in rows[-1].items()}, flush=True)
    finally:
        library.stdin.close()
        library.wait(timeout=60)
    rows = rows[1:]  # the first warms both up
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    print("seconds, medians of 5:", ", ".join(f"{name} {value:.2f}" for name, value in medians.items()))
    assert medians["page text"] < medians["page sound"] < medians["page sound whole"]
    assert medians["page sound"] < 3 * medians["library sound"] + 1


def test_an_example_is_put_where_a_recording_goes_and_is_answered(browser, page_url):
    opened(browser, page_url)
    choose(browser, "osum-example", "old male angry cough")
    wait_for(lambda: "0:0" in browser.find_element(By.ID, "osum-wav").text, what="the example")
    choose(browser, "osum-mode", "Write down what I say")
    press(browser, "osum-send")
    wait_for(lambda: WORDS in chat(browser), what=WORDS)


def test_an_error_is_a_sentence_without_paths(browser, page_url, pictures, tmp_path):
    opened(browser, page_url)
    press(browser, "osum-send")
    wait_for(lambda: "This needs a recording" in chat(browser), what="the sentence")
    picture(browser, pictures, "error")
    assert "/" not in browser.find_element(By.CSS_SELECTOR, "#osum-chat-0 .problem").text


def test_two_people_are_answered_at_the_same_time_each_with_their_own_reply(browser, page_url, pictures):
    other = start_browser()
    try:
        files = {browser: (ANGRY, "film"), other: (DEMO / "1_adult_male_happy.ogg", "birthday")}
        for visitor, (file, _) in files.items():
            opened(visitor, page_url)
            upload(visitor, file)
        for visitor in files:
            press(visitor, "osum-send")
        for visitor, (_, word) in files.items():
            wait_for(lambda visitor=visitor: "total" in chat(visitor), what="a reply")
            assert word in chat(visitor)
        assert "birthday" not in chat(browser) and "film" not in chat(other)
        spans = [(s["first"], s["done"]) for v in files for s in wait_for(lambda v=v: [x for x in sounds(v) if x.get("done")])]
        assert len(spans) == 2
        picture(other, pictures, "second_person")
    finally:
        other.quit()


def test_the_page_is_chinese_in_a_chinese_browser_and_can_be_switched(page_url, pictures):
    visitor = start_browser(language="zh-CN")
    try:
        opened(visitor, page_url, send="发送")
        upload(visitor, ANGRY)
        press(visitor, "osum-send")
        wait_for(lambda: "首个文字" in chat(visitor), what="the reply")
        assert all(word in chat(visitor) for word in ("老年", "生气", "咳嗽", "思考"))
        picture(visitor, pictures, "chinese")
        choose(visitor, "osum-language", "English")
        wait_for(lambda: visitor.find_element(By.ID, "osum-send").text == "Send", what="the page in English")
    finally:
        visitor.quit()


@pytest.mark.parametrize(("name", "dark"), [("phone", False), ("phone_dark", True)])
def test_a_phone_shows_everything_without_scrolling_sideways(page_url, pictures, name, dark):
    visitor = start_browser(width=390, height=844, dark=dark)
    try:
        opened(visitor, page_url)
        upload(visitor, ANGRY)
        press(visitor, "osum-send")
        wait_for(lambda: "total" in chat(visitor), what="the reply")
        wide = visitor.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide[0] <= wide[1] + 1, f"the page is {wide[0]} px wide on a screen of {wide[1]}"
        assert visitor.execute_script("return document.body.classList.contains('dark')") is dark
        visitor.execute_script("window.scrollTo(0, 0)")
        picture(visitor, pictures, name)
    finally:
        visitor.quit()


def test_the_microphone_records_and_the_keyboard_sends(browser, page_url, pictures):
    opened(browser, page_url)
    record = wait_for(
        lambda: browser.find_element(By.CSS_SELECTOR, "#osum-wav button.record-button, #osum-wav .record"), what="Record"
    )
    record.click()
    time.sleep(2.5)
    stop = wait_for(
        lambda: browser.find_element(By.CSS_SELECTOR, "#osum-wav button.stop-button, #osum-wav .stop-button"), what="Stop"
    )
    stop.click()
    wait_for(
        lambda: browser.find_elements(By.CSS_SELECTOR, "#osum-wav #waveform, #osum-wav .waveform-container"), what="the recording"
    )
    time.sleep(1.0)
    send = browser.find_element(By.ID, "osum-send")
    browser.execute_script("arguments[0].focus()", send)
    send.send_keys(Keys.ENTER)
    wait_for(
        lambda: "total" in chat(browser) or browser.find_elements(By.CSS_SELECTOR, "#osum-chat-0 .problem"), what="an answer"
    )
    picture(browser, pictures, "microphone")


def test_a_rating_is_stored_for_the_reply_it_stands_under(browser, page_url):
    opened(browser, page_url)
    upload(browser, ANGRY)
    press(browser, "osum-send")
    wait_for(lambda: "total" in chat(browser), what="the reply")
    thumb = wait_for(
        lambda: browser.find_elements(
            By.CSS_SELECTOR, "#osum-chat-0 button[aria-label*='ike'], #osum-chat-0 button[title*='ike']"
        )
    )
    browser.execute_script("arguments[0].click()", thumb[-1])
    wait_for(lambda: "the rating is stored" in browser.find_element(By.ID, "osum-status").text, what="the thanks")


def test_two_checkpoints_answer_side_by_side(browser, page_of_two, pictures):
    opened(browser, page_of_two)
    both = next(label for label in browser.find_elements(By.CSS_SELECTOR, "label") if "both, side by side" in label.text)
    browser.execute_script("arguments[0].querySelector('input').click()", both)
    upload(browser, ANGRY)
    press(browser, "osum-send")
    for number in (0, 1):
        wait_for(lambda number=number: "total" in browser.find_element(By.ID, f"osum-chat-{number}").text, what=f"reply {number}")
    places = [browser.find_element(By.ID, f"osum-chat-{number}").location for number in (0, 1)]
    assert places[0]["y"] == places[1]["y"] and places[0]["x"] < places[1]["x"]
    picture(browser, pictures, "two_models")
