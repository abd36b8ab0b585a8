"""Joint CTC/attention decoding: its probabilities against an enumeration of all paths, its place in a row, and the shipped model with it."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from osum_echat import metrics
from osum_echat.dialogue.prompts import AS_TRAINED
from osum_echat.dialogue.tasks import begins_with_words
from osum_echat.generation.config import GenerationConfig
from osum_echat.generation.events import Done
from osum_echat.generation.generator import Generator
from osum_echat.generation.rows import UsualRows
from osum_echat.generation.static_rows import Sizes
from osum_echat.generation.transcript import CtcPrefix, Place, TranscriptRow, ending_ids
from osum_echat.generation.vllm.rules import RowPlan
from osum_echat.pipeline import Ask, EChat

MINI = Path("checkpoints/mini")
DEMO = sorted(Path("assets/demo").glob("*.ogg"))
POSITIONS, BLANK = 5, 3


def said(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(label for label, _ in itertools.groupby(path) if label != BLANK)


def enumerated(log_probs_PC: Tensor, taken: tuple[int, ...]) -> tuple[list[float], float]:
    """p(each id | taken) and p(end | taken), from all paths one by one."""
    begins, ends, goes_on = 0.0, 0.0, [0.0] * BLANK
    for path in itertools.product(range(BLANK + 1), repeat=POSITIONS):
        p = float(torch.exp(log_probs_PC[range(POSITIONS), list(path)].sum()))
        labels = said(path)
        if labels[: len(taken)] != taken:
            continue
        begins += p
        if len(labels) == len(taken):
            ends += p
        else:
            goes_on[labels[len(taken)]] += p
    return [p / begins for p in goes_on], ends / begins


@pytest.mark.parametrize("taken", [(), (0,), (1, 1), (2, 0, 2), (0, 1, 2, 0)])
def test_probabilities_are_those_of_all_paths(taken: tuple[int, ...]) -> None:
    log_probs_PC = torch.randn(POSITIONS, BLANK + 1, generator=torch.Generator().manual_seed(len(taken))).log_softmax(1)
    prefix = CtcPrefix(log_probs_PC)
    for token in taken:
        prefix.take(token)
    following_V, end = prefix.next()
    expected, expected_end = enumerated(log_probs_PC, taken)
    torch.testing.assert_close(following_V.exp().tolist(), expected, atol=1e-6, rtol=1e-5)
    assert float(torch.tensor(end).exp()) == pytest.approx(expected_end, rel=1e-5)
    assert float(following_V.exp().sum()) + expected_end == pytest.approx(1, rel=1e-5)


def test_an_impossible_prefix_leaves_numbers() -> None:
    """Four equal labels need seven positions."""
    prefix = CtcPrefix(torch.randn(POSITIONS, BLANK + 1).log_softmax(1))
    for _ in range(4):
        prefix.take(1)
    following_V, end = prefix.next()
    assert bool(torch.isfinite(following_V).all()) and end == end


def test_a_row_has_scores_inside_of_its_transcript_only() -> None:
    """Ids 0 to 2, of which 2 ends a transcript; it stands behind 1 0."""
    ends_V = torch.tensor([False, False, True])
    row = TranscriptRow(Place((1, 0)), torch.randn(POSITIONS, BLANK + 1).log_softmax(1), ends_V)
    assert row.scores([]) is None and row.scores([1]) is None
    inside = row.scores([1, 0])
    assert inside is not None and inside.shape == (3,)
    assert row.scores([1, 0, 1]) is not None
    assert row.scores([1, 0, 1, 2]) is None and row.scores([1, 0, 1, 2, 0]) is None
    other = TranscriptRow(Place((1, 0)), torch.randn(POSITIONS, BLANK + 1).log_softmax(1), ends_V)
    assert other.scores([0, 1]) is None and other.scores([0, 1, 1, 0]) is None, "the text does not begin with the place"


@pytest.fixture(scope="module")
def echat() -> EChat:
    return EChat.load(MINI, device="cpu")


def weighed(echat: EChat, weight: float, **changes: object) -> Generator:
    return Generator(echat.model, echat.tokenizer, replace(echat.config, ctc_weight=weight, **changes), echat.dialect)  # type: ignore[arg-type]


def asked(echat: EChat, generator: Generator, recordings: list[Path]) -> list[Done]:
    requests = [echat.request(Ask(wav=path, think="tag"), echat.hear([path])) for path in recordings]
    ends = {row: event for row, event in generator.generate(requests) if isinstance(event, Done)}
    return [ends[row] for row in range(len(requests))]


def test_the_place_is_read_from_the_dialect(echat: EChat) -> None:
    place = Place.in_think(echat.dialect.strings.tag_think, echat.tokenizer)
    assert place is not None and place.end == ","
    assert echat.tokenizer.decode(list(place.begin)) == "<think>words:"
    assert Place.in_think(echat.dialect.strings.language_think, echat.tokenizer) is None
    assert AS_TRAINED.tag_think.parts[0][1] == "transcript"
    ends_V = ending_ids(echat.tokenizer, echat.model.vocabulary, place.end)
    after = echat.tokenizer.encode("<think>words: hello, age: old", add_special_tokens=False)
    assert [bool(ends_V[i]) for i in after[len(place.begin) :]].index(True) > 0, "the comma ends it, the word does not"
    assert bool(ends_V[echat.model.vocabulary.eos_id])


@pytest.mark.parametrize(
    ("task", "expected"),
    [("<TRANSCRIBE>", True), ("<TRANSCRIBE> <AGE> <GENDER>", True), ("<TRANSCRIBE> <ALIGN>", False), ("<AGE>", False)],
)
def test_which_tasks_begin_with_words(task: str, expected: bool) -> None:
    assert begins_with_words(task) is expected


def test_with_nearly_all_the_weight_the_words_are_those_of_the_ctc_head(echat: EChat) -> None:
    """A prefix search, so not quite the best path; and never the words of another recording."""
    for recording, done in zip(DEMO, asked(echat, weighed(echat, 0.99), DEMO), strict=True):
        [audio] = echat.hear([recording])
        assert audio.ctc_log_probs_NPC is not None and echat.model.ctc is not None
        best = echat.tokenizer.decode(echat.model.ctc.transcribe(audio.ctc_log_probs_NPC, audio.lengths_N)[0])
        thought = echat.tokenizer.decode(list(done.text_ids))
        words = thought.split("words:")[1].split(", age")[0]
        assert metrics.total_errors([best], [words]).rate <= 0.25, (best, words)


def test_a_row_is_the_same_alone_and_in_company(echat: EChat) -> None:
    generator = weighed(echat, 0.3)
    together = asked(echat, generator, DEMO[:3])
    alone = [asked(echat, generator, [path])[0] for path in DEMO[:3]]
    assert [done.generated for done in together] == [done.generated for done in alone]


def test_a_batch_of_asks_hears_what_one_ask_hears(echat: EChat) -> None:
    """Recordings that were encoded together carry their own probabilities; a text beside them has none."""
    asks = [Ask(wav=DEMO[0], think="tag"), Ask(text="hello"), Ask(wav=DEMO[1], kind="understand", task="<TRANSCRIBE>")]
    together, alone = echat.batch(asks), [echat.batch([ask])[0] for ask in asks]
    assert [(r.text, r.think) for r in together] == [(r.text, r.think) for r in alone]


def test_the_static_step_leaves_such_rows_to_the_usual_way(echat: EChat, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(weighed(echat, 0.3, static_step="always").rows(), UsualRows)
    assert "ctc_weight" in caplog.text
    with pytest.raises(ValueError, match="ctc_weight"):
        weighed(echat, 0.3).use_static_step(Sizes.of(torch.device("cpu")))


def test_the_weight_is_checked() -> None:
    with pytest.raises(ValueError, match="ctc_weight"):
        GenerationConfig(ctc_weight=1.0)


def test_a_plan_for_vllm_carries_place_and_probabilities(echat: EChat) -> None:
    request = echat.request(Ask(wav=DEMO[0], think="tag"), echat.hear([DEMO[0]]))
    plan = RowPlan.of(request)
    read = RowPlan.from_plain(plan.to_plain(), echat.model.vocabulary)
    assert read.transcribed is not None and request.transcribed is not None
    assert read.transcribed.place == request.place is not None
    assert torch.equal(read.transcribed.log_probs_PC, request.transcribed.log_probs_PC)
    assert replace(read, transcribed=None) == replace(plan, transcribed=None)
    assert RowPlan.of(request, joint=False).transcribed is None, "without a share of the CTC head nothing is sent of it"
    broken = plan.to_plain()
    heard = broken["transcribed"]
    heard["ctc_PC"] = [*heard["ctc_PC"][:2], heard["ctc_PC"][2][:400]]
    with pytest.raises(ValueError, match="probabilities"):
        RowPlan.from_plain(broken, echat.model.vocabulary)
    assert RowPlan.from_plain(RowPlan.of(echat.request(Ask(text="hello"))).to_plain(), echat.model.vocabulary).transcribed is None
