"""Documents as ids, made once: a memory-mapped cache for each data file, keyed by content, tokenizer and field.

    SMOLRUN_CACHE_DIR/tokens/KEY/
        ids.bin           uint16 or uint32, all documents one after the other
        documents.npy     end (in ids), bytes (of UTF-8), digest (of the text)       one record each
        about.json        file, counts, and every bad row

The folder is written under another name and renamed when all of it is on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smolrun.errors import ModelNotFound, OptionError
from smolrun.files.checkpoint import END_OF_TEXT, TokenizerSource, open_checkpoint
from smolrun.files.folder import parse_object
from smolrun.kernels.load import user_cache
from smolrun.text.tokenizer import Tokenizer
from smolrun.train.recipe import Source
from smolrun.train.rows import BadRow, files, look_up, read_rows

VERSION = 3
RECORD = np.dtype([("end", "<i8"), ("bytes", "<i8"), ("digest", "<u8")])
MANY = 256  # documents from one sign of progress to the next
Progress = Callable[[str, int, int], object]  # stage, done, all


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
        facts = [source.json, source.vocab, source.merges, source.token_types, sorted(source.specials.items())]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return cls(tokenizer, digest, tokenizer.specials[END_OF_TEXT])


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
    key = key_of(path, source, vocabulary.digest)
    folder = user_cache() / "tokens" / key
    if not folder.exists():
        _make(folder, path, source, vocabulary, progress)
    try:
        documents = np.load(folder / "documents.npy")
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        size = int(documents["end"][-1]) if len(documents) else 0
        kind = np.dtype(about["dtype"])
        fits = (folder / "ids.bin").stat().st_size == size * kind.itemsize
    except (ValueError, EOFError, FileNotFoundError, KeyError):
        fits = False
    if not fits:
        raise OptionError(f"{folder}: its files do not fit each other: delete it, it is made again")
    ids = np.memmap(folder / "ids.bin", kind, "r", shape=(size,)) if size else np.empty(0, kind)
    return Tokens(key, ids, documents, tuple(BadRow(str(path) + bad["where"], bad["problem"]) for bad in about["bad"]))


def key_of(path: Path, source: Source, *more: object) -> str:
    """What tells the texts of a file from others: its content, how it is read, and more."""
    with open(path, "rb") as file:
        content = hashlib.sha256()
        while piece := file.read(1 << 20):
            content.update(piece)
    facts = [VERSION, content.hexdigest(), "".join(path.suffixes), source.field, source.separator, *more]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _make(folder: Path, path: Path, source: Source, vocabulary: Vocabulary, progress: Progress | None) -> None:
    part = folder.with_name(f".{folder.name}.{os.urandom(6).hex()}.part")
    part.mkdir(parents=True)
    kind = np.dtype(np.uint16 if vocabulary.tokenizer.vocab_size <= 1 << 16 else np.uint32)
    records, bad, end, read = list[tuple[int, int, int]](), list[BadRow](), 0, 0
    size = path.stat().st_size
    try:
        with open(part / "ids.bin", "xb") as file:
            for number, row in enumerate(texts_of(path, source)):
                if isinstance(row, BadRow):
                    bad.append(row)
                    continue
                ids, data = vocabulary.tokenizer.encode(row[1]), row[1].encode()
                if not ids:
                    bad.append(BadRow(row[0], "no token stands for any of its bytes"))
                    continue
                file.write(np.asarray(ids, kind).tobytes())
                end, read = end + len(ids), read + len(data)
                records.append((end, len(data), _digest(data)))
                if progress and number % MANY == 0:
                    progress("tokenize", min(read, size - 1), size)
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
            elif _digest(row[1].encode()) / 2.0**64 >= source.held_out:
                yield row[1]


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


class Corpus:
    """The documents of a source.

    Attributes:
        digest: of all its files' contents and of how they are read.
        learnt, held: numbers of the documents to learn and of those held out.
        bad: every bad row of its files.
    """

    def __init__(self, name: str, source: Source, vocabulary: Vocabulary, progress: Progress | None = None) -> None:
        """
        Raises:
            OptionError: too many bad rows, or no documents.
        """
        self.name, self.source, self._end = name, source, vocabulary.end
        self._files = [tokens_of(path, source, vocabulary, progress) for path in files(source.path)]
        self.digest = hashlib.sha256("".join(file.key for file in self._files).encode()).hexdigest()[:16]
        self.bad = tuple(bad for file in self._files for bad in file.bad)
        counts = [len(file.documents) for file in self._files]
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        records = np.concatenate([file.documents for file in self._files])
        starts = np.concatenate([np.concatenate([[0], file.documents["end"][:-1]])[: len(file.documents)]
                                 for file in self._files])  # fmt: skip
        self._starts, self._ends = starts.astype(np.int64), records["end"].astype(np.int64)
        self.bytes: NDArray[np.int64] = records["bytes"].astype(np.int64)
        rows = len(records) + len(self.bad)
        if len(self.bad) > source.bad_rows * rows:
            first = "; ".join(f"{row.where}: {row.problem}" for row in self.bad[:3])
            raise OptionError(
                f"sources.{name}: {len(self.bad):,} of {rows:,} rows cannot be used ({first}): mend them, or raise "
                f"sources.{name}.bad_rows, now {source.bad_rows:g}"
            )
        fits = self.lengths >= source.least_tokens
        chance = records["digest"] / 2.0**64
        self.learnt: NDArray[np.int64] = np.flatnonzero(fits & (chance >= source.held_out))
        self.held: NDArray[np.int64] = np.flatnonzero(fits & (chance < source.held_out))
        self.left_out = int(len(records) - fits.sum())  # shorter than least_tokens
        if not len(self.learnt):
            raise OptionError(f"sources.{name}: no documents to learn in {source.path}")

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens to learn of each document, its end marker included: int64 (documents,)."""
        return self._ends - self._starts + 1

    def document(self, i: int) -> NDArray[np.int64]:
        """Ids of a document between two end markers: each but the last is read, each but the first is learnt."""
        file = int(np.searchsorted(self._first, i, "right")) - 1
        ids = self._files[file].ids[self._starts[i] : self._ends[i]]
        return np.concatenate([[self._end], ids, [self._end]]).astype(np.int64)
