"""From records to samples: the recorded cases of the published processors, and what is meant where those lose data."""

from __future__ import annotations

import json
import random

import pytest

from osum_echat import config as config_io
from osum_echat.data import text
from osum_echat.data.config import LimitConfig, ProcessingConfig
from osum_echat.data.label_rules import LabelRules
from osum_echat.data.processing import Processor, check_limits, expand_dialogue
from osum_echat.dialogue.dialect import Dialect, default_instructions
from osum_echat.dialogue.interleave import split_words
from osum_echat.dialogue.record import Record, RecordError
from osum_echat.dialogue.tasks import TASKS, build_layout
from osum_echat.dialogue.think import CLOSE
from osum_echat.dialogue.tokens import decode
from osum_echat.golden import data as golden_data
from osum_echat.training.config import TrainConfig
from recipes.mini.dialect import DIALECT
from tests.dialogue_case import OSUM, VOCAB, golden, tokenizer

EXTRA = {
    "age": "<ADULT>",
    "gender": "FEMALE",
    "caption": "<laugh>",
    "q_emotion": "HAPPY",
    "think_str": "听起来很开心。",
    "q_txt": "天气真好",
}
SPEECH = list(range(100, 400))


MINI_RULES = config_io.load(TrainConfig, "recipes/mini/conf/empathy.yaml").data.processing.label_rules
RULES = {"language_think": "language_think", "tag_think": "tag_think", "mini": MINI_RULES}


def processor(rules: str = "language_think", prompts: dict | None = None, **settings) -> Processor:
    dialect = DIALECT if rules == "mini" else Dialect(instructions=prompts or {}, refuse_unlisted=True)
    return Processor(ProcessingConfig(label_rules=RULES[rules], **settings), tokenizer(), VOCAB, dialect)


def record(txt: str, task: str, **fields) -> Record:
    extra = fields.pop("extra", {**EXTRA, "speech_token": SPEECH})
    return Record.from_dict({"key": "k", "wav": "a.wav", "txt": txt, "task": task, "extra": extra, **fields}, "list", 1)


def reason(item: Record, **settings) -> str:
    with pytest.raises(RecordError) as caught:
        processor(**settings)(item, random.Random(0))
    assert "list:1" in str(caught.value)
    return caught.value.reason


def test_every_recorded_case_of_the_published_processors():
    results = golden_data.run(OSUM)
    assert len(results) > 180
    assert [r.line() for r in results if not r.ok] == []


def test_the_checker_fails_on_what_it_does_not_understand(tmp_path):
    case = json.loads((OSUM / "data_cases.json").read_text(encoding="utf-8"))
    item = case["inputs"][0]
    result = dict(case["results"]["processor"][f"{item['key']}|seed0"])
    for change in (
        {"inputs": [{**item, "mood": 1}], "results": {"processor": {f"{item['key']}|seed0": result}}},
        {"inputs": [item], "results": {"processor": {f"{item['key']}|seed0": {**result, "mood": 1}}}},
        {"inputs": [item], "results": {"other": {f"{item['key']}|seed0": result}}},
        {"inputs": [item], "results": {"processor": {f"{item['key']}|seed0": {**result, "label_ids": [1]}}}},
        {"inputs": [item], "results": {}, "datasets": {"mystery": {"n": 0}}},
        {"inputs": [], "results": {"processor": {"gone|seed0": result}}},
    ):
        (tmp_path / "data_cases.json").write_text(json.dumps(change), encoding="utf-8")
        assert any(not r.ok for r in golden_data.run(tmp_path)), change.keys()


def test_the_checker_reads_recorded_verdicts_of_the_name_filter(tmp_path):
    verdicts = {"我是QWEN": True, "小明助手": False, "MOSS": False}
    for form in (verdicts, list(map(list, verdicts.items())), [{"txt": k, "dropped": v} for k, v in verdicts.items()]):
        (tmp_path / "sampling_cases.json").write_text(json.dumps({"name_filter": form}), encoding="utf-8")
        results = golden_data.run(tmp_path)
        assert len(results) == 3 and all(r.ok for r in results)
    tagged = {"name_filter": {"tag_think": {"MOSS": True}, "processor": {"MOSS": True}}}
    (tmp_path / "sampling_cases.json").write_text(json.dumps(tagged), encoding="utf-8")
    assert [r.ok for r in golden_data.run(tmp_path)] == [True, False]


@pytest.mark.parametrize(("label", "kept"), [("<HAPPY>", "<HAPPY>"), ("<ADULT><FEMALE>", "<ADULT><FEMALE>"), ("<开心>好", "好")])
def test_a_label_of_tags_alone_is_not_emptied(label, kept):
    assert processor()(record(label, "<AGE> <GENDER>"), random.Random(0)).label == kept


@pytest.mark.parametrize("task", ["<S2TCHAT> <TEXT2TOKEN> <STREAMING>", "<S2TCHAT> <TEXT2TOKEN> <HISTORY>"])
def test_streaming_and_multi_turn_samples_have_speech(task):
    sample = processor()(record("好的，我知道了。", task), random.Random(0)).sample
    assert sample.speech == tuple(SPEECH) and sample.output_type == TASKS[task].output_type
    build_layout(sample, tokenizer(), VOCAB)


def test_a_dialogue_with_a_past_becomes_the_history_task():
    item = record(
        "好的。", "<S2TCHAT> <TEXT2TOKEN>", wav_1="b.wav", txt_1="嗯 嗯", extra={"speech_token": SPEECH, "speech_token_1": [7]}
    )
    done = processor()(item, random.Random(0))
    assert done.task == "<S2TCHAT> <TEXT2TOKEN> <HISTORY>" and done.recordings == ("b.wav", "a.wav")
    past = done.sample.history[0]
    assert decode(tokenizer(), past.reply_ids) == "嗯嗯" and past.speech == (7,)
    assert done.transcripts == ("", "")


def test_tags_alone_and_answers_are_drawn_half_of_the_time():
    items = (record("你好<OLD>", "<TRANSCRIBE> <AGE>"), record("问<开始回答>答", "<TRANSCRIBE> <S2TCHAT>"))
    for item, part, small in zip(items, ("<OLD>", "答"), ("<AGE>", "<S2TCHAT>"), strict=True):
        done = [processor()(item, random.Random(seed)) for seed in range(200)]
        small_ones = [d for d in done if d.task == small]
        assert 70 < len(small_ones) < 130 and {d.label for d in small_ones} == {part}
        assert processor(tag_alone_rate=0.0)(item, random.Random(0)).task == item.task
    assert processor()(record("你好<OLD>", "<TRANSCRIBE> <AGE>"), random.Random(1)).transcripts == ("你好",)


def test_the_same_generator_gives_the_same_sample():
    prompts = {"<TRANSCRIBE> <AGE>": [f"p{i}" for i in range(8)]}
    run = lambda seed: processor(prompts=prompts)(record("你好<OLD>", "<TRANSCRIBE> <AGE>"), random.Random(seed))  # noqa: E731
    assert run(3) == run(3)
    assert len({run(seed).prompt for seed in range(200)}) == 9  # eight sentences, and none for the tag alone


def test_text_to_speech_turns_into_streaming_at_its_rate():
    tasks = [processor(streaming_tts_rate=0.3)(record("好的", "<TEXT2TOKEN>"), random.Random(s)).task for s in range(300)]
    assert 60 < tasks.count("<TEXT2TOKEN> <STREAMING>") < 120


@pytest.mark.parametrize("rules", RULES)
def test_a_think_is_separate_from_its_reply(rules):
    done = processor(rules)(record("<开心>好的。", "<S2TCHAT> <TEXT2TOKEN> <THINK>"), random.Random(0))
    think, reply = done.sample.text_ids[: done.sample.think_length], done.sample.text_ids[done.sample.think_length :]
    assert CLOSE in decode(tokenizer(), think) and CLOSE not in decode(tokenizer(), think[:-1])
    assert "好的。" in decode(tokenizer(), reply) and reply[-1] == VOCAB.eos_id
    assert (done.tags["age"], done.tags["emotion"], done.transcripts) == ("ADULT", "HAPPY", ("天气真好",))


def test_the_mini_rules_write_tags_without_brackets():
    extra = {name: value for name, value in EXTRA.items() if name != "think_str"}
    done = processor("mini")(record("<happy>Sure!", "<S2TCHAT> <THINKER>", extra=extra), random.Random(0))
    assert done.label == (
        "<think>words:天气真好, age: ADULT, gender: FEMALE, emotion: HAPPY, event: laugh, reply: happy<think end>Sure!"
    )
    assert done.sample.think == "tag"


def test_the_mini_rules_take_a_think_in_language_where_the_record_has_one_and_asks_for_it_in_other_words():
    item = record("<happy>Sure!", "<S2TCHAT> <THINKER>")
    done = processor("mini")(item, random.Random(0))
    assert done.label == "<think>听起来很开心。<think end>Sure!"
    assert done.sample.think == "language"
    chat = record("<happy>Sure!", "<S2TCHAT>")
    assert processor("mini")(chat, random.Random(0)).sample.think is None


def test_word_lengths_reach_the_sample_with_the_words_of_the_reply_alone():
    extra = {**EXTRA, "speech_token": [1, 2, 3], "word_lengths": [2, 1]}
    done = processor("mini")(record("<happy>Sure thing!", "<S2TCHAT> <TEXT2TOKEN> <THINK>", extra=extra), random.Random(0))
    assert done.sample.words == ("Sure", "thing!") == tuple(split_words("Sure thing!"))
    DIALECT.layout(done.sample, tokenizer(), VOCAB)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (record("我是QWEN", "<S2TCHAT>"), "name_filter"),
        (record("你好<NONE>", "<TRANSCRIBE> <GENDER>"), "none_label"),
        (record("好", "<S2TCHAT> <THINKER>", extra={}), "missing_think"),
        (record("好", "<TEXT2TOKEN>", extra={}), "missing_speech"),
        (record("好", "<TEXT2TOKEN>", extra={"speech_token": [4096]}), "bad_codes"),
        (record("好", "<TEXT2TEXT>", extra={"question": ""}), "empty_question"),
        (record("好", "<S2TCHAT>", txt_1="x"), "bad_history"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_records_without_a_sample_say_why(item, expected):
    assert reason(item) == expected


def test_a_label_without_the_tag_or_answer_that_is_asked_for_is_dropped():
    item = record("没有标签", "<TRANSCRIBE> <AGE>")
    assert reason(item, tag_alone_rate=1.0) == "tag_extraction"
    assert reason(record("a<开始回答>b<开始回答>c", "<TRANSCRIBE> <S2TCHAT>"), tag_alone_rate=1.0) == "answer_extraction"


@pytest.mark.parametrize(
    ("item", "frames", "expected"),
    [
        (record("你好", "<TRANSCRIBE>"), [19.0], "too_short"),
        (record("你好", "<TRANSCRIBE>"), [20001.0], "too_long"),
        (record("的 a " * 800, "<TRANSCRIBE>"), [500.0], "label_too_long"),
        (record("你好", "<TRANSCRIBE>"), [16000.0], "sequence_too_long"),
        (record("今天天气真好，我们一起去公园散步吧。", "<TEXT2TOKEN>", extra={"speech_token": [1, 2]}), [], "text_speech_ratio"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_limits_name_what_is_outside(item, frames, expected):
    done = processor()(item, random.Random(0))
    with pytest.raises(RecordError) as caught:
        check_limits(done, frames, LimitConfig())
    assert caught.value.reason == expected


def test_a_dialogue_expands_to_one_sample_per_turn():
    extra = {"speech_token": [9], "speech_token_1": [1], "speech_token_2": [2], "age": "<OLD>", "q_txt": "last"}
    item = record("c", "<S2TCHAT> <TEXT2TOKEN>", wav_1="1.wav", txt_1="a", wav_2="2.wav", txt_2="b", extra=extra)
    turns = expand_dialogue(item)
    assert [(t.key, t.wav, t.txt, t.speech_token, len(t.history)) for t in turns] == [
        ("k#1", "1.wav", "a", (1,), 0),
        ("k#2", "2.wav", "b", (2,), 1),
        ("k", "a.wav", "c", (9,), 2),
    ]
    assert turns[0].extra["age"] == "<OLD>" and "q_txt" not in turns[0].extra
    assert [t.key for t in expand_dialogue(item, min_turns=2, max_turns=2)] == ["k#2"]
    assert all(processor()(t, random.Random(0)).sample.speech for t in turns)


def test_our_instructions_cover_every_prompted_task_in_two_languages():
    prompts = default_instructions()
    assert set(prompts) == {task.name for task in TASKS.values() if task.prompted}
    recorded = {r.get("prompt") for results in golden("data_cases.json")["results"].values() for r in results.values()}
    for sentences in prompts.values():
        assert len(set(sentences)) >= 8
        chinese = sum(any("\u4e00" <= c <= "\u9fff" for c in s.replace(text.ANSWER_MARK, "")) for s in sentences)
        assert 3 <= chinese <= len(sentences) - 3
        assert not recorded & set(sentences)


def test_settings_that_cannot_be_are_errors():
    for wrong in ({"label_rules": "tag"}, {"tag_alone_rate": 2.0}):
        with pytest.raises(ValueError):
            ProcessingConfig(**wrong)


def test_the_older_name_of_the_rules_is_read_with_a_warning(caplog):
    old = config_io.from_dict(ProcessingConfig, {"profile": "processor"}, "data.yaml")
    assert old == ProcessingConfig(label_rules="language_think")
    assert [r.getMessage() for r in caplog.records] == [
        "data.yaml: profile is an older name; write label_rules",
        "data.yaml: label_rules: processor is an older name; write label_rules: language_think",
    ]
    written = {"think": "natural", "strip_leading_tag": True}
    assert config_io.from_dict(LabelRules, written) == LabelRules("language", True)


@pytest.mark.parametrize(
    ("raw", "lower", "expected"),
    [
        ("你好 World  再见 < HAPPY > ok", True, "你好world再见<happy>ok"),
        ("Hello World", False, "Hello World"),
        (" 你 好 ", False, "你好"),
        ("a  b", False, "a  b"),
    ],
)
def test_clean_up_deletes_only_the_blanks_it_should(raw, lower, expected):
    assert text.clean(raw, lower) == expected
    assert text.clean(expected, lower) == expected


def test_label_helpers():
    assert text.map_styles("x<悬疑恐怖><小说><客服>") == "x<恐怖故事><有声书><客服>"
    assert text.merge_ages("a<YOUTH><MIDDLE>") == "a<ADULT><ADULT>"
    assert text.answer_part("a<开始回答>b") == "b" and text.answer_part("a") is None
    assert text.split_leading_tag("<a> b") == ("<a>", "b") and text.split_leading_tag("b<a>") == (None, "b<a>")
    assert text.all_tags("x< a >y<b>") == ["a", "b"] and text.without_tags("x<a>") == "x"
