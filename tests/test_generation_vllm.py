"""The parts of vLLM as the decoder that need no vLLM: the export, the rules over a batch's logits, and the engine on a stand-in (`vllm_case`).

`make test-vllm` has the same with vLLM itself (tests/vllm).
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, Qwen2ForCausalLM

from osum_echat.cli import main
from osum_echat.dialogue.dialect import Dialect
from osum_echat.dialogue.interleave import spell
from osum_echat.generation.config import GenerationConfig
from osum_echat.generation.engine import EngineFull, EngineLimits
from osum_echat.generation.events import Done, Event
from osum_echat.generation.generator import Generator
from osum_echat.generation.request import Request, TooLong
from osum_echat.generation.vllm import export
from osum_echat.generation.vllm.engine import VllmEngine, VllmGenerator, drop_decoder, prompt_embeddings
from osum_echat.generation.vllm.rules import GUARDS, RowPlan, end_id, guard_bits, guards_of, to_settings
from osum_echat.model.checkpoint import load_model
from osum_echat.pipeline.load import read_settings, uses_vllm
from tests.generation_case import DATA, done
from tests.vllm_case import TIGHT, StandIn, every_kind_for, plain_tiny, same

ROOT = Path(__file__).resolve().parents[1]
MINI, DEMO = ROOT / "checkpoints" / "mini", ROOT / "assets" / "demo" / "1_adult_male_happy.ogg"


@pytest.fixture(scope="module")
def tiny64() -> tuple[Any, Any]:
    """The tiny model in float64, where two orders of summation differ by nothing that a choice could see."""
    return plain_tiny(torch.float64)


@pytest.fixture(scope="module")
def folder(tiny64: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, tokenizer = tiny64
    return export.export_for_vllm(model, tokenizer, GenerationConfig(), Dialect(), tmp_path_factory.mktemp("vllm") / "tiny")


WORDS = Dialect(speech_form="word")
_OURS: dict[tuple[bool, bool, str], list[list[Event]]] = {}


def ours(
    tiny64: tuple[Any, Any], greedy: bool, config: GenerationConfig | None = None, dialect: Dialect | None = None
) -> list[list[Event]]:
    """What our own engine makes of every kind of request; computed once."""
    key = greedy, config is TIGHT, (dialect or Dialect()).speech_form
    if key not in _OURS:
        model, tokenizer = tiny64
        requests = every_kind_for(model, greedy)
        rows: list[list[Event]] = [[] for _ in requests]
        for row, event in Generator(model, tokenizer, config, dialect).generate(requests):
            rows[row].append(event)
        _OURS[key] = rows
    return _OURS[key]


class Case:
    """An engine on the stand-in, without threads."""

    def __init__(
        self,
        tiny64: tuple[Any, Any],
        folder: Path,
        config: GenerationConfig | None = None,
        dialect: Dialect | None = None,
        limits: EngineLimits | None = None,
        **options: Any,
    ) -> None:
        model, tokenizer = tiny64
        limits = limits or EngineLimits()
        self.generator = Generator(model, tokenizer, config, dialect)
        decoding = to_settings(self.generator.config, self.generator.dialect)
        self.decoder = StandIn(folder, limits.rows, decoding, **options)
        self.engine = VllmEngine(self.generator, self.decoder, limits)

    def submit(self, requests: list[Request]) -> list[list[Event]]:
        rows: list[list[Event]] = [[] for _ in requests]
        self.tickets = [self.engine.submit(request, rows[i].append) for i, request in enumerate(requests)]
        return rows

    def finish(self) -> None:
        for _ in range(3000):
            if not self.engine.tick():
                return
        raise AssertionError(f"the engine does not come to an end: {self.engine.load()}")


# ---- the export ----------------------------------------------------------------------------------------------------------------------


def test_the_exported_model_has_our_logits_for_text_and_speech_alike(tiny64: tuple[Any, Any], folder: Path) -> None:
    model, _ = tiny64
    vocab = model.vocabulary
    ids = torch.tensor([[3, vocab.text_size - 1, vocab.text_size, vocab.speech_delimiter, vocab.audio_begin, vocab.audio_end, 7]])
    plain = Qwen2ForCausalLM.from_pretrained(folder, dtype="auto").eval()
    bias = torch.tensor(export.read_settings(folder)["speech_bias"], dtype=model.dtype)
    with torch.inference_mode():
        hidden = model.hidden(model.embed(ids))
        logits = plain(ids).logits
        torch.testing.assert_close(logits[..., : vocab.text_size], model.lm.text_logits(hidden))
        speech = logits[..., vocab.text_size : vocab.speech_delimiter + 1] + bias
        torch.testing.assert_close(speech, model.lm.speech_logits(hidden))
    assert logits.shape[2] == end_id(vocab) + 1 == vocab.audio_end + 1
    assert float(bias.abs().max()) > 0, "a bias of zeros would show nothing"


def test_the_folder_says_what_it_is_and_is_written_whole(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["model_type"] == "qwen2"
    assert not config["tie_word_embeddings"]
    assert config["eos_token_id"] == export.read_settings(folder)["end_id"] == config["vocab_size"] - 1
    assert len(AutoTokenizer.from_pretrained(folder / "tokenizer")) > 0
    assert not list(folder.parent.glob("*.partial-*"))


def test_a_folder_of_another_checkpoint_or_of_something_else_is_refused(
    tiny64: tuple[Any, Any], folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = tiny64
    assert export.check_folder(folder, model)["end_id"] == end_id(model.vocabulary)
    other, _ = load_model(DATA / "tiny.safetensors", DATA / "tiny_config.yaml", dtype=torch.float64)
    with torch.no_grad():
        other.lm.speech_head.bias[0] += 1
    with pytest.raises(ValueError, match="another checkpoint"):
        export.check_folder(folder, other)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        export.export_for_vllm(model, tokenizer, GenerationConfig(), Dialect(), tmp_path)
    with pytest.raises(ValueError, match="was not written by osum-echat export"):
        export.read_settings(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_a_plain_qwen2_cannot_say_is_refused(
    tiny64: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny64
    single, _ = load_model(DATA / "tiny.safetensors", DATA / "tiny_config.yaml", dtype=torch.float32)
    single.config = replace(single.config, llm=replace(single.config.llm, rotary_dtype="bfloat16"))
    with pytest.raises(ValueError, match="--dtype bfloat16"):
        export.export_for_vllm(single, tokenizer, GenerationConfig(), Dialect(), tmp_path / "a")
    monkeypatch.setattr(model.lm.llm.config, "model_type", "llama")
    with pytest.raises(ValueError, match="only a qwen2"):
        export.export_for_vllm(model, tokenizer, GenerationConfig(), Dialect(), tmp_path / "b")
    assert not list(tmp_path.iterdir())


# ---- rules and engine ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("config", [None, TIGHT], ids=["usual guards", "tight guards"])
def test_replies_are_those_of_our_own_engine(
    tiny64: tuple[Any, Any], folder: Path, greedy: bool, config: GenerationConfig | None
) -> None:
    expected = ours(tiny64, greedy, config)
    case = Case(tiny64, folder, config)
    rows = case.submit(every_kind_for(tiny64[0], greedy))
    case.finish()
    same(rows, expected)
    assert case.decoder.largest_batch == len(rows), "they were decoded together"
    if config is TIGHT:
        acted = {name for row in expected for name in done(row).guards}
        assert {"repetition", "silence", "think"} <= acted, f"only {acted} acted: the comparison shows too little"


def test_words_that_are_given_are_forced_one_a_step(tiny64: tuple[Any, Any], folder: Path) -> None:
    """The word form: spelled words stand between the codes, those of text to speech from the start."""
    expected = ours(tiny64, True, TIGHT, WORDS)
    case = Case(tiny64, folder, TIGHT, WORDS)
    rows = case.submit(every_kind_for(tiny64[0], greedy=True))
    case.finish()
    same(rows, expected)
    text_size = tiny64[0].vocabulary.text_size
    spoken = [token for token in done(rows[2]).generated if token < text_size]
    assert spoken, "the words of text to speech stand among its ids"


@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 2**20), rows=st.integers(2, 9))
def test_rows_that_are_moved_put_back_or_asked_too_early_change_nothing(
    tiny64: tuple[Any, Any], folder: Path, seed: int, rows: int
) -> None:
    case = Case(tiny64, folder, TIGHT, seed=seed, unrest=0.4, limits=EngineLimits(rows=rows))
    asked = every_kind_for(tiny64[0], greedy=False)[:5]
    found = case.submit(asked)
    case.finish()
    same(found, ours(tiny64, False, TIGHT)[:5])
    assert case.decoder.put_back + case.decoder.thrown_away > 0


def test_positions_that_nothing_attends_to_are_not_sent(tiny64: tuple[Any, Any], folder: Path) -> None:
    """As after CTC compression: every third position of a recording is hidden, and the replies are those of our own engine."""
    model, tokenizer = tiny64

    def hidden() -> list[Request]:
        requests = every_kind_for(model, greedy=True)[:5]
        for request in requests:
            request.heard = tuple(
                replace(h, visible_P=torch.arange(len(h.embeds_PD)) % 3 != 1, embeds_PD=h.embeds_PD) for h in request.heard
            )
        return requests

    lengths = [
        (len(request.prompt), len(prompt)) for request, prompt in zip(hidden(), prompt_embeddings(model, hidden()), strict=True)
    ]
    assert sum(whole > sent for whole, sent in lengths) == 4, lengths  # one of the five has no recording
    expected: list[list[Event]] = [[] for _ in range(5)]
    for row, event in Generator(model, tokenizer).generate(hidden()):
        expected[row].append(event)
    case = Case(tiny64, folder)
    rows = case.submit(hidden())
    case.finish()
    same(rows, expected)
    assert any(done(a).generated != done(b).generated for a, b in zip(expected, ours(tiny64, True), strict=False)), "hiding shows"


def test_cancelling_frees_the_row_and_leaves_the_others_alone(tiny64: tuple[Any, Any], folder: Path) -> None:
    expected = ours(tiny64, True)
    case = Case(tiny64, folder)
    rows = case.submit(every_kind_for(tiny64[0], greedy=True))
    for _ in range(4):
        case.engine.tick()
    case.tickets[3].cancel()
    case.engine.tick()
    assert done(rows[3]).reason == "cancelled" and done(rows[3]).generated
    assert case.decoder.aborted == 1
    assert all(place is None or place.name != str(case.tickets[3].number) for place in case.decoder.places)
    case.finish()
    same([row for n, row in enumerate(rows) if n != 3], [row for n, row in enumerate(expected) if n != 3])
    assert case.engine.load().rows == case.engine.load().waiting == 0


def test_events_of_a_held_request_wait_and_lose_nothing(tiny64: tuple[Any, Any], folder: Path) -> None:
    case = Case(tiny64, folder)
    rows = case.submit(every_kind_for(tiny64[0], greedy=True)[3:4])
    case.engine.tick()
    case.tickets[0].hold()
    before = len(rows[0])
    for _ in range(3):
        case.engine.tick()
    assert len(rows[0]) == before
    assert case.engine.load().held == 1
    case.tickets[0].hold(False)
    case.finish()
    same(rows, ours(tiny64, True)[3:4])


def test_what_waits_is_counted_and_what_is_too_much_is_refused(tiny64: tuple[Any, Any], folder: Path) -> None:
    case = Case(tiny64, folder, limits=EngineLimits(rows=2, queue=3))
    case.submit(every_kind_for(tiny64[0], greedy=True)[:3])
    with pytest.raises(EngineFull, match="the server is full"):
        case.submit(every_kind_for(tiny64[0], greedy=True)[3:4])
    case.engine.tick()
    assert case.engine.load().rows <= 2 and case.engine.load().waiting == 1
    case.decoder.max_positions = 4
    with pytest.raises(TooLong, match="shorter recording"):
        case.submit(every_kind_for(tiny64[0], greedy=True)[:1])


def test_numbers_that_are_none_end_their_own_request_only(tiny64: tuple[Any, Any], folder: Path) -> None:
    case = Case(tiny64, folder)
    asked = every_kind_for(tiny64[0], greedy=True)[:4]
    for wrong in (float("nan"), float("inf")):
        bad = asked[0].heard[0].embeds_PD.clone()
        bad[0, 0] = wrong
        broken = replace(asked[0], heard=(replace(asked[0].heard[0], embeds_PD=bad),))
        rows = case.submit([broken, *every_kind_for(tiny64[0], greedy=True)[1:4]])
        case.finish()
        assert rows[0] == [Done("cancelled")] and "numbers that are none" in str(case.tickets[0].failed)
        same(rows[1:], ours(tiny64, True)[1:4])


def test_when_the_decoder_dies_every_request_ends_and_no_other_is_taken(tiny64: tuple[Any, Any], folder: Path) -> None:
    case = Case(tiny64, folder, limits=EngineLimits(rows=2))
    rows = case.submit(every_kind_for(tiny64[0], greedy=True)[:4])
    case.engine.tick()

    def dead() -> Any:
        raise RuntimeError("the process has gone")

    case.decoder.step = dead  # type: ignore[method-assign]
    case.engine.tick()
    assert [done(row).reason for row in rows] == ["cancelled"] * 4
    assert all(ticket.failed is not None for ticket in case.tickets)
    with pytest.raises(EngineFull):
        case.submit(every_kind_for(tiny64[0], greedy=True)[:1])


def test_an_id_that_was_not_given_ends_its_own_request_only(tiny64: tuple[Any, Any], folder: Path) -> None:
    """vLLM's side and ours must agree on what is given; where they do not, the request is given up and vLLM's row with it."""
    case = Case(tiny64, folder)
    rows = case.submit(every_kind_for(tiny64[0], greedy=True)[3:6])
    step, delimiter = case.decoder.step, tiny64[0].vocabulary.speech_delimiter

    def wrong() -> list[Any]:
        first = str(case.tickets[0].number)
        return [replace(s, ids=(0,)) if s.name == first and s.ids == (delimiter,) else s for s in step()]

    case.decoder.step = wrong  # type: ignore[method-assign]
    case.finish()
    assert done(rows[0]).reason == "cancelled" and isinstance(case.tickets[0].failed, AssertionError)
    assert case.decoder.aborted == 1
    same(rows[1:], ours(tiny64, True)[4:6])


def test_a_listener_that_fails_cancels_its_request_only(tiny64: tuple[Any, Any], folder: Path) -> None:
    case = Case(tiny64, folder)
    asked = every_kind_for(tiny64[0], greedy=True)

    def fails(event: Event) -> None:
        raise RuntimeError("listener")

    ticket = case.engine.submit(asked[1], fails)
    rows = case.submit(asked[2:4])
    case.finish()
    assert ticket.request.cancelled.is_set()
    same(rows, ours(tiny64, True)[2:4])


# ---- what travels ----------------------------------------------------------------------------------------------------------------------


@given(st.sets(st.sampled_from(GUARDS)))
def test_guards_travel_as_bits(names: set[str]) -> None:
    assert set(guards_of(float(guard_bits(sorted(names))))) == names


@pytest.mark.parametrize("value", [-1.0, 0.5, float("inf"), 1000.0])
def test_values_that_name_no_guards_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="names no guards"):
        guards_of(value)


@pytest.mark.parametrize(
    "change",
    [
        {"output_type": "nonsense"},
        {"mode": {}},
        {"mode": "fast"},
        {"text_ids": [10**9]},
        {"text_ids": None},
        {"plan": [[1, -1]]},
        {"plan": [3]},
        {"mode": {"text": {"temperature": -1.0}, "speech": {}, "max_new": 3}},
        {"mode": {"text": {}, "speech": {}, "max_new": 0}},
    ],
)
def test_a_plan_that_is_none_is_refused(tiny64: tuple[Any, Any], change: dict[str, Any]) -> None:
    model, _ = tiny64
    plain = RowPlan.of(every_kind_for(model, True)[2]).to_plain()
    assert RowPlan.from_plain(plain, model.vocabulary).to_plain() == plain
    with pytest.raises(ValueError):
        RowPlan.from_plain(plain | change, model.vocabulary)


# ---- the generator ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def threaded(tiny64: tuple[Any, Any], folder: Path) -> Iterator[VllmGenerator]:
    model, tokenizer = load_model(DATA / "tiny.safetensors", DATA / "tiny_config.yaml", dtype=torch.float64)
    drop_decoder(model)
    generator = VllmGenerator(model, tokenizer, None, None, lambda limits: StandIn(folder, limits.rows), EngineLimits(rows=4))
    yield generator
    generator.close()


def test_a_generator_without_layers_yields_the_same_events(threaded: VllmGenerator, tiny64: tuple[Any, Any]) -> None:
    expected = ours(tiny64, True)
    assert not len(threaded.model.lm.llm.get_decoder().layers)
    asked = every_kind_for(threaded.model, greedy=True)
    rows: list[list[Event]] = [[] for _ in asked]
    for row, event in threaded.generate(asked):
        rows[row].append(event)
    same(rows, expected)
    assert threaded.read(asked[0]) is None and list(threaded.generate([])) == []
    with pytest.raises(ValueError, match="logits stay"):
        next(threaded.generate(asked, on_logits=lambda row, logits: None))


def test_a_generator_that_is_closed_early_cancels_what_runs(threaded: VllmGenerator) -> None:
    stream = threaded.generate(every_kind_for(threaded.model, greedy=True))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    engine = threaded.engine()
    threaded.close()  # waits for its threads
    assert engine.load().rows == engine.load().waiting == 0
    assert engine._decoder.closed  # type: ignore[attr-defined]


# ---- commands --------------------------------------------------------------------------------------------------------------------------


def test_the_command_exports_mini_and_mini_knows_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--for", "vllm", "mini", str(tmp_path / "out")]) == 0
    assert "a Qwen2 for vLLM" in capsys.readouterr().out
    model, tokenizer = load_model(MINI, dtype=torch.float32)
    settings_found = export.check_folder(tmp_path / "out", model)
    assert export.folder_dtype(tmp_path / "out") == "float32"
    decoding = to_settings(*read_settings(MINI, None, model.config.dialect, None))
    assert settings_found["decoding"] == json.loads(json.dumps(decoding))
    spelled = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert [spell(word, spelled) for word in ("I'm", "well.")] == [spell(word, tokenizer) for word in ("I'm", "well.")]
    plain = Qwen2ForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    ids = torch.tensor([[3, model.vocabulary.text_size + 1, 5, model.vocabulary.speech_delimiter]])
    with torch.inference_mode():
        expected = model.lm.text_logits(model.hidden(model.embed(ids)))
        torch.testing.assert_close(plain(ids).logits[..., : model.vocabulary.text_size], expected, atol=1e-4, rtol=1e-4)


def test_without_vllm_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else found(name, *a))
    assert main(["infer", "--task", "s2t_chat", "--wav", str(DEMO), "--llm-engine", "vllm"]) == 2
    assert "pip install 'osum-echat[vllm]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("own", "folder", "auto"), "leave the folder out"),
        (("vllm", None, "int8"), "with vLLM give a dtype"),
        (("other", None, "auto"), "use own or vllm"),
    ],
)
def test_what_contradicts_is_refused(options: tuple[str, str | None, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        uses_vllm(*options)
    assert uses_vllm("vllm", "folder", "auto") and not uses_vllm("own", None, "int8")


def test_processes_of_vllm_end_with_a_killed_owner() -> None:
    """An owner, an engine that it starts, a worker that the engine starts: the worker sees the owner go, and takes the engine with it."""
    worker = "import os, time; from osum_echat.generation.vllm.owner import end_with_owner as end; told = end(0.05)"
    worker += "; print(os.getpid(), os.getppid(), told, flush=True); time.sleep(600)"
    engine = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    owner = "import subprocess, sys; from osum_echat.generation.vllm.owner import claim, end_with_owner; claim()"
    owner += f"; assert not end_with_owner(); subprocess.run([sys.executable, '-c', {engine!r}])"
    with subprocess.Popen([sys.executable, "-c", owner], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker_pid, engine_pid, told = process.stdout.readline().split()
        assert told == "True" and int(engine_pid) != process.pid
        others = [psutil.Process(int(pid)) for pid in (worker_pid, engine_pid)]
        time.sleep(0.2)
        assert all(other.is_running() for other in others)
        os.kill(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(others, timeout=60)
    assert not alive
