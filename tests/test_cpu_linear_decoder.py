"""A lightened decoder gives what transformers gives: prompts, steps, hidden positions, grouped heads, packed and rounded products."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from osum_echat.cpu_linear import QuantizedLinear, lighten, pack_linears, quantize
from osum_echat.cpu_linear.decoder import LightDecoder
from osum_echat.cpu_linear.step_graph import StepGraph
from osum_echat.device import cpu, onnx
from osum_echat.generation.cache import BatchCache
from osum_echat.generation.config import GenerationConfig
from osum_echat.generation.generator import Generator
from tests.generation_case import done, request, tiny


def _decoder(heads: int, groups: int, width: int = 64) -> Any:
    torch.manual_seed(heads)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "vocab_size": 32}
    config = Qwen2Config(**sizes, num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=64)
    decoder = Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa").eval().get_decoder()
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias") or "norm" in name:
            nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0)
    return decoder


def _hidden(decoder: Any, inputs_BTD: Tensor, hidden_columns: int) -> list[Tensor]:
    """Hidden states of a prompt of five positions, of a block of three and of two steps; row 1 does not see its first columns."""
    cache, rows = BatchCache(2, capacity=6), len(inputs_BTD)
    out = []
    for begin, end in ((0, 5), (5, 8), (8, 9), (9, 10)):
        allowed_BnK = torch.ones(end - begin, end, dtype=torch.bool).tril(begin).repeat(rows, 1, 1)
        allowed_BnK[1:, :, :hidden_columns] = False
        plain = hidden_columns == 0 and (begin == 0 or end - begin == 1)
        bias = torch.zeros(allowed_BnK.shape).masked_fill_(~allowed_BnK, torch.finfo(torch.float32).min)[:, None]
        positions_Bn = torch.arange(begin, end).repeat(rows, 1)
        found = decoder(
            inputs_embeds=inputs_BTD[:, begin:end],
            position_ids=positions_Bn,
            attention_mask=None if plain else bias,
            past_key_values=cache.cache,
            use_cache=True,
        )
        out.append(found.last_hidden_state[:, :, :])
    return out


@pytest.mark.parametrize("hidden_columns", [0, 2], ids=["all visible", "hidden columns"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2)], ids=["heads", "grouped heads"])
def test_a_lightened_decoder_gives_the_same_hidden_states(heads: int, groups: int, hidden_columns: int) -> None:
    decoder = _decoder(heads, groups)
    light = copy.deepcopy(decoder)
    assert lighten(light) and isinstance(light.forward, LightDecoder) and not lighten(light)
    inputs_BTD = torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        wanted, found = _hidden(decoder, inputs_BTD, hidden_columns), _hidden(light, inputs_BTD, hidden_columns)
    for a, b in zip(wanted, found, strict=True):
        # A position that may see nothing has no meaning, whoever computes it.
        seen = slice(hidden_columns if a.shape[1] == 5 else 0, None)
        torch.testing.assert_close(b[:, seen], a[:, seen], atol=2e-5, rtol=1e-4)


@pytest.mark.skipif(not cpu.packs(torch.float32), reason="this CPU or build of torch has no oneDNN kernels")
def test_packed_products_are_used_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_FLOAT32_WEIGHTS", 1)
    monkeypatch.setattr(cpu, "_FLOAT32_INPUTS", 1)
    decoder = _decoder(4, 2)
    light = copy.deepcopy(decoder)
    pack_linears(light)
    assert lighten(light)
    inputs_BTD = torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        for a, b in zip(_hidden(decoder, inputs_BTD, 0), _hidden(light, inputs_BTD, 0), strict=True):
            torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-4)


@pytest.mark.skipif(not onnx.has_nbits(8), reason="this onnxruntime has no MatMulNBits for 8 bits; install 1.22 or later")
def test_layers_that_are_no_parts_of_one_product_are_called_each() -> None:
    decoder = _decoder(4, 2)
    for layer in decoder.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(layer.self_attn, name)
            setattr(layer.self_attn, name, QuantizedLinear(quantize(linear.weight, 8), linear.bias))
    light = copy.copy(decoder)
    wanted = _step(decoder)
    assert lighten(light)
    torch.testing.assert_close(_step(light), wanted, atol=2e-5, rtol=1e-4)


def _step(decoder: Any) -> Tensor:
    inputs_BTD = torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return torch.cat(_hidden(decoder, inputs_BTD, 0), dim=1)


def test_other_calls_and_other_decoders_stay_with_transformers() -> None:
    decoder = _decoder(4, 2)
    light = copy.deepcopy(decoder)
    lighten(light)
    ids = torch.arange(6)[None]
    with torch.inference_mode():
        torch.testing.assert_close(light(input_ids=ids).last_hidden_state, decoder(input_ids=ids).last_hidden_state)
        own_cache = light(input_ids=ids, use_cache=True)
        assert own_cache.past_key_values.get_seq_length() == 6
    inputs_BTD = torch.randn(1, 4, 64, requires_grad=True)
    light(inputs_embeds=inputs_BTD, position_ids=torch.arange(4)[None]).last_hidden_state.sum().backward()
    assert inputs_BTD.grad is not None
    assert not lighten(nn.Linear(2, 2))


def test_a_model_with_a_lightened_decoder_decodes_the_same_ids() -> None:
    model, tokenizer, _ = tiny()
    light = copy.deepcopy(model)
    assert lighten(light.lm.llm.get_decoder())
    rows = [request("s2t_chat", recordings=[1], max_new=20), request("text2text", max_new=12, prompt_text="周末做什么")]
    for batch in ([rows[0]], rows):
        found = []
        for m in (model, light):
            events = list(Generator(m, tokenizer, GenerationConfig()).generate([replace(row) for row in batch]))
            found.append([done([e for n, e in events if n == index]).generated for index in range(len(batch))])
        assert found[0] == found[1]


def test_steps_of_a_small_decoder_are_one_graph_and_blocks_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = _decoder(4, 2)
    light = copy.deepcopy(decoder)
    assert lighten(light)
    graph, rows = light.forward.graph, []
    assert graph is not None
    step = graph.step
    monkeypatch.setattr(graph, "step", lambda x, *rest: rows.append(len(x)) or step(x, *rest))
    inputs_BTD = torch.randn(3, 10, 64, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        for a, b in zip(_hidden(decoder, inputs_BTD, 0), _hidden(light, inputs_BTD, 0), strict=True):
            torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-4)
    assert rows == [3, 3]


def test_a_graph_goes_from_one_cache_to_another_and_past_the_end_of_a_buffer() -> None:
    decoder = _decoder(4, 2)
    light = copy.deepcopy(decoder)
    lighten(light)
    inputs_BTD = torch.randn(2, 80, 64, generator=torch.Generator().manual_seed(5))
    whole = decoder(inputs_embeds=inputs_BTD, position_ids=torch.arange(80)[None], use_cache=False).last_hidden_state
    caches = [BatchCache(2, capacity=6) for _ in range(2)]
    with torch.inference_mode():
        for row, cache in enumerate(caches):
            light(inputs_embeds=inputs_BTD[row, None, :4], position_ids=torch.arange(4)[None], past_key_values=cache.cache)
        for at in range(4, 80):  # capacity 6, then by 64; from position 64 on there is no rotation in the graph
            for row, cache in enumerate(caches):
                x, position = inputs_BTD[row, None, at : at + 1], torch.tensor([[at]])
                found = light(inputs_embeds=x, position_ids=position, past_key_values=cache.cache).last_hidden_state
                torch.testing.assert_close(found[0, 0], whole[row, at], atol=2e-5, rtol=1e-4)
                assert cache.cache.get_seq_length() == at + 1


def test_other_decoders_have_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def graph_of(decoder: Any) -> object:
        assert lighten(decoder)
        return decoder.forward.graph

    assert graph_of(_decoder(4, 2).bfloat16()) is None
    by_length = _decoder(4, 2)
    by_length.rotary_emb.rope_type = "dynamic"
    assert graph_of(by_length) is None
    with monkeypatch.context() as changed:
        changed.setattr(cpu, "_GRAPH_WEIGHTS", 1000)
        assert graph_of(_decoder(4, 2)) is None
    with monkeypatch.context() as changed:
        changed.setenv(cpu.LIMIT, "plain")
        assert graph_of(_decoder(4, 2)) is None
    with monkeypatch.context() as changed:
        changed.setattr(onnx, "session", _no_session)
        assert graph_of(_decoder(4, 2)) is None


def _no_session(*_: object) -> object:
    raise RuntimeError("no such operator")


def test_a_graph_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = _decoder(4, 2)
    right = StepGraph._error
    monkeypatch.setattr(StepGraph, "_error", lambda graph, forward: right(graph, lambda **given: _doubled(forward(**given))))
    assert lighten(decoder) and decoder.forward.graph is None
    assert "is not used" in caplog.text


def _doubled(output: Any) -> Any:
    output.last_hidden_state = 2 * output.last_hidden_state
    return output
