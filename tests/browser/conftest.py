"""The page in a real browser. Run by `make test-browser`, in an environment of its own; needs Chromium and its driver (Debian: chromium-driver)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "assets" / "demo"


@pytest.fixture(scope="session")
def pictures() -> Path:
    """Folder of the screenshots, to be looked at."""
    folder = ROOT / "out" / "browser"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def page_started(folder: Path, *arguments: str) -> Iterator[str]:
    """The page with mini, started as a user starts it, from another folder; ``folder`` takes the ratings."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python = os.environ.get("OSUM_ECHAT_PYTHON", sys.executable)
    command = [python, str(ROOT / "infer_gradio.py"), "--port", str(port), "--feedback", str(folder), "--device", "cpu"]
    folder.mkdir(exist_ok=True)
    server = subprocess.Popen([*command, *arguments], cwd=folder)
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(300):
            assert server.poll() is None, "the page ended by itself"
            try:
                urllib.request.urlopen(url, timeout=2).read(1)
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=30)


@pytest.fixture(scope="session")
def page_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page with one checkpoint."""
    with page_started(tmp_path_factory.mktemp("feedback")) as url:
        yield url


@pytest.fixture
def page_of_two(tmp_path: Path) -> Iterator[str]:
    """The page with two checkpoints: mini under two names."""
    (tmp_path / "another").symlink_to(ROOT / "checkpoints" / "mini")
    with page_started(tmp_path / "feedback", "--second-checkpoint", str(tmp_path / "another")) as url:
        yield url


def start_browser(width: int = 1280, height: int = 1000, language: str = "en-US", dark: bool = False) -> webdriver.Chrome:
    """A headless Chromium with a microphone that plays a recording of the demo."""
    assert shutil.which("chromedriver"), "chromedriver is missing: apt-get install chromium-driver"
    options = webdriver.ChromeOptions()
    for argument in (
        "--headless=new",
        "--no-sandbox",
        f"--window-size={width},{height}",
        f"--lang={language}",
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        "--autoplay-policy=no-user-gesture-required",
        *(["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []),
    ):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"intl.accept_languages": language})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    browser.set_window_size(width, height)
    return browser


@pytest.fixture
def browser() -> Iterator[webdriver.Chrome]:
    driver = start_browser()
    yield driver
    driver.quit()
