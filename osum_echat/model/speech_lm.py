"""The LLM over one vocabulary of text and speech: unified ids in, hidden states out, a text head and a speech head.

The LLM is any transformers causal LM, used through its public interface: embeddings in, a ready 4D mask, a cache. Its
token table and LM head serve the text ids; a table and a head of our own serve speech codes and the audio markers
(`dialogue.vocabulary`). How packed rows are attended is in `attention`.

B batch rows, T positions, D width of the LLM.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osum_echat.dialogue.packing import PAD_DOCUMENT
from osum_echat.dialogue.vocabulary import Vocabulary
from osum_echat.model import attention
from osum_echat.model.attention import Documents
from osum_echat.model.config import LlmConfig, Recompute
from osum_echat.model.recompute import checkpoint_options

# Heads that change logits after the linear layer; the chunked loss and the two-head decoding work on the linear layer
# itself.
_UNSUPPORTED = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def build_llm(config: LlmConfig) -> Any:
    """A transformers causal LM with fresh weights (or weights on the meta device, in a context that makes such).

    Raises:
        ValueError: for an LLM whose logits are not a plain linear layer of its hidden states, or with sliding-window
            layers.
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
    backend = attention.prepare(config.attention)
    llm = AutoModelForCausalLM.from_config(llm_config, attn_implementation=backend, dtype=torch.float32)
    if config.rotary_dtype == "bfloat16":
        for module in [m for m in llm.modules() if "inv_freq" in m._buffers]:
            module.register_forward_hook(_round_to_bfloat16)
    return llm


def _round_to_bfloat16(module: nn.Module, args: Any, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(table.to(torch.bfloat16).to(table.dtype) for table in tables)


class SpeechLM(nn.Module):
    """LLM, speech table and speech head."""

    def __init__(self, config: LlmConfig, vocabulary: Vocabulary, recompute: Recompute = False) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.llm = build_llm(config)
        rows = self.llm.get_output_embeddings().weight.shape[0]
        if rows != vocabulary.text_size:
            raise ValueError(f"the LLM has {rows} text rows, vocabulary.text_size says {vocabulary.text_size}; make them equal")
        self.width: int = self.llm.get_input_embeddings().weight.shape[1]
        self.speech_embedding = nn.Embedding(vocabulary.speech_rows, self.width)
        self.speech_head = nn.Linear(self.width, vocabulary.speech_classes)
        # Like the text table, which stands in the same sequence.
        scale = getattr(self.llm.config, "initializer_range", 0.02)
        nn.init.normal_(self.speech_embedding.weight, std=scale)
        nn.init.normal_(self.speech_head.weight, std=scale)
        nn.init.zeros_(self.speech_head.bias)
        if recompute:
            self.llm.gradient_checkpointing_enable(checkpoint_options(recompute))

    @property
    def text_head(self) -> nn.Linear:
        return cast(nn.Linear, self.llm.get_output_embeddings())

    def embed(self, ids_BT: Tensor, with_head: bool = False) -> Tensor:
        """Embeddings of unified ids (text, speech codes, markers): [B, T] to [B, T, D].

        ``with_head``: the text head takes part in the same backward pass. Where it is the text table itself, its
        gradient is there for the whole table; that of the few rows looked up here is added to it, and is no second
        table, mostly of zeros.
        """
        size, table = self.vocabulary.text_size, self.llm.get_input_embeddings()
        tied = with_head and table.weight is self.text_head.weight and table.weight.requires_grad and torch.is_grad_enabled()
        text_BT = ids_BT.clamp(max=size - 1)
        text_BTD = F.embedding(text_BT, table.weight, sparse=True) if tied else table(text_BT)
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
            documents_BT, visible_BT: of packed rows (see `dialogue.packing`); both or neither. Attention is causal
                inside each document.
            cache: a transformers cache, extended in place.
            attention_mask: instead of documents: a mask as transformers takes it (2D over cache and inputs, or 4D).
                None: plain causal.
            kwargs: handed to the LLM.
        """
        if documents_BT is not None and visible_BT is not None:
            assert cache is None and attention_mask is None, "packed rows are attended without a cache and bring their own mask"
            assert positions_BT is not None, "packed rows bring their position numbers"
            return self._hidden_of_rows(inputs_BTD, positions_BT, documents_BT, visible_BT)
        out = self.llm.get_decoder()(
            inputs_embeds=inputs_BTD,
            position_ids=positions_BT,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **kwargs,
        )
        return out.last_hidden_state

    def packed_hidden(self, inputs_PD: Tensor, positions_P: Tensor, documents: Documents) -> Tensor:
        """The same for documents end to end without padding, [P, D]: what training computes. Nothing is read to the
        host."""
        return attention.packed_hidden(self.llm.get_decoder(), inputs_PD, positions_P, documents)

    def _hidden_of_rows(self, inputs_BTD: Tensor, positions_BT: Tensor, documents_BT: Tensor, visible_BT: Tensor) -> Tensor:
        """Of every position of packed rows, hidden ones too; zeros at padding."""
        where_P = torch.nonzero(documents_BT.flatten() != PAD_DOCUMENT)[:, 0]
        numbers, visible = (x.flatten()[where_P].cpu().numpy() for x in (documents_BT, visible_BT))
        documents = Documents.of(numbers, visible).to(inputs_BTD.device)
        flat_ND = inputs_BTD.flatten(0, 1)
        hidden_PD = self.packed_hidden(flat_ND.index_select(0, where_P), positions_BT.flatten()[where_P], documents)
        return torch.zeros_like(flat_ND).index_copy(0, where_P, hidden_PD).view_as(inputs_BTD)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Logits over the text ids: [..., D] to [..., V]."""
        return self.text_head(hidden)

    def speech_logits(self, hidden: Tensor) -> Tensor:
        """Logits over speech codes and the delimiter: [..., D] to [..., S + 1]."""
        return self.speech_head(hidden)
