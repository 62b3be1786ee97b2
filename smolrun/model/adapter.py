"""A low-rank adapter as the kernels read it: panels of its factors, and the words that the weights' table points to.

u = scale x A^T, y += u B^T is computed beside each matrix, in f32, so a quantised base keeps its bits and its size, and
another adapter or scale is another pointer: nothing is merged, packed or read again. With f32 activations the bits are
those that training computes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from smolrun.files.peft import Factors
from smolrun.kernels.block import MATRICES, A, f32_bits
from smolrun.kernels.panels import BLOCK, ROWS, pack
from smolrun.model.memory import Arena
from smolrun.model.weights import TENSOR

READERS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))  # matrices that share their activations
TOGETHER = max(map(len, READERS))


class PackedAdapter:
    """An adapter in memory.

    Attributes:
        words: (layers, matrices) of block.MATRICES: address of each one's words, 0 without an adapter.
        bytes: of its memory.
    """

    def __init__(self, factors: Mapping[str, Factors], n_layers: int, *, scale: float, matmul: int, chunk: int) -> None:
        """matmul: address of the kernel of F32 panels with f32 activations; chunk: tokens of a pass."""
        rank = max(f.a.shape[0] for f in factors.values())
        padded = -(-rank // BLOCK) * BLOCK
        sizes = {f"u{i}": 4 * chunk * padded for i in range(TOGETHER)}
        for stem, f in factors.items():
            groups = -(-len(f.b) // ROWS), -(-rank // ROWS)
            sizes |= {f"{stem}.up": 4 * ROWS * groups[0] * padded, f"{stem}.down": 4 * ROWS * groups[1] * f.a.shape[1]}
        self._arena = Arena(sizes | {"words": 8 * A.size * len(factors)})
        self.bytes = len(self._arena.whole)
        table: NDArray[np.int64] = self._arena.arrays["words"].view(np.int64).reshape(-1, A.size)
        self.words: NDArray[np.int64] = np.zeros((n_layers, len(MATRICES)), np.int64)
        place = {m: shared.index(m) for shared in READERS for m in shared}
        for row, (stem, f) in zip(table, factors.items(), strict=True):
            _, layer, part = stem.split(".")
            matrix = next(m for m, tensor in TENSOR.items() if tensor == part)
            up = np.zeros((len(f.b), padded), np.float32)
            up[:, : f.b.shape[1]] = f.b
            for name, values in (("down", f.a), ("up", up)):
                values = np.ascontiguousarray(values, np.float32)
                pack("F32", values.view(np.uint8), len(values), self._arena.arrays[f"{stem}.{name}"])
            told = {
                "matmul": matmul,
                "down": self._arena.address(f"{stem}.down"),
                "up": self._arena.address(f"{stem}.up"),
                "groups": -(-len(f.a) // ROWS),
                "blocks": padded // BLOCK,
                "scale": f32_bits(f.scale * scale),
                "u": self._arena.address(f"u{place[matrix]}"),
                "place": place[matrix],
            }
            for name, value in told.items():
                row[getattr(A, name) // 8] = value
            self.words[int(layer), MATRICES.index(matrix)] = row.ctypes.data
