"""Recorded greedy decodes and decoding functions of the reference, compared with `osum_echat.generation`.

`gen_cases.json/.npz`: prompt embeddings, generated ids, logits of every step, return values. The requests are rebuilt
from the recordings in `cases.npz` and the texts in the file, in profile ``as_released``; ids that the recording forced
are forced here. `functions.json`: the 6:18 interleave, the logits processors on crafted sequences, the rules for
stopping.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from osum_echat.dialogue.dialect import Dialect
from osum_echat.dialogue.interleave import ImpossibleInterleave, interleave_chunks
from osum_echat.dialogue.packing import pack
from osum_echat.dialogue.tasks import PastTurn
from osum_echat.dialogue.vocabulary import Vocabulary
from osum_echat.generation.config import GenerationConfig, RepetitionGuard
from osum_echat.generation.events import Done, speech_codes
from osum_echat.generation.generator import Generator
from osum_echat.generation.guards import AgeChoice, ban_ids, repetition_bans
from osum_echat.generation.phases import RowState
from osum_echat.generation.request import Request, build_request, join_audio, listen
from osum_echat.golden.report import CaseResult, not_understood
from osum_echat.model.echat import AudioFeatures, EChatModel

LOGITS = 1e-4
EMBEDS = 1e-5
CONFIG = GenerationConfig().as_released()
DIALECT = Dialect("as_released")

# How the recordings name the reference's functions -> output type; the first pattern that fits counts.
_MODES = (
    (r"multi", "speech2text_token"),
    (r"(s2s|speech2speech).*think|think.*s2s", "speech2text_token_think"),
    (r"s2s|speech2speech", "speech2text_token"),
    (r"tts|text2token|t2s", "text2token"),
    (r"t2t|text2text", "text2text"),
    (r"chat.*think|think", "s2t_chat_think"),
    (r"chat", "s2t_chat"),
    (r"generate|asr|text", "text"),
)


def run(directory: Path, model: EChatModel, tokenizer: Any, feats: Sequence[Tensor]) -> list[CaseResult]:
    """All decoding cases of a folder.

    Args:
        model: the tiny model in float32.
        feats: log-mel features [T, F] of ``wav0, wav1, ...`` of `cases.npz`.
    """
    results = []
    if (directory / "gen_cases.json").is_file():
        data = json.loads((directory / "gen_cases.json").read_text(encoding="utf-8"))
        arrays = np.load(directory / "gen_cases.npz") if (directory / "gen_cases.npz").is_file() else {}
        decodes = Decodes(data, arrays, model, tokenizer, listen(model, feats))
        for name in data["cases"]:
            results += decodes.check(name)
    if (directory / "functions.json").is_file():
        functions = json.loads((directory / "functions.json").read_text(encoding="utf-8"))
        results += check_functions(functions, tokenizer, model.vocabulary)
    return results


@dataclass
class Trace:
    """One decode of ours: raw logits of every step, ids as the reference numbers them, and the end."""

    logits: list[Tensor]
    ids: list[int]
    done: Done
    codes: tuple[int, ...]


class Decodes:
    """The cases of `gen_cases.json`."""

    def __init__(
        self, data: Mapping[str, Any], arrays: Mapping[str, Any], model: EChatModel, tokenizer: Any, heard: list[AudioFeatures]
    ) -> None:
        self.data, self.cases, self.arrays = data, data["cases"], arrays
        self.model, self.tokenizer, self.heard = model, tokenizer, heard
        self.vocab = model.vocabulary

    def check(self, name: str) -> list[CaseResult]:
        """Prompt, steps and return value of one case."""
        case = self.cases[name]
        output_type = next((mode for pattern, mode in _MODES if re.search(pattern, name)), None)
        if output_type is None:
            return [not_understood(name, "its name fits no decoding mode")]
        if self._needs_earlier_turn(name) and self._earlier(name) not in self.cases:
            return [not_understood(name, f"it continues {self._earlier(name)}, which is not in the file")]
        if case.get("error") and not case.get("ids"):
            return [CaseResult(name, 0.0, 0.0, f"deliberate: the reference stops with {case['error']!r}, here it is no error")]
        recorded = self.arrays.get(f"G.{name}.prompt_embeds") if hasattr(self.arrays, "get") else None
        request, prompt_error = self._closest(name, output_type, recorded, case)
        results = [CaseResult(f"{name} prompt", prompt_error, EMBEDS, "embeddings rebuilt from profile as_released")]
        trace = self._decode(request, case)
        results.append(self._compare_steps(name, case, trace))
        results.append(self._compare_return(name, case, trace, output_type))
        return results

    # ---- requests ----------------------------------------------------------------------------------------------------

    def _closest(self, name: str, output_type: str, recorded: Any, case: Mapping[str, Any]) -> tuple[Request, float]:
        """The request whose prompt is the recorded one. The file does not say which recording it heard, so each is
        tried."""
        best: tuple[Request, float] | None = None
        for heard in self._candidates(name, output_type):
            request = self._request(name, output_type, heard)
            error = self._prompt_error(request, recorded, case)
            if best is None or error < best[1]:
                best = (request, error)
            if error <= EMBEDS:
                break
        assert best is not None
        return best

    def _candidates(self, name: str, output_type: str) -> list[tuple[AudioFeatures, ...]]:
        if output_type in ("text2token", "text2text"):
            return [()]
        number = next((int(part) for part in re.split(r"[._]", name) if part.isdecimal()), 0)
        order = sorted(range(len(self.heard)), key=lambda i: i != number)
        if not self._needs_earlier_turn(name):
            return [(self.heard[i],) for i in order]
        earlier = self._earlier(name)
        past, _ = self._closest(earlier, output_type, self.arrays.get(f"G.{earlier}.prompt_embeds"), self.cases[earlier])
        return [(*past.heard, self.heard[i]) for i in order]

    def _request(self, name: str, output_type: str, heard: tuple[AudioFeatures, ...]) -> Request:
        history: list[PastTurn] = []
        turn = name
        while self._needs_earlier_turn(turn):
            turn = self._earlier(turn)
            text, speech = self._split(self.cases[turn]["ids"])
            codes = tuple(i for i in speech if i < self.vocab.speech_codes)
            history.insert(0, PastTurn(tuple(text[:-1]), codes))  # the reference loses the last text id
        texts = {"text": self.data.get("prompt_generate", ""), "text2text": self.data.get("t2t_text", "")}
        request = build_request(
            output_type,
            CONFIG,
            self.tokenizer,
            self.vocab,
            prompt_text=texts.get(output_type, ""),
            say=self.data.get("tts_text", "") if output_type == "text2token" else "",
            heard=heard,
            history=history,
            dialect=DIALECT,
            greedy=True,
        )
        if self._starts_in_speech(name, output_type):
            request.output_type = "text2token"  # the defect is shown by asking the speech head of the same prompt
        return request

    def _starts_in_speech(self, name: str, output_type: str) -> bool:
        """Whether text2text was recorded behind a speech call, whose phase it inherited."""
        steps = self.cases[name].get("steps") or [{}]
        return output_type == "text2text" and steps[0].get("vocab") == self.vocab.speech_classes

    def _prompt_error(self, request: Request, recorded: Any, case: Mapping[str, Any]) -> float:
        with torch.inference_mode():
            embeds_TD = self.model.inputs(pack([request.prompt]), join_audio(request.heard)).embeds_BTD[0]
        if recorded is not None:
            expected_TD = torch.from_numpy(np.asarray(recorded))[0].float()
            return float((embeds_TD - expected_TD).abs().max()) if embeds_TD.shape == expected_TD.shape else float("inf")
        if tuple(case["prompt_shape"][1:]) != tuple(embeds_TD.shape):
            return float("inf")
        sums = (float(embeds_TD.double().sum()), float(embeds_TD.double().abs().sum()))
        scale = max(abs(case["prompt_abs_sum"]), 1.0)
        return max(abs(sums[0] - case["prompt_sum"]), abs(sums[1] - case["prompt_abs_sum"])) / scale

    def _needs_earlier_turn(self, name: str) -> bool:
        match = re.search(r"turn(\d+)", name)
        return match is not None and int(match[1]) > 1

    def _earlier(self, name: str) -> str:
        return re.sub(r"turn(\d+)", lambda m: f"turn{int(m[1]) - 1}", name)

    # ---- decoding ----------------------------------------------------------------------------------------------------

    def _decode(self, request: Request, case: Mapping[str, Any]) -> Trace:
        starts_in_speech = request.output_type == "text2token"
        ids = case["ids"]
        limit = len(ids) if len(ids) > self.data["cap"] else self.data["cap"]
        offsets = self._offsets(ids, starts_in_speech)
        request.mode = replace(request.mode, max_new=limit)
        request.plan = {int(step): token + offsets[int(step)] for step, token in case.get("forced_plan", {}).items()}
        logits: list[Tensor] = []
        generator = Generator(self.model, self.tokenizer, CONFIG, DIALECT)
        events = list(generator.generate([request], on_logits=lambda _, logits_V: logits.append(logits_V.clone())))
        done = events[-1][1]
        assert isinstance(done, Done)
        size = self.vocab.text_size
        return Trace(
            logits,
            [token - size if token >= size else token for token in done.generated],
            done,
            speech_codes([event for _, event in events]),
        )

    def _offsets(self, ids: Sequence[int], starts_in_speech: bool) -> list[int]:
        """What makes each recorded id a unified one: speech ids follow the first end of text."""
        switch = -1 if starts_in_speech else ids.index(self.vocab.eos_id) if self.vocab.eos_id in ids else len(ids)
        return [self.vocab.text_size if i > switch else 0 for i in range(len(ids))]

    def _compare_steps(self, name: str, case: Mapping[str, Any], trace: Trace) -> CaseResult:
        steps = case["steps"]
        if trace.ids[: len(case["ids"])] != case["ids"] or len(trace.ids) != len(case["ids"]):
            pairs = zip(trace.ids, case["ids"], strict=False)
            first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(trace.ids), len(case["ids"])))
            return CaseResult(
                f"{name} ids", float("inf"), 0.0, f"{len(trace.ids)} ids, recorded {len(case['ids'])}; first other at {first}"
            )
        error = 0.0
        for step, logits_V in zip(steps, trace.logits, strict=False):
            if step["vocab"] != len(logits_V):
                return CaseResult(f"{name} logits", float("inf"), LOGITS, f"{len(logits_V)} classes, recorded {step['vocab']}")
            fixed_ids = [*self.data["fixed_ids"], self.vocab.eos_id][: len(step["fixed"])]
            found = [*logits_V[step["top_ids"]].tolist(), *logits_V[fixed_ids].tolist(), float(logits_V.logsumexp(0))]
            expected = [*step["top"], *step["fixed"], step["lse"]]
            error = max(error, float(np.abs(np.subtract(found, expected)).max()))
        return CaseResult(f"{name} ids, logits", error, LOGITS, f"{len(trace.ids)} ids exact, {len(steps)} steps of logits")

    def _compare_return(self, name: str, case: Mapping[str, Any], trace: Trace, output_type: str) -> CaseResult:
        label = f"{name} return"
        if case.get("error"):
            note = f"deliberate: the reference fails with {case['error']!r}, here the reply is Done({trace.done.reason!r})"
            return CaseResult(label, 0.0 if trace.done.reason == "length" else 1.0, 0.0, note)
        done, vocab = trace.done, self.vocab
        _, speech = self._split(trace.ids)
        lost = list(done.text_ids[:-1])
        # What the reference may return: ids or text, with or without the text id and the delimiters that it drops.
        ids = {"text": list(done.text_ids), "text without its last id": lost, "all ids": trace.ids}
        ids |= {
            "speech": speech,
            "speech without its last id": speech[:-1],
            "codes": speech[1:-1],
            "ids without the last": trace.ids[:-1],
        }
        texts = {name: self._text(value) for name, value in ids.items()}
        wrong, found = [], []
        for leaf in _leaves(case["ret"]):
            known = texts if isinstance(leaf, str) else ids
            name_of = next((name for name, value in known.items() if value == leaf), None)
            if name_of is None:
                wrong.append(repr(leaf)[:60])
            elif name_of not in found:
                found.append(name_of)
        starts_in_speech = self._starts_in_speech(name, output_type) or output_type == "text2token"
        codes = [i for i in (trace.ids if starts_in_speech else speech) if i != vocab.speech_delimiter - vocab.text_size]
        if list(trace.codes) != codes:
            wrong.append("our own codes")
        note = f"differs: {wrong}" if wrong else f"the reference returns {', '.join(found) or 'nothing'}"
        if not wrong and any("without" in part for part in found):
            note = f"deliberate: {note}; our reply keeps every id and has no delimiters"
        return CaseResult(label, float(len(wrong)), 0.0, note)

    def _split(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        at = list(ids).index(self.vocab.eos_id) if self.vocab.eos_id in ids else len(ids)
        return list(ids[:at]), list(ids[at + 1 :])

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _leaves(value: Any) -> list[Any]:
    """Texts and flat lists of ids in a nested return value."""
    if isinstance(value, Mapping):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    if isinstance(value, list) and value and not all(isinstance(part, int) for part in value):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]


# ---- functions.json --------------------------------------------------------------------------------------------------


def check_functions(functions: Mapping[str, Any], tokenizer: Any, vocab: Vocabulary) -> list[CaseResult]:
    """Interleave, processors and stop rules."""
    results = []
    for section, cases in functions.items():
        if section == "streaming":
            results += [check_interleave(f"interleave {i}", case, tokenizer) for i, case in enumerate(cases)]
        elif section == "processors":
            results += [check_processor(case, tokenizer, vocab) for case in cases]
        elif section == "s2s_stop":
            results += [check_stop(f"s2s stop {case['ids']}", case, tokenizer, vocab) for case in cases]
        elif section == "max_token_stop":
            results.append(check_limit("max token stop", str(cases), tokenizer, vocab))
        else:
            results.append(not_understood(f"functions {section}", "no rule for this section"))
    return results


def check_interleave(name: str, case: Mapping[str, Any], tokenizer: Any) -> CaseResult:
    """6:18 chunks, rows padded with 0 to the longest."""
    think = "think" in case["fn"]
    close = tokenizer.encode("<think end>", add_special_tokens=False)
    rows = []
    for i, length in enumerate(case["text_lens"]):
        text = case["text"][i][:length]
        if "speech" in case:
            speech = case["speech"][i][: case["speech_lens"][i]]
        else:
            speech = list(range(case["speech_first"], case["speech_first"] + case["speech_lens"][i]))
        lead = _end_of(close, text) if think else 0
        try:
            rows.append([token for run in interleave_chunks(text, speech, lead) for token in run.ids])
        except ImpossibleInterleave:
            same = case["error"] is not None
            return CaseResult(name, float(not same), 0.0, "refused, as recorded" if same else "refused, recorded is a result")
    if case.get("error"):
        return CaseResult(name, 1.0, 0.0, f"not refused; recorded: {case['error']}")
    longest = max(map(len, rows))
    padded = [row + [0] * (longest - len(row)) for row in rows]
    same = padded == case["out"] and [len(row) for row in rows] == case["out_lens"]
    return CaseResult(name, float(not same), 0.0, f"{case['fn']}, texts {case['text_lens']}, speech {case['speech_lens']}")


def _end_of(part: Sequence[int], ids: Sequence[int]) -> int:
    """Where ``part`` ends in ``ids``; 0 when it is not there."""
    size = len(part)
    return next((i + size for i in range(len(ids) - size + 1) if list(ids[i : i + size]) == list(part)), 0)


def check_processor(case: Mapping[str, Any], tokenizer: Any, vocab: Vocabulary) -> CaseResult:
    """One logits processor on a crafted sequence."""
    kind = case["proc"]
    name = f"{kind} {case.get('name', '')}".strip()
    if kind == "ngram":
        return _check_repetition(name, case, vocab)
    if kind == "osum_chat":
        return _check_age(name, case, tokenizer, vocab)
    if kind.startswith("speech_rep_penalty"):
        return CaseResult(name, 0.0, 0.0, "deliberate: never called in the reference, not offered here")
    return not_understood(name, f"processor {kind!r}")


def _check_repetition(name: str, case: Mapping[str, Any], vocab: Vocabulary) -> CaseResult:
    guard = RepetitionGuard()
    # The reference tells speech ids from text ids by their size alone, and looks at the last one only.
    ids = [i if i < case["V"] else -1 for i in case["ids"]][-guard.memory :]
    recent_RW = torch.tensor([[-1] * (guard.memory - len(ids)) + ids], dtype=torch.long)
    active = case["phase"] and recent_RW[0, -1] < vocab.speech_classes
    banned_RW = repetition_bans(recent_RW, guard) if active else torch.zeros_like(recent_RW, dtype=torch.bool)
    logits_RV = ban_ids(torch.zeros(1, case["V"]), recent_RW, banned_RW)
    found = torch.isinf(logits_RV[0]).nonzero()[:, 0].tolist()
    return CaseResult(name, float(found != sorted(case["blocked"])), 0.0, f"banned {found}, recorded {case['blocked']}")


def _check_age(name: str, case: Mapping[str, Any], tokenizer: Any, vocab: Vocabulary) -> CaseResult:
    assert CONFIG.guards.age is not None
    guard = AgeChoice.compile(CONFIG.guards.age, tokenizer, vocab)
    if guard is None:
        return CaseResult(name, 1.0, 0.0, "the tokenizer does not cut the age field as recorded")
    if "finite_per_row" in case:
        armed = torch.tensor([True, True])
        recent = torch.tensor([guard.trigger_ids, [-1] * guard.memory])
        logits, _ = guard(torch.zeros(2, vocab.text_size), recent, armed)
        found = torch.isfinite(logits).sum(1).tolist()
        same = found[0] == case["finite_per_row"][0] and found[1] == vocab.text_size
        return CaseResult(name, float(not same), 0.0, f"deliberate: each row is judged by itself ({found})")
    armed, wrong = torch.tensor([True]), 0
    for call in case["calls"]:
        last = call["ids"][-guard.memory :]
        recent = torch.tensor([[-1] * (guard.memory - len(last)) + last])
        logits, acted = guard(torch.zeros(1, vocab.text_size), recent, armed)
        armed &= ~acted
        finite = torch.isfinite(logits[0])
        few = call["finite_if_few"]
        wrong += int(finite.sum()) != call["n_finite"]
        wrong += few is not None and finite.nonzero()[:, 0].tolist() != sorted(few)
        wrong += bool(armed) == call["match_found"]
    return CaseResult(name, float(wrong), 0.0, f"{len(case['calls'])} calls")


def check_stop(name: str, case: Mapping[str, Any], tokenizer: Any, vocab: Vocabulary) -> CaseResult:
    """Whether a speech reply has ended after these ids."""
    state = RowState("speech2text_token", CONFIG.mode("speech2text_token").max_new, CONFIG, tokenizer, vocab)
    for token in case["ids"]:
        if state.finished is None:
            state.accept(token + vocab.text_size if state.in_speech else token)
    stopped = state.finished is not None
    return CaseResult(name, float(stopped != case["stop"]), 0.0, f"stop {stopped}, recorded {case['stop']}")


def check_limit(name: str, rule: str, tokenizer: Any, vocab: Vocabulary) -> CaseResult:
    """The rule is recorded in words: "stops when number of generated ids >= max_tokens (2000)"."""
    match = re.fullmatch(r"stops when number of generated ids >= max_tokens \((\d+)\)", rule)
    if match is None:
        return not_understood(name, rule)
    limit = CONFIG.mode("speech2text_token").max_new
    state = RowState("speech2text_token", limit, CONFIG, tokenizer, vocab)
    count = 0
    while state.finished is None:
        state.accept(0)
        count += 1
    same = count == int(match[1]) and state.finished == "length"
    return CaseResult(name, float(not same), 0.0, f"ends after {count} ids with {state.finished!r}")
