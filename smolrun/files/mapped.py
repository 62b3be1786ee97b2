"""One file in memory, read-only."""

import contextlib
import mmap
import os
import stat
from pathlib import Path

import numpy as np

from smolrun.errors import ModelFileError, ModelNotFound

AGAIN = "(download again)"


class MappedFile:
    """A read-only memory map of one file, with byte views and a way to give its pages back.

    Attributes:
        size: bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ModelFileError(f"{path.name}: not a regular file")
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size == 0:
                    raise ModelFileError(f"{path.name}: the file is empty {AGAIN}")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ModelNotFound(f"{path}: no such file") from None
        except OSError as error:
            raise ModelFileError(f"{path.name}: cannot be read: {error.strerror or error}") from error
        self.size = len(self._map)

    def memory(self) -> memoryview:
        """The whole map; release it (`with`) before close."""
        return memoryview(self._map)

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        """Read-only uint8 view (nbytes,) of the map, without a copy. Callers have checked the bounds."""
        return np.frombuffer(self._map, np.uint8, nbytes, offset)

    def release(self, offset: int, nbytes: int) -> None:
        """Take a range's pages out of our resident memory. They come back from the file when touched again."""
        first = offset - offset % mmap.PAGESIZE
        if hasattr(self._map, "madvise") and not self._map.closed:
            self._map.madvise(mmap.MADV_DONTNEED, first, offset + nbytes - first)

    def close(self) -> None:
        """Unmap now, or when the last view is gone: a view can never read freed memory."""
        with contextlib.suppress(BufferError):
            self._map.close()
