"""The file of a packed model: arrays as they lie in memory, to be mapped and used where they are.

    offset   bytes
    0        8      "smolpack"
    8        4      n, u32
    12       n      JSON: {"sums": [...], ...}
    12 + n   32     SHA-256 of the JSON
             ..     zeros up to 2 MB, a huge page
    2 MB     ..     the arrays, each on a cache line

All numbers are little-endian. "sums": for each MB after the head, the last one shorter, the sum of its 8-byte words
modulo 2^64: at 10 GB/s they find damage, not intent.

Such a file is a *packed model*, a whole checkpoint. Its words of JSON:

    "version"     1; another one is refused
    "layout"      hash of the sources that define panels: others would read other weights
    "config"      ModelConfig
    "tensors"     name -> [format, rows, columns], or ["F32", n] for a norm
    "arrays"      name -> [offset in the file, bytes]: the tables of the tokenizer (text/bpe.py), and "weights": panels
                  of all matrices and norms one after another, each on a cache line, to the end of the file
    "tokenizer"   {"bos_id", "eos_ids", "specials"}
    "template"    the chat template, or null
    "metadata"    names, for people

What `smolrun compile` makes is one that stands for itself. What a load keeps for the next one (model/packed.py) belongs
to files that are still there, and has these words more:

    "source"      their identity (files/checkpoint.py); "model", their path; "tensors" has the formats there
    "permuted"    whether rows of q and k are in GGUF's order there
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolrun.errors import ModelFileError, UnsupportedModel
from smolrun.files.mapped import MappedFile
from smolrun.kernels import formats, panels

Bytes = NDArray[np.uint8]

MAGIC = b"smolpack"
LENGTH = struct.Struct("<I")
HASH = 32
HEAD = 2 << 20
SUMMED = 1 << 20  # bytes of one sum
VERSION = 1
AGAIN = "(compile the bundle again, or copy it again)"


def head(facts: Mapping[str, Any], pieces: Sequence[Bytes]) -> bytes:
    """What a file of these pieces begins with. All but the last fill huge pages: multiples of HEAD bytes.

    Raises:
        ModelFileError: the facts are too long.
    """
    text = json.dumps({**facts, "sums": [one for piece in pieces for one in sums(piece)]}).encode()
    start = MAGIC + LENGTH.pack(len(text)) + text + hashlib.sha256(text).digest()
    if len(start) > HEAD:
        raise ModelFileError(f"{len(start):,} bytes of names, template and sums: at most {HEAD:,} can be packed")
    return start.ljust(HEAD, b"\0")


def sums(piece: Bytes) -> list[int]:
    """Of each MB; a multiple of 8 bytes."""
    words = piece.view("<u8")
    whole = len(words) * 8 // SUMMED * SUMMED // 8
    rest = [int(words[whole:].sum())] if whole < len(words) else []
    return [*words[:whole].reshape(-1, SUMMED // 8).sum(axis=1).tolist(), *rest]


def read_facts(start: bytes) -> dict[str, Any] | None:
    """The JSON of a file that starts so; None for another kind of file.

    Raises:
        ModelFileError: damaged.
    """
    if start[:8] != MAGIC:
        return None
    end = 12 + LENGTH.unpack(start[8:12].ljust(4, b"\0"))[0]
    if hashlib.sha256(start[12:end]).digest() != start[end : end + HASH]:
        raise ModelFileError(f"its head is damaged {AGAIN}")
    facts: dict[str, Any] = json.loads(start[12:end])
    return facts


def write(path: Path, head: bytes, pieces: Sequence[Bytes]) -> None:
    """Write a file beside its name, then rename it."""
    part = path.with_name(f".{path.name}.{os.urandom(6).hex()}.part")
    try:
        with open(part, "xb", buffering=0) as file:
            for piece in (memoryview(head), *(piece.data for piece in pieces)):
                while piece:  # one call writes at most 2 GB; large ones get large pages in the page cache
                    piece = piece[file.write(piece) :]
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


@cache
def layout() -> str:
    """Hash of the sources that say how panels lie in memory."""
    sources = (Path(str(module.__file__)).read_bytes() for module in (formats, panels))
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


class PackedModel:
    """An open packed model: its facts, and its arrays where they lie in the file, each checked when first asked for.

    Attributes:
        file: the map, read-only and shared with every process that has it open.
        facts: the JSON, its version and layout checked.
        digest: SHA-256 of the JSON, which holds the sums of all else.
    """

    def __init__(self, path: Path) -> None:
        """Raises:
        ModelFileError: damaged or cut short.
        UnsupportedModel: of another version of smolrun.
        """
        self.file = MappedFile(path)
        start = bytes(self.file.view(0, min(HEAD, self.file.size)))
        try:
            facts = read_facts(start)
        except ModelFileError as error:
            raise ModelFileError(f"{path.name}: {error}") from None
        if facts is None or "version" not in facts:
            raise ModelFileError(f"{path.name}: no packed model {AGAIN}")
        if (facts["version"], facts["layout"]) != (VERSION, layout()):
            raise UnsupportedModel(
                f"{path.name}: packed by another version of smolrun ({facts['version']}, {facts['layout']}; this one "
                f"is {VERSION}, {layout()}): compile it again with this one"
            )
        self.facts, self.digest = facts, hashlib.sha256(start[12:]).hexdigest()
        whole = sum(SUMMED for _ in facts["sums"])
        if not whole - SUMMED < self.file.size - HEAD <= whole:
            raise ModelFileError(f"{path.name}: {self.file.size:,} bytes found, some {HEAD + whole:,} expected {AGAIN}")
        self._unchecked = set(range(len(facts["sums"])))

    def array(self, name: str) -> Bytes:
        """The bytes of an array, a view of the map.

        Raises:
            ModelFileError: damaged, or not there.
        """
        name_of = f"{self.file.path.name}: {name}"
        first, size = self.facts["arrays"].get(name, (0, -1))
        if not HEAD <= first <= first + size <= self.file.size:
            raise ModelFileError(f"{name_of} is not in the file {AGAIN}")
        for part in sorted(self._unchecked & {*range((first - HEAD) // SUMMED, -(-(first - HEAD + size) // SUMMED))}):
            begin = HEAD + part * SUMMED
            if sums(self.file.view(begin, min(SUMMED, self.file.size - begin))) != [self.facts["sums"][part]]:
                raise ModelFileError(f"{name_of}: damaged in the megabyte from byte {begin:,} {AGAIN}")
            self._unchecked.discard(part)
        return self.file.view(first, size)
