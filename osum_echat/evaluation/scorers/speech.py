"""Spoken replies: what a recogniser hears, whose voice it is, how it sounds, and how it goes wrong."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from osum_echat import metrics
from osum_echat.audio import io as audio_io
from osum_echat.config import ConfigError
from osum_echat.evaluation.items import Item
from osum_echat.evaluation.normalizer import language_of
from osum_echat.evaluation.results import Result
from osum_echat.evaluation.scorers import ERRORS, PERCENT, Measure, Score, Tools
from osum_echat.evaluation.scorers.words import word_errors

MIN_SECONDS = 0.1
"""Shorter sound is silence for every scorer."""


@lru_cache(maxsize=4)
def _read(path: str) -> audio_io.Samples | None:
    if audio_io.duration(path) < MIN_SECONDS:
        return None
    return audio_io.to_mono_16k(path)


def samples_16k(result: Result) -> audio_io.Samples | None:
    """The reply's sound [n] at 16 kHz, or None without (enough of) it. Raises AudioError for a file that is no
    audio."""
    if result.wav is None or not Path(result.wav).is_file():
        return None
    return _read(result.wav)


def levelled(samples: audio_io.Samples) -> audio_io.Samples:
    """Peak at half scale: a recogniser's or DNSMOS's score must not depend on the level."""
    return samples * np.float32(0.5 / max(float(np.abs(samples).max(initial=0.0)), 1e-4))


class OwnSpeech:
    """What a recogniser hears in the spoken reply, against what was to be said: the reply's own text
    (``own_speech:reply``) or the item's (``own_speech:item``). Silence loses all words."""

    measures: Mapping[str, Measure] = {"wer": ERRORS, "cer": ERRORS}

    def __init__(self, tools: Tools, said: str = "") -> None:
        said = said or "item"
        if said not in ("item", "reply"):
            raise ConfigError(f"scorer own_speech:{said}: use own_speech:item or own_speech:reply")
        self.tools, self.said = tools, said

    def score(self, item: Item, result: Result) -> Score | None:
        said = item.text if self.said == "item" else result.text
        if not said:
            return None
        samples = samples_16k(result)
        heard = ""
        if samples is not None:
            language = language_of(said, item)
            heard = self.tools.recogniser(language).transcribe(levelled(samples), language)
        normal = self.tools.normalizer
        chars = metrics.char_errors(normal(said, item), normal(heard, item), normalized=False)
        score = Score({"wer": word_errors(self.tools, item, said, heard)}, notes={"heard": heard})
        if chars.units:
            score.values["cer"] = (chars.errors, chars.units)
        return score


class Mos:
    """DNSMOS P.835 overall quality, 1 to 5."""

    measures: Mapping[str, Measure] = {"dnsmos": Measure("", 1.0, "higher")}

    def __init__(self, tools: Tools, _: str = "") -> None:
        self.net = tools.dnsmos

    def score(self, item: Item, result: Result) -> Score | None:
        samples = samples_16k(result)
        return None if samples is None else Score({"dnsmos": (self.net.overall(levelled(samples)), 1)})


class Similarity:
    """Cosine of speaker vectors of the reply and of the voice that it was to copy, by each network that is there."""

    def __init__(self, tools: Tools, _: str = "") -> None:
        self.nets = tools.speaker_nets

    @property
    def measures(self) -> Mapping[str, Measure]:
        return dict.fromkeys(self.nets, Measure("", 1.0, "higher"))

    def score(self, item: Item, result: Result) -> Score | None:
        samples = samples_16k(result)
        if samples is None or not item.prompt_wav:
            return None
        prompt = _read(item.prompt_wav)
        if prompt is None:
            return None
        return Score({name: (net.similarity(prompt, samples), 1) for name, net in self.nets.items()})


class SpeechFaults:
    """How speech goes wrong: cut off by a limit, codes or words in a loop, silence. ``longest_run``: codes that are one
    and the same in a row."""

    measures: Mapping[str, Measure] = {
        "cut_off": Measure(better="lower"),
        "no_speech": Measure(better="lower"),
        "repeated_words": Measure(better="lower"),
        "repeated_codes": Measure(better="lower"),
        "longest_run": Measure("codes", 1.0, "lower", spread=True),
        "silence": Measure(better=""),
        "longest_silence": Measure("s", 1.0, "lower", spread=True),
        "speech_seconds": Measure("s", 1.0, ""),
    }
    N = 4
    """Length of the n-grams by which a loop is seen."""

    def __init__(self, tools: Tools, _: str = "") -> None:
        pass

    def score(self, item: Item, result: Result) -> Score | None:
        samples = samples_16k(result)
        words = metrics.units(metrics.normalize(result.text))
        score = Score({"cut_off": (result.finish != "stop", 1), "no_speech": (samples is None, 1)})
        score.values["repeated_words"] = (metrics.repeated_ngrams(words, self.N), 1)
        if result.speech_tokens:
            score.values["repeated_codes"] = (metrics.repeated_ngrams(result.speech_tokens, self.N), 1)
            score.values["longest_run"] = (metrics.longest_run(result.speech_tokens), 1)
        if samples is not None:
            rate = audio_io.SAMPLE_RATE
            score.values["silence"] = (metrics.silence_fraction(samples, rate), 1)
            score.values["longest_silence"] = (metrics.longest_silence(samples, rate), 1)
            score.values["speech_seconds"] = (len(samples) / rate, 1)
        return score


__all__ = ["PERCENT", "Mos", "OwnSpeech", "Similarity", "SpeechFaults", "levelled", "samples_16k"]
