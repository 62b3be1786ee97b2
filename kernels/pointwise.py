"""Row-wise kernels: RMSNorm, SwiGLU, RoPE, and the preparation of activations for a matmul (layouts drawn in
matmul.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from .block import HEAD_DIM
from .jit import TIER, kernel
from .matmul import DSUM, HIGH32, LOW32, SUM8, SUM16, SUM128, D
from .simd import (
    AT_ONCE,
    F32,
    I16,
    I32,
    I64,
    LANES,
    V16I32,
    at,
    const,
    emit_exp,
    f32,
    get_f32,
    i32,
    i32x16,
    i64,
    load,
    put_f32,
    splat,
    sqrt,
    stack,
    store,
    vabs,
    vfirst,
    vfma,
    vhmax,
    vload,
    vmax,
    vmin,
    void,
    vrint,
    vsplat,
    vstore,
    vstore_half,
    vstore_i8,
    vsum,
    vsum_i8,
    vsum_i32,
    vto_i32,
    vwhere,
    word,
)

PAIRS = TIER.pairs
TINY = (
    1e-30  # blocks whose largest value is below this are zero: their scale would be denormal and its inverse infinite
)


@kernel
def rmsnorm(x, weight, n, eps, out):  # type: ignore[no-untyped-def]
    """out[n] = x / sqrt(mean(x^2) + eps) * weight   (arXiv 1910.07467)."""
    total = vsplat(f32(0.0))
    for i in range(0, n, 16):
        v = vload(x + 4 * i)
        total = vfma(v, v, total)
    scale = vsplat(f32(1.0) / sqrt(vsum(total) / f32(n) + eps))
    for i in range(0, n, 16):
        vstore(out + 4 * i, vload(x + 4 * i) * scale * vload(weight + 4 * i))


def _swiglu(vectors: int) -> Any:
    """Intrinsic swiglu(gate, up) of so many vectors at a time."""

    def emit(b: ir.IRBuilder, gate: ir.Value, up: ir.Value) -> None:
        kind = ir.VectorType(F32, LANES * vectors)
        g = load(b, gate, kind)
        silu = b.fdiv(g, b.fadd(const(kind, 1.0), emit_exp(b, b.fsub(const(kind, 0.0), g))))
        store(b, gate, b.fmul(silu, load(b, up, kind)))

    return word(void, [i64, i64], emit)


swiglu_one, swiglu_more = _swiglu(1), _swiglu(AT_ONCE)


@kernel
def swiglu(gate, up, n):  # type: ignore[no-untyped-def]
    """gate[n] = gate / (1 + exp(-gate)) * up   (arXiv 2002.05202)."""
    i = 0
    while i + LANES * AT_ONCE <= n:
        swiglu_more(gate + 4 * i, up + 4 * i)
        i += LANES * AT_ONCE
    while i < n:
        swiglu_one(gate + 4 * i, up + 4 * i)
        i += LANES


@kernel
def rope(x, table, scale, out):  # type: ignore[no-untyped-def]
    """Rotate one head, pairs (i, i + 32) (arXiv 2104.09864, half-split as in the safetensors checkpoints), times scale.

    table: f32 (2, 32), cosines then sines of the position's angles.
    """
    s = vsplat(scale)
    zero = vsplat(f32(0.0))
    for i in range(0, HEAD_DIM // 2, 16):
        low, high = vload(x + 4 * i), vload(x + 4 * (i + HEAD_DIM // 2))
        cos, sin = vload(table + 4 * i), vload(table + 4 * (i + HEAD_DIM // 2))
        vstore(out + 4 * i, vfma(low, cos, zero - high * sin) * s)
        vstore(out + 4 * (i + HEAD_DIM // 2), vfma(high, cos, low * sin) * s)


def _store_pairs(b: ir.IRBuilder, address: ir.Value, q: ir.Value) -> None:
    order = [4 * quad + k for quad in range(LANES // 4) for k in (0, 2, 1, 3)]
    q = b.trunc(q, ir.VectorType(I16, LANES))
    store(b, address, b.shuffle_vector(q, q, ir.Constant(ir.VectorType(I32, LANES), order)))


store_pairs = word(void, [i64, i32x16], _store_pairs)  # 16 integers as i16, even k of each four first


@kernel
def _put_integers(q, terms, record, half):  # type: ignore[no-untyped-def]
    """Write 16 integers q to the first or second half of a record, drawn in matmul.py; returns their sum then.

    Of two terms, a q2 of +-128, one in 256, becomes +-127: 128 is no i8.
    """
    if terms == 1:
        first = vto_i32(q)
        vstore_i8(record + 16 * half, first)
        return vsum_i8(first)
    q1 = vrint(q * vsplat(f32(1 / 256)))
    q2 = vmin(vmax(vfma(q1, vsplat(f32(-256.0)), q), vsplat(f32(-127.0))), vsplat(f32(127.0)))
    first, second = vto_i32(q1), vto_i32(q2)
    if PAIRS:
        store_pairs(record + 32 * half, vto_i32(vfma(q1, vsplat(f32(256.0)), q2)))
    else:
        vstore_i8(record + 16 * half, first)
        vstore_i8(record + 16 * half + 32, second)
    return vsum_i8(first) * 256 + vsum_i8(second)


# Which sum a field is made of, low + high, low or high, and by how many bits that is shifted, then negated
FIELDS = {DSUM: (0, 0), SUM8: (0, 3), SUM16: (0, 4), SUM128: (0, 7), LOW32: (1, 5), HIGH32: (2, 5)}
TOGETHER = 128  # blocks
scratch = stack(TOGETHER)


def _put_fields(b: ir.IRBuilder, address: ir.Value, d: ir.Value, low: ir.Value, high: ir.Value) -> None:
    """The fields of a record behind its integers, of which low and high are the sums of the halves, in one store."""
    ints, floats = ir.VectorType(I32, 8), ir.VectorType(F32, 8)
    low, high = splat(b, low, 8), splat(b, high, 8)
    sums = const(ints, 0)
    for part, value in enumerate((b.add(low, high), low, high)):
        mine = [FIELDS.get(4 * i, (None,))[0] == part for i in range(8)]
        sums = b.select(ir.Constant(ir.VectorType(ir.IntType(1), 8), mine), value, sums)
    shifts = ir.Constant(ints, [FIELDS.get(4 * i, (0, 0))[1] for i in range(8)])
    shifted = b.shl(b.sub(const(ints, 0), sums), shifts)
    scaled = b.fmul(b.sitofp(sums, floats), splat(b, d, 8))
    scaled = b.bitcast(b.insert_element(scaled, d, ir.Constant(I32, D // 4)), ints)
    order = [i if 4 * i in (D, DSUM) else i + 8 for i in range(8)]
    store(b, address, b.shuffle_vector(scaled, shifted, ir.Constant(ints, order)))


put_fields = word(void, [i64, f32, i32, i32], _put_fields)


@kernel
def quantise(x, n, terms, out, stride):  # type: ignore[no-untyped-def]
    """x[n] -> int8 records, `stride` bytes from block to block: x ~ d q with q in +-127, or +-32639 in two terms, and d
    from the largest of 32 values.

    The scales of TOGETHER blocks at a time, a lane each: as one chain a block it took twice as long.
    """
    levels = vsplat(f32(127.0) if terms == 1 else f32(127 * 256 + 127))
    scales = scratch()  # the largest values, then d
    inverses = scratch()
    for first in range(0, n // 32, TOGETHER):
        count = min(n // 32 - first, TOGETHER)
        for b in range(count):
            source = x + 128 * (first + b)
            put_f32(scales + 4 * b, vhmax(vmax(vabs(vload(source)), vabs(vload(source + 64)))))
        for b in range(0, count, LANES):
            top = vfirst(count - b, vload(scales + 4 * b), vsplat(f32(0.0)))
            vstore(scales + 4 * b, vwhere(top, vsplat(f32(TINY)), top / levels))
            vstore(inverses + 4 * b, vwhere(top, vsplat(f32(TINY)), levels / top))
        for b in range(count):
            source, at = x + 128 * (first + b), out + (first + b) * stride
            inverse = vsplat(get_f32(inverses + 4 * b))
            low = _put_integers(vrint(vload(source) * inverse), terms, at, 0)
            high = _put_integers(vrint(vload(source + 64) * inverse), terms, at, 1)
            put_fields(at + 32 * terms, get_f32(scales + 4 * b), low, high)


@kernel
def interleave(x, n, out, stride):  # type: ignore[no-untyped-def]
    """x[n] -> f32 activations, `stride` bytes from k to k."""
    for k in range(n):
        put_f32(out + k * stride, get_f32(x + 4 * k))


@kernel
def half(x, n, out):  # type: ignore[no-untyped-def]
    """x[n] -> f16, as the KV cache rounds; exported so that every rounding can be tried."""
    for i in range(0, n, 16):
        vstore_half(out + 2 * i, vload(x + 4 * i))


READ = i64(i64, i64, i64)  # address, bytes, passes


def make_read(streams: int) -> Callable[..., int]:
    """read(address, bytes, passes): a sum over memory read in `streams` parallel streams, to measure what a core can
    read.

    bytes: a multiple of 512 * streams. The sum is returned so that no load is dropped.
    """

    def emit(b: Any, address: Any, part: Any) -> Any:
        """One pass over `streams` parts of `part` bytes each."""
        sums = [cgutils.alloca_once(b, V16I32) for _ in range(streams)]
        for s in sums:
            b.store(const(V16I32, 0), s)
        with cgutils.for_range(b, b.sdiv(part, ir.Constant(I64, 256)), intp=I64) as loop:
            for i, s in enumerate(sums):
                first = b.add(
                    address, b.add(b.mul(part, ir.Constant(I64, i)), b.mul(loop.index, ir.Constant(I64, 256)))
                )
                for offset in range(0, 256, 64):
                    b.store(b.add(b.load(s), load(b, at(b, first, offset), V16I32)), s)
        total = b.load(sums[0])
        for s in sums[1:]:
            total = b.add(total, b.load(s))
        return total

    one_pass = word(i32x16, [i64, i64], emit)

    def read(address, size, passes):  # type: ignore[no-untyped-def]
        total = i64(0)
        for _ in range(passes):
            total += vsum_i32(one_pass(address, size // streams))
        return total

    return read
