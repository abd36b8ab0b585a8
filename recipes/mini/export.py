"""The model as it is shipped: one folder with everything that `EChat.load` needs, small enough for the repository.

    python -m recipes.mini.export --run out/mini/empathy --token2wav out/mini/token2wav/model --out checkpoints/mini

The LLM's and adapter's matrices are stored as 8-bit rows (expanded at load), the flow and vocoder in half precision. The reply voice is a saved
speaker embedding, made of one held-out sentence.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from osum_echat.token2wav.checkpoint import read_weights, vocoder_state
from osum_echat.token2wav.model import Token2Wav
from osum_echat.token2wav.prompt import Speaker
from osum_echat.training.export import export_folder

GENERATION = Path("recipes/mini/conf/generation.yaml")
LIMIT_MB = 48
COPIED = ("cosyvoice.yaml", "spk2info.pt", "speech_tokenizer_v1.onnx", "campplus.onnx")


def half_precision(source: Path, target: Path) -> None:
    """Flow and vocoder as safetensors in half precision, weight norm folded; the rest of a token2wav folder as it is."""
    target.mkdir(parents=True, exist_ok=True)
    for stem in ("flow", "hift"):
        state, _ = read_weights(source, stem)
        if stem == "hift":
            state = vocoder_state(state)
        small = {name: (t.half() if t.is_floating_point() else t).contiguous() for name, t in state.items()}
        save_file(small, target / f"{stem}.safetensors")
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def export(run: Path, token2wav: Path, voice: Path, out: Path, storage: str = "int8") -> float:
    """Write the folder; returns its size in MB. ``voice``: a recording of the reply voice, of which the embedding is kept: a prompt
    before every reply doubles the cost and is understood less well (10 to 11 % of the words misheard, 9 % without; n = 80).

    Raises:
        ValueError: when something is missing or the folder is too large for the repository.
    """
    export_folder(run, out, storage=storage)  # type: ignore[arg-type]
    shutil.copyfile(GENERATION, out / GENERATION.name)
    half_precision(token2wav, out / "token2wav")
    vocoder = Token2Wav.load(out / "token2wav")
    speaker = Speaker.from_embedding(Speaker.from_wav(str(voice), vocoder).embedding)
    speaker.save(out / "token2wav" / "speaker.safetensors")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
    if size > LIMIT_MB:
        raise ValueError(f"{out} has {size:.1f} MB, more than {LIMIT_MB} MB: choose another storage")
    return size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="training folder of the last stage")
    parser.add_argument("--token2wav", type=Path, required=True)
    parser.add_argument("--voice", type=Path, required=True, help="a recording of the reply voice")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--storage", choices=("int8", "float16"), default="int8")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        size = export(arguments.run, arguments.token2wav, arguments.voice, arguments.out, arguments.storage)
    except ValueError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: {size:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
