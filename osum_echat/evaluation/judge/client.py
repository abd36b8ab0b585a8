"""A judge behind an OpenAI-compatible URL: one method, retries, and answers kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

log = logging.getLogger(__name__)
Messages = Sequence[Mapping[str, str]]
KEY_VARIABLES = ("OSUM_ECHAT_JUDGE_KEY", "OPENAI_API_KEY")
ANSWER_TOKENS = 300


def key(prompt: str, model: str, messages: Messages) -> str:
    """What an answer is kept by: prompt (digest of name, version and text), model, and the question itself."""
    made_of = json.dumps([prompt, model, list(messages)], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(made_of.encode()).hexdigest()


class JudgeError(ValueError):
    """The judge gave no answer; the message says what the server said."""


class Budget:
    """Calls that may still be made, by all judges of a command together; tries that a busy server refuses count too.
    ``calls=None``: any number."""

    def __init__(self, calls: int | None = None) -> None:
        self.limit = self.left = calls
        self._lock = threading.Lock()

    def take(self) -> None:
        """Raises JudgeError when there is none left."""
        with self._lock:
            if self.left is None:
                return
            if self.left <= 0:
                raise JudgeError(f"budget: --max-calls {self.limit} was reached")
            self.left -= 1


class Judge:
    """A judge.

    Args:
        url: base URL (``http://host:port/v1``), or the whole one of ``chat/completions``.
        model: as the server names it; None: what the server has ("default" is asked for, and nothing where the server
            knows no such model).
        cache: folder of kept answers; None: none are kept.
        retries: further tries after 429, a server error or a broken connection, with growing pauses (or as long as the
            server asks for).
        transport: of httpx, for tests.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        cache: Path | None = None,
        retries: int = 5,
        timeout: float = 120.0,
        pause: float = 1.0,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--judge {url!r} is not a URL; give one such as http://localhost:8000/v1")
        self.url = url.rstrip("/")
        if not self.url.endswith("/chat/completions"):
            self.url += "/chat/completions"
        self.is_named = model is not None
        self.model, self.cache, self.retries, self.pause, self.sleep = model or "default", cache, retries, pause, sleep
        self.calls = 0
        self.answered_as: set[str] = set()  # models that the server says it is
        key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(headers=headers, timeout=timeout, transport=transport)
        self._lock = threading.Lock()
        self._refused: set[str] = set()  # fields of the request that this server does not take

    def close(self) -> None:
        self._client.close()

    @property
    def identity(self) -> str:
        """What answers are kept by: the model, or the server whose unnamed model it is (two servers may have different
        ones)."""
        return self.model if self.is_named else f"{self.model} at {self.url}"

    def known(self, prompt: str, messages: Messages) -> str | None:
        """The kept answer, if there is one."""
        if self.cache is None:
            return None
        path = self._path(key(prompt, self.identity, messages))
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a damaged entry is asked again
            return str(json.loads(path.read_text(encoding="utf-8"))["answer"])
        return None

    def keep(self, prompt: str, messages: Messages, answer: str) -> None:
        """Keep an answer. Only one that holds a score should be: another try may do better than nonsense."""
        if self.cache is None:
            return
        path = self._path(key(prompt, self.identity, messages))
        path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"prompt": prompt, "model": self.model, "messages": list(messages), "answer": answer}
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".part")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(entry, file, ensure_ascii=False)
        os.replace(temporary, path)

    def _path(self, name: str) -> Path:
        assert self.cache is not None
        return self.cache / name[:2] / f"{name}.json"

    def ask(self, messages: Messages, budget: Budget | None = None) -> str:
        """The text of the judge's answer. Raises JudgeError, also when the budget is spent."""
        problem = ""
        for attempt in range(self.retries + 1):
            body = {"model": self.model, "messages": list(messages), "temperature": 0, "max_tokens": ANSWER_TOKENS}
            body = {name: value for name, value in body.items() if name not in self._refused}
            if budget is not None:
                _take(budget, problem)
            with self._lock:
                self.calls += 1
            try:
                response = self._client.post(self.url, json=body)
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
                self._wait(attempt, None)
                continue
            if response.status_code == 200:
                content, model = _content(response)
                self.answered_as |= {model} - {""}
                return content
            problem = f"HTTP {response.status_code}: {response.text.strip()[:200]}"
            if response.status_code in (400, 404, 422) and (field := self._field_refused(response.text, body)):
                log.warning("the judge does not take %r; asking without it", field)
                self._refused.add(field)
                continue
            if response.status_code not in (408, 409, 425, 429) and response.status_code < 500:
                break
            self._wait(attempt, response.headers.get("retry-after"))
        raise JudgeError(problem)

    def _field_refused(self, text: str, body: Mapping[str, Any]) -> str | None:
        named = [name for name in ("max_tokens", "temperature") if name in body and name in text]
        unknown = not self.is_named and "model" in body and "model" in text.lower()
        return named[0] if named else "model" if unknown else None

    def _wait(self, attempt: int, asked: str | None) -> None:
        if attempt >= self.retries:
            return
        seconds = self.pause * 2**attempt
        if asked is not None:
            with contextlib.suppress(ValueError):  # a date instead of seconds: our own pause
                seconds = max(0.0, float(asked))
        self.sleep(min(seconds, 60.0))


def _take(budget: Budget, problem: str) -> None:
    try:
        budget.take()
    except JudgeError as error:
        raise JudgeError(f"{error}; the last try: {problem}" if problem else str(error)) from error


def _content(response: httpx.Response) -> tuple[str, str]:
    """The answer, and the model that the server names ("" without)."""
    try:
        body = response.json()
        content = body["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise JudgeError(f"the server's answer is no chat completion: {response.text.strip()[:200]}") from error
    if isinstance(content, list):  # content in parts
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content or ""), str(body.get("model") or "")
