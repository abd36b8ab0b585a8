"""Recorded numbers of the published token2wav against ours: flow, estimator, encoder, regulator, HiFT, frontend,
streams.

Cases are found by file name and told apart by what they hold; a file or tensor without a rule is a failure. The weights
are the tiny seeded ones beside the cases (``tiny_flow_fp16``, ``tiny_hift_fp16``), whose sizes are `TINY`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from osum_echat.audio import features
from osum_echat.audio.resample import resample_sinc
from osum_echat.golden.report import CaseResult, not_understood
from osum_echat.token2wav.checkpoint import load_into, vocoder_state
from osum_echat.token2wav.compat import HOP_TOKENS, MEL_CACHE_FRAMES, OVERLAP_TOKENS, SOURCE_CACHE, ReferenceStream
from osum_echat.token2wav.config import EncoderConfig, EstimatorConfig, FlowConfig, Token2WavConfig, VocoderConfig, mel_frames
from osum_echat.token2wav.encoder import relative_table, stretch, stretch_reply
from osum_echat.token2wav.estimator import Padding
from osum_echat.token2wav.flow import FlowModel, time_grid
from osum_echat.token2wav.streaming import PromptState, SolverOptions
from osum_echat.token2wav.vocoder import Vocoder

FLOW, PITCH, WAVE, WAVE_RMS, DECODER, FRONTEND = 2e-5, 2e-3, 4e-3, 2e-4, 2e-5, 1e-3
LOG_MEL = 1e-4
"""The quietest bins carry float32 rounding of the FFT: the recorded log-mel is itself 1.6e-5 away from float64
arithmetic."""

TINY = Token2WavConfig(
    flow=FlowConfig(
        input_size=64,
        encoder=EncoderConfig(output_size=96, attention_heads=4, linear_units=160, num_blocks=2),
        estimator=EstimatorConfig(channels=(64, 64), attention_head_dim=32, num_heads=4, n_blocks=2, num_mid_blocks=2),
    ),
    vocoder=VocoderConfig(base_channels=64, f0_channels=48),
)

Results = Iterator[CaseResult]
Case = dict[str, Tensor]


@dataclass(frozen=True)
class Networks:
    """The tiny networks, with the recorded weights."""

    flow: FlowModel
    vocoder: Vocoder

    @classmethod
    def load(cls, directory: Path) -> Networks:
        """Weights are recorded in float16 and were used as float32."""
        flow, vocoder = FlowModel(TINY.flow).eval(), Vocoder(TINY.vocoder).eval()
        load_into(flow, load_file(directory / "tiny_flow_fp16.safetensors"), "tiny_flow_fp16")
        load_into(vocoder, vocoder_state(load_file(directory / "tiny_hift_fp16.safetensors")), "tiny_hift_fp16")
        return cls(flow, vocoder)


def worst(found: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference; infinite for another shape."""
    if found.shape != wanted.shape:
        return float("inf")
    return float((found.double() - wanted.double()).abs().max()) if wanted.numel() else 0.0


def rms(found: Tensor, wanted: Tensor) -> float:
    """Root mean square difference; infinite for another shape."""
    return float((found.double() - wanted.double()).square().mean().sqrt()) if found.shape == wanted.shape else float("inf")


def compare(case: str, recorded: Case, found: dict[str, Tensor], limit: float) -> Results:
    """One result for every tensor of ``found`` that the case holds, named case.tensor."""
    for name, value in found.items():
        if name in recorded:
            yield CaseResult(f"{case}.{name}", worst(value, recorded[name]), limit)


def wave(name: str, found: Tensor, wanted: Tensor) -> Results:
    yield CaseResult(name, worst(found, wanted), WAVE, "max")
    yield CaseResult(f"{name} (rms)", rms(found, wanted), WAVE_RMS, "rms")


def check_flow(case: str, data: Case, nets: Networks, _: Path) -> Results:
    """One reply through the whole flow, with what the recorder kept on the way."""
    flow = nets.flow
    tokens, prompt_tokens, prompt_mel = data["token"][0].long(), data["prompt_token"][0].long(), data["prompt_feat"][0]
    frames = len(prompt_mel)
    noise_TM = data["noise"][0].T.contiguous()
    spk_1M = flow.speaker(data["embedding"])
    joined = torch.cat((prompt_tokens, tokens))[None]
    x = flow.encoder.embed(flow.input_embedding(joined))
    table = relative_table(x.shape[1], x.shape[2], x.device, x.dtype)
    condition = flow.condition(tokens, prompt_tokens, prompt_mel, spk_1M[0])
    mu, cond = condition.mu_TM[None], condition.cond_TM[None]
    zero = torch.zeros_like(mu)

    def velocity(guided: bool) -> Tensor:
        parts = (mu, torch.zeros(1), spk_1M, cond) if guided else (zero, torch.zeros(1), 0 * spk_1M, zero)
        return flow.decoder.estimator(noise_TM[None], *parts)

    rate = flow.config.solver.inference_cfg_rate
    v_cond, v_uncond = velocity(True), velocity(False)
    both = torch.stack((noise_TM, condition.mu_TM))
    yield from compare(
        case,
        data,
        {
            "embed_out": x,
            "pos_emb": table[None],
            "enc_layer0": flow.encoder.encoders[0](x, table),
            "encoder_out": flow.encoder(flow.input_embedding(joined)),
            "h": flow.encode(joined),
            "h_regulated": mu,
            "mu": mu.transpose(1, 2),
            "conds": cond.transpose(1, 2),
            "spk_proj": spk_1M,
            "v_t0_cond": v_cond.transpose(1, 2),
            "v_t0_uncond": v_uncond.transpose(1, 2),
            "v_t0_cfg": ((1 + rate) * v_cond - rate * v_uncond).transpose(1, 2),
            "t_steps": torch.tensor(time_grid(10)[:-1]),
            "x_step5": _solve_part(flow, noise_TM, mu, spk_1M, cond, 5).transpose(1, 2),
            "flow_cache": torch.cat((both[:, :frames], both[:, -34:]), dim=1).permute(2, 1, 0)[None],
            "mel": flow.solve([condition], [noise_TM])[0].T[None],
        },
        FLOW,
    )


def _solve_part(flow: FlowModel, noise_TM: Tensor, mu: Tensor, spk: Tensor, cond: Tensor, steps: int) -> Tensor:
    """x after the first ``steps`` of ten Euler steps, written out."""
    grid, rate, x = time_grid(10), flow.config.solver.inference_cfg_rate, noise_TM[None]
    for k in range(steps):
        t = torch.tensor([grid[k]])
        with_, without = (
            flow.decoder.estimator(x, mu, t, spk, cond),
            flow.decoder.estimator(x, 0 * mu, t, 0 * spk, 0 * cond),
        )
        x = x + (grid[k + 1] - grid[k]) * ((1 + rate) * with_ - rate * without)
    return x


def check_estimator(case: str, data: Case, nets: Networks, _: Path) -> Results:
    """The estimator alone, with and without a padding mask (statistics over all frames, as recorded)."""
    aliases = {"x": ("x",), "mu": ("mu",), "t": ("t", "timesteps"), "spks": ("spks", "spk"), "cond": ("cond", "conds")}
    inputs = {name: next((data[k] for k in keys if k in data), None) for name, keys in aliases.items()}
    masks = {
        key: value for key, value in data.items() if ("mask" in key and not value.is_floating_point()) or key.startswith("mask")
    }
    used = {k for keys in aliases.values() for k in keys} | set(masks)
    outputs = [k for k in data if k not in used]
    lacking = [name for name, value in inputs.items() if value is None]
    if lacking or not outputs:
        yield not_understood(case, f"no tensor for {', '.join(lacking) or 'the output'} among {sorted(data)}")
        return

    def time_last(value: Tensor | None) -> Tensor:
        assert value is not None
        return value.float().transpose(1, 2)

    x, mu, cond = (time_last(inputs[k]) for k in ("x", "mu", "cond"))
    t, spks = inputs["t"], inputs["spks"]
    assert t is not None and spks is not None
    paddings: dict[str, Padding | None] = {"no mask": None}
    for key, mask in masks.items():
        mask_BT1 = mask.reshape(len(x), -1, 1).float()
        paddings[key] = Padding(mask_BT1, statistics="all")
    candidates = {
        name: nets.flow.decoder.estimator(
            x, mu, t.float().reshape(-1), spks.float().reshape(len(x), -1), cond, padding
        ).transpose(1, 2)
        for name, padding in paddings.items()
    }
    for key in sorted(outputs):
        errors = {name: worst(value, data[key]) for name, value in candidates.items()}
        best = min(errors, key=lambda name: errors[name])
        yield CaseResult(f"{case}.{key}", errors[best], FLOW, f"equals the run with {best}")


def check_encoder(case: str, data: Case, nets: Networks, _: Path) -> Results:
    """A padded batch through the encoder."""
    yield CaseResult(f"{case}.out", worst(nets.flow.encoder(data["xs"], data["mask"][:, 0] > 0), data["out"]), FLOW)


def check_regulator(case: str, data: Case, nets: Networks, _: Path) -> Results:
    """Length regulation for several prompts and lengths; the prompt's frames are in the name (pm75)."""
    for name in sorted({key.rpartition(".")[0] for key in data}):
        prompt, reply = data[f"{name}.x1"], data[f"{name}.x2"]
        frames = int(next(part[2:] for part in name.split("_") if part.startswith("pm")))
        stretched = stretch_reply(reply, nets.flow.config.input_frame_rate)
        if prompt.shape[1]:
            stretched = torch.cat((stretch(prompt, frames), stretched), dim=1)
        yield CaseResult(f"{case}.{name}", worst(nets.flow.length_regulator(stretched), data[f"{name}.out"]), FLOW)


def check_hift(case: str, data: Case, nets: Networks, _: Path) -> Results:
    """The vocoder: from the mel on, and once more with the recorded excitation, where the limit is tight."""
    vocoder, mel = nets.vocoder, data["mel"]
    harmonics, samples = vocoder.config.nb_harmonics + 1, data["wav"].shape[-1]
    phase = data["phase"].float().reshape(1, -1) if "phase" in data else torch.zeros(1, harmonics)
    noise = data["noise"].float().transpose(1, 2) if "noise" in data else torch.zeros(1, samples, harmonics)
    f0 = vocoder.f0(mel)
    if "f0" in data:
        yield CaseResult(f"{case}.f0", worst(f0, data["f0"]), PITCH, "Hz")
    if "uv" in data:
        voiced = (f0 > vocoder.config.nsf_voiced_threshold).repeat_interleave(samples // f0.shape[1], dim=1)[:, None]
        yield CaseResult(f"{case}.uv", worst(voiced.float(), data["uv"].float()), 0.0)
    source = vocoder.source(f0, phase, noise)
    cached = data.get("cache_source")
    if cached is not None:
        source = torch.cat((cached.float(), source[..., cached.shape[-1] :]), dim=-1)
    wanted = data.get("source")
    if wanted is not None:
        yield from wave(f"{case}.source", source, wanted)
    yield from wave(f"{case}.wav", vocoder.decode(mel, source), data["wav"])
    if wanted is not None:
        yield CaseResult(f"{case}.wav from the recorded source", worst(vocoder.decode(mel, wanted), data["wav"]), DECODER)
        yield from compare(case, data, _stages(vocoder, mel, wanted), DECODER)


def _stages(vocoder: Vocoder, mel: Tensor, source: Tensor) -> dict[str, Tensor]:
    """Intermediate tensors that the recorder kept, by forward hooks on our own decoder."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Any, Any, Tensor], None]:
        return lambda _module, _inputs, output: kept.__setitem__(name, output)

    last = len(vocoder.config.resblock_kernel_sizes) - 1
    watched = {
        "source_down0": vocoder.source_downs[0],
        "source_res0": vocoder.source_resblocks[0],
        "stage0_last_resblock": vocoder.resblocks[last],
        "conv_post": vocoder.conv_post,
    }
    handles = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    spectrum = vocoder.spectrum(source)
    vocoder.shape(mel, spectrum)
    for handle in handles:
        handle.remove()
    return {"source_stft": spectrum, **kept}


def check_stft(case: str, data: Case, nets: Networks, _: Path) -> Results:
    """The short transforms alone, with magnitudes above the clip."""
    spectrum = nets.vocoder.spectrum(data["stft_in"][:, None])
    real, imag = spectrum.chunk(2, dim=1)
    yield CaseResult(f"{case}.stft", max(worst(real, data["stft_real"]), worst(imag, data["stft_imag"])), DECODER)
    magnitude = data["magnitude"].clamp(max=100.0)
    window = torch.hann_window(16)
    found = torch.istft(torch.polar(magnitude, data["phase"]), 16, 4, window=window)
    # To say the same through the vocoder: log magnitude in, and a phase that sin can give.
    yield CaseResult(f"{case}.istft", worst(found, data["wav"]) / float(data["wav"].abs().max()), DECODER, "relative")
    small = data["phase"].clamp(-1, 1)
    ours = nets.vocoder.to_wave(torch.cat((data["magnitude"].log(), small.asin()), dim=1))
    limit = nets.vocoder.config.audio_limit
    direct = torch.istft(torch.polar(magnitude, small), 16, 4, window=window).clamp(-limit, limit)
    yield CaseResult(f"{case}.clip", worst(ours, direct), 1e-3, "magnitudes above 100 clipped")


def check_frontend(case: str, data: Case, _: Networks, __: Path) -> Results:
    """Resamplers, prompt mel, filter bank, log-mel."""
    wave_48k = data["wav48k"]
    wave_22k, wave_16k = resample_sinc(wave_48k, 48_000, 22_050), resample_sinc(wave_48k, 48_000, 16_000)
    pcm = torch.from_numpy(data["pcm48k"].numpy().astype(np.float32) / 32768)[None]
    bank = torch.from_numpy(features.mel_filter_bank(22_050, 1024, 80, 8_000.0)).T.float()
    found = {
        "wav48k": pcm,
        "wav22k": wave_22k,
        "wav16k_from48k": wave_16k,
        "wav16k_from22k": resample_sinc(data["wav22k"], 22_050, 16_000),
        "wav22k_from16k": resample_sinc(data["wav16k_from48k"], 16_000, 22_050),
        "mel_filterbank_22k": bank,
        "prompt_mel_BFT": features.mel_22k(data["wav22k"]).transpose(1, 2),
        "prompt_feat_BTF": features.mel_22k(data["wav22k"]),
    }
    yield from compare(case, data, found, FRONTEND)
    samples = data["wav16k_from22k"][0]  # the published order: file, 22.05 kHz, 16 kHz
    kaldi = features.kaldi_fbank(samples)
    yield from compare(
        case, data, {"kaldi_fbank": kaldi, "kaldi_fbank_meansub": kaldi - kaldi.mean(dim=0, keepdim=True)}, FRONTEND
    )
    log_mel = features.LogMel(128)(samples).T[None]
    yield from compare(case, data, {"whisper_logmel128": log_mel}, LOG_MEL)
    found |= {"kaldi_fbank": kaldi, "kaldi_fbank_meansub": kaldi, "whisper_logmel128": log_mel, "pcm48k": pcm}
    for name in sorted(set(data) - set(found)):
        yield not_understood(f"{case}.{name}", "no rule for this tensor")


class RecordedDraws:
    """The recorded noise of each chunk; the sine source was recorded with neither phase nor noise."""

    def __init__(self, data: Case, harmonics: int) -> None:
        self.data, self.harmonics = data, harmonics

    def flow(self, chunk: int, frames: int) -> Tensor:
        return self.data[f"c{chunk}.noise"][0].T.contiguous()

    def vocoder(self, chunk: int, samples: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, self.harmonics), torch.zeros(1, samples, self.harmonics)


def check_stream(case: str, data: Case, nets: Networks, directory: Path) -> Results:
    """The published chunk loop; ``stream_meta.json`` says which cases were whole replies and at what speed."""
    about = directory / "stream_meta.json"
    meta = json.loads(about.read_text(encoding="utf-8")).get(case.removeprefix("stream_"), {}) if about.is_file() else {}
    prompt = PromptState(data["prompt_token"][0].long(), data["prompt_feat"][0], nets.flow.speaker(data["embedding"])[0])
    draws = RecordedDraws(data, nets.vocoder.config.nb_harmonics + 1)
    stream = ReferenceStream(nets.flow, nets.vocoder, prompt, draws, SolverOptions())
    tokens = data["token"][0].tolist()
    streaming, speed = meta.get("stream", "nonstream" not in case), meta.get("speed", 1.0)
    chunks = list(stream.run(iter(tokens))) if streaming else [stream.whole(tokens, speed)]
    wanted = 1 + max(int(key[1:].partition(".")[0]) for key in data if key[0] == "c" and key[1].isdigit())
    yield CaseResult(f"{case} chunks", abs(len(chunks) - wanted), 0.0, f"{len(chunks)} chunks")
    for index, (chunk, facts) in enumerate(zip(chunks, meta.get("chunks", [{}] * len(chunks)), strict=True)):
        name = f"{case}.c{index}"
        recorded = {key.partition(".")[2]: value for key, value in data.items() if key.startswith(f"c{index}.")}
        samples = facts.get("wav_samples_out", recorded["wav"].shape[-1])
        yield CaseResult(f"{name} samples", abs(len(chunk.wave_S) - samples), 0.0, f"{len(chunk.wave_S)} samples")
        cache = chunk.flow_cache.permute(2, 1, 0)[None]
        mels = {"flow_mel": chunk.mel_TM.T[None], "flow_cache": cache, "hift_mel": chunk.vocoded_TM.T[None]}
        yield from compare(name, recorded, mels, FLOW)
        for key, value in (
            ("hift_source", chunk.source_S[None, None]),
            ("hift_wav_raw", chunk.raw_S[None]),
            ("wav", chunk.wave_S[None]),
        ):
            if key in recorded:
                yield from wave(f"{name}.{key}", value, recorded[key])


def check_lengths(path: Path) -> Results:
    """Frames for every number of tokens, and the time grid."""
    data = json.loads(path.read_text(encoding="utf-8"))
    wrong = [n for n, frames in data["mel_len_for_tokens"].items() if mel_frames(int(n)) != frames]
    yield CaseResult("lengths.mel_len_for_tokens", len(wrong), 0.0, f"wrong for {wrong[:5]}" if wrong else "")
    grid = torch.tensor(time_grid(10)) - torch.tensor(data["t_span_cosine10"])
    yield CaseResult("lengths.t_span_cosine10", float(grid.abs().max()), 1e-6)
    yield CaseResult("lengths.mel_overlap_len", abs(mel_frames(OVERLAP_TOKENS) - data["mel_overlap_len"]), 0.0)
    yield CaseResult("lengths.cfg_rate", abs(FlowConfig().solver.inference_cfg_rate - data["cfg_rate"]), 0.0)


def check_manifest(path: Path) -> Results:
    """Names and shapes of the full-size checkpoints."""
    listing = json.loads(path.read_text(encoding="utf-8"))
    shapes = {key: tuple(value) for key, value in listing.get("tensors", listing).items() if isinstance(value, list)}
    with torch.device("meta"):
        is_flow = path.stem.endswith("flow")
        network = FlowModel(FlowConfig()) if is_flow else Vocoder(VocoderConfig())
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
        state = state if is_flow else vocoder_state(state)
    ours = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in state.items()}
    odd = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    yield CaseResult(path.stem, len(odd), 0.0, f"{len(shapes)} tensors" if not odd else f"differ: {odd[:5]}")


def check_stream_meta(path: Path) -> Results:
    """The constants and, for every described stream, its chunk sizes (those with recorded audio are checked again as
    cases)."""
    meta = json.loads(path.read_text(encoding="utf-8"))
    ours = {
        "token_min_hop_len": HOP_TOKENS,
        "token_overlap_len": OVERLAP_TOKENS,
        "mel_overlap_len": mel_frames(OVERLAP_TOKENS),
        "mel_cache_len": MEL_CACHE_FRAMES,
        "source_cache_len": SOURCE_CACHE,
    }
    for name, value in ours.items():
        if name in meta["constants"]:
            yield CaseResult(f"stream_meta.{name}", abs(value - meta["constants"][name]), 0.0)


CHECKS: dict[str, Callable[[str, Case, Networks, Path], Results]] = {
    "flow_": check_flow,
    "estimator": check_estimator,
    "encoder": check_encoder,
    "length_regulator": check_regulator,
    "hift_": check_hift,
    "stft": check_stft,
    "frontend": check_frontend,
    "stream_": check_stream,
}
DESCRIPTIONS = {
    "lengths.json": check_lengths,
    "manifest_flow.json": check_manifest,
    "manifest_hift.json": check_manifest,
    "stream_meta.json": check_stream_meta,
}
NOT_CASES = {"README.md", "sensitivity.json", "tiny_flow_fp16.safetensors", "tiny_hift_fp16.safetensors"}
"""Weights and descriptions: nothing in them can be computed and compared."""


def check_file(path: Path, nets: Networks) -> list[CaseResult]:
    """All results of one file."""
    if path.name in DESCRIPTIONS:
        return list(DESCRIPTIONS[path.name](path))
    check = next((c for prefix, c in CHECKS.items() if path.name.startswith(prefix)), None)
    if check is None or path.suffix != ".safetensors":
        return [not_understood(path.name, "no rule for a file of this name")]
    try:
        with torch.inference_mode():
            results = list(check(path.stem, load_file(path), nets, path.parent))
    except (KeyError, ValueError, RuntimeError) as error:
        return [not_understood(path.stem, f"{type(error).__name__}: {error}")]
    return results or [not_understood(path.stem, "it holds nothing that is compared")]


def run(directory: Path) -> list[CaseResult]:
    """Every case of ``directory``."""
    if not (directory / "tiny_flow_fp16.safetensors").is_file() or not (directory / "tiny_hift_fp16.safetensors").is_file():
        return [not_understood(str(directory), "the tiny weights of the recorded cases are not there")]
    nets = Networks.load(directory)
    paths = sorted(p for p in directory.iterdir() if p.is_file() and p.name not in NOT_CASES)
    return [result for path in paths for result in check_file(path, nets)]
