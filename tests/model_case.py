"""A very small model with every part at odd sizes, and random samples for it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from osum_echat.dialogue.layout import Row, Segment, audio_positions, flatten
from osum_echat.dialogue.packing import pack
from osum_echat.dialogue.vocabulary import Vocabulary
from osum_echat.model.config import AdapterConfig, CtcConfig, EncoderConfig, LlmConfig, ModelConfig
from osum_echat.model.echat import EChatModel, LossParts

VOCABULARY = Vocabulary(text_size=60, eos_id=2, unknown_id=7, speech_codes=20)
LLM = {
    "model_type": "qwen2",
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
CONFIG = ModelConfig(
    encoder=EncoderConfig(mels=8, dim=16, heads=2, ffn=24, layers=3, max_positions=200, dropout=0.0),
    adapter=AdapterConfig(dim=20, heads=2, ffn=28, layers=2, max_positions=60, dropout=0.0),
    llm=LlmConfig(config=LLM),
    vocabulary=VOCABULARY,
)
TAGS = {"gender": ["male", "female"], "age": ["child", "adult", "old"]}
OPTIONS = dataclasses.replace(
    CONFIG, adapter=dataclasses.replace(CONFIG.adapter, encoder_layers=(1, 3), ctc=CtcConfig(gate=0.5), tags=TAGS)
)


def make_model(config: ModelConfig = CONFIG, seed: int = 0) -> EChatModel:
    """A model whose parameters are all away from their initial values (biases, norms and gates too)."""
    torch.manual_seed(seed)
    model = EChatModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def make_feats(frames: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, CONFIG.encoder.mels, generator=generator) for n in frames]


def make_row(frames: list[int], seed: int = 0, speech: bool = True, unknown: bool = False) -> Row:
    """Text, a recording or several, more text, then supervised text (with a masked position) and speech."""
    g = torch.Generator().manual_seed(seed)
    v = VOCABULARY

    def text(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(8, v.text_size, (n,), generator=g).tolist())

    segments = [Segment("system", text(3))]
    for i in range(len(frames)):
        segments += [Segment("audio", (v.audio_begin,)), Segment("audio", audio=i), Segment("audio", (v.audio_end,))]
    segments.append(Segment("header", text(2)))
    answer = (*text(3), v.unknown_id or 0, *text(2), v.eos_id) if unknown else (*text(4), v.eos_id)
    segments.append(Segment("text", answer, supervised=True, masked=(3,) if unknown else ()))
    if speech:
        codes = tuple(v.speech_id(c) for c in torch.randint(0, v.speech_codes, (5,), generator=g).tolist())
        segments.append(Segment("speech", (v.speech_delimiter, *codes, v.speech_delimiter), supervised=True))
    return flatten(segments, [audio_positions(n) for n in frames], text_softmax=not speech)


def run(
    model: EChatModel, rows: list[Row], feats: list[Tensor], plan: list[list[int]] | None = None, **kwargs: object
) -> LossParts:
    """Loss terms of rows whose recordings are ``feats``, in order."""
    packed = pack(rows, plan)
    if not feats:
        return model(packed, **kwargs)
    padded = torch.nn.utils.rnn.pad_sequence(feats, batch_first=True)
    return model(packed, padded, torch.tensor([len(f) for f in feats]), **kwargs)


def by_sample(parts: LossParts, samples: int) -> list[Tensor]:
    return [parts.nll_M[parts.documents_M == n] for n in range(samples)]


def ctc_mean(parts: LossParts) -> torch.Tensor:
    """CTC negative log-likelihood per label."""
    return parts.ctc_nll_N.sum() / parts.ctc_labels_N.sum().clamp(min=1)


def tag_mean(parts: LossParts) -> torch.Tensor:
    """Sum over tag heads of their mean cross-entropy."""
    terms = [parts.tag_nll_N[name].sum() / parts.tag_known_N[name].sum().clamp(min=1) for name in parts.tag_nll_N]
    return torch.stack(terms).sum() if terms else parts.nll_M.new_zeros(())
