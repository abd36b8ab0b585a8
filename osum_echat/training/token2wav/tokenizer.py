"""Train the speech tokenizer and export it as ``speech_tokenizer_v1.onnx`` (the released contract, `onnx_export.py`).

    python -m osum_echat.training.token2wav.tokenizer --config recipes/mini/conf/token2wav/tokenizer.yaml [key=value ...]

Losses, weighted by config: phones per 20 ms where records carry phone times (a synthesiser gives them for nothing), CTC
over the letters of the text where they do not, and the log-mel (L1). Phones decide what a code means; the log-mel keeps
rhythm and intonation in it.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from osum_echat.audio.features import LogMel
from osum_echat.run.files import write_atomically
from osum_echat.training.token2wav import onnx_export
from osum_echat.training.token2wav.loop import command
from osum_echat.training.token2wav.recipe import Means, PartTraining, Recipe, adamw
from osum_echat.training.token2wav.records import Utterance, pad
from osum_echat.training.token2wav.tokenizer_model import Decoder, Encoder, TokenizerConfig, halved, mask_of

log = logging.getLogger(__name__)
PHONE_HZ = 50


@dataclass(kw_only=True)
class TokenizerTraining(PartTraining):
    """The YAML file of this command."""

    target: Path = Path("exp/token2wav/model/speech_tokenizer_v1.onnx")
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    batch_size: int = 24
    phone_weight: float = 1.0
    ctc_weight: float = 0.3  # only for records without phone times
    mel_weight: float = 1.0
    warp: float = 0.1  # stretch the mel axis by up to this factor: voices that nobody has
    noise: float = 0.03  # added to the input log-mel (its whole range is about 2)
    export_half: bool = True  # store weights as float16 in the ONNX file (computed in float32)


@dataclass
class Symbols:
    """Names of phones and letters; index 0 of the letters is the CTC blank."""

    phones: list[str]
    letters: list[str]

    @classmethod
    def of(cls, utterances: Sequence[Utterance]) -> Symbols:
        phones = sorted({name for u in utterances for name, _ in u.phones})
        counts = Counter(c for u in utterances if not u.phones for c in u.text.lower())
        return cls(phones, ["<blank>", *sorted(c for c, n in counts.items() if n >= 5)])

    def phone_frames(self, utterance: Utterance, frames: int) -> np.ndarray:
        """The phone at each 20 ms frame, -100 (ignored) for unknown phones and after the last one."""
        out = np.full(frames, -100, dtype=np.int64)
        index = {name: i for i, name in enumerate(self.phones)}
        start = 0
        for name, end in utterance.phones:
            stop = min(frames, round(end * PHONE_HZ))
            out[start:stop] = index.get(name, -100)
            start = max(start, stop)
        return out

    def letter_ids(self, utterance: Utterance) -> np.ndarray:
        """The letters of the text, none for a record that has phone times."""
        index = {c: i for i, c in enumerate(self.letters)}
        return np.array([index[c] for c in utterance.text.lower() if c in index] if not utterance.phones else [], dtype=np.int64)


@dataclass
class Item:
    """Features of one utterance: log-mel [T, M] float16 (to keep many in memory), phones [H], letters [L]."""

    mel_TM: np.ndarray
    phones_H: np.ndarray
    letters_L: np.ndarray


@dataclass
class TokenizerBatch:
    """Items as tensors: padded log-mel, its lengths, the phone of each 20 ms frame, and the letters."""

    mel_BTM: Tensor
    lengths_B: Tensor
    phones_BH: Tensor
    letters: list[np.ndarray]


def frames_50(mel_BTM: Tensor) -> Tensor:
    """Log-mel at 50 Hz: means of two frames (the last one alone if their number is odd)."""
    if mel_BTM.shape[1] % 2:
        mel_BTM = torch.cat([mel_BTM, mel_BTM[:, -1:]], dim=1)
    return mel_BTM.unflatten(1, (-1, 2)).mean(2)


def warp_mel(mel_BTM: Tensor, factors_B: Tensor) -> Tensor:
    """Stretch the mel axis of each row by a factor: bin m takes what was at m / factor."""
    bins = mel_BTM.shape[2]
    at_BM = (torch.arange(bins)[None] / factors_B[:, None]).clamp(0, bins - 1).to(mel_BTM.device)
    low_BM = at_BM.floor().long()
    high_BM = (low_BM + 1).clamp(max=bins - 1)
    share_B1M = (at_BM - low_BM)[:, None]
    shape = mel_BTM.shape
    low = mel_BTM.gather(2, low_BM[:, None].expand(shape))
    high = mel_BTM.gather(2, high_BM[:, None].expand(shape))
    return low + (high - low) * share_B1M


class TokenizerRecipe(Recipe[TokenizerTraining, Item]):
    """Encoder and decoder, their losses, measures and export."""

    averaged: tuple[str, ...] = ("encoder", "decoder")

    def __init__(self, cfg: TokenizerTraining) -> None:
        self.log_mel = LogMel(cfg.model.num_mels)
        super().__init__(cfg)
        self.encoder = Encoder(cfg.model)
        self.decoder = Decoder(cfg.model, max(1, len(self.symbols.phones)), len(self.symbols.letters))
        self.modules = nn.ModuleDict({"encoder": self.encoder, "decoder": self.decoder}).to(self.device)
        self.optimizers = {"all": adamw(self.modules.parameters(), cfg.optim)}

    def prepare(self, train: list[Utterance]) -> None:
        self.symbols = Symbols.of(train)
        log.info("%d phones, %d letters", len(self.symbols.phones), len(self.symbols.letters) - 1)

    def features(self, utterance: Utterance) -> Item:
        mel_TM = self.log_mel(utterance.samples_16k()).numpy()
        return Item(
            mel_TM.astype(np.float16),
            self.symbols.phone_frames(utterance, -(-len(mel_TM) // 2)),
            self.symbols.letter_ids(utterance),
        )

    def _batch(self, items: Sequence[Item]) -> TokenizerBatch:
        mel_BTM, lengths_B = pad([i.mel_TM for i in items], multiple=64)
        phones_BH, _ = pad([i.phones_H for i in items], value=-100)
        width = mel_BTM.shape[1] // 2
        phones_BH = np.pad(phones_BH, ((0, 0), (0, width - phones_BH.shape[1])), constant_values=-100)
        return TokenizerBatch(
            torch.from_numpy(mel_BTM).float().to(self.device),
            torch.from_numpy(lengths_B).to(self.device),
            torch.from_numpy(phones_BH).to(self.device),
            [i.letters_L for i in items],
        )

    def train_step(self, step: int) -> dict[str, float]:
        batch = self._batch(self.train.batch(self.batches(step)))
        rng = self.rng(step)
        if self.cfg.warp:
            factors = rng.uniform(1 - self.cfg.warp, 1 + self.cfg.warp, len(batch.mel_BTM))
            batch.mel_BTM = warp_mel(batch.mel_BTM, torch.from_numpy(factors).float())
        noise = torch.from_numpy(rng.standard_normal(batch.mel_BTM.shape, dtype=np.float32)).to(self.device)
        loss, parts = self._losses(batch, batch.mel_BTM + self.cfg.noise * noise)
        return {**parts, "grad": self.update("all", loss)}

    def _losses(self, batch: TokenizerBatch, input_BTM: Tensor) -> tuple[Tensor, dict[str, float]]:
        with self.autocast():
            codes_BQD, _ = self.encoder.fsq(self.encoder.features(input_BTM.transpose(1, 2), batch.lengths_B))
            lengths_B = halved(halved(batch.lengths_B))
            mask_BT1 = mask_of(batch.lengths_B, batch.mel_BTM.shape[1])
            mean_BM = (batch.mel_BTM * mask_BT1).sum(1) / mask_BT1.sum(1)
            phones_BHS, letters_BHS, mel_BHM = self.decoder(codes_BQD, lengths_B, mean_BM)
        parts: dict[str, float] = {}
        mask_BH1 = mask_of(halved(batch.lengths_B), mel_BHM.shape[1])
        error = (mel_BHM - frames_50(batch.mel_BTM)).abs() * mask_BH1
        mel_loss = error.sum() / (mask_BH1.sum() * error.shape[-1])
        loss = self.cfg.mel_weight * mel_loss
        parts["mel"] = float(mel_loss.detach())
        if bool((batch.phones_BH >= 0).any()):
            phone_loss = F.cross_entropy(phones_BHS.flatten(0, 1), batch.phones_BH.flatten(), ignore_index=-100)
            loss = loss + self.cfg.phone_weight * phone_loss
            parts["phone"] = float(phone_loss.detach())
            known = batch.phones_BH >= 0
            parts["phone_accuracy"] = float((phones_BHS.argmax(-1) == batch.phones_BH)[known].float().mean())
        if rows := [i for i, letters in enumerate(batch.letters) if len(letters)]:
            ctc = self._ctc(letters_BHS[rows], [batch.letters[i] for i in rows], halved(batch.lengths_B)[rows])
            loss = loss + self.cfg.ctc_weight * ctc
            parts["ctc"] = float(ctc.detach())
        return loss, parts

    def _ctc(self, logits_BHS: Tensor, letters: list[np.ndarray], lengths_B: Tensor) -> Tensor:
        targets = torch.from_numpy(np.concatenate(letters)).to(self.device)
        target_lengths = torch.tensor([len(x) for x in letters], device=self.device)
        log_probs_HBS = logits_BHS.log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(log_probs_HBS, targets, lengths_B, target_lengths, zero_infinity=True)

    def validate(self) -> dict[str, float]:
        """Losses per record, phone accuracy, and how many codes are in use and how evenly (perplexity)."""
        means = Means()
        used = np.zeros(self.encoder.fsq.size)
        for item in self.valid:
            batch = self._batch([item])
            _, parts = self._losses(batch, batch.mel_BTM)
            means.add(parts)
            indices = self.encoder(batch.mel_BTM.transpose(1, 2), batch.lengths_B)[0, : int(halved(halved(batch.lengths_B))[0])]
            used += np.bincount(indices.cpu().numpy(), minlength=len(used))
        share = used[used > 0] / used.sum()
        return {
            **means.values(),
            "codes_used": float((used > 0).sum()),
            "code_perplexity": float(np.exp(-(share * np.log(share)).sum())),
        }

    def export(self) -> list[Path]:
        onnx_export.export_tokenizer(self.encoder, self.cfg.target, half=self.cfg.export_half)
        symbols = self.cfg.out / "symbols.json"
        text = json.dumps({"phones": self.symbols.phones, "letters": self.symbols.letters}, ensure_ascii=False)
        write_atomically(symbols, lambda path: path.write_text(text, encoding="utf-8"))
        return [self.cfg.target, symbols]


def main(argv: list[str] | None = None) -> int:
    return command(TokenizerTraining, TokenizerRecipe, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
