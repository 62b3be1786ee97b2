"""Files that appear whole or not at all."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def whole(path: Path, *, private: bool = False) -> Iterator[IO[bytes]]:
    """A file to write: beside `path` until all of it is on the disk, then renamed; gone after an exception.

    private: for its owner's eyes alone.

    Raises:
        OSError: the folder cannot be written, or something else than a file (/dev/null) is there.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "is there and is no file", str(path))
    part = path.with_name(f".{path.name}.{os.urandom(6).hex()}.part")
    try:
        with open(part, "xb", opener=_private if private else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(part), part):  # people know `path`
            error.filename, error.filename2 = str(path), None
        raise


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
