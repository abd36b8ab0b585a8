"""Draw offline and streamed synthesis of the same tokens beside each other: mel, waveform, and their difference, seams
marked.

    osum-echat draw-streaming --token2wav DIR --speaker voice.safetensors --tokens tokens.json --output streaming.png

``--speaker`` is a saved speaker or a recording; ``--tokens`` a JSON list of ids (or "random:200:0" for 200 random ones
of seed 0).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from osum_echat.audio.features import mel_22k
from osum_echat.token2wav import Speaker, Token2Wav


def read_tokens(text: str, vocab_size: int) -> list[int]:
    """Ids from a JSON file or a ``random:COUNT:SEED`` description."""
    kind, _, rest = text.partition(":")
    if kind == "random":
        count, _, seed = rest.partition(":")
        return np.random.default_rng(int(seed or 0)).integers(0, vocab_size, int(count)).tolist()
    ids = json.loads(Path(text).read_text(encoding="utf-8"))
    if not isinstance(ids, list):
        raise ValueError(f"{text}: expected a JSON list of ids")
    return ids


def draw(model: Token2Wav, speaker: Speaker, tokens: list[int], output: Path, seed: int = 0) -> None:
    """Synthesize both ways and write one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    offline, rate = model.synthesize(tokens, speaker, seed=seed)
    chunks = list(model.stream(tokens, speaker, seed=seed))
    streamed = np.concatenate(chunks)
    seams = np.cumsum([len(chunk) for chunk in chunks])[:-1] / rate
    figure, axes = pyplot.subplots(5, 1, figsize=(14, 13), sharex=True, constrained_layout=True)
    end = len(offline) / rate
    mels = [mel_22k(wave).T.numpy() for wave in (offline, streamed)]
    low, high = float(np.percentile(mels[0], 2)), float(mels[0].max())
    for axis, mel, name in zip(axes[:2], mels, ("offline", "streamed"), strict=True):
        image = axis.imshow(mel, origin="lower", aspect="auto", extent=(0, end, 0, mel.shape[0]), vmin=low, vmax=high)
        axis.set_ylabel(f"{name}: mel bin")
    figure.colorbar(image, ax=axes[:2], label="log mel")
    difference = np.abs(mels[1] - mels[0])
    image = axes[2].imshow(difference, origin="lower", aspect="auto", extent=(0, end, 0, len(difference)), cmap="magma", vmin=0)
    axes[2].set_ylabel("|difference|")
    figure.colorbar(image, ax=axes[2])
    times = np.arange(len(offline)) / rate
    for axis, wave, name in zip(axes[3:], (offline, streamed), ("offline", "streamed"), strict=True):
        axis.plot(times, wave, linewidth=0.4)
        axis.set_ylabel(name)
    for axis in axes:
        for seam in seams:
            axis.axvline(seam, color="red", linewidth=0.7, linestyle=":")
    axes[-1].set_xlabel("seconds (dotted: chunk ends)")
    figure.suptitle(f"{len(tokens)} tokens, {len(chunks)} chunks; mean |mel difference| {difference.mean():.3f}")
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--token2wav", type=Path, required=True, help="a token2wav directory")
    parser.add_argument("--speaker", required=True, help="a saved speaker (.safetensors) or a recording of 1 to 30 s")
    parser.add_argument("--tokens", default="random:200:0", help="JSON file of ids, or random:COUNT:SEED")
    parser.add_argument("--output", type=Path, default=Path("streaming.png"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        model = Token2Wav.load(args.token2wav)
        saved = args.speaker.endswith(".safetensors")
        speaker = Speaker.load(args.speaker) if saved else Speaker.from_wav(args.speaker, model)
        draw(model, speaker, read_tokens(args.tokens, model.config.flow.vocab_size), args.output, args.seed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.output}")
    return 0
