"""Documents as ids, made once: a memory-mapped cache for each data file, keyed by content, tokenizer, way of reading.

    SMOLRUN_CACHE_DIR/tokens/KEY/
        ids.bin           all documents one after the other: uint16 or uint32; of examples int32 (train/examples.py)
        documents.npy     one record each: end (in ids); size (bytes of UTF-8; of an example its ids before it was cut);
                          digest (of the text; of an example its ids)
        about.json        file, counts, and every bad row

The folder is written under another name and renamed when all of it is on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolrun.errors import ModelNotFound, OptionError
from smolrun.files.checkpoint import END_OF_TEXT, TokenizerSource, open_checkpoint
from smolrun.files.folder import parse_object
from smolrun.kernels.load import user_cache
from smolrun.text.tokenizer import Tokenizer
from smolrun.train.recipe import Source
from smolrun.train.rows import BadRow, files, look_up, read_rows

VERSION = 4
RECORD = np.dtype([("end", "<i8"), ("size", "<i8"), ("digest", "<u8")])
BYTES_A_TOKEN = 4  # about, for the progress
MANY = 256  # documents from one sign of progress to the next
Progress = Callable[[str, int, int], object]  # stage, done, all
Document = tuple[Sequence[int] | NDArray[np.integer[Any]], int, int]  # ids, size, digest


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, and what tells it from others.

    Attributes:
        end: id of <|endoftext|>, which stands before and after every document.
    """

    tokenizer: Tokenizer
    digest: str
    end: int

    @classmethod
    def of(cls, source: TokenizerSource, vocab_size: int = 0) -> Vocabulary:
        """Of a checkpoint.

        Raises:
            OptionError: it has no <|endoftext|>.
        """
        tokenizer = Tokenizer.from_source(source, vocab_size=vocab_size)
        if END_OF_TEXT not in tokenizer.specials:
            raise OptionError(f"the tokenizer has no {END_OF_TEXT}, which parts documents")
        return cls(tokenizer, tokenizer_digest(source), tokenizer.specials[END_OF_TEXT])


def tokenizer_digest(source: TokenizerSource) -> str:
    """SHA-256 of what makes a tokenizer."""
    facts = [source.json, source.vocab, source.merges, source.token_types, sorted(source.specials.items())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def read_tokenizer(path: Path) -> TokenizerSource:
    """The tokenizer of a folder, a tokenizer.json or a GGUF file.

    Raises:
        ModelNotFound, ModelFileError, UnsupportedModel: none is there, or none that is run.
    """
    if path.suffix == ".gguf":
        with open_checkpoint(path) as checkpoint:
            return checkpoint.tokenizer
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelNotFound(f"{file}: no such file: a tokenizer is a folder with tokenizer.json, or a GGUF file")
    text = file.read_text(encoding="utf-8")
    added = parse_object(text, str(file)).get("added_tokens") or []
    return TokenizerSource(json=text, specials={t["content"]: t["id"] for t in added if t.get("special")})


@dataclass(frozen=True)
class Tokens:
    """The documents of one file.

    Attributes:
        key: what they were made of: content, tokenizer, field.
        ids: every document's, without end markers.
        documents: RECORD of each.
        bad: the rows that are none.
    """

    key: str
    ids: NDArray[np.unsignedinteger]
    documents: NDArray[np.void]
    bad: tuple[BadRow, ...]


def tokens_of(path: Path, source: Source, vocabulary: Vocabulary, progress: Progress | None = None) -> Tokens:
    """A file's documents, from the cache, or put there."""

    def documents() -> Iterator[Document | BadRow]:
        for row in texts_of(path, source):
            if isinstance(row, BadRow):
                yield row
            elif ids := vocabulary.tokenizer.encode(row[1]):
                data = row[1].encode()
                yield ids, len(data), digest_of(data)
            else:
                yield BadRow(row[0], "no token stands for any of its bytes")

    facts = [vocabulary.digest, source.field, source.separator]
    kind = np.dtype(np.uint16 if vocabulary.tokenizer.vocab_size <= 1 << 16 else np.uint32)
    return cached(path, facts, kind, documents(), progress)


def cached(
    path: Path, facts: Sequence[object], kind: np.dtype[Any], documents: Iterable[Document | BadRow],
    progress: Progress | None,
) -> Tokens:  # fmt: skip
    """What a file's documents are, from the cache, or put there.

    Args:
        facts: what they depend on besides the file's content, as JSON.
        kind: dtype of the ids.
        documents: made of the file; not asked for if they are there.
    """
    key = key_of(path, *facts)
    folder = user_cache() / "tokens" / key
    if not folder.exists():
        _make(folder, path, kind, documents, progress)
    try:
        records = np.load(folder / "documents.npy")
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        size = int(records["end"][-1]) if len(records) else 0
        kind = np.dtype(about["dtype"])
        fits = (folder / "ids.bin").stat().st_size == size * kind.itemsize
    except (ValueError, EOFError, FileNotFoundError, KeyError):
        fits = False
    if not fits:
        raise OptionError(f"{folder}: its files do not fit each other: delete it, it is made again")
    ids = np.memmap(folder / "ids.bin", kind, "r", shape=(size,)) if size else np.empty(0, kind)
    return Tokens(key, ids, records, tuple(BadRow(str(path) + bad["where"], bad["problem"]) for bad in about["bad"]))


def key_of(path: Path, *facts: object) -> str:
    """What tells a file's documents from others: its content, and facts as JSON."""
    with open(path, "rb") as file:
        content = hashlib.sha256()
        while piece := file.read(1 << 20):
            content.update(piece)
    whole = [VERSION, content.hexdigest(), "".join(path.suffixes), *facts]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:32]


def _make(
    folder: Path, path: Path, kind: np.dtype[Any], documents: Iterable[Document | BadRow], progress: Progress | None
) -> None:
    part = folder.with_name(f".{folder.name}.{os.urandom(6).hex()}.part")
    part.mkdir(parents=True)
    records, bad, end, whole = list[tuple[int, int, int]](), list[BadRow](), 0, path.stat().st_size
    try:
        with open(part / "ids.bin", "xb") as file:
            for number, document in enumerate(documents):
                if isinstance(document, BadRow):
                    bad.append(document)
                    continue
                ids, size, digest = document
                file.write(np.asarray(ids, kind).tobytes())
                end += len(ids)
                records.append((end, size, digest))
                if progress and number % MANY == 0:
                    progress("tokenize", min(BYTES_A_TOKEN * end, whole - 1), whole)
            file.flush()
            os.fsync(file.fileno())
        with open(part / "documents.npy", "xb") as file:
            np.save(file, np.array(records, RECORD))
            os.fsync(file.fileno())
        # the same content may lie elsewhere tomorrow: places without the path
        rows = [asdict(BadRow(row.where.removeprefix(str(path)), row.problem)) for row in bad]
        about = {"file": str(path), "dtype": kind.str, "documents": len(records), "tokens": end, "bad": rows}
        with open(part / "about.json", "xb") as file:
            file.write(json.dumps(about, indent=1).encode())
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # another process was first, with the same
            os.rename(part, folder)
        if not folder.exists():
            raise OSError(f"{folder}: cannot be written")
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if progress:
            progress("tokenize", 1, 1)


def texts_of(path: Path, source: Source) -> Iterator[tuple[str, str] | BadRow]:
    """(place, text) of each document of a file."""
    for row in read_rows(path, source.separator):
        text = row if isinstance(row, BadRow) else look_up(row, source.field)
        yield text if isinstance(text, BadRow) else (row.where, text)


def texts(source: Source, bad: list[BadRow]) -> Iterator[str]:
    """The text of every document of a source that is not held out; rows that are none go to `bad`."""
    for path in files(source.path):
        for row in texts_of(path, source):
            if isinstance(row, BadRow):
                bad.append(row)
            elif digest_of(row[1].encode()) / 2.0**64 >= source.held_out:
                yield row[1]


def digest_of(data: bytes) -> int:
    """The first 64 bits of a SHA-256, which decide what is held out."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


class Documents:
    """The documents of several files, numbered through: mapped, and read when they are asked for.

    Attributes:
        digest: of the files' contents and of how they are read.
        records: RECORD of each document.
        lengths: int64 (documents,): the ids of each.
        bad: the rows that are none.
    """

    def __init__(self, name: str, files: Sequence[Tokens], bad_rows: float, per_row: int = 1) -> None:
        """
        Args:
            name: the recipe's table that has `bad_rows`, the share of rows that may be unusable.
            per_row: documents that a row makes.

        Raises:
            OptionError: there are more.
        """
        self._files = files
        self.digest = hashlib.sha256("".join(file.key for file in files).encode()).hexdigest()[:16]
        self.records = np.concatenate([file.documents for file in files])
        self.lengths = np.concatenate([np.diff(file.documents["end"], prepend=0) for file in files]).astype(np.int64)
        self.bad = tuple(bad for file in files for bad in file.bad)
        self._first = np.cumsum([0, *(len(file.documents) for file in files)])
        rows = len(self.records) // per_row + len(self.bad)
        if len(self.bad) > bad_rows * rows:
            first = "; ".join(f"{row.where}: {row.problem}" for row in self.bad[:3])
            raise OptionError(
                f"{name}: {len(self.bad):,} of {rows:,} rows cannot be used ({first}): mend them, or raise "
                f"{name}.bad_rows, now {bad_rows:g}"
            )

    @property
    def chance(self) -> NDArray[np.float64]:
        """A number from 0 to 1 for each, by its content: float64 (documents,)."""
        chance: NDArray[np.float64] = self.records["digest"] / 2.0**64
        return chance

    def ids(self, i: int) -> NDArray[Any]:
        """What the cache holds of a document."""
        file, end = int(np.searchsorted(self._first, i, "right")) - 1, int(self.records["end"][i])
        return self._files[file].ids[end - int(self.lengths[i]) : end]


class Corpus:
    """The documents of a source.

    Attributes:
        digest: of all its files' contents and of how they are read.
        learnt, held: numbers of the documents to learn and of those held out.
        bad: every bad row of its files.
        bytes: of UTF-8 of each document.
        lengths: int64 (documents,): tokens to learn of each, its end marker included.
        left_out: documents shorter than least_tokens.
    """

    def __init__(self, name: str, source: Source, vocabulary: Vocabulary, progress: Progress | None = None) -> None:
        """
        Raises:
            OptionError: too many bad rows, or no documents.
        """
        found = [tokens_of(path, source, vocabulary, progress) for path in files(source.path)]
        self.name, self.source, self._end = name, source, vocabulary.end
        self._documents = its = Documents(f"sources.{name}", found, source.bad_rows)
        self.digest, self.bad, self.lengths = its.digest, its.bad, its.lengths + 1
        self.bytes: NDArray[np.int64] = its.records["size"].astype(np.int64)
        fits, held = self.lengths >= source.least_tokens, its.chance < source.held_out
        self.learnt: NDArray[np.int64] = np.flatnonzero(fits & ~held)
        self.held: NDArray[np.int64] = np.flatnonzero(fits & held)
        self.left_out = int(len(fits) - fits.sum())
        if not len(self.learnt):
            raise OptionError(f"sources.{name}: no documents to learn in {source.path}")

    def document(self, i: int) -> NDArray[np.int64]:
        """Ids of a document between two end markers: each but the last is read, each but the first is learnt."""
        return np.concatenate([[self._end], self._documents.ids(i), [self._end]]).astype(np.int64)
