"""Published names: both ways, strict, LoRA included."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from osum_echat.model.config import LoraConfig
from osum_echat.model.echat import EChatModel
from osum_echat.model.lora import lora_layers, merge_lora
from osum_echat.model.released import CheckpointError, from_file, match, released_name, spec_of, to_released
from tests.model_case import CONFIG, OPTIONS, make_feats, make_model, make_row, run

LORA = dataclasses.replace(CONFIG, lora=LoraConfig(rank=3, alpha=6.0, dropout=0.0))
UNTIED = dataclasses.replace(
    CONFIG, llm=dataclasses.replace(CONFIG.llm, config={**CONFIG.llm.config, "tie_word_embeddings": False})
)


def published(model: EChatModel) -> dict[str, Tensor]:
    return to_released(model.state_dict(), spec_of(model))


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("config", [CONFIG, LORA, UNTIED], ids=["plain", "lora", "untied"])
def test_to_published_names_and_back_is_lossless(config: object) -> None:
    model = make_model(config)  # type: ignore[arg-type]
    state = published(model)
    chosen = match(shapes(state), spec_of(model))
    own = model.state_dict()
    assert set(chosen) == set(own)
    assert all(torch.equal(from_file(name, state[key]), own[name]) for name, key in chosen.items())


def test_the_tied_table_has_its_four_names_and_one_memory() -> None:
    state = published(make_model())
    names = ["llama_model.model.embed_tokens.weight", "llama_model.lm_head.weight", "embed_tokens.weight", "lm_head.weight"]
    assert len({state[name].data_ptr() for name in names}) == 1
    for kept in names:  # any one of them is enough
        single = {name: shape for name, shape in shapes(state).items() if name not in names or name == kept}
        assert match(single, spec_of(make_model()))["lm.llm.model.embed_tokens.weight"] == kept


def test_names_that_appear_after_the_reference_has_generated_are_tolerated() -> None:
    state = shapes(published(make_model()))
    for name in ("speech_token_emded.weight", "speech_head.weight", "speech_head.bias"):
        state["llama_model." + name] = state[name]
    match(state, spec_of(make_model()))


def test_missing_unexpected_and_misshaped_keys_are_listed_together() -> None:
    state = shapes(published(make_model()))
    del state["encoder.after_norm.bias"]
    state["encoder.extra"] = (3,)
    state["speech_head.bias"] = (5,)
    with pytest.raises(CheckpointError) as error:
        match(state, spec_of(make_model()))
    text = str(error.value)
    assert "1 missing: encoder.after_norm.bias" in text
    assert "1 unexpected: encoder.extra" in text
    assert "speech_head.bias is [5], expected [21]" in text
    assert "compare encoder, adapter, llm and vocabulary" in text


def test_lora_on_one_side_only_is_told_with_its_remedy() -> None:
    plain, lora = make_model(), make_model(LORA)
    with pytest.raises(CheckpointError, match="add a lora: section"):
        match(shapes(published(lora)), spec_of(plain))
    with pytest.raises(CheckpointError, match="take lora: out of the config"):
        match(shapes(published(plain)), spec_of(lora))


def test_lora_names_are_pefts() -> None:
    spec = spec_of(make_model(LORA))
    name = "lm.llm.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert name in spec.shapes
    assert released_name(name, lora=True) == "llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert not any("up_proj.lora" in key for key in spec.shapes), "the published recipe leaves up_proj alone"


def test_parts_that_the_published_form_lacks_stop_the_export() -> None:
    with pytest.raises(CheckpointError, match=r"no place for adapter\.mix\.norms"):
        published(make_model(OPTIONS))


@torch.no_grad()
def test_merged_lora_equals_lora() -> None:
    model, rows, feats = make_model(LORA), [make_row([30])], make_feats([30])
    before = run(model, rows, feats).nll_M
    count = len(lora_layers(model))
    assert merge_lora(model) == count == 2 * 6
    assert not lora_layers(model)
    assert model.state_dict().keys() == make_model().state_dict().keys()
    torch.testing.assert_close(run(model, rows, feats).nll_M, before, atol=1e-4, rtol=0)


def test_lora_on_the_table_or_the_head_is_refused() -> None:
    wrong = dataclasses.replace(CONFIG, lora=LoraConfig(targets=("q_proj", "lm_head")))
    with pytest.raises(ValueError, match="may not hold the token table or the LM head"):
        EChatModel(wrong)
