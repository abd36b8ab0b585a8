"""Measures as pure functions: word and character errors, tags, thinks, repetition, silence.

Nothing here loads a model or a file. Error counts add up over a test set (`ErrorCount.__add__`), so that a rate is
always errors over reference words, never a mean of rates.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

# Words and characters


@dataclass(frozen=True)
class ErrorCount:
    """Edits that turn a hypothesis into its reference. ``units``: length of the reference in words or characters."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    units: int = 0

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per reference unit; an empty reference gives 0.0 when nothing was inserted, else infinity."""
        if self.units:
            return self.errors / self.units
        return float("inf") if self.errors else 0.0

    def __add__(self, other: ErrorCount) -> ErrorCount:
        return ErrorCount(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.units + other.units,
        )


_TAG = re.compile(r"<[^<>]*>")
_CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_CJK_OR_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")
_NOT_WORD = re.compile(r"[^\w\s']|_")
_LONE_APOSTROPHE = re.compile(r"(?<!\w)'|'(?!\w)")
_NUMBER = re.compile(r"\d+")


def normalize(text: str, numbers: bool = True) -> str:
    """Text as it is compared: no tags, no punctuation, no case, numbers in words (Chinese ones beside Chinese
    characters)."""
    text = unicodedata.normalize("NFKC", _TAG.sub(" ", text)).replace("\u2019", "'").lower()
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    if numbers:
        chinese = re.search(f"[{_CJK}]", text) is not None
        text = _NUMBER.sub(lambda m: _chinese_number(m.group()) if chinese else f" {_english_number(m.group())} ", text)
    text = _LONE_APOSTROPHE.sub(" ", _NOT_WORD.sub(" ", text))
    return " ".join(text.split())


def units(text: str) -> list[str]:
    """Words, every Chinese character being one: the units of a mixed error rate."""
    return _CJK_OR_WORD.findall(text)


def word_errors(reference: str, hypothesis: str, normalized: bool = True) -> ErrorCount:
    """Errors in `units` (words; characters where the text is Chinese), after `normalize` unless ``normalized`` is
    False."""
    if normalized:
        reference, hypothesis = normalize(reference), normalize(hypothesis)
    return _count(units(reference), units(hypothesis))


def char_errors(reference: str, hypothesis: str, normalized: bool = True) -> ErrorCount:
    """Errors in characters, blanks left out."""
    if normalized:
        reference, hypothesis = normalize(reference), normalize(hypothesis)
    return _count([c for c in reference if not c.isspace()], [c for c in hypothesis if not c.isspace()])


def total_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCount:
    """`word_errors` summed over a test set. Raises ValueError for lists of different length."""
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses")
    return sum((word_errors(r, h) for r, h in zip(references, hypotheses, strict=True)), ErrorCount())


def _count(reference: Sequence[str], hypothesis: Sequence[str]) -> ErrorCount:
    if not reference or not hypothesis:  # jiwer takes no empty reference
        return ErrorCount(deletions=len(reference), insertions=len(hypothesis), units=len(reference))
    import jiwer

    result = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
    return ErrorCount(result.substitutions, result.deletions, result.insertions, len(reference))


_ONES = "zero one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905
_ONES += "thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()  # noqa: SIM905
_TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905
_THOUSANDS = ((10**9, "billion"), (10**6, "million"), (10**3, "thousand"), (100, "hundred"))
_DIGITS = "零一二三四五六七八九"
_CHINESE_STEPS = ((10**8, "亿"), (10**4, "万"), (1000, "千"), (100, "百"), (10, "十"))
_LONGEST_NUMBER = 12  # digits; what is longer (or begins with 0) is read digit by digit


def _english_number(digits: str) -> str:
    if len(digits) > _LONGEST_NUMBER or (digits[0] == "0" and len(digits) > 1):
        return " ".join(_ONES[int(d)] for d in digits)
    value = int(digits)
    if value < 20:
        return _ONES[value]
    if value < 100:
        return _TENS[value // 10] + (f" {_ONES[value % 10]}" if value % 10 else "")
    size, name = next((s, n) for s, n in _THOUSANDS if value >= s)
    rest = value % size
    return f"{_english_number(str(value // size))} {name}" + (f" {_english_number(str(rest))}" if rest else "")


def _chinese_number(digits: str) -> str:
    if len(digits) > _LONGEST_NUMBER or (digits[0] == "0" and len(digits) > 1):
        return "".join(_DIGITS[int(d)] for d in digits)
    value = int(digits)
    if value < 10:
        return _DIGITS[value]
    if value < 20:
        return "十" + (_DIGITS[value % 10] if value % 10 else "")
    size, name = next((s, n) for s, n in _CHINESE_STEPS if value >= s)
    head, rest = _chinese_number(str(value // size)), value % size
    if not rest:
        return head + name
    gap = "零" if rest < size // 10 else ""
    tail = _chinese_number(str(rest))
    return head + name + gap + (f"一{tail}" if 10 <= rest < 20 else tail)


# Tags


@dataclass(frozen=True)
class Confusion:
    """Counts of (true label, predicted label). A missing prediction is the label ``none_label``."""

    counts: Mapping[tuple[str, str], int]
    labels: tuple[str, ...]

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def accuracy(self) -> float:
        """Share of right predictions; 0.0 for an empty test set."""
        right = sum(n for (true, predicted), n in self.counts.items() if true == predicted)
        return right / self.total if self.total else 0.0

    def recall(self, label: str) -> float:
        """Share of items of ``label`` that were found; NaN when there are none."""
        of_label = sum(n for (true, _), n in self.counts.items() if true == label)
        return self.counts.get((label, label), 0) / of_label if of_label else float("nan")

    def precision(self, label: str) -> float:
        """Share of predictions of ``label`` that were right; NaN when it was never predicted."""
        said = sum(n for (_, predicted), n in self.counts.items() if predicted == label)
        return self.counts.get((label, label), 0) / said if said else float("nan")

    @property
    def macro_recall(self) -> float:
        """Mean recall over the labels that occur (unweighted accuracy); 0.0 for an empty test set."""
        true = sorted({t for t, _ in self.counts})
        return float(np.mean([self.recall(label) for label in true])) if true else 0.0

    def matrix(self) -> npt.NDArray[np.int64]:
        """[true, predicted] in the order of ``labels``."""
        return np.array([[self.counts.get((t, p), 0) for p in self.labels] for t in self.labels], dtype=np.int64)


def confusion(references: Sequence[str], predictions: Sequence[str | None], none_label: str = "(none)") -> Confusion:
    """Compare tags, ignoring brackets and case. Raises ValueError for lists of different length."""
    if len(references) != len(predictions):
        raise ValueError(f"{len(references)} references but {len(predictions)} predictions")
    pairs = Counter(
        (bare_tag(true), bare_tag(predicted) if predicted else none_label)
        for true, predicted in zip(references, predictions, strict=True)
    )
    labels = sorted({label for pair in pairs for label in pair} - {none_label})
    if any(predicted == none_label for _, predicted in pairs):
        labels.append(none_label)
    return Confusion(dict(pairs), tuple(labels))


def bare_tag(tag: str) -> str:
    """A tag without brackets, in lower case: ``<HAPPY>`` and ``happy`` are the same."""
    return tag.strip().strip("<>").strip().lower()


# Thinks


@dataclass(frozen=True)
class ThinkValidity:
    """Of ``total`` thinks: how many ended (``closed``), and how many had each field, with a value that is allowed."""

    total: int
    closed: int
    fields: Mapping[str, int] = field(default_factory=dict)
    complete: int = 0


def think_validity(
    thinks: Sequence[Mapping[str, str | None] | None],
    fields: Sequence[str],
    allowed: Mapping[str, Collection[str]] | None = None,
) -> ThinkValidity:
    """Count valid thinks.

    Args:
        thinks: parsed fields of each think; None for one that is missing or never ended.
        fields: what a think must hold.
        allowed: values (tags) that a field may have; a field that is not listed may have any.
    """
    rules = {name: {bare_tag(value) for value in values} for name, values in (allowed or {}).items()}
    found: Counter[str] = Counter()
    complete = 0
    for think in thinks:
        good = [n for n in fields if think and (value := think.get(n)) and (n not in rules or bare_tag(value) in rules[n])]
        found.update(good)
        complete += think is not None and len(good) == len(fields)
    closed = sum(think is not None for think in thinks)
    return ThinkValidity(len(thinks), closed, {name: found[name] for name in fields}, complete)


# Repetition and silence


def longest_run(tokens: Sequence[Hashable]) -> int:
    """Length of the longest stretch of one token."""
    longest = run = 0
    for i, token in enumerate(tokens):
        run = run + 1 if i and token == tokens[i - 1] else 1
        longest = max(longest, run)
    return longest


def repeated_ngrams(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Share of n-grams that occurred before: 0.0 for a text without repetition, near 1.0 for a loop."""
    total = len(tokens) - n + 1
    if total < 1:
        return 0.0
    return 1.0 - len({tuple(tokens[i : i + n]) for i in range(total)}) / total


def silent_frames(
    samples: npt.ArrayLike, rate: int, threshold_db: float = -45.0, frame_seconds: float = 0.02
) -> npt.NDArray[np.bool_]:
    """Which frames of mono ``samples`` [n] are silent: level under ``threshold_db`` of full scale. The rest of a frame
    counts as one."""
    data = np.asarray(samples, dtype=np.float64)
    size = max(1, round(rate * frame_seconds))
    count = -(-len(data) // size)
    padded = np.pad(data, (0, count * size - len(data)))
    level = np.sqrt(np.mean(padded.reshape(count, size) ** 2, axis=1)) if count else np.zeros(0)
    return level < 10 ** (threshold_db / 20)


def silence_fraction(samples: npt.ArrayLike, rate: int, threshold_db: float = -45.0) -> float:
    """Share of silent time; 1.0 for no samples at all."""
    silent = silent_frames(samples, rate, threshold_db)
    return float(silent.mean()) if len(silent) else 1.0


def longest_silence(samples: npt.ArrayLike, rate: int, threshold_db: float = -45.0, frame_seconds: float = 0.02) -> float:
    """Seconds of the longest silence."""
    longest = run = 0
    for silent in silent_frames(samples, rate, threshold_db, frame_seconds):
        run = run + 1 if silent else 0
        longest = max(longest, run)
    return longest * frame_seconds
