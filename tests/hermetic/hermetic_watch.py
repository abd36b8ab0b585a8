"""What a test may touch: a hook on Python's audit events that stops everything else.

A test may open files of the checkout, of the environment (the packages), of the interpreter, of its own temporary folder, and what ``SYSTEM``
lists; it may start the interpreter, programs of the environment, and bash for a script of this project; it may connect to this machine.
Anything else raises `HermeticError` where it happens and is written down, so that code which swallows the error does not hide it.

The trade-off: only Python's own opens and starts are seen (https://docs.python.org/3/library/audit_events.html); a file that a C library opens
by itself is not. Processes that a test starts are watched too: `sitecustomize.py` beside this file installs the hook in them.

This file needs only the standard library and is cheap to import, because every child process imports it.
"""

from __future__ import annotations

import os
import shutil
import site
import sys
import sysconfig
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
# Shared with child processes.
ROOTS_VARIABLE = "OSUM_TESTS_MAY_OPEN"  # folders, separated like PATH
LOG_VARIABLE = "OSUM_TESTS_HERMETIC_LOG"  # child processes write here what they were stopped from doing

OPEN_RULE = "a test opens files of the checkout, the environment, the interpreter and its temporary folder only"
START_RULE = "a test starts the interpreter, programs of the environment, and bash for this project's scripts only"
CONNECT_RULE = "a test connects to this machine only"

# What every Linux, macOS and container has and what says nothing about the machine's own software. Folders end in a slash.
SYSTEM = (
    "/dev/",  # null, urandom, shared memory
    "/proc/",  # memory, processes, mounted file systems (psutil, torch)
    "/sys/",  # number and kind of the CPUs
    "/etc/localtime",  # time zone
    "/etc/hosts",
    "/etc/resolv.conf",
    "/etc/nsswitch.conf",
    "/etc/os-release",
    "/etc/ld.so.cache",  # shared libraries
    "/usr/share/zoneinfo/",
    "/usr/share/locale/",
    "/usr/lib/locale/",
    "/usr/share/fonts/",  # matplotlib looks at every font, once; it draws with its own
    "/usr/local/share/fonts/",
)
# Programs that libraries ask by themselves and do without: the answer changes no test.
PROGRAMS = (
    "fc-list",  # matplotlib lists the machine's fonts, once
    "numactl",  # DeepSpeed counts NUMA nodes
    "gcc",  # DeepSpeed looks whether it could compile its reader of files
    "ldconfig",  # ctypes.util.find_library asks where shared libraries are; so do the next two
    "cc",
    "ld",
)
LIBRARY_FOLDERS = ("/lib", "/usr/lib", "/usr/local/lib", "/opt/")  # of these only shared libraries: x.so, x.so.1, x.dylib


class HermeticError(RuntimeError):
    """A test reached outside; the message names the path or program and the rule."""


class Watch:
    """The state of the hook in this process: what is allowed, whether it watches, what it has stopped."""

    def __init__(self) -> None:
        self.roots: tuple[str, ...] = ()
        self.watching = False
        self.log: str | None = None  # where child processes write
        self.found: list[str] = []
        self.lock = threading.Lock()

    def stop(self, what: str, rule: str) -> None:
        """Write it down and raise HermeticError."""
        sentence = f"{what}; {rule} (tests/hermetic/hermetic_watch.py)"
        if self.log is not None and os.getpid() != OWNER:
            with open(self.log, "a", encoding="utf-8") as out:  # in the temporary folder: allowed
                out.write(sentence + "\n")
        else:
            with self.lock:
                self.found.append(sentence)
        raise HermeticError(sentence)

    def take(self) -> list[str]:
        """What was stopped since the last call, here and in child processes."""
        with self.lock:
            found, self.found = self.found, []
        if self.log is not None and os.path.exists(self.log):
            with open(self.log, encoding="utf-8") as file:
                found += file.read().splitlines()
            os.unlink(self.log)
        return found


WATCH = Watch()
OWNER = os.getpid()


def interpreter_roots() -> list[str]:
    """Folders of this Python and its packages, and its program; not the whole of /usr where that is the prefix."""
    paths = sysconfig.get_paths()
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix, "installed_base": sys.base_prefix}
    stdlib = sysconfig.get_path("stdlib", vars={**base, "installed_platbase": sys.base_exec_prefix})
    roots = [stdlib, paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"], *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        roots.append(site.getusersitepackages())
    version = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    roots.append(os.path.join(os.path.dirname(stdlib), version))
    if sys.prefix != sys.base_prefix:
        roots.append(sys.prefix)
    return [*roots, sys.executable, os.path.realpath(sys.executable)]


def install(roots: Iterable[str | Path], log: str | None) -> Watch:
    """Install the hook in this process (once; a hook cannot be taken away). ``roots`` are allowed beside the interpreter and the checkout."""
    global OWNER
    first = not WATCH.roots
    every = [CHECKOUT, *interpreter_roots(), *roots]
    plain = {os.path.abspath(root) for root in every}
    WATCH.roots = tuple(sorted(plain | {os.path.realpath(root) for root in plain}))
    WATCH.log = log
    OWNER = os.getpid()
    os.environ[ROOTS_VARIABLE] = os.pathsep.join(WATCH.roots)
    if log is not None:
        os.environ[LOG_VARIABLE] = log
    if first:
        sys.addaudithook(hook)
    return WATCH


def install_in_child() -> None:
    """For `sitecustomize`: watch this process from its first line to its last, as its parent is watched."""
    global OWNER
    roots = os.environ.get(ROOTS_VARIABLE)
    if roots:
        install(roots.split(os.pathsep), os.environ.get(LOG_VARIABLE))
        OWNER = 0  # everything is for the parent
        WATCH.watching = True


def inside(path: str) -> bool:
    return any(path == root or path.startswith(root + os.sep) for root in WATCH.roots)


def may_open(path: str) -> bool:
    """Whether a test may open ``path`` (absolute, without ``..``)."""
    if inside(path) or any(path == p or (p.endswith("/") and path.startswith(p)) for p in SYSTEM):
        return True
    name = os.path.basename(path)
    if name == "mime.types":  # the mimetypes module reads those of every web server it finds
        return True
    library = name.endswith((".so", ".dylib", ".dll")) or ".so." in name
    return (library and path.startswith(LIBRARY_FOLDERS)) or inside(os.path.realpath(path))


def may_start(program: str, arguments: list[str]) -> bool:
    """Whether a test may start ``program`` with ``arguments`` (the first is its name)."""
    if inside(os.path.abspath(program)) or inside(os.path.realpath(program)):
        return True
    name = os.path.basename(program)
    if name.rpartition("-")[2] in PROGRAMS or name in PROGRAMS:  # x86_64-linux-gnu-gcc
        return True
    if name != "bash" or len(arguments) < 2:
        return False
    script = os.path.abspath(arguments[1])
    return script.endswith(".sh") and script.startswith(str(CHECKOUT) + os.sep)


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    """The audit hook; called for every event of the process, so it leaves at once for those that do not matter."""
    if not WATCH.watching:
        return
    if event == "open":
        _opened(arguments[0])
    elif event in ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.spawn"):
        program, command = (arguments[1], arguments[2]) if event == "os.spawn" else arguments[:2]
        _started(program, command)
    elif event in ("os.system", "os.startfile"):
        WATCH.stop(f"the test started {_text(arguments[0])!r} by {event}", START_RULE)
    elif event == "socket.connect":
        _connected(arguments[1])


def _text(value: Any) -> str:
    return os.fsdecode(value) if isinstance(value, (str, bytes, os.PathLike)) else str(value)


def _opened(path: Any) -> None:
    if not isinstance(path, (str, bytes, os.PathLike)):  # a file descriptor
        return
    try:
        full = os.path.abspath(os.fsdecode(path))
    except (FileNotFoundError, TypeError):  # the working folder is gone
        return
    if not may_open(full):
        WATCH.stop(f"the test opened {full}", OPEN_RULE)


def _started(program: Any, command: Any) -> None:
    if isinstance(command, (str, bytes, os.PathLike)):
        command = [command]
    arguments = [_text(argument) for argument in command]
    name = _text(program) if program is not None else arguments[0]
    found = name if os.path.dirname(name) else shutil.which(name) or f"/not on PATH/{name}"
    if not may_start(found, arguments):
        WATCH.stop(f"the test started {name} ({' '.join(arguments)[:200]})", START_RULE)


def _connected(address: Any) -> None:
    if isinstance(address, tuple) and address and isinstance(address[0], str):
        host = address[0]
        if not (host in ("localhost", "::1", "0.0.0.0", "::") or host.startswith("127.")):
            WATCH.stop(f"the test connected to {host}", CONNECT_RULE)
