"""An encoder between Whisper's and one that was trained further: the mean of their weights.

    python -m recipes.mini.blend --model out/mini/understanding_encoder --whisper out/mini/whisper/whisper-tiny.en --share 0.6 --out out/mini/blended

Training an encoder on synthetic voices makes it forget people; the mean of both encoders keeps most of what each has learnt (Wortsman et al. 2021,
"Robust fine-tuning of zero-shot models", arXiv 2109.01903). Measured with the adapter of 2026-11-28 left as it was, WER of the CTC head in percent:

| share of the trained encoder | 0 | 0.4 | 0.7 | 1 |
|---|---|---|---|---|
| people: Kathleen / LJ (n = 60, 20) | 62.0 / 64.6 | 59.3 / 64.0 | 59.6 / 66.9 | 62.9 / 73.1 |
| grammar / hand-written / new voices (n = 60 each) | 16.2 / 39.2 / 30.5 | 7.2 / 25.8 / 21.2 | 5.5 / 23.7 / 18.2 | 5.7 / 25.2 / 20.4 |
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from osum_echat.model import checkpoint as model_io
from osum_echat.training.folder import is_training_folder
from osum_echat.training.weights import load_run, put_whisper


def blend(model: Path, whisper: Path, share: float, out: Path) -> Path:
    """Write ``model`` (a checkpoint folder or a training run) with ``share`` of its encoder and the rest of Whisper's.

    Raises:
        ValueError: for a share outside [0, 1], or a Whisper that does not fit.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be within 0 and 1, found {share}")
    own, tokenizer = load_run(model) if is_training_folder(model) else model_io.load_model(model)
    own.float()
    trained = {name: tensor.clone() for name, tensor in own.encoder.state_dict().items()}
    put_whisper(own, str(whisper))
    with torch.no_grad():
        for name, tensor in own.encoder.state_dict().items():
            tensor.lerp_(trained[name], share)
    return model_io.save_model(own, tokenizer, out, "float16")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder or training run")
    parser.add_argument("--whisper", type=Path, required=True, help="any published form of the encoder's Whisper")
    parser.add_argument("--share", type=float, default=0.6, help="of the trained encoder")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        print(blend(arguments.model, arguments.whisper, arguments.share, arguments.out))
    except ValueError as error:
        print(f"blend: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
