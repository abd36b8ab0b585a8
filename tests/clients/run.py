"""Clients that nobody here wrote, each in an environment of its own, in a dialogue of three turns with one interruption against mini; GPT-Live by
three of them, a turn each; and the example scripts for two of them.

    python tests/clients/run.py [--envs FOLDER] [--only NAME] [--together N]

`make test-clients` runs it, N clients at a time (they speak in real time, so most of it is waiting). Environments are made in FOLDER (default .clients/) when they are not there: Python ones by venv and pip, node ones by npm.
Exit code 0 when every client was answered, interrupted once, and saw no error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PYTHON = {
    "agents": ("openai-agents==0.24.0", "openai[realtime]==3.57.0"),
    "pipecat": ("pipecat-ai[openai,websocket]==1.14.0",),
    "livekit": ("livekit-agents==1.8.9", "livekit-plugins-openai==1.8.9"),
}
NODE = ("openai@7.55.0", "@openai/agents-realtime@0.20.0", "ws")


@dataclass(frozen=True)
class Client:
    """``turns``: 3 with an interruption, or 1."""

    name: str
    environment: str
    script: str
    tls: bool = False
    turns: int = 3


CLIENTS = (
    Client("openai (Python)", "agents", "openai_client.py"),
    Client("openai-agents (Python)", "agents", "agents_client.py"),
    Client("pipecat-ai", "pipecat", "pipecat_client.py"),
    Client("livekit-plugins-openai", "livekit", "livekit_client.py"),
    Client("examples/live_pipecat.py", "pipecat", "example_pipecat.py"),
    Client("examples/live_livekit.py", "livekit", "example_livekit.py", turns=1),
    Client("openai (npm)", "node", "openai_client.mjs", tls=True),
    Client("@openai/agents-realtime", "node", "agents_client.mjs"),
    Client("GPT-Live: openai (Python)", "agents", "gpt_live_openai.py", turns=1),
    Client("GPT-Live: pipecat-ai", "pipecat", "gpt_live_pipecat.py", turns=1),
    Client("GPT-Live: livekit-plugins-openai", "livekit", "gpt_live_livekit.py", turns=1),
)


def make(name: str, envs: Path) -> Path:
    """The environment, and the program that runs a script in it."""
    folder = envs / f"live-{name}"
    if name == "node":
        if not (folder / "node_modules" / "openai").is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run(["npm", "init", "-y"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            subprocess.run(["npm", "install", "--silent", *NODE], cwd=folder, check=True)
        for script in HERE.glob("*.mjs"):  # modules are found from where the script lies
            shutil.copy(script, folder)
        return folder
    if not (folder / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", *PYTHON[name]], check=True)
    return folder


@contextlib.contextmanager
def serving(*arguments: str, scheme: str = "http") -> Iterator[str]:
    """The server with mini, started as a user starts it; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "osum_echat.cli",
        "serve",
        "--port",
        str(port),
        "--device",
        "cpu",
        "--threads",
        "1",
        *arguments,
    ]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        for _ in range(1200):
            assert server.poll() is None, "the server ended by itself"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.2)
        if scheme == "http":
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
        yield f"{'wss' if scheme == 'https' else 'ws'}://127.0.0.1:{port}/v1/realtime"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)


def run(client: Client, folder: Path, url: str, wav: Path, extra: dict[str, str]) -> tuple[bool, str]:
    """Whether all was as it should be, and what the client reported."""
    program = (
        ["node", client.script] if client.environment == "node" else [str(folder / "bin" / "python"), str(HERE / client.script)]
    )
    cwd = folder if client.environment == "node" else HERE
    done = subprocess.run(
        [*program, url, str(wav)], cwd=cwd, env={**os.environ, **extra}, capture_output=True, text=True, timeout=240, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return False, f"no report (exit {done.returncode}): {done.stderr[-600:]}"
    report = json.loads(lines[-1])
    short = f"{report['turns']} turns, {report['interrupted']} interrupted, {report['audio_seconds']:.1f} s of sound, heard: {report['transcripts'][:1]}"
    good = report["turns"] >= client.turns
    if client.turns == 3:
        good = good and report["interrupted"] == 1 and report["completed"] >= 2
    good = (
        good
        and not report["errors"]
        and report["audio_seconds"] > 1
        and any("birthday" in t or "month" in t for t in report["transcripts"])
    )
    return good, short if not report["errors"] else f"{short}, errors: {report['errors'][:2]}"


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, made by openssl."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            *subject,
            "-keyout",
            str(key),
            "-out",
            str(cert),
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


def speech(folder: Path) -> Path:
    """A recording of the demo as 24 kHz PCM."""
    import soundfile
    import soxr

    samples, rate = soundfile.read(ROOT / "assets" / "demo" / "1_adult_male_happy.ogg")
    path = folder / "speech.wav"
    soundfile.write(path, soxr.resample(samples, rate, 24000), 24000, subtype="PCM_16")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path, default=ROOT / ".clients")
    parser.add_argument("--only", action="append", default=[], help="part of a client's name")
    parser.add_argument("--together", type=int, default=2, help="clients at a time (default: 2)")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped
    chosen = [c for c in CLIENTS if not args.only or any(part in c.name for part in args.only)]
    args.envs.mkdir(exist_ok=True)
    folders = {name: make(name, args.envs) for name in {c.environment for c in chosen}}
    wav, failed = speech(args.envs), 0
    cert, key = certificate(args.envs)
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(serving()) if any(not c.tls for c in chosen) else ""
        tls = ""
        if any(c.tls for c in chosen):
            tls = stack.enter_context(serving("--ssl-certfile", str(cert), "--ssl-keyfile", str(key), scheme="https"))

        def one(client: Client) -> tuple[bool, str]:
            extra = {"NODE_EXTRA_CA_CERTS": str(cert)} if client.tls else {}
            try:
                return run(client, folders[client.environment], tls if client.tls else plain, wav, extra)
            except subprocess.TimeoutExpired:
                return False, "it did not end"

        with ThreadPoolExecutor(args.together) as pool:
            for client, (good, said) in zip(chosen, pool.map(one, chosen), strict=True):
                failed += not good
                print(f"{'ok  ' if good else 'FAIL'}  {client.name:<34} {said}", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} clients")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
