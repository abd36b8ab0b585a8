"""Prompts: a `Speaker` is what is known of a voice, a `Frontend` computes it from a recording.

The order of resampling is the published one (file -> 22.05 kHz -> 16 kHz, windowed sinc), because the prompt mel, the
speech tokens and the speaker embedding all move when it changes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from osum_echat.audio import features
from osum_echat.audio.io import Source, read
from osum_echat.audio.resample import resample_sinc
from osum_echat.device.onnx import session_options
from osum_echat.token2wav.config import SAMPLE_RATE

if TYPE_CHECKING:
    import onnxruntime

TOKENIZER_RATE = 16_000
MIN_SECONDS, MAX_SECONDS = 1.0, 30.0
"""Prompt recordings outside this range are refused: the tokenizer knows 30 s at most, and under 1 s there is no voice
to copy."""

_FORMAT = "osum-echat speaker 1"


@dataclass(frozen=True, eq=False)
class Speaker:
    """A voice: prompt tokens [P] int64, prompt mel [frames, bins] float32 (natural log, 22.05 kHz) and speaker
    embedding [S].

    Tokens and mel belong together and may both be empty: then only the embedding speaks.
    """

    tokens: Tensor
    mel: Tensor
    embedding: Tensor

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or self.mel.ndim != 2 or self.embedding.ndim != 1:
            shapes = [list(t.shape) for t in (self.tokens, self.mel, self.embedding)]
            raise ValueError(f"a speaker needs tokens [P], mel [frames, bins] and embedding [S], found shapes {shapes}")
        if bool(len(self.tokens)) != bool(len(self.mel)):
            raise ValueError(
                f"prompt tokens ({len(self.tokens)}) and prompt mel ({len(self.mel)} frames) must both be there or both be empty"
            )

    @classmethod
    def from_wav(cls, source: Source, frontend: HasFrontend) -> Speaker:
        """Compute a voice from a recording of 1 to 30 s: any rate, mono or stereo (channels are averaged).

        ``frontend`` is a `Token2Wav` or a `Frontend`. Raises ValueError (AudioError) for what cannot be a prompt.
        """
        return frontend.frontend.speaker(source)

    @classmethod
    def from_embedding(cls, embedding: Tensor, mel_bins: int = features.VOCODER_MELS) -> Speaker:
        """A voice without a prompt recording."""
        return cls(torch.zeros(0, dtype=torch.int64), torch.zeros(0, mel_bins), embedding.detach().float().flatten().cpu())

    def trimmed(self, seconds: float) -> Speaker:
        """The same voice with only the first ``seconds`` of the prompt: cheaper synthesis, slightly different sound."""
        if seconds <= 0:
            raise ValueError(f"seconds must be positive, found {seconds}")
        total = len(self.mel) * features.VOCODER_HOP / SAMPLE_RATE
        if seconds >= total:
            return self
        share = seconds / total
        tokens, frames = max(1, round(len(self.tokens) * share)), max(1, round(len(self.mel) * share))
        return Speaker(self.tokens[:tokens].clone(), self.mel[:frames].clone(), self.embedding)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the voice as one safetensors file; it appears under its name only when it is whole."""
        path = Path(path)
        part = path.with_name(f".{path.name}.part")
        tensors = {"tokens": self.tokens, "mel": self.mel, "embedding": self.embedding}
        save_file({key: value.contiguous() for key, value in tensors.items()}, part, metadata={"format": _FORMAT})
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Speaker:
        """Read what `save` wrote. Raises ValueError for another file."""
        if not Path(path).is_file():
            raise ValueError(f"speaker file not found: {path}")
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") != _FORMAT:
                    raise ValueError(f"{path} is not a speaker file; make one with Speaker.from_wav(...).save(...)")
                return cls(file.get_tensor("tokens"), file.get_tensor("mel"), file.get_tensor("embedding"))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a speaker file ({error}); make one with Speaker.from_wav(...).save(...)") from error


class HasFrontend(Protocol):
    """What can compute speakers."""

    @property
    def frontend(self) -> Frontend: ...


class Frontend:
    """The two ONNX models of a directory, opened on first use: ``speech_tokenizer_v1.onnx`` and ``campplus.onnx``.

    Inputs and outputs are taken by position, see docs/token2wav.md for the contracts.
    """

    def __init__(self, directory: str | os.PathLike[str], vocab_size: int) -> None:
        self.directory = Path(directory)
        self.vocab_size = vocab_size
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._log_mel = features.LogMel(128)

    @property
    def frontend(self) -> Frontend:
        return self

    def _session(self, name: str, inputs: int) -> onnxruntime.InferenceSession:
        if name not in self._sessions:
            import onnxruntime

            path = self.directory / name
            if not path.is_file():
                raise ValueError(
                    f"{path} is not there; it is needed to read a prompt recording (a saved speaker file works without it)"
                )
            options = session_options()
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            if len(session.get_inputs()) != inputs:
                names = [i.name for i in session.get_inputs()]
                raise ValueError(f"{path}: expected {inputs} inputs, found {names}; is this the file of a token2wav directory?")
            self._sessions[name] = session
        return self._sessions[name]

    def speaker(self, source: Source) -> Speaker:
        """See `Speaker.from_wav`."""
        wave_22k, wave_16k = prompt_waves(source)
        return Speaker(self.tokens(wave_16k), features.mel_22k(wave_22k), self.embedding(wave_16k))

    def tokens(self, samples_16k: Tensor) -> Tensor:
        """Speech tokens at 25 Hz of samples [n] at 16 kHz, [P] int64; P = ceil(ceil(n // 160 / 2) / 2)."""
        return self.tokens_of([samples_16k])[0]

    def tokens_of(self, recordings: Sequence[Tensor]) -> list[Tensor]:
        """`tokens` of several recordings, in one call of the model where the model takes a batch."""
        session = self._session("speech_tokenizer_v1.onnx", 2)
        feats = [self._log_mel(samples) for samples in recordings]
        if len(feats) > 1 and not isinstance(session.get_inputs()[0].shape[0], int):
            return self._run_tokenizer(session, feats)
        return [ids for one in feats for ids in self._run_tokenizer(session, [one])]

    def _run_tokenizer(self, session: onnxruntime.InferenceSession, feats: Sequence[Tensor]) -> list[Tensor]:
        names = [i.name for i in session.get_inputs()]
        lengths = np.array([len(f) for f in feats], dtype=np.int32)
        batch_BMT = torch.nn.utils.rnn.pad_sequence(list(feats), batch_first=True).transpose(1, 2).contiguous()
        (indices, *_) = session.run(None, {names[0]: batch_BMT.numpy(), names[1]: lengths})
        rows = np.asarray(indices).reshape(len(feats), -1)
        counts = token_count(lengths)
        out = [torch.from_numpy(row[:count].astype(np.int64)) for row, count in zip(rows, counts, strict=True)]
        for ids, count in zip(out, counts, strict=True):
            if len(ids) != count or (len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size):
                raise ValueError(
                    f"{self.directory / 'speech_tokenizer_v1.onnx'} gave {len(ids)} tokens for {count} expected, or ids outside "
                    f"0..{self.vocab_size - 1}; it does not belong to this flow model"
                )
        return out

    def embedding(self, samples_16k: Tensor) -> Tensor:
        """Speaker embedding of samples [n] at 16 kHz, [S]."""
        session = self._session("campplus.onnx", 1)
        fbank_TF = features.kaldi_fbank(samples_16k)
        centred = fbank_TF - fbank_TF.mean(dim=0, keepdim=True)
        (vector, *_) = session.run(None, {session.get_inputs()[0].name: centred[None].numpy()})
        return torch.from_numpy(np.asarray(vector, dtype=np.float32).reshape(-1).copy())


def token_count(frames: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Speech tokens of so many log-mel frames (100 Hz): two convolutions of stride 2, each rounding up."""
    return (((frames + 1) // 2) + 1) // 2


def prompt_waves(source: Source) -> tuple[Tensor, Tensor]:
    """Samples [n] of a prompt at 22.05 kHz and, resampled from those, at 16 kHz. Raises AudioError outside 1 to 30
    s."""
    audio = read(source, min_seconds=MIN_SECONDS, max_seconds=MAX_SECONDS)
    wave_22k = resample_sinc(torch.from_numpy(np.ascontiguousarray(audio.mono())), audio.rate, SAMPLE_RATE)
    return wave_22k, resample_sinc(wave_22k, SAMPLE_RATE, TOKENIZER_RATE)


def tokenizer_wave(source: Source) -> Tensor:
    """Samples [n] at 16 kHz of a recording to tokenize. Raises AudioError above 30 s or below 0.1 s."""
    audio = read(source, min_seconds=0.1, max_seconds=MAX_SECONDS)
    return resample_sinc(torch.from_numpy(np.ascontiguousarray(audio.mono())), audio.rate, TOKENIZER_RATE)


def read_speakers(path: Path) -> dict[str, Speaker]:
    """The voices of a ``spk2info.pt`` ({name: {"embedding": [1, S]}}); none when the file is not there.

    Raises ValueError when the file holds something else.
    """
    if not path.is_file():
        return {}
    table: Any = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(table, dict) or not all(
        isinstance(v, dict) and isinstance(v.get("embedding"), Tensor) for v in table.values()
    ):
        raise ValueError(f"{path}: expected {{name: {{'embedding': tensor}}}}; remove the file if no stored voice is needed")
    return {str(name): Speaker.from_embedding(entry["embedding"]) for name, entry in table.items()}
