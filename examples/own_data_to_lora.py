"""Recordings of your own into a checkpoint, with LoRA: list, check, train, convert, ask. Mini by default, on any machine.

    python examples/own_data_to_lora.py [FOLDER] [key=value ...]

FOLDER holds pairs of a recording and what is said in it: a.wav and a.txt, b.flac and b.txt ... (without FOLDER: the recordings of the demo).
key=value changes the training, for example max_epochs=20. For the published model see docs/quickstart_training.md.
"""

import json
import subprocess
import sys
from pathlib import Path

AUDIO = {".wav", ".flac", ".ogg", ".mp3", ".opus"}


def records(folder: Path | None) -> list[dict[str, str]]:
    """One record for each recording that has its words beside it."""
    if folder is None:
        demo = Path("assets/demo/demo.jsonl")
        rows = [json.loads(line) for line in demo.read_text(encoding="utf-8").splitlines()]
        return [{"key": row["key"], "wav": str(demo.parent.resolve() / row["wav"]), "txt": row["txt"]} for row in rows]
    pairs = [(wav, wav.with_suffix(".txt")) for wav in sorted(folder.iterdir()) if wav.suffix.lower() in AUDIO]
    return [
        {"key": wav.stem, "wav": str(wav.resolve()), "txt": words.read_text(encoding="utf-8").strip()}
        for wav, words in pairs
        if words.is_file()
    ]


def osum_echat(*arguments: str) -> None:
    print("$ osum-echat", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "osum_echat.cli", *arguments], check=True)


folder, *changes = [None, *sys.argv[1:]] if len(sys.argv) < 2 or "=" in sys.argv[1] else sys.argv[1:]
found = records(Path(folder) if folder else None)
if not found:
    sys.exit(f"{folder} holds no recording with a .txt of the same name beside it")
out = Path("out/own_data")
out.mkdir(parents=True, exist_ok=True)
listed = out / "train.jsonl"
listed.write_text("".join(json.dumps(row | {"task": "<TRANSCRIBE>"}) + "\n" for row in found), encoding="utf-8")

osum_echat("data", "doctor", str(listed), "--out", str(out / "doctor"))
streams = f"data.streams={{mine: {{list: {listed.resolve()}}}}}"
lora = ("lora.rank=8", "lr.lora=1e-3", "lr.adapter=1e-4")
osum_echat("train", "--config", "conf/finetune_mini.yaml", streams, *lora, f"out={out}/run", *changes, "--no-bar")
osum_echat("convert", f"{out}/run", f"{out}/model")
osum_echat("infer", "--checkpoint", f"{out}/model", "--task", "asr", "--wav", found[0]["wav"])
