"""The CPU decides once: what it does well, what follows, and what happens where a kernel refuses."""

from __future__ import annotations

import copy
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from osum_echat import device as devices
from osum_echat.cpu_linear import pack_linears
from osum_echat.device import cpu
from osum_echat.generation.config import GenerationConfig
from osum_echat.generation.generator import Generator
from tests.generation_case import done, request, tiny
from tests.token2wav_case import recorded_speaker, recorded_tokens, tiny_model

CPU = torch.device("cpu")
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
WIDE = {"avx2": True} | {f"avx512_{part}": True for part in ("f", "bw", "vl", "dq", "vnni")}
SAPPHIRE = WIDE | {"avx512_bf16": True, "amx_bf16": True, "amx_tile": True}


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing remembered of earlier decisions, before and after."""
    caches = (cpu._packs, cpu._detect, cpu._say_once)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def refused(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed kernels that refuse, as oneDNN does without AVX-512."""

    def refuse(ops: Any, dtype: torch.dtype) -> bool:
        raise RuntimeError("mkldnn_reorder_linear_weight: bf16 path needs the cpu support avx_ne_convert or avx512bw\nmore")

    monkeypatch.setattr(cpu, "_tiny_packed_product", refuse)


@pytest.mark.parametrize(
    ("flags", "aten", "isa", "limit", "wanted"),
    [
        (SAPPHIRE, "AVX512", "", "", ("avx512", True, True, True)),
        (SAPPHIRE, "AVX512", "AVX512_CORE_BF16", "", ("avx512", True, False, True)),
        (SAPPHIRE, "AVX2", "", "", ("avx2", False, False, False)),
        (SAPPHIRE, "AVX512", "AVX2", "", ("avx2", False, False, False)),
        (SAPPHIRE, "AVX512", "", "avx2", ("avx2", False, False, False)),
        (WIDE, "AVX512", "", "", ("avx512", True, False, True)),
        ({"avx2": True}, "AVX2", "", "", ("avx2", False, False, False)),
        ({"avx2": True, "avx_vnni": True}, "AVX2", "", "", ("avx2", False, False, True)),
        ({"avx2": True, "avx_vnni": True, "avx_ne_convert": True}, "AVX2", "", "", ("avx2", True, False, True)),
        ({}, "DEFAULT", "", "", ("none", False, False, False)),
        ({"neon": True, "dot": True}, "DEFAULT", "", "", ("neon", False, False, True)),
        ({"neon": True, "sve": True}, "SVE256", "", "", ("sve", False, False, False)),
    ],
)
def test_what_a_cpu_does_well(flags: dict[str, bool], aten: str, isa: str, limit: str, wanted: tuple[Any, ...]) -> None:
    found = cpu.judge(flags, aten, isa, limit)
    assert (found.vector, found.bfloat16, found.amx, found.int8) == wanted


def test_linux_names_are_read_where_pytorch_has_no_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: Some CPU\nflags\t\t: fpu avx2 avx512f avx512bw avx512vl avx512dq avx512_vnni\n")
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(cpu, "Path", lambda _: info)
    found = cpu.judge(cpu._flags(), "AVX512")
    assert (found.name, found.vector, found.int8) == ("Some CPU", "avx512", True)


def test_an_unknown_limit_is_an_error_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.LIMIT, "sse")
    with pytest.raises(ValueError, match="avx2, plain, bfloat16"):
        cpu.detect()


def test_a_kernel_that_refuses_is_replaced_and_that_is_said_once(refused: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert [devices.linear_kernel(CPU, torch.bfloat16, 512, 2**20) for _ in range(3)] == ["plain"] * 3
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and "avx_ne_convert" in said[0] and "more" not in said[0]
    model = nn.Sequential(nn.Linear(1024, 1024)).bfloat16()
    assert pack_linears(model) == 0 and type(model[0]) is nn.Linear


def test_types_and_devices_without_packed_kernels() -> None:
    assert not cpu.packs(torch.float16)
    assert devices.linear_kernel(torch.device("meta"), torch.float32, 1024, 2**20, many_rows=True) == "plain"


def test_decoding_gives_the_same_ids_where_kernels_refuse(refused: None) -> None:
    model, tokenizer, _ = tiny()
    plain = copy.deepcopy(model)
    assert pack_linears(model.lm) == 0
    row = request("s2t_chat", recordings=[1], max_new=20)
    ids = [done([e for _, e in Generator(m, tokenizer, GenerationConfig()).generate([row])]).generated for m in (model, plain)]
    assert ids[0] == ids[1] and len(ids[0]) > 1


def test_token2wav_in_bfloat16_works_where_kernels_refuse(refused: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(cpu.LIMIT, "bfloat16")
    assert not cpu.packs(torch.bfloat16)
    mels, tokens, noise = [], torch.tensor(recorded_tokens(30)), torch.randn(173, 80, generator=torch.Generator().manual_seed(0))
    for kind in ("bfloat16", "float32"):
        model = tiny_model(tmp_path / kind, dtype=kind)
        assert len(model.synthesize(recorded_tokens(20), recorded_speaker(), steps=1)[0]) == 68 * 256
        with torch.inference_mode():
            prompt = model.prompt_state(recorded_speaker())
            condition = model.flow.condition(tokens, prompt.tokens_P, prompt.mel_TM, prompt.spk_M)
            mels.append(model.flow.solve([condition], [noise])[0])
    error = (mels[0] - mels[1]).square().mean().sqrt() / mels[1].std()
    assert 0 < error < 0.05


def test_a_cpu_that_is_slow_in_bfloat16_computes_in_float32(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv(cpu.LIMIT, "avx2")
    with caplog.at_level(logging.WARNING):
        model = tiny_model(tmp_path, dtype="bfloat16")
        assert devices.training_precision("bf16", CPU) == devices.training_precision("autocast", CPU) == "fp32"
    said = [record.message for record in caplog.records if "slower" in record.message]
    assert len(said) == 1 and re.search(r"bfloat16 arithmetic is \d+\.\d times slower than float32", said[0])
    assert model.flow.decoder.estimator.final_proj.weight.dtype == torch.float32
    assert devices.training_precision("fp16", CPU) == "fp16"
    with devices.autocast(CPU, torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    monkeypatch.setenv(cpu.LIMIT, "bfloat16")
    assert devices.training_precision("bf16", CPU) == "bf16"


@pytest.mark.parametrize(
    ("fast", "rounds", "weights", "memory", "wanted"),
    [
        (True, True, 1e8, 16e9, "float32"),
        (True, True, 3.5e9, 16e9, "bf16"),
        (False, True, 1e8, 1e9, "float32"),
        (False, True, 3.5e9, 64e9, "int8"),
        (False, False, 3.5e9, 32e9, "float32"),
        (False, False, 3.5e9, 16e9, "bf16"),
    ],
)
def test_large_checkpoints_are_kept_as_this_cpu_computes_best(
    fast: bool, rounds: bool, weights: float, memory: float, wanted: str, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    monkeypatch.setattr(cpu, "detect", lambda: cpu.Cpu("a CPU", "avx2", fast, False, False))
    monkeypatch.setattr(cpu, "rounds", lambda kind: rounds)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))
    assert cpu.default_weights(int(weights)) == wanted


def test_nobody_else_asks_the_cpu(root_dir: Path) -> None:
    asks = re.compile(r"get_cpu_capab|torch\.cpu\.|_is_mkldnn|mkldnn\.is_available|/proc/cpuinfo|_reorder_linear_weight\(")
    files = {p.relative_to(root_dir).as_posix(): p.read_text(encoding="utf-8") for p in (root_dir / "osum_echat").rglob("*.py")}
    assert {name for name, text in files.items() if asks.search(text)} == {
        "osum_echat/device/cpu.py",
        "osum_echat/cpu_linear/packed.py",  # packs what it was asked to
    }


def test_mini_speaks_in_bfloat16_on_an_avx2_machine(root_dir: Path) -> None:
    """With PyTorch and oneDNN held to AVX2, where packing bfloat16 fails for real."""
    folder = root_dir / "checkpoints" / "mini" / "token2wav"
    if not folder.is_dir():
        pytest.skip("checkpoints/mini is not here: `make mini` trains it")
    code = (
        "import sys; from osum_echat.token2wav import Speaker, Token2Wav\n"
        f"folder = {str(folder)!r}\n"
        "t2w = Token2Wav.load(folder, device='cpu', dtype='bfloat16')\n"
        "wave, _ = t2w.synthesize([5, 9, 100, 7] * 5, Speaker.load(folder + '/speaker.safetensors'), steps=2)\n"
        "print(t2w.flow.decoder.estimator.final_proj.weight.dtype, len(wave), abs(wave).max() > 0.001)"
    )
    for limit, dtype in (("", "torch.float32"), ("bfloat16", "torch.bfloat16")):
        env = {**os.environ, **AVX2, cpu.LIMIT: limit, "PYTHONPATH": str(root_dir)}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, cwd=root_dir)
        assert run.returncode == 0, run.stderr
        found, samples, loud = run.stdout.split()
        assert (found, loud) == (dtype, "True") and int(samples) == 68 * 256
