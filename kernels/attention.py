"""Causal grouped-query attention over pages of the KV cache, with an online softmax over fixed spans of positions.

A page holds 64 positions of every layer and KV head:

    K  [4 groups of positions][64 dims][16 positions]   lanes are positions: scores need no horizontal sum
    V  [64 positions][64 dims]                          lanes are dims

Each is stored as f32, f16, bf16, or in blocks of 32 dims of a position as q8_0 (d = max|x| / 127) or q4_0 (d = x / -8
for the x of largest magnitude), d rounded to f16 first. Their page is

    K  4 row groups of the panel Q8_0 or Q4_0 (panels.py), a position a row: scores are its matmul, q in two int8 terms.
       Both are turned by a Hadamard matrix first, which changes no score and spreads what is large over all dims
       (arXiv 2404.00456)
    V  [32 pairs of positions][64 dims][2 positions] i8; for q4_0 [32 pairs][2 blocks][16 dims][2 positions] nibbles of
       q + 8, dim i low and dim i + 16 high; then [2 blocks][64 positions] f16 d, which multiply the softmax's weights

A row is one query head of one token. Rows that share a KV head and a page table are computed together and share its
loads. Scores of a span of 512 positions give a partial (m, l, o): maximum, sum of exp, weighted sum of V. Partials
merge in order of position, whoever computed them, so splitting a context over threads, chunking a prompt or batching
rows does not change bits (arXiv 1805.02867, 2205.14135).
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .block import HEAD_DIM, KV_BYTES, PAGE, PART, QUERIES_SCRATCH, ROW_TILE, SPAN, SPAN_SCRATCH, B, S
from .dots import emit_pairs, pieces
from .jit import TIER, kernel
from .matmul import make_tile
from .panels import BLOCK, PANELS
from .pointwise import TINY, quantise, rope
from .simd import (
    AT_ONCE,
    F32,
    I8,
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
    emit_f32_to_half,
    emit_fma,
    emit_half_to_f32,
    emit_load_as_f32,
    emit_prefetch,
    emit_store_from_f32,
    f32,
    f32x16,
    get_f32,
    get_i64,
    load,
    put_f32,
    splat,
    store,
    vabs,
    vexp,
    vfirst,
    vfma,
    vhmax,
    vload,
    vload_half,
    vmax,
    vmin,
    void,
    vrint,
    vsplat,
    vstore,
    vstore_i8,
    vstore_i16,
    vsum,
    vto_i32,
    vwhere,
    word,
)
from .target import record_bytes, token_tile
from .team import claim, claim_left, done

i64 = types.int64
prefetch = word(void, [i64], emit_prefetch)
copy_i8 = word(void, [i64, i64], lambda b, source, target: store(b, target, load(b, source, I8)))
copy_i16 = word(void, [i64, i64], lambda b, source, target: store(b, target, load(b, source, I16)))
copy_i32 = word(void, [i64, i64], lambda b, source, target: store(b, target, load(b, source, I32)))
join_nibbles = word(  # four bytes below 16 into the low nibbles of the target, four into the high ones
    void,
    [i64, i64, i64],
    lambda b, low, high, target: store(
        b, target, b.or_(load(b, low, I32), b.shl(load(b, high, I32), ir.Constant(I32, 4)))
    ),
)
round_half = word(f32, [f32], lambda b, x: _first(b, emit_half_to_f32(b, emit_f32_to_half(b, splat(b, x)))))
put_half = word(void, [i64, f32], lambda b, p, x: store(b, p, _first(b, emit_f32_to_half(b, splat(b, x)))))

MINUS_INFINITY = float("-inf")
FLOATS = {"f32": 4, "f16": 2, "bf16": 2}  # kinds of elements that are floats, and their bytes
AHEAD = 3  # pages of K or V that are prefetched ahead: one is read in less time than memory takes to answer
WIDTH = 4 if TIER.row_lanes == 16 else 1  # vectors of positions (scores) or of dims (values) held per row
Q_RECORD = record_bytes(2)  # a block of a query in two int8 terms


def _first(b: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    return b.extract_element(vector, ir.Constant(I32, 0))


def _sum_of_products(
    b: ir.IRBuilder,
    rows: int,
    count: Any,
    left: Any,
    right: Any,
    width: int,
    out: Any,
    keep: bool,
    ahead: Any,
    fine: bool,
) -> None:
    """out[r][v] (+)= sum over i < count of left(r, i) * right(i, v), v < width vectors; i upwards, one fma each.

    left: addresses of f32; right: vectors; ahead(i): addresses to prefetch meanwhile; fine: of `emit_fma`.
    """
    acc = [[cgutils.alloca_once(b, V16F32) for _ in range(width)] for _ in range(rows)]
    for r, row in enumerate(acc):
        for v, a in enumerate(row):
            b.store(load(b, out(r, v), V16F32) if keep else const(V16F32, 0.0), a)
    with cgutils.for_range(b, count, intp=I64) as loop:
        for address in ahead(loop.index):
            emit_prefetch(b, address)
        vectors = [right(loop.index, v) for v in range(width)]
        for r in range(rows):
            factor = broadcast_f32(b, left(r, loop.index))
            for v in range(width):
                b.store(emit_fma(b, factor, vectors[v], b.load(acc[r][v]), fine), acc[r][v])
    for r, row in enumerate(acc):
        for v, a in enumerate(row):
            store(b, out(r, v), b.load(a))


def _emit_hadamard(b: ir.IRBuilder, x: ir.Value, out: ir.Value) -> None:
    parts = [load(b, at(b, x, 64 * i), V16F32) for i in range(HEAD_DIM // LANES)]
    for far in (2, 1):
        for i in (i for i in range(len(parts)) if not i & far):
            low, high = parts[i], parts[i + far]
            parts[i], parts[i + far] = b.fadd(low, high), b.fsub(low, high)
    for far in (8, 4, 2, 1):
        across = ir.Constant(ir.VectorType(I32, LANES), [i ^ far for i in range(LANES)])
        sign = ir.Constant(V16F32, [-1.0 if i & far else 1.0 for i in range(LANES)])
        parts = [emit_fma(b, part, sign, b.shuffle_vector(part, part, across)) for part in parts]
    for i, part in enumerate(parts):
        store(b, at(b, out, 64 * i), b.fmul(part, const(V16F32, 0.125)))


hadamard = word(void, [i64, i64], _emit_hadamard)  # 64 floats times H / 8, which is its own inverse; out may be x


def make_queries(kind: str) -> Any:
    """queries(q, rows, records, temporary): address of what `scores` of K of this kind reads: q, f32 (rows, 64) rotated
    and scaled, or int8 records of it.

    records: 256 bytes a row; temporary: 256 bytes.
    """
    quantised = kind not in FLOATS

    @kernel
    def queries(q, rows, records, temporary):  # type: ignore[no-untyped-def]
        if not quantised:
            return q
        for r in range(rows):
            hadamard(q + 4 * HEAD_DIM * r, temporary)
            quantise(temporary, HEAD_DIM, 2, records + Q_RECORD * r, Q_RECORD * rows)
        return records

    return queries


def make_scores(rows: int, kind: str) -> Any:
    """scores(q, k_page, groups, s, next): s[r][16 g + lane] = q[r] . K[g][:, lane] for g < groups.

    q: what `make_queries` gives; s: f32 rows, SPAN floats apart. All 4 groups of a page are computed at once where
    registers allow it: for few rows always, or their sums would wait for each other. next: address of what is read
    soon, as many bytes as the page's K. A page is a new stream for the hardware, which fetches ahead only within one:
    without this, decode at depth read the cache at a third of the memory's speed.
    """
    if kind not in FLOATS:
        return _make_panel_scores(rows, kind)
    size = FLOATS[kind]
    group_bytes = HEAD_DIM * LANES * size

    def emit_groups(b: ir.IRBuilder, q: Any, k: Any, group: Any, s: Any, following: Any, width: int) -> None:
        first = b.add(k, b.mul(group, ir.Constant(I64, group_bytes)))
        target = b.add(s, b.mul(group, ir.Constant(I64, 4 * LANES)))
        coming = b.add(following, b.mul(group, ir.Constant(I64, group_bytes)))

        def left(r: int, d: Any) -> Any:
            return b.add(at(b, q, 4 * HEAD_DIM * r), b.shl(d, ir.Constant(I64, 2)))

        def right(d: Any, v: int) -> Any:
            line = b.add(at(b, first, group_bytes * v), b.mul(d, ir.Constant(I64, LANES * size)))
            return emit_load_as_f32(b, line, kind.upper())

        def out(r: int, v: int) -> Any:
            return at(b, target, 4 * SPAN * r + 64 * v)

        def ahead(d: Any) -> list[Any]:
            step = LANES * size * width
            line = b.add(coming, b.mul(d, ir.Constant(I64, step)))
            return [at(b, line, 64 * i) for i in range(max(step // 64, 1))]

        _sum_of_products(b, rows, ir.Constant(I64, HEAD_DIM), left, right, width, out, False, ahead, kind != "f16")

    def emit(b: ir.IRBuilder, q: Any, k: Any, groups: Any, s: Any, following: Any) -> None:
        wide = ir.Constant(I64, WIDTH)
        steps = b.sdiv(groups if rows == ROW_TILE else b.add(groups, ir.Constant(I64, WIDTH - 1)), wide)
        with cgutils.for_range(b, steps, intp=I64) as loop:
            emit_groups(b, q, k, b.mul(loop.index, wide), s, following, WIDTH)
        if rows == ROW_TILE and WIDTH > 1:
            first = b.mul(steps, wide)
            with cgutils.for_range(b, b.sub(groups, first), intp=I64) as loop:
                emit_groups(b, q, k, b.add(first, loop.index), s, following, 1)

    return word(void, [i64] * 5, emit)


def _make_panel_scores(rows: int, kind: str) -> Any:
    """`make_scores` of a quantised K, whose groups of positions are row groups of a panel."""
    panel = PANELS[kind.upper()]
    blocks = HEAD_DIM // BLOCK
    group_bytes = blocks * panel.record_bytes
    step = max(n for n in range(1, rows + 1) if rows % n == 0 and n <= token_tile(TIER, 2))
    abreast = TIER.abreast if rows == ROW_TILE else 1
    tile = make_tile(panel, 2, {step: abreast})

    @kernel
    def scores(q, k, groups, s, following):  # type: ignore[no-untyped-def]
        for g in range(0, groups, abreast):
            for line in range(g * group_bytes, (g + abreast) * group_bytes, 64):
                prefetch(following + line)
            for r in range(0, rows, step):
                tile(step, k + g * group_bytes, blocks, q + r * Q_RECORD, rows, s + 4 * (SPAN * r + 16 * g), SPAN, 0)

    return scores


def make_values(rows: int, kind: str) -> Any:
    """values(p, v_page, count, o, next, scratch): o[r] += sum over positions i < count of p[r][i] * V[i].

    p: f32 rows, SPAN floats apart, 0 from `count` to the end of the page; o: f32 rows, PART floats apart; next: as for
    `scores`; scratch: what a span has for it.
    """
    if kind not in FLOATS:
        return _make_integer_values(rows, kind)
    size = FLOATS[kind]

    def emit(b: ir.IRBuilder, p: Any, page: Any, count: Any, o: Any, following: Any, scratch: Any) -> None:
        for dim in range(0, HEAD_DIM, LANES * WIDTH):

            def left(r: int, i: Any) -> Any:
                return b.add(at(b, p, 4 * SPAN * r), b.shl(i, ir.Constant(I64, 2)))

            def right(i: Any, v: int, dim: int = dim) -> Any:
                row = b.add(page, b.mul(i, ir.Constant(I64, HEAD_DIM * size)))
                return emit_load_as_f32(b, at(b, row, size * (dim + LANES * v)), kind.upper())

            def out(r: int, v: int, dim: int = dim) -> Any:
                return at(b, o, 4 * PART * r + 4 * (dim + LANES * v))

            def ahead(i: Any, dim: int = dim) -> list[Any]:
                line = b.add(following, b.mul(i, ir.Constant(I64, HEAD_DIM * size)))
                return [at(b, line, j) for j in range(0, HEAD_DIM * size, 64)] if dim == 0 else []

            _sum_of_products(b, rows, count, left, right, WIDTH, out, True, ahead, kind != "f16")

    return word(void, [i64] * 6, emit)


def _make_integer_values(rows: int, kind: str) -> Any:
    """`make_values` of a quantised V: weights times scales become i16 with one factor a page, block and row.

    Two positions meet in one product of pairs: a page's sum, below 64 * 32767 * 127, is exact in i32. All factors of a
    page are made together, a lane each, as in `quantise`. (One factor for all rows, as weights are at most 1, would
    take 10 % less time; but what a head says is in its small weights, beside a large one on the first token: KL 12 %
    higher.)
    """
    blocks, eights, sixteens = HEAD_DIM // BLOCK, ir.VectorType(I8, 2 * LANES), ir.VectorType(I16, 2 * LANES)
    pair_bytes = HEAD_DIM if kind == "q4_0" else 2 * HEAD_DIM

    def emit(b: ir.IRBuilder, p: Any, page: Any, pairs: Any, o: Any, following: Any, factors: Any) -> None:
        for first in range(0, HEAD_DIM // LANES, WIDTH):
            acc = [[cgutils.alloca_once(b, V16I32) for _ in range(WIDTH)] for _ in range(rows)]
            for a in (a for row in acc for a in row):
                b.store(const(V16I32, 0), a)
            with cgutils.for_range(b, pairs, intp=I64) as loop:
                step = b.mul(loop.index, ir.Constant(I64, pair_bytes))
                for line in range(0, pair_bytes if first == 0 else 0, 64):
                    emit_prefetch(b, at(b, b.add(following, step), line))
                row = b.add(page, step)
                for v in range(WIDTH):
                    block, part = divmod(first + v, 2)
                    if kind == "q4_0":
                        u = b.zext(load(b, at(b, row, 2 * LANES * block), eights), sixteens)
                        u = b.lshr(u, const(sixteens, 4)) if part else b.and_(u, const(sixteens, 15))
                        values = b.sub(u, const(sixteens, 8))
                    else:
                        values = b.sext(load(b, at(b, row, 2 * LANES * (first + v)), eights), sixteens)
                    for r in range(rows):
                        pair = b.add(at(b, p, 2 * PAGE * (rows * block + r)), b.shl(loop.index, ir.Constant(I64, 2)))
                        weights = b.bitcast(splat(b, load(b, pair, I32)), sixteens)
                        b.store(emit_pairs(b, b.load(acc[r][v]), values, weights), acc[r][v])
            for r in range(rows):
                for v in range(WIDTH):
                    target = at(b, o, 4 * (PART * r + LANES * (first + v)))
                    factor = broadcast_f32(b, at(b, factors, 4 * (rows * ((first + v) // 2) + r)))
                    total = b.sitofp(b.load(acc[r][v]), V16F32)
                    store(b, target, emit_fma(b, total, factor, load(b, target, V16F32), fine=False))

    sums = word(void, [i64] * 6, emit)

    @kernel
    def values(p, page, count, o, following, scratch):  # type: ignore[no-untyped-def]
        d = scratch + 2 * PAGE * rows * blocks  # f32 (blocks, PAGE), behind the i16 weights
        factors = d + 4 * PAGE * blocks  # f32 of each block and row, then their inverses
        inverses = factors + 4 * LANES
        scales = PAGE // 2 * pair_bytes
        for line in range(scales, scales + 2 * PAGE * blocks, 64):
            prefetch(following + line)
        for block in range(blocks):
            for i in range(0, PAGE, LANES):
                there = vfirst(count - i, vload_half(page + scales + 2 * (PAGE * block + i)), vsplat(f32(0.0)))
                vstore(d + 4 * (PAGE * block + i), there)
        vstore(factors, vsplat(f32(0.0)))
        for block in range(blocks):
            for r in range(rows):
                top = vsplat(f32(0.0))
                for i in range(0, PAGE, LANES):
                    top = vmax(top, vabs(vload(p + 4 * (SPAN * r + i)) * vload(d + 4 * (PAGE * block + i))))
                put_f32(factors + 4 * (rows * block + r), vhmax(top))
        top = vload(factors)
        vstore(factors, vwhere(top, vsplat(f32(TINY)), top / vsplat(f32(32767.0))))
        vstore(inverses, vwhere(top, vsplat(f32(TINY)), vsplat(f32(32767.0)) / top))
        for block in range(blocks):
            for r in range(rows):
                inverse = vsplat(get_f32(inverses + 4 * (rows * block + r)))
                for i in range(0, PAGE, LANES):
                    weights = vload(p + 4 * (SPAN * r + i)) * vload(d + 4 * (PAGE * block + i))
                    vstore_i16(scratch + 2 * (PAGE * (rows * block + r) + i), vto_i32(vrint(weights * inverse)))
        sums(scratch, page, (count + 1) // 2, o, following, factors)

    return values


@kernel
def largest(s, limit):  # type: ignore[no-untyped-def]
    """The largest of `limit` scores of one row, -inf of none."""
    whole = limit // LANES * LANES
    top = vsplat(f32(MINUS_INFINITY))
    for i in range(0, whole, LANES):
        top = vmax(top, vload(s + 4 * i))
    if whole < limit:
        top = vmax(top, vfirst(limit - whole, vload(s + 4 * whole), vsplat(f32(MINUS_INFINITY))))
    return vhmax(top)


def _weigh(b: ir.IRBuilder, s: ir.Value, m: ir.Value, total: ir.Value) -> ir.Value:
    """exp(s - m) of AT_ONCE vectors in place; total plus them, one after the other."""
    kind = ir.VectorType(F32, LANES * AT_ONCE)
    weights = emit_exp(b, b.fsub(load(b, s, kind), splat(b, m, LANES * AT_ONCE)))
    store(b, s, weights)
    return functools.reduce(b.fadd, pieces(b, weights, AT_ONCE), total)


weigh = word(f32x16, [i64, f32, f32x16], _weigh)


@kernel
def to_weights(s, m, limit, filled):  # type: ignore[no-untyped-def]
    """Scores of one row -> weights in place; returns their sum. m: the largest score; limit: positions this row may
    see, 0..SPAN; filled: positions computed for the tile; weights beyond the limit become 0."""
    whole = limit // LANES * LANES
    total = vsplat(f32(0.0))
    i = 0
    while i + LANES * AT_ONCE <= whole:
        total = weigh(s + 4 * i, m, total)
        i += LANES * AT_ONCE
    while i < whole:
        v = vexp(vload(s + 4 * i) - vsplat(m))
        vstore(s + 4 * i, v)
        total = total + v
        i += LANES
    if whole < limit:
        v = vfirst(limit - whole, vexp(vload(s + 4 * whole) - vsplat(m)), vsplat(f32(0.0)))
        vstore(s + 4 * whole, v)
        total = total + v
        i += LANES
    while i < filled:
        vstore(s + 4 * i, vsplat(f32(0.0)))
        i += LANES
    return vsum(total)


@kernel
def merge(into, part):  # type: ignore[no-untyped-def]
    """into = the softmax over both partials' positions; `into` covers the earlier ones."""
    m0, m1 = get_f32(into), get_f32(part)
    m = max(m0, m1)
    a = vexp(vsplat(m0 - m))
    c = vexp(vsplat(m1 - m))
    put_f32(into, m)
    put_f32(into + 4, vhmax(vfma(vsplat(get_f32(part + 4)), c, vsplat(get_f32(into + 4)) * a)))
    for d in range(0, HEAD_DIM, LANES):
        at_d = 4 * (16 + d)
        vstore(into + at_d, vfma(vload(part + at_d), c, vload(into + at_d) * a))


@kernel
def finish(part, out):  # type: ignore[no-untyped-def]
    """out[64] = o / l."""
    total = vsplat(get_f32(part + 4))
    for d in range(0, HEAD_DIM, LANES):
        vstore(out + 4 * d, vload(part + 4 * (16 + d)) / total)


@kernel
def part_of_span(pages, first, count, i, page_offset, value_offset, value_bytes):  # type: ignore[no-untyped-def]
    """Address of what a span reads as number i: its `count` pages of K, those of V, then the next head's K."""
    if i >= count:
        i -= count
        page_offset += value_offset
    if i >= count:
        i -= count
        page_offset += value_bytes
    return get_i64(pages + (first // PAGE + min(i, count - 1)) * 8) + page_offset


@kernel
def seen_by(row, group, start):  # type: ignore[no-untyped-def]
    """How many positions of a span row `row` may see; start: of the first token, from the span's beginning."""
    return max(min(start + row // group + 1, SPAN), 0)


def make_span(rows: int, key: str, value: str) -> Any:
    """span(q, first_row, group, start, first, pages, page_offset, value_offset, s, parts): partials of `rows` rows over
    one span.

    Row r is head (first_row + r) % group of the token at position start + (first_row + r) // group. q: what
    `make_queries` gives. first: first position of the span. pages: addresses of the sequence's pages; page_offset: this
    layer and head inside a page. s: scratch of SPAN_SCRATCH bytes: scores f32 (rows, SPAN), that of `values`. parts:
    f32 (rows, PART). Rows that see nothing of the span get l = 0 and are not to be merged.
    """
    scores, values = make_scores(rows, key), make_values(rows, value)
    value_bytes = PAGE * HEAD_DIM // BLOCK * KV_BYTES[value]

    @kernel
    def span(q, first_row, group, start, first, pages, page_offset, value_offset, s, parts):  # type: ignore[no-untyped-def]
        last = start + (first_row + rows - 1) // group + 1  # positions that the last row sees
        filled = min(last - first, SPAN)
        scaled = s + 4 * ROW_TILE * SPAN
        count = (filled + PAGE - 1) // PAGE
        for i in range(count):
            groups = (min(filled - i * PAGE, PAGE) + LANES - 1) // LANES
            page = part_of_span(pages, first, count, i, page_offset, value_offset, value_bytes)
            ahead = part_of_span(pages, first, count, i + AHEAD, page_offset, value_offset, value_bytes)
            scores(q, page, groups, s + 4 * PAGE * i, ahead)
        padded = count * PAGE
        for r in range(rows):
            put_f32(parts + 4 * PART * r, largest(s + 4 * SPAN * r, seen_by(first_row + r, group, start - first)))
        for r in range(rows):
            part, limit = parts + 4 * PART * r, seen_by(first_row + r, group, start - first)
            put_f32(part + 4, to_weights(s + 4 * SPAN * r, get_f32(part), limit, padded))
            for d in range(0, HEAD_DIM, LANES):
                vstore(part + 4 * (16 + d), vsplat(f32(0.0)))
        for i in range(count):
            page = part_of_span(pages, first, count, count + i, page_offset, value_offset, value_bytes)
            ahead = part_of_span(pages, first, count, count + i + AHEAD, page_offset, value_offset, value_bytes)
            values(s + 4 * PAGE * i, page, min(filled - i * PAGE, PAGE), parts + 4 * 16, ahead, scaled)

    return span


@kernel
def segment_of(block, t):  # type: ignore[no-untyped-def]
    """Address of the segment that token t of the pass belongs to."""
    segment = get_i64(block + B.segments)
    while t >= get_i64(segment + S.first) + get_i64(segment + S.count):
        segment += 8 * S.size
    return segment


@kernel
def keep_softmax(block, token, head, part):  # type: ignore[no-untyped-def]
    """m and l of a row, from which a backward pass makes its weights again."""
    if get_i64(block + B.softmax):
        out = get_i64(block + B.softmax) + 8 * (token * get_i64(block + B.n_heads) + head)
        put_f32(out, get_f32(part))
        put_f32(out + 4, get_f32(part + 4))


@kernel
def merge_spans(block, segment, out, total):  # type: ignore[no-untyped-def]
    """Attention of a segment's single token from the partials of its spans. total: scratch of PART floats."""
    heads = get_i64(block + B.n_heads)
    for h in range(heads):
        part = get_i64(segment + S.parts) + 4 * PART * h
        for i in range(0, PART, LANES):
            vstore(total + 4 * i, vload(part + 4 * i))
        for _ in range(SPAN, get_i64(segment + S.start) + 1, SPAN):
            part += 4 * PART * heads
            merge(total, part)
        finish(total, out + 4 * HEAD_DIM * h)
        keep_softmax(block, get_i64(segment + S.first), h, total)


@kernel
def half_scale(x, four_bits):  # type: ignore[no-untyped-def]
    """The scale of 32 floats in q8_0 or q4_0, as f16 holds it."""
    x0, x1, zero = vload(x), vload(x + 64), vsplat(f32(0.0))
    top, bottom = vhmax(vmax(x0, x1)), vhmax(vmax(zero - x0, zero - x1))
    if four_bits:
        return round_half((top if top >= bottom else -bottom) / f32(-8.0))
    return round_half(max(top, bottom) / f32(127.0))


@kernel
def half_inverse(d):  # type: ignore[no-untyped-def]
    """1 / d, or 0 for the scale of nothing."""
    return f32(0.0) if d == f32(0.0) else f32(1.0) / d


@kernel
def to_integers(x, inverse, four_bits):  # type: ignore[no-untyped-def]
    """16 floats as integers, still f32x16: -127..127, or 0..15 for -8..7."""
    n = vrint(vload(x) * vsplat(inverse))
    if four_bits:
        return vmin(vmax(n + vsplat(f32(8.0)), vsplat(f32(0.0))), vsplat(f32(15.0)))
    return vmin(vmax(n, vsplat(f32(-127.0))), vsplat(f32(127.0)))


def make_store_key(kind: str) -> Any:
    """store_key(x, page, inside, scratch): 64 floats into position `inside` of a K page.

    scratch: 256 bytes, may be x.
    """
    if kind in FLOATS:
        size = FLOATS[kind]
        put = _put_as(kind)
        copy = copy_i32 if size == 4 else copy_i16

        @kernel
        def store_float_key(x, page, inside, scratch):  # type: ignore[no-untyped-def]
            lane = page + (inside // LANES * HEAD_DIM * LANES + inside % LANES) * size
            for d in range(0, HEAD_DIM, LANES):
                put(scratch + size * d, vload(x + 4 * d))  # in place: writes stay behind reads
            for d in range(HEAD_DIM):
                copy(scratch + size * d, lane + LANES * size * d)

        return store_float_key

    panel = PANELS[kind.upper()]
    record_bytes, scale_bytes, four = panel.record_bytes, panel.scale_bytes, kind == "q4_0"

    @kernel
    def store_key(x, page, inside, scratch):  # type: ignore[no-untyped-def]
        hadamard(x, scratch)
        for block in range(HEAD_DIM // BLOCK):
            source = scratch + 4 * BLOCK * block
            record = page + (inside // LANES * (HEAD_DIM // BLOCK) + block) * record_bytes
            lane = record + scale_bytes + 4 * (inside % LANES)
            d = half_scale(source, four)
            inverse = half_inverse(d)
            for i in range(0, BLOCK, LANES):
                vstore_i8(scratch + BLOCK * block + i, vto_i32(to_integers(source + 4 * i, inverse, four)))
            quads = scratch + BLOCK * block
            if four:
                for j in range(4):
                    join_nibbles(quads + 4 * j, quads + 4 * j + 16, lane + 64 * j)
            else:
                for j in range(8):
                    copy_i32(quads + 4 * j, lane + 64 * j)
            put_half(record + 2 * (inside % LANES), d)

    return store_key


def _put_as(kind: str) -> Any:
    return word(void, [i64, f32x16], lambda b, p, x: emit_store_from_f32(b, p, x, kind.upper()))


def make_store_value(kind: str) -> Any:
    """store_value(x, page, inside, scratch): 64 floats into position `inside` of a V page. scratch: 32 bytes, not x."""
    if kind in FLOATS:
        size = FLOATS[kind]
        put = _put_as(kind)

        @kernel
        def store_float_value(x, page, inside, scratch):  # type: ignore[no-untyped-def]
            for d in range(0, HEAD_DIM, LANES):
                put(page + (inside * HEAD_DIM + d) * size, vload(x + 4 * d))

        return store_float_value

    four = kind == "q4_0"
    block_bytes = BLOCK // 2 if four else BLOCK

    @kernel
    def store_value(x, page, inside, scratch):  # type: ignore[no-untyped-def]
        for block in range(HEAD_DIM // BLOCK):
            source = x + 4 * BLOCK * block
            to = page + (inside // 2 * (HEAD_DIM // BLOCK) + block) * 2 * block_bytes + inside % 2
            d = half_scale(source, four)
            inverse = half_inverse(d)
            low, high = to_integers(source, inverse, four), to_integers(source + 4 * LANES, inverse, four)
            if four:
                vstore_i8(scratch, vto_i32(vfma(high, vsplat(f32(16.0)), low)))
            else:
                vstore_i8(scratch, vto_i32(low))
                vstore_i8(scratch + LANES, vto_i32(high))
            for i in range(block_bytes):
                copy_i8(scratch + i, to + 2 * i)
            put_half(page + PAGE * (HEAD_DIM // BLOCK) * block_bytes + 2 * (block * PAGE + inside), d)

    return store_value


@kernel
def rotate_queries(block, position, count, q, out):  # type: ignore[no-untyped-def]
    """`count` query heads of a token, f32 (count, 64) at q, rotated and scaled by 1 / sqrt(head_dim),
    which is exact; out may be q."""
    table = get_i64(block + B.rope) + position * HEAD_DIM * 4
    for h in range(count):
        rope(q + 4 * HEAD_DIM * h, table, f32(0.125), out + 4 * HEAD_DIM * h)


def make_store(key: str, value: str) -> Any:
    """store(block, segment, layer, head, position, row, scratch) for a KV cache of these kinds: key and value of one KV
    head of a token, whose row of qkv it is, into their page, the key rotated. scratch: 256 bytes."""
    store_key, store_value = make_store_key(key), make_store_value(value)

    @kernel
    def store_head(block, segment, layer, head, position, row, scratch):  # type: ignore[no-untyped-def]
        heads, kv_heads = get_i64(block + B.n_heads), get_i64(block + B.n_kv_heads)
        table = get_i64(block + B.rope) + position * HEAD_DIM * 4
        page = get_i64(get_i64(segment + S.pages) + position // PAGE * 8) + place_of(block, layer, head)
        inside = position % PAGE
        rope(row + 4 * HEAD_DIM * (heads + head), table, f32(1.0), scratch)
        store_key(scratch, page, inside, scratch)
        value = row + 4 * HEAD_DIM * (heads + kv_heads + head)
        store_value(value, page + get_i64(block + B.value_offset), inside, scratch)

    return store_head


def make_spans(key: str, value: str) -> Any:
    """span(rows, ...): `make_span` of 1, 3 or ROW_TILE rows, as many as `rows_of` says."""
    span_1, span_3, span_6 = (make_span(rows, key, value) for rows in (1, 3, ROW_TILE))

    @kernel
    def span(rows, q, first_row, group, start, first, pages, offset, value_offset, s, parts):  # type: ignore[no-untyped-def]
        if rows == ROW_TILE:
            span_6(q, first_row, group, start, first, pages, offset, value_offset, s, parts)
        elif rows == 3:
            span_3(q, first_row, group, start, first, pages, offset, value_offset, s, parts)
        else:
            span_1(q, first_row, group, start, first, pages, offset, value_offset, s, parts)

    return span


@kernel
def rows_of(left):  # type: ignore[no-untyped-def]
    """How many of `left` rows to compute together."""
    return ROW_TILE if left >= ROW_TILE else (3 if left >= 3 else 1)


@kernel
def place_of(block, layer, head):  # type: ignore[no-untyped-def]
    """Where a layer's KV head lies in a page."""
    return layer * get_i64(block + B.layer_bytes) + head * get_i64(block + B.head_bytes)


def make_attend_rows(queries: Any, span: Any) -> Any:
    """attend_rows of a pass of many tokens, from `make_queries` and `make_spans`."""

    @kernel
    def attend_rows(block, segment, layer, head, first_row, end_row, qkv, scratch):  # type: ignore[no-untyped-def]
        """All spans of a segment's rows first_row..end_row of a KV head, merged as they come; output over q.

        qkv: the segment's first token."""
        heads, kv_heads = get_i64(block + B.n_heads), get_i64(block + B.n_kv_heads)
        group, start = heads // kv_heads, get_i64(segment + S.start)
        pages, place = get_i64(segment + S.pages), place_of(block, layer, head)
        value_offset = get_i64(block + B.value_offset)
        q, s = scratch, scratch + QUERIES_SCRATCH
        total = s + SPAN_SCRATCH
        part = total + 4 * ROW_TILE * PART
        step = 4 * (heads + 2 * kv_heads) * HEAD_DIM
        before = step * (ROW_TILE // group)  # to the same head's rows that are claimed soon
        while first_row < end_row:
            rows = rows_of(end_row - first_row)
            token, h = first_row // group, head * group + first_row % group
            row = qkv + token * step
            for r in range(rows):
                for d in range(0, HEAD_DIM, LANES):
                    vstore(q + 4 * (r * HEAD_DIM + d), vload(row + 4 * (h * HEAD_DIM + d)))
                    prefetch(row + 4 * (h * HEAD_DIM + d) - before)
                h += 1
                if h == (head + 1) * group:
                    h, row = head * group, row + step
            operand = queries(q, rows, q + 4 * ROW_TILE * HEAD_DIM, s)
            for first in range(0, start + (first_row + rows - 1) // group + 1, SPAN):
                into = part if first else total
                span(rows, operand, first_row, group, start, first, pages, place, value_offset, s, into)
                if first:
                    for r in range(rows):
                        if get_f32(part + 4 * PART * r + 4) > f32(0.0):
                            merge(total + 4 * PART * r, part + 4 * PART * r)
            h, row = head * group + first_row % group, qkv + token * step
            token += get_i64(segment + S.first)
            for r in range(rows):
                finish(total + 4 * PART * r, row + 4 * h * HEAD_DIM)
                keep_softmax(block, token, h, total + 4 * PART * r)
                h += 1
                if h == (head + 1) * group:
                    token, h, row = token + 1, head * group, row + step
            first_row += rows

    return attend_rows


def make_attend_span(queries: Any, span: Any, store_head: Any) -> Any:
    """attend_span of a segment of one token, from `make_queries`, `make_spans` and `make_store`."""

    @kernel
    def attend_span(block, segment, layer, head, first, row, scratch, single):  # type: ignore[no-untyped-def]
        """One span of a single token's rows of a KV head, kept as partials for `merge_spans`. row: the token's of qkv;
        single: its queries are not rotated yet, its key and value not stored, and only the last span reads those.
        """
        heads, kv_heads = get_i64(block + B.n_heads), get_i64(block + B.n_kv_heads)
        group, start, s = heads // kv_heads, get_i64(segment + S.start), scratch + QUERIES_SCRATCH
        if single and first + SPAN > start:
            store_head(block, segment, layer, head, start, row, s)
        r = 0
        while r < group:
            rows, h = rows_of(group - r), head * group + r
            part = get_i64(segment + S.parts) + 4 * PART * (first // SPAN * heads + h)
            q = row + 4 * HEAD_DIM * h
            if single:  # not in place: other spans, of other threads, need them as they are
                rotate_queries(block, start, rows, q, scratch)
                q = scratch
            operand = queries(q, rows, scratch + 4 * ROW_TILE * HEAD_DIM, s)
            span(
                rows, operand, r, group, start, first, get_i64(segment + S.pages), place_of(block, layer, head),
                get_i64(block + B.value_offset), s, part,
            )  # fmt: skip
            r += rows

    return attend_span


@kernel
def parts_of(segment, group):  # type: ignore[no-untyped-def]
    """Items of attention that a KV head of a segment makes: spans of a single token, else tiles of rows."""
    count = get_i64(segment + S.count)
    if count == 1:
        return get_i64(segment + S.start) // SPAN + 1
    return (count * group + ROW_TILE - 1) // ROW_TILE


@kernel
def items_of(block):  # type: ignore[no-untyped-def]
    """Items of attention of a whole pass."""
    kv_heads, parts = get_i64(block + B.n_kv_heads), 0
    for i in range(get_i64(block + B.n_segments)):
        parts += parts_of(get_i64(block + B.segments) + 8 * S.size * i, get_i64(block + B.n_heads) // kv_heads)
    return kv_heads * parts


def make_attention(key: str, value: str) -> tuple[Any, Any]:
    """(store_kv, attention) of a pass, for a KV cache of these kinds (block.KV_BYTES)."""
    queries, span, store_head = make_queries(key), make_spans(key, value), make_store(key, value)
    attend_rows, attend_span = make_attend_rows(queries, span), make_attend_span(queries, span, store_head)

    @kernel
    def store_kv(block, layer, t, head, qkv, scratch):  # type: ignore[no-untyped-def]
        """Rotate the queries of one KV head's group and its key; write key and value into their page."""
        heads, kv_heads, segment = get_i64(block + B.n_heads), get_i64(block + B.n_kv_heads), segment_of(block, t)
        group = heads // kv_heads
        position = get_i64(segment + S.start) + t - get_i64(segment + S.first)
        row = qkv + 4 * t * (heads + 2 * kv_heads) * HEAD_DIM
        q = row + 4 * HEAD_DIM * head * group
        rotate_queries(block, position, group, q, q)
        store_head(block, segment, layer, head, position, row, scratch)

    @kernel
    def attention(block, layer, counter, qkv, scratch, single):  # type: ignore[no-untyped-def]
        """All segments, their items claimed through one counter, one after the other. Returns how many there are.

        single: all are of one token, for which nobody has called `store_kv`.
        """
        heads, kv_heads = get_i64(block + B.n_heads), get_i64(block + B.n_kv_heads)
        group, all_items, finished, before = heads // kv_heads, items_of(block), 0, 0
        step = max(kv_heads // (4 * get_i64(block + B.threads)), 1)  # heads are little work in a short context
        segment, i = get_i64(block + B.segments), claim(counter, step)
        end = i + step
        while i < all_items:
            count = get_i64(segment + S.count)
            items = kv_heads * parts_of(segment, group)
            first = qkv + 4 * get_i64(segment + S.first) * (heads + 2 * kv_heads) * HEAD_DIM
            while i - before < items:
                head, part = (i - before) % kv_heads, (i - before) // kv_heads
                if count == 1:
                    attend_span(block, segment, layer, head, part * SPAN, first, scratch, single)
                else:
                    # the longest rows first, so that the last claim is a short one
                    row = (parts_of(segment, group) - 1 - part) * ROW_TILE
                    attend_rows(block, segment, layer, head, row, min(count * group, row + ROW_TILE), first, scratch)
                finished += 1
                i += 1
                if i == end:
                    i = claim_left(counter, all_items, step)
                    end = i + step
            before += items
            segment += 8 * S.size
        if finished:
            done(counter, finished)
        return all_items

    return store_kv, attention
