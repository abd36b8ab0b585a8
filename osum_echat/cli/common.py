"""What the commands share: the arguments that choose a model, loading it, printing a reply, errors as one line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osum_echat import locations
from osum_echat.audio.fetch import MAX_BYTES, fetch, is_web
from osum_echat.rates import CODES_PER_SECOND

if TYPE_CHECKING:
    from osum_echat.audio.io import Source
    from osum_echat.pipeline import EChat, Options, Reply


class UserError(Exception):
    """Something that the person at the keyboard can mend; printed as one line, exit code 1."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of every command that runs a model."""
    group = parser.add_argument_group("model")
    group.add_argument("--checkpoint", default="mini", help="mini (default), a checkpoint folder, a released .pt or .safetensors")
    group.add_argument("--config", help="model config of a bare .pt or .safetensors (default: the released model's)")
    group.add_argument("--token2wav", help="a folder of the CosyVoice-300M-25Hz shape (default: the checkpoint's own token2wav/)")
    group.add_argument("--speaker", help="the reply's voice: a saved speaker (.safetensors) or a recording of 1 to 30 s")
    group.add_argument("--device", default="auto", help="auto (default), cpu, cuda, npu, or with an index: cuda:1")
    group.add_argument("--dtype", default="auto", help="auto (default), float32, bfloat16 or float16")
    group.add_argument(
        "--weights",
        default="auto",
        help="auto (default: by checkpoint and CPU), float32, bf16, int8 or int4 (CPUs): how the model's weights are kept",
    )
    group.add_argument(
        "--profile", help="published prompt profile instead of the checkpoint's own strings: as_trained or as_released"
    )
    group.add_argument(
        "--llm-engine",
        choices=["own", "vllm"],
        default="own",
        help="what decodes: our own engine (default), or a process of vLLM (docs/scale.md)",
    )
    group.add_argument(
        "--vllm-folder",
        help="with --llm-engine vllm: what osum-echat export --for vllm wrote (default: it is exported at every start)",
    )
    group.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of every command that asks a model something; `request_options` reads them."""
    parser.add_argument(
        "--think", choices=["tag", "language"], default="tag", help="form of the thought in *_think tasks (mini writes both)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same reply")
    parser.add_argument("--greedy", action="store_true", help="take the most likely id at every step instead of sampling")
    parser.add_argument("--temperature", type=float, help="of text and speech, 0 is greedy (default: the checkpoint's own)")
    parser.add_argument(
        "--max-tokens", type=int, help="longest reply in ids, thought and speech included (default: the checkpoint's own)"
    )


def request_options(args: argparse.Namespace) -> Options:
    """The options of a request that the arguments give."""
    return {"seed": args.seed, "greedy": args.greedy, "temperature": args.temperature, "max_tokens": args.max_tokens}


def find_checkpoint(name: str) -> Path:
    """The path for ``--checkpoint``. Raises UserError or FileNotFoundError when there is nothing."""
    path = Path(locations.find_checkpoint(name)).expanduser()
    if path.exists():
        return path
    raise UserError(f"no such checkpoint: {name}")


def load_echat(args: argparse.Namespace, speech: bool = True) -> EChat:
    """The model that the arguments name; ``speech``: with token2wav, so that it can be heard."""
    import torch

    from osum_echat.pipeline import EChat

    if args.threads:
        torch.set_num_threads(args.threads)
    checkpoint = find_checkpoint(args.checkpoint)
    config = args.config
    if config is None and checkpoint.is_file():
        config = "package:ct_config.yaml"
    voice: dict[str, Any] = {"token2wav": args.token2wav, "speaker": args.speaker} if speech else {}
    return EChat.load(
        checkpoint,
        config=config,
        device=args.device,
        dtype=args.dtype,
        weights=args.weights,
        profile=args.profile,
        llm_engine=args.llm_engine,
        vllm_folder=args.vllm_folder,
        **voice,
    )


def readable(reply: Reply, indent: str = "  ") -> str:
    """A reply for a person: what was heard, how, what is answered."""
    lines = []
    think = reply.think
    if think is not None:
        known = {
            "words": think.transcript,
            "age": think.age,
            "gender": think.gender,
            "emotion": think.emotion,
            "event": think.event,
        }
        found = ", ".join(f"{name}: {value}" for name, value in known.items() if value)
        lines.append(f"thought   {found or think.raw}")
    if reply.text:
        lines.append(f"text      {reply.text}")
    if reply.speech_tokens:
        lines.append(f"speech    {len(reply.speech_tokens)} tokens, {len(reply.speech_tokens) / CODES_PER_SECOND:.1f} s")
    if reply.finish_reason == "silence":
        lines.append("heard     nothing: the recording is silent, so the model was not asked")
    lines.append(f"finished  {reply.finish_reason}, {reply.timings.total:.2f} s")
    return "\n".join(indent + line for line in lines)


def save_speech(reply: Reply, path: Path) -> Path | None:
    """Write the reply's samples, if it has any."""
    if reply.audio is None:
        return None
    reply.save(path)
    return path


def check_output(path: Path) -> None:
    """Refuse a file that cannot be written, before anything is computed. Raises UserError."""
    from osum_echat.audio.io import check_output

    try:
        check_output(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def recording(name: str) -> Source:
    """The recording that an argument names: a path, ``-`` for standard input, or an http(s) address. Raises
    UserError."""
    if name == "-":
        data = sys.stdin.buffer.read(MAX_BYTES + 1)
        if not data:
            raise UserError("standard input is empty: pipe a recording into it")
        if len(data) > MAX_BYTES:
            raise UserError(f"standard input has more than {MAX_BYTES // 2**20} MB")
        return data
    if is_web(name):
        return fetch(name)
    if not Path(name).exists():
        raise UserError(f"no such recording: {name}")
    if Path(name).is_dir():
        raise UserError(f"{name} is a folder, not a recording")
    return name


def print_json(value: Any) -> None:
    """One JSON object on one line, as UTF-8."""
    print(json.dumps(value, ensure_ascii=False))


def run(command: Callable[[], int]) -> int:
    """Run a command; what a person can mend becomes one line on stderr and exit code 1, a pipe that closed early exit
    code 0."""
    try:
        return command()
    except (UserError, ValueError, FileNotFoundError, IsADirectoryError, PermissionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
