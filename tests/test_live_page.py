"""The files of the live page: both languages say the same things, and nothing is fetched from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

from osum_echat.serving.app import STATIC
from osum_echat.serving.page.texts import tables


def test_both_languages_say_the_same_things() -> None:
    text = (STATIC / "words.js").read_text(encoding="utf-8")
    english, chinese = text.split("  zh: {")
    names = [set(re.findall(r"(?:^|[{,]\s*|\n\s+)([a-zA-Z]+):", part)) - {"en", "zh"} for part in (english, chinese)]
    assert names[0] == names[1] and len(names[0]) > 50


def test_tags_have_the_words_of_the_other_page() -> None:
    english, chinese = (STATIC / "words.js").read_text(encoding="utf-8").split("  zh: {")
    for part, language in ((english, "en"), (chinese, "zh")):
        [values] = re.findall(r"values: \{(.*?)\}", part, re.S)
        known = {key.removeprefix("value."): word for key, word in tables()[language].items() if key.startswith("value.")}
        assert dict(re.findall(r'(\w+): "([^"]+)"', values)) == known
        for kind in ("age", "gender", "emotion", "event"):
            assert re.search(rf'\b{kind}: "{tables()[language][f"tag.{kind}"]}"', part), kind


def test_every_word_that_the_page_asks_for_is_there() -> None:
    words = (STATIC / "words.js").read_text(encoding="utf-8")
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    script = (STATIC / "live.js").read_text(encoding="utf-8")
    asked = set(re.findall(r'data-say(?:-label)?="(\w+)"', page)) | set(re.findall(r'\bsay\("(\w+)"', script))
    missing = [name for name in asked if not re.search(rf"\b{name}:", words)]
    assert asked and not missing


def test_the_page_takes_nothing_from_other_sites_and_runs_nothing_inline() -> None:
    files = [path for path in STATIC.iterdir() if path.suffix in (".html", ".js", ".css")]
    assert len(files) >= 5
    for path in files:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        found = [link for link in re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]{2,}", text) if not link.startswith("//")]
        assert not found, (path.name, found)
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=", page), "the policy of the page forbids it"


def test_controls_have_names_and_the_page_fits_a_phone() -> None:
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert 'name="viewport"' in page and 'aria-live="polite"' in page and 'role="alert"' in page
    for button in re.findall(r"<button[^>]*>", page):
        assert "data-say=" in button, button
    css = Path(STATIC / "live.css").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in css and "max-width: 44rem" in css and ":focus-visible" in css
