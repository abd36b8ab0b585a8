"""Recorded training losses, per target, against `EChatModel.forward` on layouts built from the recorded batch fields.

A case recorded alone must be met. For a padded batch the law is that a row is what it is alone; where the published
code breaks that law (first speech target predicted from a pad slot, odd frame counts, a doubled user header in mixed
histories), the row is compared with itself alone and the recorded difference is told.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osum_echat.dialogue.layout import Layout, Row, audio_positions, flatten
from osum_echat.dialogue.packing import pack
from osum_echat.dialogue.tasks import OUTPUTS, PastTurn, Sample, build_layout
from osum_echat.dialogue.tokens import encode
from osum_echat.golden.report import CaseResult, not_understood
from osum_echat.model.echat import EChatModel, Inputs, LossParts

LOSS_LIMIT = 1e-4
HIDDEN_LIMIT = 1e-4
SUM_LIMIT = 1e-5  # relative, for sums over a whole sequence


class NotUnderstood(Exception):
    """A recorded field of a form that the rules here do not know."""


_UNREADABLE = (NotUnderstood, KeyError, IndexError, TypeError, ValueError)


@dataclass
class RowCase:
    """One row of a recorded batch: the sample, its recordings, and what was recorded for it."""

    row: Row
    feats: list[Tensor]
    has_history: bool
    nll: list[float]
    targets: list[int]
    positions: list[int]
    first_speech: int | None  # number of the first speech target after text, None where there is none


def run(file: Path, model: EChatModel, tokenizer: Any, feats: dict[int, Tensor], arrays: dict[str, Any]) -> list[CaseResult]:
    data = json.loads(file.read_text(encoding="utf-8"))
    out: list[CaseResult] = []
    for name, case in data["cases"].items():
        try:
            rows = _rows(case, model, tokenizer, feats)
        except _UNREADABLE as error:
            out.append(not_understood(name, f"{type(error).__name__}: {error}"))
            continue
        out += _case(name, case, rows, model, arrays)
    return out


def padding_effect(file: Path, model: EChatModel, tokenizer: Any, feats: dict[int, Tensor]) -> list[CaseResult]:
    """The file tells which targets of the published code change in a padded batch. Here none does: the recorded batches
    show it."""
    cases_file = file.with_name("forward_cases.json")
    if not cases_file.is_file():
        return [not_understood(file.name, "there is no forward_cases.json to take its batches from")]
    worst = 0.0
    batches = {n: c for n, c in json.loads(cases_file.read_text(encoding="utf-8"))["cases"].items() if len(c["keys"]) > 1}
    for name, case in batches.items():
        try:
            rows = _rows(case, model, tokenizer, feats)
        except _UNREADABLE as error:
            return [not_understood(file.name, f"batch {name}: {type(error).__name__}: {error}")]
        together = _split(_forward(model, rows)[0], len(rows))
        worst = max(worst, *(_largest(together[n], _alone(model, row)) for n, row in enumerate(rows)))
    return [CaseResult("padding_effect", worst, LOSS_LIMIT, f"deliberate: no target changes, in {len(batches)} batches")]


# ---- from recorded fields to rows ------------------------------------------------------------------------------------


def _rows(case: dict[str, Any], model: EChatModel, tokenizer: Any, feats: dict[int, Tensor]) -> list[RowCase]:
    vocab = model.vocabulary
    output_type = case["output_type"]
    if output_type not in OUTPUTS:
        raise NotUnderstood(f"output type {output_type}")
    out = []
    for n, key in enumerate(case["keys"]):
        current = feats[_number(key)]
        if case.get("feats_lengths") and case["feats_lengths"][n] != len(current):
            raise NotUnderstood(f"{key} has {case['feats_lengths'][n]} frames, its features {len(current)}")
        prompt = case["prompt"][n][: case["prompt_lengths"][n]] if case.get("prompt") else []
        text = case["target"][n][: case["target_lengths"][n]]
        speech = case["speech_tokens"][n][: case["speech_tokens_length"][n]] if case.get("speech_tokens") else []
        turns = [_turn(turn, tokenizer, vocab, feats) for turn in (case.get("history") or [[]] * len(case["keys"]))[n]]
        output = OUTPUTS[output_type]
        turns = turns if output.stream == "s2s" else []  # the published code ignores a history elsewhere
        sample = Sample(
            output_type,
            prompt_ids=tuple(prompt) if output.instruction else (),
            text_ids=tuple(text),
            speech=_codes(speech, vocab.text_size, vocab.speech_codes),
            history=tuple(turn for turn, _ in turns),
        )
        layout = build_layout(sample, tokenizer, vocab)
        choices = [*(candidates for _, candidates in turns), *([[current]] if output.audio else [])]
        row, recordings = _fitting(layout, choices, sum(case["mask"][n]))
        targets = [t for t in row.targets_T.tolist() if t >= 0]
        spoken = [i for i, t in enumerate(targets) if t == vocab.speech_delimiter]
        after_text = output.speech == "after" and output.reply_text
        out.append(
            RowCase(
                row,
                recordings,
                bool(turns),
                case["nll_per_target"][n],
                [t for t in case["target_seq"][n] if t != -100],
                [p for p, m in zip(case["position_ids"][n], case["mask"][n], strict=True) if m],
                spoken[0] if spoken and after_text else None,
            )
        )
    return out


def _fitting(layout: Layout, choices: list[list[Tensor]], positions: int) -> tuple[Row, list[Tensor]]:
    """The row whose recordings make it as long as the recorded one (any, when none does: the comparison will tell)."""
    row, recordings = None, []
    for picked in itertools.product(*choices):
        recordings = list(picked)
        row = flatten(layout.segments, [audio_positions(len(f)) for f in recordings], layout.text_softmax)
        if int(row.visible_T.sum()) == positions:
            break
    assert row is not None
    return row, recordings


def _number(key: str) -> int:
    match = re.fullmatch(r"\D*(\d+)", key)
    if match is None:
        raise NotUnderstood(f"key {key!r}")
    return int(match[1])


def _codes(ids: list[int], text_size: int, codes: int) -> tuple[int, ...]:
    """Codes without delimiters, from ids that may carry the text vocabulary's offset."""
    plain = [i - text_size if i >= text_size else i for i in ids]
    return tuple(i for i in plain if 0 <= i < codes)


_TURN_FIELDS = {
    "speech": re.compile(r"speech|code", re.IGNORECASE),
    "text": re.compile(r"txt|text|label|target|reply|ids", re.IGNORECASE),
    "audio": re.compile(r"wav|feat|audio|mel|utt|key|frame|rec", re.IGNORECASE),
}


def _turn(turn: Any, tokenizer: Any, vocab: Any, feats: dict[int, Tensor]) -> tuple[PastTurn, list[Tensor]]:
    """A recorded past turn and the recordings that it may have held (all, when the record does not say which).

    A turn is a mapping, or a list in the order recording, text, speech. Fields are told by their names; the text is a
    string or ids.
    """
    if isinstance(turn, list):
        turn = dict(zip(("audio", "text", "speech"), turn, strict=False))
    if not isinstance(turn, dict):
        raise NotUnderstood(f"a past turn that is {type(turn).__name__}")
    found: dict[str, list[Any]] = {kind: [] for kind in _TURN_FIELDS}
    for name, value in turn.items():
        kind = next((kind for kind, pattern in _TURN_FIELDS.items() if pattern.search(name)), None)
        if kind is not None and value is not None and not (name.endswith(("length", "lengths", "len")) and kind != "audio"):
            found[kind].append(value)
    if not found["text"]:
        raise NotUnderstood(f"a past turn with the fields {sorted(turn)}")
    text = next((value for value in found["text"] if isinstance(value, list)), found["text"][0])
    ids = encode(tokenizer, text) if isinstance(text, str) else tuple(int(i) for i in text)
    speech = next((value for value in found["speech"] if isinstance(value, list)), [])
    recordings = next((r for r in (_recordings(value, feats) for value in found["audio"]) if r), list(feats.values()))
    return PastTurn(ids, _codes(speech, vocab.text_size, vocab.speech_codes)), recordings


def _recordings(value: Any, feats: dict[int, Tensor]) -> list[Tensor]:
    """The recording that a field names: its number, a key that ends in it, its frames or its shape; empty when it names
    none."""
    if isinstance(value, str) and re.fullmatch(r"\D*\d+", value):
        value = _number(value)
    if isinstance(value, list) and len(value) in (2, 3) and all(isinstance(i, int) for i in value):
        value = value[-2]
    if isinstance(value, int):
        return [feats[value]] if value in feats else [feat for feat in feats.values() if len(feat) == value]
    return []


# ---- comparing -------------------------------------------------------------------------------------------------------


def _forward(model: EChatModel, rows: list[RowCase]) -> tuple[LossParts, Inputs, Tensor]:
    packed = pack([r.row for r in rows])
    feats = [f for r in rows for f in r.feats]
    audio = None
    if feats:
        lengths_N = torch.tensor([len(f) for f in feats])
        audio = model.encode_audio(torch.nn.utils.rnn.pad_sequence(feats, batch_first=True), lengths_N)
    inputs = model.inputs(packed, audio)
    hidden = model.hidden(inputs.embeds_BTD, inputs.positions_BT, inputs.documents_BT, inputs.visible_BT)
    return model(packed, audio=audio), inputs, hidden


def _split(parts: LossParts, count: int) -> list[Tensor]:
    return [parts.nll_M[parts.documents_M == n] for n in range(count)]


def _alone(model: EChatModel, row: RowCase) -> Tensor:
    return _split(_forward(model, [row])[0], 1)[0]


def _largest(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().max()) if a.numel() else 0.0


def _case(
    name: str, case: dict[str, Any], rows: list[RowCase], model: EChatModel, arrays: dict[str, Any]
) -> Iterator[CaseResult]:
    batched = len(rows) > 1
    parts, inputs, hidden_BTD = _forward(model, rows)
    nll = _split(parts, len(rows))
    longest = max((len(f) for r in rows for f in r.feats[-1:]), default=0)
    longest_first_speech = max((r.first_speech or 0) for r in rows)
    mixed = len({r.has_history for r in rows}) > 1
    clean = True
    for n, row in enumerate(rows):
        label = f"{name}[{case['keys'][n]}]" if batched else name
        wanted = torch.tensor(row.nll)
        documents = inputs.documents_BT[n] == n
        found_targets = [t for t in row.row.targets_T.tolist() if t >= 0]
        if found_targets != row.targets:
            wrong = sum(a != b for a, b in zip(found_targets, row.targets, strict=False)) + abs(
                len(found_targets) - len(row.targets)
            )
            yield CaseResult(f"{label}.targets", wrong, 0, f"{len(found_targets)} targets, recorded {len(row.targets)}")
            clean = False
            continue
        odd = batched and any(len(f) % 2 == 1 and len(f) < longest for f in row.feats)
        doubled = mixed and not row.has_history
        if odd or doubled:
            clean = False
            why = "odd frames in a longer batch" if odd else "user header doubled beside a row with history"
            note = f"deliberate: {why}; compared with the row alone (recorded differs by {_largest(nll[n], wanted):.3g})"
            yield CaseResult(f"{label}.nll", _largest(nll[n], _alone(model, row)), LOSS_LIMIT, note)
            continue
        compared = torch.ones(len(wanted), dtype=torch.bool)
        first = row.first_speech
        if batched and first is not None and first < longest_first_speech:
            clean = False
            compared[first] = False
            off = float((nll[n] - wanted)[first])
            error = abs(float((nll[n] - _alone(model, row))[first]))
            note = f"deliberate: recorded from a pad slot, differs by {off:+.3g}; compared with the row alone"
            yield CaseResult(f"{label}.first_speech", error, LOSS_LIMIT, note)
        yield CaseResult(
            f"{label}.nll", _largest(nll[n][compared], wanted[compared]), LOSS_LIMIT, f"{int(compared.sum())} targets"
        )
        visible = inputs.visible_BT[n] & documents
        positions = inputs.positions_BT[n][visible].tolist()
        yield CaseResult(f"{label}.positions", float(positions != row.positions), 0, f"{len(positions)} positions")
        if positions == row.positions:
            yield from _arrays(name, n, label, case, arrays, inputs.embeds_BTD[n][visible], hidden_BTD[n][visible])
    if clean:
        yield CaseResult(f"{name}.loss", abs(float(parts.mean()) - case["loss"]), LOSS_LIMIT, f"loss {float(parts.mean()):.6f}")
    if clean and not batched:
        visible_BT = inputs.visible_BT
        for key, tensor in (("masked_embeds_abs_sum", inputs.embeds_BTD), ("hidden_masked_abs_sum", hidden_BTD)):
            if key in case:
                found = float(tensor[visible_BT].abs().double().sum())
                yield CaseResult(f"{name}.{key}", abs(found - case[key]) / case[key], SUM_LIMIT, "relative")


def _arrays(
    name: str, n: int, label: str, case: dict[str, Any], arrays: dict[str, Any], embeds_TD: Tensor, hidden_TD: Tensor
) -> Iterator[CaseResult]:
    """Recorded embeddings and hidden states of a batch, at its unmasked positions."""
    mask_T = torch.tensor(case["mask"][n], dtype=torch.bool)
    for key, mine in (("inputs_embeds", embeds_TD), ("hidden_last", hidden_TD)):
        recorded = arrays.get(f"{name}.{key}")
        if recorded is not None:
            yield CaseResult(f"{label}.{key}", _largest(mine, torch.from_numpy(recorded[n])[mask_T]), HIDDEN_LIMIT)
