"""The texts of mini: what people say to it, and the rule that says what it should answer.

User sentences come from a grammar of ours (`grammar.yaml`, 20 topics) and, for words outside any grammar, from the example sentences of
WordNet. Replies follow a rule (`replies.yaml`): the same words said sadly, by a child or with a cough get another answer, and
`reply_fits` checks an answer against that rule. The trade-off: a rule makes the target learnable in minutes and checkable without a judge,
at the price of a small talk that stays on its rails.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osum_echat.config import read_yaml
from recipes.mini import open_replies

HERE = Path(__file__).parent
WORDNET = Path("/usr/share/wordnet")  # Debian package wordnet-base

GENDERS = ("male", "female")
AGES = ("child", "adult", "old")
EMOTIONS = ("neutral", "happy", "sad", "angry", "surprised")
EVENTS = ("none", "laugh", "cough", "sneeze", "applause", "sigh")
REPLY_EMOTIONS = ("happy", "gentle", "neutral")
WORDS = range(4, 13)  # length of a user sentence


@dataclass(frozen=True)
class Labels:
    """How something is said."""

    age: str = "adult"
    gender: str = "female"
    emotion: str = "neutral"
    event: str = "none"

    def __post_init__(self) -> None:
        for value, valid in ((self.age, AGES), (self.gender, GENDERS), (self.emotion, EMOTIONS), (self.event, EVENTS)):
            if value not in valid:
                raise ValueError(f"label {value!r} is not one of {', '.join(valid)}")


def normalise(text: str) -> str:
    """Lower case, words and apostrophes only: the form in which transcripts are written and compared."""
    return " ".join(re.sub(r"[^a-z' ]", " ", text.lower().replace("’", "'")).split())


def written(sentence: str) -> str:
    """The sentence as people type it: "i can't come" -> "I can't come."."""
    words = ["I" + word[1:] if word == "i" or word.startswith("i'") else word for word in sentence.split()]
    text = " ".join(words)
    return text[:1].upper() + text[1:] + "."


@functools.cache
def _grammar() -> dict[str, Any]:
    return read_yaml(HERE / "grammar.yaml")


@functools.cache
def _replies() -> dict[str, Any]:
    return read_yaml(HERE / "replies.yaml")


@functools.cache
def topics() -> tuple[str, ...]:
    """The 20 topics, in the order of the grammar."""
    return tuple(_grammar()["topics"])


# What people say --------------------------------------------------------------------------------------------------------------------


def _fill(template: str, slots: Mapping[str, Sequence[str | None]], rng: random.Random) -> str:
    """Replace each ``{slot}`` by a drawn filler; ``{Slot}`` starts with a capital letter."""

    def filler(match: re.Match[str]) -> str:
        name = match[1]
        word = rng.choice(slots[name.lower()]) or ""
        return word[:1].upper() + word[1:] if name[0].isupper() else word

    return " ".join(re.sub(r"\{(\w+)\}", filler, template).split())


def user_sentence(rng: random.Random, topic: str) -> str:
    """One sentence about ``topic``, 4 to 12 words."""
    grammar = _grammar()
    rules = grammar["topics"][topic]
    slots = grammar["shared"] | rules["slots"]
    while True:
        sentence = normalise(_fill(rng.choice(rules["templates"]), slots, rng))
        if len(sentence.split()) in WORDS:
            return sentence


@functools.cache
def user_sentences(count: int = 40_000, seed: int = 0) -> tuple[tuple[str, str], ...]:
    """``count`` distinct (sentence, topic) pairs in a fixed random order, the topics equally frequent."""
    rng = random.Random(seed)
    found: dict[str, str] = {}
    per_topic = dict.fromkeys(topics(), 0)
    while len(found) < count:
        topic = min(per_topic, key=per_topic.__getitem__)
        sentence = user_sentence(rng, topic)
        if sentence not in found:
            found[sentence] = topic
            per_topic[topic] += 1
    pairs = sorted(found.items())
    rng.shuffle(pairs)
    return tuple(pairs)


HELD_OUT_SENTENCES = 600


def held_out_user_sentences(count: int = HELD_OUT_SENTENCES) -> tuple[tuple[str, str], ...]:
    """Grammar sentences that never enter training: the last ``count`` of the fixed order."""
    return user_sentences()[-count:]


def training_user_sentences(held_out: int = HELD_OUT_SENTENCES) -> tuple[tuple[str, str], ...]:
    """All others; never more than `held_out_user_sentences` leaves."""
    return user_sentences()[:-held_out]


@functools.cache
def wide_sentences(count: int = 40_000, seed: int = 0) -> tuple[tuple[str, str], ...]:
    """``count`` distinct (sentence, topic) pairs of `grammar_wide.yaml`, the topics about equally frequent: other words and other sentences for the same
    topics, for training alone. None is a sentence that is held out."""
    shared, wide = _grammar()["shared"], read_yaml(HERE / "grammar_wide.yaml")
    held_out = {sentence for sentence, _ in held_out_user_sentences()} | {
        normalise(sentence) for sentence, _ in hand_written("user")
    }
    rng = random.Random(f"wide {seed}")
    found: dict[str, str] = {}
    for topic in itertools.cycle(topics()):
        if len(found) >= count:
            break
        rules = wide[topic]
        for _ in range(20):  # some topics have fewer sentences that are long enough
            template = rng.choice(rules["templates"])
            if rng.random() < 0.4 and not template.startswith("{lead}"):
                template = "{lead} " + template
            sentence = normalise(_fill(template, shared | rules["slots"], rng))
            if len(sentence.split()) in WORDS and sentence not in held_out and sentence not in found:
                found[sentence] = topic
                break
    pairs = sorted(found.items())
    rng.shuffle(pairs)
    return tuple(pairs)


WIDE_SHARE = 0.6
"""Of the sentences about a topic that are trained on."""


def about_a_topic(rng: random.Random, grammar: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """A sentence for training and its topic, from `wide_sentences` or ``grammar``."""
    return rng.choice(wide_sentences() if rng.random() < WIDE_SHARE else grammar)


def wordnet_examples(directory: Path = WORDNET) -> list[str]:
    """Example sentences of WordNet with 3 to 10 words, normalised, in a fixed random order. Licence: WordNet 3.0, permissive."""
    files = sorted(directory.glob("data.*"))
    if not files:
        raise ValueError(
            f"no WordNet data in {directory}; install the Debian package wordnet-base (apt-get install wordnet-base)"
        )
    found = set()
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            for example in re.findall(r'"([^"]+)"', line.partition("|")[2]):
                sentence = normalise(example)
                plain = re.fullmatch(r"[A-Za-z' ,.?!;:-]+", example) is not None
                if plain and 3 <= len(sentence.split()) <= 10 and len(sentence) <= 60:
                    found.add(sentence)
    sentences = sorted(found)
    random.Random(3).shuffle(sentences)
    return sentences


@functools.cache
def _said() -> dict[str, Any]:
    return read_yaml(HERE / "said.yaml")


def said(source: str, rng: random.Random) -> str:
    """A sentence outside the topics: ``orders``, ``open`` or ``commands`` of ``said.yaml``, 1 to 16 words. Raises ValueError for another source."""
    if source not in _said():
        raise ValueError(f"no sentences {source!r} in said.yaml: use one of {', '.join(_said())}")
    rules = _said()[source]
    while True:
        text = _fill(rng.choice(rules["templates"]), rules["slots"], rng)
        while "{" in text:  # fillers that have slots of their own
            text = _fill(text, rules["slots"], rng)
        sentence = normalise(text)
        if 1 <= len(sentence.split()) <= 16:
            return sentence


NOT_ENGLISH = "not english"
"""What is written down for speech in another language."""


@functools.cache
def _foreign() -> dict[str, Any]:
    return read_yaml(HERE / "foreign.yaml")


def foreign(rng: random.Random) -> tuple[str, str, tuple[str, ...]]:
    """A sentence that is not English, its language for espeak-ng, and the beginnings of the names of voices that speak it."""
    rule = _foreign()[rng.choice(sorted(_foreign()))]
    sentence = " ".join(filter(None, (rng.choice(part) for part in rule["parts"])))
    return sentence, rule["language"], tuple(rule["voices"])


# What mini answers ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReplyParts:
    """What the rule allows for one topic and one set of labels."""

    openings: tuple[str, ...]
    address: str
    clauses: tuple[str, ...]

    def variants(self) -> Iterator[str]:
        for opening in self.openings:
            for clause in self.clauses:
                yield f"{opening}, {self.address}. {clause}{'?' if _is_question(clause) else '.'}"


def _is_question(clause: str) -> bool:
    return clause.split()[0] in ("How", "What", "When", "Who", "Which") and not clause.startswith("What a ")


def reply_parts(topic: str | None, labels: Labels, sentence: str = "", every: bool = True) -> ReplyParts:
    """The rule: the opening answers the event, or without one the emotion; the address age and gender; the clause topic and mood.

    Without a topic the clause takes up a thing of ``sentence`` (`open_replies`): any (``every``), or the one that training teaches.
    Where there is none, it asks for more.
    """
    rules = _replies()
    if topic is not None and topic not in rules["topics"]:
        raise ValueError(f"no replies for topic {topic!r}; topics: {', '.join(rules['topics'])}")
    kind, value = ("emotion", labels.emotion) if labels.event == "none" else ("event", labels.event)
    mood = rules["mood"][labels.emotion]
    if topic is not None:
        clauses = rules["topics"][topic][mood]
    else:
        taken_up = (open_replies.clauses if every else open_replies.natural_clauses)(normalise(sentence), mood)
        clauses = taken_up or rules["open"][mood]
    return ReplyParts(tuple(rules["openings"][kind][value]), rules["addresses"][labels.age][labels.gender], tuple(clauses))


def reply_emotion(labels: Labels) -> str:
    """The tone that the think notes for the answer: it follows the mood."""
    return dict(zip(("good", "bad", "plain"), REPLY_EMOTIONS, strict=True))[_replies()["mood"][labels.emotion]]


PEOPLE = {
    ("child", "male"): ("a boy", "he"),
    ("child", "female"): ("a girl", "she"),
    ("adult", "male"): ("a man", "he"),
    ("adult", "female"): ("a woman", "she"),
    ("old", "male"): ("an old man", "he"),
    ("old", "female"): ("an old woman", "she"),
}
SOUNDS = {"neutral": "calm"}  # how an emotion is told, where not by its own name
EVENT_VERBS = {"laugh": "laughs", "cough": "coughs", "sneeze": "sneezes", "applause": "gets applause", "sigh": "sighs"}
TONES = {"happy": "happily", "gentle": "gently", "neutral": "plainly"}


def natural_think(sentence: str, labels: Labels) -> str:
    """What is thought in natural language: who says what, how, and the tone of the answer."""
    person, pronoun = PEOPLE[labels.age, labels.gender]
    sounds = f"{pronoun} sounds {SOUNDS.get(labels.emotion, labels.emotion)}"
    if labels.event != "none":
        sounds += f" and {EVENT_VERBS[labels.event]}"
    return f"{person} says: {sentence}. {sounds}, so i answer {TONES[reply_emotion(labels)]}."


def reply(topic: str | None, labels: Labels, rng: random.Random, sentence: str = "") -> str:
    """One of the answers that the rule allows (without a topic: about the last thing that ``sentence`` names)."""
    return rng.choice(list(reply_parts(topic, labels, sentence, every=False).variants()))


def plain_reply(topic: str | None, rng: random.Random, sentence: str = "") -> str:
    """An answer to a text, of which nothing is known but its words: no address but "my friend"."""
    parts = reply_parts(topic, Labels(), sentence, every=False)
    opening, clause = rng.choice(parts.openings), rng.choice(parts.clauses)
    return f"{opening}, my friend. {clause}{'?' if _is_question(clause) else '.'}"


def reply_fits(topic: str | None, labels: Labels, text: str, sentence: str = "") -> bool:
    """True when ``text`` answers topic and labels by the rule: its opening, address and clause are all ones that the rule allows.

    Punctuation and case do not count; words do.
    """
    allowed = {normalise(variant) for variant in reply_parts(topic, labels, sentence).variants()}
    return normalise(text) in allowed


def draw_labels(rng: random.Random) -> Labels:
    """Labels for one recording: half adults, half without a sound event, everything else evenly."""
    return Labels(
        age=rng.choice(("child", "adult", "adult", "old")),
        gender=rng.choice(GENDERS),
        emotion=rng.choice(EMOTIONS),
        event=rng.choice(EVENTS[1:]) if rng.random() < 0.5 else "none",
    )


def all_replies() -> Iterator[str]:
    """Every answer the rule can give."""
    seen = set()
    for topic in _replies()["topics"]:
        for age in AGES:
            for gender in GENDERS:
                for emotion in EMOTIONS:
                    for event in EVENTS:
                        for text in reply_parts(topic, Labels(age, gender, emotion, event)).variants():
                            if text not in seen:
                                seen.add(text)
                                yield text


@functools.cache
def reply_words() -> tuple[str, ...]:
    """The words that the reply voice is trained to speak: replies and the free sentences made of the same words."""
    words: set[str] = set()
    rules = _replies()
    for kind in rules["openings"].values():
        for variants in kind.values():
            words.update(normalise(" ".join(variants)).split())
    for by_gender in rules["addresses"].values():
        words.update(normalise(" ".join(by_gender.values())).split())
    for moods in rules["topics"].values():
        for clauses in moods.values():
            words.update(normalise(" ".join(clauses)).split())
    for fillers in rules["free"]["slots"].values():
        words.update(normalise(" ".join(fillers)).split())
    for template in rules["free"]["templates"]:
        words.update(normalise(re.sub(r"\{\w+\}", " ", template)).split())
    return tuple(sorted(words))


def free_sentence(rng: random.Random) -> str:
    """A sentence in the reply's words that is no reply of the rule (for the speech of words in new company)."""
    free = _replies()["free"]
    text = _fill(rng.choice(free["templates"]), free["slots"], rng)
    return text[:1].upper() + text[1:]


def word_salad(rng: random.Random) -> str:
    """4 to 8 reply words in random order, so that no word is only ever spoken beside its usual neighbours."""
    words = rng.sample(reply_words(), rng.randint(4, 8))
    text = " ".join(words)
    return text[:1].upper() + text[1:] + "."


# Text files of ours -----------------------------------------------------------------------------------------------------------------


def hand_written(name: str) -> list[tuple[str, str]]:
    """(sentence, topic) pairs of ``recipes/mini/held_out/<name>.txt``: one ``topic<TAB>sentence`` a line; never in training."""
    pairs = []
    for line in (HERE / "held_out" / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        topic, _, sentence = line.partition("\t")
        pairs.append((sentence.strip(), topic))
    return pairs
