"""The folder of a run's results, written by one process: lines of JSON as they come, files beside them, and the same as Parquet at the end.

A file is whole before its line is written, so a run that is killed leaves no line without its file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from osum_echat.batch.work import Outcome


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
    """Rows as a table with a column for each field: numbers, texts and lists of numbers as such, objects (think, tags ...) as JSON text.

    Args:
        order: names of the columns that are there in any case, in front; a row without the field has null.

    Raises:
        ValueError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("Parquet needs pyarrow: pip install 'osum-echat[ray]', or write jsonl") from error
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
