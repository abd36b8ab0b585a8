"""Golden check of the data side: records through the processing, recorded dataset runs, the name filter.

Where the reference draws at random, every outcome that it could have drawn is accepted: the pipeline is run with many
seeds and one outcome must equal the recorded one. Instruction sentences are ours, so of a drawn prompt only its
presence is compared. What differs on purpose is accepted by a rule of `DIFFERENCES` (each has a line in
docs/compatibility.md) and named in the note; all else fails.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from osum_echat.audio import features
from osum_echat.audio import io as audio_io
from osum_echat.audio.resample import resample_sinc
from osum_echat.data import text
from osum_echat.data.config import LimitConfig, ProcessingConfig
from osum_echat.data.label_rules import LABEL_RULES
from osum_echat.data.processing import Processed, Processor, check_limits
from osum_echat.dialogue.dialect import Dialect
from osum_echat.dialogue.record import Record, RecordError
from osum_echat.dialogue.tasks import find_task
from osum_echat.dialogue.think import CLOSE
from osum_echat.dialogue.tokens import decode, encode
from osum_echat.dialogue.vocabulary import Vocabulary
from osum_echat.golden.report import CaseResult, not_understood

ROOT = Path(__file__).resolve().parent.parent.parent
# As the recordings name the three published files.
PROCESSORS = {"processor": LABEL_RULES["language_think"], **LABEL_RULES}
SEEDS = 64  # the rarest draw has probability 0.15: missed once in 30,000 runs
INPUT_FIELDS = {"key", "wav", "sample_rate", "txt", "task", "extra", "history", "speech_token", "start", "end"} | {
    *("lang", "speaker", "emotion", "gender", "duration")
}
RESULT_FIELDS = {
    "task",
    "output_type",
    "label_text",
    "label_ids",
    "n_label",
    "prompt",
    "prompt_ids",
    "n_speech",
    "speech_ends",
} | {*("txt", "messages", "dropped")}
FEATURE_MEAN_LIMIT = 1e-5  # of the mean of a log-mel


@dataclass(frozen=True)
class Outcome:
    """What one run of the pipeline gave: a sample, or the reason why there is none (then fields may be empty)."""

    dropped: str = ""
    task: str = ""
    output_type: str = ""
    label_ids: tuple[int, ...] = ()
    prompt: str = ""
    speech: int = 0


def run(directory: Path) -> list[CaseResult]:
    """Check everything of the data family that is in ``directory``."""
    results: list[CaseResult] = []
    tokenizer = _tokenizer(directory)
    if tokenizer is None:
        return [not_understood("tokenizer", f"no tiny_llm/ in {directory} or tests/data")]
    path = directory / "data_cases.json"
    if path.is_file():
        cases = json.loads(path.read_text(encoding="utf-8"))
        unknown = set(cases) - {"note", "inputs", "results", "datasets"}
        results += [not_understood(f"data_cases.json:{name}", "unknown part") for name in sorted(unknown)]
        results += _check_results(cases, tokenizer)
        for name, recorded in cases.get("datasets", {}).items():
            results += _check_dataset(name, recorded, directory, tokenizer)
    path = directory / "sampling_cases.json"
    if path.is_file():
        for name, recorded in json.loads(path.read_text(encoding="utf-8")).items():
            if "name" in name and "filter" in name:
                results += _check_name_filter(name, recorded)
    return results or [not_understood(str(directory), "neither data_cases.json nor a name filter")]


def _tokenizer(directory: Path) -> Any:
    places = [directory / "tiny_llm", *sorted((ROOT / "tests" / "data").glob("*/tiny_llm"))]
    found = next((place for place in places if (place / "tokenizer_config.json").is_file()), None)
    return _load_tokenizer(found) if found else None


@functools.lru_cache(maxsize=2)
def _load_tokenizer(place: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place)


# Records through the pipeline


def _check_results(cases: Mapping[str, Any], tokenizer: Any) -> Iterator[CaseResult]:
    inputs = {item["key"]: item for item in cases.get("inputs", [])}
    for processor_name, recorded in cases.get("results", {}).items():
        if processor_name not in PROCESSORS:
            yield not_understood(processor_name, f"no such processor; known: {', '.join(PROCESSORS)}")
            continue
        processor = Processor(ProcessingConfig(label_rules=PROCESSORS[processor_name]), tokenizer, Vocabulary(), Dialect())
        outcomes: dict[str, set[Outcome] | CaseResult] = {}
        for name, expected in recorded.items():
            case, key = f"{processor_name}/{name}", name.rpartition("|")[0] or name
            if key not in inputs:
                yield not_understood(case, f"no input with key {key!r}")
                continue
            strange = (set(inputs[key]) - INPUT_FIELDS) | (set(expected) - RESULT_FIELDS)
            if strange:
                yield not_understood(case, f"unknown fields {', '.join(sorted(strange))}")
                continue
            if key not in outcomes:
                try:
                    outcomes[key] = _outcomes(inputs[key], processor)
                except ValueError as error:
                    outcomes[key] = not_understood(case, str(error))
            ours = outcomes[key]
            yield ours if isinstance(ours, CaseResult) else _compare(case, inputs[key], expected, ours, processor)


def _outcomes(item: Mapping[str, Any], processor: Processor) -> set[Outcome]:
    """Every outcome that the seeds bring up."""
    shape, rate = item.get("wav", {}).get("shape", [1, 0]), item.get("sample_rate", audio_io.SAMPLE_RATE)
    data = _record_data(item)
    found = set()
    for seed in range(SEEDS):
        try:
            record = Record.from_dict(data)
            processed = processor(record, random.Random(seed))
        except RecordError as error:
            found.add(Outcome(dropped=error.reason))
            continue
        frames = [n * 100.0 for n in item.get("_past_seconds", [])] + [shape[-1] / rate * 100]
        found.add(_outcome(processed, frames[-len(processed.recordings) :] if processed.recordings else []))
    return found


def _outcome(processed: Processed, frames: list[float]) -> Outcome:
    sample, dropped = processed.sample, ""
    try:
        check_limits(processed, frames, LimitConfig())
    except RecordError as error:
        dropped = error.reason
    speech = len(sample.speech) + 2 if sample.speech else 0
    return Outcome(dropped, processed.task, sample.output_type, sample.text_ids, processed.prompt, speech)


def _record_data(item: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded input as the fields of a record: abbreviations written out, past turns numbered."""
    data = {k: v for k, v in item.items() if k not in ("wav", "sample_rate", "history")}
    data["wav"] = "recording"
    if isinstance(data.get("extra"), str):
        data["extra"] = _json_string(data["extra"])
    if isinstance(data.get("extra"), Mapping):
        data["extra"] = {k: _codes(v) if k.startswith("speech_token") else v for k, v in data["extra"].items()}
    if "speech_token" in data:
        data["speech_token"] = _codes(data["speech_token"])
    for n, turn in enumerate(item.get("history", []), start=1):
        if isinstance(turn, Mapping):
            data |= {f"wav_{n}": "recording" if turn.get("wav") else None, f"txt_{n}": turn.get("txt", "")}
    return data


def _json_string(value: str) -> str:
    """``JSON string of {...}`` as that string; ``[100..399]`` in it is a range."""
    head, sep, body = value.partition("JSON string of ")
    if not sep or head:
        return value
    while (at := body.find("..")) >= 0:
        start, end = body.rfind("[", 0, at), body.find("]", at)
        first, last = int(body[start + 1 : at]), int(body[at + 2 : end])
        body = body[:start] + json.dumps(list(range(first, last + 1))) + body[end + 1 :]
    return body


def _codes(value: Any) -> Any:
    """``range(a,b) repeated to n [as str]`` written out; anything else as it is."""
    if not isinstance(value, str) or not value.startswith("range("):
        return value
    bounds, _, rest = value.removeprefix("range(").partition(")")
    words = rest.split()
    if words[:2] != ["repeated", "to"] or words[3:] not in ([], ["as", "str"]):
        raise ValueError(f"speech tokens written as {value!r}")
    first, last = (int(n) for n in bounds.split(","))
    codes = [first + i % (last - first) for i in range(int(words[2]))]
    return [str(c) for c in codes] if words[3:] else codes


def _compare(
    case: str, item: Mapping[str, Any], expected: Mapping[str, Any], ours: set[Outcome], processor: Processor
) -> CaseResult:
    if any(_equal(item, expected, outcome) for outcome in ours):
        drawn = f", {len(ours)} outcomes possible" if len(ours) > 1 else ""
        what = (
            f"dropped ({expected['dropped']})" if "dropped" in expected else f"{expected['output_type']}, label, prompt, speech"
        )
        return CaseResult(case, 0, 0, what + drawn)
    for note, rule in DIFFERENCES.items():
        if any(rule(item, expected, outcome, processor) for outcome in ours):
            return CaseResult(case, 0, 0, f"deliberate difference: {note}")
    shown = min(ours, key=lambda o: _distance(expected, o))
    return CaseResult(case, 1, 0, f"expected {_short(expected)}, found {shown}")


def _equal(item: Mapping[str, Any], expected: Mapping[str, Any], ours: Outcome) -> bool:
    if "dropped" in expected:
        return bool(ours.dropped)
    return (
        not ours.dropped
        and ours.task == expected["task"]
        and _same_content(item, expected, ours)
        and _same_speech(expected, ours)
    )


def _same_content(item: Mapping[str, Any], expected: Mapping[str, Any], ours: Outcome) -> bool:
    return (
        ours.output_type == expected["output_type"]
        and list(ours.label_ids) == expected["label_ids"]
        and _same_prompt(item, expected, ours)
    )


def _same_prompt(item: Mapping[str, Any], expected: Mapping[str, Any], ours: Outcome) -> bool:
    """A question must be the same; of drawn instructions only the presence can be."""
    extra = item.get("extra")
    if isinstance(extra, Mapping) and "question" in extra:
        return ours.prompt == expected["prompt"]
    return bool(ours.prompt) == bool(expected["prompt"])


def _same_speech(expected: Mapping[str, Any], ours: Outcome) -> bool:
    delimiter = Vocabulary().speech_codes
    ends = expected.get("speech_ends")
    return ours.speech == expected["n_speech"] and (ends is None or ends == [delimiter, delimiter])


Rule = Callable[[Mapping[str, Any], Mapping[str, Any], Outcome, Processor], bool]


def _same_label(expected: Mapping[str, Any], ours: Outcome, processor: Processor) -> bool:
    """The same ids, or the same but for the first tag of a reply of nothing but tags (and its end of turn, when that
    tag is ``<&&>``)."""
    if "label_ids" not in expected:
        return False
    if list(ours.label_ids) == expected["label_ids"]:
        return True
    end = decode(processor.tokenizer, [processor.vocab.eos_id])
    label, theirs = (decode(processor.tokenizer, ids).removesuffix(end) for ids in (ours.label_ids, expected["label_ids"]))
    think, mark, reply = label.rpartition(CLOSE)
    return text.only_tags(reply) and think + mark + text.split_leading_tag(reply)[1] == theirs


def _tags_kept(item: Mapping[str, Any], expected: Mapping[str, Any], ours: Outcome, processor: Processor) -> bool:
    """The reference takes the first tag off a label of nothing but tags; here the label stays whole."""
    same = ours.task == expected.get("task") and bool(ours.dropped) == ("dropped" in expected)
    return same and _same_label(expected, ours, processor) and _same_speech(expected, ours)


def _none_dropped(item: Mapping[str, Any], expected: Mapping[str, Any], ours: Outcome, processor: Processor) -> bool:
    return ours.dropped == "none_label" and any(tag in item.get("txt", "") for tag in text.NONE_TAGS)


def _speech_given(item: Mapping[str, Any], expected: Mapping[str, Any], ours: Outcome, processor: Processor) -> bool:
    """Streaming and multi-turn get their speech here; in the reference they had none and were filtered for it.

    A dialogue with a gap loses its past in both; here it then is the single-turn task.
    """
    kinds = ("speech2text_token_streaming", "speech2text_token_history")
    if expected.get("output_type") not in kinds or expected.get("n_speech") != 0:
        return False
    same = _same_label(expected, ours, processor) and _same_prompt(item, expected, ours)
    gap = any(not isinstance(turn, Mapping) for turn in item.get("history", []))
    kind = "speech2text_token" if gap else expected["output_type"]
    without_codes = ours.dropped == "missing_speech"
    return without_codes or (same and ours.output_type == kind and ours.speech > 0)


def _history_read(item: Mapping[str, Any], expected: Mapping[str, Any], ours: Outcome, processor: Processor) -> bool:
    """Two of the three published copies do not look at past turns; here all do."""
    return (
        bool(item.get("history"))
        and ours.output_type == "speech2text_token_history"
        and expected.get("output_type") == "speech2text_token"
        and _same_label(expected, ours, processor)
    )


def _speech_beside_extra(item: Mapping[str, Any], expected: Mapping[str, Any], ours: Outcome, processor: Processor) -> bool:
    """``speech_token`` beside ``extra`` is read by all."""
    return "speech_token" in item and expected.get("dropped") == "tokenize" and not ours.dropped and ours.speech > 0


def _unused_recording(item: Mapping[str, Any], expected: Mapping[str, Any], ours: Outcome, processor: Processor) -> bool:
    """A recording that the task does not use is not measured."""
    unused = ours.output_type in ("text2token", "text2token_streaming", "text2text")
    return unused and expected.get("dropped") == "filter" and not ours.dropped and _same_label(expected, ours, processor)


def _newline_kept(item: Mapping[str, Any], expected: Mapping[str, Any], ours: Outcome, processor: Processor) -> bool:
    """With style and age labels, the reference goes back to the text in which line ends still stand."""
    if "\n" not in item.get("txt", "") or ours.dropped or "label_ids" not in expected or ours.task != expected["task"]:
        return False
    theirs = decode(processor.tokenizer, expected["label_ids"]).replace("\n", " ")
    return decode(processor.tokenizer, ours.label_ids) == theirs


def _unusable(item: Mapping[str, Any], expected: Mapping[str, Any], ours: Outcome, processor: Processor) -> bool:
    """Fields of a wrong kind, speech codes outside the vocabulary: the reference fails on them or takes them as they
    are."""
    return ours.dropped in ("bad_codes", "bad_field", "bad_extra", "bad_history", "bad_segment")


def _null_think(item: Mapping[str, Any], expected: Mapping[str, Any], ours: Outcome, processor: Processor) -> bool:
    """A think of JSON null is no think; the reference writes the word None."""
    extra = item.get("extra")
    return ours.dropped == "missing_think" and isinstance(extra, Mapping) and extra.get("think_str", "") is None


DIFFERENCES: Mapping[str, Rule] = {
    "a label of tags alone keeps its first tag": _tags_kept,
    "a label with <NONE> is dropped, as was meant": _none_dropped,
    "streaming and multi-turn samples have speech and are kept": _speech_given,
    "past turns are always read": _history_read,
    "a top-level speech_token is always read": _speech_beside_extra,
    "a recording that the task does not use is not measured": _unused_recording,
    "line ends become blanks in every task": _newline_kept,
    "a record with fields that cannot be used is dropped": _unusable,
    "a think of null is no think": _null_think,
}


def _distance(expected: Mapping[str, Any], ours: Outcome) -> int:
    return sum(
        a != b
        for a, b in (
            (ours.task, expected.get("task")),
            (bool(ours.dropped), "dropped" in expected),
            (list(ours.label_ids), expected.get("label_ids")),
            (ours.speech, expected.get("n_speech")),
        )
    )


def _short(expected: Mapping[str, Any]) -> str:
    names = ("dropped", "task", "output_type", "label_text", "prompt", "n_speech")
    return ", ".join(f"{name}={expected[name]!r:.120}" for name in names if name in expected)


# Recorded runs over the published fake data


def _check_dataset(name: str, recorded: Mapping[str, Any], directory: Path, tokenizer: Any) -> Iterator[CaseResult]:
    """A run of a whole list: its records once more through this pipeline if they lie beside the golden files, else the
    recorded fields."""
    processor_name, _, rest = name.partition(".")
    if processor_name not in PROCESSORS or "samples" not in recorded:
        yield not_understood(name, f"expected <{'|'.join(PROCESSORS)}>.<train|test>.<raw|shard|combine> with samples")
        return
    if not recorded["samples"]:
        # The published combine list misspells its task field, so the reference read nothing from it.
        why = f" ({recorded['error']})" if recorded.get("error") else ""
        yield CaseResult(name, 0, 0, f"deliberate difference: the reference read no sample here{why}; this reader does")
        return
    augmented = rest.startswith("train")
    yield from _check_fields(name, recorded, tokenizer)
    raw = directory.parent.parent / "reference_data" / "raw"
    if (raw / "data.list").is_file():
        settings = ProcessingConfig(label_rules=PROCESSORS[processor_name], tag_alone_rate=0.0)
        processor = Processor(settings, tokenizer, Vocabulary(), Dialect(refuse_unlisted=True))
        yield _replay(name, recorded, raw, processor, augmented)


def _check_fields(name: str, recorded: Mapping[str, Any], tokenizer: Any) -> Iterator[CaseResult]:
    """What can be checked from the recorded fields alone: text to ids, delimiters, frame counts."""
    wrong: list[str] = []
    delimiter = Vocabulary().speech_codes
    for sample in recorded["samples"]:
        key = sample.get("key", "?")
        if find_task(sample.get("task", "?")).output_type != sample.get("output_type"):
            wrong.append(f"{key}: output type")
        if "label_text" in sample and list(encode(tokenizer, sample["label_text"])) != sample["label_ids"]:
            wrong.append(f"{key}: label ids")
        if sample.get("prompt_text") and list(encode(tokenizer, sample["prompt_text"])) != sample["prompt_ids"]:
            wrong.append(f"{key}: prompt ids")
        if sample.get("speech_tokens_len") and sample.get("speech_first_last") != [delimiter, delimiter]:
            wrong.append(f"{key}: speech delimiters")
        # In a batch the recorded shape is the padded one, at least as long as the recording.
        frames = features.num_frames(sample["pcm_len"]) if "pcm_len" in sample else None
        if frames is not None and "feat_shape" in sample and sample["feat_shape"][0] < frames:
            wrong.append(f"{key}: {sample['feat_shape'][0]} frames, expected {frames}")
    yield CaseResult(f"{name}/fields", len(wrong), 0, "; ".join(wrong[:3]) or f"{recorded['n']} samples: ids, delimiters, frames")


def _replay(name: str, recorded: Mapping[str, Any], raw: Path, processor: Processor, augmented: bool) -> CaseResult:
    """The list of the run through this pipeline, sample by sample; augmented features are compared by shape only."""
    records = {record.key: record for record in _read_list(raw / "data.list")}
    # Others say which of these they equal.
    full = {sample["hash"]: sample for sample in recorded["samples"] if "hash" in sample}
    log_mel = features.LogMel(80)
    wrong: list[str] = []
    largest = 0.0
    for sample in recorded["samples"]:
        if sample["key"] not in records:
            return not_understood(name, f"no record {sample['key']!r} in {raw.name}/data.list")
        record = records[sample["key"]]
        first = full.get(sample.get("same_as_first", sample.get("hash")))
        if first is None or "label_ids" not in first:
            return not_understood(name, f"{sample['key']!r} has no recorded label")
        label = tuple(first["label_ids"])
        drawn = [processor(record, random.Random(seed)) for seed in range(SEEDS)]
        processed = next((p for p in drawn if p.sample.text_ids == label), drawn[0])
        mel = log_mel(_resampled_as_published(raw / "wav" / Path(str(record.wav)).name))
        checks = {
            "task": processed.task == sample["task"],
            "output type": processed.sample.output_type == sample["output_type"],
            "label": processed.sample.text_ids == label,
            "prompt": list(processed.sample.prompt_ids) == first["prompt_ids"],
            "speech": len(processed.sample.speech) + 2 == sample["speech_tokens_len"],
            "frames": list(mel.shape) == sample["feat_shape"],
        }
        wrong += [f"{sample['key']}: {what}" for what, same in checks.items() if not same]
        if not augmented:
            largest = max(largest, abs(float(mel.double().sum()) - sample["feat_sum"]) / mel.numel())
    if wrong:
        return CaseResult(f"{name}/replay", len(wrong), 0, "; ".join(wrong[:3]))
    lost = f"; of {2 * len(records)} the reference lost the rest at the end of the stream" if augmented else ""
    return CaseResult(f"{name}/replay", largest, FEATURE_MEAN_LIMIT, f"{recorded['n']} samples; error of the mean log-mel{lost}")


def _read_list(path: Path) -> Iterator[Record]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        yield Record.from_json(line, str(path), number)


def _resampled_as_published(path: Path) -> torch.Tensor:
    audio = audio_io.read(path)
    return resample_sinc(torch.from_numpy(audio.mono()), audio.rate, audio_io.SAMPLE_RATE)


# The name filter


def _check_name_filter(name: str, recorded: Any) -> Iterator[CaseResult]:
    """Recorded verdicts ``text -> dropped``, in whatever nesting by processor."""
    cases = list(_verdicts(recorded, "processor"))
    if not cases:
        yield not_understood(f"sampling_cases.json:{name}", "no pairs of a text and a verdict found")
    for processor_name, phrase, dropped in cases:
        names = PROCESSORS[processor_name].names
        ours = text.mentioned_name(phrase, names) is not None
        verdict = "dropped" if dropped else "kept"
        yield CaseResult(f"{name}/{processor_name}/{phrase}", float(ours != dropped), 0, verdict)


def _verdicts(recorded: Any, processor_name: str) -> Iterator[tuple[str, str, bool]]:
    if isinstance(recorded, Mapping):
        phrase = next((recorded[k] for k in ("txt", "text", "input") if isinstance(recorded.get(k), str)), None)
        verdict = next((v for k, v in recorded.items() if isinstance(v, bool) and k not in ("txt", "text")), None)
        if phrase is not None and verdict is not None:
            kept = any(k in recorded for k in ("kept", "keep", "passes"))
            yield processor_name, phrase, verdict != kept
            return
        for key, value in recorded.items():
            if key in PROCESSORS:
                yield from _verdicts(value, key)
            elif isinstance(value, bool):
                yield processor_name, key, value
            else:
                yield from _verdicts(value, processor_name)
    elif isinstance(recorded, list):
        if len(recorded) == 2 and isinstance(recorded[0], str) and isinstance(recorded[1], bool):
            yield processor_name, recorded[0], recorded[1]
            return
        for item in recorded:
            yield from _verdicts(item, processor_name)
