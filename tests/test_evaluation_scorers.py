"""What scorers say of answers whose verdict is known."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from osum_echat.audio import io as audio_io
from osum_echat.config import ConfigError
from osum_echat.evaluation import ScorerUnavailable, voices
from osum_echat.evaluation.dnsmos import Dnsmos
from osum_echat.evaluation.items import Item
from osum_echat.evaluation.results import Result
from osum_echat.evaluation.scorers import SCORERS, Measure, make
from osum_echat.evaluation.scorers.answers import read_choice, read_yes_no
from tests.evaluation_case import Listener, item, result, score, suite, think, thinking, tools, write_wav


def test_every_scorer_of_the_table_can_be_made_but_for_what_needs_a_package():
    arguments = {"tag": "tag:emotion", "think_unsure": "think_unsure:emotion"}
    extras = {"dnsmos": "speechmos", "ifeval": "lm_eval"}
    for name in SCORERS:
        if name in extras and importlib.util.find_spec(extras[name]) is None:
            with pytest.raises(ScorerUnavailable, match="pip install"):
                make([name], tools(item()))
            continue
        (scorer,) = make([arguments.get(name, name)], tools(item())).values()
        assert all(isinstance(measure, Measure) for measure in scorer.measures.values())
    with pytest.raises(ConfigError, match="there is no scorer 'nonsense'"):
        make(["nonsense"], tools())
    with pytest.raises(ConfigError, match="tag:emotion"):
        make(["tag:mood"], tools())


def test_words_of_replies_and_thinks():
    assert score("wer", item(text="one two three"), result(text="one three")).values == {"wer": (1, 3)}
    assert score("cer", item(text="你好世界"), result(text="你好时界")).values == {"cer": (1, 4)}
    assert score("wer", Item("a"), result()) is None
    heard = score("think_words", item(), thinking(transcript="my dog ran"))
    assert heard.values == {"wer": (1, 4)} and heard.notes == {"heard": "my dog ran"}
    assert score("think_words", item(), result()).values == {"wer": (4, 4)}  # no think: all words are lost


def test_tags_of_thinks_and_of_replies():
    pairs = score("think_tags", item(emotion="happy"), thinking(emotion="<JOY>")).pairs
    assert pairs["emotion"] == ("happy", "happy") and pairs["age"] == ("adult", "adult")
    assert score("think_tags", item(), result()).pairs["age"] == ("adult", "(none)")
    assert score("tag:emotion", item(emotion="happy"), result(text="hello <SAD>")).pairs == {"emotion": ("happy", "sad")}
    assert score("tag:emotion", item(), result(text="hm")).pairs == {"emotion": ("sad", "(none)")}
    assert score("tag:emotion", Item("a", "x"), result()) is None


def test_a_think_with_an_impossible_tag_or_a_missing_field_does_not_count_as_parsed():
    items = [item("a"), item("b", emotion="happy")]
    kit = tools(*items)
    assert score("think_parsed", items[0], thinking(), kit).values == {"think_parsed": (1, 1)}
    for bad in (thinking(emotion="grumpy"), thinking(transcript=""), result()):
        assert score("think_parsed", items[0], bad, kit).values == {"think_parsed": (0, 1)}


def test_natural_thinks_are_counted_by_end_and_words():
    wanted = Item("a", extra={"think_str": "a man says: my dog ran away."})
    answer = result(think={"raw": "a man says: my dog ran."})
    assert score("think_closed", wanted, answer).values == {"think_closed": (True, 1), "think_missing": (False, 1)}
    assert score("think_closed", wanted, result()).values == {"think_closed": (False, 1), "think_missing": (True, 1)}
    assert score("think_text", wanted, answer).values == {"think_wer": (1, 7)}
    assert score("think_text", Item("a"), answer) is None


def test_replies_that_a_rule_allows():
    assert score("replies", item(), result(text="i am so SORRY sir")).values == {"reply_fit": (True, 1)}
    assert score("replies", item(), result(text="Nice.")).values == {"reply_fit": (False, 1)}
    assert score("replies", Item("a", "x"), result()) is None


# ---- multiple choice, yes or no, refusals --------------------------------------------------------------------------------------------


def test_letters_are_read_as_voicebench_reads_them_but_where_it_is_said_why_not(data_dir: Path):
    rows = json.loads((data_dir / "evaluation" / "voicebench.json").read_text(encoding="utf-8"))["choice"]
    assert len(rows) >= 35
    for row in rows:
        assert read_choice(row["text"]) == row.get("ours", row["voicebench"]), row
        assert ("ours" in row) == ("why" in row)


def test_refusals_are_seen_as_voicebench_sees_them_but_where_it_is_said_why_not(data_dir: Path):
    rows = json.loads((data_dir / "evaluation" / "voicebench.json").read_text(encoding="utf-8"))["refusal"]
    for row in rows:
        found = score("refusal", Item("a"), result(text=row["text"])).values["refusal"]
        assert found == (row.get("ours", row["voicebench"]), 1), row
    assert score("refusal", Item("a"), result(text=" ")).values == {"refusal": (True, 1), "empty": (True, 1)}


def test_an_unmatched_choice_is_counted_and_never_guessed():
    right, wrong, none = (score("choice", Item("a", answer="B"), result(text=t)) for t in ("B.", "The answer is C.", "Maybe."))
    assert right.values == {"accuracy": (True, 1), "accuracy_guess": (1.0, 1), "unmatched": (False, 1)}
    assert wrong.values == {"accuracy": (False, 1), "accuracy_guess": (0.0, 1), "unmatched": (False, 1)}
    assert none.values == {"accuracy": (False, 1), "accuracy_guess": (0.25, 1), "unmatched": (True, 1)}
    assert score("choice", Item("a"), result()) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes, the sentence is plausible.", "yes"),
        ("The sentence is not plausible.", "no"),
        ("Considering these points, it is implausible.", "no"),
        ("You end where you started. So yes", "yes"),
        ("She tells the truth. Therefore she does not lie.", "no"),
        ("You end up back at the starting point.", None),
        ("Who knows.", None),
    ],
)
def test_yes_or_no(text: str, answer: str | None):
    assert read_yes_no(text) == answer


def test_reasoning_is_read_as_voicebench_reads_it_but_where_it_guesses(data_dir: Path):
    rows = json.loads((data_dir / "evaluation" / "voicebench.json").read_text(encoding="utf-8"))["reasoning"]
    assert {row["id"].rpartition("_")[0] for row in rows} == {"sports_understanding", "navigate", "web_of_lies", "hyperbaton"}
    for row in rows:
        one = Item(f"bbh/{row['id']}", answer="(A)" if row["id"].startswith("hyperbaton") else "yes")
        found, wanted = score("bbh", one, result(text=row["text"])).notes["choice"], row.get("ours", row["voicebench"])
        assert found == (wanted and wanted.strip("()").lower()), row


def test_reasoning_items_of_both_kinds():
    assert score("bbh", Item("a", answer="Yes"), result(text="no")).values["accuracy"] == (False, 1)
    assert score("bbh", Item("a", answer="(B)"), result(text="The right order is option (B).")).values["accuracy"] == (True, 1)
    assert score("bbh", Item("a", answer="(A)"), result(text="hm")).values["accuracy_guess"] == (0.5, 1)
    assert score("bbh", Item("a", answer="42"), result()) is None


def test_what_is_asked_gives_other_words_their_meaning():
    assert read_yes_no("You end up back at the starting point.", "return") == "yes"
    assert read_yes_no("You don’t come back to the start.", "return") == "no"
    assert read_yes_no("She tells the truth, so he lies.", "truth") == "no" and read_yes_no("He does not lie.", "truth") == "yes"
    assert score("bbh", Item("a", "Does Lee tell the truth?", answer="yes"), result(text="Lee is truthful.")).values[
        "accuracy"
    ] == (True, 1)


def test_a_short_answer_is_found_as_words():
    assert score("contains", Item("a", answer="Bell"), result(text="It was Alexander Graham Bell.")).values == {
        "contains": (True, 1)
    }
    assert score("contains", Item("a", answer="Bell"), result(text="the bellboy")).values == {"contains": (False, 1)}


def test_instructions_are_checked_by_the_rules_of_lm_eval(monkeypatch: pytest.MonkeyPatch):
    """The package itself is an extra; what it is given and what is made of its answer are checked with a stand-in of its shape."""
    seen = []

    class Example(types.SimpleNamespace):
        def __init__(self, key: int, instruction_id_list: list[str], prompt: str, kwargs: list[dict]) -> None:
            super().__init__(key=key, instruction_id_list=instruction_id_list, prompt=prompt, kwargs=kwargs)

    def check(strict: bool):
        def inner(example: Example, response: str) -> types.SimpleNamespace:
            seen.append((example.prompt, example.kwargs, response))
            kept = ["," not in response, not strict]
            return types.SimpleNamespace(follow_instruction_list=kept, follow_all_instructions=all(kept))

        return inner

    rules = types.ModuleType("lm_eval.tasks.ifeval.utils")
    rules.InputExample = Example
    rules.test_instruction_following_strict, rules.test_instruction_following_loose = check(True), check(False)
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.ifeval.utils", rules)
    one = Item("a", "No commas.", extra={"key": 7, "instruction_id_list": ["punctuation:no_comma", "x:y"], "kwargs": [{}, None]})
    found = score("ifeval", one, result(text="fine"))
    assert found.values == {
        "prompt_strict": (False, 1),
        "instruction_strict": (1, 2),
        "prompt_loose": (True, 1),
        "instruction_loose": (2, 2),
    }
    assert seen[0] == ("No commas.", [{}, {}], "fine")

    def no_data(example: Example, response: str) -> None:
        raise LookupError("Resource punkt_tab not found.")

    rules.test_instruction_following_strict = no_data
    with pytest.raises(ScorerUnavailable, match="punkt_tab"):
        score("ifeval", one, result(text="fine"))
    assert score("ifeval", Item("b"), result()) is None


# ---- speech --------------------------------------------------------------------------------------------------------------------------


def test_silence_loses_all_words_and_the_level_does_not_matter(tmp_path: Path):
    listener = Listener("i am so sorry")
    kit = tools(item(), recognisers={"whisper-base": listener})
    loud = result(text="I am so sorry", wav=str(write_wav(tmp_path / "loud.wav", level=0.9)))
    quiet = result(text="I am so sorry", wav=str(write_wav(tmp_path / "quiet.wav", level=0.01)))
    mute = result(text="I am so sorry", finish="length")
    found = [score("own_speech:reply", item(), answer, kit).values["wer"] for answer in (loud, quiet, mute)]
    assert found == [(0, 4), (0, 4), (4, 4)]
    assert listener.levels == pytest.approx([0.5, 0.5], abs=0.01)
    assert score("own_speech:item", item(text="i was so sorry"), loud, kit).values["wer"] == (1, 4)
    with pytest.raises(ConfigError, match="own_speech:item"):
        make(["own_speech:nobody"], kit)


def test_faults_of_speech_are_counted(tmp_path: Path):
    path = tmp_path / "half.wav"
    rate = 16_000
    sound = 0.3 * np.sin(np.arange(rate) / 10)
    audio_io.write(path, np.concatenate([sound, np.zeros(rate)]), rate)
    answer = result(text="a b c d a b c d a b c d", wav=str(path), finish="length", speech_tokens=[7] * 40)
    values = score("speech_faults", item(), answer).values
    assert values["cut_off"] == (True, 1) and values["no_speech"] == (False, 1)
    assert values["repeated_words"][0] == pytest.approx(5 / 9) and values["repeated_codes"][0] > 0.9
    assert values["longest_run"] == (40, 1)
    assert values["silence"][0] == pytest.approx(0.5, abs=0.02) and values["longest_silence"][0] == pytest.approx(1, abs=0.05)
    assert values["speech_seconds"][0] == pytest.approx(2)
    assert score("speech_faults", item(), result(text="ok")).values["no_speech"] == (True, 1)


def test_dnsmos_is_asked_at_half_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    peaks = []
    monkeypatch.setattr(Dnsmos, "check", lambda self: None)
    monkeypatch.setattr(Dnsmos, "overall", lambda self, samples: peaks.append(float(np.abs(samples).max())) or 3.5)
    answer = result(wav=str(write_wav(tmp_path / "a.wav", level=0.1)))
    assert score("dnsmos", item(), answer).values == {"dnsmos": (3.5, 1)}
    assert score("dnsmos", item(), result()) is None
    assert peaks == pytest.approx([0.5], abs=0.01)


def test_the_checkpoints_own_speaker_network_knows_a_voice_again(tmp_path: Path):
    """Mini's network on its demo recordings: one voice is nearer to itself than to another, and a cosine is symmetric."""
    demo = Path("assets/demo")
    kit = tools(token2wav="checkpoints/mini/token2wav")
    kit.__dict__["speaker_nets"] = {"similarity": voices.OnnxNet(Path("checkpoints/mini/token2wav/campplus.onnx"))}
    same, other = demo / "1_adult_male_happy.ogg", demo / "4_child_female_surprised.ogg"
    one = Item("a", prompt_wav=str(same))
    alike = score("similarity", one, result(wav=str(same)), kit).values["similarity"][0]
    unlike = score("similarity", one, result(wav=str(other)), kit).values["similarity"][0]
    back = score("similarity", Item("a", prompt_wav=str(other)), result(wav=str(same)), kit).values["similarity"][0]
    assert alike == pytest.approx(1, abs=1e-4) and unlike < 0.9 and back == pytest.approx(unlike, abs=1e-5)
    assert score("similarity", Item("a"), result(wav=str(same)), kit) is None
    with pytest.raises(ValueError, match="not found"):
        voices.OnnxNet(tmp_path / "none.onnx")


def test_the_second_speaker_network_is_resemblyzers(tmp_path: Path):
    """Its weights are not here; a network of random weights in their form is read, and a vector has length one."""
    torch.manual_seed(0)
    lstm, linear = torch.nn.LSTM(40, 256, 3), torch.nn.Linear(256, 256)
    state = {f"lstm.{k}": v for k, v in lstm.state_dict().items()} | {f"linear.{k}": v for k, v in linear.state_dict().items()}
    torch.save({"model_state": {**state, "similarity_weight": torch.ones(1)}}, tmp_path / "pretrained.pt")
    net = voices.Ge2eNet(tmp_path / "pretrained.pt")
    rng = np.random.default_rng(0)
    short, long = (rng.normal(0, 0.05, n).astype(np.float32) for n in (8000, 60000))
    assert float(net.vector(short).norm()) == pytest.approx(1, abs=1e-4)
    assert net.similarity(long, long) == pytest.approx(1, abs=1e-5)
    quieter = net.similarity(long, 0.1 * long)
    assert quieter == pytest.approx(1, abs=1e-3)  # level is put right before


def test_the_suites_network_takes_the_place_of_the_checkpoints_own(tmp_path: Path):
    nets = voices.find_nets("checkpoints/mini/token2wav/campplus.onnx", None)
    assert isinstance(nets["similarity"], voices.OnnxNet)
    assert "similarity" not in voices.find_nets(None, str(tmp_path))


# ---- time ----------------------------------------------------------------------------------------------------------------------------


def test_times_speed_and_length_of_the_think():
    timings = {"first_token": 0.1, "first_audio": 0.5, "total": 2.0, "synthesis": 1.0, "think": None, "think_tokens": 30}
    timings |= {"tokens": 50, "audio_seconds": 4.0, "memory_mb": 512.0}
    values = score("latency", item(), Result("a", timings=timings)).values
    assert values["first_audio"] == (0.5, 1) and "think" not in values and values["think_tokens"] == (30, 1)
    assert values["tokens_per_second"] == (50, 1.0) and values["rtf"] == (2.0, 4.0) and values["memory_mb"] == (512.0, 1)
    assert score("latency", item(), result()) is None
    assert score("seconds", item(), result(seconds=0.2)).values == {"seconds": (0.2, 1)}


def test_a_think_is_what_the_pipeline_parsed():
    assert think().transcript == item().text and suite("wer").parts["p"].scorers == ["wer"]
