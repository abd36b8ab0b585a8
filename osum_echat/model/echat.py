"""The model: audio in, one vocabulary of text and speech out.

`EChatModel` joins encoder, adapter, projection and `speech_lm.SpeechLM`. Training calls `forward` on packed rows and
gets one loss term a target; generation calls `encode_audio`, `inputs`, `hidden` and the two heads. All samples of a
batch, whatever their tasks, go through the LLM together, and logits exist at supervised positions only (`loss.py`).

B batch rows, T positions, D LLM width, N recordings, M supervised positions, P audio positions (of all recordings, one
after another), F mel bins, S encoder frames.
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
from osum_echat.model.blocks import EndToEnd, valid_frames
from osum_echat.model.config import DOWN_SAMPLE_RATE, ModelConfig
from osum_echat.model.ctc import CtcBridge, Transcripts
from osum_echat.model.encoder import AudioEncoder
from osum_echat.model.encoder_cache import EncoderCache
from osum_echat.model.encoder_masks import EncoderMasks
from osum_echat.model.loss import linear_nll
from osum_echat.model.plan import Plan, RecordingPlan, RowPlan
from osum_echat.model.speech_lm import SpeechLM
from osum_echat.model.tags import TagHeads
from osum_echat.model.turn import TurnHead
from osum_echat.rates import FRAMES_PER_POSITION

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
        turn_logits_NC: logits of where the turn stands, None without a turn head.
    """

    embeds_PD: Tensor
    lengths_N: Tensor
    visible_P: Tensor
    tag_embeds_ND: Tensor | None = None
    tag_logits: dict[str, Tensor] = field(default_factory=dict)
    ctc_log_probs_NPC: Tensor | None = None
    turn_logits_NC: Tensor | None = None


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
        ctc_nll_N, ctc_labels_N: CTC negative log-likelihood and number of labels of each recording (empty without CTC
            or transcripts).
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
        width = config.encoder.dim * len(config.encoder_layers)
        self.turn = TurnHead(width, config.adapter.turn) if config.adapter.turn else None
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

    # ---- audio -------------------------------------------------------------------------------------------------------

    def encode(self, feats_NTF: Tensor, lengths_N: Tensor, rows: EndToEnd | None = None) -> tuple[list[Tensor], Tensor]:
        """The encoder layers that the adapter sees, each [N, S, E], and their lengths. Constant while the encoder is
        frozen: can be kept."""
        if self.encoder_cache is not None:
            return self.encoder_cache(self.encoder, feats_NTF, lengths_N)
        return self.encoder(feats_NTF, lengths_N, self.config.encoder_layers, rows)

    def adapt(self, layers: list[Tensor], lengths_N: Tensor, rows: EndToEnd | None = None) -> AudioFeatures:
        """From what `encode` returned to what the LLM hears. ``rows``: of the adapter's positions, else worked out from
        the lengths."""
        if self.encoder_masks is not None and self.training:
            layers = self.encoder_masks(layers, lengths_N)
        if rows is None:
            frames = -(-layers[0].shape[1] // DOWN_SAMPLE_RATE)
            rows = EndToEnd.of([-(-n // DOWN_SAMPLE_RATE) for n in lengths_N.tolist()], frames).to(lengths_N.device)
        adapted_NPA, down_NPA, lengths_N = self.adapter(layers, lengths_N, rows)
        embeds_NPD = self.projection(adapted_NPA)
        visible_NP, log_probs_NPC = valid_frames(lengths_N, embeds_NPD.shape[1]), None
        if self.ctc is not None:
            table_VD = self.lm.llm.get_input_embeddings().weight
            embeds_NPD, visible_NP, log_probs_NPC = self.ctc(adapted_NPA, embeds_NPD, lengths_N, table_VD)
        tag_logits, tag_embeds_ND = self.tags(down_NPA, lengths_N) if self.tags is not None else ({}, None)
        heard = (rows.valid(embeds_NPD), lengths_N, rows.valid(visible_NP))
        return AudioFeatures(*heard, tag_embeds_ND, tag_logits, log_probs_NPC)

    def encode_audio(self, feats_NTF: Tensor, lengths_N: Tensor, plan: RecordingPlan | None = None) -> AudioFeatures:
        """Log-mel features [N, T, F] with their numbers of frames to what the LLM hears (ceil(frames / 8) positions
        each).

        ``plan``: of the recordings, on their device; without one the lengths are read to the host.

        Raises:
            ValueError: for an empty recording, one that is too long, or another number of mel bins.
        """
        if feats_NTF.shape[2] != self.config.encoder.mels:
            raise ValueError(f"features have {feats_NTF.shape[2]} mel bins, this checkpoint takes {self.config.encoder.mels}")
        plan = plan or RecordingPlan.of(lengths_N.tolist(), feats_NTF.shape[1]).to(feats_NTF.device)
        layers, lengths_N = self.encode(feats_NTF, lengths_N, plan.encoder)
        heard = self.adapt(layers, lengths_N, plan.adapter)
        if self.turn is not None and not self.training:
            heard.turn_logits_NC = self.turn(layers, lengths_N)
        return heard

    # ---- language model ----------------------------------------------------------------------------------------------

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Embeddings of unified ids, [B, T] to [B, T, D]."""
        return self.lm.embed(ids_BT)

    def inputs(self, rows: PackedRows, audio: AudioFeatures | None = None) -> Inputs:
        """Embeddings of packed rows with their audio put in; hidden audio positions take no position number.

        Raises:
            ValueError: when rows and recordings do not fit together.
        """
        _check_audio(int(rows.audio_index_BT.max()) + 1 if rows.audio_index_BT.numel() else 0, audio)
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
        """Hidden states after the final norm; see `SpeechLM.hidden` (``cache=`` and ``attention_mask=`` for
        generation)."""
        return self.lm.hidden(inputs_BTD, positions_BT, documents_BT, visible_BT, **kwargs)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., V]."""
        return self.lm.text_logits(hidden)

    def speech_logits(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., S + 1]; class s is speech code s, the last is the delimiter."""
        return self.lm.speech_logits(hidden)

    # ---- loss --------------------------------------------------------------------------------------------------------

    def forward(
        self,
        rows: PackedRows,
        feats_NTF: Tensor | None = None,
        lengths_N: Tensor | None = None,
        *,
        encoded: tuple[list[Tensor], Tensor] | None = None,
        audio: AudioFeatures | None = None,
        transcripts: Transcripts | Sequence[Tensor] | None = None,
        tags: Mapping[str, Tensor] | None = None,
        weights_D: Tensor | None = None,
        run_all_parts: bool = False,
        language: bool = True,
        plan: Plan | None = None,
    ) -> LossParts:
        """Loss terms of a batch. The targets scored over the text classes alone come first.

        Args:
            rows: packed samples; with a ``plan`` they are not looked at.
            feats_NTF, lengths_N: log-mel features of the recordings and their frames.
            encoded: instead of features: what `encode` returned. ``audio``: instead of both: what `adapt` returned.
            transcripts: text ids of each recording for CTC, empty where unknown.
            tags: label number of each recording for each tag head, `IGNORE` where unknown.
            weights_D: how the caller is going to weight each sample's targets, where it knows; saves work in the
                backward pass. Other weights than these give gradients that are NaN.
            run_all_parts: let a batch without recordings or speech run encoder, adapter and speech head all the same,
                with no effect on the loss: ranks that share parameters must make the same calls.
            language: False leaves the LLM out; only the losses of the CTC and tag heads remain.
            plan: `plan` of the batch, on the model's device; without one it is made here, which reads rows and lengths
                to the host.
        """
        plan = plan if plan is not None else self.plan(rows, _frames(lengths_N, encoded, audio)).to(self.device)
        # Not asked of a weight, which ZeRO-3 would gather for it: on the ranks alone that come by here.
        device = plan.rows.ids_P.device
        touched: list[Tensor] = []
        if audio is None and encoded is not None:
            audio = self.adapt(*encoded, plan.recordings.adapter if plan.recordings is not None else None)
        elif audio is None and feats_NTF is not None and lengths_N is not None and len(lengths_N):
            audio = self.encode_audio(feats_NTF, lengths_N, plan.recordings)
        if audio is None and run_all_parts:
            touched += self._run_audio_on_silence(device)
        if not language:
            none = torch.zeros(0, dtype=torch.long, device=device)
            no_nll = torch.zeros(0, device=device)
            return LossParts(no_nll, none, none, *self._ctc_loss(audio, transcripts, no_nll), *self._tag_loss(audio, tags))
        sequence = plan.rows
        if audio is not None and self.ctc is not None and self.ctc.config.compress:
            sequence = plan.hide(audio.visible_P.tolist()).to(device)  # the one thing that the host cannot know before
        embeds_PD = self._sequence_inputs(sequence, audio, plan)
        if touched:
            embeds_PD = embeds_PD + 0.0 * torch.stack(touched).sum().to(embeds_PD.dtype)
        hidden_PD = self.lm.packed_hidden(embeds_PD, sequence.positions_P, sequence.documents)
        heads = [self.lm.text_head, self.lm.speech_head]
        if sequence.text_only == len(sequence.supervised_M) and not run_all_parts:
            # Tasks without speech are scored over the text classes, the others over text and speech together.
            heads.pop()
        nll_M = linear_nll(
            hidden_PD.index_select(0, sequence.supervised_M),
            sequence.targets_M,
            heads,
            sequence.text_only,
            None if weights_D is None else weights_D[sequence.documents_M],
        )
        ctc = self._ctc_loss(audio, transcripts, nll_M)
        return LossParts(nll_M, sequence.targets_M, sequence.documents_M, *ctc, *self._tag_loss(audio, tags))

    def plan(self, rows: PackedRows, frames: Sequence[int]) -> Plan:
        """What this model needs to know of a batch on the host, from its rows and the frames of its recordings."""
        markers = (self.vocabulary.audio_begin, self.vocabulary.audio_end) if self.tags is not None else None
        return Plan.of(rows, frames, markers)

    def _sequence_inputs(self, sequence: RowPlan, audio: AudioFeatures | None, plan: Plan) -> Tensor:
        """Input embeddings of all documents end to end, [P, D]. Raises ValueError when rows and recordings do not fit
        together."""
        _check_audio(plan.audio_positions, audio)
        embeds_PD = self.lm.embed(sequence.ids_P, with_head=True)
        if audio is None:
            return embeds_PD
        heard_AD = audio.embeds_PD.index_select(0, sequence.audio_from_A).to(embeds_PD.dtype)
        embeds_PD = embeds_PD.index_copy(0, sequence.audio_at_A, heard_AD)
        if audio.tag_embeds_ND is not None:
            vectors = audio.tag_embeds_ND.index_select(0, sequence.markers_from).to(embeds_PD.dtype)
            embeds_PD = embeds_PD.index_add(0, sequence.markers_at, vectors)
        return embeds_PD

    def _ctc_loss(
        self, audio: AudioFeatures | None, transcripts: Transcripts | Sequence[Tensor] | None, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.ctc is None or audio is None or audio.ctc_log_probs_NPC is None or transcripts is None:
            return like.new_zeros(0), torch.zeros(0, dtype=torch.long, device=like.device)
        if not isinstance(transcripts, Transcripts):
            transcripts = Transcripts.of(transcripts, audio.lengths_N.tolist()).to(like.device)
        return self.ctc.loss(audio.ctc_log_probs_NPC, transcripts)

    def _tag_loss(
        self, audio: AudioFeatures | None, tags: Mapping[str, Tensor] | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        logits = audio.tag_logits if audio is not None and tags is not None else {}
        labels = {name: (tags or {})[name].to(self.device) for name in logits if name in (tags or {})}
        nll = {name: F.cross_entropy(logits[name], labels[name], ignore_index=IGNORE, reduction="none") for name in labels}
        return nll, {name: label_N != IGNORE for name, label_N in labels.items()}

    def _run_audio_on_silence(self, device: torch.device) -> list[Tensor]:
        """Run the audio parts on one silent position; the sums of what came out, for a graph that reaches all their
        parameters."""
        feats_NTF = torch.zeros(1, _SILENT_FRAMES, self.config.encoder.mels, device=device)
        silence = RecordingPlan.of([_SILENT_FRAMES]).to(device)
        audio = self.encode_audio(feats_NTF, torch.full((1,), _SILENT_FRAMES, device=device), silence)
        assert len(audio.embeds_PD) == audio_positions(_SILENT_FRAMES)
        outputs = [audio.embeds_PD, audio.tag_embeds_ND, audio.ctc_log_probs_NPC, *audio.tag_logits.values()]
        return [tensor.float().sum() for tensor in outputs if tensor is not None]

    def _marker_tags(self, rows: PackedRows, audio: AudioFeatures) -> Tensor:
        """Tag vectors at the audio-begin marker before and the audio-end marker after each recording, zero elsewhere:
        [B, T, D]."""
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


def _check_audio(expected: int, audio: AudioFeatures | None) -> None:
    found = 0 if audio is None else len(audio.embeds_PD)
    if expected != found:
        raise ValueError(
            f"the rows have {expected} audio positions, the recordings {found}; lay out with `layout.audio_positions`"
        )


def _frames(lengths_N: Tensor | None, encoded: tuple[list[Tensor], Tensor] | None, audio: AudioFeatures | None) -> list[int]:
    """Frames of recordings that are given in one of three forms; such that they come to the same number of
    positions."""
    if audio is not None:
        return [FRAMES_PER_POSITION * n for n in audio.lengths_N.tolist()]
    if encoded is not None:
        return [2 * n for n in encoded[1].tolist()]
    return [] if lengths_N is None else lengths_N.tolist()


def renumber(documents_BT: Tensor, visible_BT: Tensor) -> Tensor:
    """Position numbers of packed rows: visible positions count from 0 in each document, hidden ones get
    `MASKED_POSITION`, padding 0."""
    total_BT = visible_BT.long().cumsum(dim=1)
    first_BT = documents_BT != F.pad(documents_BT[:, :-1], (1, 0), value=PAD_DOCUMENT - 1)
    before_BT = torch.where(first_BT, total_BT - visible_BT.long(), 0).cummax(dim=1).values
    positions_BT = torch.where(visible_BT, total_BT - before_BT - 1, MASKED_POSITION)
    return torch.where(documents_BT == PAD_DOCUMENT, 0, positions_BT)
