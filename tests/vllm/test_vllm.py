"""vLLM as the decoder against our own engine: ids, guards, cancelling, what clients may send, and the commands (`make test-vllm`)."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import soundfile
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdateBuilder, LogitsProcessors, MoveDirectionality
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm_requests import DEMO, ROOT, check_greedy, decode, differences, end, mini_requests, one_thread, tell, tiny_requests

from osum_echat.cli import main
from osum_echat.dialogue.dialect import Dialect
from osum_echat.generation.config import GenerationConfig, Mode, Sampling
from osum_echat.generation.engine import EngineLimits
from osum_echat.generation.events import Done
from osum_echat.generation.generator import Generator
from osum_echat.generation.vllm.client import VllmDecoder
from osum_echat.generation.vllm.engine import VllmGenerator
from osum_echat.generation.vllm.export import export_for_vllm
from osum_echat.generation.vllm.processor import EChatLogitsProcessor
from osum_echat.generation.vllm.rules import RowPlan, end_id, guards_of, to_settings
from tests.vllm_case import TIGHT, same, wide_requests, wide_tiny

one_thread()


class Tiny:
    """The tiny model in both engines."""

    def __init__(self, folder: Path, config: GenerationConfig, limits: EngineLimits, **options: Any) -> None:
        self.model, tokenizer, _ = wide_tiny()
        export_for_vllm(self.model, tokenizer, config, Dialect(), folder)
        self.own = Generator(self.model, tokenizer, config)
        settings = to_settings(config, self.own.dialect)
        self.vllm = VllmGenerator(
            self.model, tokenizer, config, None, lambda limits: VllmDecoder(folder, limits, settings, options=options), limits
        )


BLOCKS, BLOCK = 12, 32


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    """Prompts are read in pieces of 32 positions beside rows that decode, and the cache has room for some of 16 rows only: vLLM throws rows out and
    reads them again."""
    options = {
        "max_num_batched_tokens": BLOCK,
        "enable_chunked_prefill": True,
        "block_size": BLOCK,
        "num_gpu_blocks_override": BLOCKS,
        "max_model_len": (BLOCKS - 1) * BLOCK,
        "enable_prefix_caching": False,
    }
    case = Tiny(tmp_path_factory.mktemp("tiny") / "vllm", TIGHT, EngineLimits(rows=16, positions=4096), **options)
    yield case
    case.vllm.close()


# ---- a hundred requests ----------------------------------------------------------------------------------------------------------------


def test_54_greedy_requests_of_the_tiny_model_have_our_ids_and_our_guards(tiny: Tiny) -> None:
    requests = tiny_requests(greedy=True)
    assert len(requests) == 54
    ours, theirs = decode(tiny.own, requests), decode(tiny.vllm, tiny_requests(greedy=True))
    found = differences(tiny.own, requests, ours, theirs)
    tell("the tiny model", ours, theirs, found)
    check_greedy(found, len(requests))
    alike = [n for n in range(len(requests)) if n not in {d.row for d in found}]
    same([theirs[n] for n in alike], [ours[n] for n in alike])
    acted = {name for row in ours for name in end(row).guards}
    assert {"repetition", "silence", "think"} <= acted, f"only {acted} acted: equal counts show too little"


def test_50_greedy_requests_of_mini_have_our_ids_and_our_guards(mini: Any, mini_vllm: Any) -> None:
    requests = mini_requests(mini, 50, greedy=True)
    kinds = {request.output_type for request in requests}
    assert len(requests) == 50 and len(kinds) >= 6, kinds
    ours, theirs = decode(mini.generator, requests), decode(mini_vllm.generator, mini_requests(mini_vllm, 50, greedy=True))
    found = differences(mini.generator, requests, ours, theirs)
    tell("mini", ours, theirs, found)
    check_greedy(found, len(requests))
    alike = [n for n in range(len(requests)) if n not in {d.row for d in found}]
    same([theirs[n] for n in alike], [ours[n] for n in alike])


def test_with_a_share_of_the_ctc_head_in_transcripts_the_ids_are_still_ours(mini: Any, mini_folder: Path) -> None:
    config = replace(mini.generator.config, ctc_weight=0.9)
    own = Generator(mini.model, mini.tokenizer, config, mini.dialect)
    settings = to_settings(config, mini.dialect)
    vllm = VllmGenerator(
        mini.model,
        mini.tokenizer,
        config,
        mini.dialect,
        lambda limits: VllmDecoder(mini_folder, limits, settings),
        EngineLimits(8, 8192),
    )
    try:
        requests = [request for request in mini_requests(mini, 50, greedy=True) if request.place is not None][:12]
        theirs = decode(vllm, [request for request in mini_requests(mini, 50, greedy=True) if request.place is not None][:12])
    finally:
        vllm.close()
    ours, without = decode(own, requests), decode(mini.generator, requests)
    found = differences(own, requests, ours, theirs)
    tell("mini with a share of 0.9", ours, theirs, found)
    check_greedy(found, 20)
    changed = sum(end(a).generated != end(b).generated for a, b in zip(ours, without, strict=True))
    print(f"{changed} of {len(requests)} replies are others without the share")
    assert len(requests) == 12 and changed > 0


def test_sampled_replies_have_the_ids_of_their_seeds(tiny: Tiny, mini: Any, mini_vllm: Any) -> None:
    """One random number decides an id, so a reply differs only where it falls on the border of two ids."""
    pairs = [
        (decode(tiny.own, tiny_requests(False, 2)), decode(tiny.vllm, tiny_requests(False, 2))),
        (decode(mini.generator, mini_requests(mini, 24)), decode(mini_vllm.generator, mini_requests(mini_vllm, 24))),
    ]
    for ours, theirs in pairs:
        equal = sum(end(a).generated == end(b).generated for a, b in zip(ours, theirs, strict=True))
        print(f"\n{equal} of {len(ours)} sampled replies are equal")
        assert equal >= 0.9 * len(ours)


# ---- cancelling ------------------------------------------------------------------------------------------------------------------------


def test_cancelling_frees_the_row_and_its_cache(tiny: Tiny) -> None:
    """Requests that would take the whole cache, one after the other: each is cancelled, and the last finds room."""
    engine = tiny.vllm.engine()
    engine.start()
    for _ in range(3):
        [long] = wide_requests(greedy=True)[1:2]
        long.mode, long.plan = tiny.own.config.mode("s2t_chat").greedy(), {}  # 8000 ids: it ends by being cancelled
        came: queue.Queue[Any] = queue.Queue()
        ticket = engine.submit(long, came.put)
        events = [came.get(timeout=300)]
        while len(events) < 20:
            events.append(came.get(timeout=300))
        ticket.cancel()
        while not isinstance(events[-1], Done):
            events.append(came.get(timeout=300))
        assert events[-1].reason == "cancelled" and len(events[-1].generated) >= 20
        assert engine.load().rows == engine.load().waiting == 0
    assert engine._decoder._llm.get_num_unfinished_requests() == 0  # type: ignore[attr-defined]
    requests = wide_requests(greedy=True)[:3]
    ours, theirs = decode(tiny.own, requests), decode(tiny.vllm, wide_requests(greedy=True)[:3])
    check_greedy(differences(tiny.own, requests, ours, theirs), 20)


def test_vllm_ends_with_a_killed_process(mini_folder: Path) -> None:
    script = [sys.executable, str(ROOT / "tests" / "vllm" / "vllm_owner.py"), str(mini_folder)]
    with subprocess.Popen(script, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = next((line for line in process.stdout if line.startswith("processes ")), "")
        os.kill(process.pid, signal.SIGKILL)
    started = [psutil.Process(int(pid)) for pid in told.split()[1:]]
    _, alive = psutil.wait_procs(started, timeout=60)
    assert len(started) >= 2 and not alive, alive


# ---- as a person would -----------------------------------------------------------------------------------------------------------------


def test_batch_answers_the_same_with_either_engine(mini_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"key": path.stem, "wav": str(path), "txt": ""} for path in DEMO[:4]]
    listed = tmp_path / "some.list"
    listed.write_text("".join(json.dumps(record) + "\n" for record in records))
    results = {}
    for name, options in {"own": [], "vllm": ["--llm-engine", "vllm", "--vllm-folder", str(mini_folder)]}.items():
        out = tmp_path / name
        common = ["--list", str(listed), "--out", str(out), "--task", "asr", "--device", "cpu", "--greedy", "--dtype", "float32"]
        assert main(["batch", *common, *options]) == 0, capsys.readouterr().err
        lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        results[name] = {line["key"]: (line["text"], line["finish"], line["guards"]) for line in lines}
    assert results["own"] == results["vllm"] and len(results["own"]) == 4


@pytest.fixture(scope="module")
def server(mini_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "osum_echat.cli", "serve", "--port", str(port), "--device", "cpu", "--positions", "8192"]
    command += ["--llm-engine", "vllm", "--vllm-folder", str(mini_folder)]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=dict(os.environ))
        try:
            for _ in range(1200):
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    httpx.get(f"http://127.0.0.1:{port}/health", timeout=2)
                    break
                except httpx.HTTPError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=120)


def sound(data: bytes) -> dict[str, Any]:
    import base64

    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}


def ask(server: str, *parts: Any, **body: Any) -> httpx.Response:
    message = {"messages": [{"role": "user", "content": list(parts)}], "temperature": 0, **body}
    return httpx.post(f"{server}/v1/chat/completions", json=message, timeout=300)


def test_a_clients_garbage_changes_nothing(server: str, mini: Any, tmp_path: Path) -> None:
    good = sound(DEMO[0].read_bytes())
    first = ask(server, good)
    assert first.status_code == 200, first.text
    expected = mini.chat(str(DEMO[0]), think="tag", greedy=True).text
    assert first.json()["choices"][0]["message"]["content"] == expected

    broken = np.full(16000, np.nan, np.float32)
    soundfile.write(tmp_path / "nan.wav", broken, 16000, subtype="FLOAT")
    broken[:] = np.inf
    soundfile.write(tmp_path / "inf.wav", broken, 16000, subtype="FLOAT")
    loud = np.random.default_rng(0).uniform(-1e30, 1e30, 16000).astype(np.float32)
    soundfile.write(tmp_path / "loud.wav", loud, 16000, subtype="FLOAT")
    embeds = {"type": "prompt_embeds", "prompt_embeds": "AAAA"}
    statuses = [
        ask(server, embeds).status_code,
        ask(server, good, embeds).status_code,
        *(ask(server, sound((tmp_path / f"{name}.wav").read_bytes())).status_code for name in ("nan", "inf", "loud")),
        ask(server, sound(os.urandom(20000))).status_code,
        ask(server, good, max_tokens=-1).status_code,
        ask(server, good, max_tokens="many").status_code,
        httpx.post(f"{server}/v1/chat/completions", content=b'{"messages": [', timeout=60).status_code,
    ]
    assert statuses == [400] * 9, "embeddings, samples that are no sound, noise bytes, limits that are none, a broken body"
    # What a client may add beside is not handed on.
    added = ask(server, good, prompt_embeds="AAAA", extra_args={"osum_echat": {"plan": [[0, 5]]}}, vllm_xargs={"osum_echat": {}})
    assert added.json()["choices"][0]["message"]["content"] == expected
    assert ask(server, good).json()["choices"][0]["message"]["content"] == expected
    assert httpx.get(f"{server}/health", timeout=10).status_code == 200


def test_the_server_speaks_and_its_stream_can_be_left(server: str) -> None:
    spoken = ask(server, sound(DEMO[1].read_bytes()), modalities=["text", "audio"], audio={"format": "wav", "voice": "default"})
    assert spoken.status_code == 200 and len(spoken.json()["choices"][0]["message"]["audio"]["data"]) > 10000
    body = {
        "messages": [{"role": "user", "content": [sound(DEMO[1].read_bytes())]}],
        "modalities": ["text", "audio"],
        "audio": {"format": "pcm16", "voice": "default"},
        "stream": True,
    }
    with httpx.stream("POST", f"{server}/v1/chat/completions", json=body, timeout=300) as stream:
        next(stream.iter_lines())  # and away
    for _ in range(100):
        metrics = httpx.get(f"{server}/metrics", timeout=10).text
        rows = [line for line in metrics.splitlines() if "rows" in line and not line.startswith("#")]
        if rows and all(float(line.rsplit(" ", 1)[1]) == 0 for line in rows):
            return
        time.sleep(0.2)
    raise AssertionError(rows)


def test_a_request_that_is_cancelled_by_its_listener_tells_its_end(mini_vllm: Any, mini: Any) -> None:
    """The events of a stream that is closed come to an end, and the engine is free for the next."""
    stream = mini_vllm.stream(str(DEMO[2]), speak=True)
    next(stream)
    stream.close()
    reply = mini_vllm.chat(str(DEMO[2]), greedy=True)
    assert reply.finish_reason == "stop" and reply.text == mini.chat(str(DEMO[2]), greedy=True).text


def test_guards_travel_through_vllms_own_sampler(mini_folder: Path) -> None:
    """The processor in vLLM's sampler, over logits that say one code again and again: rows change places, and each ends by the id of the end."""
    config = SimpleNamespace(model_config=SimpleNamespace(model=str(mini_folder)), additional_config={})
    processor = EChatLogitsProcessor(config, torch.device("cpu"), False)
    assert processor.rules is not None
    vocab, greedy = processor.rules.vocab, Mode(Sampling(greedy=True), Sampling(greedy=True), 30)
    plans = [RowPlan("text2token", greedy, words=("hello", "you")), RowPlan("s2t_chat", greedy), RowPlan("text", greedy)]
    outputs: list[list[int]] = [[] for _ in plans]
    update = BatchUpdateBuilder()
    for place, (plan, output) in enumerate(zip(plans, outputs, strict=True)):
        params = SamplingParams(temperature=0.0, logprobs=0, extra_args={"osum_echat": plan.to_plain()})
        processor.validate_params(params)
        update.added.append((place, params, None, output))
    processor.update_state(update.get_and_reset(len(plans)))
    sampler, metadata = Sampler("processed_logits"), _metadata(LogitsProcessors([processor]))
    acted: list[list[str]] = [[] for _ in plans]
    for step in range(32):
        if step == 7:
            update.moved.append((0, 2, MoveDirectionality.SWAP))
            processor.update_state(update.get_and_reset(len(plans)))
            outputs, acted = outputs[::-1], acted[::-1]
        logits = torch.randn(len(plans), end_id(vocab) + 1, generator=torch.Generator().manual_seed(step))
        logits[:, vocab.speech_id(7)] += 30
        found = sampler(logits, metadata)
        for place, token in enumerate(found.sampled_token_ids[:, 0].tolist()):
            outputs[place].append(token)
            acted[place] += guards_of(float(found.logprobs_tensors.logprobs[place, 0]))
    assert all(output[-1] == end_id(vocab) for output in outputs)
    assert acted[2].count("repetition") >= 2 and not acted[0] and not acted[1], "text to speech stands at the last place now"


def _metadata(processors: LogitsProcessors) -> SamplingMetadata:
    none = torch.empty(0)
    return SamplingMetadata(
        temperature=None,
        all_greedy=True,
        all_random=False,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=0,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=none,
        presence_penalties=none,
        repetition_penalties=none,
        output_token_ids=[],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=processors,
    )
