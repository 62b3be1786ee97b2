"""Packed weights on disk: the panels of a model as one file, which the next load maps: it packs and copies nothing.

    head with {"key", "model", "bytes", "sums"}       files/packed.py draws it
    the arena as it lay in memory                     panels, norms

*Which file.* Its name is a hash of everything that the panels follow from: this layout's own sources, each matrix with
its format, and the model's files: path, size, times of the last write and of the last change (which no program can set
back), and the bytes of all norms and of a sample of the matrices, for file systems whose times say little. A model that
was written to again has another name; its old panels are never found again and are the first to go.

*Is it whole.* Every byte is summed at every load (10 GB/s, and the sum touches the pages that the first token needs
anyway). So nothing waits for the disk when a file is written: after a power cut the sums do not match, and the model is
packed again. Offsets follow from the model's own shapes, so a hostile file can make wrong words, not wild reads.

*Mapped or copied.* A map is shared by all processes and costs no copy; but where the file's pages are not huge (Linux
before 6.16, most other systems), decode is a third slower from it (benchmarks/LOG.md), so there it is copied into an
arena on huge pages, unless it would fill half of the free memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from smolrun.errors import ModelFileError, OptionError
from smolrun.files import gptq
from smolrun.files import packed as container
from smolrun.files.checkpoint import Checkpoint
from smolrun.files.packed import HEAD
from smolrun.kernels import formats, panels
from smolrun.kernels.load import user_cache
from smolrun.model import machine, memory
from smolrun.model.memory import Arena

HUGE = 2 << 20
SAMPLES, SAMPLE = 16, 4096  # matrices, and bytes of each, that the name depends on
LIMIT = 4_000_000_000  # bytes of all files together, unless SMOLRUN_CACHE_SIZE says otherwise
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Pack:
    """Where the panels of a model are kept.

    Attributes:
        path: the file, there or not.
        model: the model's path, for people.
        sizes: bytes of each array of the arena, in order.
    """

    path: Path
    model: str
    sizes: Mapping[str, int]

    def read(self) -> Arena | None:
        """The arena, mapped or copied; None if there is no file, or none that is whole: the model is packed again."""
        try:
            with open(self.path, "rb") as file:
                found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):  # ValueError: empty
            return None
        total = memory.rounded(self.sizes)
        if len(found) != HEAD + total:
            return None
        arena, room = Arena(self.sizes, found, HEAD), machine.HERE.available()
        if not _has_huge_pages(arena) and room is not None and total <= room.bytes // 2:
            arena = Arena(self.sizes)
            try:
                _read(self.path, arena.whole.data)  # not from the map: its pages would be resident beside the copy
            except OSError:
                return None
        if found[:HEAD] != self._head(arena):
            return None
        with contextlib.suppress(OSError):
            os.utime(self.path)  # the last use
        return arena

    def state(self) -> str:
        """For people: whether the next load finds the file, and why not."""
        if self.path.exists():
            return f"packed in {self.path}"
        size = HEAD + memory.rounded(self.sizes)
        if size > (most := limit()):
            return f"packed at each load: {size:,} bytes, SMOLRUN_CACHE_SIZE is {most:,}"
        place = next(folder for folder in self.path.parents if folder.exists())
        if not os.access(place, os.W_OK):
            return f"packed at each load: {place} cannot be written (SMOLRUN_CACHE_DIR chooses another)"
        return f"to be packed at the first load, in {self.path.parent}"

    def write(self, arena: Arena) -> str:
        """Keep an arena for the next load: "", or why it cannot be kept."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if problem := _make_room(self.path.parent, HEAD + len(arena.whole)):
                return problem
            container.write(self.path, self._head(arena), [arena.whole])
        except OSError as error:
            return f"{self.path.parent}: {error.strerror or error}"
        return ""

    def _head(self, arena: Arena) -> bytes:
        """What the file of an arena begins with: its name, its model, and the sums of all that follows."""
        facts = {"key": self.path.stem, "model": self.model, "bytes": len(arena.whole)}
        return container.head(facts, [arena.whole])


def pack_of(checkpoint: Checkpoint, wanted: Mapping[str, str], sizes: Mapping[str, int]) -> Pack:
    """Where the panels of a checkpoint are kept.

    wanted: matrix -> format in memory. sizes: array of the arena -> bytes.
    """
    sources = [Path(str(module.__file__)) for module in (formats, panels, gptq, container)]
    sources += [Path(__file__), Path(__file__).with_name("weights.py")]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    tensors = checkpoint.tensors
    digest.update(repr([*checkpoint.identity, *sizes.items(), *wanted.items()]).encode())
    digest.update(repr([(name, t.format, t.shape, t.permuted) for name, t in tensors.items()]).encode())
    sampled = {*list(wanted)[:: max(1, len(wanted) // SAMPLES)]}
    for name, tensor in tensors.items():
        if name not in wanted or name in sampled:
            digest.update((tensor.raw[:SAMPLE] if name in wanted else tensor.raw).data)
    return Pack(folder() / f"{digest.hexdigest()[:32]}.pack", str(checkpoint.path), sizes)


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
        except (ModelFileError, KeyError):
            return ""


def _make_room(folder: Path, size: int) -> str:
    """Delete what was used longest ago until `size` more bytes fit; "" or why they cannot."""
    import shutil

    if size > (most := limit()):
        return f"{size:,} bytes are more than the cache may take, {most:,} (SMOLRUN_CACHE_SIZE)"
    kept = entries()
    while kept and size + sum(entry.bytes for entry in kept) > most:
        with contextlib.suppress(OSError):
            kept.pop().path.unlink()
    if size > (free := shutil.disk_usage(folder).free) // 2:
        return f"{folder}: {size:,} bytes are more than half of the {free:,} that are free"
    return ""


def _read(path: Path, into: memoryview) -> None:
    with open(path, "rb", buffering=0) as file:
        file.seek(HEAD)
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
