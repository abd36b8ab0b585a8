"""The recipe's own evaluation of mini: held-out sentences, hand-written sentences, voices never trained on, new sentences to say.

    python -m recipes.mini.evaluation --checkpoint checkpoints/mini --out out/evaluation

writes ``report.md`` with tables and pictures and prints, last, one JSON object of all numbers (percent; ``dnsmos`` from 1 to 5). The judge
of speech is Whisper base, which is no part of mini (`judge`). ``--limit`` is for trying it out; its numbers are not to be quoted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from osum_echat.evaluation import suites
from osum_echat.evaluation.judge import Dnsmos, JudgeUnavailable, Recogniser
from osum_echat.evaluation.report import Bar, Report
from osum_echat.evaluation.sets import TAGS, read_set
from osum_echat.pipeline import EChat

log = logging.getLogger(__name__)

SETS = ("grammar", "handwritten", "new_voices", "speech")
SPOKEN = 220  # answers that the judges listen to

BARS = {
    "wer": Bar(10, 4, True),
    "wer_handwritten": Bar(45, 25, True),
    "wer_new_voices": Bar(25, 12, True),
    **{tag: Bar(93, 98) for tag in TAGS},
    **{f"{tag}_new_voices": Bar(60, 85) for tag in TAGS},
    "think_parsed": Bar(98, 100),
    "reply_fit": Bar(80, 95),
    "spoken_reply_wer": Bar(15, 8, True),
    "tts_wer": Bar(15, 8, True),
    "dnsmos": Bar(2.3, 2.8),
}


def evaluate(
    echat: EChat,
    sets: Path,
    limit: int | None = None,
    recogniser: Recogniser | None = None,
    dnsmos: Dnsmos | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Run all suites. ``recogniser`` None: speech is made but nobody listens. ``say`` is told how far it is."""

    def tell(what: str) -> suites.Progress:
        return lambda done: say(f"{what}: {done}")

    items = {name: read_set(sets / f"{name}.tar.gz", limit) for name in SETS}
    speak = echat.token2wav is not None
    grammar = suites.hear_and_answer(echat, items["grammar"][:SPOKEN], speak, progress=tell("think, answer, speak"))
    written = suites.hear_and_answer(echat, items["handwritten"], progress=tell("hand-written sentences"))
    voices = suites.hear_and_answer(echat, items["new_voices"], progress=tell("new voices"))
    natural = suites.hear_and_answer(echat, items["grammar"], progress=tell("thinks in natural language"), think="language")
    words = suites.understand(echat, items["grammar"], progress=tell("transcripts alone"))
    summaries = [
        suites.summarise_answers("unseen grammar sentences", grammar),
        suites.summarise_answers("hand-written sentences", written),
        suites.summarise_answers("new voices", voices),
        suites.summarise_natural("unseen grammar sentences: think in natural language", natural),
        suites.summarise_transcripts("unseen grammar sentences: transcript task", words),
    ]
    seen, hand, new = (summary.values for summary in summaries[:3])
    headline = {"wer": seen["wer"], "wer_handwritten": hand["wer"], "wer_new_voices": new["wer"]}
    headline |= {tag: seen[tag] for tag in TAGS} | {f"{tag}_new_voices": new[tag] for tag in TAGS}
    headline |= {"think_parsed": seen["think_parsed"], "reply_fit": seen["reply_fit"]}
    sizes = dict.fromkeys(headline, len(grammar)) | {"wer_handwritten": len(written)}
    sizes |= {name: len(voices) for name in headline if name.endswith("new_voices")}
    if speak and recogniser is not None:
        said = suites.say(echat, items["speech"], progress=tell("new sentences to say"))
        suites.judge_speech(grammar, recogniser, dnsmos, tell("judging answers"))
        suites.judge_speech(said, recogniser, dnsmos, tell("judging sentences"))
        spoken = suites.summarise_speech("spoken answers", grammar, lambda row: row.reply.text)
        texts = suites.summarise_speech("new sentences, spoken", said, lambda row: row.item.txt)
        summaries += [spoken, texts]
        headline |= {"spoken_reply_wer": spoken.values["wer"], "tts_wer": texts.values["wer"]}
        sizes |= {"spoken_reply_wer": len(grammar), "tts_wer": len(said), "dnsmos": len(grammar)}
        if "dnsmos" in spoken.values:
            headline["dnsmos"] = spoken.values["dnsmos"]
    judge = recogniser.name if recogniser is not None else "none: speech was not judged"
    about = [
        f"judge of speech: {judge}" + ("" if judge == "whisper-base" else " (not whisper-base: do not compare)"),
        "all recordings are synthesised; emotion, age and event are signal rules (recipes/mini/README.md), not people's behaviour",
        "transcripts and tags are those of the think; transcript errors are counted after normalising case, punctuation and numbers",
        f"CPU threads: {torch.get_num_threads()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}",
    ]
    examples = [("unseen grammar sentences", grammar[:12]), ("hand-written sentences", written[:12]), ("new voices", voices[:12])]
    return Report("Evaluation of mini", about, headline, BARS, sizes, summaries, examples)


def load_judges(wheels: Path | None) -> tuple[Recogniser | None, Dnsmos | None]:
    """The judges that can be had; each missing one is reported."""
    recogniser, dnsmos = None, None
    try:
        recogniser = Recogniser.load(wheels=wheels)
    except JudgeUnavailable as error:
        log.warning("speech will not be judged: %s", error)
    try:
        dnsmos = Dnsmos()
        dnsmos.check()
    except JudgeUnavailable as error:
        log.warning("no DNSMOS: %s", error)
        dnsmos = None
    return recogniser, dnsmos
