"""The best blocks for given weights: scales and levels of least squared error, columns weighted by importance.

`formats.quantize_ref` rounds as llama.cpp's reference does; here the scale itself is searched. The error of a group of
weights x that share a scale is

    E = sum w (x - s q)^2      symmetric: Q8_0, Q4_0, Q5_0, Q6_K          s = sum w x q / sum w q^2
    E = sum w (x - s q - m)^2  affine: Q4_1, Q5_1, Q4_K, Q5_K             (s, m) from the 2 x 2 normal equations

w is the importance of a column: the mean square of the activations that meet it, so that E is the expected squared
error of the matrix's output if the inputs' errors do not conspire; 1 where nothing is known. For fixed levels q the
best scale is known, for a fixed scale the best levels are: so candidate scales give levels, levels give their best
scale, and the candidate of least E wins. At last the scale is rounded as the block stores it, and the levels once more
against that.

Arrays of groups are (k, n): n groups of k weights, so that every operation runs over long contiguous rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .formats import CHUNK, FORMATS, Blocks, F32Array, Format, pack_scales_and_mins, put_levels, quantize_ref

LARGEST = 65504.0  # of float16: no scale of a block of smaller weights overflows
SHRINK = np.linspace(0.6, 1.1, 21, dtype=np.float32)  # candidate ranges, as parts of the group's own
# without importance these are rounded as by the reference, whose scale keeps each block's extreme: the least squared
# error cuts it, and Q4_K_M of 135M, mostly Q5_0, had a mean KL of 0.104 so instead of 0.094
KEEP_EXTREMES = ("Q8_0", "Q5_0", "Q4_0")
REFITS = 2  # rounds of levels -> scale -> levels behind the best candidate


def quantize(fmt: Format, x: NDArray[Any], importance: F32Array | None = None) -> Blocks:
    """Blocks of a matrix with the least squared error the search finds.

    Args:
        fmt: one that can be written (see `writable`).
        x: float32 (rows, cols), cols a multiple of fmt.block.
        importance: float32 (cols,), not negative: how much a squared error in that column counts; None: all the same.

    Returns:
        (rows, cols / fmt.block) of fmt.dtype; the same for any split of the rows.

    Raises:
        ValueError: a format that is only read, a width its blocks do not divide, or a weight that is NaN, infinite or
            too large for the format.
    """
    if fmt.name not in _SEARCH or (importance is None and fmt.name in KEEP_EXTREMES):
        if fmt.name not in ("F32", "BF16"):
            _check_range(fmt, x)
        return quantize_ref(fmt, x)
    n = fmt.row_bytes(x.shape[1]) // fmt.dtype.itemsize
    _check_range(fmt, x)
    out = np.empty((len(x), n), fmt.dtype)
    step = max(1, CHUNK // x.shape[1])
    for first in range(0, len(x), step):
        part = np.ascontiguousarray(x[first : first + step], np.float32)
        w = np.ones((1, 1), np.float32) if importance is None else _weights(importance, len(part), fmt.block)
        out[first : first + step] = _SEARCH[fmt.name](part.reshape(-1, fmt.block), w).reshape(len(part), n)
    return out


def writable() -> list[str]:
    """Names of the formats that `quantize` writes."""
    return [name for name, fmt in FORMATS.items() if name in _SEARCH or fmt.quantize]


def _check_range(fmt: Format, x: NDArray[Any]) -> None:
    largest = np.abs(x).max(initial=0)
    if not largest <= LARGEST:  # NaN too
        raise ValueError(f"{fmt.name}: a weight of magnitude {largest}: finite numbers up to {LARGEST:,.0f} expected")


def _weights(importance: F32Array, rows: int, block: int) -> F32Array:
    """Importance of the columns, for blocks: (rows * cols / block, block). Zeros (a dead input) count a little.

    Scaled to a mean of 1: activations' squares may be too small or too large for products in float32.
    """
    mean = importance.mean(dtype=np.float64)
    w = np.maximum(importance / mean if mean > 0 else np.ones_like(importance), 1e-6).astype(np.float32)
    return np.broadcast_to(w, (rows, len(w))).reshape(-1, block)


def _groups(values: F32Array, k: int) -> F32Array:
    """(n, block) -> (k, n * block / k), contiguous; what is (1, 1) stays so."""
    return values if values.shape == (1, 1) else np.ascontiguousarray(values.reshape(-1, k).T)


def _ratio(a: F32Array, b: F32Array) -> F32Array:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)


# ---- symmetric: x ~ s q ----------------------------------------------------------------------------------------------


def _levels(x: F32Array, inverse: F32Array, low: int, high: int) -> F32Array:
    q = x * inverse
    np.rint(q, out=q)
    return np.clip(q, low, high, out=q)


def _symmetric_scales(x: F32Array, w: F32Array, low: int, high: int) -> F32Array:
    """Best scale (n,) of groups (k, n) for levels low..high; it may be negative, so that the extreme takes `low`."""
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]
    wx = w * x

    def fit(inverse: F32Array) -> tuple[F32Array, F32Array]:
        q = _levels(x, inverse, low, high)
        lx = (wx * q).sum(axis=0)
        q *= q
        q *= w
        ll = q.sum(axis=0)
        return _ratio(lx, ll), lx

    scale = gain = np.zeros_like(extreme)

    def take(inverse: F32Array) -> None:
        nonlocal scale, gain
        new, lx = fit(inverse)
        better = new * lx > gain
        scale, gain = np.where(better, new, scale), np.where(better, new * lx, gain)

    inverse = _ratio(np.full_like(extreme, low), extreme)
    for shrink in SHRINK:
        take(inverse / shrink)
    for _ in range(REFITS):
        take(_ratio(np.ones_like(scale), scale))
    return scale


def _symmetric(name: str, low: int, high: int) -> Callable[[F32Array, F32Array], Blocks]:
    """Q8_0, Q4_0, Q5_0: one f16 scale per block."""
    fmt = FORMATS[name]

    def search(x: F32Array, w: F32Array) -> Blocks:
        out = np.empty(len(x), fmt.dtype)
        groups = _groups(x, fmt.block)
        out["d"] = _symmetric_scales(groups, _groups(w, fmt.block), low, high)
        d = out["d"].astype(np.float32)
        q = _levels(groups, _ratio(np.ones_like(d), d), low, high).T
        put_levels(out, q.astype(np.int8) if name == "Q8_0" else (q - low).astype(np.uint8))
        return out

    return search


def _search_q6_k(x: F32Array, w: F32Array) -> Blocks:
    """Sixteen scales of 16 weights, each d times an int8; the extreme one takes -128."""
    n = len(x)
    out = np.empty(n, FORMATS["Q6_K"].dtype)
    groups = _groups(x, 16)
    scales = _symmetric_scales(groups, _groups(w, 16), -32, 31).reshape(n, 16)
    extreme = np.take_along_axis(scales, np.abs(scales).argmax(axis=1)[:, None], axis=1)[:, 0]
    out["d"] = extreme / np.float32(-128)
    d = out["d"].astype(np.float32)[:, None]
    out["scales"] = np.clip(np.rint(_ratio(scales, np.broadcast_to(d, scales.shape))), -128, 127)
    stored = (d * out["scales"].astype(np.float32)).reshape(-1)
    q = _levels(groups, _ratio(np.ones_like(stored), stored), -32, 31).T.reshape(n, 256)
    put_levels(out, (q + 32).astype(np.uint8))
    return out


# ---- affine: x ~ s q + m ---------------------------------------------------------------------------------------------


def _affine_fit(x: F32Array, w: F32Array, top: int, most: float) -> tuple[F32Array, F32Array]:
    """Best scale and minimum (n,), (n,) of groups (k, n) for levels 0..top; minima are at most `most`."""
    low, high = np.minimum(x.min(axis=0), np.float32(most)), x.max(axis=0)
    wx = w * x
    sum_w, sum_x = np.broadcast_to(w, x.shape).sum(axis=0), wx.sum(axis=0)

    def fit(scale: F32Array, minimum: F32Array) -> tuple[F32Array, F32Array, F32Array]:
        """(scale, minimum, gain) of the levels that these give; E = sum w x^2 - gain."""
        q = _levels(x - minimum, _ratio(np.ones_like(scale), scale), 0, top)
        lx = (wx * q).sum(axis=0)
        wq = w * q
        sum_q = wq.sum(axis=0)
        wq *= q
        ll = wq.sum(axis=0)
        s = _ratio(sum_w * lx - sum_q * sum_x, sum_w * ll - sum_q * sum_q)
        m = _ratio(sum_x - s * sum_q, sum_w)
        held = m > most
        s, m = np.where(held, _ratio(lx - np.float32(most) * sum_q, ll), s), np.where(held, np.float32(most), m)
        residual = s * (s * ll - 2 * lx) + m * (m * sum_w + 2 * s * sum_q - 2 * sum_x)
        return s, m, -residual

    scale, minimum, gain = (high - low) / np.float32(top), low, np.full_like(low, -np.inf)
    whole = scale

    def take(s: F32Array, m: F32Array) -> None:
        nonlocal scale, minimum, gain
        s, m, new = fit(s, m)
        better = new > gain
        scale, minimum = np.where(better, s, scale), np.where(better, m, minimum)
        gain = np.where(better, new, gain)

    for shrink in SHRINK:
        take(whole * shrink, low)
    for _ in range(REFITS):
        take(scale, minimum)
    return scale, minimum


def _affine(name: str, top: int) -> Callable[[F32Array, F32Array], Blocks]:
    """Q4_1, Q5_1: an f16 scale and an f16 minimum per block."""
    fmt = FORMATS[name]

    def search(x: F32Array, w: F32Array) -> Blocks:
        out = np.empty(len(x), fmt.dtype)
        groups = _groups(x, fmt.block)
        out["d"], out["m"] = _affine_fit(groups, _groups(w, fmt.block), top, LARGEST)
        d, m = out["d"].astype(np.float32), out["m"].astype(np.float32)
        put_levels(out, _levels(groups - m, _ratio(np.ones_like(d), d), 0, top).T.astype(np.uint8))
        return out

    return search


def _k_with_minima(name: str, top: int) -> Callable[[F32Array, F32Array], Blocks]:
    """Q4_K, Q5_K: eight scales and minima of 32 weights, each 6 bits times an f16 of the 256."""
    fmt = FORMATS[name]

    def search(x: F32Array, w: F32Array) -> Blocks:
        n = len(x)
        out = np.empty(n, fmt.dtype)
        groups, w = _groups(x, 32), _groups(w, 32)
        sum_w = np.broadcast_to(w, groups.shape).sum(axis=0)
        scale, minimum = _affine_fit(groups, w, top, 0.0)
        out["d"] = scale.reshape(n, 8).max(axis=1) / np.float32(63)
        out["dmin"] = -minimum.reshape(n, 8).min(axis=1) / np.float32(63)
        d, dmin = (np.repeat(out[field].astype(np.float32), 8) for field in ("d", "dmin"))
        nearest = np.rint(_ratio(scale, d))
        best = [nearest, np.zeros_like(nearest), np.zeros_like(groups)]  # scale, minimum, levels
        least = np.full_like(scale, np.inf)
        # a scale rounded to 6 bits wants another minimum, and with that its neighbour may be the better one
        for offset in (-1, 0, 1):
            s = np.clip(nearest + offset, 0, 63)
            step = d * s
            inverse = _ratio(np.ones_like(step), step)
            q = _levels(groups - minimum, inverse, 0, top)
            m = np.clip(np.rint(_ratio(((step * q - groups) * w).sum(axis=0), dmin * sum_w)), 0, 63)
            q = _levels(groups + dmin * m, inverse, 0, top)
            error = (w * np.square(step * q - dmin * m - groups)).sum(axis=0)
            better = error < least
            for kept, new in zip((*best, least), (s, m, q, error), strict=True):
                np.copyto(kept, new, where=better)
        s, m, q = best
        out["scales"] = pack_scales_and_mins(*(sub.reshape(n, 8).astype(np.uint8) for sub in (s, m)))
        put_levels(out, q.T.reshape(n, 256).astype(np.uint8))
        return out

    return search


_SEARCH: dict[str, Callable[[F32Array, F32Array], Blocks]] = {
    "Q8_0": _symmetric("Q8_0", -127, 127),
    "Q4_0": _symmetric("Q4_0", -8, 7),
    "Q5_0": _symmetric("Q5_0", -16, 15),
    "Q6_K": _search_q6_k,
    "Q4_1": _affine("Q4_1", 15),
    "Q5_1": _affine("Q5_1", 31),
    "Q4_K": _k_with_minima("Q4_K", 15),
    "Q5_K": _k_with_minima("Q5_K", 31),
}
