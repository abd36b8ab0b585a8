#!/usr/bin/env python3
"""What a decoding step and a chunk of sound ask of an accelerator: kernels that are launched and how often the host waits, counted on a CPU.

The model is a few numbers wide: counts do not depend on width. They are counted with 2 and with 4 layers; every further layer is like those, so the count of
the released model's 36 follows. Counted by `device.waits` in steady state,
with all guards on; "text" has a think, the age guard and a penalty. What is compiled (a layer, and choosing) is counted by the calls in the code that Inductor writes for a CPU
(it needs a C++ compiler; --no-compile leaves it out).

    python benchmarks/static_step.py --json
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import missing_package  # noqa: F401 - first: it says what is missing
import torch

from osum_echat.device.waits import Cost, Waits, a_step
from osum_echat.dialogue.layout import Segment, flatten
from osum_echat.dialogue.vocabulary import Vocabulary
from osum_echat.generation.config import GenerationConfig, Mode, Sampling
from osum_echat.generation.decoder_step import _Layer, build_step
from osum_echat.generation.events import Done
from osum_echat.generation.generator import Generator
from osum_echat.generation.request import Request
from osum_echat.generation.static_rows import Sizes
from osum_echat.generation.static_step import StaticStep
from osum_echat.model.config import AdapterConfig, EncoderConfig, LlmConfig, ModelConfig
from osum_echat.model.echat import EChatModel
from osum_echat.token2wav import Speaker, Token2Wav

LAYERS = 36
MINI_VOICE = Path(__file__).resolve().parent.parent / "checkpoints" / "mini" / "token2wav"
_SHAPE: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
_STATIC = Sizes(exact=False, late=True, record=False)
_DRAWN = Sampling(temperature=1.2, top_k=10, top_p=0.9, repetition_penalty=1.05)
_CALL = re.compile(r"^\s+(?:\w+ = )?(?:extern_kernels\.\w+|cpp_fused\w*|torch\.ops\.aten\.[\w.]+)\(", re.MULTILINE)


class Letters:
    """A tokenizer with a letter an id, so that the age guard has its strings."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [ord(letter) % 500 for letter in text]

    def decode(self, ids: list[int], **kwargs: object) -> str:
        return "<think>" + "a" * len(ids)


def small_model(layers: int) -> EChatModel:
    torch.manual_seed(0)
    config = ModelConfig(
        encoder=EncoderConfig(dim=64, heads=2, ffn=64, layers=1),
        adapter=AdapterConfig(dim=64, heads=2, ffn=64, layers=1),
        llm=LlmConfig(config={**_SHAPE, "num_hidden_layers": layers}),
        vocabulary=Vocabulary(text_size=512, eos_id=511, unknown_id=None),
    )
    return EChatModel(config).eval()


def cost_of_a_token(model: EChatModel, kind: str, static: bool) -> Cost:
    made = Generator(model, Letters(), GenerationConfig())
    if static:
        made.use_static_step(_STATIC)

    def decode(new: int) -> None:
        prompt = flatten([Segment("prompt", (5, 6, 7))], [])
        asked = Request(
            kind,
            prompt,
            mode=Mode(text=_DRAWN, speech=_DRAWN, max_new=new),
            words=(),
            text_ids=(3,) if kind == "text2token" else (),
        )
        done = [event for _, event in made.generate([asked]) if isinstance(event, Done)]
        assert len(done[0].generated) == new, done

    return a_step(decode, 6, 12)


def compiled_kernels(model: EChatModel) -> int:
    """Calls of a compiled layer."""
    from torch._inductor.utils import run_and_get_code

    step = build_step(model)
    cache, cos_sin = step.cache(2, 256), step.cos_sin(256)
    with torch.inference_mode():
        at = step.at(torch.tensor([3, 5]), 1, 256, 256, masked=True)
        cos_sin_Bn = (cos_sin[0][at.column_Bn], cos_sin[1][at.column_Bn])
        x = torch.randn(2, 1, _SHAPE["hidden_size"])
        compiled = torch.compile(_Layer.__call__, dynamic=False)
        _, codes = run_and_get_code(compiled, step.layers[0], x, at, cos_sin_Bn, cache.keys[0], cache.values[0])
    assert len(codes) == 1, f"a layer became {len(codes)} graphs"
    return len(_CALL.findall(codes[0]))


def choosing_kernels() -> tuple[int, int]:
    """Kernels of penalty, guards and sampling of a speech id, and calls of the same compiled."""
    from torch._inductor.utils import run_and_get_code

    seen: list[tuple[Any, ...]] = []
    choose = StaticStep._choose

    def spy(*args: Any) -> torch.Tensor:
        seen.append(args)
        return choose(*args)

    StaticStep._choose = spy  # type: ignore[method-assign]
    try:
        cost_of_a_token(small_model(2), "text2token", True)
    finally:
        StaticStep._choose = choose  # type: ignore[method-assign]
    with torch.inference_mode():
        with Waits() as waits:
            expected = choose(*seen[-1])
        found, codes = run_and_get_code(torch.compile(choose, dynamic=False), *seen[-1])
    assert torch.equal(found, expected)
    assert len(codes) == 1, f"choosing became {len(codes)} graphs"
    return waits.kernels.total(), len(_CALL.findall(codes[0]))


def cost_of_a_chunk() -> Cost:
    """With mini's voice; chunks after the first ones are all alike."""
    voice = Token2Wav.load(MINI_VOICE, device="cpu")
    speaker = Speaker.load(MINI_VOICE / "speaker.safetensors")
    tokens = torch.randint(voice.config.flow.vocab_size, (400,), generator=torch.Generator().manual_seed(0)).tolist()

    def sound(chunks: int) -> None:
        stream = iter(voice.stream(iter(tokens), speaker))
        for _ in range(chunks):
            next(stream)

    return a_step(sound, 5, 8)


def cost_of_all_layers(kind: str, static: bool) -> tuple[Cost, float]:
    """Of a token of the released depth, and the kernels of one layer."""
    two, four = (cost_of_a_token(small_model(layers), kind, static) for layers in (2, 4))
    assert two.waits == four.waits, (two, four)
    layer = (four.kernels - two.kernels) / 2
    return Cost(two.kernels + (LAYERS - 2) * layer, two.waits), layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled count out")
    options = parser.parse_args()
    result, layer = dict[str, float](), 0.0
    for name, kind in (("text", "s2t_chat_think"), ("speech", "text2token")):
        usual, _ = cost_of_all_layers(kind, static=False)
        static, layer = cost_of_all_layers(kind, static=True)
        result |= {f"kernels_per_token_{name}_usual": usual.kernels, f"kernels_per_token_{name}": static.kernels}
        result |= {f"syncs_per_token_{name}_usual": usual.waits, f"syncs_per_token_{name}": static.waits}
    result["kernels_per_token"] = max(result["kernels_per_token_text"], result["kernels_per_token_speech"])
    result["syncs_per_token"] = max(result["syncs_per_token_text"], result["syncs_per_token_speech"])
    result["kernels_per_layer"] = layer
    if not options.no_compile:
        result["kernels_per_layer_compiled"] = compiled_kernels(small_model(1))
        choosing, result["kernels_of_choosing_compiled"] = choosing_kernels()
        result["kernels_of_choosing"] = choosing
        saved = LAYERS * (layer - result["kernels_per_layer_compiled"]) + choosing - result["kernels_of_choosing_compiled"]
        result["kernels_per_token_compiled"] = result["kernels_per_token"] - saved
    chunk = cost_of_a_chunk()
    result |= {"kernels_per_chunk": chunk.kernels, "syncs_per_chunk": chunk.waits}
    if options.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:36s} {value:8.1f}")


if __name__ == "__main__":
    main()
