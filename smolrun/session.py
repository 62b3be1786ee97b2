"""Sessions: the keys and values of a prefix as a file, so that a long system prompt is computed once in its life.

    offset    bytes
    0         8        "SMOLKV" and the version, u16
    8         32       the model: SHA-256 of what its keys and values depend on (see `model_digest`)
    40        8        bytes of a page (64 positions of all layers, as they lie in the cache), u64
    48        8        n, number of ids, u64
    56        8        m, bytes of the dialogue, u64
    64        4 n      ids, u32
              m        the dialogue: UTF-8 JSON, a list of messages; "null" for a plain prompt
              ..       pages in the order of their positions; what the last one has left is 0
    end - 32  32       SHA-256 of everything before it

All numbers are little-endian. A file is read in one go, page by page into cache pages that belong to nobody yet; the
ids that make them valid come last, when everything has been checked. The last position is then computed again and must
give the bytes it was read with: that holds the kernels to account, which no hash of a model can.

A checksum finds damage, not intent: who may write a session file may decide what the model remembers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from smolrun.errors import ContextOverflow, SessionError
from smolrun.files.checkpoint import Checkpoint
from smolrun.files.whole import whole
from smolrun.generate.engine import passes
from smolrun.kernels.block import PAGE
from smolrun.model.cache import Slot
from smolrun.model.llama import Llama
from smolrun.model.machine import available_cores

MAGIC = b"SMOLKV"
VERSION = 2
HEAD = struct.Struct("<6sH32sQQQ")
DIGEST_BYTES = 32
MOST_DIALOGUE = 1 << 26  # bytes
BLOCK = 1 << 24  # bytes of weights hashed by one thread at a time

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Session:
    """What a session file holds beside keys and values.

    Attributes:
        ids: whose keys and values are in the cache now.
        messages: the dialogue that was saved, None for a plain prompt.
    """

    ids: list[int]
    messages: list[Message] | None


def model_digest(checkpoint: Checkpoint, *, quantize: str | None, kv: str, precision: str) -> bytes:
    """SHA-256 of all that keys and values depend on: every weight as it lies in its file, the shapes, rope and epsilon,
    and how they are loaded. Blocks of 16 MB are hashed on all cores: 1.7 GB/s each with SHA instructions.
    """
    from concurrent.futures import ThreadPoolExecutor  # 4 ms that a start need not wait for

    if checkpoint.packed is not None:
        return hashlib.sha256(repr((checkpoint.packed.digest, kv, precision)).encode()).digest()
    jobs = [
        (name, first) for name in checkpoint.tensors for first in range(0, checkpoint.tensors[name].raw.nbytes, BLOCK)
    ]

    def block(job: tuple[str, int]) -> bytes:
        tensor = checkpoint.tensors[job[0]]
        digest = hashlib.sha256(tensor.raw[job[1] : job[1] + BLOCK].data).digest()
        tensor.release()
        return digest

    numbers = dataclasses.asdict(checkpoint.config)
    for name in ("name", "licence", "max_positions"):
        del numbers[name]
    layout = [(t.name, t.format, t.shape, t.permuted) for t in checkpoint.tensors.values()]
    whole = hashlib.sha256(repr((numbers, layout, quantize, kv, precision)).encode())
    with ThreadPoolExecutor(available_cores()) as pool:
        for digest in pool.map(block, jobs):
            whole.update(digest)
    return whole.digest()


class Sessions:
    """Writes and reads the sessions of one model. Not while the model computes.

    Args:
        digest: gives `model_digest`; asked once, when the first session is written or read.
    """

    def __init__(self, model: Llama, digest: Callable[[], bytes]) -> None:
        self._model, self._ask = model, digest
        self._digest: bytes | None = None
        self.adapter = b""  # digest of what is computed beside the model's own weights

    @property
    def _own(self) -> bytes:
        if self._digest is None:
            self._digest = self._ask()
        return hashlib.sha256(self._digest + self.adapter).digest() if self.adapter else self._digest

    def save(self, path: Path, ids: Sequence[int], messages: Sequence[Mapping[str, Any]] | None) -> None:
        """Computes what the cache lacks of `ids`, and writes the file: beside its name first, then renamed.

        Raises:
            SessionError: the file cannot be written, or the model was closed meanwhile.
        """
        model, n = self._model, len(ids)
        slot = model.open(ids)
        try:
            slot.truncate(min(slot.length, (n - 1) // PAGE * PAGE))
            model.cache.reserve([(slot, n)])
            slot.pages[-1].data[:] = 0  # it may have been another dialogue's
            self._compute(path, slot, ids)
            text = json.dumps(messages and [dict(message) for message in messages]).encode()
            head = HEAD.pack(MAGIC, VERSION, self._own, model.cache.page_size, n, len(text))
            pages = [page.data for page in slot.pages]
            _write(path, [head, np.array(ids, "<u4").tobytes(), text, *pages])
        finally:
            slot.close()

    def _compute(self, path: Path, slot: Slot, ids: Sequence[int]) -> None:
        if any(hidden is None for hidden in passes(self._model, slot, ids, 0)):
            raise SessionError(f"{path}: the model was closed meanwhile")

    def load(self, path: Path) -> Session:
        """Reads a file into the cache.

        Raises:
            SessionError: not a session, damaged, or of another model, other options or other kernels.
            ContextOverflow: it holds more ids than the context.
        """
        try:
            with open(path, "rb") as file:
                return self._load(path, _Reader(path, file, os.fstat(file.fileno()).st_size))
        except OSError as error:
            raise SessionError(f"{path}: cannot be read: {error.strerror or error}") from error

    def _load(self, path: Path, reader: _Reader) -> Session:
        model, cache = self._model, self._model.cache
        magic, version, digest, page_size, n, m = HEAD.unpack(reader.read(HEAD.size, "the header"))
        if magic != MAGIC:
            raise SessionError(f"{path}: not a session of smolrun (it begins with {magic!r}, {MAGIC!r} expected)")
        if version != VERSION:
            raise SessionError(f"{path}: a session of version {version}, this smolrun reads {VERSION}: save it anew")
        if digest != self._own or page_size != cache.page_size:
            raise SessionError(
                f"{path}: a session of another model, or of one loaded with another adapter, kv, precision or "
                "quantize: load that model, or save the session anew"
            )
        pages = -(-n // PAGE)
        size = HEAD.size + 4 * n + m + pages * page_size + DIGEST_BYTES
        if n < 1 or m > MOST_DIALOGUE or size != reader.size:
            raise SessionError(
                f"{path}: {size:,} bytes expected for {n:,} ids and {m:,} bytes of dialogue, {reader.size:,} found: "
                "the file is damaged or cut short"
            )
        if n > model.context:
            raise ContextOverflow(n, model.context, "session")
        ids = np.frombuffer(reader.read(4 * n, "ids"), "<u4")
        text = reader.read(m, "the dialogue")
        slot = model.open([])  # an empty one: nothing of it is valid until its ids are set
        try:
            cache.reserve([(slot, n)])
            for page in slot.pages:
                reader.read_into(page.data)
            reader.check()
            if int(ids.max()) >= model.config.vocab_size:
                raise SessionError(
                    f"{path}: id {ids.max()}, the vocabulary has ids 0 to {model.config.vocab_size - 1:,}"
                )
            messages = _messages(path, text, model.config.vocab_size)
            last = slot.pages[-1].data.copy()
            slot.ids.extend(ids[:-1].tolist())
            self._compute(path, slot, ids.tolist())
            if not np.array_equal(last, slot.pages[-1].data):
                raise SessionError(
                    f"{path}: the last position computed again gives other bits: written by another version of smolrun "
                    "(save the session anew)"
                )
        except BaseException:
            slot.truncate(0)
            raise
        finally:
            slot.close()
        return Session(ids.tolist(), messages)


class _Reader:
    """A file read once from its beginning to its end, and hashed on the way."""

    def __init__(self, path: Path, file: IO[bytes], size: int) -> None:
        self.size = size
        self._path, self._file, self._hash = path, file, hashlib.sha256()

    def read(self, count: int, what: str) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            raise SessionError(f"{self._path}: the file ends inside {what}: {count:,} bytes expected, {len(data):,}")
        self._hash.update(data)
        return data

    def read_into(self, page: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        view = page.data
        if self._file.readinto(view) != len(view):  # type: ignore[attr-defined]
            raise SessionError(f"{self._path}: the file ends inside its pages")
        self._hash.update(view)

    def check(self) -> None:
        """The checksum is next in the file and right."""
        if self._file.read(DIGEST_BYTES) != self._hash.digest():
            raise SessionError(f"{self._path}: wrong checksum: the file is damaged, save the session anew")


def _messages(path: Path, text: bytes, vocab_size: int) -> list[Message] | None:
    """The dialogue of a file, checked."""
    try:
        value = json.loads(text)
        if value is None:
            return None
        if not isinstance(value, list):
            raise ValueError(f"{type(value).__name__} found")
        for message in value:
            if not isinstance(message, dict) or not {"role", "content"} <= set(message) <= {"role", "content", "ids"}:
                raise ValueError(f"{message!r:.60} found")
            if not isinstance(message["role"], str) or not isinstance(message["content"], str):
                raise ValueError(f"{message!r:.60} found")
            ids = message.get("ids", [])
            if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
                raise ValueError(f"ids {ids!r:.60} found")
    except (ValueError, RecursionError) as error:
        raise SessionError(f"{path}: a list of messages expected in its dialogue: {error}") from error
    return value


def _write(path: Path, parts: Sequence[Any]) -> None:
    """Parts and their SHA-256 into a file that appears whole or not at all; for its owner's eyes, as a dialogue is."""

    digest = hashlib.sha256()
    try:
        with whole(path, private=True) as file:
            for data in parts:
                digest.update(data)
                file.write(data)
            file.write(digest.digest())
    except OSError as error:
        raise SessionError(f"{path}: cannot be written: {error.strerror or error}") from error
