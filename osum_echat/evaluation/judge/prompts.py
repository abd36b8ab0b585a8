"""What a judge is told, as versioned data (``prompts/*.yaml``): name, version, system, user.

``{transcript}``, ``{labels}``, ``{reply}``, ``{reply_emotion}``, ``{reference}`` and ``{past}`` (earlier turns of a
conversation, with the system's own answers) in the user's text are filled in for each answer. A prompt that is changed
must get another version; its text is part of the cache's key all the same, so an edited prompt never meets old answers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from osum_echat import config as config_io
from osum_echat.config import ConfigError
from osum_echat.evaluation.items import Item
from osum_echat.evaluation.results import Result

FOLDER = Path(__file__).with_name("prompts")
_SLOT = re.compile(r"\{(transcript|labels|reply|reply_emotion|reference|past)\}")


@dataclass(frozen=True)
class Prompt:
    """One prompt. ``about``: what its score means, for reports."""

    name: str
    version: int
    user: str
    system: str = ""
    about: str = ""

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.name}\n{self.version}\n{self.system}\n{self.user}".encode()).hexdigest()[:12]

    def messages(self, item: Item, result: Result, past: Sequence[tuple[str, str]] = ()) -> list[dict[str, str]]:
        """Messages of one answer. What an answer itself says is put in once, so braces in it stay as they are.

        Args:
            past: what was said and answered before, oldest first.
        """
        reference = item.answer or item.extra.get("reference_reply") or item.extra.get("reference") or ""
        values = {
            "transcript": item.text or "(not known)",
            "labels": ", ".join(f"{kind}: {label}" for kind, label in item.labels.items()) or "(none)",
            "reply": result.text or "(no words)",
            "reply_emotion": result.heard_emotion or "(not measured)",
            "reference": str(reference) or "(none)",
            "past": "".join(f"\n  Person: {said}\n  Assistant: {reply}" for said, reply in past) or "(nothing)",
        }
        user = _SLOT.sub(lambda match: values[match.group(1)], self.user)
        system = [{"role": "system", "content": self.system.strip()}] if self.system.strip() else []
        return [*system, {"role": "user", "content": user.strip()}]


def load_prompt(name: str) -> Prompt:
    """A prompt of the library by its name, or a YAML file. Raises ConfigError."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"there is no judge prompt {name!r}: use {', '.join(sorted(p.stem for p in FOLDER.glob('*.yaml')))} or a .yaml file"
        )
    return config_io.load(Prompt, path)
