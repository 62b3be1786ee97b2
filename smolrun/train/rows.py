"""Rows of data files, one at a time, each with its place; what cannot be read is a row too, and says why.

.txt                      text between separators; {"text": ...}, its place the first line
.jsonl .ndjson            an object a line
.json                     a list of objects
.parquet                  columns (extra `train`)
.arrow, a data set as `datasets` keeps it on disk       columns (extra `train`)
any of the first three as .gz; a folder of any of these; a pattern
"""

from __future__ import annotations

import glob
import gzip
import importlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from smolrun.errors import OptionError

TEXT, LINES, JSON, PARQUET, ARROW = (".txt", ".text"), (".jsonl", ".ndjson"), (".json",), (".parquet",), (".arrow",)
KINDS = (*TEXT, *LINES, *JSON, *PARQUET, *ARROW)
PIECE = 1 << 20  # bytes of a text file that are looked through at a time
BROKEN = (EOFError, zlib.error, gzip.BadGzipFile)  # what a damaged .gz raises


@dataclass(frozen=True)
class Row:
    """A row and where it was found: file:line, or file:row of columns."""

    where: str
    value: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that is none."""

    where: str
    problem: str


def files(path: str) -> list[Path]:
    """The data files that a path stands for, in the order of their names.

    Raises:
        OptionError: nothing there, or nothing that is read.
    """
    if not path:
        raise OptionError("a path of data is empty")
    place = Path(path).expanduser()
    if place.is_dir():
        if (splits := place / "dataset_dict.json").is_file():
            names = _saved(splits, "splits", str)
            raise OptionError(f"{path}: a data set with the splits {', '.join(names)}: name one, {place / names[0]}")
        if (state := place / "state.json").is_file() and (place / "dataset_info.json").is_file():
            return [place / str(part.get("filename")) for part in _saved(state, "_data_files", dict)]
        found = [p for p in sorted(place.rglob("*")) if p.is_file() and kind(p) in KINDS]
        found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(place).parts)]
    else:
        found = [place] if place.is_file() else sorted(map(Path, glob.glob(str(place), recursive=True)))
        for file in found:
            if kind(file) not in KINDS:
                raise OptionError(f"{file}: a data file ends in {' '.join(KINDS)} (and .gz)")
    if not found:
        raise OptionError(f"{path}: no data files there ({' '.join(KINDS)}, also as .gz)")
    return found


def _saved(file: Path, key: str, kind: type) -> list[Any]:
    """A list in a file of `datasets`."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))[key]
        if found and isinstance(found, list) and all(isinstance(item, kind) for item in found):
            return found
    except (ValueError, LookupError, TypeError):
        pass
    raise OptionError(f"{file}: no {key} in it, as `datasets` writes them: save the data set again")


def kind(path: Path) -> str:
    """The ending that tells what a file holds."""
    return Path(path.stem if path.suffix == ".gz" else path.name).suffix


def read_rows(path: Path, separator: str = "<|endoftext|>") -> Iterator[Row | BadRow]:
    """All rows of a file.

    Raises:
        OptionError: columns, and no library to read them.
    """
    ending = kind(path)
    try:
        if ending in TEXT:
            yield from _texts(path, separator)
        elif ending in LINES:
            yield from _lines(path)
        elif ending in JSON:
            yield from _list(path)
        else:
            yield from _columns(path, ending)
    except BROKEN as error:
        yield BadRow(f"{path}", f"unreadable from a point on: {error}")


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _texts(path: Path, separator: str) -> Iterator[Row | BadRow]:
    """Line ends around a separator belong to it."""
    mark, data, seen, line = separator.encode(), bytearray(), 0, 1

    def text(part: bytearray) -> Iterator[Row | BadRow]:
        first = line + part.count(b"\n", 0, len(part) - len(part.lstrip(b"\r\n")))
        try:
            yield Row(f"{path}:{first}", {"text": part.decode("utf-8").strip("\r\n")})
        except UnicodeDecodeError as error:
            place = line + part.count(b"\n", 0, error.start)
            yield BadRow(f"{path}:{place}", f"not UTF-8: byte {part[error.start]:#04x}")

    with _open(path) as file:
        while piece := file.read(PIECE):
            data += piece
            begin = 0
            while mark and (end := data.find(mark, max(begin, seen))) >= 0:
                yield from text(data[begin:end])
                line += data.count(b"\n", begin, end + len(mark))
                begin = end + len(mark)
            del data[:begin]
            seen = max(0, len(data) - len(mark))  # a mark may have begun
    if data.strip():
        yield from text(data)


def _lines(path: Path) -> Iterator[Row | BadRow]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _object(f"{path}:{number}", line)


def _object(where: str, line: bytes) -> Row | BadRow:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        return BadRow(where, f"not JSON: {error}")
    return Row(where, value) if isinstance(value, dict) else BadRow(where, f"{type(value).__name__}, object expected")


def _list(path: Path) -> Iterator[Row | BadRow]:
    with _open(path) as file:
        try:
            values = json.load(file)
        except (ValueError, RecursionError) as error:
            yield BadRow(f"{path}:1", f"not JSON: {error}")
            return
    if not isinstance(values, list):
        yield BadRow(f"{path}:1", f"{type(values).__name__}, a list of objects expected")
        return
    for i, value in enumerate(values):
        where = f"{path}[{i}]"
        yield (
            Row(where, value) if isinstance(value, dict) else BadRow(where, f"{type(value).__name__}, object expected")
        )


def _columns(path: Path, ending: str) -> Iterator[Row | BadRow]:
    try:
        pyarrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise OptionError(f"{path}: Parquet and Arrow files need pyarrow: pip install 'smolrun[train]'") from None
    number = 0
    try:
        if ending in PARQUET:
            batches = parquet.ParquetFile(path).iter_batches()
        else:
            batches = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
        for batch in batches:
            for value in batch.to_pylist():
                yield Row(f"{path}:{number}", value)
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        yield BadRow(f"{path}:{number}", f"unreadable from here on: {error}")


def look_up(row: Row, field: str) -> str | BadRow:
    """The text of a field; dots lead inwards, as in "answers.0.text"."""
    value: Any = row.value
    for part in field.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
            continue
        if not isinstance(value, dict) or part not in value:
            keys = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
            return BadRow(row.where, f"no field {field!r}: {keys} found"[:200])
        value = value[part]
    if not isinstance(value, str):
        return BadRow(row.where, f"{field} is {type(value).__name__}, text expected")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may escape half of a pair
        return BadRow(
            row.where, f"{field}: lone surrogate U+{ord(value[error.start]):04X} at character {error.start:,}"
        )
    return value if value.strip() else BadRow(row.where, f"{field} is empty")
