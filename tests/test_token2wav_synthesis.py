"""Offline synthesis: seeds, batches, edge cases, and networks whose fast forms equal their plain ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from osum_echat.device import cpu
from osum_echat.golden import token2wav as golden
from osum_echat.token2wav import Speaker, Token2Wav, encoder, vocoder_stream
from osum_echat.token2wav.config import EncoderConfig, EstimatorConfig, VocoderConfig, mel_frames
from osum_echat.token2wav.draws import Draws, NoiseField
from osum_echat.token2wav.encoder import RelativeAttention, TokenEncoder, relative_table
from osum_echat.token2wav.estimator import Estimator, Padding, mish
from osum_echat.token2wav.fast_vocoder import FastConv, FastVocoder, bases
from osum_echat.token2wav.flow import Condition
from osum_echat.token2wav.vocoder import SineSource, Snake, Vocoder
from tests.token2wav_case import DATA, recorded_speaker, recorded_tokens, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Token2Wav:
    return tiny_model(tmp_path_factory.mktemp("t2w"))


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return recorded_speaker()


def test_length_rate_and_range(model: Token2Wav, speaker: Speaker) -> None:
    samples, rate = model.synthesize(recorded_tokens(60), speaker)
    assert (rate, samples.dtype, samples.shape) == (22050, np.float32, (206 * 256,))
    assert 0.01 < np.abs(samples).max() <= 0.99


def test_the_same_seed_gives_the_same_samples(model: Token2Wav, speaker: Speaker) -> None:
    tokens = recorded_tokens(20)
    first, again, other = (model.synthesize(tokens, speaker, seed=seed)[0] for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_synthesis_leaves_the_global_random_state_alone(model: Token2Wav, speaker: Speaker) -> None:
    before = torch.get_rng_state()
    model.synthesize(recorded_tokens(5), speaker, steps=1)
    assert torch.equal(before, torch.get_rng_state())


def test_a_batch_of_different_lengths_equals_single_replies(model: Token2Wav, speaker: Speaker) -> None:
    bare = Speaker.from_embedding(speaker.embedding)
    replies = [recorded_tokens(n) for n in (37, 0, 70, 1, 36)]
    speakers = [speaker, speaker, bare, speaker, bare]
    waves, rate = model.synthesize(replies, speakers)
    assert rate == 22050 and len(waves) == 5
    for wave, tokens, voice in zip(waves, replies, speakers, strict=True):
        alone = model.synthesize(tokens, voice)[0]
        assert wave.shape == alone.shape
        # The pitch of a padded row differs by rounding, which the phase sum makes larger.
        assert wave.size == 0 or np.abs(wave - alone).max() < 2e-3


def test_a_large_batch_is_solved_in_parts(model: Token2Wav, speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osum_echat.token2wav.model.BATCH_FRAMES", 300)
    replies = [recorded_tokens(n) for n in (10, 30, 20, 25)]
    assert [list(p) for p in model._parts([torch.tensor(r) for r in replies], [speaker] * 4)] == [[1], [3], [2, 0]]
    waves, _ = model.synthesize(replies, speaker, steps=1)
    assert [len(w) for w in waves] == [256 * mel_frames(n) for n in (10, 30, 20, 25)]


def test_no_tokens_give_no_samples(model: Token2Wav, speaker: Speaker) -> None:
    samples, rate = model.synthesize([], speaker)
    assert (samples.shape, rate) == ((0,), 22050)
    assert list(model.stream([], speaker)) == []
    assert model.synthesize([], [])[0] == []


def test_one_token_works(model: Token2Wav, speaker: Speaker) -> None:
    samples, _ = model.synthesize([17], speaker)
    assert samples.shape == (3 * 256,) and np.isfinite(samples).all()


@pytest.mark.parametrize("bad", [-1, 4096, 70000])
def test_ids_outside_the_codebook_are_named(model: Token2Wav, speaker: Speaker, bad: int) -> None:
    with pytest.raises(ValueError, match=f"speech token {bad} at position 2 is outside 0..4095"):
        model.synthesize([1, 2, bad, 3], speaker)
    with pytest.raises(ValueError, match=f"speech token {bad}"):
        list(model.stream([1, 2, bad, 3], speaker))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed": 0.0}, "speed"),
        ({"steps": 0}, "steps"),
        ({"guidance": -1.0}, "guidance"),
        ({"schedule": "steep"}, "schedule"),
        ({"seed": -1}, "seed"),
    ],
)
def test_arguments_out_of_range_are_named(model: Token2Wav, speaker: Speaker, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.synthesize([1, 2, 3], speaker, **options)


def test_speed_steps_guidance_and_schedule_change_the_sound(model: Token2Wav, speaker: Speaker) -> None:
    tokens = recorded_tokens(60)
    assert len(model.synthesize(tokens, speaker, speed=1.25, steps=1)[0]) == 164 * 256
    plain = model.synthesize(tokens[:10], speaker)[0]
    for options in ({"steps": 4}, {"guidance": 0.0}, {"schedule": "linear"}):
        other = model.synthesize(tokens[:10], speaker, **options)[0]
        assert other.shape == plain.shape and np.abs(other - plain).max() > 1e-3


def test_bfloat16_stays_close(model: Token2Wav, speaker: Speaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.LIMIT, "bfloat16")  # also on a CPU that would take float32
    half = tiny_model(tmp_path, dtype="bfloat16")
    state, other = model.prompt_state(speaker), half.prompt_state(speaker)
    tokens = torch.tensor(recorded_tokens(30))
    noise = torch.randn(173, 80, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        mels = [
            m.flow.solve([m.flow.condition(tokens, p.tokens_P, p.mel_TM, p.spk_M)], [noise])[0]
            for m, p in ((model, state), (half, other))
        ]
    assert mels[1].dtype == torch.float32
    error = (mels[1] - mels[0]).square().mean().sqrt() / mels[0].std()
    assert 0 < error < 0.05


def test_what_depends_on_the_speaker_is_computed_once(
    model: Token2Wav, speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = model.prompt_state(speaker)

    def again(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(model.flow, "speaker", again)
    assert model.prompt_state(speaker) is state
    model.synthesize([1, 2, 3], speaker, steps=1)


def test_a_speaker_of_other_sizes_is_refused(model: Token2Wav) -> None:
    with pytest.raises(ValueError, match="this directory needs 192"):
        model.synthesize([1], Speaker.from_embedding(torch.zeros(64)))


def test_encoder_in_query_blocks_equals_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = TokenEncoder(16, EncoderConfig(output_size=32, attention_heads=4, linear_units=32, num_blocks=2)).eval()
    x = torch.randn(2, 45, 16)
    mask = torch.arange(45) < torch.tensor([[45], [30]])
    with torch.no_grad():
        whole = net(x, mask)
        monkeypatch.setattr(encoder, "QUERY_BLOCK", 7)
        assert (net(x, mask) - whole).abs().max() < 1e-5


def test_relative_scores_are_those_of_the_distance() -> None:
    """Against the definition: score[i, j] uses the table row of distance i - j."""
    torch.manual_seed(0)
    net, length = RelativeAttention(8, 2).eval(), 5
    q, table = torch.randn(1, 2, length, 4), relative_table(length, 8, torch.device("cpu"), torch.float32)
    p = net._split(net.linear_pos(table))
    found = net._position_scores(q[:, :, 2:], p, 2, length)
    for i in range(2, length):
        for j in range(length):
            wanted = (q[0, :, i] * p[:, length - 1 - (i - j)]).sum(dim=-1) / 2.0
            assert (found[0, :, i - 2, j] - wanted).abs().max() < 1e-5


def test_encoder_memory_does_not_grow_with_the_square() -> None:
    """The largest tensor that the encoder makes for L tokens grows as L: attention never holds [H, L, L]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    net = TokenEncoder(8, EncoderConfig(output_size=16, attention_heads=2, linear_units=16, num_blocks=1)).eval()
    sizes = []
    for length in (1000, 2000):
        with torch.inference_mode(), Largest() as mode:
            net(torch.randn(1, length, 8))
        sizes.append(mode.numel)
    assert sizes[1] < 2.2 * sizes[0]


@pytest.mark.parametrize("lengths", [(31, 22), (30, 1), (17, 17)])
def test_estimator_rows_do_not_depend_on_padding(lengths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    net = Estimator(
        80, EstimatorConfig(channels=(32, 32), attention_head_dim=8, num_heads=2, n_blocks=1, num_mid_blocks=1)
    ).eval()
    frames = max(lengths)
    x, mu, cond = (torch.randn(2, frames, 80) for _ in range(3))
    spk, t = torch.randn(2, 80), torch.tensor([0.3, 0.6])
    with torch.no_grad():
        both = net(x, mu, t, spk, cond, Padding.of(torch.tensor(lengths), frames))
        for row, n in enumerate(lengths):
            one = slice(row, row + 1)
            alone = net(x[one, :n], mu[one, :n], t[one], spk[one], cond[one, :n])
            assert (both[row, :n] - alone[0]).abs().max() < 1e-5


def test_mish_of_inference_is_that_of_training() -> None:
    x = torch.cat((torch.linspace(-30.0, 30.0, 4001), torch.tensor([-1e4, -88.0, 0.0, 88.0, 1e4])))
    with torch.no_grad():
        assert (mish(x) - F.mish(x.double())).abs().div(x.abs().clamp(min=1.0)).max() < 3e-7
    slope = x.clone().requires_grad_()
    mish(slope).sum().backward()
    assert slope.grad is not None and bool(slope.grad.isfinite().all())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("lengths", [(31, 22), (17, 17)])
def test_prepared_flow_equals_the_plain_one(lengths: tuple[int, int], packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if packed and not cpu.packs(torch.float32):
        pytest.skip("this CPU or build of PyTorch has no oneDNN operators to pack for")
    monkeypatch.setattr(cpu, "packs", lambda _: packed)
    plain = golden.Networks.load(DATA).flow
    fast = golden.Networks.load(DATA).flow
    torch.manual_seed(0)
    noises = [torch.randn(n, 80) for n in lengths]
    conditions = [Condition(torch.randn(n, 80), torch.randn(80), torch.randn(n, 80), 3) for n in lengths]
    with torch.inference_mode():
        fast.prepare()
        assert not any(key.endswith("to_q.weight") for key in fast.state_dict())
        for a, b in zip(plain.solve(conditions, noises, 3), fast.solve(conditions, noises, 3), strict=True):
            assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize(("tile", "taps"), [(16, 7), (32, 11), (8, 3)])
def test_transform_bases_give_the_convolution(tile: int, taps: int) -> None:
    into, weight, back = bases(tile, taps)
    x, w = torch.randn(tile, dtype=torch.float64), torch.randn(taps, dtype=torch.float64)
    wanted = torch.stack([(x[i : i + taps] * w).sum() for i in range(tile - taps + 1)])
    assert len(into) == 3 * tile // 2 - 1
    assert (back @ ((into @ x) * (weight @ w)) - wanted).abs().max() < 1e-12


@pytest.mark.parametrize(("channels", "taps", "dilation"), [(96, 11, 1), (96, 11, 5), (96, 7, 3), (96, 3, 5), (16, 11, 3)])
@pytest.mark.parametrize("frames", [1, 40, 333])
def test_fast_convolution_equals_the_plain_one(
    channels: int, taps: int, dilation: int, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("osum_echat.token2wav.fast_vocoder.BLOCK", 120)
    torch.manual_seed(0)
    snake, conv = Snake(channels), nn.Conv1d(channels, channels, taps, dilation=dilation, padding=(taps - 1) * dilation // 2)
    with torch.no_grad():
        snake.alpha.uniform_(0.5, 2.0)
        x_BTC = torch.randn(5, frames, channels)
        fast = FastConv(snake, conv)
        assert bool(fast.tile) == (channels == 96 and taps > 3)
        assert (fast(x_BTC) - conv(snake(x_BTC.transpose(1, 2))).transpose(1, 2)).abs().max() < 1e-5


def test_fast_vocoder_equals_the_plain_one() -> None:
    torch.manual_seed(0)
    config = VocoderConfig(base_channels=384, f0_channels=16)  # wide enough for the transforms
    plain, fast = Vocoder(config).eval(), FastVocoder(config).eval()
    fast.load_state_dict(plain.state_dict())
    mel, source = torch.randn(2, 80, 12), 0.1 * torch.randn(2, 1, 12 * 256)
    with torch.no_grad():
        assert (fast.prepare().decode(mel, source) - plain.decode(mel, source)).abs().max() < 1e-5


def test_a_long_reply_is_vocoded_in_pieces_without_a_trace(model: Token2Wav, monkeypatch: pytest.MonkeyPatch) -> None:
    mel = torch.randn(150, 80, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = vocoder_stream.vocode(model.vocoder, mel, Draws(0, 80, 9))
        monkeypatch.setattr(vocoder_stream, "PIECE_FRAMES", 64)
        pieces = vocoder_stream.vocode(model.vocoder, mel, Draws(0, 80, 9))
    assert pieces.shape == whole.shape
    assert (pieces - whole).abs().max() < 1e-3


def test_noise_field_does_not_depend_on_how_it_is_read() -> None:
    whole = NoiseField(80, 5).rows(0, 100)
    field = NoiseField(80, 5)
    parts = [field.rows(0, 7), field.rows(3, 40), field.rows(30, 100)]
    assert torch.equal(torch.cat((parts[0], parts[1][4:], parts[2][10:])), whole)
    assert not torch.equal(NoiseField(80, 6).rows(0, 100), whole)


def test_sine_phase_stays_exact_over_a_minute(model: Token2Wav) -> None:
    source = model.vocoder.m_source
    f0 = torch.full((1, 5168), 423.7)
    turns, _ = source.turns(f0)
    n = 5168 * 256
    wanted = (
        torch.arange(1, n + 1, dtype=torch.float64)[:, None]
        * torch.arange(1, 10, dtype=torch.float64)
        * float(f0[0, 0])
        / 22050
        % 1
    )
    error = (turns[0].double() - wanted + 0.5) % 1 - 0.5
    assert error.abs().max() < 1e-4


def test_aligned_harmonics_from_a_table_are_the_sum_of_their_sines() -> None:
    config = VocoderConfig(nb_harmonics=63, nsf_aligned=True)
    source = SineSource(config).eval()
    f0_1T = torch.full((1, 30), 123.4)
    f0_1T[:, 10:14] = 0.0
    silent = torch.zeros(1, 30 * 256, 64)
    start_1H = (torch.rand(1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 65.0)) % 1
    with torch.inference_mode():
        for start in (None, start_1H):
            whole, after_1H = source(f0_1T, torch.zeros(1, 64), silent, start)
            table, after_11 = source(f0_1T, torch.zeros(1, 1), silent[..., :1], None if start is None else start[:, :1])
            torch.testing.assert_close(table, whole, atol=3e-4, rtol=0)
            torch.testing.assert_close(after_11, after_1H[:, :1])
        noise = torch.randn(1, 30 * 256, 64, generator=torch.Generator().manual_seed(1))
        quiet = torch.zeros_like(f0_1T)
        spread = [source(quiet, torch.zeros(1, n.shape[-1]), n)[0].std() for n in (noise, noise[..., :1])]
    torch.testing.assert_close(spread[1], spread[0], rtol=0.05, atol=0)
