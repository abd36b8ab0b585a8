"""Prompt recordings, saved speakers, tokenization, and the tool that adds tokens to a list."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from osum_echat.token2wav import Speaker, Token2Wav
from osum_echat.token2wav.prompt import Frontend, token_count
from osum_echat.tools import draw_streaming, tokens
from tests.token2wav_case import recorded_speaker, write_directory, write_tokenizer


def voice(seconds: float, rate: int = 16_000) -> np.ndarray:
    t = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(0).standard_normal(len(t))
    return (0.3 * np.sin(2 * np.pi * (200 + 50 * np.sin(3 * t)) * t) + 0.01 * noise).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Token2Wav:
    return Token2Wav.load(write_directory(tmp_path_factory.mktemp("t2w"), onnx_models=True), device="cpu")


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_prompt_of_any_rate_and_either_channel_count_works(model: Token2Wav, tmp_path: Path, rate: int, channels: int) -> None:
    path = tmp_path / "prompt.wav"
    soundfile.write(path, np.repeat(voice(1.5, rate)[:, None], channels, axis=1), rate)
    speaker = Speaker.from_wav(path, model)
    assert speaker.mel.shape == (22050 * 3 // 2 // 256, 80)
    assert len(speaker.tokens) == 38 and speaker.embedding.shape == (192,)
    assert np.isfinite(model.synthesize([1, 2, 3], speaker, steps=1)[0]).all()


@pytest.mark.parametrize(("seconds", "message"), [(0.8, "at least 1 s"), (31.0, "at most 30 s")])
def test_a_prompt_too_short_or_too_long_is_refused_with_a_sentence(model: Token2Wav, seconds: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Speaker.from_wav((voice(seconds), 16_000), model)


def test_a_saved_speaker_sounds_the_same(model: Token2Wav, tmp_path: Path) -> None:
    speaker = Speaker.from_wav((voice(2.0), 16_000), model)
    speaker.save(tmp_path / "voice.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["voice.safetensors"]
    again = Speaker.load(tmp_path / "voice.safetensors")
    tokens = list(range(12))
    assert np.array_equal(*(model.synthesize(tokens, s, steps=2)[0] for s in (speaker, again)))


def test_another_file_is_not_a_speaker(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a speaker file"):
        Speaker.load(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="not found"):
        Speaker.load(tmp_path / "y.safetensors")


def test_trimmed_keeps_the_beginning(model: Token2Wav) -> None:
    speaker = Speaker.from_wav((voice(4.0), 16_000), model)
    short = speaker.trimmed(2.0)
    assert (len(short.tokens), len(short.mel)) == (50, 172)
    assert torch.equal(short.tokens, speaker.tokens[:50]) and torch.equal(short.mel, speaker.mel[:172])
    assert speaker.trimmed(9.0) is speaker


def test_tokens_and_mel_come_together() -> None:
    with pytest.raises(ValueError, match="must both be there"):
        Speaker(torch.arange(5), torch.zeros(0, 80), torch.zeros(192))


def test_tokenize_gives_25_ids_a_second(model: Token2Wav) -> None:
    ids = model.tokenize((voice(3.0, 48_000), 48_000))
    assert len(ids) == 75 and all(0 <= i < 4096 for i in ids) and len(set(ids)) > 3
    with pytest.raises(ValueError, match="at most 30 s"):
        model.tokenize((voice(30.5), 16_000))


def test_token_count_rounds_up_twice() -> None:
    assert token_count(np.array([1, 2, 4, 5, 8, 9, 925], dtype=np.int32)).tolist() == [1, 1, 1, 2, 2, 3, 232]


def test_a_batch_is_tokenized_as_single_recordings(model: Token2Wav, tmp_path: Path) -> None:
    waves = [torch.from_numpy(voice(s)) for s in (1.0, 2.3, 0.5)]
    single = [model.frontend.tokens(w) for w in waves]
    batch = model.frontend.tokens_of(waves)
    assert all(torch.equal(a, b) for a, b in zip(single, batch, strict=True))
    write_tokenizer(tmp_path / "speech_tokenizer_v1.onnx", batch=1)  # a model that takes one at a time
    one_at_a_time = Frontend(tmp_path, 4096).tokens_of(waves)
    assert all(torch.equal(a, b) for a, b in zip(single, one_at_a_time, strict=True))


def test_a_tokenizer_of_another_codebook_is_refused(model: Token2Wav) -> None:
    with pytest.raises(ValueError, match="does not belong to this flow model"):
        Frontend(model.frontend.directory, 16).tokens(torch.from_numpy(voice(1.0)))


def test_missing_onnx_models_are_named_when_needed(tmp_path: Path) -> None:
    bare = Token2Wav.load(write_directory(tmp_path), device="cpu")
    with pytest.raises(ValueError, match=r"speech_tokenizer_v1\.onnx is not there"):
        bare.tokenize((voice(1.0), 16_000))


def test_voices_of_spk2info_are_read_and_speak(tmp_path: Path) -> None:
    directory = write_directory(tmp_path)
    torch.save({"anna": {"embedding": torch.randn(1, 192)}}, directory / "spk2info.pt")
    model = Token2Wav.load(directory, device="cpu")
    samples, _ = model.synthesize([5, 6], model.speakers["anna"], steps=1)
    assert len(samples) == 6 * 256
    torch.save({"anna": 3}, directory / "spk2info.pt")
    with pytest.raises(ValueError, match=r"spk2info\.pt"):
        Token2Wav.load(directory, device="cpu")


@pytest.fixture
def raw_list(tmp_path: Path) -> Path:
    lines = []
    for i in range(7):
        soundfile.write(tmp_path / f"{i}.wav", voice(0.5 + 0.3 * i), 16_000)
        lines.append({"key": f"k{i}", "wav": f"{i}.wav", "txt": "hello", "task": "<TTS>", "extra": {"age": "<ADULT>"}})
    lines[2]["wav"] = "gone.wav"
    lines[4]["extra"] = {"speech_token": [1, 2, 3]}
    (tmp_path / "5.wav").write_bytes(b"not audio")
    path = tmp_path / "data.list"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n", encoding="utf-8")
    return path


def test_the_tool_adds_tokens_and_reports_what_it_left_out(model: Token2Wav, raw_list: Path) -> None:
    directory, output = model.frontend.directory, raw_list.with_name("out.list")
    counts = tokens.run(directory, raw_list, output, batch=3)
    assert dict(counts) == {"kept": 5, "missing": 1, "not_audio": 1, "bad_json": 1}
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [r["key"] for r in records] == ["k0", "k1", "k3", "k4", "k6"]
    assert records[0]["extra"]["speech_token"] == model.tokenize(str(raw_list.with_name("0.wav")))
    assert records[0]["extra"]["age"] == "<ADULT>"
    assert records[3]["extra"]["speech_token"] == [1, 2, 3]
    dropped = [json.loads(line) for line in raw_list.with_name("out.list.dropped").read_text(encoding="utf-8").splitlines()]
    assert [(d["line"], d["key"], d["reason"]) for d in dropped] == [
        (3, "k2", "missing"),
        (6, "k5", "not_audio"),
        (8, "", "bad_json"),
    ]
    with pytest.raises(ValueError, match="exists"):
        tokens.run(directory, raw_list, output)


def test_the_tool_continues_after_an_interruption(model: Token2Wav, raw_list: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = model.frontend.directory
    whole, output = raw_list.with_name("whole.list"), raw_list.with_name("out.list")
    tokens.run(directory, raw_list, whole, batch=2)
    tokenize, calls = Frontend.tokens_of, []

    def dies(self: Frontend, recordings: list) -> list:
        calls.append(len(recordings))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return tokenize(self, recordings)

    monkeypatch.setattr(Frontend, "tokens_of", dies)
    with pytest.raises(KeyboardInterrupt):
        tokens.run(directory, raw_list, output, batch=1)
    assert not output.exists()
    part = raw_list.with_name("out.list.part")
    part.write_bytes(part.read_bytes() + b'{"key": "torn')
    calls.append(0)
    tokens.run(directory, raw_list, output, batch=1)
    assert output.read_bytes() == whole.read_bytes()
    assert raw_list.with_name("out.list.dropped").read_bytes() == raw_list.with_name("whole.list.dropped").read_bytes()


def test_the_tool_does_not_continue_another_list(model: Token2Wav, raw_list: Path) -> None:
    raw_list.with_name("out.list.part").write_text('{"key": "other"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="another list"):
        tokens.run(model.frontend.directory, raw_list, raw_list.with_name("out.list"))


def test_the_picture_is_drawn(model: Token2Wav, tmp_path: Path) -> None:
    recorded_speaker().save(tmp_path / "voice.safetensors")
    arguments = ["--token2wav", str(model.frontend.directory), "--speaker", str(tmp_path / "voice.safetensors")]
    arguments += ["--tokens", "random:30:1", "--output", str(tmp_path / "p.png")]
    assert draw_streaming.main(arguments) == 0
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
