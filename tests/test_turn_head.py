"""The turn head: in a model, in a checkpoint, and as what turn detection asks."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from osum_echat.generation.request import encode_recordings, split_audio
from osum_echat.model import checkpoint
from osum_echat.model.config import load_config
from osum_echat.model.echat import AudioFeatures, EChatModel
from osum_echat.model.turn import LABELS, LAST_FRAMES, TurnHead
from osum_echat.serving.turn_head import TurnHeadDetector
from osum_echat.serving.vad import SmartTurn, TurnModels

DATA = Path(__file__).parent / "data" / "osum"


def head(seed: int = 0) -> TurnHead:
    torch.manual_seed(seed)
    return TurnHead(12).eval()


def test_a_recording_has_the_same_logits_alone_and_padded() -> None:
    frames, lengths = [torch.randn(1, n, 12) for n in (7, 30, 260)], [7, 30, 260]
    padded = torch.full((3, 260, 12), 9.0)
    for row, some in zip(padded, frames, strict=True):
        row[: some.shape[1]] = some[0]
    together = head()([padded[..., :4], padded[..., 4:]], torch.tensor(lengths))
    alone = [head()([some], torch.tensor([n])) for some, n in zip(frames, lengths, strict=True)]
    assert together.shape == (3, len(LABELS))
    torch.testing.assert_close(together, torch.cat(alone))


def test_only_the_last_seconds_matter() -> None:
    frames = torch.randn(1, LAST_FRAMES + 100, 12)
    changed = frames.clone()
    changed[:, :100] = 0
    at_the_end = frames.clone()
    at_the_end[:, -1] = torch.randn(12)
    [length] = frames.shape[1:2]
    found = [head()([some], torch.tensor([length])) for some in (frames, changed, at_the_end)]
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    torch.testing.assert_close(found[0], head()([frames[:, 100:]], torch.tensor([LAST_FRAMES])))


def model_with_head() -> EChatModel:
    config = load_config(DATA / "tiny_config.yaml")
    torch.manual_seed(0)
    return EChatModel(replace(config, adapter=replace(config.adapter, turn=LABELS))).eval()


def test_a_model_says_where_each_turn_stands_and_a_checkpoint_keeps_the_head(tmp_path: Path) -> None:
    model = model_with_head()
    recordings = [torch.randn(n, model.config.encoder.mels) for n in (80, 200)]
    heard = encode_recordings(model, recordings)
    assert heard is not None
    one, other = split_audio(heard)
    assert one.turn_logits_NC is not None and one.turn_logits_NC.shape == (1, len(LABELS))
    alone = encode_recordings(model, recordings[1:])
    assert alone is not None
    torch.testing.assert_close(other.turn_logits_NC, alone.turn_logits_NC, atol=1e-4, rtol=1e-4)
    _, tokenizer = checkpoint.load_model(DATA / "tiny.safetensors", DATA / "tiny_config.yaml")
    checkpoint.save_model(model, tokenizer, tmp_path / "kept")
    again, _ = checkpoint.load_model(tmp_path / "kept")
    assert again.turn is not None and again.turn.labels == LABELS
    torch.testing.assert_close(dict(again.turn.state_dict()), dict(model.turn.state_dict()))  # type: ignore[union-attr]


def test_without_a_head_nothing_is_said() -> None:
    model = EChatModel(load_config(DATA / "tiny_config.yaml")).eval()
    heard = encode_recordings(model, [torch.randn(80, model.config.encoder.mels)])
    assert heard is not None and heard.turn_logits_NC is None and model.turn is None


# As turn detection asks it -----------------------------------------------------------------------------------------------------------


class FixedHearing:
    """Hears with these probabilities, in the order of `LABELS`; an exception is raised instead."""

    def __init__(self, *answers: tuple[float, ...] | Exception) -> None:
        self.answers = list(answers)

    def __call__(self, samples: np.ndarray) -> Future[AudioFeatures]:
        future: Future[AudioFeatures] = Future()
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            future.set_exception(answer)
            return future
        none = torch.zeros(0)
        future.set_result(AudioFeatures(none, none, none, turn_logits_NC=torch.tensor([answer]).log()))
        return future


def test_finished_is_what_is_neither_a_pause_nor_a_request_to_wait() -> None:
    detector = TurnHeadDetector(FixedHearing((0.5, 0.2, 0.2, 0.1), (0.1, 0.1, 0.7, 0.1)), LABELS)
    assert detector(np.zeros(1600, np.float32)) == pytest.approx(0.7)
    assert detector.backchannel(np.zeros(1600, np.float32)) == pytest.approx(0.7)


def test_what_was_heard_is_kept_for_the_answer_once_and_only_for_these_samples() -> None:
    detector = TurnHeadDetector(FixedHearing((0.7, 0.1, 0.1, 0.1)), LABELS)
    turn = np.arange(1600, dtype=np.float32)
    detector(turn)
    assert detector.take(turn[:-1]) is None
    assert detector.take(turn.copy()) is not None
    assert detector.take(turn) is None


def test_what_is_kept_has_a_bound() -> None:
    count = 100
    detector = TurnHeadDetector(FixedHearing(*[(0.7, 0.1, 0.1, 0.1)] * count), LABELS)
    turns = [np.full(320, n, np.float32) for n in range(count)]
    for turn in turns:
        detector(turn)
    kept = [detector.take(turn) is not None for turn in turns]
    assert kept == [False] * (count - 64) + [True] * 64


def test_a_turn_that_cannot_be_heard_is_left_to_the_limits_of_silence() -> None:
    detector = TurnHeadDetector(FixedHearing(ValueError("too short"), ValueError("too short")), LABELS)
    assert detector(np.zeros(10, np.float32)) == 0 and detector.backchannel(np.zeros(10, np.float32)) == 0


def test_a_server_takes_the_head_where_there_is_one_and_what_it_is_told() -> None:
    detector = TurnHeadDetector(FixedHearing(), LABELS)
    assert TurnModels.load(detector).end_of_turn is detector
    assert TurnModels.load(detector).backchannel == detector.backchannel
    assert isinstance(TurnModels.load(detector, "smart-turn").end_of_turn, SmartTurn)
    assert isinstance(TurnModels.load().end_of_turn, SmartTurn) and TurnModels.load().backchannel is None
    assert TurnModels.load(detector, "silence").end_of_turn is None
    with pytest.raises(ValueError, match="no turn head"):
        TurnModels.load(None, "head")


# What is shipped ----------------------------------------------------------------------------------------------------------------------


def test_mini_tells_whole_sentences_from_begun_ones() -> None:
    from osum_echat.audio.io import to_mono_16k
    from osum_echat.pipeline import EChat

    echat = EChat.load("mini", device="cpu")
    assert echat.model.turn is not None
    detector = TurnHeadDetector(lambda samples: done(echat.hear([(samples, 16_000)])[0]), echat.model.turn.labels)
    whole, begun = [], []
    for path in sorted(Path("assets/demo").glob("*.ogg")):
        samples = to_mono_16k(path)
        pause = np.zeros(3200, np.float32)
        whole.append(detector(np.concatenate([samples, pause])))
        begun.append(detector(np.concatenate([samples[: len(samples) * 6 // 10], pause])))
    assert sum(p >= 0.5 for p in whole) >= len(whole) - 1, whole
    assert sum(p < 0.5 for p in begun) >= len(begun) - 2, begun


def done(heard: AudioFeatures) -> Future[AudioFeatures]:
    future: Future[AudioFeatures] = Future()
    future.set_result(heard)
    return future
