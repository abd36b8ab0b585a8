"""docs/scale.md: its commands have the options that it shows, its YAML files are what Ray takes them for."""

from __future__ import annotations

import argparse
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from osum_echat.batch.ray_data import RayEngine
from osum_echat.cli import main as command
from osum_echat.cli import serve
from osum_echat.generation.vllm.client import VllmDecoder
from osum_echat.serving import ray_proxy

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / "scale.md").read_text(encoding="utf-8"), re.S)


def commands() -> list[list[str]]:
    """Every `osum-echat ...` of the blocks, without what a shell would put in."""
    found = []
    for kind, text in BLOCKS:
        for line in re.sub(r"\\\n" if kind == "bash" else r"\n {4}--", " " if kind == "bash" else " --", text).splitlines():
            if line.strip().startswith("osum-echat "):
                found.append(shlex.split(re.sub(r"\$\(\(.*?\)\)", "8", line), comments=True)[1:])
    return found


class Parsed(Exception):
    """The arguments are good; the command is not run."""


def parse_only(parser: argparse.ArgumentParser, words: Any = None, namespace: Any = None) -> Any:
    _, unknown = parser.parse_known_args(words, namespace)
    if unknown:
        parser.error(f"unknown: {unknown}")
    raise Parsed


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:60])
def test_commands_have_the_options_that_are_shown(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, parse_only)
    with pytest.raises(Parsed):
        command(words)
    with pytest.raises(SystemExit):
        command([*words, "--no-such-option"])


def test_every_kind_of_command_was_found() -> None:
    assert {words[0] for words in commands()} == {"batch", "tokens", "eval", "serve", "export"} and len(commands()) >= 10


def yaml_with(name: str) -> dict[str, Any]:
    [found] = [data for kind, text in BLOCKS if kind == "yaml" for data in [yaml.safe_load(text)] if name in data]
    assert isinstance(found, dict)
    return found


def test_the_cluster_file_is_one_for_ray() -> None:
    util = pytest.importorskip("ray.autoscaler._private.util", reason="the extra `ray` is not installed")
    config = util.prepare_config(yaml_with("cluster_name"))
    util.validate_config(config)
    assert config["max_workers"] == len(config["provider"]["worker_ips"]) == 2


def test_the_service_file_names_an_application_and_arguments_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    [application] = yaml.safe_load(yaml_with("serveConfigV2")["serveConfigV2"])["applications"]
    assert application["import_path"] == f"{serve.__name__}:{serve.application.__name__}"
    monkeypatch.setattr(serve, "make_application", lambda args, build: args)
    args = serve.application(application["args"])
    assert (args.replicas, args.host, args.device, args.api_key) == (4, "0.0.0.0", "cuda", "KEY")


def test_the_defaults_that_are_named_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    engine = RayEngine()
    for option, default in {"share": engine.share, "block": engine.block_size, "tries": engine.tries}.items():
        assert re.search(rf"^\| `--{option}` \|.*\| {default:g} \|$", text, re.M), option
    assert f"{ray_proxy.PROXY_CALLBACK}={ray_proxy.__name__}:{ray_proxy.proxy_callback.__name__}" in text
    assert "options" in inspect.signature(VllmDecoder).parameters and "`VllmDecoder(options=)`" in text
