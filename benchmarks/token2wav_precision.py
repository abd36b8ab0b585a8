#!/usr/bin/env python3
"""What a shorter type of the flow's U-Net costs: the distance of mel and samples from float32, on a CPU.

bfloat16 is computed as such. TF32 is imitated: the operands of every product and convolution are rounded to 10 bits of mantissa, the sums are float32, which
is what the units of an accelerator do. Speech codes are random but the same for all; the vocoder is float32 in all of them.

    python benchmarks/token2wav_precision.py --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import missing_package  # noqa: F401 - first: it says what is missing
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from osum_echat.token2wav import Speaker, Token2Wav
from osum_echat.token2wav.streaming import reply_noise

VOICE = Path(__file__).resolve().parent.parent / "checkpoints" / "mini" / "token2wav"
CODES = 100
_PRODUCTS = {"linear", "conv1d", "conv2d", "conv_transpose1d", "matmul", "bmm", "scaled_dot_product_attention", "addmm", "mm"}


def rounded(x: Tensor, bits: int = 10) -> Tensor:
    """float32 numbers to so many bits of mantissa, to nearest."""
    if x.dtype != torch.float32:
        return x
    unit = 1 << (23 - bits)
    return ((x.contiguous().view(torch.int32) + unit // 2) & -unit).view(torch.float32)


class ShortProducts(TorchFunctionMode):
    """Rounds the first two (of attention: three) operands of products."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _PRODUCTS:
            count = 3 if func.__name__ == "scaled_dot_product_attention" else 2
            args = (*(rounded(a) if isinstance(a, Tensor) else a for a in args[:count]), *args[count:])
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def solved(voice: Token2Wav, short: bool) -> Tensor:
    """The mel of random codes."""
    speaker = Speaker.load(VOICE / "speaker.safetensors")
    prompt = voice.prompt_state(speaker)
    codes = torch.randint(voice.config.flow.vocab_size, (CODES,), generator=torch.Generator().manual_seed(0)).tolist()
    condition = voice.flow.condition(codes, prompt.tokens_P, prompt.mel_TM, prompt.spk_M)
    noise = reply_noise(voice.draws(0), condition)
    if short:
        with ShortProducts():
            return voice.flow.solve([condition], [noise])[0]
    return voice.flow.solve([condition], [noise])[0]


def plain_voice(dtype: torch.dtype) -> Token2Wav:
    """Weights that are not packed: packed products cannot be imitated, and bfloat16 would be refused by some CPUs."""
    from osum_echat.device import cpu

    kernel, cpu.linear_kernel = cpu.linear_kernel, lambda *_, **__: "plain"
    try:
        voice = Token2Wav.load(VOICE, device="cpu")
    finally:
        cpu.linear_kernel = kernel
    voice.flow.decoder.estimator.to(dtype).time_mlp.float()
    return voice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    voice = plain_voice(torch.float32)
    exact = solved(voice, short=False)
    shorter = {"tf32": solved(voice, short=True), "bfloat16": solved(plain_voice(torch.bfloat16), short=False)}
    result = {f"mel_error_{name}": float((mel - exact).square().mean().sqrt() / exact.std()) for name, mel in shorter.items()}
    result |= {f"mel_largest_{name}": float((mel - exact).abs().max()) for name, mel in shorter.items()}
    print(json.dumps(result) if options.json else "\n".join(f"{key:24s} {value:.2e}" for key, value in result.items()))


if __name__ == "__main__":
    main()
