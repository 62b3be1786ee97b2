"""How much memory a model takes, from shapes alone, and whether it is there: told before anything is allocated.

    weights     panels of every matrix, touched whole by every token
    kv          pages of 64 positions, zero until a sequence reaches them
    scratch     buffers of a pass of a chunk of positions, and the threads'
    process     Python, NumPy, the tokenizer's tables, the kernels' code

*What counts.* The peak of resident memory (VmHWM), which is what a full device kills by. Weights count in full even
where they are a read-only map of the packed file: the system may take such pages back and all processes share one copy
of them, but every token reads every one, so a model whose weights do not stay in memory runs at the speed of the disk.
What lies in the page cache counts as free: it becomes ours without another copy. The model's own file does not count,
its pages are given back as soon as they are packed. The first load of a model, which reads its vocabulary, takes
PROCESS_TOKEN more for each token.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from smolrun.config import ModelConfig
from smolrun.errors import OptionError, OutOfMemory, SmolrunError
from smolrun.kernels.block import HEAD_DIM, KV_BYTES, LINE, MAX_THREADS, PAGE, PART, PHASES, SPAN, S, scratch_bytes
from smolrun.kernels.panels import BLOCK, PANELS, ROWS
from smolrun.kernels.target import record_bytes
from smolrun.model import machine

LEAST_CONTEXT = 512  # positions; the default goes no lower, however little memory there is
CHUNK = 256  # positions of one prefill pass: weights are read once per chunk, activations stay in the L2 cache
SEGMENTS = 32  # sequences of one pass
PROCESS = 42_000_000  # bytes of Python, NumPy, the tokenizer's tables and the kernels' code, on Linux
PROCESS_TOKEN = 600  # bytes for each token of a vocabulary that is read anew: texts, merges and what is made of them

Shapes = Sequence[tuple[str, int, int]]  # (format, rows, cols) of every weight matrix


@dataclass(frozen=True)
class Estimate:
    """Bytes by purpose."""

    weights: int
    kv: int
    scratch: int
    process: int

    @property
    def model(self) -> int:
        """Bytes that loading a model takes from what is available to a process that runs already."""
        return self.weights + self.kv + self.scratch

    @property
    def total(self) -> int:
        """Bytes of a process in all, as VmHWM shows them."""
        return self.model + self.process


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


def chunk_of(threads: int) -> int:
    """Positions of one prefill pass: twice as many for two threads, of which each takes half (forward.py) and is 3 %
    faster. Of more threads that was not measured, and 1.7B would take 50 MB more on devices that have little memory.
    """
    return 2 * CHUNK if threads == 2 else CHUNK


def buffer_sizes(
    config: ModelConfig, *, chunk: int, threads: int, context: int, segments: int = SEGMENTS
) -> dict[str, int]:
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
        "act": chunk * (widest // BLOCK) * record_bytes(1),
        "act_2": chunk * (widest // BLOCK) * record_bytes(2),
        "act_f32": f * chunk * widest,
        "segments": 8 * segments * S.size,
        "parts": f * segments * spans * c.n_heads * PART,
        "scratch": threads * scratch_bytes(widest),
        "counters": LINE * (2 + c.n_layers * PHASES),
        "rope": f * HEAD_DIM * context,
    }  # the classifier's activations lie in these, too


def estimate(
    config: ModelConfig,
    tensors: Iterable[tuple[str, int, int]],
    context: int,
    kv: str = "f16",
    threads: int = 1,
    filled: int | None = None,
) -> Estimate:
    """Memory of a loaded model that answers one caller at a time.

    Args:
        config: the model.
        tensors: (format, rows, cols) of every weight matrix, as it is in memory.
        context: positions.
        kv: kinds of the KV cache, see `kv_kinds`.
        threads: workers; each has its scratch.
        filled: positions that are ever used; None: all.
    """
    weights = sum(panel_bytes(name, rows, cols) for name, rows, cols in tensors)
    used = context if filled is None else min(filled, context)
    sizes = buffer_sizes(config, chunk=chunk_of(threads), threads=threads, context=context)
    one = sizes | {"parts": sizes["parts"] // SEGMENTS}
    return Estimate(weights, -(-used // PAGE) * page_bytes(config, kv), rounded(one), PROCESS)


def check_threads(threads: int) -> None:
    """As `check_options`, where there is no model yet."""
    if not 1 <= threads <= MAX_THREADS:
        raise OptionError(f"threads={threads}: expected 1..{MAX_THREADS}")


def check_options(config: ModelConfig, context: int | None, threads: int) -> None:
    """Refuse what no model can be run with.

    Raises:
        OptionError: it is.
    """
    check_threads(threads)
    if context is not None and not 1 <= context <= config.max_positions:
        limit = f"1..{config.max_positions:,}, the positions this model was trained for"
        raise OptionError(f"context={context}: expected {limit}")


def default_context(config: ModelConfig, weights: int, kv: str) -> int:
    """The model's own context, or what fits into half of the available memory beside the weights."""
    room = machine.HERE.available()
    if room is None:
        return config.max_positions
    pages = (room.bytes // 2 - weights) // page_bytes(config, kv)
    return min(config.max_positions, max(int(pages) * int(PAGE), LEAST_CONTEXT))


def check(name: str, config: ModelConfig, tensors: Shapes, context: int, kv: str, threads: int) -> None:
    """Refuse a model that does not fit what is available.

    Raises:
        OutOfMemory: it does not; names what would.
    """
    room = machine.HERE.available()
    needs = estimate(config, tensors, context, kv, threads)
    if room is None or needs.model <= room.bytes:
        return
    ways = list(fitting(config, tensors, context, kv, threads, room.bytes))
    raise OutOfMemory(
        f"{name} needs {needs.model / 1e9:.2f} GB (weights {needs.weights / 1e9:.2f}, cache of {context:,} positions "
        f"in {kv} {needs.kv / 1e9:.2f}, scratch {needs.scratch / 1e9:.2f}) and {room.bytes / 1e9:.2f} GB are available "
        f"({room.source}). "
        + (f"What would fit: {'; '.join(ways)}. " if ways else "Take a smaller model. ")
        + "To try nevertheless: force=True, --force"
    )


def fitting(config: ModelConfig, tensors: Shapes, context: int, kv: str, threads: int, available: int) -> Iterator[str]:
    """Ways to run a model in so many bytes: a smaller context, a smaller cache, smaller weights, or, where none of them
    is enough, these together."""
    floats = all(PANELS[name].is_float for name, _, _ in tensors)
    weights = estimate(config, tensors, 0, kv).weights

    def narrowed(to: str) -> Shapes:
        # a file's classifier keeps six bits or eight, as llama.cpp has it
        return [("Q8_0" if rows == config.vocab_size and not floats else to, rows, cols) for _, rows, cols in tensors]

    def positions(tensors: Shapes, kv: str) -> int:
        """The largest context that fits, up to the one that was asked for; 0: none."""
        fixed = estimate(config, tensors, context, kv, threads, filled=0).model
        most = max(available - fixed, 0) // page_bytes(config, kv) * PAGE
        return min(context, int(most)) if most >= min(LEAST_CONTEXT, context) else 0

    def as_option(to: str) -> str:
        return f'quantize="{to.lower()}"' if floats else f"the file as {to} (smolrun quantize --format {to.lower()})"

    smaller = [to for to in ("Q8_0", "Q4_0") if estimate(config, narrowed(to), 0, kv).weights < weights]
    caches = [kind for kind in ("q8_0", "q4_0") if page_bytes(config, kind) < page_bytes(config, kv)]
    found = False
    if fits := positions(tensors, kv):
        found = True
        yield f"context={fits}"
    for kind in caches:
        if positions(tensors, kind) == context:
            found = True
            yield f'kv="{kind}"'
            break
    for to in smaller:
        if positions(narrowed(to), kv) == context:
            found = True
            yield as_option(to)
            break
    if found:
        return
    for to in smaller:
        for kind in (kv, *caches):
            if fits := positions(narrowed(to), kind):
                parts = [as_option(to), *([f'kv="{kind}"'] if kind != kv else [])]
                yield " with ".join(
                    [parts[0], " and ".join([*parts[1:], *([f"context={fits}"] if fits < context else [])])]
                )
                return


def trim() -> None:
    """Give freed memory back to the system, which glibc does not do by itself: 10 MB once a tokenizer is built."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))


def rounded(sizes: Mapping[str, int]) -> int:
    """Bytes of an arena: each array begins on a cache line."""
    return sum(-(-size // 64) * 64 for size in sizes.values())


def offsets(sizes: Mapping[str, int]) -> dict[str, int]:
    """Where the arrays of an arena begin."""
    ends = accumulate((-(-size // 64) * 64 for size in sizes.values()), initial=0)
    return dict(zip(sizes, ends, strict=False))


class Arena:
    """Zeroed memory for several arrays, page by page only when touched."""

    def __init__(
        self,
        sizes: Mapping[str, int],
        mapped: mmap.mmap | NDArray[np.uint8] | None = None,
        offset: int = 0,
        *,
        huge: bool = True,
    ) -> None:
        """mapped: a file, or a part of one, that holds the arrays from `offset` on; they are then read-only.

        huge: on huge pages where the system has them: quicker to read whole, but touched 2 MB at a time.
        """
        self._memory = mapped if mapped is not None else self._anonymous(max(rounded(sizes), 64), huge)
        self.whole: NDArray[np.uint8] = np.frombuffer(self._memory, np.uint8, rounded(sizes), offset)
        self.arrays: dict[str, NDArray[np.uint8]] = {
            name: self.whole[first : first + sizes[name]] for name, first in offsets(sizes).items()
        }

    @staticmethod
    def _anonymous(total: int, huge: bool) -> mmap.mmap:
        # Python's default is shared memory: a forked child would compute in its parent's buffers, and Linux gives it no
        # huge pages
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        try:
            memory = mmap.mmap(-1, total, **private)
        except OSError as error:
            raise SmolrunError(
                f"the system gives no {total:,} bytes of memory ({error}): choose a smaller context, model or format"
            ) from error
        if huge and hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def address(self, name: str) -> int:
        """Address of an array, a multiple of 64."""
        return int(self.arrays[name].ctypes.data)
