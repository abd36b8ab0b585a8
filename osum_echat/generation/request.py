"""What is asked of the generator: a prompt, settings, a seed, and a way to stop it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from osum_echat.dialogue.dialect import Dialect
from osum_echat.dialogue.interleave import split_words
from osum_echat.dialogue.layout import Row, flatten
from osum_echat.dialogue.tasks import OUTPUTS, PastTurn, Sample
from osum_echat.dialogue.think import ThinkForm
from osum_echat.dialogue.tokens import Tokenizer, encode
from osum_echat.dialogue.vocabulary import Vocabulary
from osum_echat.generation.cache import KeptCache
from osum_echat.generation.config import GenerationConfig, Mode
from osum_echat.generation.phases import RowState
from osum_echat.generation.transcript import Place, Transcribed
from osum_echat.model.echat import AudioFeatures, EChatModel


class TooLong(ValueError):
    """A request has more positions than there is room for, however long it waits; the message says how many."""


@dataclass
class Request:
    """One row to decode.

    Attributes:
        output_type: kind of sequence, a key of `OUTPUTS`.
        prompt: the flat prompt, up to where the assistant begins.
        heard: the recordings of the prompt, one `AudioFeatures` each, in the order of its audio slots; the current one
            is the last.
        mode: sampling settings and the limit on generated ids.
        seed: of this row's random numbers.
        text_ids: for text to speech: the text to say, without its end.
        words: for text to speech in the word form: the words to say.
        plan: ids to take instead of what would be chosen, by step (0 is the first generated id); for comparisons.
        past: cache of an earlier part of a dialogue; what it has in common with the prompt is not read again.
        keep_cache: hand the cache back in `cache` when the row is done.
        think: form of the think that the prompt asks for (see `build_request`).
        place: where the transcript of the current recording stands in the row's text.
        cancelled: set it to stop the row within one step.
    """

    output_type: str
    prompt: Row
    heard: tuple[AudioFeatures, ...] = ()
    mode: Mode = field(default_factory=Mode)
    seed: int = 0
    text_ids: tuple[int, ...] = ()
    words: tuple[str, ...] = ()
    plan: Mapping[int, int] = field(default_factory=dict)
    past: KeptCache | None = None
    keep_cache: bool = False
    think: ThinkForm | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    cache: KeptCache | None = None
    place: Place | None = None

    @property
    def transcribed(self) -> Transcribed | None:
        """Where the current recording is transcribed, and what the CTC head heard of it; None without a transcript or
        such a head."""
        if self.place is None or not self.heard or self.heard[-1].ctc_log_probs_NPC is None:
            return None
        return Transcribed(self.place, self.heard[-1].ctc_log_probs_NPC[0])

    def cancel(self) -> None:
        self.cancelled.set()

    def state(self, config: GenerationConfig, tokenizer: Tokenizer, vocab: Vocabulary, dialect: Dialect) -> RowState:
        """Where its row begins."""
        form = dialect.speech_form
        return RowState(self.output_type, self.mode.max_new, config, tokenizer, vocab, self.text_ids, self.words, form)


def listen(model: EChatModel, feats: Sequence[Tensor]) -> list[AudioFeatures]:
    """Encode recordings (log-mel [T, F] each) in one batch, one `AudioFeatures` per recording; see
    `encode_recordings`."""
    audio = encode_recordings(model, feats)
    return [] if audio is None else split_audio(audio)


def encode_recordings(model: EChatModel, feats: Sequence[Tensor]) -> AudioFeatures | None:
    """Encode recordings (log-mel [T, F] each) in one batch, joined; None without recordings.

    Raises:
        ValueError: for a recording that the encoder cannot take.
    """
    if not feats:
        return None
    device, dtype = model.device, model.dtype
    lengths_N = torch.tensor([len(f) for f in feats], device=device)
    feats_NTF = torch.nn.utils.rnn.pad_sequence([f.to(device=device, dtype=dtype) for f in feats], batch_first=True)
    with torch.inference_mode():
        return model.encode_audio(feats_NTF, lengths_N)


def split_audio(audio: AudioFeatures) -> list[AudioFeatures]:
    """One `AudioFeatures` per recording."""
    lengths = audio.lengths_N.tolist()
    embeds, visible = audio.embeds_PD.split(lengths), audio.visible_P.split(lengths)
    return [
        AudioFeatures(
            embeds[n],
            audio.lengths_N[n : n + 1],
            visible[n],
            None if audio.tag_embeds_ND is None else audio.tag_embeds_ND[n : n + 1],
            {name: logits[n : n + 1] for name, logits in audio.tag_logits.items()},
            None if audio.ctc_log_probs_NPC is None else audio.ctc_log_probs_NPC[n : n + 1, : lengths[n]],
            None if audio.turn_logits_NC is None else audio.turn_logits_NC[n : n + 1],
        )
        for n in range(len(lengths))
    ]


def join_audio(heard: Sequence[AudioFeatures]) -> AudioFeatures | None:
    """The reverse of `split_audio`, of what the LLM needs; None without recordings."""
    if not heard:
        return None
    tags = [h.tag_embeds_ND for h in heard if h.tag_embeds_ND is not None]
    assert len(tags) in (0, len(heard)), "recordings with and without tag vectors cannot be joined"
    return AudioFeatures(
        torch.cat([h.embeds_PD for h in heard]),
        torch.cat([h.lengths_N for h in heard]),
        torch.cat([h.visible_P for h in heard]),
        torch.cat(tags) if tags else None,
    )


def build_request(
    output_type: str,
    config: GenerationConfig,
    tokenizer: Tokenizer,
    vocab: Vocabulary,
    *,
    prompt_text: str = "",
    say: str = "",
    heard: Sequence[AudioFeatures] = (),
    lengths: Sequence[int] | None = None,
    history: Sequence[PastTurn] = (),
    dialect: Dialect | None = None,
    seed: int = 0,
    greedy: bool = False,
    think: ThinkForm | None = None,
    transcribes: bool = False,
) -> Request:
    """A request of any kind of sequence.

    Args:
        prompt_text: the instruction (understanding) or the question (text2text).
        say: the text to say (text to speech).
        heard: recordings of past turns first, the current one last.
        lengths: positions of the recordings instead, where they are handed to the generator joined with those of other
            requests.
        history: past turns, oldest first.
        dialect: how the model is spoken to (its config's section); default: as the published ones.
        think: ask for a think of this form, where the dialect tells the two forms apart.
        transcribes: the text begins with a transcript of the recording, as the instruction asks.

    Raises:
        ValueError: unknown output type, or what it needs is missing.
    """
    mode = config.mode(output_type)
    output = OUTPUTS[output_type]
    if output.spoken_text and not say.strip():
        raise ValueError("there is no text to say; give at least one word")
    if output_type == "text2text" and not prompt_text.strip():
        raise ValueError("there is no question; give a text to answer")
    text_ids = encode(tokenizer, say) if output.spoken_text else ()
    sample = Sample(
        output_type,
        prompt_ids=encode(tokenizer, prompt_text) if prompt_text else (),
        text_ids=text_ids,
        history=tuple(history),
        think=think,
    )
    lengths = [int(h.lengths_N[0]) for h in heard] if lengths is None else lengths
    if len(lengths) != sample.num_recordings:
        raise ValueError(
            f"{output_type} with {len(history)} past turns takes {sample.num_recordings} recordings, found {len(lengths)}"
        )
    dialect = dialect or Dialect()
    place = Place() if transcribes else None
    if output.think and think == "tag":
        place = Place.in_think(dialect.strings.template(think), tokenizer)
    layout = dialect.layout(sample, tokenizer, vocab, prefix_only=True)
    row = flatten(layout.prefix, lengths, layout.text_softmax)
    return Request(
        output_type,
        row,
        tuple(heard),
        mode.greedy() if greedy else mode,
        seed,
        text_ids=text_ids,
        words=tuple(split_words(say)) if output.spoken_text else (),
        think=think,
        place=place,
    )
