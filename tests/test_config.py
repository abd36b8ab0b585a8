"""Typed configuration: unknown keys are named, overrides are typed, what is written is read back equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from osum_echat.config import (
    ConfigError,
    InputFile,
    InputPath,
    check,
    from_dict,
    load,
    merge,
    read_yaml,
    to_dict,
    to_yaml,
    warn_older,
)


@dataclass
class Optim:
    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.99)
    kind: Literal["adamw", "sgd"] = "adamw"


@dataclass
class Run:
    name: str
    steps: int = 10
    optim: Optim = field(default_factory=Optim)
    rooms: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    limit: int | None = None
    folder: Path = Path("out")

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError("steps must be at least 1")


def test_unknown_key_names_the_nearest_valid_one():
    with pytest.raises(ConfigError, match=r"unknown key optim\.lrr; did you mean optim\.lr\?"):
        from_dict(Run, {"name": "a", "optim": {"lrr": 1.0}}, where="x.yaml")


def test_missing_key_is_named():
    with pytest.raises(ConfigError, match=r"missing key.*name"):
        from_dict(Run, {})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"name": 3}, "name must be str"),
        ({"name": "a", "steps": 1.5}, "steps must be int"),
        ({"name": "a", "steps": True}, "steps must be int"),
        ({"name": "a", "optim": {"betas": [0.9]}}, "optim.betas must have 2 values"),
        ({"name": "a", "optim": {"kind": "adam"}}, "must be one of 'adamw', 'sgd'"),
        ({"name": "a", "optim": 3}, "must be a mapping"),
        ({"name": "a", "notes": "text"}, "notes must be a list"),
        ({"name": "a", "steps": 0}, "steps must be at least 1"),
    ],
)
def test_wrong_values_are_named(data, words):
    with pytest.raises(ConfigError, match=words):
        from_dict(Run, data)


def test_overrides_reach_nested_keys_and_are_typed(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("name: a\noptim: {lr: 1}\n", encoding="utf-8")
    run = load(Run, path, ["optim.lr=3e-4", "optim.betas=[0.8, 0.9]", "limit=null", "rooms.llm=1e-5", "folder=x/y"])
    assert run.optim.lr == 3e-4 and run.optim.betas == (0.8, 0.9)
    assert run.limit is None and run.rooms == {"llm": 1e-5} and run.folder == Path("x/y")


def test_override_without_equals_sign_is_refused():
    with pytest.raises(ConfigError, match="key=value"):
        load(Run, None, ["steps"])


def test_override_with_a_broken_value_is_named():
    with pytest.raises(ConfigError, match=r"name=\[a-z.*not valid YAML"):
        load(Run, None, ["name=[a-z"])


def test_base_file_is_merged(tmp_path):
    (tmp_path / "base.yaml").write_text("name: a\nsteps: 3\noptim: {lr: 0.1, kind: sgd}\n", encoding="utf-8")
    (tmp_path / "run.yaml").write_text("base: base.yaml\noptim: {lr: 0.2}\n", encoding="utf-8")
    run = load(Run, tmp_path / "run.yaml")
    assert run.steps == 3 and run.optim == Optim(lr=0.2, kind="sgd")


def test_broken_or_missing_files_are_clear_errors(tmp_path):
    with pytest.raises(ConfigError, match="not found"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="expected a mapping"):
        read_yaml(tmp_path / "list.yaml")


@example(Run(name="next\x85line\u2028or\u2029two"))
@given(
    st.builds(
        Run,
        name=st.text(max_size=8),
        steps=st.integers(1, 10**6),
        optim=st.builds(Optim, lr=st.floats(1e-12, 1e3)),
        rooms=st.dictionaries(st.text("abc", min_size=1, max_size=3), st.floats(0, 1), max_size=3),
        notes=st.lists(st.text(max_size=5), max_size=3),
        limit=st.none() | st.integers(0, 9),
    )
)
def test_what_is_written_is_read_back_equal(run):
    import yaml

    assert from_dict(Run, to_dict(run)) == run
    assert from_dict(Run, yaml.safe_load(to_yaml(run))) == run


def test_merge_keeps_what_is_not_named():
    assert merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 9}}) == {"a": {"b": 9, "c": 2}, "d": 3}


@dataclass
class Renamed:
    """A section some of whose keys had other names."""

    RENAMED_KEYS: ClassVar[Mapping[str, str]] = {"rooms": "parts"}

    parts: dict[str, float] = field(default_factory=dict)
    form: Literal["tag", "language"] = "tag"
    marks: frozenset[str] = frozenset()

    @classmethod
    def read_older(cls, data: dict[str, Any], where: str) -> dict[str, Any]:
        if data.get("form") == "natural":
            warn_older(where, "form: natural", "form: language")
            data["form"] = "language"
        return data


def test_older_keys_and_values_are_read_with_a_warning_that_names_the_new_ones(caplog):
    old = from_dict(Renamed, {"rooms": {"a": 1.0}, "parts": {"b": 2.0}, "form": "natural"}, "old.yaml")
    assert old == Renamed({"a": 1.0, "b": 2.0}, "language")
    assert [r.getMessage() for r in caplog.records] == [
        "old.yaml: rooms is an older name; write parts",
        "old.yaml: form: natural is an older name; write form: language",
    ]
    caplog.clear()
    assert from_dict(Renamed, to_dict(Renamed({"a": 1.0}, marks=frozenset("yx")))) == Renamed({"a": 1.0}, marks=frozenset("xy"))
    assert not caplog.records


def test_changes_are_checked_without_being_whole():
    check(Run, {"optim": {"lr": 1}}, "changes")
    for wrong, message in (
        ({"optim": {"lrate": 1}}, r"changes: unknown key optim.lrate"),
        ({"steps": "many"}, "steps must be int"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(Run, wrong, "changes")


@dataclass
class Lists:
    list: InputPath = ""
    other: InputPath | None = None
    out: str = ""
    anything: Any = None


def test_a_relative_path_starts_at_its_file_then_where_one_stands(tmp_path, monkeypatch):
    here, conf = tmp_path / "here", tmp_path / "conf"
    for folder, names in ((conf, ["both.txt", "at_file.txt"]), (here, ["both.txt", "here.txt"])):
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    monkeypatch.chdir(here)
    for written, found in [
        ("both.txt", str(conf / "both.txt")),
        ("at_file.txt", str(conf / "at_file.txt")),
        ("here.txt", "here.txt"),
        ("Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-3B-Instruct"),
        (str(here / "both.txt"), str(here / "both.txt")),
    ]:
        (conf / "a.yaml").write_text(f"list: {written}\nout: both.txt\nanything: [both.txt]\n", encoding="utf-8")
        lists = load(Lists, conf / "a.yaml")
        assert (lists.list, lists.out, lists.anything) == (found, "both.txt", ["both.txt"])
        assert all(type(value) is str for value in (lists.list, lists.out, *lists.anything))
    assert load(Lists, conf / "a.yaml", ["list=both.txt"]).list == "both.txt"  # a command line starts where one stands


def test_a_path_of_a_base_starts_at_the_base(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "a.txt").touch()
    (tmp_path / "deep" / "base.yaml").write_text("list: a.txt\nother: a.txt\n", encoding="utf-8")
    (tmp_path / "deep" / "er" / "top.yaml").write_text("base: ../base.yaml\nother: b.txt\n", encoding="utf-8")
    lists = load(Lists, tmp_path / "deep" / "er" / "top.yaml")
    assert Path(lists.list).samefile(tmp_path / "deep" / "a.txt") and lists.other == "b.txt"


def test_files_of_the_package_have_a_name(tmp_path):
    (tmp_path / "a.yaml").write_text("list: package:ct_config.yaml\n", encoding="utf-8")
    assert "encoder" in read_yaml(load(Lists, tmp_path / "a.yaml").list)
    assert read_yaml("package:prompt_config.yaml")["<TRANSCRIBE>"]
    with pytest.raises(ConfigError, match=r"there are ct_config\.yaml, generation\.yaml, prompt_config\.yaml"):
        read_yaml("package:nothing.yaml")


@pytest.mark.parametrize("name", ["ct_config.yaml", "prompt_config.yaml", "generation.yaml"])
def test_files_in_conf_are_those_of_the_package(root_dir, name):
    assert read_yaml(root_dir / "conf" / name) == read_yaml(f"package:{name}")


@dataclass
class Patterns:
    lists: list[InputFile] = field(default_factory=list)


def test_patterns_and_files_follow_the_same_rule(tmp_path):
    (tmp_path / "part_1.jsonl").touch()
    (tmp_path / "a.yaml").write_text("lists: [part_*.jsonl, elsewhere/part_*.jsonl]\n", encoding="utf-8")
    assert load(Patterns, tmp_path / "a.yaml").lists == [tmp_path / "part_*.jsonl", Path("elsewhere/part_*.jsonl")]
