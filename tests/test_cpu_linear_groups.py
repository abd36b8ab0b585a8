"""Weights in groups of 8 and 4 bits: the form, the product, the rule which weights, and whole checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from osum_echat import device as devices
from osum_echat.cpu_linear import QuantizedEmbedding, QuantizedLinear, group_size, quantize
from osum_echat.cpu_linear.groups import Bits, join
from osum_echat.device import cpu, onnx
from osum_echat.device.accelerators import Weights
from osum_echat.model import checkpoint as model_io
from osum_echat.model import quantized
from osum_echat.model.storage import SafetensorsSource, open_source
from osum_echat.pipeline import EChat
from osum_echat.pipeline.load import load_llm

MINI = Path(__file__).parent.parent / "checkpoints" / "mini"
CPU = torch.device("cpu")
BITS = pytest.mark.parametrize("bits", [8, 4])
needs_nbits = pytest.mark.skipif(
    not (onnx.has_nbits(8) and onnx.has_nbits(4)),
    reason="this onnxruntime has no MatMulNBits for 4 and 8 bits; install 1.22 or later",
)
needs_mini = pytest.mark.skipif(not MINI.is_dir(), reason="checkpoints/mini is not here: `make mini` trains it")


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@BITS
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 9), groups=st.integers(1, 5), seed=st.integers(0, 99), scale=st.sampled_from([1e-3, 0.02, 40.0]))
def test_rounding_errs_by_less_than_a_step_and_is_stable(bits: Bits, rows: int, groups: int, seed: int, scale: float) -> None:
    weight = scale * torch.randn(rows, 32 * groups, generator=torch.Generator().manual_seed(seed))
    found = quantize(weight, bits)
    again = found.expand()
    assert found.shape == weight.shape and found.codes_NGB.dtype == torch.uint8
    step = weight.unflatten(1, (-1, found.size)).abs().amax(-1, keepdim=True) / 2 ** (bits - 1)
    error = (again - weight).unflatten(1, (-1, found.size)).abs()
    assert bool((error <= 2.01 * step + 1e-7).all())  # the last code may be missing on one side
    assert relative(quantize(again, bits).expand(), again) < 0.5 * relative(again, weight) + 1e-3


@BITS
def test_zero_rows_stay_zero_and_large_matrices_are_cut(bits: Bits, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(11, 64)
    weight[3] = 0.0
    whole = quantize(weight, bits)
    monkeypatch.setattr("osum_echat.cpu_linear.groups._AT_ONCE", 4 * 64)
    parts = quantize(weight, bits)
    assert whole.codes_NGB.equal(parts.codes_NGB) and whole.scales_NG.equal(parts.scales_NG)
    assert parts.expand().equal(whole.rows(torch.arange(11))) and not parts.expand()[3].any()


def test_four_bits_search_the_scale_of_smallest_error() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    blocks = weight.unflatten(1, (-1, 32))
    scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
    plain = ((blocks / scale).round().clamp(-8, 7) * scale).flatten(1)
    assert relative(quantize(weight, 4).expand(), weight) < 0.95 * relative(plain, weight)


def test_rows_that_no_group_divides_are_refused() -> None:
    assert group_size(320, 8) == 64 and group_size(832, 4) == 32 and group_size(50, 8) is None
    with pytest.raises(ValueError, match="50 numbers"):
        quantize(torch.randn(4, 50), 8)


@needs_nbits
@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 320), (2, 5, 320), (40, 320), (0, 320)])
def test_the_layer_computes_what_its_expanded_weight_does(bits: Bits, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight, bias = quantize(torch.randn(96, 320) * 0.05, bits), torch.randn(96)
    x = torch.randn(shape).to(dtype)
    with torch.inference_mode():
        found = QuantizedLinear(weight, bias)(x)
        wanted = nn.functional.linear(x.float(), weight.expand(), bias)
    assert found.dtype == dtype and found.shape == wanted.shape
    if x.numel():
        assert relative(found.float(), wanted) < 0.01  # inputs are rounded to 8 bits


@needs_nbits
@BITS
def test_a_row_does_not_depend_on_the_rows_beside_it(bits: Bits) -> None:
    layer = QuantizedLinear(quantize(torch.randn(64, 128), bits))
    x = torch.randn(7, 128)
    x[2] *= 1000.0
    with torch.inference_mode():
        assert all(relative(layer(x)[n], layer(x[n : n + 1])[0]) < 1e-5 for n in range(7))


@needs_nbits
@BITS
def test_joined_weights_are_one_product_and_tables_are_read_by_row(bits: Bits) -> None:
    parts = [quantize(torch.randn(n, 64), bits) for n in (16, 48)]
    joined, x = QuantizedLinear(join(parts)), torch.randn(3, 64)
    with torch.inference_mode():
        alone = torch.cat([QuantizedLinear(part)(x) for part in parts], dim=1)
        assert relative(joined(x), alone) < 1e-6
    table = QuantizedEmbedding(parts[1])
    ids = torch.tensor([[3, 0], [47, 3]])
    assert table(ids).equal(table.weight[ids])


@pytest.mark.parametrize(
    ("name", "shape", "int8", "int4"),
    [
        ("lm.llm.model.layers.0.self_attn.q_proj.weight", (2048, 2048), 8, 4),
        ("lm.llm.model.layers.0.mlp.down_proj.weight", (2048, 11008), 8, 8),
        ("lm.llm.model.layers.0.self_attn.q_proj.weight", (320, 320), 8, 8),
        ("lm.llm.model.embed_tokens.weight", (151936, 2048), 8, 8),
        ("lm.speech_head.weight", (4097, 2048), 8, 8),
        ("encoder.blocks.3.feed_forward.up.weight", (5120, 1280), 8, 8),
        ("lm.llm.model.layers.0.input_layernorm.weight", (2048,), None, None),
        ("lm.llm.model.layers.0.self_attn.q_proj.lora_A.default.weight", (16, 2048), None, None),
        ("encoder.conv1.weight", (1280, 128, 3), None, None),
        ("projection.weight", (2048, 1280), None, None),
        ("lm.llm.model.layers.0.self_attn.q_proj.weight", (8, 64), None, None),
        ("lm.llm.model.layers.0.self_attn.q_proj.weight", (2000, 50), None, None),
    ],
)
def test_which_weights_are_rounded(name: str, shape: tuple[int, ...], int8: int | None, int4: int | None) -> None:
    assert (quantized.bits_of(name, shape, "int8"), quantized.bits_of(name, shape, "int4")) == (int8, int4)


@pytest.mark.parametrize(
    ("asked", "dtype", "stored", "wanted"),
    [
        ("auto", "auto", None, Weights(torch.float32)),
        ("auto", "auto", "int4", Weights(torch.float32, "int4")),
        ("auto", "float32", "int4", Weights(torch.float32)),
        ("bf16", "auto", "int8", Weights(torch.bfloat16)),
        ("int8", "auto", None, Weights(torch.float32, "int8")),
        ("int8", "float32", "int4", Weights(torch.float32, "int8")),
    ],
)
def test_what_is_asked_and_what_is_stored_decide(
    asked: str, dtype: str, stored: str | None, wanted: Weights, monkeypatch
) -> None:
    monkeypatch.setattr(cpu, "rounds", lambda kind: True)
    assert devices.model_weights(asked, dtype, CPU, 10**6, stored) == wanted


def test_contradictions_and_unknown_words_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "rounds", lambda kind: True)
    meta = torch.device("meta")
    for asked, dtype, device, message in (
        ("int2", "auto", CPU, "int8, int4"),
        ("int8", "bfloat16", CPU, "contradicts"),
        ("float32", "bfloat16", CPU, "contradicts"),
        ("int4", "auto", meta, "is for CPUs"),
    ):
        with pytest.raises(ValueError, match=message):
            devices.model_weights(asked, dtype, device, 10**6, None)


def test_weights_stay_whole_where_onnxruntime_has_no_product(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object) -> object:
        raise RuntimeError("MatMulNBits(1) is not a registered function/op")

    onnx.has_nbits.cache_clear()
    monkeypatch.setattr(onnx, "nbits_session", refuse)
    assert devices.model_weights("int8", "auto", CPU, 10**6, None) == Weights(torch.float32)
    assert devices.model_weights("auto", "auto", CPU, 10**6, "int8") == Weights(torch.float32)
    onnx.has_nbits.cache_clear()
    assert sum("not a registered" in record.message for record in caplog.records) == 1


@needs_nbits
@needs_mini
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_checkpoint_is_the_rounded_one_on_disk(
    kind: quantized.Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "_FOUR_INPUTS", 128)  # mini is narrow
    folder = model_io.save_quantized(MINI, tmp_path / kind, kind)
    assert (folder / "generation.yaml").read_bytes() == (MINI / "generation.yaml").read_bytes()
    assert (folder / "token2wav" / "cosyvoice.yaml").is_file()
    source = open_source(folder)
    assert isinstance(source, SafetensorsSource) and quantized.stored_kind(source) == kind
    whole = model_io.load_weights(folder, dtype=torch.float32)  # expanded, as for training or an accelerator
    placed = model_io.load_weights(folder, dtype=lambda count, stored: Weights(torch.float32, stored))  # type: ignore[arg-type]
    direct = model_io.load_weights(MINI, dtype=lambda count, stored: Weights(torch.float32, kind))
    layers = [m for m in placed.modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) > 50 and {m.bits for m in layers} == ({4, 8} if kind == "int4" else {8})
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        a, b, c = (model.text_logits(model.hidden(model.embed(ids))) for model in (placed, direct, whole))
    assert relative(a, b) < 2e-3  # only vectors and convolutions differ, in half precision on disk
    assert relative(a, c) < 0.05


@needs_nbits
@needs_mini
def test_mini_in_8_bits_says_what_it_says_in_float32(tmp_path: Path, root_dir: Path) -> None:
    recording = root_dir / "assets" / "demo" / "8_adult_male_happy_applause.ogg"
    model_io.save_quantized(MINI, tmp_path / "int8", "int8")
    replies = [EChat.load(path, device="cpu").chat(recording, think="tag", greedy=True) for path in (MINI, tmp_path / "int8")]
    assert replies[0].text == replies[1].text != ""
    assert replies[0].think is not None and replies[1].think is not None
    assert replies[0].think.transcript == replies[1].think.transcript


def test_the_command_writes_a_folder_and_refuses_to_write_over_its_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from osum_echat.cli.quantize import main

    if not MINI.is_dir():
        pytest.skip("checkpoints/mini is not here: `make mini` trains it")
    assert main(["mini", str(tmp_path / "four"), "--weights", "int4"]) == 0
    assert "MB of weights in int4" in capsys.readouterr().out
    assert main([str(tmp_path / "four"), str(tmp_path / "four")]) == 1
    assert "itself" in capsys.readouterr().err


def test_other_sessions_open_after_the_common_pool(tmp_path):
    """In a process of its own: onnxruntime's pool is the process's, and refuses sessions that want threads of their own."""
    code = (
        "import sys, torch\n"
        "from osum_echat.device import onnx\n"
        "from osum_echat.serving.vad import _session\n"
        "first = onnx.session_options(threads=1)\n"
        "assert first.use_per_session_threads\n"
        "assert onnx.has_nbits(8)\n"
        "assert not onnx.session_options(threads=1).use_per_session_threads\n"
        "import onnx as format\n"
        "from onnx import TensorProto as T, helper as h\n"
        "ends = [h.make_tensor_value_info(n, T.FLOAT, [1]) for n in 'xy']\n"
        "graph = h.make_graph([h.make_node('Neg', ['x'], ['y'])], 'g', ends[:1], ends[1:])\n"
        "model = h.make_model(graph, opset_imports=[h.make_opsetid('', 21)], ir_version=10)\n"
        "print(_session(model.SerializeToString()).run(None, {'x': torch.ones(1).numpy()})[0][0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "-1.0\n"


@needs_mini
@needs_nbits
def test_a_config_says_how_weights_are_kept_and_a_call_overrides_it(tmp_path: Path) -> None:
    written = tmp_path / "config.yaml"
    written.write_text((MINI / "config.yaml").read_text(encoding="utf-8") + "\nweights: int8\n", encoding="utf-8")

    def rounded(config: Path, weights: str) -> bool:
        model, _ = load_llm(MINI, config, CPU, "auto", weights, pack=False)
        return any(isinstance(module, QuantizedLinear) for module in model.modules())

    assert rounded(written, "auto")
    assert not rounded(written, "float32")
    assert not rounded(MINI / "config.yaml", "auto")
    written.write_text((MINI / "config.yaml").read_text(encoding="utf-8") + "\nweights: int3\n", encoding="utf-8")
    with pytest.raises(ValueError, match="weights"):
        load_llm(MINI, written, CPU, "auto", "auto", pack=False)
