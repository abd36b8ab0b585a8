"""Texts in the form in which they are compared."""

from __future__ import annotations

import re

_NUMBERS = dict(zip("0 1 2 3 4 5 6 7 8 9 10 11 12 15 20 30 40 50 70 80 90 100 1000".split(), (
    "zero one two three four five six seven eight nine ten eleven twelve fifteen twenty thirty forty fifty seventy eighty ninety hundred thousand"
).split(), strict=True))  # fmt: skip
_SHORT = {
    "i'm": "i am", "it's": "it is", "that's": "that is", "you're": "you are", "i'll": "i will", "don't": "do not", "can't": "cannot",
    "let's": "let us", "what's": "what is", "isn't": "is not", "didn't": "did not", "doesn't": "does not", "i've": "i have", "we're": "we are",
    "alright": "all right", "neighbour": "neighbor", "colour": "color", "okay": "ok", "tv": "television", "grey": "gray", "tyre": "tire",
    "mum": "mom", "mommy": "mom", "programme": "program", "favourite": "favorite", "theatre": "theater", "travelling": "traveling",
}  # fmt: skip


def normalise(text: str) -> str:
    """Lower case, words only; small numbers, contractions and British spellings written alike, because recognisers write them freely."""
    text = text.lower().replace("\u2019", "'")
    words = []
    for word in re.findall(r"[a-z']+|\d+", re.sub(r"(?<=\d),(?=\d)", "", text)):
        word = word.strip("'")
        words.append(_NUMBERS.get(word, _SHORT.get(word, word)))
    return " ".join(" ".join(words).split())
