"""Make the fake data of this folder: a few records for every task, a dialogue of several turns, in all three forms.

The sentences are ours; the voices are a small harmonic synthesiser (two resonances per character), so that recordings differ, are voiced
and last as long as their text, but say nothing. Running it twice gives the same bytes.

    python common_utils/fake_data/make_fake_data.py            # writes raw/, shard/ and combine/ here
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import soundfile

    from osum_echat.data.convert import convert
    from osum_echat.dialogue.tasks import TASKS
except ModuleNotFoundError as error:
    sys.exit(f"the Python package {error.name!r} is missing: run this with the project's environment (make venv makes .venv)")

HERE = Path(__file__).resolve().parent
RATE = 16_000
SECONDS = 1.1
TURN_SECONDS = 0.7
PER_TAR = 20

# What people say, with how they say it, and a reply to it.
SAYINGS: list[dict[str, str]] = [
    {
        "said": "我的自行车又坏在半路上了", "age": "<YOUTH>", "gender": "<FEMALE>", "emotion": "<SAD>", "style": "<口语>", "event": "<sigh>",
        "think": "说话的是一位年轻女性，语气低落，还叹了口气，应该先安慰她，再给出办法。",
        "reply": "别着急，先推到路边吧。", "reply_tag": "<安慰鼓励>",
    },
    {
        "said": "the soup is ready come and taste it", "age": "<ADULT>", "gender": "<MALE>", "emotion": "<HAPPY>", "style": "<对话>",
        "event": "<laugh>", "think": "A grown man invites me with a laugh, so a cheerful answer fits.",
        "reply": "It smells wonderful!", "reply_tag": "<开心>",
    },
    {
        "said": "奶奶说院子里的柿子红了", "age": "<CHILD>", "gender": "<MALE>", "emotion": "<HAPPY>", "style": "<童话故事>", "event": "<laugh>",
        "think": "这是一个高兴的孩子，可以用活泼的语气问问柿子甜不甜。", "reply": "真好呀，尝起来甜吗？", "reply_tag": "<愉悦>",
    },
    {
        "said": "my keys were here a minute ago", "age": "<OLD>", "gender": "<FEMALE>", "emotion": "<SURPRISE>", "style": "<口语>",
        "event": "<cough>", "think": "An old lady is startled and coughs; stay calm and help her search.",
        "reply": "Let us look under the newspaper.", "reply_tag": "<中立>",
    },
    {
        "said": "你们的快递为什么又晚了三天", "age": "<ADULT>", "gender": "<MALE>", "emotion": "<ANGRY>", "style": "<客服>", "event": "<sigh>",
        "think": "客户很生气，应当先道歉，再说明怎样处理。", "reply": "非常抱歉，我马上去查。", "reply_tag": "<抱歉>",
    },
    {
        "said": "今晚的月亮照着安静的小河", "age": "<MIDDLE_AGE>", "gender": "<FEMALE>", "emotion": "<NEUTRAL>", "style": "<诗歌>",
        "event": "<sigh>", "think": "语气平静，像在念诗，可以顺着这份安静回应。", "reply": "听着就让人放松。", "reply_tag": "<中立>",
    },
]  # fmt: skip
DIALOGUE = [
    ("周末想去爬山，你觉得哪天好？", "星期六晴天，更合适。"),
    ("那要带雨衣吗？", "不用，带够水就行。"),
    ("好的，几点出发？", "六点吧，路上人少。"),
]


def synthesize(text: str, seconds: float, pitch: float, path: Path) -> None:
    """A voice-like sound: harmonics of a moving pitch under two resonances that change with each character of ``text``."""
    rng = np.random.default_rng(zlib.crc32(text.encode()))
    time = np.arange(round(seconds * RATE)) / RATE
    glide = pitch * (1 + 0.15 * np.sin(2 * np.pi * time * rng.uniform(1, 3)))
    phase = 2 * np.pi * np.cumsum(glide) / RATE
    character = np.minimum((time / seconds * len(text)).astype(int), len(text) - 1)
    first = rng.uniform(300, 800, len(text))[character]
    second = rng.uniform(900, 2400, len(text))[character]
    sound = np.zeros_like(time)
    for harmonic in range(1, 24):
        hertz = harmonic * glide
        gain = np.exp(-(((hertz - first) / 180) ** 2)) + 0.6 * np.exp(-(((hertz - second) / 250) ** 2)) + 0.02
        sound += gain / harmonic**0.5 * np.sin(harmonic * phase)
    syllables = 0.55 + 0.45 * np.sin(2 * np.pi * time * len(text) / seconds / 2)
    sound = sound * syllables + 0.003 * rng.standard_normal(len(time))
    soundfile.write(path, 0.5 * sound / np.abs(sound).max(), RATE, subtype="PCM_16")


def codes(text: str, ids: int) -> list[int]:
    """As many made-up speech codes as a reply of ``ids`` ids needs at 25 Hz (every task fits, interleaved ones too)."""
    rng = random.Random(text)
    return [rng.randrange(4096) for _ in range(24 + 4 * ids)]


def label(task: str, saying: dict[str, str]) -> str:
    """What the model shall answer for a task that is understanding alone."""
    tags = {"<EMOTION>": "emotion", "<STYLE>": "style", "<CAPTION>": "event", "<GENDER>": "gender", "<AGE>": "age"}
    parts = task.split()
    if task == "<CAPTION> <AUDIO>":
        return f"有人在说话，其间能听到{saying['event'].strip('<>')}的声音。"
    text = ""
    if "<TRANSCRIBE>" in parts:
        text = saying["said"]
        if "<PUNCTUATION>" in parts:
            text = text[0].upper() + text[1:] + ("." if text.isascii() else "。")
        if "<ALIGN>" in parts:
            words = text.split() if text.isascii() else list(text)
            step = SECONDS / len(words)
            text = "".join(f"<{n * step:.2f}>{word}" for n, word in enumerate(words)) + f"<{SECONDS:.2f}>"
        if "<S2TCHAT>" in parts:
            text += f"<开始回答>{saying['reply']}"
    return text + "".join(saying[tags[part]] for part in parts if part in tags)


def records(wav_dir: str) -> list[dict[str, Any]]:
    """Every task string with two sayings, then the dialogues."""
    out = []
    for number, (name, task) in enumerate(TASKS.items()):
        for copy in range(1 if task.output_type == "text" else 2):
            saying = SAYINGS[(number + copy) % len(SAYINGS)]
            wav = f"{wav_dir}/saying_{(number + copy) % len(SAYINGS)}.wav"
            extra: dict[str, Any] = {"dataset": "fake", "age": saying["age"], "gender": saying["gender"]}
            record: dict[str, Any] = {"key": f"fake_{number:02d}_{copy}", "wav": wav, "task": name, "extra": extra}
            if task.output_type == "text":
                record["txt"] = label(name, saying)
            else:
                record["txt"] = saying["reply_tag"] + saying["reply"] if "s2t" in task.output_type else saying["reply"]
                extra |= {"q_txt": saying["said"], "q_emotion": saying["emotion"], "caption": saying["event"]}
                if task.output.think:
                    extra["think_str"] = saying["think"]
                    if task.output.speech != "none":
                        record["txt"] = saying["reply_tag"] + saying["reply"]
                if task.output_type == "text2text":
                    extra["question"] = saying["said"]
                if task.output.speech != "none":
                    extra["speech_token"] = codes(record["key"], len(record["txt"]) + (80 if task.output.think else 0))
            if not task.output.audio:
                del record["wav"]
            out.append(record)
    for number, task_name in enumerate(("<S2TCHAT> <TEXT2TOKEN>", "<S2TCHAT> <TEXT2TOKEN> <HISTORY>", "<S2TCHAT>")):
        past, (question, reply) = DIALOGUE[: 2 - number // 2], DIALOGUE[2 - number // 2]
        record = {"key": f"fake_dialogue_{number}", "wav": f"{wav_dir}/turn_{len(past)}.wav", "txt": reply, "task": task_name}
        extra = {
            "dataset": "fake",
            "age": "<ADULT>",
            "gender": "<MALE>",
            "q_txt": question,
            "speech_token": codes(reply, len(reply)),
        }
        for turn, (_, past_reply) in enumerate(past, start=1):
            record[f"wav_{turn}"] = f"{wav_dir}/turn_{turn - 1}.wav"
            record[f"txt_{turn}"] = past_reply
            extra[f"speech_token_{turn}"] = codes(past_reply, len(past_reply))
        out.append({**record, "extra": extra})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", default=os.path.relpath(HERE), help="folder for raw/, shard/ and combine/ (default: where this script is)"
    )
    out = parser.parse_args().out
    wav_dir = os.path.join(out, "raw", "wav")
    for form in ("raw", "shard", "combine"):
        for path in Path(out, form).glob("*"):
            if path.suffix != ".py":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.makedirs(wav_dir, exist_ok=True)
    for number, saying in enumerate(SAYINGS):
        synthesize(saying["said"], SECONDS, 110 if saying["gender"] == "<MALE>" else 210, Path(wav_dir, f"saying_{number}.wav"))
    for number, (question, _) in enumerate(DIALOGUE):
        synthesize(question, TURN_SECONDS, 120, Path(wav_dir, f"turn_{number}.wav"))
    raw_list = os.path.join(out, "raw", "data.list")
    with open(raw_list, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records(wav_dir))
    shards = convert(raw_list, os.path.join(out, "shard"), "shard", prefix="fake", per_tar=PER_TAR, progress=False)
    combined = convert(shards.path, os.path.join(out, "combine"), "combine", progress=False)
    assert not shards.drops and not combined.drops, (shards.drops, combined.drops)
    for note in [*Path(out).glob("*/.convert.json"), *Path(out).glob("*/.*.job.json")]:
        note.unlink()  # these folders are done; nobody continues the conversion
    print(f"{shards.written} records in {raw_list}, {shards.path} and {combined.path}")


if __name__ == "__main__":
    main()
