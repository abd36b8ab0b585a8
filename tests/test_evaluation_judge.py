"""Judges: what is asked, what counts as an answer, what is kept, what is a hole; end to end against a real server on this machine."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from osum_echat.config import ConfigError
from osum_echat.evaluation import judge as judging
from osum_echat.evaluation.items import Item
from osum_echat.evaluation.judge import Budget, Judge, JudgeError, NoScore, load_prompt, read_score
from osum_echat.evaluation.judge.rule_judge import Server, by_rule
from osum_echat.evaluation.report import Report
from osum_echat.evaluation.results import Lines
from osum_echat.evaluation.run import Plan, run_suite
from osum_echat.evaluation.suite import Part, Suite
from osum_echat.evaluation.summary import find
from tests.evaluation_case import item, result, write_list, write_wav
from tests.judge_server import recorded


def quick(url: str, **options: Any) -> Judge:
    return Judge(url, pause=0.0, **options)


def judged_suite(**fields: Any) -> Suite:
    return Suite("empathy", normalizer="own", parts={"p": Part(scorers=["replies"], judge="empathy")}, **fields)


def answers(folder: Path, texts: list[str]) -> tuple[Path, Path]:
    """A list of recordings and a file of replies to them."""
    data = write_list(folder / "l.jsonl", write_wav(folder / "a.wav"), len(texts))
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps({"id": f"k{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    return data, path


def run(folder: Path, out: str, texts: list[str], *judges: Judge, suite: Suite | None = None, **options: Any) -> Report:
    data, path = answers(folder, texts)
    return run_suite(Plan(suite or judged_suite(), str(data), folder / out, results=path, judges=judges, **options))


# ---- answers, prompts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score", "reason"),
    [
        ('{"score": 4, "reason": "kind"}', 4, "kind"),
        ('Sure {hm} {"note": 1} {"score": "3", "reason": "x {y}"} {"score": 1}', 3, "x {y}"),
        ('```json\n{"reason": "ok",\n "score": 4.5}\n```', 4.5, "ok"),
        ("It is fine. [[2]]", 2, "It is fine."),
        ('{"score": 9} [[ 5 ]]', 5, '{"score": 9}'),
        ('{"score": 1}', 1, ""),
    ],
)
def test_the_first_object_with_a_score_counts_else_double_brackets(text: str, score: float, reason: str):
    assert read_score(text) == (score, reason)


@pytest.mark.parametrize(
    "text", ["", "4", '{"score": 0}', '{"score": 6}', '{"score": true}', '{"score": null}', "[[7]]", '{"score": 3']
)
def test_anything_else_is_no_score(text: str):
    with pytest.raises(NoScore):
        read_score(text)


def test_a_judge_sees_transcript_labels_reply_and_the_emotion_of_its_voice():
    prompt = load_prompt("empathy")
    system, user = prompt.messages(item(), result(text="{labels} I am sorry", heard_emotion="sad"))
    assert system["role"] == "system" and user["role"] == "user"
    for shown in (
        "my dog ran away",
        "gender: male, age: adult, emotion: sad, event: none",
        "{labels} I am sorry",
        "of the reply: sad",
    ):
        assert shown in user["content"]
    assert "(not measured)" in prompt.messages(item(), result())[1]["content"]
    qa = load_prompt("qa").messages(Item("a", "who?", answer="Bell"), result(text="Bell"))[-1]["content"]
    assert "Question: who?" in qa and "Reference answer: Bell" in qa and "{transcript}" not in qa and "{reference}" not in qa


def test_a_later_turn_is_judged_with_the_conversation_in_view(tmp_path: Path):
    said = [Item(f"d/{n}", f"question {n}", dialogue_id="d", turn=n, group=f"turn {n}") for n in (1, 2)]
    data, path = tmp_path / "items.jsonl", tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(one.to_dict()) + "\n" for one in reversed(said)))
    path.write_text("".join(json.dumps({"id": one.id, "text": f"sorry {one.turn}"}) + "\n" for one in said))
    suite = Suite("talk", normalizer="own", parts={"p": Part(judge="turns")})
    with Server() as server:
        report = run_suite(Plan(suite, str(data), tmp_path / "out", results=path, judges=[quick(server.url)]))
    asked = sorted(body["messages"][-1]["content"] for body in server.asked)
    assert "Conversation so far: (nothing)" in asked[1] and "Request, as it was spoken: question 1" in asked[1]
    assert "Conversation so far: \n  Person: question 1\n  Assistant: sorry 1\nRequest, as it was spoken: question 2" in asked[0]
    assert {s.name: s.numbers["judge"].value for s in report.summaries} == {"p": 5, "p/turn 1": 5, "p/turn 2": 5}


def test_a_changed_prompt_has_another_key_even_with_the_same_version(tmp_path: Path):
    prompt = load_prompt("empathy")
    other = dataclasses.replace(prompt, user=prompt.user + " Be kind.")
    assert prompt.version == other.version and prompt.digest != other.digest
    with pytest.raises(ConfigError, match="there is no judge prompt 'x'"):
        load_prompt("x")


# ---- the client ----------------------------------------------------------------------------------------------------------------------


def test_only_chat_completions_is_asked_at_temperature_zero(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OSUM_ECHAT_JUDGE_KEY", "secret")
    with Server() as server:
        answer = quick(server.url, model="m").ask([{"role": "user", "content": "Reply, written down: sorry"}])
        assert read_score(answer)[0] == 5
        assert server.paths == ["/v1/chat/completions"]
        assert server.asked[0]["model"] == "m" and server.asked[0]["temperature"] == 0
        assert server.headers[0]["Authorization"] == "Bearer secret"
        quick(server.url + "/chat/completions").ask([{"role": "user", "content": "x"}])
        assert server.paths[-1] == "/v1/chat/completions" and server.asked[-1]["model"] == "default"
    with pytest.raises(ValueError, match="is not a URL"):
        Judge("localhost:8000")


def test_a_busy_server_is_asked_again_as_long_as_it_says(monkeypatch: pytest.MonkeyPatch):
    waited: list[float] = []
    busy = [(429, {"Retry-After": "3"}, {"error": "slow down"}), (503, {}, {}), (200, {}, "[[4]]")]
    with Server(recorded(busy)) as server:
        judge = Judge(server.url, pause=0.5, sleep=waited.append)
        assert judge.ask([]) == "[[4]]"
    assert waited == [3.0, 1.0] and judge.calls == 3


def test_a_server_that_stays_busy_or_refuses_is_an_error_with_its_words():
    with Server(recorded([(429, {}, {"error": "quota"})] * 3)) as server:
        with pytest.raises(JudgeError, match=r"HTTP 429.*quota"):
            quick(server.url, retries=2).ask([])
        assert len(server.asked) == 3
    with Server(recorded([(401, {}, {"error": "no key"})])) as server:
        with pytest.raises(JudgeError, match="HTTP 401"):
            quick(server.url).ask([])
        assert len(server.asked) == 1
    with pytest.raises(JudgeError, match="Connect"):
        quick(server.url, retries=1).ask([])
    with Server(recorded([(200, {}, {"choices": []})])) as server, pytest.raises(JudgeError, match="no chat completion"):
        quick(server.url).ask([])


def test_a_field_that_a_server_does_not_take_is_left_out():
    refuse = (400, {}, {"error": {"message": "Unsupported parameter: 'max_tokens'"}})
    with Server(recorded([refuse, (200, {}, "[[3]]"), (200, {}, "[[3]]")])) as server:
        judge = quick(server.url)
        judge.ask([])
        judge.ask([])
    assert ["max_tokens" in body for body in server.asked] == [True, False, False]


# ---- end to end ----------------------------------------------------------------------------------------------------------------------

TEXTS = ["I am so sorry", "nice", "so sorry to hear it", "", "sorry, sir", "well"]


def test_a_run_is_judged_and_the_second_run_asks_nothing(tmp_path: Path):
    with Server() as server:
        first = run(tmp_path, "one", TEXTS, quick(server.url, cache=tmp_path / "cache"))
        assert len(server.asked) == 6
        number = find(first.summaries, "p.judge")
        assert (
            number is not None
            and number.value == pytest.approx((5 + 2 + 5 + 1 + 5 + 2) / 6)
            and number.low < number.value < number.high
        )
        assert find(first.summaries, "p.judge_100").value == pytest.approx(100 * (number.value - 1) / 4)
        again = run(tmp_path, "one", TEXTS, quick(server.url, cache=tmp_path / "cache"))
        other_folder = run(tmp_path, "two", TEXTS, quick(server.url, cache=tmp_path / "cache"))
        assert len(server.asked) == 6
        assert find(again.summaries, "p.judge") == find(other_folder.summaries, "p.judge") == number
        run(tmp_path, "three", ["changed", *TEXTS[1:]], quick(server.url, cache=tmp_path / "cache"))
        assert len(server.asked) == 7
        run(tmp_path, "four", TEXTS, quick(server.url, model="another", cache=tmp_path / "cache"))
        assert len(server.asked) == 13
    rows = sorted(Lines(tmp_path / "one" / judging.FILE).rows(), key=lambda row: row["id"])
    assert {row["prompt"] for row in rows} == {"empathy"} and {row["version"] for row in rows} == {1}
    assert "emotion: sad" in rows[0]["reason"]
    text = (tmp_path / "one" / "report.md").read_text()
    assert "temperature 0" in text and "judge's prompt: empathy, version 1" in text


def test_nonsense_and_refusals_are_holes_and_never_zero(tmp_path: Path):
    said = [
        (200, {}, "[[5]]"),
        (200, {}, "I cannot judge"),
        (200, {}, '{"score": 0}'),
        (401, {}, {"error": "no"}),
        (200, {}, "[[3]]"),
    ]
    with Server(recorded([*said, (200, {}, "[[4]]"), (200, {}, "[[4]]"), (200, {}, "[[4]]")])) as server:
        report = run(tmp_path, "one", TEXTS[:5], quick(server.url, cache=tmp_path / "cache", retries=0))
        assert find(report.summaries, "p.judge").value == 4 and find(report.summaries, "p.judge").count == 2
        assert report.summaries[0].holes == {"judge default": 3} and report.reached == 5
        messages = [hole["message"] for hole in report.holes()]
        assert len(messages) == 3 and any("HTTP 401" in m for m in messages) and any("'I cannot judge'" in m for m in messages)
        again = run(tmp_path, "one", TEXTS[:5], quick(server.url, cache=tmp_path / "cache", retries=0))
    assert len(server.asked) == 8  # the three holes are asked again, and nothing else
    assert find(again.summaries, "p.judge").count == 5 and not again.holes()


def test_the_cost_is_said_before_the_first_call_and_the_budget_is_kept(tmp_path: Path):
    said: list[str] = []
    with Server() as server:

        def say(line: str) -> None:
            said.append(f"{len(server.asked)} calls: {line}")

        suite = judged_suite(price_per_million=[2.0, 8.0])
        report = run(tmp_path, "one", TEXTS, quick(server.url), suite=suite, budget=Budget(2), say=say)
        assert len(server.asked) == 2
    assert (
        len(said) == 1
        and said[0].startswith("0 calls: empathy: 6 verdicts")
        and "2 calls, about" in said[0]
        and "price" in said[0]
    )
    holes = [hole["message"] for hole in report.holes()]
    assert len(holes) == 4 and all("--max-calls 2" in hole for hole in holes)
    assert find(report.summaries, "p.judge").count == 2


def test_tries_count_and_suites_share_a_budget(tmp_path: Path):
    with Server(recorded([(429, {}, {"error": "slow down"})] * 3 + [(200, {}, "[[4]]")] * 9)) as server:
        judge, budget = quick(server.url, retries=1), Budget(4)
        first = run(tmp_path, "one", TEXTS[:2], judge, budget=budget)
        second = run(tmp_path, "two", TEXTS[:3], judge, budget=budget)
        assert len(server.asked) == 4 and budget.left == 0
    holes = [hole["message"] for report in (first, second) for hole in report.holes()]
    assert sum("--max-calls 4 was reached" in hole for hole in holes) >= 3
    with pytest.raises(JudgeError, match=r"--max-calls 0 was reached$"):
        quick(server.url).ask([], Budget(0))


def test_a_server_that_wants_the_name_of_its_model_is_asked_without_one():
    """What vLLM says of a name that it does not serve; without a name it answers with the model that it has."""
    unknown = (404, {}, {"error": {"message": "The model `default` does not exist.", "code": 404}})
    answer = (200, {}, {"model": "qwen", "choices": [{"message": {"content": "[[3]]"}}]})
    with Server(recorded([unknown, answer, answer, unknown])) as server:
        judge = quick(server.url)
        assert [judge.ask([]), judge.ask([])] == ["[[3]]", "[[3]]"] and judge.answered_as == {"qwen"}
        with pytest.raises(JudgeError, match="does not exist"):
            quick(server.url, model="mine").ask([])
    assert [body.get("model") for body in server.asked] == ["default", None, None, "mine"]


def test_unnamed_models_of_two_servers_never_share_answers(tmp_path: Path):
    def strict(body: dict[str, Any]) -> Any:
        return 200, {}, "[[1]]"

    with Server() as one, Server(strict) as two:
        for _ in range(2):
            judges = [quick(server.url, cache=tmp_path / "cache") for server in (one, two)]
            report = run(tmp_path, "one", TEXTS[:3], *judges)
    assert [len(server.asked) for server in (one, two)] == [3, 3]
    assert report.summaries[0].numbers["judge default (2)"].value == 1 < report.summaries[0].numbers["judge default (1)"].value


def test_two_judges_are_told_apart_and_their_agreement_is_shown(tmp_path: Path):
    def strict(body: dict[str, Any]) -> Any:
        status, headers, text = by_rule(body)
        return status, headers, "[[4]]" if '"score": 5' in text else "[[1]]"

    with Server() as one, Server(strict) as two:
        report = run(tmp_path, "one", TEXTS, quick(one.url, model="kind"), quick(two.url, model="strict"))
    suite = judged_suite(headline={"judge": "p.judge", "of 100": "p.judge_100", "fit": "p.reply_fit"})
    shown = dataclasses.replace(report, suite=suite).headline
    assert list(shown) == ["judge, kind", "judge, strict", "of 100, kind", "of 100, strict", "fit"]
    assert shown["judge, kind"] == report.summaries[0].numbers["judge kind"]
    summary = report.summaries[0]
    assert summary.numbers["judge kind"].value > summary.numbers["judge strict"].value
    assert summary.agreement["same score, percent"] == pytest.approx(100 / 6) and summary.agreement["items"] == 6
    assert 0.5 < summary.agreement["quadratic kappa"] < 1 and summary.agreement["Spearman"] > 0.8
    assert "Agreement of the judges" in (tmp_path / "one" / "report.md").read_text()


def test_without_a_judge_the_rules_stand_alone(tmp_path: Path):
    report = run(tmp_path, "one", ["answer 0", "x"])
    assert find(report.summaries, "p.reply_fit").value == 50 and find(report.summaries, "p.judge") is None


def test_steps_one_by_one_come_to_the_report_of_all_at_once(tmp_path: Path):
    def numbers(report: Report) -> dict[str, float]:
        return {name: number.value for name, number in report.summaries[0].numbers.items()}

    texts = ["answer 0", "sorry", "answer 2"]
    with Server() as server:
        judge = quick(server.url, cache=tmp_path / "cache")
        whole = numbers(run(tmp_path, "whole", texts, judge))
        assert numbers(run(tmp_path, "steps", texts, steps=["score"])) == {"reply_fit": whole["reply_fit"]}
        assert numbers(run(tmp_path, "steps", texts, judge, steps=["judge"])) == whole
        again = run(tmp_path, "steps", texts, steps=["score"])
        assert numbers(again) == whole and any("verdicts of an earlier run" in line for line in again.about)
        changed = run(tmp_path, "steps", [*texts[:2], "another"], steps=["score"])
    assert (
        changed.summaries[0].numbers["judge"].count == 2 and changed.summaries[0].numbers["reply_fit"].value < whole["reply_fit"]
    )


def test_an_answer_to_a_recording_is_one_to_all_items_that_were_made_of_it(tmp_path: Path):
    data, path = answers(tmp_path, ["so sorry", "well"])
    with Server() as server:
        suite = Suite("empathy", normalizer="own", items="labels", parts={"p": Part(scorers=["replies"], judge="empathy")})
        report = run_suite(Plan(suite, str(data), tmp_path / "out", results=path, judges=[quick(server.url)]))
    found = {s.group: (s.items, s.numbers["judge"].value) for s in report.summaries}
    assert (
        found == {"": (8, 3.5), "gender": (2, 3.5), "age": (2, 3.5), "emotion": (2, 3.5), "multi": (2, 3.5)}
        and not report.holes()
    )


def test_a_run_that_was_killed_in_the_middle_goes_on_and_comes_to_the_same_scores(tmp_path: Path):
    """The command itself, as a user runs it, against a slow server in a process of its own; kill -9 while it is judging."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    calls = tmp_path / "calls.txt"
    calls.touch()
    go_on = tmp_path / "go_on"  # after twelve calls the server is silent until this file is there
    known = ["--calls", str(calls), "--hold", str(go_on), "--after", "12"]
    server = subprocess.Popen([sys.executable, "-m", "tests.judge_server", str(port), *known])
    texts = [f"{'sorry' if n % 3 else 'well'} {n}" for n in range(10)]  # four items each: three labels and all of them
    data, path = answers(tmp_path, texts)

    def command(out: str) -> list[str]:
        known = ["--suite", "empathy", "--data", str(data), "--from", str(path), "--judge", f"http://127.0.0.1:{port}/v1"]
        return [
            sys.executable,
            "-m",
            "osum_echat.cli",
            "eval",
            *known,
            "--out",
            str(tmp_path / out),
            "--judge-cache",
            str(tmp_path / out),
        ]

    def count(file: Path) -> int:
        return file.read_bytes().count(b"\n") if file.exists() else 0

    try:
        _wait(lambda: _listens(port))
        first = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        verdicts = tmp_path / "killed" / judging.FILE
        _wait(lambda: count(verdicts) >= 5)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        before = count(verdicts)
        assert 5 <= before <= 12
        go_on.touch()
        for out in ("killed", "whole"):
            done = subprocess.run(command(out), capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    finally:
        server.kill()
        server.wait()
    one, two = (json.loads((tmp_path / out / "report.json").read_text()) for out in ("killed", "whole"))
    assert one["summaries"] == two["summaries"] and one["holes"]["count"] == 0
    assert one["summaries"][0]["numbers"]["judge"]["count"] == 40
    assert one["summaries"][0]["numbers"]["judge"]["value"] == pytest.approx((6 * 5 + 4 * 2) / 10)
    assert count(calls) <= 80 + judging.run.__globals__["WORKERS"]  # only what was on its way at the kill was paid for twice


def _wait(until: Any, seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it did not come to that in time"
        time.sleep(0.02)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
