"""Rotary angles with the same bits on every CPU: only operations that IEEE 754 rounds exactly, no libm."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
from numpy.typing import NDArray

from smolrun.kernels.block import HEAD_DIM

# pi / 2 in three parts: n times the first two is exact for n < 2^20
_P1, _P2, _P3 = 1.57079632673412561417e00, 6.07710050630396597660e-11, 2.02226624879595063154e-21
_TERMS = 10  # Taylor terms on |r| <= pi / 4: the next one is below 1e-21


def frequencies(theta: float) -> NDArray[np.float64]:
    """theta ** (-2 i / head_dim) for i < head_dim / 2, rounded once to f32 as transformers does; shape (head_dim /
    2,).
    """
    with localcontext() as context:
        context.prec = 40
        exact = [Decimal(theta) ** (Decimal(-2 * i) / HEAD_DIM) for i in range(HEAD_DIM // 2)]
    return np.array([float(f) for f in exact]).astype(np.float32).astype(np.float64)


def _polynomial(r: NDArray[np.float64], first: int) -> NDArray[np.float64]:
    """sum of (-1)^k r^(2k) / (2k + first)!: sin(r) / r for first = 1, cos(r) for first = 0."""
    r2 = r * r
    total = np.zeros_like(r)
    for k in reversed(range(_TERMS)):
        total = total * r2 + (-1) ** k / math.factorial(2 * k + first)
    return total


def table(theta: float, first: int, end: int) -> NDArray[np.float32]:
    """Cosines and sines of positions first..end: float32 (end - first, 2, head_dim / 2)."""
    angles = np.arange(first, end, dtype=np.float64)[:, None] * frequencies(theta)
    n = np.rint(angles * (2 / math.pi))
    r = angles - n * _P1 - n * _P2 - n * _P3
    sin, cos = r * _polynomial(r, 1), _polynomial(r, 0)
    quadrant = n.astype(np.int64) & 3
    swap = (quadrant & 1).astype(bool)
    out = np.empty((end - first, 2, HEAD_DIM // 2), np.float32)
    out[:, 0] = np.where(swap, sin, cos) * np.where((quadrant == 1) | (quadrant == 2), -1.0, 1.0)
    out[:, 1] = np.where(swap, cos, sin) * np.where(quadrant >= 2, -1.0, 1.0)
    return out
