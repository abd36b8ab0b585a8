"""The documents: links lead somewhere, both languages state the same commands, Chinese is written as Chinese, examples run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/**/*.md"), *ROOT.glob(".github/**/*.md")]
    if "CHANGELOG" not in path.name
)
TRANSLATED = [
    (ROOT / "README.md", ROOT / "README_CN.md"),
    *((ROOT / "docs" / path.name, path) for path in sorted((ROOT / "docs" / "zh").glob("*.md"))),
]
FEW_STEPS = ["max_steps=2", "precision=fp32", "threads=1", "device=cpu"]
HAN = r"[\u4e00-\u9fff]"


def blocks(page: Path) -> list[str]:
    """The lines of a page's code blocks, without comments; what programs print (blocks without a language) is left out."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"```[a-z]+\n(.*?)```", text, flags=re.S)
    lines = (re.sub(r"\s+#.*$", "", line).rstrip() for block in found for line in block.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def named(page: Path) -> set[str]:
    """Commands, options, settings and files that stand within the text."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    spans = re.findall(r"`([^`]+)`", text)
    return {" ".join(span.split()) for span in spans if not re.search(HAN, span)}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    missing = [
        link for link in links if "://" not in link and not link.startswith("mailto:") and not (page.parent / link).exists()
    ]
    assert not missing


@pytest.mark.parametrize(("english", "chinese"), TRANSLATED, ids=lambda p: p.name)
def test_both_languages_state_the_same_commands(english, chinese):
    assert blocks(chinese) == blocks(english)


@pytest.mark.parametrize("name", ["evaluation.md", "serving.md"])
def test_both_languages_name_the_same_options_settings_and_files(name):
    """Not only the commands of the blocks: whatever a reader could type or look up."""
    english, chinese = named(ROOT / "docs" / name), named(ROOT / "docs" / "zh" / name)
    assert english and sorted(english - chinese) == sorted(chinese - english) == []
    assert any(name.startswith("--") for name in english)


@pytest.mark.parametrize("page", ["README.md", "README_CN.md"])
def test_the_readme_shows_replies_as_they_are(page):
    """What mini heard and answered is quoted from the replies that are shipped."""
    replies = map(json.loads, (ROOT / "assets/replies/replies.jsonl").read_text(encoding="utf-8").splitlines())
    known = {reply["key"]: reply for reply in replies}
    rows = re.findall(r"^\| \[(\w+)\.ogg\].*$", (ROOT / page).read_text(encoding="utf-8"), re.M)
    lines = [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if "](assets/demo/" in line]
    assert len(rows) == len(lines) >= 3
    for key, line in zip(rows, lines, strict=True):
        assert known[key]["heard"]["transcript"] in line and f"[{known[key]['reply']}](assets/replies/{key}.ogg)" in line


@pytest.mark.parametrize("page", [chinese for _, chinese in TRANSLATED], ids=lambda p: p.name)
def test_chinese_pages_use_full_width_punctuation(page):
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|https?://\S+", "", page.read_text(encoding="utf-8"), flags=re.S)
    assert not re.findall(rf"{HAN}[,;:!?(]|[,;:!?)]{HAN}", text)


@pytest.mark.parametrize("word", ["house", "floors?", "ears"])
def test_pages_use_the_terms_of_the_field(word):
    pages = {page: page.read_text(encoding="utf-8").splitlines() for page in PAGES}
    found = [
        f"{page.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for page, lines in pages.items()
        for number, line in enumerate(lines, 1)
        if re.search(rf"\b{word}\b", line, re.I)
    ]
    assert not found


def test_the_version_is_the_same_everywhere():
    stated = {
        "package": re.search(r'__version__ = "([^"]+)"', (ROOT / "osum_echat/__init__.py").read_text(encoding="utf-8")),
        "pyproject": re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M),
        "citation": re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M),
        "changelog": re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M),
    }
    assert len({match[1] for match in stated.values() if match}) == 1 and all(stated.values()), stated


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("chat.py", []),
        ("stream_to_speakers.py", []),
        ("own_voice.py", []),
        (
            "own_data_to_lora.py",
            [*FEW_STEPS, "data.workers=0", "tensorboard=false", "safety.try_largest_batch=false"],
        ),
    ],
)
def test_examples_run(name, arguments, tmp_path):
    for folder in ("assets", "checkpoints", "conf", "examples", "recipes"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, f"examples/{name}", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if name == "chat.py":
        assert "the baby slept two hours" in done.stdout and "adult male happy applause" in done.stdout
    elif name == "own_data_to_lora.py":
        assert "i open" in done.stdout and (tmp_path / "out/own_data/model/config.yaml").is_file()
    else:
        assert "written: out/" in done.stdout and any((tmp_path / "out").glob("*.wav"))
