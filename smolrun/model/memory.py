"""How much memory a model takes: from shapes alone, before anything is loaded."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smolrun.config import ModelConfig
from smolrun.errors import OptionError, SmolrunError
from smolrun.kernels.block import HEAD_DIM, KV_BYTES, PAGE, PART, SPAN, S, scratch_bytes
from smolrun.kernels.panels import BLOCK, PANELS, ROWS
from smolrun.kernels.target import record_bytes

LEAST_CONTEXT = 512  # positions; the default goes no lower, however little memory there is
CHUNK = 256  # positions of one prefill pass: weights are read once per chunk, activations stay in the L2 cache
SEGMENTS = 32  # sequences of one pass


@dataclass(frozen=True)
class Estimate:
    """Bytes by purpose."""

    weights: int
    kv: int
    scratch: int

    @property
    def total(self) -> int:
        """Bytes in all, without Python and its libraries."""
        return self.weights + self.kv + self.scratch


def panel_bytes(name: str, rows: int, cols: int) -> int:
    """Bytes of a (rows, cols) matrix of a format as panels."""
    panel = PANELS[name]
    return int(-(-rows // ROWS) * (cols // BLOCK // panel.blocks) * panel.record_bytes)


def kv_kinds(kv: str) -> tuple[str, str]:
    """Kinds of K and of V from "KIND" for both or "KIND,KIND".

    Raises:
        OptionError: not one or two known kinds.
    """
    kinds = kv.split(",") if isinstance(kv, str) else []
    if not 1 <= len(kinds) <= 2 or not set(kinds) <= KV_BYTES.keys():
        raise OptionError(f"kv={kv!r}: expected one of {', '.join(KV_BYTES)}, or two for K and V as in 'q8_0,q4_0'")
    return kinds[0], kinds[-1]


def head_bytes(kv: str) -> tuple[int, int]:
    """Bytes of K and of V of one head in a page of 64 positions."""
    k, v = kv_kinds(kv)
    blocks = PAGE * HEAD_DIM // BLOCK
    return blocks * KV_BYTES[k], blocks * KV_BYTES[v]


def page_bytes(config: ModelConfig, kv: str) -> int:
    """Bytes of one KV page: 64 positions of every layer and head, K and V."""
    return int(config.n_layers * config.n_kv_heads * sum(head_bytes(kv)))


def buffer_sizes(config: ModelConfig, *, chunk: int, terms: int, threads: int, context: int) -> dict[str, int]:
    """Bytes of each buffer of a forward pass; keys are words of the argument block."""
    c, f = config, 4
    widest = max(c.dim, c.hidden_dim, c.q_dim)
    spans = -(-context // SPAN)
    return {
        "ids": 8 * chunk,
        "x": f * chunk * c.dim,
        "out": f * chunk * c.dim,
        "qkv": f * chunk * (c.q_dim + 2 * c.kv_dim),
        "gate": f * chunk * c.hidden_dim,
        "up": f * chunk * c.hidden_dim,
        "act": chunk * (widest // BLOCK) * record_bytes(terms),
        "act_f32": f * chunk * widest,
        "segments": 8 * SEGMENTS * S.size,
        "parts": f * SEGMENTS * spans * c.n_heads * PART,  # touched as far as the sequences of a pass reach
        "scratch": threads * scratch_bytes(widest),
    }


def estimate(
    config: ModelConfig, tensors: Iterable[tuple[str, int, int]], context: int, kv: str = "f16", threads: int = 1
) -> Estimate:
    """Memory of a loaded model at a full context.

    Args:
        config: the model.
        tensors: (format, rows, cols) of every weight matrix.
        context: positions.
        kv: kinds of the KV cache, see `kv_kinds`.
        threads: workers; each has its scratch.
    """
    weights = sum(panel_bytes(name, rows, cols) for name, rows, cols in tensors)
    scratch = sum(buffer_sizes(config, chunk=CHUNK, terms=2, threads=threads, context=context).values())
    return Estimate(weights, -(-context // PAGE) * page_bytes(config, kv), scratch)


def available() -> int | None:
    """Bytes that can be had without swapping, the limit of a container included; None where the system does not say."""
    limits = []
    try:
        meminfo = Path("/proc/meminfo").read_text()
        limits.append(1024 * int(meminfo.split("MemAvailable:")[1].split()[0]))
    except (OSError, IndexError, ValueError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # not in a cgroup v2, or without a limit ("max")
    return max(min(limits), 0) if limits else None


def default_context(config: ModelConfig, weights: int, kv: str) -> int:
    """The model's own context, or what fits into half of the available memory beside the weights."""
    free = available()
    if free is None:
        return config.max_positions
    pages = (free // 2 - weights) // page_bytes(config, kv)
    return min(config.max_positions, max(int(pages) * int(PAGE), LEAST_CONTEXT))


def rounded(sizes: Mapping[str, int]) -> int:
    """Bytes of an arena: each array begins on a cache line."""
    return sum(-(-size // 64) * 64 for size in sizes.values())


class Arena:
    """Zeroed memory for several arrays, page by page only when touched, on huge pages where the system has them."""

    def __init__(self, sizes: Mapping[str, int], mapped: mmap.mmap | None = None, offset: int = 0) -> None:
        """mapped: a file that holds the arrays from `offset` on; they are then read-only."""
        self._memory = mapped or self._anonymous(max(rounded(sizes), 64))
        self.whole: NDArray[np.uint8] = np.frombuffer(self._memory, np.uint8, rounded(sizes), offset)
        self.arrays: dict[str, NDArray[np.uint8]] = {}
        first = 0
        for name, size in sizes.items():
            self.arrays[name] = self.whole[first : first + size]
            first += -(-size // 64) * 64

    @staticmethod
    def _anonymous(total: int) -> mmap.mmap:
        # Python's default is shared memory: a forked child would compute in its parent's buffers, and Linux gives it no
        # huge pages
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        try:
            memory = mmap.mmap(-1, total, **private)
        except OSError as error:
            raise SmolrunError(
                f"the system gives no {total:,} bytes of memory ({error}): choose a smaller context, model or format"
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def address(self, name: str) -> int:
        """Address of an array, a multiple of 64."""
        return int(self.arrays[name].ctypes.data)
