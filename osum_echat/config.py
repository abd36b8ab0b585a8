"""Typed configuration: dataclasses in code, YAML as their written form.

Each package defines its own dataclasses beside what they configure; this module only knows how to read, check, override
and write them. An unknown key is an error that names the nearest valid one, a value of the wrong type is an error that
names the key.

A dataclass whose keys were renamed says so, and files with the older keys are read with a warning that names the new
ones: ``RENAMED_KEYS: ClassVar[Mapping[str, str]]`` (older key -> key), and for anything else a classmethod
``read_older(data, where)`` that is given the plain data of the section and returns it in today's form (see
`warn_older`). Each file and the overrides are brought to today's form before they are put together, so the later one
counts whatever names they use. A dataclass whose sections take over values from one another has a classmethod
``fill_in(data)`` that is given the plain data of the whole and completes it.

    cfg = load(TrainConfig, "recipes/mini/conf/understanding.yaml", overrides=["optim.lr=1e-4", "seed=7"])

A YAML file may start from another with ``base: other.yaml``; mappings merge, an empty mapping (``{}``) and everything
else replace.

One rule for a relative path to something that is read (`find_path`): the folder of the YAML file that states it, then
the folder where one stands; ``package:NAME`` is the file NAME that comes with this package (`osum_echat/conf/`). On a
command line there is no file, so a path starts where one stands. Fields of that kind have the type `InputPath` (or
`InputFile`); a pattern with ``*`` is one too. Paths that are written (``out``) always start where one stands.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import logging
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import yaml

T = TypeVar("T")
log = logging.getLogger(__name__)


_INPUT = "a file or folder that is read"
InputPath = Annotated[str, _INPUT]
InputFile = Annotated[Path, _INPUT]
PACKAGE = "package:"


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key and what to do."""


class _FileText(str):
    """A string of a YAML file; it knows the file's folder until it becomes the value of a field."""

    folder: Path


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads ``1e-6`` as a number, as people write it."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper whose strings stand in one line and are read back as they were: PyYAML folds line breaks away unless
    they are escaped."""


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if any(c in text for c in "\n\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_str)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def package_file(name: str) -> Path:
    """The YAML file ``name`` that comes with the package: ct_config.yaml (the released model), prompt_config.yaml,
    generation.yaml.

    Raises ConfigError when there is none of that name.
    """
    folder = importlib.resources.files("osum_echat") / "conf"
    path = Path(str(folder / name))
    if not path.is_file():
        known = sorted(item.name for item in folder.iterdir() if item.name.endswith(".yaml"))
        raise ConfigError(f"{PACKAGE}{name} does not come with the package; there are {', '.join(known)}")
    return path


def find_path(path: str, folder: Path | None = None) -> str:
    """The file, folder or files that a relative path or pattern of a YAML file in ``folder`` names (the rule: the
    module's docstring).

    Nothing there: as it was written (it may be a name on the hub; whoever reads it says what is missing).
    """
    if path.startswith(PACKAGE):
        return str(package_file(path.removeprefix(PACKAGE)))
    if folder is None or not path or Path(path).is_absolute():
        return path
    there = any(folder.glob(path)) if any(c in path for c in "*?[") else (folder / path).exists()
    return str(folder / path) if there else path


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read one YAML mapping, following ``base:``. ``path`` may be ``package:NAME``.

    Raises ConfigError for a missing file, broken YAML or another top level.
    """
    return typing.cast("dict[str, Any]", _without_folders(read_with_folders(path)))


def read_with_folders(path: str | Path, cls: type[Any] | None = None) -> dict[str, Any]:
    """The same for `from_dict`: strings know their file's folder, until fields of type `InputPath` are found from
    there.

    ``cls``: the dataclass that the file describes; older keys get today's names.
    """
    path = Path(find_path(str(path)))
    if not path.is_file():
        raise ConfigError(f"config file not found: {path}")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping at top level, found {type(data).__name__}")
    base = data.pop("base", None)
    data = typing.cast("dict[str, Any]", _with_folders(data, path.parent))
    if cls is not None:
        data = _all_renewed(cls, data, str(path))
    if base is not None:
        data = merge(read_with_folders(find_path(str(base), path.parent), cls), data)
    return data


def _with_folders(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _with_folders(inner, folder) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_folders(inner, folder) for inner in value]
    if isinstance(value, str):
        value = _FileText(value)
        value.folder = folder
    return value


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return str(value) if isinstance(value, _FileText) else value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` updated by ``over``: mappings merge key by key; an empty mapping inside, and any other value,
    replaces."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) and value else value
    return out


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``["a.b=1", "c=x"]`` as a nested mapping; values are read as YAML."""
    out: dict[str, Any] = {}
    for item in overrides:
        key, sep, text = item.partition("=")
        if not sep or not key.strip():
            raise ConfigError(f"override {item!r} is not of the form key=value (for example optim.lr=1e-4)")
        try:
            nested: Any = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {item!r}: the value is not valid YAML (quote it?): {error}") from error
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        out = merge(out, nested)
    return out


def load(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Read ``cls`` (a dataclass) from a YAML file and ``key=value`` overrides; both optional."""
    data = read_with_folders(path, cls) if path is not None else {}
    changes = _all_renewed(cls, parse_overrides(overrides), "overrides")
    return from_dict(cls, merge(data, changes), where=str(path) if path is not None else "overrides")


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build dataclass ``cls`` from plain data, checking every key and type."""
    return typing.cast(T, _build(cls, data, where, ""))


def check(cls: type[Any], data: Mapping[str, Any], where: str = "") -> None:
    """Check keys and types of changes to ``cls``: any part of it may be missing. Raises ConfigError."""
    _arguments(cls, data, where, "", partial=True)


def warn_older(where: str, old: str, new: str) -> None:
    """Say that a key (or a value) of a file has another name now."""
    log.warning("%s: %s is an older name; write %s", where, old, new)


def to_dict(cfg: Any) -> dict[str, Any]:
    """Plain data that YAML can write and `from_dict` reads back equal."""
    return typing.cast("dict[str, Any]", _plain(cfg))


def to_yaml(cfg: Any) -> str:
    """The config as YAML text, keys in the order of the dataclass."""
    return yaml.dump(to_dict(cfg), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        value = sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def _build(cls: Any, data: Any, where: str, prefix: str) -> Any:
    kwargs = _arguments(cls, data, where, prefix)
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.init and f.name not in kwargs and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: missing key(s) {', '.join(prefix + m for m in missing)}")
    try:
        return cls(**kwargs)
    except ConfigError:
        raise
    except ValueError as error:  # a dataclass's own __post_init__ check
        raise ConfigError(f"{where}: {prefix.rstrip('.') or cls.__name__}: {error}") from error


def _arguments(cls: Any, data: Any, where: str, prefix: str, partial: bool = False) -> dict[str, Any]:
    """The values of a section by field name, each of its field's type. ``partial``: sections inside are checked, not
    built."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: {prefix or 'top level'} must be a mapping, found {data!r}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls, include_extras=True)
    kwargs: dict[str, Any] = {}
    data = _renewed(cls, data, where, prefix)
    fill_in = getattr(cls, "fill_in", None)
    if fill_in is not None and not partial:
        data = fill_in(dict(data))
    for key, value in data.items():
        name = f"{prefix}{key}"
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]!s}?" if near else f"valid keys here: {', '.join(fields)}"
            raise ConfigError(f"{where}: unknown key {name}; {hint}")
        kwargs[key] = _convert(hints[key], value, where, name, partial)
    return kwargs


def _renewed(cls: Any, data: Mapping[str, Any], where: str, prefix: str) -> Mapping[str, Any]:
    """A section with today's keys (see the module's docstring). Where a file has both, the older key goes first."""
    renamed: Mapping[str, str] = getattr(cls, "RENAMED_KEYS", {})
    if any(key in renamed for key in data):
        older = {renamed[key]: value for key, value in data.items() if key in renamed}
        for key in data:
            if key in renamed:
                warn_older(where, prefix + str(key), prefix + renamed[key])
        data = merge(older, {key: value for key, value in data.items() if key not in renamed})
    read_older = getattr(cls, "read_older", None)
    return data if read_older is None else typing.cast("Mapping[str, Any]", read_older(dict(data), where))


def _all_renewed(cls: Any, data: Mapping[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """The same for a section and the sections in it."""
    hints = typing.get_type_hints(cls)
    out = dict(_renewed(cls, data, where, prefix))
    for key, value in out.items():
        hint = hints.get(key)
        options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
        section = next((option for option in options if dataclasses.is_dataclass(option)), None)
        if section is not None and isinstance(value, Mapping):
            out[key] = _all_renewed(section, value, where, f"{prefix}{key}.")
    return out


def _convert(hint: Any, value: Any, where: str, name: str, partial: bool = False) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _without_folders(value)
    if origin is Annotated:
        if _INPUT in args and isinstance(value, str):
            value = find_path(str(value), getattr(value, "folder", None))
        return _convert(args[0], value, where, name, partial)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for option in (a for a in args if a is not type(None)):
            try:
                return _convert(option, value, where, name, partial)
            except ConfigError as error:
                errors.append(error)
        raise errors[0]
    if origin is Literal:
        if value in args:
            return _without_folders(value)
        raise ConfigError(f"{where}: {name} must be one of {', '.join(map(repr, args))}, found {value!r}")
    if dataclasses.is_dataclass(hint):
        if isinstance(value, typing.cast(type, hint)):
            return value
        return _arguments(hint, value, where, name + ".", partial) if partial else _build(hint, value, where, name + ".")
    if origin in (list, tuple, frozenset):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{where}: {name} must be a list, found {value!r}")
        if origin is tuple and args and args[-1] is not Ellipsis:
            if len(value) != len(args):
                raise ConfigError(f"{where}: {name} must have {len(args)} values, found {value!r}")
            return tuple(_convert(a, v, where, f"{name}[{i}]", partial) for i, (a, v) in enumerate(zip(args, value, strict=True)))
        inner = args[0] if args else Any
        return origin(_convert(inner, v, where, f"{name}[{i}]", partial) for i, v in enumerate(value))
    if origin in (dict, Mapping) or hint is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: {name} must be a mapping, found {value!r}")
        inner = args[1] if args else Any
        return {str(k): _convert(inner, v, where, f"{name}.{k}", partial) for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type):
        if isinstance(value, hint) and not (hint in (int, float) and isinstance(value, bool)):
            return _without_folders(value)
        raise ConfigError(f"{where}: {name} must be {hint.__name__}, found {value!r}")
    raise AssertionError(f"config field {name} has a type this reader does not know: {hint}")
