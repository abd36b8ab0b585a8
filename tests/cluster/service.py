"""Two replicas of the live server on Ray Serve: sessions on both, kill -9 of one, a clean close for its clients."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from typing import Any

import psutil

from tests.cluster.case import Bench

SESSIONS = 12


def replicas(bench: Bench) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    call = [
        sys.executable,
        "-m",
        "osum_echat.cli",
        "serve",
        "--replicas",
        "2",
        "--share",
        "0.5",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    log = (bench.folder / "serve.log").open("w")
    server = subprocess.Popen([*call, "--port", str(port)], stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 600
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert json.load(answer)["status"] == "ok"
                    break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((bench.folder / "serve.log").read_text()[-3000:]) from None
                time.sleep(0.5)
        asyncio.run(_talk(bench, server.pid, port))
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(120)
        log.close()
    bench.check("the command ends when it is told to", code == 0, code)


def replica_pids(parent: int) -> list[int]:
    """Processes of replicas, of the cluster that ``parent`` started."""
    return [process.pid for process in psutil.Process(parent).children(recursive=True) if "ServeReplica" in _line(process)]


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


async def _talk(bench: Bench, parent: int, port: int) -> None:
    import httpx
    import websockets

    url = f"ws://127.0.0.1:{port}/v1/realtime?model=mini"
    sockets = []
    for _ in range(SESSIONS):
        sockets.append(await websockets.connect(url))
        assert json.loads(await sockets[-1].recv())["type"] == "session.created"
        await asyncio.sleep(0.5)  # Ray Serve's router learns how many sessions each replica has
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        made = [(await http.post("/v1/realtime/client_secrets", json={"session": {"type": "realtime"}})).json() for _ in range(2)]
        bench.check("client secrets are made", all(m["value"].startswith("ek_") for m in made))
    pids = replica_pids(parent)
    bench.check("two replicas run", len(pids) == 2, pids)
    os.kill(pids[0], signal.SIGKILL)
    ends = await asyncio.gather(*[_goes_on(one) for one in sockets])
    closed = [end for end in ends if end is not None]
    bench.found["serve"] = {"sessions": SESSIONS, "closed": closed}
    bench.check("the sessions of the other replica go on", 0 < ends.count(None) < SESSIONS, ends)
    bench.check("the clients of the killed one get a clean close", bool(closed) and all(code == 1012 for code in closed), closed)
    for _ in range(SESSIONS):  # at once, on the one that is left or on the new one
        async with websockets.connect(url) as one:
            assert json.loads(await one.recv())["type"] == "session.created"
    bench.check("who connects again is served at once", True)
    for one in sockets:
        await one.close()


async def _goes_on(one: Any) -> int | None:
    """None when the session answers for some seconds; the code with which it was closed."""
    import websockets

    try:
        for number in range(5):
            await one.send(json.dumps({"type": "session.update", "session": {"type": "realtime", "instructions": f"{number}"}}))
            assert json.loads(await asyncio.wait_for(one.recv(), 60))["type"] == "session.updated"
            await asyncio.sleep(0.5)
    except websockets.ConnectionClosed:
        return one.close_code
    return None
