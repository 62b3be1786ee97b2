"""Kernels of any tier as functions of NumPy arrays, for tests and benchmarks: the layouts are built here, in NumPy."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

import naive
from naive import CASES, FLOATS, QUANTS, TERMS, Case
from smolrun.kernels import load
from smolrun.kernels.block import unpack_bytes
from smolrun.kernels.panels import ROWS, pack
from smolrun.kernels.target import TIERS, Tier, choose, one_tile, record_bytes, runnable, token_tile

POINTWISE = ("rmsnorm", "swiglu", "rope", "quantise", "interleave", "half")
NAMES = [*dict.fromkeys(c.name for c in CASES), *(f"row_{f}" for f in (*FLOATS, *QUANTS)), *POINTWISE]
MODEL = ("forward_f16", "forward_f32", "forward_q4_0_q8_0", "classify", "team_rouse", "team_run", "worker_loop")
GUARD = 0xA5  # fills what a kernel must not write


def aligned(size: int, fill: int = 0) -> np.ndarray:
    """uint8 on a cache line, as the run-time's arrays are."""
    buffer = np.full(size + 64, fill, np.uint8)
    first = -buffer.ctypes.data % 64
    return buffer[first : first + size]


def copied(array: np.ndarray) -> np.ndarray:
    """The same values on a cache line."""
    out = aligned(array.nbytes).view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


def address(array: np.ndarray | None) -> int:
    """Where an array begins; 0 for None."""
    return 0 if array is None else array.ctypes.data


def tiers_to_test() -> list[str]:
    """Tiers to test: all that this CPU runs, or the one that SMOLRUN_TIER names."""
    return [choose().name] if os.environ.get("SMOLRUN_TIER") else [t.name for t in runnable()]


def compile_all(names: Iterable[str] = (*NAMES, *MODEL)) -> None:
    """Fill the cache with the kernels of every tier to be tested, two compilers at a time."""
    script = (
        "import sys; from smolrun.kernels import load; from smolrun.kernels.target import TIERS;"
        "load.addresses(TIERS[sys.argv[1]], sys.argv[2:])"
    )
    waiting, running = tiers_to_test(), []
    while waiting or running:
        while waiting and len(running) < 2:
            running.append(subprocess.Popen([sys.executable, "-c", script, waiting.pop(0), *names]))
        assert running.pop(0).wait() == 0


def emitted(kind: str, tier: str, names: Iterable[str]) -> dict[str, bytes]:
    """Code of entry points for any tier of this machine type, runnable or not: name -> image, object or assembly."""
    command = [sys.executable, "-m", "smolrun.kernels.build", kind, tier, *names]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment).stdout
    found, first = {}, 0
    while first < len(out):
        line = out.index(b"\n", first) + 1
        frame = json.loads(out[first:line])
        found[frame["name"]] = out[line : line + frame["bytes"]]
        first = line + frame["bytes"]
    return found


class Kernels:
    """Entry points of one tier."""

    def __init__(self, tier: Tier | str) -> None:
        self.tier = TIERS[tier] if isinstance(tier, str) else tier

    def function(self, name: str, *arguments: Any, result: Any = None) -> Callable[..., Any]:
        """The ctypes function of an entry point."""
        code = load.addresses(self.tier, [name])[name]
        return ctypes.CFUNCTYPE(result, *arguments)(code)

    def _integers(self, name: str, count: int) -> Callable[..., Any]:
        return self.function(name, *[ctypes.c_int64] * count)

    # ---- matrices ---------------------------------------------------------------------------------------------------

    def tiles(self, x: np.ndarray, mode: str) -> np.ndarray:
        """Activations (tokens, k) as a matmul reads them, tile after tile."""
        terms = TERMS[mode]
        step = token_tile(self.tier, terms) if not terms or len(x) >= one_tile(self.tier) else len(x)
        # (tokens, blocks) or (tokens, k)
        whole = naive.records(x, terms, self.tier.crossed) if terms else x.astype(np.float32)
        whole = naive.paired(whole) if terms == 2 and self.tier.pairs else whole
        parts = [np.ascontiguousarray(whole[i : i + step].swapaxes(0, 1)) for i in range(0, len(x), step)]
        return copied(np.concatenate([p.reshape(-1).view(np.uint8) for p in parts]))

    def prepared(
        self, case: Case, raw: np.ndarray, x: np.ndarray, groups: Iterable[tuple[int, int]] | None = None, add: int = 0
    ) -> tuple[Callable[[], None], Callable[[], np.ndarray]]:
        """(run, result): a call over the ranges of row groups given, and y (tokens, rows), a view of what it wrote."""
        w = copied(pack(case.format, raw, len(raw)))
        count, n = w.shape[0], len(x)
        tiles, scratch = self.tiles(x, case.mode), aligned(unpack_bytes(case.k))
        y = aligned(4 * (n * count * ROWS + ROWS), GUARD).view(np.float32)
        function, ranges = self._integers(case.name, 10), [*(groups or ((0, count),))]

        def run() -> None:  # holds the arrays
            fixed = (address(tiles), n, address(y), count * ROWS, add, address(scratch))
            for first, end in ranges:
                function(address(w), case.k // 32, first, end, *fixed)

        def result() -> np.ndarray:
            assert (y[n * count * ROWS :].view(np.uint8) == GUARD).all(), "wrote behind y"
            return y[: n * count * ROWS].reshape(n, -1)[:, : len(raw)]

        return run, result

    def matmul(
        self,
        case: Case,
        raw: np.ndarray,
        x: np.ndarray,
        *,
        groups: Iterable[tuple[int, int]] | None = None,
        add: np.ndarray | None = None,
    ) -> np.ndarray:
        """y (tokens, rows) = x w^T (+ add)."""
        run, result = self.prepared(case, raw, x, groups, int(add is not None))
        if add is not None:
            result()[:] = add
        run()
        return result().copy()

    def row(self, fmt: str, raw: np.ndarray, k: int, rows: Iterable[int]) -> np.ndarray:
        """Rows of the matrix as float32."""
        w = copied(pack(fmt, raw, len(raw)))
        run = self._integers(f"row_{fmt}", 5)
        out, scratch = aligned(4 * k).view(np.float32), aligned(64 * k)
        found = []
        for row in rows:
            run(address(w), k // 32, row, address(out), address(scratch))
            found.append(out.copy())
        return np.array(found)

    # ---- rows of numbers --------------------------------------------------------------------------------------------

    def rmsnorm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        """x, weight: float32 (n,)."""
        i64 = ctypes.c_int64
        run = self.function("rmsnorm", i64, i64, i64, ctypes.c_float, i64)
        x, weight, out = copied(x), copied(weight), aligned(x.nbytes).view(np.float32)
        run(address(x), address(weight), len(x), eps, address(out))
        return out.copy()

    def swiglu(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """gate, up: float32 (n,)."""
        gate, up = copied(gate), copied(up)
        self._integers("swiglu", 3)(address(gate), address(up), len(gate))
        return gate.copy()

    def rope(self, x: np.ndarray, table: np.ndarray, scale: float) -> np.ndarray:
        """x: float32 (64,); table: float32 (2, 32)."""
        i64 = ctypes.c_int64
        run = self.function("rope", i64, i64, ctypes.c_float, i64)
        x, table = copied(x), copied(table)
        run(address(x), address(table), scale, address(x))
        return x.copy()

    def half(self, x: np.ndarray) -> np.ndarray:
        """float32 (n,) -> float16 (n,), n a multiple of 16."""
        x, out = copied(x), aligned(x.nbytes // 2).view(np.float16)
        self._integers("half", 3)(address(x), len(x), address(out))
        return out.copy()

    def quantise(self, x: np.ndarray, terms: int, slots: int = 1, slot: int = 0) -> np.ndarray:
        """x (k,) into one slot of a tile of `slots` tokens: RECORD (k / 32, slots), terms apart and nothing crossed on
        any tier; the rest keeps the guard."""
        x, size = copied(x), record_bytes(terms)
        out = aligned(len(x) // 32 * slots * size, GUARD)
        self._integers("quantise", 5)(address(x), len(x), terms, address(out) + slot * size, slots * size)
        records = out.view(naive.RECORD[terms]).reshape(-1, slots).copy()
        if terms == 2 and self.tier.pairs:
            records[:, slot] = naive.unpaired(records[:, slot])
        if terms == 1:
            records["crossed"][:, slot] += naive.crossing(records["q"][:, slot, 0], self.tier.crossed)
        return records

    def interleave(self, x: np.ndarray, slots: int, slot: int) -> np.ndarray:
        """x (k,) into slot `slot` of `slots`: float32 (k, slots), the other slots zero."""
        x, out = copied(x), aligned(x.nbytes * slots).view(np.float32)
        self._integers("interleave", 4)(address(x), len(x), address(out) + 4 * slot, 4 * slots)
        return out.reshape(-1, slots).copy()
