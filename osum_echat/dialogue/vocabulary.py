"""One vocabulary for text and speech, and the special ids of a checkpoint.

Unified ids: ``[0, V)`` text, ``[V, V + S)`` speech codes, ``V + S`` the speech delimiter (begin and end of speech),
then two rows that are inputs only: audio begins, audio ends. V is the number of rows of the LLM's table (151,936 for
Qwen2.5), not the tokenizer's length; S is the number of speech codes (4096 for CosyVoice-300M-25Hz). Classes that can
be predicted: ``[0, V + S + 1)``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Vocabulary:
    """Sizes and special ids, stated by the config; no other place holds a literal token id.

    Args:
        text_size: V, rows of the text table and of the LM head.
        eos_id: ends the text of a turn (``<|im_end|>``).
        unknown_id: the "unknown" filler ``&&``; its positions are masked (see `layout`). None: the tokenizer has none.
        speech_codes: S, number of codes of the speech tokenizer.
    """

    text_size: int = 151936
    eos_id: int = 151645
    unknown_id: int | None = 7672
    speech_codes: int = 4096

    def __post_init__(self) -> None:
        if self.text_size < 1 or self.speech_codes < 1:
            raise ValueError(f"text_size and speech_codes must be positive, found {self.text_size}, {self.speech_codes}")
        for name, value in (("eos_id", self.eos_id), ("unknown_id", self.unknown_id)):
            if value is not None and not 0 <= value < self.text_size:
                raise ValueError(f"{name}={value} is outside the text ids [0, {self.text_size})")

    @property
    def speech_delimiter(self) -> int:
        """Unified id that begins and ends speech."""
        return self.text_size + self.speech_codes

    @property
    def audio_begin(self) -> int:
        """Unified id (input only) before the user's audio."""
        return self.text_size + self.speech_codes + 1

    @property
    def audio_end(self) -> int:
        """Unified id (input only) after the user's audio."""
        return self.text_size + self.speech_codes + 2

    @property
    def speech_classes(self) -> int:
        """Rows of the speech head: codes and delimiter (4097)."""
        return self.speech_codes + 1

    @property
    def speech_rows(self) -> int:
        """Rows of the speech embedding: codes, delimiter, audio begin, audio end (4099)."""
        return self.speech_codes + 3

    def speech_id(self, code: int) -> int:
        """Unified id of a speech code (or of the delimiter, code S)."""
        if not 0 <= code <= self.speech_codes:
            raise ValueError(f"speech code {code} is outside [0, {self.speech_codes}]")
        return self.text_size + code
