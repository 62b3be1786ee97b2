"""Row-wise kernels: RMSNorm, SwiGLU, RoPE, and the preparation of activations for a matmul (layouts drawn in
matmul.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from .block import HEAD_DIM
from .dots import V16I8, emit_dot, emit_half_sums, emit_nearest, join, pieces, shuffle
from .jit import TIER, kernel
from .matmul import CROSSED, DSUM, HIGH32, LOW32, SUM8, SUM16, SUM128, D
from .panels import BLOCK
from .simd import (
    AT_ONCE,
    F32,
    I16,
    I32,
    I64,
    LANES,
    V16F32,
    V16I32,
    at,
    broadcast_f32,
    const,
    emit_exp,
    emit_fma,
    emit_larger,
    emit_rint,
    emit_smaller,
    f32,
    get_f32,
    i32x16,
    i64,
    load,
    put_f32,
    splat,
    sqrt,
    stack,
    store,
    vfma,
    vload,
    void,
    vsplat,
    vstore,
    vstore_half,
    vsum,
    vsum_i32,
    word,
)
from .target import HIGHEST, LOWEST


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


# ---- int8 records of activations (drawn in matmul.py) ----------------------------------------------------------------

# Which sum a field is made of, low + high, low or high, and by how many bits that is shifted, then negated
FIELDS = {DSUM: (0, 0), SUM8: (0, 3), SUM16: (0, 4), SUM128: (0, 7), LOW32: (1, 5), HIGH32: (2, 5), CROSSED: (0, 3)}
TWO_TERMS = 127 * 256 + 127
TINY = (
    1e-30  # blocks whose largest value is below this are zero: their scale would be denormal and its inverse infinite
)
TOGETHER = 124  # blocks whose scales are made before their records
scratch = stack(TOGETHER + 4)


def _in_each(order: list[int], v: ir.Value) -> list[int]:
    """For `shuffle` of v and a vector like it: one order for each 8 lanes, where 8.. are those of the other vector."""
    return [first + i % 8 + i // 8 * v.type.count for first in range(0, v.type.count, 8) for i in order]


def _fields(b: ir.IRBuilder, d: list[ir.Value], halves: ir.Value, crossed: ir.Value | None) -> ir.Value:
    """What stands in records behind their integers, 8 lanes each.

    halves: sums of the halves of the integers, in lanes 0 and 4; crossed: see `_crossed`.
    """
    kind, parts = halves.type, [FIELDS.get(4 * i, (0, 0)) for i in range(8)]
    both = b.add(halves, shuffle(b, halves, halves, _in_each([4] * 4 + [0] * 4, halves)))
    sums = shuffle(b, halves, both, _in_each([(8, 0, 4)[part] for part, _ in parts], halves))
    fields = b.shl(b.sub(const(kind, 0), sums), ir.Constant(kind, [shift for _, shift in parts] * len(d)))
    if crossed is not None:
        last = ir.Constant(ir.VectorType(ir.IntType(1), kind.count), [4 * i == CROSSED for i in range(8)] * len(d))
        fields = b.select(last, b.sub(fields, crossed), fields)
    scale = join(b, [splat(b, x, 8) for x in d])
    scaled = b.fmul(b.sitofp(sums, scale.type), scale)
    floats = shuffle(b, scale, scaled, _in_each([i if 4 * i == D else i + 8 for i in range(8)], scale))
    order = [i if 4 * i in (D, DSUM) else i + 8 for i in range(8)]
    return shuffle(b, b.bitcast(floats, kind), fields, _in_each(order, fields))


def _crossed(b: ir.IRBuilder, q: ir.Value) -> ir.Value:
    """The sum over the crossed quads of blocks, 32 x i8 each, of what they add by themselves (unpack.py): in lane 7 of
    8 each."""
    bytes_, blocks = q.type.count, q.type.count // 32
    swapped = shuffle(b, q, q, [i ^ 16 for i in range(bytes_)])
    mine = [-1 if i >= 16 and i % 16 < 4 * TIER.crossed else 0 for i in range(32)]
    start = [0] * 4 + [-LOWEST * 4 * TIER.crossed] + [0] * 3
    u = b.and_(b.sub(q, const(q.type, LOWEST)), ir.Constant(q.type, mine * blocks))
    total = ir.Constant(ir.VectorType(I32, bytes_ // 4), start * blocks)
    total = emit_dot(b, total, u, b.sub(swapped, const(q.type, 1)))
    for far in (2, 1):
        total = b.add(total, shuffle(b, total, total, [i ^ far for i in range(bytes_ // 4)]))
    return total


def _put(terms: int, blocks: int) -> Any:
    """Intrinsic put(source, inverses, d, record, stride): blocks of 32 floats, times their inverses and rounded, as
    records.

    A second term of +-128, one in 256, becomes +-127: 128 is no i8.
    """

    def rounded(b: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
        return join(b, [b.trunc(emit_nearest(b, part), V16I8) for part in parts])

    def integers(b: ir.IRBuilder, x: list[ir.Value]) -> tuple[list[ir.Value], ir.Value, ir.Value | None]:
        """Bytes of each term; sums of halves; what is crossed."""
        if terms == 1:
            q = rounded(b, x)
            return [q], emit_half_sums(b, q), _crossed(b, q) if TIER.crossed else None
        whole = [emit_rint(b, v) for v in x]
        upper = [emit_rint(b, b.fmul(n, const(V16F32, 1 / 256))) for n in whole]
        lower = [emit_fma(b, q1, const(V16F32, -256.0), n) for q1, n in zip(upper, whole, strict=True)]
        lower = [emit_smaller(b, emit_larger(b, v, const(V16F32, -127.0)), const(V16F32, 127.0)) for v in lower]
        q1, q2 = rounded(b, upper), rounded(b, lower)
        first, second = emit_half_sums(b, q1), emit_half_sums(b, q2)
        sums = b.add(b.shl(first, const(first.type, 8)), second)
        if not TIER.pairs:
            return [q1, q2], sums, None
        wide, second = (b.sext(q, ir.VectorType(I16, q.type.count)) for q in (q1, q2))
        both = b.add(b.shl(wide, const(wide.type, 8)), second)
        return [shuffle(b, both, both, [i & ~3 | (0, 2, 1, 3)[i & 3] for i in range(both.type.count)])], sums, None

    def emit(
        b: ir.IRBuilder, source: ir.Value, inverses: ir.Value, d: ir.Value, record: ir.Value, stride: ir.Value
    ) -> None:
        x = []
        for i in range(blocks):
            inverse = broadcast_f32(b, at(b, inverses, 4 * i))
            x += [b.fmul(load(b, at(b, source, 128 * i + 64 * j), V16F32), inverse) for j in range(2)]
        q, sums, crossed = integers(b, x)
        fields = _fields(b, [load(b, at(b, d, 4 * i), F32) for i in range(blocks)], sums, crossed)
        offsets = [*range(0, BLOCK * len(q), BLOCK), BLOCK * terms]
        for offset, value in zip(offsets, [*q, fields], strict=True):
            for place, part in zip((record, b.add(record, stride)), pieces(b, value, blocks), strict=False):
                store(b, at(b, place, offset), part)

    return word(void, [i64] * 5, emit)


def _scales(terms: int) -> Any:
    """Intrinsic scales(source, step, d, inverses): d and its inverse of four blocks of 32 floats `step` bytes apart."""

    def fold(b: ir.IRBuilder, x: ir.Value, y: ir.Value, lanes: list[int], far: int) -> ir.Value:
        """The larger of some lanes of both vectors and of those so far behind them."""
        return emit_larger(b, shuffle(b, x, y, lanes), shuffle(b, x, y, [i + far for i in lanes]))

    def extremes(b: ir.IRBuilder, source: ir.Value, step: ir.Value) -> list[ir.Value]:
        """The largest x of each block, and the largest -x."""
        eights, fours = ([i for i in range(2 * LANES) if not i & far] for far in (8, 4))
        twos = [4 * i + j for i in range(4) for j in (0, 1, LANES, LANES + 1)]
        found = []  # of each block 8 lanes of x and 8 of -x
        for i in range(4):
            place = b.add(source, b.mul(step, ir.Constant(I64, i)))
            x, y = (load(b, at(b, place, 64 * j), V16F32) for j in range(2))
            bottom = b.fsub(const(V16F32, 0.0), emit_smaller(b, x, y))
            found.append(fold(b, emit_larger(b, x, y), bottom, eights, 8))
        last = fold(b, fold(b, *found[:2], fours, 4), fold(b, *found[2:], fours, 4), twos, 2)
        last = emit_larger(b, last, shuffle(b, last, last, [i ^ 1 for i in range(LANES)]))
        return [shuffle(b, last, last, [first + i for i in (0, 8, 2, 10)]) for first in (0, 4)]

    def emit(b: ir.IRBuilder, source: ir.Value, step: ir.Value, d_out: ir.Value, inverses: ir.Value) -> None:
        top, bottom = extremes(b, source, step)
        kind, most = top.type, emit_larger(b, top, bottom)
        live, zero = b.fcmp_ordered(">", most, const(kind, TINY)), const(kind, 0.0)
        if terms == 1:
            least = b.fmul(emit_smaller(b, top, bottom), const(kind, 1 / HIGHEST))
            d = emit_larger(b, b.fmul(most, const(kind, -1 / LOWEST)), least)
            d = b.select(b.fcmp_ordered(">", top, bottom), b.fsub(zero, d), d)
            inverse = b.fdiv(const(kind, 1.0), d)
        else:
            d, inverse = b.fdiv(most, const(kind, TWO_TERMS)), b.fdiv(const(kind, TWO_TERMS), most)
        store(b, d_out, b.select(live, d, zero))
        store(b, inverses, b.select(live, inverse, zero))

    return word(void, [i64] * 4, emit)


def _make_quantise(terms: int) -> Any:
    """`quantise` of so many terms."""
    scales, put, put_two = _scales(terms), _put(terms, 1), _put(terms, 2)

    @kernel
    def quantise_as(x, n, out, stride):  # type: ignore[no-untyped-def]
        d, inverses = scratch(), scratch()
        for first in range(0, n // 32, TOGETHER):
            count = min(n // 32 - first, TOGETHER)
            source, records = x + 128 * first, out + first * stride
            if count >= 4:
                for b in range(0, count, 4):
                    four = min(b, count - 4)  # the last four may have been seen in part
                    scales(source + 128 * four, 128, d + 4 * four, inverses + 4 * four)
            else:
                for b in range(count):  # four times the same
                    scales(source + 128 * b, 0, d + 4 * b, inverses + 4 * b)
            for b in range(0, count - 1, 2):
                put_two(source + 128 * b, inverses + 4 * b, d + 4 * b, records + b * stride, stride)
            if count % 2:
                b = count - 1
                put(source + 128 * b, inverses + 4 * b, d + 4 * b, records + b * stride, stride)

    return quantise_as


quantise_1, quantise_2 = _make_quantise(1), _make_quantise(2)


@kernel
def quantise(x, n, terms, out, stride):  # type: ignore[no-untyped-def]
    """x[n] -> int8 records, `stride` bytes from block to block: x ~ d q, d from the largest of 32 values.

    Two terms: q in +-TWO_TERMS. One: q in LOWEST..HIGHEST, and d has the sign that brings the largest x to the lower
    end, so that the shorter upper one costs nothing unless an x of the other sign is almost as large.
    """
    if terms == 1:
        quantise_1(x, n, out, stride)
    else:
        quantise_2(x, n, out, stride)


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
