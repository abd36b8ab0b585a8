"""The model: audio in, one vocabulary of text and speech out.

`EChatModel` joins encoder, adapter, projection and `speech_lm.SpeechLM`. Training calls `forward` on packed rows and gets one loss term a
target; generation calls `encode_audio`, `inputs`, `hidden` and the two heads. All samples of a batch, whatever their tasks, go through the LLM
together, and logits exist at supervised positions only (`loss.py`).

B batch rows, T positions, D LLM width, N recordings, M supervised positions, P audio positions (of all recordings, one after another),
F mel bins, S encoder frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osum_echat.dialogue.layout import IGNORE, MASKED_POSITION, audio_positions
from osum_echat.dialogue.packing import PAD_DOCUMENT, PackedRows
from osum_echat.model.adapter import Adapter
from osum_echat.model.blocks import valid_frames
from osum_echat.model.config import ModelConfig
from osum_echat.model.ctc import CtcBridge
from osum_echat.model.encoder import AudioEncoder
from osum_echat.model.encoder_cache import EncoderCache
from osum_echat.model.encoder_masks import EncoderMasks
from osum_echat.model.loss import linear_nll
from osum_echat.model.speech_lm import SpeechLM
from osum_echat.model.tags import TagHeads

_SILENT_FRAMES = 8  # one LLM position


@dataclass
class AudioFeatures:
    """Recordings as the LLM hears them.

    Attributes:
        embeds_PD: embeddings of all valid positions, recording after recording.
        lengths_N: positions of each recording (they sum to P).
        visible_P: False where CTC compression hides a position.
        tag_embeds_ND: what is added to the markers around each recording, None without tag heads.
        tag_logits: logits [N, labels] of each tag head.
        ctc_log_probs_NPC: CTC log-probabilities, padded [N, longest, C], None without a CTC head.
    """

    embeds_PD: Tensor
    lengths_N: Tensor
    visible_P: Tensor
    tag_embeds_ND: Tensor | None = None
    tag_logits: dict[str, Tensor] = field(default_factory=dict)
    ctc_log_probs_NPC: Tensor | None = None


@dataclass
class Inputs:
    """Packed rows, ready for `EChatModel.hidden`: embeddings [B, T, D], positions, documents and visibility [B, T]."""

    embeds_BTD: Tensor
    positions_BT: Tensor
    documents_BT: Tensor
    visible_BT: Tensor


@dataclass
class LossParts:
    """Loss terms of a batch, one a target, for the caller to weight and add.

    Attributes:
        nll_M: negative log-likelihood of each target, float32; carries gradients.
        targets_M: the target classes.
        documents_M: the sample that each target belongs to.
        ctc_nll_N, ctc_labels_N: CTC negative log-likelihood and number of labels of each recording (empty without CTC or transcripts).
        tag_nll_N: cross-entropy of each tag head, 0 where the label is unknown; ``tag_known_N`` says where it is known.
    """

    nll_M: Tensor
    targets_M: Tensor
    documents_M: Tensor
    ctc_nll_N: Tensor
    ctc_labels_N: Tensor
    tag_nll_N: dict[str, Tensor] = field(default_factory=dict)
    tag_known_N: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_targets(self) -> int:
        return len(self.nll_M)

    def mean(self) -> Tensor:
        """Mean negative log-likelihood over the targets of this batch (0 when it has none)."""
        return self.nll_M.sum() / max(self.num_targets, 1)


class EChatModel(nn.Module):
    """Encoder, adapter, projection, LLM with speech table and head. See `ModelConfig` for sizes and options."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = config.vocabulary
        recompute = config.activation_checkpointing
        self.encoder = AudioEncoder(config.encoder, recompute)
        self.adapter = Adapter(config.adapter, config.encoder.dim, recompute)
        self.lm = SpeechLM(config.llm, config.vocabulary, recompute)
        self.projection = nn.Linear(config.adapter.dim, self.lm.width)
        ctc, tags = config.adapter.ctc, config.adapter.tags
        self.ctc = CtcBridge(ctc, config.adapter.dim, self.lm.width, config.vocabulary.text_size) if ctc is not None else None
        scale = getattr(self.lm.llm.config, "initializer_range", 0.02)
        self.tags = TagHeads(tags, config.adapter.dim, self.lm.width, scale) if tags else None
        self.encoder_cache: EncoderCache | None = None  # for training with a frozen encoder; set from outside
        self.encoder_masks: EncoderMasks | None = None  # for training; set from outside
        if config.lora is not None:
            from osum_echat.model.lora import add_lora

            add_lora(self.lm.llm, config.lora)

    @property
    def device(self) -> torch.device:
        return self.projection.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.projection.weight.dtype

    # ---- audio --------------------------------------------------------------------------------------------------------------------

    def encode(self, feats_NTF: Tensor, lengths_N: Tensor) -> tuple[list[Tensor], Tensor]:
        """The encoder layers that the adapter sees, each [N, S, E], and their lengths. Constant while the encoder is frozen: can be kept."""
        if self.encoder_cache is not None:
            return self.encoder_cache(self.encoder, feats_NTF, lengths_N)
        return self.encoder(feats_NTF, lengths_N, self.config.encoder_layers)

    def adapt(self, layers: list[Tensor], lengths_N: Tensor) -> AudioFeatures:
        """From what `encode` returned to what the LLM hears."""
        if self.encoder_masks is not None and self.training:
            layers = self.encoder_masks(layers, lengths_N)
        adapted_NPA, down_NPA, lengths_N = self.adapter(layers, lengths_N)
        embeds_NPD = self.projection(adapted_NPA)
        valid_NP = valid_frames(lengths_N, embeds_NPD.shape[1])
        visible_NP, log_probs_NPC = valid_NP, None
        if self.ctc is not None:
            table_VD = self.lm.llm.get_input_embeddings().weight
            embeds_NPD, visible_NP, log_probs_NPC = self.ctc(adapted_NPA, embeds_NPD, lengths_N, table_VD)
        tag_logits, tag_embeds_ND = self.tags(down_NPA, lengths_N) if self.tags is not None else ({}, None)
        return AudioFeatures(embeds_NPD[valid_NP], lengths_N, visible_NP[valid_NP], tag_embeds_ND, tag_logits, log_probs_NPC)

    def encode_audio(self, feats_NTF: Tensor, lengths_N: Tensor) -> AudioFeatures:
        """Log-mel features [N, T, F] with their numbers of frames to what the LLM hears (ceil(frames / 8) positions each).

        Raises:
            ValueError: for an empty recording, one that is too long, or another number of mel bins.
        """
        if feats_NTF.shape[2] != self.config.encoder.mels:
            raise ValueError(f"features have {feats_NTF.shape[2]} mel bins, this checkpoint takes {self.config.encoder.mels}")
        if len(lengths_N) and int(lengths_N.min()) < 1:
            raise ValueError("a recording without a single frame (10 ms) cannot be encoded; leave it out")
        return self.adapt(*self.encode(feats_NTF, lengths_N))

    # ---- language model -----------------------------------------------------------------------------------------------------------

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Embeddings of unified ids, [B, T] to [B, T, D]."""
        return self.lm.embed(ids_BT)

    def inputs(self, rows: PackedRows, audio: AudioFeatures | None = None) -> Inputs:
        """Embeddings of packed rows with their audio put in; hidden audio positions take no position number.

        Raises:
            ValueError: when rows and recordings do not fit together.
        """
        expected = int(rows.audio_index_BT.max()) + 1 if rows.audio_index_BT.numel() else 0
        found = 0 if audio is None else len(audio.embeds_PD)
        if expected != found:
            raise ValueError(
                f"the rows have {expected} audio positions, the recordings {found}; lay out with `layout.audio_positions`"
            )
        embeds_BTD = self.embed(rows.ids_BT)
        positions_BT, visible_BT = rows.positions_BT, rows.visible_BT
        if audio is not None:
            where = torch.nonzero(rows.audio_index_BT >= 0, as_tuple=True)
            index = rows.audio_index_BT[where]
            embeds_BTD = embeds_BTD.index_put(where, audio.embeds_PD[index].to(embeds_BTD.dtype))
            if audio.tag_embeds_ND is not None:
                embeds_BTD = embeds_BTD + self._marker_tags(rows, audio).to(embeds_BTD.dtype)
            if not bool(audio.visible_P.all()):
                visible_BT = visible_BT.index_put(where, audio.visible_P[index])
                positions_BT = renumber(rows.documents_BT, visible_BT)
        return Inputs(embeds_BTD, positions_BT, rows.documents_BT, visible_BT)

    def hidden(
        self,
        inputs_BTD: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        visible_BT: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states after the final norm; see `SpeechLM.hidden` (``cache=`` and ``attention_mask=`` for generation)."""
        return self.lm.hidden(inputs_BTD, positions_BT, documents_BT, visible_BT, **kwargs)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., V]."""
        return self.lm.text_logits(hidden)

    def speech_logits(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., S + 1]; class s is speech code s, the last is the delimiter."""
        return self.lm.speech_logits(hidden)

    # ---- loss ---------------------------------------------------------------------------------------------------------------------

    def forward(
        self,
        rows: PackedRows,
        feats_NTF: Tensor | None = None,
        lengths_N: Tensor | None = None,
        *,
        encoded: tuple[list[Tensor], Tensor] | None = None,
        audio: AudioFeatures | None = None,
        transcripts: Sequence[Tensor] | None = None,
        tags: Mapping[str, Tensor] | None = None,
        weights_D: Tensor | None = None,
        run_all_parts: bool = False,
        language: bool = True,
    ) -> LossParts:
        """Loss terms of a batch.

        Args:
            rows: packed samples.
            feats_NTF, lengths_N: log-mel features of the recordings and their frames.
            encoded: instead of features: what `encode` returned. ``audio``: instead of both: what `adapt` returned.
            transcripts: text ids of each recording for CTC, empty where unknown.
            tags: label number of each recording for each tag head, `IGNORE` where unknown.
            weights_D: how the caller is going to weight each sample's targets, where it knows; saves work in the backward pass.
            run_all_parts: let a batch without recordings or speech run encoder, adapter and speech head all the same, with no effect on the
                loss: ranks that share parameters must make the same calls.
            language: False leaves the LLM out; only the losses of the CTC and tag heads remain.
        """
        touched: list[Tensor] = []
        if audio is None and encoded is not None:
            audio = self.adapt(*encoded)
        elif audio is None and feats_NTF is not None and lengths_N is not None and len(lengths_N):
            audio = self.encode_audio(feats_NTF, lengths_N)
        if audio is None and run_all_parts:
            touched += self._run_audio_on_silence(rows.ids_BT.device)
        if not language:
            none = torch.zeros(0, dtype=torch.long, device=self.device)
            no_nll = torch.zeros(0, device=self.device)
            return LossParts(no_nll, none, none, *self._ctc_loss(audio, transcripts, no_nll), *self._tag_loss(audio, tags))
        inputs = self.inputs(rows, audio)
        if touched:
            inputs.embeds_BTD = inputs.embeds_BTD + 0.0 * torch.stack(touched).sum().to(inputs.embeds_BTD.dtype)
        hidden_BTD = self.hidden(inputs.embeds_BTD, inputs.positions_BT, inputs.documents_BT, inputs.visible_BT)
        supervised = torch.nonzero(rows.targets_BT != IGNORE, as_tuple=True)
        text_M, documents_M = rows.text_softmax_BT[supervised], rows.documents_BT[supervised]
        heads = [self.lm.text_head, self.lm.speech_head]
        if bool(text_M.all()) and not run_all_parts:
            heads.pop()  # tasks without speech are scored over the text classes, the others over text and speech together
        weights_M = None if weights_D is None else weights_D[documents_M]
        nll_M = linear_nll(hidden_BTD[supervised], rows.targets_BT[supervised], heads, text_M, weights_M)
        ctc_nll_N, ctc_labels_N = self._ctc_loss(audio, transcripts, nll_M)
        tag_nll_N, tag_known_N = self._tag_loss(audio, tags)
        return LossParts(
            nll_M,
            rows.targets_BT[supervised],
            documents_M,
            ctc_nll_N,
            ctc_labels_N,
            tag_nll_N,
            tag_known_N,
        )

    def _ctc_loss(self, audio: AudioFeatures | None, transcripts: Sequence[Tensor] | None, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.ctc is None or audio is None or audio.ctc_log_probs_NPC is None or transcripts is None:
            return like.new_zeros(0), torch.zeros(0, dtype=torch.long, device=like.device)
        return self.ctc.loss(audio.ctc_log_probs_NPC, audio.lengths_N, transcripts)

    def _tag_loss(
        self, audio: AudioFeatures | None, tags: Mapping[str, Tensor] | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        logits = audio.tag_logits if audio is not None and tags is not None else {}
        labels = {name: (tags or {})[name].to(self.device) for name in logits if name in (tags or {})}
        nll = {name: F.cross_entropy(logits[name], labels[name], ignore_index=IGNORE, reduction="none") for name in labels}
        return nll, {name: label_N != IGNORE for name, label_N in labels.items()}

    def _run_audio_on_silence(self, device: torch.device) -> list[Tensor]:
        """Run the audio parts on one silent position; the sums of what came out, for a graph that reaches all their parameters."""
        feats_NTF = torch.zeros(1, _SILENT_FRAMES, self.config.encoder.mels, device=device)
        audio = self.encode_audio(feats_NTF, torch.full((1,), _SILENT_FRAMES, device=device))
        assert len(audio.embeds_PD) == audio_positions(_SILENT_FRAMES)
        outputs = [audio.embeds_PD, audio.tag_embeds_ND, audio.ctc_log_probs_NPC, *audio.tag_logits.values()]
        return [tensor.float().sum() for tensor in outputs if tensor is not None]

    def _marker_tags(self, rows: PackedRows, audio: AudioFeatures) -> Tensor:
        """Tag vectors at the audio-begin marker before and the audio-end marker after each recording, zero elsewhere: [B, T, D]."""
        assert audio.tag_embeds_ND is not None
        device = rows.ids_BT.device
        recording_P = torch.repeat_interleave(torch.arange(len(audio.lengths_N), device=device), audio.lengths_N.to(device))
        index_BT = rows.audio_index_BT
        recording_BT = torch.where(index_BT >= 0, recording_P[index_BT.clamp(min=0)], -1)
        after_BT = F.pad(recording_BT[:, 1:], (0, 1), value=-1)
        before_BT = F.pad(recording_BT[:, :-1], (1, 0), value=-1)
        marker_BT = torch.where(rows.ids_BT == self.vocabulary.audio_begin, after_BT, -1)
        marker_BT = torch.where(rows.ids_BT == self.vocabulary.audio_end, before_BT, marker_BT)
        return torch.where((marker_BT >= 0)[..., None], audio.tag_embeds_ND[marker_BT.clamp(min=0)], 0.0)


def renumber(documents_BT: Tensor, visible_BT: Tensor) -> Tensor:
    """Position numbers of packed rows: visible positions count from 0 in each document, hidden ones get `MASKED_POSITION`, padding 0."""
    total_BT = visible_BT.long().cumsum(dim=1)
    first_BT = documents_BT != F.pad(documents_BT[:, :-1], (1, 0), value=PAD_DOCUMENT - 1)
    before_BT = torch.where(first_BT, total_BT - visible_BT.long(), 0).cummax(dim=1).values
    positions_BT = torch.where(visible_BT, total_BT - before_BT - 1, MASKED_POSITION)
    return torch.where(documents_BT == PAD_DOCUMENT, 0, positions_BT)
