"""Models on disk as a load leaves them for the next one, which maps them: it parses, builds, packs and copies nothing.

    files/packed.py draws the file: the tables of the tokenizer, then the arena as it lay in memory (panels, norms)

*Which file.* Its name is a hash of the model's path, of the quantisation asked for, and of the sources that all in it
follows from. In it stands what the model's files were (files/checkpoint.py: `identity`): where that is no longer so,
they are read anew, and the file is replaced.

*Is it whole.* Every byte is summed at every load (10 GB/s, and the sum touches the pages that the first token needs
anyway). So nothing waits for the disk when a file is written: after a power cut the sums do not match, and the model is
packed again. Offsets follow from the model's own shapes, so a hostile file can make wrong words, not wild reads.

*Mapped or copied.* A map is shared by all processes and costs no copy; but where the file's pages are not huge (Linux
before 6.16, most other systems), decode is a third slower from it (benchmarks/LOG.md), so there it is copied into an
arena on huge pages, unless it would fill half of the free memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolrun import config
from smolrun.errors import ModelFileError, OptionError, SmolrunError
from smolrun.files import checkpoint as checkpoints
from smolrun.files import folder as folders
from smolrun.files import gguf, gptq
from smolrun.files import packed as container
from smolrun.files.checkpoint import Checkpoint, identity, open_checkpoint, open_kept
from smolrun.files.packed import HEAD, PackedModel
from smolrun.kernels import formats, panels
from smolrun.kernels.load import user_cache
from smolrun.model import machine, memory
from smolrun.model.memory import Arena
from smolrun.text import bpe, tokenizer

HUGE = 2 << 20
LIMIT = 4_000_000_000  # bytes of all files together, unless SMOLRUN_CACHE_SIZE says otherwise
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_SOURCES = (formats, panels, config, checkpoints, folders, gguf, gptq, container, bpe, tokenizer)
# what a head can raise that someone bent
_UNSOUND = (SmolrunError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


def open_model(path: Path, quantize: str | None = None) -> Checkpoint:
    """A checkpoint: as an earlier load with this `quantize` kept it, else opened anew.

    Raises:
        ModelNotFound, ModelFileError, UnsupportedModel: see open_checkpoint.
    """
    pack = Pack(path, quantize, identity(path))
    with contextlib.suppress(*_UNSOUND):
        if (found := pack.open()) and found.facts["tokenizer"]:
            kept = open_kept(found, path, pack.identity)
            bpe.TableBpe(kept.tokenizer.tables or {})  # raises unless the tables fit each other
            return kept
    return open_checkpoint(path)


@dataclass(frozen=True)
class Pack:
    """Where a model is kept between loads.

    Attributes:
        model: its path.
        quantize: as it was asked for.
        identity: of its files as they were before they were read; empty: not known, nothing is kept.
    """

    model: Path
    quantize: str | None
    identity: list[Any]

    @classmethod
    def of(cls, checkpoint: Checkpoint, quantize: str | None) -> Pack:
        """That of an open checkpoint."""
        return cls(checkpoint.path, quantize, checkpoint.identity)

    @property
    def path(self) -> Path:
        """The file, there or not."""
        key = repr((os.path.realpath(self.model), (self.quantize or "").lower(), _made_by()))
        return folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.pack"

    def open(self) -> PackedModel | None:
        """The file, if there is one, of these very files; its head and its tables are whole."""
        with contextlib.suppress(*_UNSOUND):
            found = PackedModel(self.path)
            if self.identity and found.facts["source"] == self.identity:
                for name in found.facts["arrays"].keys() - {"weights"}:
                    found.array(name)
                return found
        return None

    def read(self, sizes: Mapping[str, int]) -> Arena | None:
        """The arena, mapped or copied; None if there is no file, or none that is whole: the model is packed again.

        sizes: bytes of its arrays, in order.
        """
        size = memory.rounded(sizes)
        if (found := self.open()) is None or (first := found.file.size - size) < HEAD or first % HEAD:
            return None
        arena, room = Arena(sizes, found.file.view(first, size)), machine.HERE.available()
        if not _has_huge_pages(arena) and room is not None and size <= room.bytes // 2:
            found.file.release(first, size)  # huge ones among them became resident when they were looked at
            arena = Arena(sizes)
            try:  # not from the map: its pages would be resident beside the copy
                _read(self.path, first, arena.whole.data)
            except OSError:
                return None
        if container.sums(arena.whole) != found.facts["sums"][(first - HEAD) // container.SUMMED :]:
            return None
        with contextlib.suppress(OSError):
            os.utime(self.path)  # the last use
        return arena

    def state(self, sizes: Mapping[str, int]) -> str:
        """For people: whether the next load finds the file, and why not. sizes: as those of `read`."""
        if self.open():
            return f"packed in {self.path}"
        size = HEAD + memory.rounded(sizes)
        if size > (most := limit()):
            return f"packed at each load: {size:,} bytes, SMOLRUN_CACHE_SIZE is {most:,}"
        place = next(folder for folder in self.path.parents if folder.exists())
        if not os.access(place, os.W_OK):
            return f"packed at each load: {place} cannot be written (SMOLRUN_CACHE_DIR chooses another)"
        return f"to be packed at the first load, in {self.path.parent}"

    def prepare(self, checkpoint: Checkpoint, sizes: Mapping[str, int]) -> dict[str, NDArray[np.uint8]] | None:
        """Make room for the file, and tables for it (none for a tokenizer of a kind without); None: it cannot be kept.

        Before the arena is filled: making the tables takes 45 MB for a moment. sizes: as those of `read`.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            room = _make_room(self.path.parent, 2 * HEAD + memory.rounded(sizes))
        except OSError:
            return None
        if not (room and self.identity and os.access(self.path.parent, os.W_OK)):
            return None
        try:
            its = checkpoint.tokenizer
            return tokenizer.tables(its) if its.tables is None else dict(its.tables)
        except SmolrunError:
            return {}
        finally:
            memory.trim()

    def write(self, checkpoint: Checkpoint, arena: Arena, tables: Mapping[str, NDArray[np.uint8]]) -> None:
        """Keep a model for the next load, if the disk takes it; its tables are from `prepare`."""
        permuted = any(t.permuted for t in checkpoint.tensors.values())
        facts = {"source": self.identity, "model": str(self.model), "permuted": permuted}
        with contextlib.suppress(OSError, ModelFileError):  # a full disk; names or a template of megabytes
            write_model(self.path, checkpoint, arena, tables, facts=facts)


def write_model(
    path: Path,
    checkpoint: Checkpoint,
    arena: Arena,
    tables: Mapping[str, NDArray[np.uint8]],
    formats: Mapping[str, str] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """A packed model: the tables of the tokenizer on huge pages of their own, then the arena of the weights.

    Args:
        arena: panels and norms of the checkpoint.
        tables: those of text/bpe.py; none: the file keeps the weights alone.
        formats: of the matrices, where not the checkpoint's are to be told.
        facts: more words of its JSON.

    Returns:
        Where each matrix and norm begins.

    Raises:
        ModelFileError: names or template of megabytes.
        OSError: the file cannot be written.
    """
    where, first = dict[str, tuple[int, int]](), HEAD
    for name, table in tables.items():
        where[name] = (first, table.nbytes)
        first += -(-table.nbytes // 64) * 64
    small: NDArray[np.uint8] = np.zeros(-(-first // HEAD) * HEAD - HEAD, np.uint8)
    for name, (offset, size) in where.items():
        small[offset - HEAD :][:size] = tables[name]
    where["weights"] = (HEAD + small.nbytes, arena.whole.nbytes)
    its, names = checkpoint.tokenizer, checkpoint.config
    told = {name: t.format if formats is None else formats.get(name, "F32") for name, t in checkpoint.tensors.items()}
    whole = {
        "version": container.VERSION,
        "layout": container.layout(),
        "config": dataclasses.asdict(checkpoint.config),
        "tensors": {name: (told[name], *t.shape) for name, t in checkpoint.tensors.items()},
        "arrays": where,
        "tokenizer": {"bos_id": its.bos_id, "eos_ids": its.eos_ids, "specials": its.specials} if tables else None,
        "template": checkpoint.chat_template,
        "metadata": {"general.name": names.name, "general.license": names.licence},
        **(facts or {}),
    }
    container.write(path, container.head(whole, [small, arena.whole]), [small, arena.whole])
    inside = memory.offsets({name: len(array) for name, array in arena.arrays.items()})
    return {name: where["weights"][0] + at for name, at in inside.items()}


@cache
def _made_by() -> str:
    """Hash of the sources that all in a file follows from."""
    sources = [Path(str(module.__file__)) for module in _SOURCES]
    sources += [Path(__file__), Path(__file__).with_name("weights.py")]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def folder() -> Path:
    """Where the files are."""
    return Path(user_cache()) / "weights"


def limit() -> int:
    """Bytes that all files may take together.

    Raises:
        OptionError: SMOLRUN_CACHE_SIZE is no size.
    """
    text = os.environ.get("SMOLRUN_CACHE_SIZE", "")
    if not text:
        return LIMIT
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip().upper())
    if not size:
        raise OptionError(f"SMOLRUN_CACHE_SIZE={text}: expected bytes, or a number with k, M or G; 0 keeps nothing")
    return int(float(size[1]) * _UNITS[size[2]])


@dataclass(frozen=True)
class Entry:
    """One file of the cache: the model it belongs to, its bytes, and its last use in seconds since the epoch."""

    path: Path
    model: str
    bytes: int
    used: float


def entries() -> list[Entry]:
    """All files, the last used first; fragments of writers that were killed among them, as the oldest."""
    found = []
    with contextlib.suppress(OSError):
        for path in folder().iterdir():
            with contextlib.suppress(OSError):
                state = path.stat()
                whole = path.suffix == ".pack"
                found.append(
                    Entry(path, _model_of(path) if whole else "", state.st_size, state.st_mtime if whole else 0)
                )
    return sorted(found, key=lambda entry: -entry.used)


def _model_of(path: Path) -> str:
    with open(path, "rb") as file:
        try:
            return str((container.read_facts(file.read(HEAD)) or {})["model"])
        except _UNSOUND:
            return ""


def _make_room(folder: Path, size: int) -> bool:
    """Delete what was used longest ago until `size` more bytes fit; whether they can, and fill not half of the disk."""
    import shutil

    if size > (most := limit()):
        return False
    kept = entries()
    while kept and size + sum(entry.bytes for entry in kept) > most:
        with contextlib.suppress(OSError):
            kept.pop().path.unlink()
    return size <= shutil.disk_usage(folder).free // 2


def _read(path: Path, first: int, into: memoryview) -> None:
    with open(path, "rb", buffering=0) as file:
        file.seek(first)
        while into:
            if not (count := file.readinto(into)):
                raise OSError(f"{path} was cut while it was read")
            into = into[count:]


def _has_huge_pages(arena: Arena) -> bool:
    """Whether most of a mapped arena lies on huge pages: Linux tells of touched ones, so a byte of each is."""
    address, huge, inside = arena.whole.ctypes.data, 0, False
    int(arena.whole[::HUGE].sum())
    try:
        with open("/proc/self/smaps", encoding="ascii", errors="replace") as file:
            for line in file:
                if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                    inside = int(span[1], 16) <= address < int(span[2], 16)
                elif inside and line.startswith("FilePmdMapped:"):
                    huge = 1024 * int(line.split()[1])
                    break
    except OSError:
        pass
    return huge > len(arena.whole) // 2
