"""Flow and vocoder training: batches, losses, pitch, critics, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from osum_echat import config
from osum_echat.token2wav.checkpoint import load_into, read_weights
from osum_echat.token2wav.config import SAMPLE_RATE, VocoderConfig, mel_frames
from osum_echat.token2wav.flow import FlowModel
from osum_echat.token2wav.model import Token2Wav
from osum_echat.token2wav.prompt import Speaker
from osum_echat.token2wav.vocoder import Vocoder
from osum_echat.training.token2wav import flow, speaker, tokenizer, vocoder
from osum_echat.training.token2wav.directory import describe
from osum_echat.training.token2wav.discriminators import CriticConfig, Critics, adversarial_loss, critic_loss, feature_loss
from osum_echat.training.token2wav.pitch import fundamental
from osum_echat.training.token2wav.spectral import MelLoss, SpectralLoss
from osum_echat.training.token2wav.spoken import Row, Spoken, regulated
from tests.token2wav_training_case import TINY_CRITICS, TINY_FLOW, TINY_RUN, TINY_TOKENIZER, TINY_VOCODER, vowels, write_records


def _shared(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "data": {"lists": [str(folder / "list.jsonl")], "held_out": 2},
        **TINY_RUN,
        "out": str(folder / "run"),
        "optim": {"warmup_steps": 1},
        "batch_size": 3,
        **more,
    }


@pytest.fixture
def campplus(tmp_path: Path) -> Path:
    """A speaker net that was hardly trained, and records with speech tokens."""
    write_records(tmp_path, tokens=True)
    target = tmp_path / "campplus.onnx"
    plain = _shared(tmp_path, model={"channels": 8, "pooled": 8}, target=str(target), speakers=str(tmp_path / "spk2info.pt"))
    speaker.SpeakerRecipe(config.from_dict(speaker.SpeakerTraining, plain)).export()
    return target


def _flow(folder: Path, campplus: Path, **more: Any) -> flow.FlowRecipe:
    plain = _shared(folder, model=TINY_FLOW, campplus=str(campplus), target=str(folder / "flow.pt"), **more)
    return flow.FlowRecipe(config.from_dict(flow.FlowTraining, plain))


def _vocoder(folder: Path, **more: Any) -> vocoder.VocoderRecipe:
    plain = _shared(folder, **{"model": TINY_VOCODER, "critics": TINY_CRITICS, "target": str(folder / "hift.pt"), **more})
    return vocoder.VocoderRecipe(config.from_dict(vocoder.VocoderTraining, plain))


def test_a_speaker_net_needs_several_voices_and_saves_those_that_are_asked_for(tmp_path: Path) -> None:
    write_records(tmp_path)
    paths = {"target": str(tmp_path / "campplus.onnx"), "speakers": str(tmp_path / "spk2info.pt")}

    def recipe(**more: Any) -> speaker.SpeakerRecipe:
        plain = _shared(tmp_path, model={"channels": 8, "pooled": 8}, **paths, **more)
        return speaker.SpeakerRecipe(config.from_dict(speaker.SpeakerTraining, plain))

    recipe(speaker_voices=["high"]).export()
    assert set(torch.load(tmp_path / "spk2info.pt")) == {"high"}
    with pytest.raises(ValueError, match="nobody"):
        recipe(speaker_voices=["nobody"])
    alone = {"lists": [str(tmp_path / "list.jsonl")], "held_out": 2, "voices": ["high"]}
    with pytest.raises(ValueError, match="tell voices apart"):
        recipe(data=alone)


# Flow ---------------------------------------------------------------------------------------------------------------------------


def test_training_regulates_tokens_as_synthesis_does(tmp_path: Path, campplus: Path) -> None:
    recipe = _flow(tmp_path, campplus)
    recipe.flow.eval()
    prompt, reply = recipe.train.get(0), recipe.train.get(2)
    assert prompt is not None and reply is not None
    batch = recipe.batch([Row([prompt, reply], len(prompt.mel_TM)), Row([reply], 0)])
    with torch.no_grad():
        mu_BTM = regulated(recipe.flow, batch)
        condition = recipe.flow.condition(
            torch.from_numpy(reply.tokens_N),
            torch.from_numpy(prompt.tokens_N),
            torch.from_numpy(prompt.mel_TM.astype(np.float32)),
            torch.zeros(80),
        )
    frames = condition.frames
    assert frames == len(prompt.mel_TM) + mel_frames(len(reply.tokens_N))
    torch.testing.assert_close(mu_BTM[0, :frames], condition.mu_TM, atol=1e-5, rtol=1e-4)
    assert torch.equal(batch.cond_BTM[0, :frames], condition.cond_TM)
    assert float(batch.cond_BTM[1].abs().sum()) == 0.0


def test_first_velocity_is_the_mean_mel(tmp_path: Path, campplus: Path) -> None:
    recipe = _flow(tmp_path, campplus)
    spoken = recipe.valid.get(0)
    assert spoken is not None
    bias = recipe.flow.decoder.estimator.final_proj.bias
    assert bias is not None
    assert float((bias.detach() - torch.from_numpy(spoken.mel_TM.astype(np.float32)).mean(0)).abs().mean()) < 1.5


def test_dropped_conditions_do_not_reach_the_estimator(tmp_path: Path, campplus: Path) -> None:
    recipe = _flow(tmp_path, campplus)
    recipe.flow.eval()
    spoken = recipe.train.get(0)
    assert spoken is not None
    other = Spoken((spoken.tokens_N + 7) % 256, spoken.mel_TM, -spoken.embedding_S)
    losses = {
        (name, drop): recipe._loss(recipe.batch([Row([row], 10)]), recipe.rng(1), drop)[1]["flow"]
        for name, row in (("one", spoken), ("other", other))
        for drop in (0.0, 1.0)
    }
    assert losses["one", 1.0] == losses["other", 1.0]
    assert losses["one", 0.0] != losses["other", 0.0]


def test_regulated_tokens_of_a_row_do_not_depend_on_batch_mates(tmp_path: Path, campplus: Path) -> None:
    recipe = _flow(tmp_path, campplus)
    recipe.flow.eval()
    batch = recipe.batch([Row([item], 0) for item in recipe.train.batch([0, 1, 2])])
    with torch.no_grad():
        mu_BTM = regulated(recipe.flow, batch)
        for b, row in enumerate(batch.rows):
            alone = regulated(recipe.flow, recipe.batch([row]))
            frames = len(row.mel_TM)
            torch.testing.assert_close(mu_BTM[b, :frames], alone[0, :frames], atol=1e-5, rtol=1e-4)
            assert float(mu_BTM[b, frames:].abs().sum()) == 0.0


def test_flow_training_lowers_its_loss(tmp_path: Path, campplus: Path) -> None:
    recipe = _flow(tmp_path, campplus, prior_weight=0.5)
    for group in recipe.optimizers["flow"].param_groups:
        group["lr"] = 5e-3
    history = [recipe.train_step(step) for step in range(40)]
    assert np.mean([h["flow"] for h in history[-8:]]) < 0.8 * np.mean([h["flow"] for h in history[:8]])
    assert history[-1]["prior"] < history[0]["prior"]


def test_tokens_that_do_not_fit_the_audio_are_counted_and_left_out(tmp_path: Path, campplus: Path) -> None:
    path = tmp_path / "list.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["extra"]["speech_token"] = [1] * 200
    rows[2]["extra"]["speech_token"] = [256] * len(rows[2]["extra"]["speech_token"])
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    recipe = _flow(tmp_path, campplus)
    for features in (recipe.train, recipe.valid):
        assert all(int(item.tokens_N.max()) < 256 for item in features)
    assert sum(recipe.train.skips.counts.values()) + sum(recipe.valid.skips.counts.values()) == 2


def test_flow_needs_the_speaker_net_and_says_how_to_get_it(tmp_path: Path, campplus: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.speaker"):
        _flow(tmp_path, tmp_path / "missing.onnx")


# Vocoder ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hertz", [85.0, 130.0, 220.0, 400.0])
def test_pitch_of_a_voice_is_found(hertz: float) -> None:
    f0 = fundamental(vowels("aiu", hertz, SAMPLE_RATE, 0.3), 77)[3:-3]
    assert float(np.mean(f0 > 0)) > 0.95
    assert float(np.median(np.abs(f0[f0 > 0] - hertz))) < 0.01 * hertz


def test_noise_and_silence_have_no_pitch() -> None:
    rng = np.random.default_rng(0)
    assert float(np.mean(fundamental(rng.standard_normal(SAMPLE_RATE).astype(np.float32) * 0.1, 86) > 0)) < 0.1
    assert not fundamental(np.zeros(SAMPLE_RATE, dtype=np.float32), 86).any()
    assert fundamental(np.zeros(0, dtype=np.float32), 0).shape == (0,)


def test_spectral_losses_are_zero_for_equal_sound_and_grow_with_the_difference() -> None:
    wave = torch.from_numpy(vowels("aiu", 120.0, SAMPLE_RATE))[None]
    spectral, mel = SpectralLoss(), MelLoss(torch.rand(20, 513), 1024, 256)
    assert float(spectral(wave, wave)) == 0.0
    assert float(mel(wave, wave)) == 0.0
    assert 0 < float(spectral(wave, wave * 0.9)) < float(spectral(wave, wave * 0.3))
    assert float(mel(wave, wave * 0.5)) == pytest.approx(np.log(2), rel=0.05)


def test_spectral_loss_of_silence_is_finite() -> None:
    wave = torch.zeros(1, 4096, requires_grad=True)
    loss = SpectralLoss()(wave, torch.zeros(1, 4096))
    loss.backward()
    assert torch.isfinite(loss)
    assert wave.grad is not None and torch.isfinite(wave.grad).all()


def test_critics_learn_to_tell_speech_from_noise() -> None:
    torch.manual_seed(0)
    critics = Critics(CriticConfig(periods=[2, 3], period_channels=[4, 8], resolutions=[256], resolution_channels=4))
    real = torch.from_numpy(vowels("aiu", 120.0, SAMPLE_RATE))[None, :4096]
    made = torch.randn(1, 4096) * 0.1
    optimizer = torch.optim.Adam(critics.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = critic_loss(critics(real), critics(made))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert adversarial_loss(critics(made)).item() > adversarial_loss(critics(real)).item()
    assert float(feature_loss(critics(real), critics(real)).detach()) == 0.0
    assert float(feature_loss(critics(real), critics(made)).detach()) > 0.1


def test_vocoder_training_lowers_its_loss_and_then_meets_the_critics(tmp_path: Path) -> None:
    write_records(tmp_path)
    recipe = _vocoder(tmp_path, adversarial_from=40, segment_frames=16)
    for optimizer in recipe.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = 5e-3
    history = [recipe.train_step(step) for step in range(42)]
    assert history[39]["spectral"] < 0.7 * history[0]["spectral"]
    assert "critics" not in history[39]
    assert {"critics", "adversarial", "features"} <= set(history[40])


def test_a_clip_shorter_than_a_segment_is_padded_with_silence(tmp_path: Path) -> None:
    write_records(tmp_path)
    recipe = _vocoder(tmp_path, segment_frames=400)
    clip = recipe.train.get(0)
    assert clip is not None
    crop = recipe._crop(clip, np.random.default_rng(0))
    assert (len(crop.mel_TM), len(crop.samples_S), len(crop.f0_T)) == (400, 400 * 256, 400)
    assert float(crop.mel_TM[-1].max()) == pytest.approx(np.log(1e-5), abs=0.01)


@pytest.mark.parametrize("head", ["spectrum", "filter"])
def test_exported_vocoder_has_the_names_that_synthesis_loads(tmp_path: Path, head: str) -> None:
    write_records(tmp_path)
    recipe = _vocoder(tmp_path, model={**TINY_VOCODER, "head": head}, export_half=True)
    paths = recipe.export()
    assert [p.name for p in paths] == ["hift.pt", "cosyvoice.yaml"]
    state, _ = read_weights(tmp_path, "hift")
    load_into(Vocoder(recipe.cfg.model), state, "hift.pt")


def test_filter_head_returns_the_excitation_when_it_changes_nothing() -> None:
    net = Vocoder(config.from_dict(VocoderConfig, TINY_VOCODER))
    source = torch.randn(1, 1, 20 * 256) * 0.1
    spectrum = net.spectrum(source)
    wave = net.to_wave(torch.zeros(1, 514, spectrum.shape[2]), spectrum)
    torch.testing.assert_close(wave, source[:, 0], atol=1e-5, rtol=1e-4)


# The whole directory ------------------------------------------------------------------------------------------------------------


def test_directory_keeps_the_other_parts_sizes(tmp_path: Path) -> None:
    recipe_flow = config.from_dict(flow.FlowConfig, TINY_FLOW)
    describe(tmp_path, flow=recipe_flow)
    describe(tmp_path, vocoder=config.from_dict(VocoderConfig, TINY_VOCODER))
    from osum_echat.token2wav.released_yaml import load_config

    found = load_config(tmp_path / "cosyvoice.yaml")
    assert found.flow.encoder == recipe_flow.encoder
    assert found.vocoder.head == "filter"
    assert found.vocoder.upsample_rates == (2,)


def test_a_directory_made_from_nothing_tokenizes_and_speaks(tmp_path: Path) -> None:
    path = write_records(tmp_path)
    folder = tmp_path / "model"
    shared = _shared(tmp_path)
    tokenizer_cfg = config.from_dict(
        tokenizer.TokenizerTraining, {**shared, "model": TINY_TOKENIZER, "target": str(folder / "speech_tokenizer_v1.onnx")}
    )
    tokenizer.TokenizerRecipe(tokenizer_cfg).export()
    spk = {"channels": 8, "pooled": 8}
    targets = {"target": str(folder / "campplus.onnx"), "speakers": str(folder / "spk2info.pt")}
    speaker.SpeakerRecipe(config.from_dict(speaker.SpeakerTraining, {**shared, "model": spk, **targets})).export()
    tools = {"campplus": targets["target"], "tokenizer": str(folder / "speech_tokenizer_v1.onnx")}
    flow_cfg = {**shared, "model": TINY_FLOW, "target": str(folder / "flow.pt"), **tools}
    flow.FlowRecipe(config.from_dict(flow.FlowTraining, flow_cfg)).export()
    _vocoder(tmp_path, target=str(folder / "hift.pt")).export()

    token2wav = Token2Wav.load(folder, device="cpu")
    assert set(token2wav.speakers) == {"low", "high"}
    wav = path.parent / "0.wav"
    tokens = token2wav.tokenize(str(wav))
    assert len(tokens) == 20  # 0.8 s at 25 a second
    samples, rate = token2wav.synthesize(tokens, token2wav.speakers["low"], steps=2)
    assert rate == SAMPLE_RATE
    assert samples.shape == (mel_frames(20) * 256,)
    assert np.isfinite(samples).all()
    prompted, _ = token2wav.synthesize(tokens, Speaker.from_wav(str(wav_of_a_second(tmp_path)), token2wav), steps=2)
    assert prompted.shape == samples.shape
    streamed = np.concatenate(list(token2wav.stream(iter(tokens), token2wav.speakers["low"], steps=2)))
    assert streamed.shape == samples.shape


def wav_of_a_second(folder: Path) -> Path:
    from osum_echat.audio import io

    path = folder / "prompt.wav"
    io.write(path, vowels("aiuaiu", 150.0), 16000)
    return path


def test_flow_weights_have_the_names_that_synthesis_loads(tmp_path: Path, campplus: Path) -> None:
    recipe = _flow(tmp_path, campplus, export_half=True)
    recipe.export()
    state, _ = read_weights(tmp_path, "flow")
    load_into(FlowModel(recipe.cfg.model), state, "flow.pt")


def test_prior_steps_train_the_encoder_and_leave_the_estimator_alone(tmp_path: Path, campplus: Path) -> None:
    recipe = _flow(tmp_path, campplus, prior_weight=1.0, prior_steps=2)
    before = {name: value.clone() for name, value in recipe.flow.state_dict().items()}
    assert set(recipe.train_step(0)) == {"prior", "grad"}
    after = recipe.flow.state_dict()
    changed = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert {"encoder", "length_regulator"} <= changed
    assert "decoder" not in changed
    assert set(recipe.train_step(2)) == {"flow", "prior", "grad"}


def test_prior_steps_without_its_weight_are_refused() -> None:
    with pytest.raises(ValueError, match="prior_weight"):
        config.from_dict(flow.FlowTraining, {"data": {"lists": ["x"]}, "prior_steps": 10})


def test_flow_and_vocoder_train_on_from_those_of_a_directory(tmp_path: Path, campplus: Path) -> None:
    first, voice = _flow(tmp_path, campplus), _vocoder(tmp_path)
    first.train_step(0)
    voice.train_step(0)
    first.export()
    voice.export()
    with torch.no_grad():
        before = first.validate(), voice.validate()
    again = _flow(tmp_path, campplus, init=str(tmp_path)), _vocoder(tmp_path, init=str(tmp_path))
    with torch.no_grad():
        assert (again[0].validate(), again[1].validate()) == before
    assert again[0].train_step(1)["flow"] > 0
    with pytest.raises(ValueError, match=r"neither flow\.safetensors nor flow\.pt"):
        _flow(tmp_path, campplus, init=str(tmp_path / "nowhere"))
