"""The engine of a cluster: blocks through Ray Data to actors that hold the worker, one a device or several.

Ray Data schedules blocks, starts lost actors again, and holds actors back when results are not taken
(https://docs.ray.io, "Ray Data"). What is added here is that the run outlives what is lost. A block whose actor or node
dies is dropped by Ray Data (`max_errored_blocks`), not retried where it might wait for a node that never comes back; it
is done again in the next round, when the others are through. In the last of ``tries`` rounds each unit goes alone, so
that a record that kills its worker takes no other with it, and is counted as failed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from osum_echat.batch.work import TRIES, Outcome, Unit, Work, blocks, outcomes_of

log = logging.getLogger(__name__)
_MISSING = "the ray engine needs Ray: pip install 'osum-echat[ray]' (the local engine does the same work without it)"


@dataclass(frozen=True)
class Placement:
    """Where workers run.

    Attributes:
        kind: ``cuda``, ``npu`` or ``cpu``: what a worker opens; Ray shows each only its own device.
        share: devices a worker has (CPU: cores). workers: how many there are.
    """

    kind: str
    share: float
    workers: int

    @property
    def options(self) -> dict[str, Any]:
        """Of the actors."""
        from osum_echat import device as devices  # here, so that workers begin without torch

        return devices.cluster_options(self.kind, self.share)


def place(device: str, share: float, workers: int | None, nodes: Sequence[Mapping[str, float]]) -> Placement:
    """Workers on the devices of a cluster.

    Args:
        device: ``auto`` (GPUs, else NPUs, else CPUs), or a kind. share: devices for each worker; below 1 several share
            one.
        workers: how many, ``None`` for as many as there is room for; more than that wait for nodes to come.
        nodes: resources of each node (see `nodes`).

    Raises:
        ValueError: there is no such device, or the share cannot be.
    """
    from osum_echat import device as devices

    if share <= 0 or (share > 1 and share != int(share)):
        raise ValueError(f"a share of {share:g} devices for each worker cannot be: use a part of 1, or a whole number")
    if device == "auto":
        device = next(
            (kind for kind, name in devices.CLUSTER_RESOURCES.items() if any(node.get(name, 0) >= share for node in nodes)), "cpu"
        )
    if device not in devices.CLUSTER_RESOURCES:
        raise ValueError(f"device {device!r}: on a cluster use auto, cpu, cuda or npu; Ray hands the single devices out")
    name = devices.CLUSTER_RESOURCES[device]
    room = sum(int(node.get(name, 0) / share + 1e-9) for node in nodes)
    if room == 0 and workers is None:
        raise ValueError(f"no node of the cluster has {share:g} {name} for a worker; see docs/scale.md")
    return Placement(device, share, workers or room)


class RayWorker:
    """What each actor holds: a worker, or the reason why there is none."""

    def __init__(self, work: Work, device: str, folder: str, tries: int) -> None:
        self.tries, self.refused, self.worker = tries, "", None
        if os.path.isdir(folder):
            os.chdir(folder)  # relative paths mean the same as where the run was started
        try:
            self.worker = work.open(device)
        except (ValueError, OSError) as error:
            self.refused = str(error)

    def __call__(self, table: Any) -> Any:
        """A table of pickled blocks of units to one of pickled lists of outcomes, or of the reason."""
        import pyarrow

        found: list[list[Outcome] | str] = []
        for packed in table["block"].to_pylist():
            found.append(
                self.refused if self.worker is None else list(outcomes_of(self.worker, pickle.loads(packed), self.tries))
            )
        return pyarrow.table({"outcomes": pyarrow.array([pickle.dumps(some) for some in found], pyarrow.large_binary())})


@dataclass(frozen=True)
class RayEngine:
    """Works on a Ray cluster.

    Attributes:
        address: of a running cluster (``auto`` finds the one of this machine), None: one is started on this machine for
            the run.
        device, share, workers: see `place`.
        block_size: range of numbers that makes a block. tries: of one unit, 2 or more.
        dashboard: whether a cluster that is started here has Ray's dashboard.
        say: takes lines for a person.
    """

    address: str | None = None
    device: str = "auto"
    share: float = 1.0
    workers: int | None = None
    block_size: int = 64
    tries: int = TRIES
    dashboard: bool = True
    say: Callable[[str], None] = log.info

    def run(self, work: Work, units: Sequence[Unit]) -> Iterator[Outcome]:
        """See `work.Engine`. Raises ValueError when there is no cluster, no room on it, or no worker can start."""
        if not units:
            return
        from osum_echat.device import CLUSTER_RESOURCES

        with connected(self.address, self.dashboard) as where, _settings():
            placement = place(self.device, self.share, self.workers, nodes())
            self.say(f"ray: {placement.workers} workers of {placement.share:g} {CLUSTER_RESOURCES[placement.kind]}{where}")
            yield from self._rounds(work, units, placement)

    def _rounds(self, work: Work, units: Sequence[Unit], placement: Placement) -> Iterator[Outcome]:
        left = {unit.number: unit for unit in units}
        lost: Counter[int] = Counter()
        stopped = 0
        while left:
            alone = max(lost.values(), default=0) >= self.tries - 1
            todo = list(blocks(left.values(), 1 if alone else self.block_size))
            before = len(left)
            stop = yield from self._round(work, todo, placement, left, alone)
            if stop is not None:  # nobody knows which units were tried, so none is counted
                stopped = stopped + 1 if len(left) == before else 0
                if stopped == self.tries:
                    raise ValueError(f"the cluster did nothing in {self.tries} rounds: {stop}")
                continue
            lost.update(left.keys())
            for number in [number for number in left if lost[number] >= self.tries]:
                del left[number]
                yield Outcome(number, error=f"given up after {self.tries} tries: its worker died each time")
            if left:
                self.say(f"ray: workers were lost; {len(left)} records of their blocks are done again")

    def _round(
        self, work: Work, todo: Sequence[Sequence[Unit]], placement: Placement, left: dict[int, Unit], alone: bool
    ) -> Generator[Outcome, None, Exception | None]:
        """Outcomes of one pass over the blocks, taken from ``left``. Returns why the pass ended early, None when it did
        not."""
        import ray
        from ray.data import ActorPoolStrategy

        pool = ActorPoolStrategy(size=min(placement.workers, len(todo)), max_tasks_in_flight_per_actor=1 if alone else 2)
        packed = [{"block": pickle.dumps(list(block))} for block in todo]
        try:
            # Ray 2.64 will take restarts and retries of actors in another place; pyproject.toml stays below it.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results = ray.data.from_items(packed, override_num_blocks=len(packed)).map_batches(
                    RayWorker,
                    fn_constructor_args=(work, placement.kind, os.getcwd(), self.tries),
                    batch_size=None,
                    batch_format="pyarrow",
                    compute=pool,
                    max_restarts=-1,
                    max_task_retries=0,
                    **placement.options,
                )
            tables: Any = iter(results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
            with contextlib.closing(tables):  # its actors leave their devices before the next round begins
                for table in tables:
                    for outcomes in map(pickle.loads, table["outcomes"].to_pylist()):
                        if isinstance(outcomes, str):
                            raise ValueError(outcomes)
                        for outcome in outcomes:
                            if left.pop(outcome.number, None) is not None:
                                yield outcome
        except ray.exceptions.RayError as error:
            log.warning("ray: the run was broken off (%s: %s); what is missing is done again", type(error).__name__, error)
            return error
        return None


def nodes() -> list[Mapping[str, float]]:
    """Resources of each node that is there."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@contextlib.contextmanager
def connected(address: str | None, dashboard: bool) -> Iterator[str]:
    """A connection to a cluster, or a cluster of this machine that ends with it; a connection that there is already is
    used and kept.

    Yields:
        Where it can be watched, for a line of output.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError(_MISSING) from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if ray.is_initialized():
        yield ""
        return
    context = _start(ray, address, dashboard)
    try:
        yield f", dashboard http://{context.dashboard_url}" if context.dashboard_url else ""
    finally:
        ray.shutdown()


def _start(ray: Any, address: str | None, dashboard: bool, tries: int = 3) -> Any:
    """Connect, or start a cluster; Ray gives a node 30 s to come up, which a busy machine may not have, so it is tried
    again."""
    where: dict[str, Any] = {"address": "local", "include_dashboard": dashboard} if address is None else {"address": address}
    try:
        return ray.init(logging_level=logging.ERROR, log_to_driver=False, **where)
    except ConnectionError as error:
        raise ValueError(f"no Ray cluster at {address} ({error}); start one with `ray start --head`") from error
    except Exception as error:  # Ray has no class of its own for a node that does not come up
        if address is None and tries > 1 and "timed out during startup" in str(error):
            ray.shutdown()
            return _start(ray, address, dashboard, tries - 1)
        raise ValueError(f"Ray did not start: {error}") from error


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Ray Data's settings for a run that loses no more than blocks; the program's own come back after it."""
    from ray.data import DataContext

    context = DataContext.get_current()
    ours: dict[str, Any] = {
        "max_errored_blocks": -1,
        "max_consecutive_actor_init_deaths": 3,
        "execution_no_progress_timeout_s": -1,  # a block of a large model takes its time
        "enable_progress_bars": False,  # the run has its own
        "enable_operator_progress_bars": False,
        "print_on_execution_start": False,
    }
    before = {name: getattr(context, name) for name in ours}
    loggers = {name: logging.getLogger(name).level for name in ("ray.data",)}
    for name, value in ours.items():
        setattr(context, name, value)
    for name in loggers:
        # Each lost block with its trace; `RayEngine.say` has one line.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        for name, level in loggers.items():
            logging.getLogger(name).setLevel(level)
