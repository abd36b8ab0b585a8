"""The LLM over one vocabulary of text and speech: unified ids in, hidden states out, a text head and a speech head.

The LLM is any transformers causal LM, used through its public interface: embeddings in, a ready 4D mask, a cache. Its token table and LM head
serve the text ids; a table and a head of our own serve speech codes and the audio markers (`dialogue.vocabulary`).

Packed rows are run document after document without padding. Each layer's attention takes one document at a time: a mask over a whole row of
T positions would cost T x T however short the documents are. The price is a kernel launch a document and layer.

B batch rows, T positions, D width of the LLM.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osum_echat.dialogue.packing import PAD_DOCUMENT
from osum_echat.dialogue.vocabulary import Vocabulary
from osum_echat.model.config import LlmConfig

# Heads that change logits after the linear layer; the chunked loss and the two-head decoding work on the linear layer itself.
_UNSUPPORTED = ("final_logit_softcapping", "logit_scale", "logits_scaling")


# Name under which transformers finds `_attend_by_document`.
_BY_DOCUMENT = "sdpa_by_document"


def _attend_by_document(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    documents: list[tuple[int, Tensor | None]] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention; with ``documents`` (length, and mask [1, 1, L, L] where some positions are hidden) one after another."""
    if documents is None and query.shape[2] == 1 and query.shape[1] > key.shape[1] and not kwargs.get("dropout"):
        return _attend_one(query, key, value, attention_mask, kwargs.get("scaling")), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if documents is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    lengths = [length for length, _ in documents]
    kwargs["is_causal"] = None  # SDPA decides by the mask
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), documents, strict=True)
    pieces = [sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0] for q, k, v, (_, mask) in parts]
    return torch.cat(pieces, dim=1), None


def _attend_one(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None) -> Tensor:
    """Attention of one new position, [B, 1, heads, d]. The heads that share a key head are given as positions of it, so that its keys are
    read once and not once a head: a step's attention takes a fifth of the time on a CPU. ``attention_mask``: [B or 1, 1, 1, K] or None."""
    batch, heads, _, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width)
    out = F.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
    return out.reshape(batch, 1, heads, value.shape[3])


def _register_attention() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_BY_DOCUMENT, _attend_by_document)
    AttentionMaskInterface.register(_BY_DOCUMENT, sdpa_mask)  # for calls without documents


def build_llm(config: LlmConfig) -> Any:
    """A transformers causal LM with fresh weights (or weights on the meta device, in a context that makes such).

    Raises:
        ValueError: for an LLM whose logits are not a plain linear layer of its hidden states, or with sliding-window layers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    data = config.transformers_config()
    model_type = data.pop("model_type")
    data.pop("torch_dtype", None)  # weights decide their dtype, not the config
    llm_config = AutoConfig.for_model(model_type, **data)
    for name in _UNSUPPORTED:
        if getattr(llm_config, name, None) not in (None, 1.0):
            raise ValueError(f"this LLM uses {name}, which the heads here do not apply; use an LLM without it")
    if "sliding_attention" in (getattr(llm_config, "layer_types", None) or []):
        raise ValueError("this LLM has sliding-window layers, which packed rows do not support; set use_sliding_window: false")
    _register_attention()
    attention = _BY_DOCUMENT if config.attention == "sdpa" else config.attention
    llm = AutoModelForCausalLM.from_config(llm_config, attn_implementation=attention, dtype=torch.float32)
    if config.rotary_dtype == "bfloat16":
        for module in [m for m in llm.modules() if "inv_freq" in m._buffers]:
            module.register_forward_hook(_round_to_bfloat16)
    return llm


def _round_to_bfloat16(module: nn.Module, args: Any, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(table.to(torch.bfloat16).to(table.dtype) for table in tables)


def is_plain(documents_BT: Tensor, visible_BT: Tensor) -> bool:
    """Whether each row is one document, all visible, padded at the right only: plain causal attention is then right without a mask."""
    padding_BT = documents_BT == PAD_DOCUMENT
    one_document = (documents_BT == documents_BT[:, :1]) | padding_BT
    right_padded = padding_BT[:, 1:] | ~padding_BT[:, :-1]
    return bool((one_document & (visible_BT | padding_BT)).all() & right_padded.all())


def packed_mask(documents_BT: Tensor, visible_BT: Tensor) -> Tensor:
    """Who may attend to whom, [B, 1, T, T] bool: earlier or same position, same document, visible key.

    A masked position attends to the visible ones before it, not to itself. Padding attends to itself, so that no query is without a key.
    """
    length = documents_BT.shape[1]
    index_T = torch.arange(length, device=documents_BT.device)
    causal_TT = index_T[:, None] >= index_T[None, :]
    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    padding_BT = documents_BT == PAD_DOCUMENT
    self_BTT = torch.diag_embed(padding_BT)
    return ((same_BTT & causal_TT & visible_BT[:, None, :] & ~padding_BT[:, None, :]) | self_BTT)[:, None]


class SpeechLM(nn.Module):
    """LLM, speech table and speech head."""

    def __init__(self, config: LlmConfig, vocabulary: Vocabulary, recompute: bool = False) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.flash = config.attention if config.attention.startswith("flash") else None
        self.llm = build_llm(config)
        rows = self.llm.get_output_embeddings().weight.shape[0]
        if rows != vocabulary.text_size:
            raise ValueError(f"the LLM has {rows} text rows, vocabulary.text_size says {vocabulary.text_size}; make them equal")
        self.width: int = self.llm.get_input_embeddings().weight.shape[1]
        self.speech_embedding = nn.Embedding(vocabulary.speech_rows, self.width)
        self.speech_head = nn.Linear(self.width, vocabulary.speech_classes)
        scale = getattr(self.llm.config, "initializer_range", 0.02)  # like the text table, which stands in the same sequence
        nn.init.normal_(self.speech_embedding.weight, std=scale)
        nn.init.normal_(self.speech_head.weight, std=scale)
        nn.init.zeros_(self.speech_head.bias)
        if recompute:
            self.llm.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def text_head(self) -> nn.Linear:
        return cast(nn.Linear, self.llm.get_output_embeddings())

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Embeddings of unified ids (text, speech codes, markers): [B, T] to [B, T, D]."""
        size = self.vocabulary.text_size
        text_BTD = self.llm.get_input_embeddings()(ids_BT.clamp(max=size - 1))
        speech_BTD = self.speech_embedding((ids_BT - size).clamp(min=0))
        return torch.where((ids_BT < size)[..., None], text_BTD, speech_BTD.to(text_BTD.dtype))

    def hidden(
        self,
        inputs_BTD: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        visible_BT: Tensor | None = None,
        *,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states after the final norm, [B, T, D].

        Args:
            inputs_BTD: input embeddings.
            positions_BT: position numbers (default: 0, 1, 2 ... after what the cache holds).
            documents_BT, visible_BT: of packed rows (see `dialogue.packing`); both or neither. Attention is causal inside each document.
            cache: a transformers cache, extended in place.
            attention_mask: instead of documents: a mask as transformers takes it (2D over cache and inputs, or 4D). None: plain causal.
            kwargs: handed to the LLM.
        """
        if documents_BT is not None and visible_BT is not None:
            assert cache is None and attention_mask is None, "packed rows are attended without a cache and bring their own mask"
            if self.flash is not None:
                masked = bool((~visible_BT & (documents_BT != PAD_DOCUMENT)).any())
                # A masked position cannot be told to a kernel that takes lengths. Set for this batch, and left so: recomputation of
                # activations in its backward pass must find the same.
                self.llm.set_attn_implementation("sdpa" if masked else self.flash)
                if not masked:
                    assert positions_BT is not None
                    return self._hidden_by_document(inputs_BTD, positions_BT, documents_BT, visible_BT)
            if is_plain(documents_BT, visible_BT):
                # Padding is at the right end, where causal attention does not look. Consecutive numbers also keep transformers from
                # taking a jump in the position numbers for the border of a packed sequence.
                positions_BT = torch.arange(inputs_BTD.shape[1], device=inputs_BTD.device)[None]
            elif self.llm.config._attn_implementation == _BY_DOCUMENT:
                assert positions_BT is not None
                return self._hidden_by_document(inputs_BTD, positions_BT, documents_BT, visible_BT)
            else:
                attention_mask = self._as_backend_takes_it(packed_mask(documents_BT, visible_BT), inputs_BTD)
        out = self.llm.get_decoder()(
            inputs_embeds=inputs_BTD,
            position_ids=positions_BT,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **kwargs,
        )
        return out.last_hidden_state

    def _hidden_by_document(self, inputs_BTD: Tensor, positions_BT: Tensor, documents_BT: Tensor, visible_BT: Tensor) -> Tensor:
        """All documents end to end without padding, for attention that takes their lengths (ours, or flash "varlen")."""
        where_P = torch.nonzero(documents_BT.flatten() != PAD_DOCUMENT)[:, 0]
        documents_P, visible_P = documents_BT.flatten()[where_P], visible_BT.flatten()[where_P]
        _, lengths_D = torch.unique_consecutive(documents_P, return_counts=True)
        if self.llm.config._attn_implementation == _BY_DOCUMENT:
            lengths = lengths_D.tolist()
            masks = [
                None if bool(visible_L.all()) else packed_mask(document_L[None], visible_L[None])
                for document_L, visible_L in zip(documents_P.split(lengths), visible_P.split(lengths), strict=True)
            ]
            told: dict[str, Any] = {"documents": list(zip(lengths, masks, strict=True))}
        else:
            ends = torch.nn.functional.pad(lengths_D.cumsum(0), (1, 0)).to(torch.int32)
            longest = int(lengths_D.max())
            told = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        flat_ND = inputs_BTD.flatten(0, 1)
        out = self.llm.get_decoder()(
            inputs_embeds=flat_ND.index_select(0, where_P)[None],
            position_ids=positions_BT.flatten()[where_P][None],
            attention_mask=self._no_mask(inputs_BTD) if "documents" in told else None,
            use_cache=False,
            **told,
        )
        hidden_PD = out.last_hidden_state[0].to(inputs_BTD.dtype)
        return torch.zeros_like(flat_ND).index_copy(0, where_P, hidden_PD).view_as(inputs_BTD)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Logits over the text ids: [..., D] to [..., V]."""
        return self.text_head(hidden)

    def speech_logits(self, hidden: Tensor) -> Tensor:
        """Logits over speech codes and the delimiter: [..., D] to [..., S + 1]."""
        return self.speech_head(hidden)

    def _no_mask(self, inputs_BTD: Tensor) -> Tensor:
        """A 4D mask that nobody reads: transformers takes it as ready and builds none of [positions x positions]."""
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=inputs_BTD.device)

    def _as_backend_takes_it(self, allowed_B1TT: Tensor, inputs_BTD: Tensor) -> Tensor:
        """SDPA takes the boolean mask, eager attention adds a float one."""
        if self.llm.config._attn_implementation != "eager":
            return allowed_B1TT
        device = inputs_BTD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs_BTD.dtype
        bias = torch.zeros(allowed_B1TT.shape, dtype=dtype, device=inputs_BTD.device)
        return bias.masked_fill_(~allowed_B1TT, torch.finfo(dtype).min)
