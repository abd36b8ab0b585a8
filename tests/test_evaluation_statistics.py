"""Numbers against those of other libraries, written down in tests/data/evaluation/numbers.json with their versions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from osum_echat import metrics
from osum_echat.evaluation.items import Item
from osum_echat.evaluation.normalizer import Normalizer, language_of
from osum_echat.evaluation.statistics import (
    macro_f1,
    macro_recall,
    paired_difference,
    ratio_interval,
    spearman,
    statistic_interval,
    weighted_kappa,
)


@pytest.fixture(scope="module")
def numbers(data_dir: Path) -> dict[str, Any]:
    return json.loads((data_dir / "evaluation" / "numbers.json").read_text(encoding="utf-8"))


def test_word_errors_of_awkward_texts_are_those_of_jiwer_and_meeteval(numbers):
    assert len(numbers["texts"]) == 10
    for row in numbers["texts"]:
        found = metrics.word_errors(row["normal_reference"], row["normal_hypothesis"], normalized=False)
        assert found.errors == row["meeteval"]["errors"], row
        assert found.units == row["meeteval"]["length"]
        assert found.rate == pytest.approx(row["jiwer"]["wer"])
        assert found.errors == sum(row["jiwer"][name] for name in ("substitutions", "deletions", "insertions"))


def test_character_errors_are_those_of_jiwer_without_blanks(numbers):
    for row in numbers["texts"]:
        found = metrics.char_errors(row["normal_reference"], row["normal_hypothesis"], normalized=False)
        assert found.rate == pytest.approx(row["jiwer_cer_without_blanks"]), row


def test_standard_normalisation_gives_the_recorded_texts_where_its_packages_are_installed(numbers):
    pytest.importorskip("whisper_normalizer", reason="pip install 'osum-echat[evaluation]' brings whisper-normalizer and wetext")
    pytest.importorskip("wetext", reason="pip install 'osum-echat[evaluation]' brings whisper-normalizer and wetext")
    normal = Normalizer("standard")
    for row in numbers["texts"]:
        item = Item("x", extra={"lang": row["lang"]})
        assert normal(row["reference"], item) == row["normal_reference"]
        assert normal(row["hypothesis"], item) == row["normal_hypothesis"]


def test_own_normalisation_needs_no_package_and_standard_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "whisper_normalizer.english", None)
    assert Normalizer("own")("I have 25 <HAPPY> apples.") == "i have twenty five apples"
    assert Normalizer("auto")("I have 25 apples.") == "i have twenty five apples"
    assert "English: own" in Normalizer("auto").name
    with pytest.raises(ValueError, match=r"whisper-normalizer.*normalizer=own"):
        Normalizer("standard")("hello")


def test_language_is_what_the_item_says_else_what_the_characters_are():
    assert language_of("你好") == "zh" and language_of("hello") == "en"
    assert language_of("ok", Item("x", extra={"lang": "zh-CN"})) == "zh"


def test_labels_are_scored_as_scikit_learn_does(numbers):
    labels = numbers["labels"]
    pairs = list(zip(labels["true"], labels["said"], strict=True))
    assert macro_f1(pairs) == pytest.approx(labels["macro_f1"])
    table = metrics.confusion(labels["true"], labels["said"])
    assert table.accuracy == pytest.approx(labels["accuracy"])
    assert table.macro_recall == pytest.approx(labels["macro_recall"])
    assert macro_f1([]) == 0.0


def test_balanced_accuracy_is_the_mean_of_the_recalls_of_the_true_labels():
    pairs = [("f", "f"), ("f", "m"), ("f", "f"), ("m", "m"), ("m", "(none)"), ("x", "f")]
    assert macro_recall(pairs) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert macro_recall(pairs) == pytest.approx(metrics.confusion(*zip(*pairs, strict=True)).macro_recall)
    assert macro_recall([]) == 0.0


def test_bootstrap_interval_is_that_of_scipy(numbers):
    case = numbers["bootstrap"]
    found = ratio_interval(case["errors"], case["words"], resamples=20_000)
    assert found.value == pytest.approx(sum(case["errors"]) / sum(case["words"]))
    assert found.low == pytest.approx(case["low"], abs=0.001) and found.high == pytest.approx(case["high"], abs=0.001)


def test_agreement_of_judges_is_that_of_scikit_learn_and_scipy(numbers):
    case = numbers["judges"]
    assert weighted_kappa(case["a"], case["b"]) == pytest.approx(case["kappa"])
    assert spearman(case["a"], case["b"]) == pytest.approx(case["spearman"])
    assert math.isnan(spearman([1, 1], [1, 2])) and math.isnan(weighted_kappa([3, 3], [3, 3]))


def test_what_is_written_down_is_what_the_packages_say_where_they_are_installed(numbers):
    meeteval = pytest.importorskip("meeteval", reason="pip install meeteval scikit-learn scipy: their numbers are made anew")
    scores = pytest.importorskip("sklearn.metrics", reason="pip install meeteval scikit-learn scipy: their numbers are made anew")
    stats = pytest.importorskip("scipy.stats", reason="pip install meeteval scikit-learn scipy: their numbers are made anew")
    for row in numbers["texts"]:
        one, two = (" ".join(metrics.units(row[f"normal_{side}"])) for side in ("reference", "hypothesis"))
        found = meeteval.wer.siso_word_error_rate(one, two)
        assert (found.errors, found.length) == (row["meeteval"]["errors"], row["meeteval"]["length"])
    labels, judges, case = numbers["labels"], numbers["judges"], numbers["bootstrap"]
    assert scores.f1_score(labels["true"], labels["said"], average="macro") == pytest.approx(labels["macro_f1"])
    assert scores.cohen_kappa_score(judges["a"], judges["b"], weights="quadratic") == pytest.approx(judges["kappa"])
    assert stats.spearmanr(judges["a"], judges["b"]).statistic == pytest.approx(judges["spearman"])
    drawn = stats.bootstrap(
        (np.array(case["errors"]), np.array(case["words"])),
        lambda errors, words, axis=-1: errors.sum(axis) / words.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert (drawn.low, drawn.high) == pytest.approx((case["low"], case["high"]), abs=0.001)


def test_the_same_data_gives_the_same_interval_and_one_item_none():
    values = ([1, 0, 1, 1], [1, 1, 1, 1])
    assert ratio_interval(*values) == ratio_interval(*values)
    one = ratio_interval([1], [2])
    assert (one.value, one.low, one.high, one.count) == (0.5, None, None, 1)
    with pytest.raises(ValueError, match="divide"):
        ratio_interval([0, 0], [0, 0])
    with pytest.raises(ValueError, match="2 numerators but 1"):
        ratio_interval([0, 0], [1])


def test_an_interval_of_95_percent_holds_the_truth_about_95_times_in_a_hundred():
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        hits = rng.random(120) < 0.7
        found = ratio_interval(hits.astype(float).tolist(), [1.0] * 120, resamples=400, seed=trial)
        assert found.low is not None and found.high is not None
        held += found.low <= 0.7 <= found.high
    assert 180 <= held <= 199


def test_a_better_system_is_told_from_a_worse_one_and_a_twin_is_not():
    rng = np.random.default_rng(1)
    hard = rng.random(150)
    worse = [(float(rng.random() < 0.5 + 0.3 * h), 1.0) for h in hard]
    better = [(float(rng.random() < 0.25 + 0.3 * h), 1.0) for h in hard]
    twin = [(float(rng.random() < 0.5 + 0.3 * h), 1.0) for h in hard]
    found = paired_difference(worse, better)
    assert found.is_clear and found.value < 0 and found.high < 0 and found.p < 0.01
    same = paired_difference(worse, twin)
    assert not same.is_clear and same.low < 0 < same.high and same.p > 0.05
    assert paired_difference(worse, worse).value == 0 and not paired_difference(worse, worse).is_clear
    with pytest.raises(ValueError, match="same items"):
        paired_difference(worse, better[:-1])


def test_pairing_makes_small_differences_clear_that_unpaired_intervals_hide():
    rng = np.random.default_rng(2)
    hard = rng.normal(50, 20, 100)
    a = [(float(h), 100.0) for h in hard]
    b = [(float(h + 2 + rng.normal(0, 1)), 100.0) for h in hard]
    one, two = (ratio_interval(*map(list, zip(*side, strict=True))) for side in (a, b))
    assert one.high is not None and two.low is not None and one.high > two.low  # the intervals overlap
    assert paired_difference(a, b).is_clear


def test_statistic_interval_of_a_percentile():
    values = np.arange(101.0)
    found = statistic_interval(101, lambda index: float(np.percentile(values[index], 90)))
    assert found.value == 90 and found.low is not None and found.high is not None and found.low < 90 < found.high
