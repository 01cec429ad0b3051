"""Read raw records, with row numbers, from files, globs, directories and hub datasets.

A hub dataset is OWNER/NAME[/CONFIGURATION][@SPLIT], for example org/prefs/en@train_prefs; the split
defaults to the caller's. (Old names without an owner have no configuration: imdb@test.) A local
path of the same name takes precedence, unless the name has the prefix "hub:", which also allows
slices: hub:org/prefs@train[:100].

JSON is read directly; Parquet, Arrow, saved datasets and the hub through `datasets`. Does not know
what a record means.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from glob import escape, glob, has_magic
from pathlib import Path
from typing import Any

from rayrm.config import local_path
from rayrm.errors import DataError

# `datasets` is imported only when it is needed, since clients import this module through rows.py.

_JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
_ARROW_FORMATS = {".parquet": "parquet", ".arrow": "arrow"}
_SUFFIXES = ", ".join((*_JSON_SUFFIXES, *_ARROW_FORMATS))
_HUB = "hub:"
_HUB_PART = r"[A-Za-z0-9][\w.-]*"
_HUB_NAME = re.compile(
    rf"(?P<name>{_HUB_PART}(/{_HUB_PART})?)(/(?P<configuration>[\w.-]+))?(@(?P<split>[\w.:%+[\]-]+))?"
)

# Columns and message keys whose objects differ in their keys: schemas and arguments of tools.
_SCHEMALESS = ("tools", "tool_calls")

# Words in file names that indicate a split, as in `datasets`.
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}

# Scoring a corpus into OUT writes its parts and the record of the run, RUN, to OUT.parts.
PARTS, RUN = ".parts", "run.json"

Rows = Iterable[tuple[int, Any]]
"""(row number, record); a record that could not be decoded is a DataError."""


def absolute(path: str) -> str:
    """Return a local path or glob as absolute, for other processes; hub names stay unchanged."""
    here = local_path(path)
    if path.startswith(_HUB):
        return path
    if here.exists() or has_magic(path) or _readable(here) or not _HUB_NAME.fullmatch(path):
        return str(here.absolute())
    return path


def open_sources(path: str, split: str, ignored: list[str]) -> list[tuple[str, Rows]]:
    """Return the sources at `path` as (name, rows), in reading order.

    split: what to read if the path names no split. Adds files that it skips to `ignored`. Raises
    DataError if there is nothing to read.
    """
    here = local_path(path)
    if path.startswith(_HUB):
        if not (named := _HUB_NAME.fullmatch(path.removeprefix(_HUB))):
            raise DataError(f"{path!r}: must be {_HUB}OWNER/NAME[/CONFIGURATION][@SPLIT].")
        return [(path, _hub_rows(path, named, split))]
    if here.is_dir():
        files = _directory(here, split, ignored)
    elif here.exists():
        if not _readable(here):
            raise DataError(f"{here.resolve()}: unknown file type; known: {_SUFFIXES}.")
        files = [here]
    elif has_magic(path):
        matches = [Path(match) for match in sorted(glob(str(here), recursive=True))]
        files = [match for match in matches if _readable(match) or _is_saved_dataset(match)]
        ignored += [
            str(match)
            for match in matches
            if match not in files and not any(match in file.parents for file in files)
        ]
        if not files:
            raise DataError(f"{here.absolute()}: no file of type {_SUFFIXES} matches this pattern.")
    elif (named := _HUB_NAME.fullmatch(path)) and not _readable(here):
        return [(path, _hub_rows(path, named, split))]
    else:
        raise DataError(f"{here.absolute()}: no such file or directory (given as {path!r}).")
    return [(str(file), _file_rows(file, split)) for file in files]


def _readable(path: Path) -> bool:
    if path.name == RUN and path.parent.name.endswith(PARTS):
        return False
    return not path.is_dir() and path.name.endswith((*_JSON_SUFFIXES, *_ARROW_FORMATS))


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def _directory(directory: Path, split: str, ignored: list[str]) -> list[Path]:
    """Return a directory's files; only those of `split` if file names indicate several splits."""
    found = {
        path: _split_in_name(path.relative_to(directory)) for path in _walk(directory, ignored)
    }
    splits = sorted({name for name in found.values() if name})
    if len(splits) > 1:
        if split not in splits:
            raise DataError(
                f"{directory.resolve()}: no files of split {split!r}; the file names indicate "
                f"{', '.join(splits)}."
            )
        ignored += [str(path) for path, name in found.items() if name != split]
        return [path for path, name in found.items() if name == split]
    if not found:
        raise DataError(f"{directory.resolve()}: no file of type {_SUFFIXES} in this directory.")
    return list(found)


def _walk(directory: Path, ignored: list[str]) -> Iterator[Path]:
    if _is_saved_dataset(directory):
        yield directory
        return
    for path in sorted(directory.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            yield from _walk(path, ignored)
        elif _readable(path) and not path.name.startswith("."):
            yield path
        else:
            ignored.append(str(path))


def _split_in_name(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", str(path).lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _file_rows(path: Path, split: str) -> Rows:
    if path.is_dir():
        return _saved_rows(path, split)
    return _json_rows(path) if path.name.endswith(_JSON_SUFFIXES) else _arrow_rows(path)


def _json_rows(path: Path) -> Rows:
    # Not read by `datasets`: it parses an answer such as "2024-01-01" as a date, and loses line
    # numbers.
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            if re.match(rb"(\xef\xbb\xbf)?\s*\[", file.peek(4096)):
                yield from enumerate(json.load(file), 1)
                return
            for row, line in enumerate(file, 1):
                if line.strip():
                    yield row, _json_line(line)
    except ValueError as error:
        raise DataError(f"{path.resolve()}: not valid JSON: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path.resolve()}: cannot be read: {error}") from error


def _json_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        return DataError(f"not valid JSON ({error}); must be one object per line, or one array.")


def _arrow_rows(path: Path) -> Rows:
    import datasets

    # Streaming reads the file in place, without a copy in the cache and without a progress bar.
    kind = _ARROW_FORMATS[path.suffix]
    try:
        file = escape(str(path))
        rows = datasets.load_dataset(kind, data_files=file, split="train", streaming=True)
        yield from _numbered(rows)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path.resolve()}: cannot be read as {kind}: {error}") from error


def _saved_rows(directory: Path, split: str) -> Rows:
    import datasets

    try:
        saved = datasets.load_from_disk(str(directory))
    except (OSError, ValueError) as error:
        raise DataError(f"{directory.resolve()}: cannot be read: {error}") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(
                f"{directory.resolve()}: no split {split!r}; it has {', '.join(saved)}."
            )
        saved = saved[split]
    yield from _numbered(saved)


def _hub_rows(path: str, named: re.Match[str], split: str) -> Rows:
    import datasets

    split = named["split"] or split
    try:
        rows = datasets.load_dataset(named["name"], named["configuration"], split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        where = "" if path.startswith(_HUB) else f"nothing at {Path(path).absolute()}, and "
        raise DataError(
            f"{path!r}: {where}split {split!r} of the hub dataset of this name cannot be read: "
            f"{error}"
        ) from error
    yield from _numbered(rows)


def _numbered(rows: Iterable[dict[str, Any]]) -> Rows:
    for row, record in enumerate(rows, 1):
        yield row, _as_in_json(record)


def _as_in_json(value: Any, inside: bool = False) -> Any:
    """Return an Arrow value as JSON would hold it.

    Arrow gives all objects of a column the same keys. If `inside` a _SCHEMALESS column, null marks
    a key that the object does not have, and the key is removed; other nulls stay.
    """
    if isinstance(value, list):
        return [_as_in_json(entry, inside) for entry in value]
    if isinstance(value, dict):
        return {
            key: _as_in_json(entry, inside or key in _SCHEMALESS)
            for key, entry in value.items()
            if not (inside and entry is None)
        }
    return value
