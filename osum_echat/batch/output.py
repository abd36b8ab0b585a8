"""The folder of a run's results, written by one process: lines of JSON as they come, files beside them, and the same as
Parquet at the end.

A file is whole before its line is written, so a run that is killed leaves no line without its file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from osum_echat.batch.work import Outcome

NO_PARQUET = "Parquet needs pyarrow: pip install 'osum-echat[ray]', or write jsonl"


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that appears under its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    temporary.replace(path)


def write_files(folder: Path, outcome: Outcome) -> None:
    """The files of an outcome, in the folder of the results."""
    for name, content in outcome.files.items():
        write_whole(folder / name, content)


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], order: Sequence[str]) -> None:
    """Rows as a table with a column for each field: numbers, texts and lists of numbers as such, objects (think, tags
    ...) as JSON text.

    Args:
        order: names of the columns that are there in any case, in front; a row without the field has null.

    Raises:
        ValueError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(NO_PARQUET) from error
    names = [*order, *sorted({name for row in rows for name in row} - set(order))]
    columns = {name: _column(pyarrow, [row.get(name) for row in rows]) for name in names}
    temporary = path.with_name(f".{path.name}.tmp")
    parquet.write_table(pyarrow.table(columns), temporary, compression="zstd")
    temporary.replace(path)


def _column(pyarrow: Any, values: Iterable[Any]) -> Any:
    """Texts, and lists of whole numbers, keep their type; anything else is JSON text."""
    values = list(values)
    given = [value for value in values if value is not None]
    if given and all(isinstance(value, list) and all(type(x) is int for x in value) for value in given):
        return pyarrow.array(values, pyarrow.list_(pyarrow.int32()))
    if all(isinstance(value, str) for value in given):
        return pyarrow.array(values, pyarrow.string())
    return pyarrow.array([None if value is None else json.dumps(value, ensure_ascii=False) for value in values], pyarrow.string())


class Lines:
    """A jsonl file that grows by whole lines, so that a step that was killed goes on where it was.

    A last line that was cut off is taken away when the file is opened again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None

    def rows(self) -> Iterator[dict[str, Any]]:
        """What was written before, whole lines only."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    return
                yield json.loads(line)

    def __enter__(self) -> Lines:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                with self.path.open("r+b") as file:
                    file.truncate(whole)
        self._file = self.path.open("ab")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None

    def write(self, row: Mapping[str, Any]) -> None:
        assert self._file is not None, "a Lines is written inside its with block"
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
