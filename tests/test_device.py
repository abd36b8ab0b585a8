"""Device rules live in osum_echat/device alone: a static check, and a run on an accelerator that does not exist."""

from __future__ import annotations

import ast
import contextlib
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from osum_echat import device as devices
from osum_echat.device import accelerators

# Names that tie code to one maker's device. As attributes (torch.cuda), imports (torch_npu, triton) or calls (.cuda()).
MODULES = {"torch_npu", "triton", "pynvml", "apex", "flash_attn", "cupy"}
ATTRIBUTES = {"cuda", "npu", "is_cuda", "is_npu", "cudnn"}
STRINGS = {"cuda", "npu", "nccl", "hccl"}


def offences(path: Path) -> list[str]:
    """What a file says about accelerators, as ``name:line what``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name.split(".")[0] for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module.split(".")[0] in MODULES or node.module.startswith("torch.cuda") else []
        elif isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
            names = [f".{node.attr}"]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(":")[0] in STRINGS:
            names = [repr(node.value)]
        found += [f"{path.name}:{node.lineno} {name}" for name in names]
    return found


def test_no_file_but_accelerators_py_names_an_accelerator(root_dir: Path) -> None:
    files = [p for p in (root_dir / "osum_echat").rglob("*.py") if p.parts[-2:] != ("device", "accelerators.py")]
    files += [*root_dir.glob("*.py"), *(root_dir / "tools").rglob("*.py")]
    assert len(files) > 50
    assert [offence for file in files for offence in offences(file)] == []


def test_the_static_check_sees_what_it_should(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text('import torch_npu\nx.cuda()\ntorch.device("cuda:1")\nbackend = "nccl"\nfrom triton import jit\n')
    assert len(offences(file)) == 5


class FakeAccelerator(types.ModuleType):
    """What `torch.cuda` and `torch.npu` offer, recorded."""

    def __init__(self) -> None:
        super().__init__("fake")
        self.calls: list[str] = []

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 2

    def memory_allocated(self, device: torch.device) -> int:
        return 123

    def max_memory_allocated(self, device: torch.device) -> int:
        return 456

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 1, 789

    def get_rng_state(self, device: torch.device) -> torch.Tensor:
        return torch.tensor([7], dtype=torch.uint8)

    def current_stream(self, device: torch.device) -> str:
        return "usual"

    def Stream(self, device: torch.device) -> types.SimpleNamespace:
        return types.SimpleNamespace(wait_stream=lambda other: self.calls.append("wait_stream"))

    @contextlib.contextmanager
    def stream(self, stream: types.SimpleNamespace) -> Iterator[None]:
        self.calls.append("enter")
        yield
        self.calls.append("leave")

    def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append(name)


@pytest.mark.parametrize(("kind", "backend"), [("cuda", "nccl"), ("npu", "hccl")])
def test_every_device_rule_goes_to_the_accelerator_that_is_there(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeAccelerator()
    monkeypatch.setattr(accelerators, "_accelerator", lambda k: fake if k == kind else None)
    monkeypatch.setattr(accelerators, "available", lambda k: k in (kind, "cpu"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    torch_cpu = torch.device("cpu")
    device = types.SimpleNamespace(type=kind, index=1)  # torch.device("npu") exists only with its extension
    monkeypatch.setattr(torch, "device", lambda *args: device)
    assert devices.resolve("auto") is device and devices.count() == 2
    assert devices.collectives_backend(device) == backend  # type: ignore[arg-type]
    assert devices.dtype("auto", device) is torch.bfloat16  # type: ignore[arg-type]
    devices.activate(device)  # type: ignore[arg-type]
    devices.synchronize(device)  # type: ignore[arg-type]
    devices.empty_cache(device)  # type: ignore[arg-type]
    with devices.side_stream(device)():  # type: ignore[arg-type]
        fake.calls.append("vocoder")
    assert devices.overlaps(device) and not devices.overlaps(torch_cpu)  # type: ignore[arg-type]
    devices.reset_peak_memory(device)  # type: ignore[arg-type]
    assert (devices.memory_allocated(device), devices.peak_memory(device), devices.total_memory(device)) == (123, 456, 789)  # type: ignore[arg-type]
    state = devices.rng_state(device)  # type: ignore[arg-type]
    assert state["device"].tolist() == [7]
    devices.set_rng_state(state, device)  # type: ignore[arg-type]
    assert fake.calls == [
        "set_device",
        "synchronize",
        "empty_cache",
        "wait_stream",
        "enter",
        "vocoder",
        "leave",
        "reset_peak_memory_stats",
        "set_rng_state",
    ]


def test_a_device_that_is_not_there_is_an_error_with_a_remedy() -> None:
    for name in ("cuda:7", "npu"):
        if not devices.available(name.split(":")[0]):
            with pytest.raises(ValueError, match="--device cpu"):
                devices.resolve(name)
    with pytest.raises(ValueError, match="unknown device"):
        devices.resolve("tpu")


def test_random_states_come_back_exactly() -> None:
    import random

    import numpy as np

    cpu = torch.device("cpu")
    devices.seed_all(3)
    state = devices.rng_state(cpu)
    first = (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: NPY002 - libraries read the global state
    devices.set_rng_state(state, cpu)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first  # noqa: NPY002
