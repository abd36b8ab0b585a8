"""A judge by rule behind an OpenAI-compatible URL: for trying a suite with a judge without having one. Its scores say
nothing about a model.

with Server() as judge:
    Judge(judge.url, "stand-in")
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], Any]
"""Status, headers, and content of the answer (a text) or the whole body (a mapping)."""


def by_rule(body: dict[str, Any]) -> Answer:
    """5 for a reply that says sorry, 1 for an empty one, else 2; the reason repeats the labels."""
    prompt = body["messages"][-1]["content"]
    reply = re.search(r"^(?:The assistant's reply|Reply, written down|Answer to check): (.*)", prompt, re.MULTILINE)
    labels = re.search(r"beside the words: (.*)", prompt)
    text = reply.group(1) if reply else ""
    score = 5 if "sorry" in text else 1 if text == "(no words)" else 2
    reason = f"labels were {labels.group(1) if labels else '-'}"
    return 200, {}, f"Let me think {{not json}}. {json.dumps({'score': score, 'reason': reason})} That is all."


class Server:
    """Serves `answer` on a free port of this machine; remembers what it was asked."""

    def __init__(self, answer: Callable[[dict[str, Any]], Answer] = by_rule, port: int = 0) -> None:
        self.asked: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                outer.paths.append(self.path)
                outer.headers.append(dict(self.headers))
                status, headers, content = answer(body)
                whole = (
                    content
                    if isinstance(content, dict)
                    else {"choices": [{"message": {"role": "assistant", "content": content}}]}
                )
                data = json.dumps(whole).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                outer.paths.append(f"GET {self.path}")
                self.send_error(404)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> Server:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
