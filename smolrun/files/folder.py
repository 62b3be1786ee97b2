"""A Hugging Face folder: its JSON files and safetensors shards, opened without trust. Nothing of models.

Only files that lie in the folder are opened, and of text at most so many bytes. Headers are validated by the
`safetensors` library; the bytes are then viewed through our own map, as its NumPy door has no BF16 and copies tensors.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolrun.errors import ModelFileError, UnsupportedModel
from smolrun.files.mapped import AGAIN, MappedFile

MEBI = 1 << 20
MAX_BYTES = {"tokenizer.json": 64 * MEBI}
MAX_OTHER = 8 * MEBI
DTYPES = {"F32": 4, "F16": 2, "BF16": 2}  # bytes of one; safetensors' names are GGUF's
PACKED = (".qweight", ".qzeros", ".g_idx")  # int32 parts of GPTQ and AWQ layers (gptq.py)
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+ -]{0,200}")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True, slots=True)
class Shard:
    """A tensor in a safetensors file: `nbytes` from `offset` on."""

    file: MappedFile
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Folder:
    """Looks up files by plain name; a link may lead to the hub cache's blobs, nowhere else out of the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.roots = [self.path]
        if self.path.parent.name == "snapshots":
            self.roots.append((self.path.parent.parent / "blobs").resolve())

    @property
    def name(self) -> str:
        """owner/model for a snapshot in the hub cache, else the folder's name."""
        owner = self.path.parent.parent.name
        if self.path.parent.name == "snapshots" and owner.startswith("models--"):
            return owner.removeprefix("models--").replace("--", "/", 1)
        return self.path.name

    def find(self, name: str) -> Path | None:
        """The file of that name, or None."""
        if not PLAIN_NAME.fullmatch(name):
            raise ModelFileError(f"{self.name}: {name[:80]!r} is no plain file name of a file in the folder")
        path = self.path / name
        if not path.exists():
            return None
        real = path.resolve()
        if not any(real.is_relative_to(root) for root in self.roots):
            raise ModelFileError(f"{name}: links to {real}, outside of {self.path} (copy the file into the folder)")
        if not real.is_file():
            raise ModelFileError(f"{name}: not a regular file")
        return path

    def text(self, name: str) -> str | None:
        """A text file, or None if there is none."""
        path = self.find(name)
        if path is None:
            return None
        most = MAX_BYTES.get(name, MAX_OTHER)
        try:
            with open(path, "rb") as file:
                data = file.read(most + 1)
        except OSError as error:
            raise ModelFileError(f"{name}: cannot be read: {error.strerror or error}") from error
        if len(data) > most:
            raise ModelFileError(f"{name}: more than {most:,} bytes; no sound checkpoint has such a file {AGAIN}")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelFileError(f"{name}: not UTF-8 at byte {error.start:,} {AGAIN}") from None

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file that holds an object, or None if there is none."""
        text = self.text(name)
        return None if text is None else parse_object(text, name)

    def shards(self, name: str | None = None) -> dict[str, Shard]:
        """Every tensor: of model.safetensors, else of the files its index lists, else of the only *.safetensors.

        name: of this file alone.

        Raises:
            ModelFileError: no weights; a damaged file; an index that lies.
            UnsupportedModel: a dtype other than F32, F16, BF16.
        """
        out: dict[str, Shard] = {}
        if name is not None and self.find(name) is None:
            raise ModelFileError(f"{self.name}: {name} is missing {AGAIN}")
        if name is not None:
            return dict(self._tensors(name))
        index = None if self.find(SINGLE) else self.json(INDEX)
        if index is None:
            for name, shard in self._tensors(self._single()):
                out[name] = shard
            return out
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ModelFileError(f"{INDEX}: weight_map is no object of file names {AGAIN}")
        for file in sorted(set(weight_map.values())):
            for name, shard in self._tensors(file):
                if weight_map.get(name) != file:
                    listed = weight_map.get(name, "nowhere")
                    raise ModelFileError(f"{file}: holds tensor {name}, which {INDEX} lists in {listed} {AGAIN}")
                out[name] = shard
        for name in weight_map.keys() - out.keys():
            raise ModelFileError(f"{weight_map[name]}: tensor {name} is listed in {INDEX} but missing {AGAIN}")
        return out

    def _single(self) -> str:
        files = sorted(path.name for path in self.path.glob("*.safetensors"))
        if SINGLE in files:
            return SINGLE
        if len(files) == 1:
            return files[0]
        if files:
            raise ModelFileError(f"{self.name}: {len(files)} safetensors files but no {INDEX} {AGAIN}")
        pickles = " (pytorch_model.bin is not read: a pickle can run code)" if self.find("pytorch_model.bin") else ""
        raise ModelFileError(f"{self.name}: no {SINGLE} and no {INDEX}{pickles}")

    def _tensors(self, name: str) -> Iterator[tuple[str, Shard]]:
        """(name, shard) of one file in the order of its bytes: the library refuses gaps, so offsets are sums."""
        from safetensors import SafetensorError, safe_open

        path = self.find(name)
        if path is None:
            raise ModelFileError(f"{name}: listed in {INDEX} but missing {AGAIN}")
        file = MappedFile(path)
        try:
            with safe_open(str(path), "numpy") as header:
                parts = [(key, header.get_slice(key)) for key in header.offset_keys()]
                entries = [(key, part.get_dtype(), tuple(part.get_shape())) for key, part in parts]
        except (SafetensorError, OSError) as error:
            raise ModelFileError(f"{name}: {error} {AGAIN}") from None
        offset = 8 + int.from_bytes(bytes(file.view(0, 8)), "little")
        for key, dtype, shape in entries:
            size = 4 if dtype == "I32" and key.endswith(PACKED) else DTYPES.get(dtype)
            if size is None:
                raise UnsupportedModel(f"{name}: tensor {key} is {dtype}; only {', '.join(DTYPES)} are supported")
            nbytes = math.prod(shape) * size
            if offset + nbytes > file.size:
                found = f"{nbytes:,} bytes expected at offset {offset:,}, file ends at {file.size:,}"
                raise ModelFileError(f"{name}: tensor {key}: {found} {AGAIN}")
            yield key, Shard(file, dtype, shape, offset, nbytes)
            offset += nbytes


def parse_object(text: str, source: str) -> dict[str, Any]:
    """JSON text of one object; NaN and Infinity, which Python would take, are refused."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{source}: not sound JSON: {error} {AGAIN}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{source}: a JSON object expected, {type(value).__name__} found {AGAIN}")
    return value
