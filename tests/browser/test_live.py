"""The live page in Chromium, whose microphone plays a recording: it speaks, is answered, interrupts. Screenshots go to out/browser/, to be looked at."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, ROOT
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

SPEECH = DEMO / "2_old_male_sad.ogg"
MAKE_WAV = """
import sys, numpy as np, soundfile
speech, rate = soundfile.read(sys.argv[1])
gap = lambda seconds: np.zeros(int(seconds * rate))
said = [piece for seconds in sys.argv[3:] for piece in (speech, gap(float(seconds)))]
soundfile.write(sys.argv[2], np.concatenate([gap(1.0), *said]), rate, subtype="PCM_16")
"""


def python() -> str:
    return os.environ.get("OSUM_ECHAT_PYTHON", sys.executable)


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The server with mini, started as a user starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python(), "-m", "osum_echat.cli", "serve", "--port", str(port), "--device", "cpu", "--threads", "1", *arguments]
    server = subprocess.Popen(command, cwd=ROOT)
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(600):
            assert server.poll() is None, "the server ended by itself"
            try:
                urllib.request.urlopen(url + "health", timeout=2).read(1)
                break
            except OSError:
                time.sleep(0.2)
        yield url, server
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)


@pytest.fixture(scope="module")
def live_url() -> Iterator[str]:
    with serving() as (url, _):
        yield url


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the microphone plays, over and over: with time for the answer, and with too little.

    An answer of 3 s is interrupted by speech that begins while it sounds and 0.5 s before its end. When it sounds depends on the machine, so
    the pauses of ``hasty`` differ: from an answer at once to one that takes 7 s, one of them ends inside it.
    """
    folder = tmp_path_factory.mktemp("microphone")
    pauses = {"polite": ("20",), "hasty": ("2", "3.5", "5", "7")}
    for name, seconds in pauses.items():
        subprocess.run([python(), "-c", MAKE_WAV, str(SPEECH), str(folder / f"{name}.wav"), *seconds], check=True)
    return {name: folder / f"{name}.wav" for name in pauses}


@contextmanager
def chromium(
    wav: Path | None, width: int = 1200, height: int = 900, language: str = "en-US", dark: bool = False, microphone: bool = True
) -> Iterator[webdriver.Chrome]:
    assert shutil.which("chromedriver"), "chromedriver is missing: apt-get install chromium-driver"
    options = webdriver.ChromeOptions()
    arguments = ["--headless=new", "--no-sandbox", f"--window-size={width},{height}", f"--lang={language}"]
    arguments += ["--autoplay-policy=no-user-gesture-required"]
    if microphone:
        arguments += ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    else:
        arguments += ["--deny-permission-prompts"]
    if wav is not None:
        arguments += [f"--use-file-for-fake-audio-capture={wav}"]
    if dark:
        arguments += ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"]
    for argument in arguments:
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"intl.accept_languages": language})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_window_size(width, height)
    try:
        yield driver
    finally:
        driver.quit()


def wait_for(found: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.1)
    raise AssertionError(f"{what} did not come")


def texts(page: webdriver.Chrome, css: str) -> list[str]:
    return [
        t for t in page.execute_script("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", css) if t
    ]


def faults(page: webdriver.Chrome) -> list[str]:
    return [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"]


def test_somebody_speaks_and_is_answered_aloud_with_tags_and_thought(
    live_url: str, recordings: dict[str, Path], pictures: Path
) -> None:
    with chromium(recordings["polite"]) as page:
        page.get(live_url)
        page.save_screenshot(str(pictures / "live-start.png"))
        page.find_element(By.ID, "connect").click()
        heard = wait_for(lambda: texts(page, "#captions .user .text"), "what was said")
        assert "corner store" in heard[0]
        answer = wait_for(lambda: texts(page, "#captions .reply .text"), "the answer")
        assert answer[0].strip()
        wait_for(lambda: any("sad" in chip for chip in texts(page, "#tags li")), "the emotion as a chip")
        wait_for(lambda: re.search(r"[1-9]\d* turns?\b", page.find_element(By.ID, "latency-text").text), "the time of the turn")
        played = "return document.body.dataset.state"
        wait_for(lambda: page.execute_script(played) == "speaking", "sound")
        page.save_screenshot(str(pictures / "live-answer.png"))
        wait_for(lambda: page.execute_script(played) == "listening", "the end of the answer")
        thoughts = texts(page, "#captions .reply details p")
        assert any("sad" in thought for thought in thoughts), f"thoughts are folded away, and there: {thoughts}"
        page.find_element(By.ID, "connect").click()
        assert page.find_element(By.ID, "state").text == "Not connected"
        assert not faults(page)


def test_speech_interrupts_the_answer_at_phone_width_in_chinese_and_dark(
    live_url: str, recordings: dict[str, Path], pictures: Path
) -> None:
    with chromium(recordings["hasty"], width=390, height=844, language="zh-CN", dark=True) as page:
        page.get(live_url)
        assert page.find_element(By.ID, "connect").text == "开始对话"
        page.find_element(By.ID, "connect").click()
        wait_for(lambda: texts(page, "#captions .cut"), "an interruption", 90)
        page.save_screenshot(str(pictures / "live-interrupted.png"))
        assert {"性别：男", "声音：无"} <= set(texts(page, "#tags li"))
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth"), (
            "nothing sticks out at phone width"
        )
        assert not faults(page)


CALL = """
const [done] = arguments;
async function call() {
  const stream = await navigator.mediaDevices.getUserMedia({audio: true});
  const peer = window.peer = new RTCPeerConnection(), channel = window.channel = peer.createDataChannel("oai-events");
  window.events = [];
  window.loudest = 0;
  channel.onmessage = (message) => window.events.push(JSON.parse(message.data));
  peer.ontrack = ({streams}) => {
    const speaker = window.speaker = new Audio();  // without a player Chromium decodes nothing
    speaker.srcObject = streams[0];
    speaker.play();
    const context = window.context = new AudioContext(), meter = context.createAnalyser(), samples = new Float32Array(meter.fftSize);
    context.createMediaStreamSource(streams[0]).connect(meter);
    setInterval(() => {
      meter.getFloatTimeDomainData(samples);
      window.loudest = Math.max(window.loudest, ...samples.map(Math.abs));
    }, 50);
  };
  peer.addTrack(stream.getTracks()[0], stream);
  await peer.setLocalDescription();
  const headers = {"Content-Type": "application/sdp"};
  const answer = await fetch("/v1/realtime/calls?model=any", {method: "POST", headers, body: peer.localDescription.sdp});
  await peer.setRemoteDescription({type: "answer", sdp: await answer.text()});
  return answer.status;
}
call().then(done, (error) => done(String(error)));
"""


def test_a_call_over_webrtc_by_the_browser_itself(live_url: str, recordings: dict[str, Path]) -> None:
    with chromium(recordings["polite"]) as page:
        page.get(live_url)
        assert page.execute_async_script(CALL) == 201
        kinds = "return window.events.map((event) => event.type)"
        try:
            wait_for(lambda: "output_audio_buffer.stopped" in page.execute_script(kinds), "the end of an answer")
        finally:
            print(page.execute_script("return [window.peer.connectionState, window.loudest]"), page.execute_script(kinds))
        said = page.execute_script('return window.events.filter((e) => e.type.endsWith("transcription.completed"))[0].transcript')
        assert "corner store" in said and page.execute_script("return window.loudest") > 0.02
        assert "response.output_audio.delta" not in page.execute_script(kinds)


def test_push_to_talk_by_the_keyboard_and_the_interrupt_button(live_url: str, recordings: dict[str, Path]) -> None:
    with chromium(recordings["polite"]) as page:
        page.get(live_url)
        page.execute_script("const s = document.getElementById('turns'); s.value = 'none'; s.onchange();")
        page.find_element(By.ID, "connect").click()
        wait_for(lambda: page.find_element(By.ID, "state").text == "Listening", "the connection")
        page.find_element(By.TAG_NAME, "h1").click()  # away from the buttons, which take the space bar for themselves
        webdriver.ActionChains(page).key_down(Keys.SPACE).perform()
        wait_for(lambda: page.find_element(By.ID, "state").text == "Hearing you", "talking")
        time.sleep(4.5)
        webdriver.ActionChains(page).key_up(Keys.SPACE).perform()
        wait_for(lambda: texts(page, "#captions .reply .text"), "the answer")
        wait_for(lambda: page.execute_script("return document.body.dataset.state") == "speaking", "sound")
        page.find_element(By.ID, "interrupt").click()
        wait_for(lambda: texts(page, "#captions .cut"), "the cut")
        assert not faults(page)


def test_a_refused_microphone_and_a_server_that_goes_are_said(recordings: dict[str, Path], pictures: Path) -> None:
    with serving("--api-key", "secret", "--sessions", "1") as (url, server):
        with chromium(None, microphone=False) as page:
            page.get(url)
            page.find_element(By.ID, "connect").click()
            wait_for(lambda: page.find_element(By.ID, "key").is_displayed(), "the question for the key")
            page.find_element(By.ID, "key").send_keys("wrong", Keys.ENTER)
            wait_for(lambda: "did not accept" in page.find_element(By.ID, "notice").text, "the refusal")
            page.find_element(By.ID, "key").send_keys("secret", Keys.ENTER)
            wait_for(lambda: "microphone" in page.find_element(By.ID, "notice").text, "the refused microphone")
            page.save_screenshot(str(pictures / "live-no-microphone.png"))

        def connected(page: webdriver.Chrome) -> None:
            page.get(url)
            page.find_element(By.ID, "connect").click()
            wait_for(lambda: page.find_element(By.ID, "key").is_displayed(), "the question for the key")
            page.find_element(By.ID, "key").send_keys("secret", Keys.ENTER)

        with chromium(recordings["polite"]) as first, chromium(recordings["polite"]) as second:
            connected(first)
            wait_for(lambda: first.find_element(By.ID, "state").text == "Listening", "the first session")
            connected(second)
            wait_for(lambda: "full" in second.find_element(By.ID, "notice").text, "the full server")
            server.send_signal(signal.SIGTERM)
            wait_for(lambda: "shutting down" in first.find_element(By.ID, "notice").text, "the end of the server")
            first.save_screenshot(str(pictures / "live-gone.png"))
