"""`osum-echat serve` as a user runs it: what is unsafe is refused, it serves, and it stops when told to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from osum_echat.cli.serve import main
from osum_echat.model.config import load_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--ssl-certfile", "cert.pem"], "belong together"),
        (["--ssl-certfile", "no.pem", "--ssl-keyfile", "no.key"], "no such file"),
        (["--checkpoint", "no/such/checkpoint"], "no such checkpoint"),
        (["--rows", "0"], "positive"),
        (["--idle-seconds", "0"], "positive"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OSUM_ECHAT_API_KEY", raising=False)
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert word in said and len(said.splitlines()) == 1


def test_it_serves_page_and_health_and_stops_when_told_to() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "osum_echat.cli", "serve", "--port", str(port), "--device", "cpu", "--threads", "1"]
    server = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    try:
        for _ in range(3000):
            assert server.poll() is None, "it ended by itself"
            try:
                health = httpx.get(f"http://127.0.0.1:{port}/health", timeout=60)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        assert health.json()["status"] == "ok" and health.json()["model"] == "osum-echat-mini"
        page = httpx.get(f"http://127.0.0.1:{port}/", timeout=60)
        assert (
            page.status_code == 200
            and "/static/live.js" in page.text
            and "microphone=(self)" in page.headers["permissions-policy"]
        )
        for name in ("live.js", "audio.js", "worklet.js", "words.js", "live.css", "icon.svg"):
            assert httpx.get(f"http://127.0.0.1:{port}/static/{name}", timeout=60).status_code == 200
    finally:
        server.send_signal(signal.SIGTERM)
        said, _ = server.communicate(timeout=300)
    assert server.returncode in (0, -signal.SIGTERM), server.returncode
    learnt = load_config(ROOT / "checkpoints" / "mini" / "config.yaml").dialect.learnt.past_turns
    assert ("has not learnt past turns" in said) is (learnt == 0) and f"ws://127.0.0.1:{port}/v1/realtime" in said
