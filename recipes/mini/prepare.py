"""From synthesised speech to the lists that the training stages read.

    python -m recipes.mini.prepare text   --out out/mini/lists
    python -m recipes.mini.prepare hear   --data out/mini/data --out out/mini/lists
    python -m recipes.mini.prepare tokens --data out/mini/data --token2wav out/mini/token2wav/model
    python -m recipes.mini.prepare speak  --data out/mini/data --out out/mini/lists

`text`: sentences for an LLM that has never read anything: copy what a recogniser might have heard (with its errors), note tags, answer by
the rule. `hear`: understanding and thinking on user recordings. `tokens`: speech codes of the reply voice, with the number of codes
of every word. `speak`: text to speech, and dialogue whose answer the reply voice has spoken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from recipes.mini import dialogues, texts
from recipes.mini.dialect import DIALECT

CODES, CODES_A_SECOND = 256, 25
VALIDATION = 64
OUTSIDE = 0.35  # of the thinks in text
CONVERSATIONS = 0.25  # of the records in text
CHOICE = 120  # recordings of people that a training measures itself on
TAG_TASKS = {"age": "<AGE>", "gender": "<GENDER>", "emotion": "<EMOTION>", "event": "<CAPTION>"}
TAG_SETS = (("age",), ("gender",), ("emotion",), ("event",), ("age", "gender"))  # asked for alone
TAG_SETS_WITH_WORDS = (*TAG_SETS, ("emotion", "age", "gender"), ("event", "age", "gender"))

Json = dict[str, Any]
TURN_END, ASSISTANT = DIALECT.strings.turn_end, DIALECT.strings.assistant


def read_list(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_lists(folder: Path) -> list[Json]:
    """All records of the parts in a folder, in the order of their names."""
    records = [record for path in sorted(folder.glob("*.jsonl")) for record in read_list(path)]
    if not records:
        raise ValueError(f"no records in {folder}; run recipes.mini.synthesize first")
    return records


def write_list(path: Path, records: Iterable[Json]) -> int:
    """Write a list of records under its name in one step; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)
    return len(lines)


def labels_of(record: Json) -> texts.Labels:
    return texts.Labels(**{name: record["extra"][name] for name in TAG_TASKS})


def all_known(record: Json) -> bool:
    """Whether every tag of a recording is known (of people, the gender is not always)."""
    return all(record["extra"].get(name) for name in TAG_TASKS)


# Text only --------------------------------------------------------------------------------------------------------------------------


def misheard(sentence: str, rng: random.Random, rate: float) -> str:
    """``sentence`` as a recogniser with this error rate might write it: letters of some words lost, doubled or exchanged."""
    words = []
    for word in sentence.split():
        if rng.random() < rate:
            at = rng.randrange(len(word))
            kind = rng.random()
            if kind < 0.35 and len(word) > 1:
                word = word[:at] + word[at + 1 :]
            elif kind < 0.6:
                word = word[:at] + rng.choice("aeiourstnlmdhk") + word[at:]
            elif kind < 0.95:
                word = word[:at] + rng.choice("aeiourstnlmdhk") + word[at + 1 :]
            else:
                continue
        words.append(word)
    return " ".join(words) or sentence


def bracketed(said_as: texts.Labels) -> str:
    return "".join(f"<{getattr(said_as, name)}>" for name in TAG_TASKS)


def tagged_reply(said_as: texts.Labels, answer: str) -> str:
    """An answer with the emotion of the reply in front, as dialogue records write it."""
    return f"<{texts.reply_emotion(said_as)}>{answer}"


def text_records(count: int, seed: int = 0, wordnet_folder: Path = texts.WORDNET) -> Iterator[Json]:
    """Sentences for the language model alone; ``wordnet_folder`` holds WordNet's ``data.*``.

    A quarter: a turn of a conversation with the turns before it. Of the others more than half: think and answer for a sentence with its tags, in tags or
    (behind "tell:") in natural language, or answer a plain text. The rest: copy a grammar sentence, an open-vocabulary sentence, or words in random order (so that copying never becomes guessing).
    """
    rng = random.Random(f"text {seed}")
    grammar = texts.training_user_sentences()
    wordnet = texts.wordnet_examples(wordnet_folder)
    words = sorted(
        {word for sentence in wordnet[:15_000] for word in sentence.split()} | {w for s, _ in grammar[:9_000] for w in s.split()}
    )
    for number in range(count):
        key = f"text_{number:06d}"
        rate = 0.0 if rng.random() < 0.5 else rng.uniform(0, 0.3)
        if rng.random() < CONVERSATIONS:
            yield _conversation(key, rng, grammar, rate)
            continue
        kind = rng.random()
        if kind < 0.12:
            sentence, about = (_outside(rng, wordnet), None) if kind < 0.04 else texts.about_a_topic(rng, grammar)
            yield _text(key, rng.choice((sentence, texts.written(sentence))), texts.plain_reply(about, rng, sentence))
        elif kind < 0.6:
            sentence, topic = (_outside(rng, wordnet), None) if rng.random() < OUTSIDE else texts.about_a_topic(rng, grammar)
            said_as = texts.draw_labels(rng)
            natural = rng.random() < 0.2
            question = f"{'tell: ' if natural else ''}{misheard(sentence, rng, rate)}{bracketed(said_as)}"
            yield _text(key, question, _think(sentence, topic, said_as, natural, rng))
        else:
            sentence = _sentence_to_copy(rng, grammar, wordnet, words)
            yield _text(key, f"words: {misheard(sentence, rng, rate)}", sentence)


def _outside(rng: random.Random, wordnet: list[str]) -> str:
    """A sentence outside the topics: of `said.yaml`, of WordNet, or one that is not English."""
    if rng.random() < 0.04:
        return texts.NOT_ENGLISH
    source = rng.choices(("open", "orders", "commands", "wordnet"), (0.45, 0.1, 0.1, 0.35))[0]
    return rng.choice(wordnet) if source == "wordnet" else texts.said(source, rng)


def _conversation(key: str, rng: random.Random, grammar: Any, rate: float) -> Json:
    """A turn of a conversation behind the turns before it, as recordings with a past are laid out; mostly the last one, which needs them."""
    turns = dialogues.dialogue(rng, grammar).turns
    said_as = texts.draw_labels(rng)
    at = len(turns) - 1 if rng.random() < 0.7 else rng.randrange(len(turns))
    heard = [f"{misheard(turn.said, rng, rate)}{bracketed(said_as)}" for turn in turns]
    past = [
        f"{words}{TURN_END}{ASSISTANT}{turn.reply(said_as, rng)}{TURN_END}"
        for words, turn in zip(heard, turns[:at], strict=False)
    ]
    turn, thinks, natural = turns[at], rng.random() < 0.6, rng.random() < 0.2
    answer = turn.reply(said_as, rng)
    if thinks:
        answer = _think(turn.said, turn.topic, said_as, natural, rng, answer)
    return _text(key, f"{'tell: ' if thinks and natural else ''}{''.join(past)}{heard[at]}", answer)


def _sentence_to_copy(rng: random.Random, grammar: Any, wordnet: list[str], words: list[str]) -> str:
    kind = rng.random()
    if kind < 0.25:
        return str(rng.choice(grammar)[0])
    if kind < 0.65:
        return rng.choice(wordnet)
    return " ".join(rng.choice(words) for _ in range(rng.randint(3, 10)))


def _think(
    sentence: str, topic: str | None, said_as: texts.Labels, natural: bool, rng: random.Random, answer: str | None = None
) -> str:
    """A think of ``sentence`` and its answer (None: one by the rule)."""
    from osum_echat.dialogue.think import Think

    think = Think(
        raw=texts.natural_think(sentence, said_as),
        transcript=sentence,
        reply_emotion=texts.reply_emotion(said_as),
        **{n: getattr(said_as, n) for n in TAG_TASKS},
    )
    return DIALECT.strings.template("language" if natural else "tag").write(think) + (
        answer or texts.reply(topic, said_as, rng, sentence)
    )


def _text(key: str, question: str, answer: str) -> Json:
    return {"key": key, "txt": answer, "task": "<TEXT2TEXT>", "extra": {"question": question}}


# Hearing ----------------------------------------------------------------------------------------------------------------------------


def hearing_records(record: Json, rng: random.Random, every_task: bool = False) -> Iterator[Json]:
    """Understanding tasks of one user recording: the words; where all tags are known, words with tags or tags alone, think and answer.

    ``every_task``: all of them (validation); else the transcript, and of the others some. Of the recordings without a topic fewer are
    answered: they are there so that a think writes down what was said, not the nearest sentence of the grammar.
    """
    extra = record["extra"]
    known = {name: extra[name] for name in TAG_TASKS if extra.get(name)}
    known |= {"q_txt": record["txt"], "topic": extra["topic"], "voice": extra["voice"]}

    def task(name: str, txt: str, **more: str) -> Json:
        return {"key": record["key"], "wav": record["wav"], "txt": txt, "task": name, "extra": {**known, **more}}

    def tags(names: tuple[str, ...], txt: str = "") -> Json:
        told = " ".join(TAG_TASKS[name] for name in names)
        return task(f"<TRANSCRIBE> {told}" if txt else told, txt + "".join(f"<{extra[name]}>" for name in names))

    yield task("<TRANSCRIBE>", record["txt"])
    if not all_known(record):
        return
    said_as = labels_of(record)
    if every_task or rng.random() < 0.4:
        yield tags(rng.choice(TAG_SETS_WITH_WORDS), record["txt"])
    if every_task or rng.random() < 0.3:
        yield tags(rng.choice(TAG_SETS))
    if every_task or extra["topic"] is not None or rng.random() < 0.6:
        given = extra.get("reply") if extra["topic"] is not None else None
        answer = tagged_reply(said_as, given or texts.reply(extra["topic"], said_as, rng, record["txt"]))
        yield task("<S2TCHAT> <THINKER>", answer)
        if every_task or rng.random() < 0.2:
            yield task("<S2TCHAT> <THINKER>", answer, think_str=texts.natural_think(record["txt"], said_as))
        if every_task or rng.random() < 0.1:
            yield task("<S2TCHAT>", answer)


# Speaking ---------------------------------------------------------------------------------------------------------------------------


def word_lengths(words: list[list[Any]], codes: int) -> list[int]:
    """Codes of each word from word ends in seconds; they sum to ``codes``.

    Raises:
        ValueError: when words do not fit (a word without a code).
    """
    ends = [min(codes, round(end * CODES_A_SECOND)) for _, end in words]
    ends[-1] = codes
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    if min(lengths) < 1:
        raise ValueError(f"a word without a speech code: {lengths}")
    return lengths


def tokenise(data: Path, token2wav: Path) -> None:
    """Speech codes of the reply voice: ``reply_tokens``, ``open_tokens`` and ``dialogue_tokens``, a list for each part; parts that exist are left alone."""
    from osum_echat.token2wav.prompt import Frontend, tokenizer_wave

    frontend = Frontend(token2wav, CODES)  # flow and vocoder are not there yet

    def with_codes(record: Json) -> Json | None:
        """A reply record with its codes; None (rare: numbers, abbreviations) where its words cannot be found in them."""
        codes = frontend.tokens(tokenizer_wave(record["wav"])).tolist()
        if len(record["extra"]["words"]) != len(record["txt"].split()):
            return None  # the engine has split the text into other words
        try:
            lengths = word_lengths(record["extra"]["words"], len(codes))
        except ValueError:
            return None
        return {**record, "extra": {**record["extra"], "speech_token": codes, "word_lengths": lengths}}

    sources = [("reply", path) for path in (*sorted((data / "reply").glob("*.jsonl")), data / "heldout" / "reply.jsonl")]
    sources += [(kind, path) for kind in ("open", "dialogue") for path in sorted((data / kind).glob("*.jsonl"))]
    for kind, path in sources:
        target = data / f"{kind}_tokens" / path.name
        if target.exists():
            continue
        given, records = read_list(path), []
        for record in given:
            if kind != "dialogue":
                found = with_codes(record)
            else:
                replies = [with_codes(turn["reply"]) for turn in record["turns"]]
                turns = [{**turn, "reply": reply} for turn, reply in zip(record["turns"], replies, strict=True)]
                found = None if None in replies else {**record, "turns": turns}
            if found is not None:
                records.append(found)
        print(f"{target}: {write_list(target, records)} of {len(given)}", flush=True)


def speech_extra(reply: Json) -> Json:
    return {name: reply["extra"][name] for name in ("speech_token", "word_lengths")}


def tts_record(reply: Json) -> Json:
    return {"key": reply["key"], "txt": reply["txt"], "task": "<TEXT2TOKEN>", "extra": speech_extra(reply)}


def spoken_dialogue(record: Json, spoken: dict[str, list[Json]], rng: random.Random) -> Iterator[Json]:
    """A user recording with an answer that the rule wants and the reply voice has spoken, with and without a think; nothing if there is none."""
    extra = record["extra"]
    if extra["topic"] is None:
        return
    said_as = labels_of(record)
    fitting = [r for text in texts.reply_parts(extra["topic"], said_as).variants() for r in spoken.get(text, [])]
    if not fitting:
        return
    reply = rng.choice(fitting)
    known = {name: extra[name] for name in TAG_TASKS} | {"q_txt": record["txt"], "topic": extra["topic"], "voice": extra["voice"]}
    line = {"key": record["key"], "wav": record["wav"], "txt": tagged_reply(said_as, reply["txt"])}
    speech = speech_extra(reply)
    if rng.random() < 0.2:
        speech["think_str"] = texts.natural_think(record["txt"], said_as)
    for task in ("<S2TCHAT> <TEXT2TOKEN>", "<S2TCHAT> <TEXT2TOKEN> <THINK>"):
        yield {**line, "task": task, "extra": {**known, **speech}}


def past_turns(turns: list[Json], speech: bool) -> Json:
    """The fields of a record that hold its past: recordings and answers of ``turns``, with the codes of the answers where they were spoken."""
    out: Json = {"extra": {}}
    for number, turn in enumerate(turns, start=1):
        out |= {f"wav_{number}": turn["wav"], f"txt_{number}": turn["reply"]["txt"]}
        if speech:
            out["extra"][f"speech_token_{number}"] = turn["reply"]["extra"]["speech_token"]
    return out


def dialogue_lines(record: Json, rng: random.Random) -> Iterator[tuple[str, Json]]:
    """Every turn of a conversation with the turns before it, as (list name, record) in the layouts of all stages: answer, think and answer, each in text
    and in speech. The last turn, which needs the past, comes in all of them, the others in one."""
    said_as = labels_of(record)
    for number, turn in enumerate(record["turns"]):
        tasks = ["<S2TCHAT>", "<S2TCHAT> <THINKER>", "<S2TCHAT> <TEXT2TOKEN>", "<S2TCHAT> <TEXT2TOKEN> <THINK>"]
        for task in tasks if number == len(record["turns"]) - 1 else [rng.choice(tasks)]:
            spoken = "TEXT2TOKEN" in task
            past = past_turns(record["turns"][:number], spoken)
            extra = {name: record["extra"][name] for name in (*TAG_TASKS, "voice")} | {
                "q_txt": turn["txt"],
                "topic": turn["topic"],
            }
            extra |= past.pop("extra") | (speech_extra(turn["reply"]) if spoken else {})
            line = {
                "key": f"{record['key']}_{number}",
                "wav": turn["wav"],
                "txt": tagged_reply(said_as, turn["reply"]["txt"]),
                "task": task,
            }
            name = ("talk_" if spoken else "") + "past" + ("_think" if "THINK" in task else "")
            yield name, {**line, **past, "extra": extra}


# Steps ------------------------------------------------------------------------------------------------------------------------------


def prepare_text(out: Path, count: int) -> None:
    records = list(text_records(count))
    print(
        "text:",
        write_list(out / "text.jsonl", records[VALIDATION:]),
        write_list(out / "text_past.jsonl", [r for r in records[VALIDATION:] if ASSISTANT in r["extra"]["question"]]),
        write_list(out / "text_validation.jsonl", records[:VALIDATION]),
    )


PEOPLE = {"kathleen": "readers", "coffee": "orders", "wakewords": "wakewords"}  # source -> name of its lists


def hearing_lists(records: Iterable[Json], out: Path, prefix: str) -> None:
    """``<prefix>transcribe``, ``<prefix>tags`` and ``<prefix>think`` of some recordings."""
    rng = random.Random(f"hear {prefix}".strip())
    lines: dict[str, list[Json]] = {"transcribe": [], "tags": [], "think": []}
    for record in records:
        for line in hearing_records(record, rng):
            name = "think" if "<S2TCHAT>" in line["task"] else "transcribe" if line["task"] == "<TRANSCRIBE>" else "tags"
            lines[name].append(line)
    for name, some in lines.items():
        print(f"{prefix}{name}:", write_list(out / f"{prefix}{name}.jsonl", some))


def said_turn(record: Json, number: int) -> Json:
    """What the user says in a turn of a conversation, to be written down: names and other words that are asked for later."""
    turn, known = record["turns"][number], {name: record["extra"][name] for name in (*TAG_TASKS, "voice")}
    line = {"key": f"{record['key']}_{number}", "wav": turn["wav"], "txt": turn["txt"], "task": "<TRANSCRIBE>"}
    return {**line, "extra": {**known, "topic": turn["topic"]}}


def prepare_hearing(data: Path, out: Path) -> None:
    """Lists of synthetic recordings, what users say in conversations apart (``dialogue_transcribe``); where there are some, of neural voices (``neural_*``) and of people (a name for each source in `PEOPLE`)."""
    hearing_lists(read_lists(data / "user"), out, "")
    if (data / "neural").is_dir():
        hearing_lists(read_lists(data / "neural"), out, "neural_")
    for source, name in PEOPLE.items():
        if (path := data / "people" / f"{source}.jsonl").exists():
            hearing_lists(read_list(path), out, f"{name}_")
    if (data / "dialogue").is_dir():
        turns = [said_turn(record, number) for record in read_lists(data / "dialogue") for number in range(len(record["turns"]))]
        print("dialogue_transcribe:", write_list(out / "dialogue_transcribe.jsonl", turns))
    rng = random.Random("hear validation")
    held_out = [
        line
        for record in read_list(data / "heldout" / "validation.jsonl")
        for line in hearing_records(record, rng, every_task=True)
    ]
    print("hear_validation:", write_list(out / "hear_validation.jsonl", held_out))
    if (data / "people" / "choice").is_dir():
        chosen = [r for source in ("kathleen", "coffee") for r in read_list(data / "people" / "choice" / f"{source}.jsonl")]
        rng.shuffle(chosen)
        print("choice:", write_list(out / "choice.jsonl", chosen[:CHOICE]))


def prepare_speaking(data: Path, out: Path) -> None:
    rng = random.Random("speak")
    replies = read_lists(data / "reply_tokens")
    held_out = [r for r in replies if r["key"].startswith("reply_0") and "heldout" in r["wav"]]
    replies = [r for r in replies if "heldout" not in r["wav"]]
    spoken: dict[str, list[Json]] = {}
    for reply in replies:
        spoken.setdefault(reply["txt"], []).append(reply)
    open_vocabulary = read_lists(data / "open_tokens")
    print("tts:", write_list(out / "tts.jsonl", map(tts_record, replies + open_vocabulary)))
    print("tts_validation:", write_list(out / "tts_validation.jsonl", map(tts_record, held_out)))
    dialogue = [line for record in read_lists(data / "user") for line in spoken_dialogue(record, spoken, rng)]
    past: dict[str, list[Json]] = {"past": [], "past_think": [], "talk_past": [], "talk_past_think": []}
    for record in read_lists(data / "dialogue_tokens") if (data / "dialogue").is_dir() else ():
        for name, line in dialogue_lines(record, rng):
            past[name].append(line)
    for name, lines in past.items():
        print(f"{name}:", write_list(out / f"{name}.jsonl", lines))
    for name, task in (("talk", "<S2TCHAT> <TEXT2TOKEN>"), ("talk_think", "<S2TCHAT> <TEXT2TOKEN> <THINK>")):
        print(f"{name}:", write_list(out / f"{name}.jsonl", [line for line in dialogue if line["task"] == task]))
    validation = [
        line for record in read_list(data / "heldout" / "validation.jsonl") for line in spoken_dialogue(record, spoken, rng)
    ]
    print("talk_validation:", write_list(out / "talk_validation.jsonl", validation))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    for name in ("text", "hear", "tokens", "speak"):
        step = steps.add_parser(name)
        if name != "tokens":
            step.add_argument("--out", type=Path, required=True, help="folder of the lists")
        if name != "text":
            step.add_argument("--data", type=Path, required=True, help="folder of recipes.mini.synthesize")
    steps.choices["text"].add_argument("--count", type=int, default=120_000)
    steps.choices["tokens"].add_argument("--token2wav", type=Path, required=True, help="folder with the speech tokenizer")
    arguments = parser.parse_args()
    try:
        if arguments.step == "text":
            prepare_text(arguments.out, arguments.count)
        elif arguments.step == "hear":
            prepare_hearing(arguments.data, arguments.out)
        elif arguments.step == "tokens":
            tokenise(arguments.data, arguments.token2wav)
        else:
            prepare_speaking(arguments.data, arguments.out)
    except ValueError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
