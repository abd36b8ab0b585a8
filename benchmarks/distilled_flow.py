#!/usr/bin/env python3
"""Is a distilled flow as good as its teacher, and how much faster: WER and DNSMOS on the same sentences, seconds of flow and token2wav.

    python benchmarks/distilled_flow.py --teacher DIR --student DIR --lists 'codes/*.jsonl' --out sentences.jsonl [--count 500] [--json]
    python benchmarks/distilled_flow.py --student checkpoints/mini/token2wav --speed [--json]

Each sentence of the lists (records with ``txt`` and ``speech_token``, taken evenly from all over them) is said by both directories from the same codes, in the voice of
``speaker.safetensors`` and with the same seed; Whisper base writes both down. Its cost is that of 30 s whatever it hears, so ``--together 8`` lets it hear eight sentences with
pauses between them at once. It sometimes passes over several of them; a group of which either side is heard with fewer than four in five of the words is
heard sentence by sentence, on both sides. DNSMOS hears the first sentence of each such group. What is heard is compared in pairs: the interval is a bootstrap over groups (2,000 draws). A line a
group goes to ``--out``, and a run that was stopped goes on there. A student may be shipped when the interval's upper end is at most +1 (percent of the words, absolute) over
at least 500 sentences, DNSMOS at least -0.05, and the flow four times as fast.

``--speed`` needs no recogniser and no teacher: a step's cost does not depend on the weights, so the teacher is the same network with ten guided steps. ``speedup_flow``
compares encoder and flow, ``speedup_distilled`` all of token2wav; "before" there is also the excitation as it was made before 0.2 (one sine and one noise for each harmonic).
CPU seconds of one thread, in turns, the smallest of the rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import missing_package  # noqa: F401 - first: it says what is missing
import numpy as np
import torch
from common import add_device, cpu_or_wall, device_of
from token2wav import hardware
from torch import Tensor

from osum_echat import device as devices
from osum_echat.audio.resample import resample
from osum_echat.evaluation.dnsmos import Dnsmos
from osum_echat.evaluation.recogniser import RATE, Recogniser
from osum_echat.evaluation.statistics import paired_difference, ratio_interval
from osum_echat.metrics import total_errors
from osum_echat.token2wav import Speaker, Token2Wav
from osum_echat.token2wav.config import SAMPLE_RATE
from osum_echat.token2wav.draws import Draws
from osum_echat.token2wav.streaming import reply_noise
from osum_echat.token2wav.vocoder_stream import vocode
from osum_echat.training.token2wav.records import ListConfig, Utterance, train_and_valid

log = logging.getLogger(__name__)
SIDES = ("teacher", "student")
PAUSE = 0.6
"""Seconds between sentences that the recogniser hears together."""
CODES = (35, 65, 100)
"""Lengths of the replies that are timed: 1.4, 2.6 and 4 s."""


def sentences(lists: Sequence[Path], count: int) -> list[Utterance]:
    """So many records, evenly from all over the lists."""
    config = ListConfig(lists=list(lists), held_out=2, max_records=count)
    return train_and_valid(config, need=("tokens", "text"))[0]


def compare(
    teacher: Path, student: Path, groups: Sequence[Sequence[Utterance]], out: Path, minutes: float, device: torch.device
) -> None:
    """Append a line for each group of sentences that ``out`` does not hold yet, until the time is over."""
    deadline = time.monotonic() + 60 * minutes
    models = {side: Token2Wav.load(folder, device=str(device)) for side, folder in zip(SIDES, (teacher, student), strict=True)}
    voice = Speaker.load(teacher / "speaker.safetensors")
    recogniser, dnsmos = Recogniser.load(), Dnsmos()
    done = {row["keys"][0] for row in rows(out) if row["apart"] or not passed_over(row)}
    pause = np.zeros(int(PAUSE * RATE), dtype=np.float32)
    with out.open("a", encoding="utf-8") as file:
        for group in groups:
            if group[0].key in done:
                continue
            if time.monotonic() > deadline:
                break
            text = " ".join(utterance.text for utterance in group)
            waves = {
                side: [resample(model.synthesize(list(u.tokens), voice)[0], SAMPLE_RATE, RATE) for u in group]
                for side, model in models.items()
            }
            mos = {side: round(dnsmos.overall(waves[side][0]), 4) for side in SIDES}
            row: dict[str, Any] = {"keys": [u.key for u in group], "text": text, "recogniser": recogniser.name}
            for apart in (False, True):
                row["apart"] = apart
                for side in SIDES:
                    together = [np.concatenate([part for wave in waves[side] for part in (wave, pause)])]
                    heard = [recogniser.transcribe(sound) for sound in (waves[side] if apart else together)]
                    errors = total_errors([u.text for u in group] if apart else [text], heard)
                    row[side] = {"heard": " ".join(heard), "errors": errors.errors, "words": errors.units, "dnsmos": mos[side]}
                if len(group) == 1 or not passed_over(row):
                    break
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()


def passed_over(row: dict[str, Any]) -> bool:
    """The recogniser left out more than one word in five on one of the sides."""
    return any(len(row[side]["heard"].split()) < 0.8 * len(row["text"].split()) for side in SIDES)


def rows(out: Path) -> Iterator[dict[str, Any]]:
    """A row for each group: the last of its lines."""
    if out.is_file():
        found = (json.loads(line) for line in out.read_text(encoding="utf-8").splitlines())
        yield from {row["keys"][0]: {"apart": False} | row for row in found}.values()


def quality(out: Path) -> dict[str, Any]:
    """What the lines of ``out`` say, in percent of the words."""
    found = list(rows(out))
    pairs = {side: [(row[side]["errors"], row[side]["words"]) for row in found] for side in SIDES}
    scores = {side: [(row[side]["dnsmos"], 1.0) for row in found] for side in SIDES}
    wer, mos = (paired_difference(values["teacher"], values["student"]) for values in (pairs, scores))
    count = sum(len(row["keys"]) for row in found)
    result: dict[str, Any] = {"sentences": count, "groups": len(found), "recogniser": found[0]["recogniser"]}
    for side in SIDES:
        result[f"wer_{side}"] = round(100 * ratio_interval(*zip(*pairs[side], strict=True)).value, 3)
        result[f"dnsmos_{side}"] = round(ratio_interval(*zip(*scores[side], strict=True)).value, 4)
    result |= {"wer_difference": round(100 * wer.value, 3), "wer_interval": [round(100 * wer.low, 3), round(100 * wer.high, 3)]}
    result |= {"dnsmos_difference": round(mos.value, 4), "dnsmos_interval": [round(mos.low, 4), round(mos.high, 4)]}
    result["passes"] = bool(100 * wer.high <= 1.0 and mos.value >= -0.05 and count >= 500)
    return result


def speed(student: Path, rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds for one reply of each length, summed, before and with the distilled flow."""
    model = Token2Wav.load(student, device=str(device))
    own = model.flow.decoder.config
    guided = dataclasses.replace(own, steps=10, inference_cfg_rate=0.7, distilled=False)
    voice = model.prompt_state(Speaker.load(student / "speaker.safetensors"))
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randint(model.config.flow.vocab_size, (n,), generator=generator) for n in CODES]
    harmonics = model.config.vocoder.nb_harmonics + 1

    def run(solver: Any, noises: int) -> tuple[float, float]:
        model.flow.decoder.config = solver
        flow = whole = 0.0
        for tokens_N in codes:
            begun = cpu_or_wall(device)
            draws = Draws(0, model.config.flow.output_size, noises)
            condition = model.flow.condition(tokens_N, voice.tokens_P, voice.mel_TM, voice.spk_M)
            mel_TM: Tensor = model.flow.solve([condition], [reply_noise(draws, condition)])[0]
            flow += cpu_or_wall(device) - begun
            vocode(model.vocoder, mel_TM, draws)
            whole += cpu_or_wall(device) - begun
        return flow, whole

    sides = {"before": (guided, harmonics), "distilled": (own, model.config.vocoder.source_noises)}
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    with torch.inference_mode(), devices.threads(1):
        for _ in range(rounds):
            for side, arguments in sides.items():
                times[side].append(run(*arguments))
    best = {side: [min(values) for values in zip(*found, strict=True)] for side, found in times.items()}
    seconds = sum(CODES) / 25
    return {
        "steps": own.steps,
        "speedup_flow": round(best["before"][0] / best["distilled"][0], 2),
        "speedup_distilled": round(best["before"][1] / best["distilled"][1], 2),
        "flow_ms": {side: round(1e3 * best[side][0] / len(CODES), 1) for side in sides},
        "token2wav_ms": {side: round(1e3 * best[side][1] / len(CODES), 1) for side in sides},
        "real_time_factor": {side: round(best[side][1] / seconds, 4) for side in sides},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="directory with the guided flow")
    parser.add_argument("--student", type=Path, required=True, help="directory with the distilled flow")
    parser.add_argument("--lists", type=Path, nargs="+", default=[], help="records with txt and speech_token")
    parser.add_argument("--count", type=int, default=500, help="sentences")
    parser.add_argument("--together", type=int, default=1, help="sentences that the recogniser hears at once")
    parser.add_argument("--out", type=Path, help="a line a group; a stopped run goes on with it")
    parser.add_argument("--minutes", type=float, default=9.0, help="end after so long; the same command goes on")
    parser.add_argument("--speed", action="store_true", help="seconds instead of quality")
    parser.add_argument("--rounds", type=int, default=5, help="of --speed")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    add_device(parser)
    args = parser.parse_args(argv)
    device = device_of(args)
    logging.basicConfig(level=logging.WARNING if args.json else logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    if args.speed:
        result = speed(args.student, args.rounds, device)
    elif args.teacher is None or args.out is None or not args.lists:
        parser.error("give --teacher, --lists and --out, or --speed")
    else:
        chosen = sentences(args.lists, args.count)
        groups = [chosen[i : i + args.together] for i in range(0, len(chosen), args.together)]
        compare(args.teacher, args.student, groups, args.out, args.minutes, device)
        result = quality(args.out)
    result |= hardware()
    print(json.dumps(result) if args.json else "\n".join(f"{name:<22} {value}" for name, value in result.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
