"""Causal grouped-query attention over pages of the KV cache, with an online softmax over fixed spans of positions.

A page holds 64 positions of every layer and KV head:

    K  [4 groups of positions][64 dims][16 positions]   lanes are positions: scores need no horizontal sum
    V  [64 positions][64 dims]                          lanes are dims

A row is one query head of one token. Rows that share a KV head and a page table are computed together and share its
loads. Scores of a span of 512 positions give a partial (m, l, o): maximum, sum of exp, weighted sum of V. Partials
merge in order of position, whoever computed them, so splitting a context over threads, chunking a prompt or batching
rows does not change bits (arXiv 1805.02867, 2205.14135).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .block import HEAD_DIM, PAGE, PART, ROW_TILE, SPAN, B, S
from .jit import TIER, kernel
from .pointwise import rope
from .simd import (
    I16,
    I64,
    LANES,
    V16F32,
    at,
    broadcast_f32,
    const,
    emit_fma,
    emit_load_as_f32,
    emit_prefetch,
    f32,
    get_f32,
    get_i64,
    load,
    put_f32,
    store,
    vexp,
    vfirst,
    vfma,
    vhmax,
    vload,
    vmax,
    void,
    vsplat,
    vstore,
    vstore_half,
    vsum,
    word,
)
from .team import claim

i64 = types.int64
copy_i16 = word(void, [i64, i64], lambda b, source, target: store(b, target, load(b, source, I16)))

MINUS_INFINITY = float("-inf")
FEW_ROWS = 3  # up to so many rows memory is the limit; more rows find the page in cache
WIDTH = 4 if TIER.row_lanes == 16 else 1  # vectors of positions (scores) or of dims (values) held per row


def _sum_of_products(
    b: ir.IRBuilder,
    rows: int,
    count: Any,
    left: Any,
    right: Any,
    element: str,
    width: int,
    out: Any,
    keep: bool,
    ahead: Any,
) -> None:
    """out[r][v] (+)= sum over i < count of left(r, i) * right(i, v), v < width vectors; i upwards, one fma each.

    ahead(i): addresses to prefetch meanwhile.
    """
    acc = [[cgutils.alloca_once(b, V16F32) for _ in range(width)] for _ in range(rows)]
    for r, row in enumerate(acc):
        for v, a in enumerate(row):
            b.store(load(b, out(r, v), V16F32) if keep else const(V16F32, 0.0), a)
    with cgutils.for_range(b, count, intp=I64) as loop:
        for address in ahead(loop.index):
            emit_prefetch(b, address)
        vectors = [emit_load_as_f32(b, right(loop.index, v), element) for v in range(width)]
        for r in range(rows):
            factor = broadcast_f32(b, left(r, loop.index))
            for v in range(width):
                b.store(emit_fma(b, factor, vectors[v], b.load(acc[r][v])), acc[r][v])
    for r, row in enumerate(acc):
        for v, a in enumerate(row):
            store(b, out(r, v), b.load(a))


def make_scores(rows: int, element: str) -> Any:
    """Intrinsic scores(q, k_page, groups, s, next): s[r][16 g + lane] = q[r] . K[g][:, lane] for g < groups.

    q: f32 (rows, 64); s: f32 rows, SPAN floats apart. All 4 groups of a page are computed where registers allow it.
    next: address of what is read next, as many bytes as the page's K. A page is a new stream for the hardware, which
    fetches ahead only within one: without this, decode at depth read the cache at a third of the memory's speed.
    """
    size = 4 if element == "F32" else 2
    group_bytes = HEAD_DIM * LANES * size

    def emit(b: ir.IRBuilder, q: Any, k: Any, groups: Any, s: Any, following: Any) -> None:
        steps = b.sdiv(b.add(groups, ir.Constant(I64, WIDTH - 1)), ir.Constant(I64, WIDTH))
        with cgutils.for_range(b, steps, intp=I64) as loop:
            first = b.add(k, b.mul(loop.index, ir.Constant(I64, group_bytes * WIDTH)))
            target = b.add(s, b.mul(loop.index, ir.Constant(I64, 64 * WIDTH)))
            coming = b.add(following, b.mul(loop.index, ir.Constant(I64, group_bytes * WIDTH)))

            def left(r: int, d: Any) -> Any:
                return b.add(at(b, q, 4 * HEAD_DIM * r), b.shl(d, ir.Constant(I64, 2)))

            def right(d: Any, v: int) -> Any:
                return b.add(at(b, first, group_bytes * v), b.mul(d, ir.Constant(I64, LANES * size)))

            def out(r: int, v: int) -> Any:
                return at(b, target, 4 * SPAN * r + 64 * v)

            def ahead(d: Any) -> list[Any]:
                step = LANES * size * WIDTH
                line = b.add(coming, b.mul(d, ir.Constant(I64, step)))
                return [at(b, line, 64 * i) for i in range(max(step // 64, 1))] if rows <= FEW_ROWS else []

            _sum_of_products(b, rows, ir.Constant(I64, HEAD_DIM), left, right, element, WIDTH, out, False, ahead)

    return word(void, [i64] * 5, emit)


def make_values(rows: int, element: str) -> Any:
    """Intrinsic values(p, v_page, count, o, next): o[r] += sum over positions i < count of p[r][i] * V[i].

    p: f32 rows, SPAN floats apart; o: f32 rows, PART floats apart; next: as for `scores`.
    """
    size = 4 if element == "F32" else 2

    def emit(b: ir.IRBuilder, p: Any, page: Any, count: Any, o: Any, following: Any) -> None:
        for dim in range(0, HEAD_DIM, LANES * WIDTH):

            def left(r: int, i: Any) -> Any:
                return b.add(at(b, p, 4 * SPAN * r), b.shl(i, ir.Constant(I64, 2)))

            def right(i: Any, v: int, dim: int = dim) -> Any:
                return b.add(at(b, page, size * (dim + LANES * v)), b.mul(i, ir.Constant(I64, HEAD_DIM * size)))

            def out(r: int, v: int, dim: int = dim) -> Any:
                return at(b, o, 4 * PART * r + 4 * (dim + LANES * v))

            def ahead(i: Any, dim: int = dim) -> list[Any]:
                line = b.add(following, b.mul(i, ir.Constant(I64, HEAD_DIM * size)))
                return [at(b, line, j) for j in range(0, HEAD_DIM * size, 64)] if rows <= FEW_ROWS and dim == 0 else []

            _sum_of_products(b, rows, count, left, right, element, WIDTH, out, True, ahead)

    return word(void, [i64] * 5, emit)


@kernel
def softmax_part(s, limit, filled, part):  # type: ignore[no-untyped-def]
    """Scores of one row -> weights in place, and m, l of its partial; o is zeroed. limit: positions this row may see,
    1..SPAN;
    filled: positions computed for the tile; weights beyond the limit become 0."""
    top = vsplat(f32(MINUS_INFINITY))
    for i in range(0, limit, LANES):
        v = vfirst(limit - i, vload(s + 4 * i), vsplat(f32(MINUS_INFINITY)))
        vstore(s + 4 * i, v)
        top = vmax(top, v)
    m = vhmax(top)
    total = vsplat(f32(0.0))
    for i in range(0, limit, LANES):
        v = vfirst(limit - i, vexp(vload(s + 4 * i) - vsplat(m)), vsplat(f32(0.0)))
        vstore(s + 4 * i, v)
        total = total + v
    i = (limit + LANES - 1) // LANES * LANES
    while i < filled:
        vstore(s + 4 * i, vsplat(f32(0.0)))
        i += LANES
    put_f32(part, m)
    put_f32(part + 4, vsum(total))


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


def make_span(rows: int, element: str) -> Any:
    """span(q, first_row, group, start, first, pages, page_offset, value_offset, s, parts): partials of `rows` rows over
    one span.

    Row r is head (first_row + r) % group of the token at position start + (first_row + r) // group. q: f32 (rows, 64),
    rotated and scaled. first: first position of the span. pages: addresses of the sequence's pages; page_offset: this
    layer and head inside a page. s: scratch f32 (rows, SPAN). parts: f32 (rows, PART). Rows that see nothing of the
    span get l = 0 and are not to be merged.
    """
    scores, values = make_scores(rows, element), make_values(rows, element)

    @kernel
    def span(q, first_row, group, start, first, pages, page_offset, value_offset, s, parts):  # type: ignore[no-untyped-def]
        last = start + (first_row + rows - 1) // group + 1  # positions that the last row sees
        filled = min(last - first, SPAN)
        top = get_i64(pages + first // PAGE * 8) + page_offset
        page = top
        for i in range(0, filled, PAGE):
            following = top + value_offset
            if i + PAGE < filled:
                following = get_i64(pages + (first + i + PAGE) // PAGE * 8) + page_offset
            scores(q, page, (min(filled - i, PAGE) + LANES - 1) // LANES, s + 4 * i, following)
            page = following
        padded = (filled + LANES - 1) // LANES * LANES
        for r in range(rows):
            limit = min(start + (first_row + r) // group + 1 - first, SPAN)
            part = parts + 4 * PART * r
            for d in range(0, HEAD_DIM, LANES):
                vstore(part + 4 * (16 + d), vsplat(f32(0.0)))
            if limit > 0:
                softmax_part(s + 4 * SPAN * r, limit, padded, part)
            else:
                put_f32(part + 4, f32(0.0))
                for j in range(0, padded, LANES):
                    vstore(s + 4 * (SPAN * r + j), vsplat(f32(0.0)))
        page = top
        for i in range(0, filled, PAGE):
            following = page
            if i + PAGE < filled:
                following = get_i64(pages + (first + i + PAGE) // PAGE * 8) + page_offset
            values(s + 4 * i, page + value_offset, min(filled - i, PAGE), parts + 4 * 16, following + value_offset)
            page = following

    return span


@kernel
def segment_of(block, t):  # type: ignore[no-untyped-def]
    """Address of the segment that token t of the pass belongs to."""
    segment = get_i64(block + B.segments)
    while t >= get_i64(segment + S.first) + get_i64(segment + S.count):
        segment += 8 * S.size
    return segment


@kernel
def merge_spans(block, segment, q):  # type: ignore[no-untyped-def]
    """Output over q of a segment's single token from the partials of its spans."""
    heads = get_i64(block + B.n_heads)
    parts = get_i64(segment + S.parts)
    for h in range(heads):
        for first in range(SPAN, get_i64(segment + S.start) + 1, SPAN):
            merge(parts + 4 * PART * h, parts + 4 * PART * (first // SPAN * heads + h))
        finish(parts + 4 * PART * h, q + 4 * HEAD_DIM * h)


def make_attention(element: str) -> tuple[Any, Any]:
    """(store_kv, attention) of a pass, for a KV cache of "F16" or "F32"."""
    half = element == "F16"
    size = 2 if half else 4
    span_1, span_3, span_6 = (make_span(rows, element) for rows in (1, 3, ROW_TILE))

    @kernel
    def store_kv(block, layer, t, head, qkv, scratch):  # type: ignore[no-untyped-def]
        """Rotate the queries of one KV head's group and its key; write key and value into their page."""
        heads, kv_heads = get_i64(block + B.n_heads), get_i64(block + B.n_kv_heads)
        group = heads // kv_heads
        segment = segment_of(block, t)
        position = get_i64(segment + S.start) + t - get_i64(segment + S.first)
        table = get_i64(block + B.rope) + position * HEAD_DIM * 4
        row = qkv + 4 * t * (heads + 2 * kv_heads) * HEAD_DIM
        for h in range(head * group, (head + 1) * group):
            rope(row + 4 * HEAD_DIM * h, table, f32(0.125), row + 4 * HEAD_DIM * h)  # 1 / sqrt(head_dim): exact
        page = (
            get_i64(get_i64(segment + S.pages) + position // PAGE * 8)
            + layer * get_i64(block + B.layer_bytes)
            + head * get_i64(block + B.head_bytes)
        )
        inside = position % PAGE
        rope(row + 4 * HEAD_DIM * (heads + head), table, f32(1.0), scratch)
        value = row + 4 * HEAD_DIM * (heads + kv_heads + head)
        to = page + get_i64(block + B.value_offset) + inside * HEAD_DIM * size
        lane = page + (inside // 16 * HEAD_DIM * 16 + inside % 16) * size
        if half:
            for d in range(0, HEAD_DIM, 16):
                vstore_half(scratch + 2 * d, vload(scratch + 4 * d))  # in place: writes stay behind reads
                vstore_half(to + 2 * d, vload(value + 4 * d))
            for d in range(HEAD_DIM):
                copy_i16(scratch + 2 * d, lane + 32 * d)
        else:
            for d in range(0, HEAD_DIM, 16):
                vstore(to + 4 * d, vload(value + 4 * d))
            for d in range(HEAD_DIM):
                put_f32(lane + 64 * d, get_f32(scratch + 4 * d))

    @kernel
    def any_span(rows, q, first_row, group, start, first, pages, offset, value_offset, s, parts):  # type: ignore[no-untyped-def]
        if rows == ROW_TILE:
            span_6(q, first_row, group, start, first, pages, offset, value_offset, s, parts)
        elif rows == 3:
            span_3(q, first_row, group, start, first, pages, offset, value_offset, s, parts)
        else:
            span_1(q, first_row, group, start, first, pages, offset, value_offset, s, parts)

    @kernel
    def attend_rows(block, segment, layer, head, first_row, end_row, qkv, scratch):  # type: ignore[no-untyped-def]
        """All spans of a segment's rows first_row..end_row of a KV head, merged as they come; output over q.

        qkv: the segment's first token."""
        heads, kv_heads = get_i64(block + B.n_heads), get_i64(block + B.n_kv_heads)
        group, start = heads // kv_heads, get_i64(segment + S.start)
        stride = (heads + 2 * kv_heads) * HEAD_DIM
        offset = layer * get_i64(block + B.layer_bytes) + head * get_i64(block + B.head_bytes)
        q, s = scratch, scratch + 4 * ROW_TILE * HEAD_DIM
        total = s + 4 * ROW_TILE * SPAN
        part = total + 4 * ROW_TILE * PART
        while first_row < end_row:
            left = end_row - first_row
            rows = ROW_TILE if left >= ROW_TILE else (3 if left >= 3 else 1)
            for r in range(rows):
                source = qkv + 4 * (
                    (first_row + r) // group * stride + (head * group + (first_row + r) % group) * HEAD_DIM
                )
                for d in range(0, HEAD_DIM, 16):
                    vstore(q + 4 * (r * HEAD_DIM + d), vload(source + 4 * d))
            last = start + (first_row + rows - 1) // group
            for first in range(0, last + 1, SPAN):
                into = part if first else total
                any_span(
                    rows, q, first_row, group, start, first, get_i64(segment + S.pages), offset,
                    get_i64(block + B.value_offset), s, into,
                )  # fmt: skip
                if first:
                    for r in range(rows):
                        if get_f32(part + 4 * PART * r + 4) > f32(0.0):
                            merge(total + 4 * PART * r, part + 4 * PART * r)
            for r in range(rows):
                target = qkv + 4 * (
                    (first_row + r) // group * stride + (head * group + (first_row + r) % group) * HEAD_DIM
                )
                finish(total + 4 * PART * r, target)
            first_row += rows

    @kernel
    def attend_span(block, segment, layer, head, first, qkv, scratch):  # type: ignore[no-untyped-def]
        """One span of a single token's rows of a KV head, kept as partials for `merge_spans`."""
        heads, kv_heads = get_i64(block + B.n_heads), get_i64(block + B.n_kv_heads)
        group, start = heads // kv_heads, get_i64(segment + S.start)
        offset = layer * get_i64(block + B.layer_bytes) + head * get_i64(block + B.head_bytes)
        r = 0
        while r < group:
            left = group - r
            rows = ROW_TILE if left >= ROW_TILE else (3 if left >= 3 else 1)
            h = head * group + r
            part = get_i64(segment + S.parts) + 4 * PART * (first // SPAN * heads + h)
            any_span(
                rows, qkv + 4 * HEAD_DIM * h, r, group, start, first, get_i64(segment + S.pages), offset,
                get_i64(block + B.value_offset), scratch + 4 * ROW_TILE * HEAD_DIM, part,
            )  # fmt: skip
            r += rows

    @kernel
    def attention(block, layer, counter, qkv, scratch):  # type: ignore[no-untyped-def]
        """All segments; their items are claimed through one counter, segment after segment."""
        heads, kv_heads = get_i64(block + B.n_heads), get_i64(block + B.n_kv_heads)
        group = heads // kv_heads
        segment, before = get_i64(block + B.segments), 0
        i = claim(counter, 0, 1)
        for _ in range(get_i64(block + B.n_segments)):
            count = get_i64(segment + S.count)
            rows = count * group
            tiles = (rows + ROW_TILE - 1) // ROW_TILE
            spans = get_i64(segment + S.start) // SPAN + 1
            first = qkv + 4 * get_i64(segment + S.first) * (heads + 2 * kv_heads) * HEAD_DIM
            items = kv_heads * (spans if count == 1 else tiles)
            while i - before < items:
                head, part = (i - before) % kv_heads, (i - before) // kv_heads
                if count == 1:
                    attend_span(block, segment, layer, head, part * SPAN, first, scratch)
                else:
                    # the longest rows first, so that the last claim is a short one
                    row = (tiles - 1 - part) * ROW_TILE
                    attend_rows(block, segment, layer, head, row, min(rows, row + ROW_TILE), first, scratch)
                i = claim(counter, 0, 1)
            before += items
            segment += 8 * S.size

    return store_kv, attention
