"""A tokenizer without files: one id a character. For looking at data, for benchmarks and tests, where no checkpoint is
at hand."""

from __future__ import annotations

from collections.abc import Sequence

from osum_echat.dialogue.vocabulary import Vocabulary

_CODE_POINTS = 0x110000


class PlainTokenizer:
    """Ids are code points; id 0 ends a turn."""

    eos_token_id = 0

    def __len__(self) -> int:
        return _CODE_POINTS

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False) -> str:
        return "".join(chr(i) for i in ids if i or not skip_special_tokens)


def plain_vocabulary(speech_codes: int = 4096) -> Vocabulary:
    """The vocabulary that goes with `PlainTokenizer`."""
    return Vocabulary(text_size=_CODE_POINTS, eos_id=PlainTokenizer.eos_token_id, unknown_id=None, speech_codes=speech_codes)
