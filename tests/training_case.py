"""A tiny model, made-up samples, a loader, and runs of them in real processes, for the tests of training.

A *case* is plain data: ``config`` (a TrainConfig), ``batches`` (how the samples are split over ranks and micro-batches: a list for each rank
of lists of sample numbers), ``result`` (where rank 0 writes its weights) and optional faults. `launch` starts a process for each rank from a
fork server that has the imports done.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from osum_echat import config as config_io
from osum_echat import device as devices
from osum_echat.data.batch import Batch, Example, SampleInfo, collate
from osum_echat.dialogue.layout import Segment, audio_positions, flatten
from osum_echat.dialogue.vocabulary import Vocabulary
from osum_echat.model.config import AdapterConfig, CtcConfig, EncoderConfig, LlmConfig, ModelConfig
from osum_echat.model.echat import EChatModel
from osum_echat.training import distributed
from osum_echat.training.build import make_trainer
from osum_echat.training.config import TrainConfig
from osum_echat.training.loop import Trainer

# What a run imports on its way; the fork server imports it once for all.
PRELOAD = [
    "tests.training_case",
    "deepspeed",
    "torch.utils.tensorboard",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "transformers.models.qwen2.modeling_qwen2",
    "torch.distributed.checkpoint.default_planner",
    "torch.distributed.fsdp",
    "peft",
]
MELS = 16
VOCABULARY = Vocabulary(text_size=64, eos_id=2, unknown_id=None, speech_codes=24)


def model_config(heads: bool = False, recompute: bool = False) -> ModelConfig:
    llm = {
        "model_type": "qwen2",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    return ModelConfig(
        encoder=EncoderConfig(mels=MELS, dim=16, heads=2, ffn=32, layers=2, max_positions=400, dropout=0.0),
        adapter=AdapterConfig(
            dim=16,
            heads=2,
            ffn=32,
            layers=1,
            max_positions=100,
            dropout=0.0,
            ctc=CtcConfig() if heads else None,
            tags={"gender": ["male", "female"]} if heads else {},
        ),
        llm=LlmConfig(config=llm),
        vocabulary=VOCABULARY,
        activation_checkpointing=recompute,
    )


def tiny_model(seed: int = 0, heads: bool = False, recompute: bool = False) -> EChatModel:
    devices.seed_all(seed)
    return EChatModel(model_config(heads, recompute))


def example(number: int) -> Example:
    """Sample ``number``: four tasks in turn (speech to text, text to speech, speech to speech, text to text) of different length."""
    rng = np.random.default_rng(number)
    task = ("<TRANSCRIBE>", "<TTS>", "<S2S>", "<TEXT2TEXT>")[number % 4]
    has_audio, speaks = task in ("<TRANSCRIBE>", "<S2S>"), task in ("<TTS>", "<S2S>")
    text = tuple(int(i) for i in rng.integers(3, 29, rng.integers(3, 9)))
    frames = int(rng.integers(40, 120))
    segments = [Segment("system", (1, 5, 6))]
    if has_audio:
        segments += [
            Segment("audio", (VOCABULARY.audio_begin,)),
            Segment("audio", audio=0),
            Segment("audio", (VOCABULARY.audio_end,)),
        ]
    else:
        segments += [Segment("prompt", text)]
    if task != "<TTS>":
        segments += [Segment("text", (*text, VOCABULARY.eos_id), supervised=True)]
    if speaks:
        codes = tuple(VOCABULARY.speech_id(int(c)) for c in rng.integers(0, 24, rng.integers(5, 15)))
        segments += [Segment("speech", (VOCABULARY.speech_delimiter, *codes, VOCABULARY.speech_delimiter), supervised=True)]
    feats = [torch.from_numpy(rng.standard_normal((frames, MELS)).astype(np.float32))] if has_audio else []
    row = flatten(segments, [audio_positions(frames)], text_softmax=not speaks)
    tags = {"gender": ("MALE", "FEMALE")[number // 4 % 2]}
    stream = {"<TRANSCRIBE>": "s2t", "<TTS>": "t2s", "<S2S>": "s2s", "<TEXT2TEXT>": "t2t"}[task]
    info = SampleInfo(f"sample-{number}", task, stream, tags=tags, transcripts=(text,) if has_audio else ())
    return Example(info, row, feats)


def make_batch(numbers: list[int]) -> Batch:
    """The samples, two a row."""
    plan = [list(range(i, min(i + 2, len(numbers)))) for i in range(0, len(numbers), 2)]
    return collate([example(n) for n in numbers], MELS, plan)


class ListLoader:
    """The same batches every epoch; its state is epoch and position."""

    def __init__(self, batches: list[list[int]], poison: str | None = None):
        self.batches, self.poison = batches, poison
        self.epoch, self.position = 0, 0

    def __iter__(self) -> Iterator[Batch]:
        while self.position < len(self.batches):
            batch = make_batch(self.batches[self.position])
            self.position += 1
            if self.poison in batch.keys:
                batch.feats_NTF[int((batch.sample_N == batch.keys.index(str(self.poison))).nonzero()[0, 0])] = float("nan")
            yield batch
        self.epoch, self.position = self.epoch + 1, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


def base_config(out: Path, **changes: Any) -> dict[str, Any]:
    plain = {
        "stage": "generation",
        "out": str(out),
        "device": "cpu",
        "precision": "fp32",
        "accumulation": 2,
        "checkpoint_activations": False,
        "max_epochs": None,
        "max_steps": 2,
        "save_every": 1000,
        "log_every": 1,
        "threads": 1,
        "optim": {"lr": 1e-3, "schedule": "constant", "warmup_steps": 0, "clip": 1.0},
        "safety": {"try_largest_batch": False, "watchdog_seconds": 60},
    }
    return config_io.merge(plain, changes)


def full_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All weights on every rank, whatever the engine keeps where."""
    out = {}
    for name, param in trainer.objective.named_parameters():
        if hasattr(param, "full_tensor"):
            out[name] = param.full_tensor().detach().clone()
        elif hasattr(param, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters(param):
                out[name] = param.detach().clone()
        else:
            out[name] = param.detach().clone()
    return out


def interruption(case: dict[str, Any], rank: int) -> Callable[[int, str], None]:
    """What `Run.on_phase` does in this rank of a case: a real kill -9 of this process at the beginning of ``kill_in`` (a phase of `Run`) of
    ``kill_at_step``, or a SIGTERM when the step before ``signal_at_step`` is done."""

    def on_phase(step: int, phase: str) -> None:
        if rank == case.get("kill_rank", -1) and (step, phase) == (case["kill_at_step"], case["kill_in"]):
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 0 and phase == "stepped" and step == case.get("signal_at_step", -1) - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_phase


def run(case: dict[str, Any]) -> Trainer:
    """One rank of a case."""
    config = config_io.from_dict(TrainConfig, case["config"])
    rank = int(os.environ.get("RANK", "0"))
    loader = ListLoader(case["batches"][rank], case.get("poison"))
    model = tiny_model(heads=case.get("heads", False), recompute=config.checkpoint_activations)
    validation = ListLoader([[100 + rank]]) if case.get("validate") else None
    if "lora" in case:
        from osum_echat.model.config import LoraConfig
        from osum_echat.model.lora import add_lora

        lora = LoraConfig(rank=4, alpha=8, dropout=0.0)
        add_lora(model.lm.llm, lora)
        model.config = dataclasses.replace(model.config, lora=lora)
    on_phase = interruption(case, rank)
    trainer = make_trainer(config, model, None, loader, validation, bar=False, on_phase=on_phase)
    if case.get("dropout"):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
    trainer.resume()
    trainer.fit()
    return trainer


def rank_main(case: dict[str, Any], rank: int, world: int, port: int) -> None:
    """A rank of a case in a process of its own, as torchrun would start it."""
    torch.set_num_threads(1)
    os.environ["OSUM_ECHAT_CPU"] = "bfloat16"  # what a case asks for is tested, on a CPU that is slow in it too
    logging.basicConfig(level=logging.INFO, filename=f"{case['config']['out']}.rank{rank}.log")
    if world > 1 or case.get("torchrun"):
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    try:
        trainer = run(case)
        weights = full_weights(trainer)
        if trainer.world.is_main and "result" in case:
            torch.save({"weights": weights, "step": trainer.state.step}, case["result"])
        trainer.world.barrier()
    except Exception:
        logging.exception("failed")
        raise
    distributed.stop()


def launch(case: dict[str, Any], world: int = 1, timeout: float = 600.0) -> list[int]:
    """Run a case in ``world`` real processes; exit codes (-9: killed). When one dies, the others are ended as torchrun would end them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=rank_main, args=(case, rank, world, port)) for rank in range(world)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout
    while any(p.is_alive() for p in ranks):
        failed = [p for p in ranks if p.exitcode not in (None, 0)]
        if failed or time.monotonic() > deadline:
            for process in ranks:
                process.kill()
        multiprocessing.connection.wait([p.sentinel for p in ranks if p.is_alive()], timeout=1.0)
    return [p.exitcode if p.exitcode is not None else 1 for p in ranks]


def logs(case: dict[str, Any]) -> str:
    """What the ranks logged."""
    out = Path(case["config"]["out"])
    return "\n".join(p.read_text() for p in sorted(out.parent.glob(f"{out.name}.rank*.log")))
