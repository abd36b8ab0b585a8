"""Lists, tokenizer and configs of the mini recipe fit the general code that reads them."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from osum_echat import config as config_io
from osum_echat.data.processing import Processor
from osum_echat.dialogue.interleave import spell
from osum_echat.dialogue.record import Record
from osum_echat.dialogue.tasks import OUTPUTS, Sample, find_task
from osum_echat.dialogue.think import split_think
from osum_echat.dialogue.tokens import decode, encode
from osum_echat.generation.config import GenerationConfig
from osum_echat.model.config import load_config
from osum_echat.training.config import TrainConfig
from recipes.mini import prepare, run, texts, tokenizer
from recipes.mini.dialect import DIALECT

CONF = Path("recipes/mini/conf")
WORDNET = Path(__file__).parent / "data" / "wordnet"  # an excerpt; the recipe reads the whole
STAGES = ["text", "generation_tts", "understanding_ctc", "understanding_encoder", "understanding", "generation_s2s", "empathy"]


@pytest.fixture(scope="module")
def tok() -> Any:
    return AutoTokenizer.from_pretrained(CONF / "tokenizer")


@pytest.fixture(scope="module")
def processor(tok: Any) -> Processor:
    train = config_io.load(TrainConfig, CONF / "empathy.yaml")
    model = load_config(CONF / "model.yaml")
    return Processor(train.data.processing, tok, model.vocabulary, model.dialect)


def recording(topic: str | None = "exam") -> dict[str, Any]:
    extra = {"age": "child", "gender": "female", "emotion": "sad", "event": "cough", "voice": "v", "topic": topic}
    extra["reply"] = texts.reply("exam", texts.Labels("child", "female", "sad", "cough"), random.Random(0))
    return {"key": "u1", "wav": "u1.wav", "txt": "i got my math exam back", "task": "<TRANSCRIBE>", "extra": extra}


def processed(processor: Processor, line: dict[str, Any]) -> Any:
    return processor(Record.from_json(json.dumps(line)), random.Random(0))


def test_a_word_has_the_same_ids_at_the_beginning_and_in_the_middle(tok):
    assert encode(tok, "my sister") == encode(tok, "so my sister")[1:]
    think = encode(tok, "<think>words: my sister, age: child")
    assert think[2:4] == encode(tok, "my sister")[:2]


def test_any_text_survives_the_tokenizer(tok):
    for text in ["i am here", "Wow, that was sudden!", "naïve 你好 42 %"]:
        assert decode(tok, encode(tok, text)).strip() == text


def test_thinks_tags_and_spelled_letters_are_single_tokens(tok):
    for piece in tokenizer.pieces():
        assert len(tok.encode(piece, add_special_tokens=False)) == 1
    assert all(len(spell(character, tok)) == 2 for character in "aZ9.?'")  # the character and the blank after it
    assert len(tok) == load_config(CONF / "model.yaml").vocabulary.text_size == tokenizer.SIZE


@pytest.mark.parametrize("name", STAGES)
def test_stage_configs_load_and_name_lists_that_the_recipe_makes(name):
    train = config_io.load(TrainConfig, CONF / f"{name}.yaml")
    for stream in (*train.data.streams.values(), *train.validation.streams.values()):
        assert Path(stream.list).parent == run.LISTS
    assert train.threads == 1
    assert bool(train.lr.encoder) == (name == "understanding_encoder")  # a cache of features stands only on a frozen encoder
    assert bool(train.encoder_cache) <= (train.lr.encoder == 0.0)
    assert any(step.name == name and f"recipes/mini/conf/{name}.yaml" in step.command for step in run.STEPS)


def test_the_shipped_checkpoint_speaks_the_dialect_that_training_used():
    assert load_config("checkpoints/mini/config.yaml").dialect == load_config(CONF / "model.yaml").dialect == DIALECT
    assert not hasattr(GenerationConfig(), "profile"), "what is asked is said in one place"


def test_openings_tell_every_mode_apart_and_are_short(tok):
    modes = [m for m in OUTPUTS if m != "speech2text_token_history"]  # the same mode with a past
    assert len({DIALECT.strings.system[m] for m in modes}) == len(modes)
    layout = DIALECT.layout(Sample("speech2text_token_think"), tok, load_config(CONF / "model.yaml").vocabulary, prefix_only=True)
    assert sum(len(s.ids) for s in layout.segments) <= 12


def test_a_think_in_language_is_asked_for_by_an_opening_of_its_own(tok):
    strings, vocab = DIALECT.strings, load_config(CONF / "model.yaml").vocabulary
    thinking = [name for name, output in OUTPUTS.items() if output.think]
    openings = {strings.opening(name, think) for name in thinking for think in ("tag", "language")}
    assert len(openings) == 2 * len(thinking)
    assert strings.opening("text", "language") == strings.system["text"]
    asked = [
        DIALECT.layout(Sample(thinking[0], think=f), tok, vocab, prefix_only=True).segments[0].ids for f in ("tag", "language")
    ]
    assert asked[0] != asked[1]


def test_what_it_has_learnt_is_what_its_stages_train(processor):
    """Modes and tasks that the dialect lists are those of the recipe's lists."""
    lines = [line for seed in range(60) for line in prepare.hearing_records(recording(), random.Random(seed), every_task=True)]
    lines += [{"key": "t", "task": "<TEXT2TEXT>"}, {"key": "s", "task": "<TEXT2TOKEN>"}]
    lines += [{"key": "d", "task": task} for task in ("<S2TCHAT> <TEXT2TOKEN>", "<S2TCHAT> <TEXT2TOKEN> <THINK>")]
    tasks = {line["task"] for line in lines}
    assert {find_task(task).output_type for task in tasks} == set(DIALECT.learnt.modes)
    assert {task for task in tasks if find_task(task).prompted} == set(DIALECT.instructions)


def test_hearing_records_become_samples_without_telling_the_answer(processor):
    for line in prepare.hearing_records(recording(), random.Random(1), every_task=True):
        sample = processed(processor, line)
        words = "<TRANSCRIBE>" in line["task"] or "<S2TCHAT>" in line["task"]
        assert sample.transcripts == ("i got my math exam back" if words else "",)
        assert "math" not in sample.prompt
        assert sample.tags["emotion"] == "sad"


def test_think_records_write_a_think_that_parses_back(processor):
    lines = list(prepare.hearing_records(recording(), random.Random(1), every_task=True))
    label = processed(processor, next(line for line in lines if line["task"] == "<S2TCHAT> <THINKER>")).label
    split = split_think(label)
    think = DIALECT.strings.tag_think.parse(split.think)
    assert (think.transcript, think.age, think.event, think.reply_emotion) == (
        "i got my math exam back",
        "child",
        "cough",
        "gentle",
    )
    assert texts.reply_fits("exam", texts.Labels("child", "female", "sad", "cough"), split.reply)


def test_some_thinks_are_in_natural_language_and_name_words_person_and_tone(processor):
    lines = list(prepare.hearing_records(recording(), random.Random(1), every_task=True))
    (line,) = [line for line in lines if "think_str" in line["extra"]]
    done = processed(processor, line)
    split = split_think(done.label)
    assert split.think == "a girl says: i got my math exam back. she sounds sad and coughs, so i answer gently."
    assert done.sample.think == "language"
    assert texts.reply_fits("exam", texts.Labels("child", "female", "sad", "cough"), split.reply)


def test_a_sentence_outside_the_topics_is_answered_by_taking_up_what_it_names(processor):
    line = recording(None)
    lines = list(prepare.hearing_records(line, random.Random(1), every_task=True))
    split = split_think(processed(processor, next(line for line in lines if line["task"] == "<S2TCHAT> <THINKER>")).label)
    said_as = texts.Labels("child", "female", "sad", "cough")
    assert texts.reply_fits(None, said_as, split.reply, line["txt"]) and "exam" in split.reply
    assert not texts.reply_fits("exam", said_as, split.reply)
    for emotion in texts.EMOTIONS:  # without a thing to name; the reply voice is trained to say every word of it
        said = " ".join(texts.reply_parts(None, texts.Labels(emotion=emotion)).clauses)
        assert set(texts.normalise(said).split()) <= set(texts.reply_words())


def test_spoken_dialogue_takes_only_answers_that_fit_and_lays_words_and_codes_out(processor, tok):
    labels = texts.Labels("child", "female", "sad", "cough")
    fitting = next(texts.reply_parts("exam", labels).variants())
    lengths = [2] * len(fitting.split())
    speech = {"speech_token": [7] * sum(lengths), "word_lengths": lengths}
    spoken = {fitting: [{"txt": fitting, "extra": speech}], "Something else.": [{"txt": "Something else.", "extra": speech}]}
    lines = list(prepare.spoken_dialogue(recording(), spoken, random.Random(0)))
    assert [line["task"] for line in lines] == ["<S2TCHAT> <TEXT2TOKEN>", "<S2TCHAT> <TEXT2TOKEN> <THINK>"]
    for line in lines:
        sample = processed(processor, line)
        assert sample.sample.words == tuple(fitting.split())
        layout = DIALECT.layout(sample.sample, tok, processor.vocab)
        codes = sum(i == processor.vocab.speech_id(7) for segment in layout.segments for i in segment.ids)
        assert codes == sum(lengths)
    assert not list(prepare.spoken_dialogue(recording(), {}, random.Random(0)))


def test_text_records_think_in_both_forms_and_say_which(processor):
    lines = list(prepare.text_records(400, wordnet_folder=WORDNET))
    told = [line for line in lines if line["extra"]["question"].startswith("tell: ")]
    assert 20 < len(told) < 100
    assert all("says: " in line["txt"] and "words:" not in line["txt"] for line in told)
    assert all(
        " says: " not in line["txt"].partition("<think end>")[0] for line in lines if line["txt"].startswith("<think>words")
    )


def test_misheard_text_is_exact_at_rate_zero_and_close_at_a_low_one():
    rng = random.Random(0)
    words = ["my", "sister", "bought", "a", "ring"]
    assert prepare.misheard(" ".join(words), rng, 0.0) == " ".join(words)
    wrong = [prepare.misheard(" ".join(words), rng, 0.2).split() for _ in range(200)]
    changed = sum(a != b for heard in wrong for a, b in zip(heard, words, strict=False))
    assert 0.1 < changed / 1000 < 0.4


def test_steps_need_only_steps_before_them():
    seen: set[str] = set()
    for step in run.STEPS:
        assert set(step.needs) <= seen, step.name
        seen.add(step.name)


def test_a_step_that_is_done_is_not_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "DONE", tmp_path)
    step = run.Step("try", "nothing", (sys.executable, "-c", "raise SystemExit(1)"))
    (tmp_path / "try").write_text("1 s\n")
    run.run(step, again=False)
    assert "done before" in capsys.readouterr().out
    with pytest.raises(ValueError, match="ended with code 1"):
        run.run(step, again=True)
    with pytest.raises(ValueError, match="needs missing"):
        run.run(run.Step("later", "", ("true",), ("missing",)), again=False)


def test_texts_are_asked_as_people_type_them_and_answered_without_guessing_who_asks():
    assert texts.written("i think i'm late, am i") == "I think I'm late, am I."
    asked = [
        line["extra"]["question"] for line in prepare.text_records(300, wordnet_folder=WORDNET) if "my friend" in line["txt"]
    ]
    typed = [question for question in asked if question.endswith(".")]
    assert len(typed) >= 8 and len(asked) - len(typed) >= 8
    assert all(question[0].isupper() for question in typed)
