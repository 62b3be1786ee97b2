"""GGUF files, read and written: the container only, nothing of models.

    magic "GGUF" | version u32 (2, 3) | tensor_count u64 | kv_count u64                          header, 24 bytes
    kv_count     x  key string | type u32 | value                                                metadata
    tensor_count x  name string | n_dims u32 | dims u64[n_dims] | ggml type u32 | offset u64     tensor table
    zeros up to the alignment, then the tensors' bytes at data start + offset                    data

    string = length u64 | UTF-8 bytes          array = element type u32 | count u64 | elements

All is little-endian; dims are innermost first (the reverse of NumPy's shape). A file is hostile until proven sound:
every count, length and offset is compared with the bytes that are there *before* it is used, so no file makes us
allocate more than a small multiple of its own size. Source: github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from smolrun.errors import ModelFileError, OptionError, UnsupportedModel
from smolrun.files.mapped import AGAIN, MappedFile
from smolrun.files.whole import whole
from smolrun.kernels.formats import FORMATS, Format, by_ggml_type

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # when general.alignment is absent
MAX_ALIGNMENT = 1 << 20
MAX_DIMS = 4
MAX_NAME = 64  # bytes of a tensor name
MAX_KEY = 65_535  # bytes of a metadata key
MAX_ARRAY = 1 << 22  # elements: the largest vocabularies have 2**18
MAX_DEPTH = 4  # arrays in arrays

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
BOOL, STRING, ARRAY = 7, 8, 9
# value type -> NumPy dtype; bool, string and array have their own readers
SCALAR_NAMES = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
SCALARS: dict[int, np.dtype[Any]] = {code: np.dtype(name) for code, name in SCALAR_NAMES.items()}
# the least bytes an entry takes: what a count is held against before anything is built
LEAST_KV = 8 + 1 + 4 + 1
LEAST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One line of the tensor table, checked.

    Attributes:
        shape: NumPy order (rows, cols): cols is what the file calls dims[0].
        offset: bytes from the start of the file.
        nbytes: bytes of the blocks.
    """

    name: str
    format: Format
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(slots=True)
class GGUF:
    """An open GGUF file.

    Attributes:
        metadata: key -> int, float, bool, str or a list of these.
        tensors: name -> TensorInfo, in the order of the file.
    """

    path: Path
    version: int
    alignment: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    file: MappedFile

    def raw(self, name: str) -> np.ndarray:
        """The tensor's blocks: read-only uint8 (nbytes,), zero-copy."""
        info = self.tensors[name]
        return self.file.view(info.offset, info.nbytes)

    def close(self) -> None:
        """Close the map (see MappedFile.close)."""
        self.file.close()


def read_gguf(path: str | os.PathLike[str]) -> GGUF:
    """Open a GGUF v2 or v3 file; tensors stay in the memory map.

    Raises:
        ModelNotFound: no such file.
        ModelFileError: damaged, hostile or cut short; names key or tensor, found and expected.
        UnsupportedModel: a GGUF version or tensor type that smolrun does not read.
    """
    file = MappedFile(Path(path))
    try:
        with file.memory() as buffer:
            return _Reader(file, buffer).read()
    except BaseException:
        file.close()
        raise


class _Reader:
    """A cursor over the header; `pos` never passes `size`."""

    def __init__(self, file: MappedFile, buffer: memoryview) -> None:
        self.file, self.buffer, self.size = file, buffer, file.size
        self.pos = 0
        self.where = "header"

    def fail(self, problem: str) -> NoReturn:
        raise ModelFileError(f"{self.file.path.name}: {self.where}: {problem}")

    def need(self, nbytes: int, what: str = "") -> None:
        if nbytes > self.size - self.pos:
            found = f"expected at offset {self.pos:,}, file ends at {self.size:,}"
            self.fail(f"{what + ': ' if what else ''}{nbytes:,} bytes {found} {AGAIN}")

    def u32(self, what: str) -> int:
        self.need(4, what)
        self.pos += 4
        return int(U32.unpack_from(self.buffer, self.pos - 4)[0])

    def u64(self, what: str) -> int:
        self.need(8, what)
        self.pos += 8
        return int(U64.unpack_from(self.buffer, self.pos - 8)[0])

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.u64(what)
        if limit is not None and not 0 < length <= limit:
            self.fail(f"{what} of {length:,} bytes, 1 to {limit:,} expected {AGAIN}")
        self.need(length, what)
        self.pos += length
        try:
            return str(self.buffer[self.pos - length : self.pos], "utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8: {error.reason} {AGAIN}")

    def strings(self, n: int) -> list[str]:
        """n strings. The one hot loop: a vocabulary has 98,000; one check per string, 0.3 us each."""
        buffer, size, pos, unpack = self.buffer, self.size, self.pos, U64.unpack_from
        out: list[str] = []
        append = out.append
        try:
            for _ in range(n):
                start = pos + 8
                end = start + unpack(buffer, pos)[0]
                if end > size:
                    break
                append(str(buffer[start:end], "utf-8"))
                pos = end
        except struct.error:  # fewer than 8 bytes left for a length
            pass
        except UnicodeDecodeError as error:
            self.fail(f"element {len(out):,} is not UTF-8: {error.reason} {AGAIN}")
        if len(out) < n:
            self.fail(f"element {len(out):,} of {n:,} at offset {pos:,} passes the end of the file at {size:,} {AGAIN}")
        self.pos = pos
        return out

    def value(self, code: int, depth: int = 0) -> Any:
        if code in SCALARS:
            return self.scalars(code, 1)[0]
        if code == BOOL:
            return self.bools(1)[0]
        if code == STRING:
            return self.string("string")
        if code == ARRAY:
            return self.array(depth + 1)
        self.fail(f"unknown value type {code}, 0 to 12 expected {AGAIN}")

    def scalars(self, code: int, n: int) -> list[Any]:
        dtype = SCALARS[code]
        self.need(n * dtype.itemsize, "value")
        self.pos += n * dtype.itemsize
        start = self.pos - n * dtype.itemsize
        values: list[Any] = np.frombuffer(self.buffer, dtype, n, start).tolist()
        return values

    def bools(self, n: int) -> list[bool]:
        numbers = self.scalars(0, n)
        if n and max(numbers) > 1:
            self.fail(f"a bool of value {max(numbers)}, 0 or 1 expected {AGAIN}")
        return [number == 1 for number in numbers]

    def array(self, depth: int) -> list[Any]:
        if depth > MAX_DEPTH:
            self.fail(f"arrays nested deeper than {MAX_DEPTH}")
        code, n = self.u32("element type"), self.u64("element count")
        if n > MAX_ARRAY:
            self.fail(f"an array of {n:,} elements, at most {MAX_ARRAY:,} expected {AGAIN}")
        if code in SCALARS:
            return self.scalars(code, n)
        if code == BOOL:
            return self.bools(n)
        if code == STRING:
            return self.strings(n)
        if code == ARRAY:
            return [self.array(depth + 1) for _ in range(n)]
        self.fail(f"unknown element type {code}, 0 to 12 expected {AGAIN}")

    def read(self) -> GGUF:
        self.need(24, "header")
        magic = bytes(self.buffer[:4])
        if magic != MAGIC:
            self.fail(f"magic {MAGIC!r} expected, found {magic!r}: not a GGUF file")
        self.pos = 4
        version = self.u32("version")
        if version not in VERSIONS:
            big = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            what = "a big-endian file" if big else f"GGUF version {version}"
            expected = "little-endian version 2 or 3 expected (convert the model anew)"
            raise UnsupportedModel(f"{self.file.path.name}: {what}, {expected}")
        n_tensors = self.u64("tensor count")
        n_kv = self.u64("metadata count")
        self.need(n_kv * LEAST_KV, f"{n_kv:,} metadata entries")
        self.need(n_tensors * LEAST_TENSOR, f"{n_tensors:,} tensors")
        metadata = self.metadata(n_kv)
        self.where = "general.alignment"
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not sound_alignment(alignment):
            self.fail(f"{alignment!r}, a power of two from 8 to {MAX_ALIGNMENT:,} expected {AGAIN}")
        tensors = self.table(n_tensors, alignment)
        return GGUF(self.file.path, version, alignment, metadata, tensors, self.file)

    def metadata(self, n: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for index in range(n):
            self.where = f"metadata entry {index:,}"
            key = self.string("key", MAX_KEY)
            self.where = f"metadata {key}"
            if key in out:
                self.fail(f"the key occurs twice {AGAIN}")
            out[key] = self.value(self.u32("value type"))
        return out

    def table(self, n: int, alignment: int) -> dict[str, TensorInfo]:
        entries: dict[str, tuple[Format, tuple[int, ...], int, int]] = {}
        for index in range(n):
            self.where = f"tensor {index:,}"
            name = self.string("name", MAX_NAME)
            self.where = f"tensor {name}"
            if name in entries:
                self.fail(f"the name occurs twice {AGAIN}")
            entries[name] = self.entry(alignment)
        start = -(-self.pos // alignment) * alignment
        tensors = {
            name: TensorInfo(name, format, shape, start + offset, nbytes)
            for name, (format, shape, offset, nbytes) in entries.items()
        }
        for info in tensors.values():
            self.where, self.pos = f"tensor {info.name}", info.offset
            self.need(info.nbytes)
        for before, info in pairwise(sorted(tensors.values(), key=lambda info: info.offset)):
            if info.offset < before.offset + before.nbytes:
                self.where = f"tensor {info.name}"
                end = before.offset + before.nbytes
                self.fail(f"starts at offset {info.offset:,}, inside {before.name} which ends at {end:,} {AGAIN}")
        return tensors

    def entry(self, alignment: int) -> tuple[Format, tuple[int, ...], int, int]:
        n_dims = self.u32("number of dimensions")
        if not 1 <= n_dims <= MAX_DIMS:
            self.fail(f"{n_dims:,} dimensions, 1 to {MAX_DIMS} expected {AGAIN}")
        dims = [self.u64("dimension") for _ in range(n_dims)]
        code = self.u32("type")
        offset = self.u64("offset")
        try:
            format = by_ggml_type(code)
        except ValueError as error:
            raise UnsupportedModel(f"{self.file.path.name}: {self.where}: {error}") from None
        shape = tuple(reversed(dims))
        if min(dims) == 0 or math.prod(dims) >= 1 << 63:
            self.fail(f"shape {shape}: every dimension at least 1 and fewer than 2**63 elements expected {AGAIN}")
        if dims[0] % format.block:
            self.fail(f"rows of {dims[0]:,} elements, a multiple of {format.block} expected for {format.name} {AGAIN}")
        if offset % alignment:
            self.fail(f"offset {offset:,} is no multiple of the alignment {alignment} {AGAIN}")
        return format, shape, offset, tensor_nbytes(format, shape)


def sound_alignment(value: Any) -> bool:
    """A power of two, a multiple of 8 as the specification wants, and not so large that padding swells the file."""
    return type(value) is int and 8 <= value <= MAX_ALIGNMENT and value & (value - 1) == 0


def tensor_nbytes(format: Format, shape: Sequence[int]) -> int:
    """Bytes of a tensor's blocks; the last axis is cut into blocks."""
    blocks: int = math.prod(shape) // format.block
    return blocks * int(format.dtype.itemsize)


@dataclass(frozen=True, slots=True)
class WriteTensor:
    """A tensor to be written.

    Attributes:
        format: name in FORMATS.
        shape: NumPy order (rows, cols).
        data: the blocks (any dtype, C order), or a function that makes them when their turn comes, so that a whole
            model never lies in memory twice.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    data: np.ndarray | Callable[[], np.ndarray]


def write_gguf(path: str | os.PathLike[str], metadata: Mapping[str, Any], tensors: Iterable[WriteTensor]) -> None:
    """Write a GGUF v3 file. The file appears whole or not at all: it is written beside `path` and renamed.

    Metadata types follow the values: bool, str, float (f32), int (u32, i32, u64, i64: the first that holds it); NumPy
    scalars and 1-D arrays keep their dtype; lists hold one type (ints i32, i64, u64: the first that holds all).

    Raises:
        OptionError: a value, name or shape that GGUF cannot hold, or data of the wrong size.
        OSError: the folder cannot be written.
    """
    path, tensors = Path(path), list(tensors)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not sound_alignment(alignment):
        raise OptionError(f"general.alignment is {alignment!r}, a power of two from 8 to {MAX_ALIGNMENT:,} expected")
    head = bytearray(MAGIC + U32.pack(3) + U64.pack(len(tensors)) + U64.pack(len(metadata)))
    for key, value in metadata.items():
        head += _pack_string(key)
        head += _pack_value(key, value)
    sizes: list[int] = []
    offset = 0
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise OptionError("a tensor name occurs twice")
    for tensor in tensors:
        head += _pack_string(tensor.name) + _pack_entry(tensor, offset)
        sizes.append(tensor_nbytes(FORMATS[tensor.format], tensor.shape))
        offset += -(-sizes[-1] // alignment) * alignment
    head += bytes(-len(head) % alignment)
    with whole(path) as file:
        file.write(head)
        for tensor, size in zip(tensors, sizes, strict=True):
            data = np.ascontiguousarray(tensor.data() if callable(tensor.data) else tensor.data)
            if data.nbytes != size:
                raise OptionError(f"tensor {tensor.name}: {size:,} bytes expected, {data.nbytes:,} given")
            file.write(data.reshape(-1).view(np.uint8).data)
            file.write(bytes(-size % alignment))


def _pack_string(text: str) -> bytes:
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise OptionError(f"{text[:40]!r}: lone surrogates are no text, GGUF holds UTF-8") from None
    return U64.pack(len(data)) + data


def _pack_entry(tensor: WriteTensor, offset: int) -> bytes:
    format, shape = FORMATS[tensor.format], tensor.shape
    if not 1 <= len(shape) <= MAX_DIMS or min(shape) < 1 or shape[-1] % format.block:
        raise OptionError(f"tensor {tensor.name}: shape {shape} does not fit {format.name} blocks of {format.block}")
    if not 0 < len(tensor.name.encode()) <= MAX_NAME:
        raise OptionError(f"tensor {tensor.name!r}: a name of 1 to {MAX_NAME} bytes expected")
    dims = b"".join(U64.pack(size) for size in reversed(shape))
    return U32.pack(len(shape)) + dims + U32.pack(format.ggml_type) + U64.pack(offset)


def _pack_value(key: str, value: Any) -> bytes:
    if isinstance(value, str):
        return U32.pack(STRING) + _pack_string(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        return U32.pack(ARRAY) + U32.pack(STRING) + U64.pack(len(value)) + b"".join(map(_pack_string, value))
    array = np.asarray(value, None if isinstance(value, (np.ndarray, np.generic)) else _dtype_of(key, value))
    little = array.astype(array.dtype.newbyteorder("<"))
    codes = {dtype: code for code, dtype in SCALARS.items()} | {np.dtype(bool): BOOL}
    if little.dtype not in codes or array.ndim > 1:
        raise OptionError(f"metadata {key}: GGUF holds no {array.dtype} of {array.ndim} dimensions")
    code = U32.pack(codes[little.dtype])
    return (U32.pack(ARRAY) + code + U64.pack(array.size) if array.ndim else code) + little.tobytes()


def _dtype_of(key: str, value: Any) -> str:
    """The first of GGUF's usual types that holds a Python value or list."""
    many = isinstance(value, (list, tuple))
    items = list(value) if many else [value]
    ints = ["<i4", "<i8", "<u8"] if many else ["<u4", "<i4", "<u8", "<i8"]
    kinds = {type(item) for item in items}
    if kinds == {bool}:
        return "?"
    if float in kinds and kinds <= {int, float}:
        return "<f4"
    for name in ints if kinds == {int} else []:
        if np.iinfo(name).min <= min(items) and max(items) <= np.iinfo(name).max:
            return name
    raise OptionError(f"metadata {key}: no GGUF type holds {type(value).__name__} {str(value)[:40]!r}")
