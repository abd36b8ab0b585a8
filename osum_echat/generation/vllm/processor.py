"""`rules.BatchRules` as a vLLM logits processor; vLLM loads it by the entry point ``vllm.logits_processors`` of this
package.

It acts on models that `export` wrote, and there on requests that bring a `rules.RowPlan` in
``extra_args["osum_echat"]``. With any other model, and on any other request, it does nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from osum_echat.generation.vllm.export import SETTINGS_FILE, read_settings
from osum_echat.generation.vllm.owner import end_with_owner
from osum_echat.generation.vllm.rules import BatchRules, RowPlan, rules_of
from osum_echat.model.checkpoint import TOKENIZER_FOLDER

ARGUMENT = "osum_echat"


class EChatLogitsProcessor(LogitsProcessor):
    """See the module."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        model = Path(str(vllm_config.model_config.model))
        self.rules: BatchRules | None = None
        if (model / SETTINGS_FILE).is_file():
            from transformers import AutoTokenizer

            override = dict(vllm_config.additional_config or {}).get(ARGUMENT)
            end_with_owner()
            self.rules = rules_of(read_settings(model), AutoTokenizer.from_pretrained(str(model / TOKENIZER_FOLDER)), override)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        plan = (sampling_params.extra_args or {}).get(ARGUMENT)
        if plan is not None and not isinstance(plan, dict):
            raise ValueError(f"extra_args[{ARGUMENT!r}] must be a dict, found {type(plan).__name__}")

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        rules = self.rules
        if rules is None or batch_update is None:
            return
        for index in batch_update.removed:
            rules.remove(index)
        for index, params, _, output in batch_update.added:
            rules.remove(index)
            plan = (params.extra_args or {}).get(ARGUMENT)
            if plan is not None:
                rules.add(index, RowPlan.from_plain(plan, rules.vocab), output)
        for source, target, direction in batch_update.moved:
            rules.move(source, target, direction == MoveDirectionality.SWAP)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self.rules is None else self.rules.apply(logits)
