"""Training: the backward pass of every op of the forward pass, beside the forward ops it shares with inference.

Nothing of the forward pass is written again here: rows are normed, gated and rotated by pointwise.py, attended by
attention.py, multiplied by matmul.py and looked up by its `row`; the ops below only feed them and keep what they leave.

    forward    y = x W^T          tiles(x),  W as it is              y   (n, out)
    backward   dx = dy W          tiles(dy), turned(W)               dx  (n, in)
               dW = dy^T x        columns(x), row_panels(dy)         dW  in panels, like W
    attention  P = exp(S - m) / l   again, tile by tile, from the m and l that the forward pass kept (arXiv 2205.14135)
               dV = P^T dO   dS = P (dO V^T - rowsum(dO O))   dQ = dS K   dK = dS^T Q

Every output is summed by one item, in one order: the same bits for any number of threads. A gradient is `d` + its
name. What an op is told is drawn in ops.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from . import ops
from .attention import make_attention, merge_spans
from .bf16 import pair, round_16
from .block import HEAD_DIM, PAGE, B, S
from .forward import call_matmul, call_row
from .jit import TIER, kernel
from .matmul import make_tile
from .ops import CHUNK, COLUMN_STEP, QUERY_TILE, TOKENS
from .panels import BLOCK, PANELS, ROWS
from .pointwise import interleave, rmsnorm, swiglu
from .simd import (
    I32,
    I64,
    LANES,
    V16F32,
    at,
    call_llvm,
    declare,
    f32,
    f32x16,
    get_f32,
    get_i64,
    i64,
    load,
    pointer,
    put_f32,
    put_i64,
    sqrt,
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
    vsum,
    word,
)
from .target import token_tile
from .team import claim
from .unpack import make_unpack

T = token_tile(TIER, 0)
WIDE = T > 8  # tiles are made of 16 x 16 transposes; narrower ones number by number
vsqrt = word(f32x16, [f32x16], lambda b, x: call_llvm(b, "sqrt", x))


# ---- transposes ------------------------------------------------------------------------------------------------------


def _transposed(b: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """16 vectors of 16: blocks of 8, 4, 2, 1 change places across the diagonal."""
    rows = list(rows)
    for d in (8, 4, 2, 1):
        low = [lane if not lane & d else LANES + lane - d for lane in range(LANES)]
        high = [lane + d if not lane & d else LANES + lane for lane in range(LANES)]
        for i in range(LANES):
            if not i & d:
                x, y = rows[i], rows[i + d]
                rows[i], rows[i + d] = (
                    b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, LANES), index)) for index in (low, high)
                )
    return rows


def _transpose(b: ir.IRBuilder, x: ir.Value, x_bytes: ir.Value, out: ir.Value, out_bytes: ir.Value) -> None:
    rows = [load(b, b.add(x, b.mul(x_bytes, ir.Constant(I64, i))), V16F32) for i in range(LANES)]
    for i, row in enumerate(_transposed(b, rows)):
        store(b, b.add(out, b.mul(out_bytes, ir.Constant(I64, i))), row)


transpose = word(void, [i64] * 4, _transpose)  # x, bytes from row to row, out, bytes from row to row


def _store_slots(b: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    """The first T lanes; what lies behind them may be another thread's."""
    mask = ir.Constant(ir.VectorType(ir.IntType(1), LANES), [int(i < T) for i in range(LANES)])
    target = pointer(b, address, V16F32)
    kinds = [V16F32, target.type, I32, mask.type]
    function = declare(b, "llvm.masked.store.v16f32.p0", ir.VoidType(), kinds)
    b.call(function, [value, target, ir.Constant(I32, 4), mask])


def _transpose_slots(b: ir.IRBuilder, addresses: ir.Value, offset: ir.Value, out: ir.Value) -> None:
    """16 columns of T rows, whose addresses stand one after the other, as 16 rows of T."""
    rows = [load(b, b.add(load(b, at(b, addresses, 8 * i), I64), offset), V16F32) for i in range(T)]
    rows += [ir.Constant(V16F32, ir.Undefined)] * (LANES - T)
    for i, row in enumerate(_transposed(b, rows)):
        _store_slots(b, at(b, out, 4 * T * i), row)


store_slots = word(void, [i64, f32x16], _store_slots)
transpose_slots = word(void, [i64] * 3, _transpose_slots)


# ---- rows and what products are made of ------------------------------------------------------------------------------

A = ops.TILES  # the words of a source stand in the same place for all who take one


@kernel
def kept(seed, index, threshold):  # type: ignore[no-untyped-def]
    """Whether dropout keeps number `index`: 32 hashed bits below the threshold (MurmurHash3's finaliser)."""
    x = (index * 0x9E3779B1 + seed) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16) < threshold


@kernel
def source_row(a, t, row):  # type: ignore[no-untyped-def]
    """Address of row t of a source: where it lies, or `row` if something was done to it."""
    x, k = get_i64(a + A.x) + 4 * t * get_i64(a + A.stride), get_i64(a + A.k)
    norm, up = get_i64(a + A.norm), get_i64(a + A.up)
    keep, factor = get_f32(a + A.keep), get_f32(a + A.factor)
    if norm:
        rmsnorm(x, norm, k, get_f32(a + A.eps), row)
        x = row
    if up:
        for i in range(0, k, LANES):
            vstore(row + 4 * i, vload(x + 4 * i))
        swiglu(row, up + 4 * t * get_i64(a + A.up_stride), k)
        x = row
    if keep < f32(1.0):
        threshold, seed = i64(keep * f32(4294967296.0)), get_i64(a + A.seed)
        for i in range(k):
            value = get_f32(x + 4 * i) / keep
            put_f32(row + 4 * i, value if kept(seed, t * k + i, threshold) else f32(0.0))
        x = row
    if factor != f32(1.0):
        for i in range(0, k, LANES):
            vstore(row + 4 * i, vload(x + 4 * i) * vsplat(factor))
        x = row
    return x


@kernel
def source_or_zero(a, t, row):  # type: ignore[no-untyped-def]
    """`source_row`, and zeros behind the last token."""
    if t < get_i64(a + A.n):
        return source_row(a, t, row)
    for i in range(0, get_i64(a + A.k), LANES):
        vstore(row + 4 * i, vsplat(f32(0.0)))
    return row


@kernel
def rounded_row(x, k, out):  # type: ignore[no-untyped-def]
    """k floats as bf16, in place or not: k / 2 pairs."""
    for i in range(0, k, LANES):
        round_16(x + 4 * i, out + 2 * i)
    return out


@kernel
def paired_rows(a, t, row):  # type: ignore[no-untyped-def]
    """Rows t and t + 1 of a source as k pairs of bf16."""
    k = get_i64(a + A.k)
    x, y, out = source_or_zero(a, t, row), source_or_zero(a, t + 1, row + 4 * k), row + 8 * k
    for i in range(0, k, LANES):
        pair(x + 4 * i, y + 4 * i, out + 4 * i)
    return out


def make_tiles(pairs: bool) -> Any:
    """tiles, of numbers or of pairs of bf16. item: a tile of T tokens."""

    @kernel
    def tiles(item, a, scratch):  # type: ignore[no-untyped-def]
        k, t0 = get_i64(a + A.k), item * T
        width, slots = k // 2 if pairs else k, min(T, get_i64(a + A.n) - t0)
        out, rows = get_i64(a + ops.TILES.out) + 4 * t0 * width, scratch + 8 * LANES
        for j in range(slots):
            row = source_row(a, t0 + j, rows + 4 * k * j)
            put_i64(scratch + 8 * j, rounded_row(row, k, rows + 4 * k * j) if pairs else row)
        if WIDE and slots == T:
            for c in range(0, width, LANES):
                transpose_slots(scratch, 4 * c, out + 4 * T * c)
        else:
            for j in range(slots):
                interleave(get_i64(scratch + 8 * j), width, out + 4 * j, 4 * slots)

    return tiles


def make_columns(pairs: bool) -> Any:
    """columns, of numbers or of pairs of tokens. item: TOKENS tokens."""
    step = 2 if pairs else 1

    @kernel
    def columns(item, a, scratch):  # type: ignore[no-untyped-def]
        k, rows, out = get_i64(a + A.k), get_i64(a + ops.COLUMNS.rows) // step, get_i64(a + ops.COLUMNS.out)
        for t in range(item * TOKENS // step, (item + 1) * TOKENS // step):
            x = paired_rows(a, 2 * t, scratch) if pairs else source_or_zero(a, t, scratch)
            for c in range(0, k, T):
                slots = min(T, k - c)
                target = out + 4 * (c * rows + t * slots)
                if WIDE and slots == T:
                    store_slots(target, vload(x + 4 * c))
                else:
                    for j in range(slots):
                        put_f32(target + 4 * j, get_f32(x + 4 * (c + j)))

    return columns


def make_row_panels(pairs: bool) -> Any:
    """panels, of numbers or of pairs of tokens. item: TOKENS tokens."""
    step = 2 if pairs else 1

    @kernel
    def row_panels(item, a, scratch):  # type: ignore[no-untyped-def]
        k, rows, out = get_i64(a + A.k), get_i64(a + ops.ROW_PANELS.rows) // step, get_i64(a + ops.ROW_PANELS.out)
        for t in range(item * TOKENS // step, (item + 1) * TOKENS // step):
            x = paired_rows(a, 2 * t, scratch) if pairs else source_or_zero(a, t, scratch)
            for c in range(0, k, ROWS):
                vstore(out + 4 * (c * rows + t * ROWS), vload(x + 4 * c))

    return row_panels


@kernel
def copy(item, a, scratch):  # type: ignore[no-untyped-def]
    """out (+)= source. item: TOKENS tokens."""
    k, stride, add = get_i64(a + A.k), get_i64(a + ops.COPY.out_stride), get_i64(a + ops.COPY.add)
    for t in range(item * TOKENS, min((item + 1) * TOKENS, get_i64(a + A.n))):
        x, out = source_row(a, t, scratch), get_i64(a + ops.COPY.out) + 4 * t * stride
        for i in range(0, k, LANES):
            v = vload(x + 4 * i)
            vstore(out + 4 * i, vload(out + 4 * i) + v if add else v)


def make_turn(name: str, pairs: bool) -> Any:
    """turned(W) of a matrix of format `name`. item: a row group."""
    unpack, group_record = make_unpack(name), PANELS[name].record_bytes // PANELS[name].blocks
    direct, step = name == "F32", 2 if pairs else 1

    @kernel
    def turn(item, a, scratch):  # type: ignore[no-untyped-def]
        blocks, rows = get_i64(a + ops.TURN.blocks), get_i64(a + ops.TURN.rows) // step
        panel = get_i64(a + ops.TURN.w) + item * blocks * group_record
        out = get_i64(a + ops.TURN.out) + 4 * ROWS * ROWS // step * item
        block = scratch + 4 * ROWS * BLOCK * blocks
        real = item < get_i64(a + ops.TURN.groups)
        if real and not direct:
            unpack(panel, blocks, scratch)
            panel = scratch
        for c in range(0, blocks * BLOCK, ROWS):
            target = out + 4 * c * rows
            if not real:
                for i in range(ROWS // step):
                    vstore(target + 4 * ROWS * i, vsplat(f32(0.0)))
            elif pairs:
                transpose(panel + 4 * ROWS * c, 4 * ROWS, block, 4 * ROWS)
                for i in range(ROWS // 2):
                    pair(block + 128 * i, block + 128 * i + 64, target + 64 * i)
            else:
                transpose(panel + 4 * ROWS * c, 4 * ROWS, target, 4 * ROWS)

    return turn


def make_pairs(name: str) -> Any:
    """A matrix of format `name` as panels of pairs along k. item: a row group."""
    unpack, group_record = make_unpack(name), PANELS[name].record_bytes // PANELS[name].blocks
    direct = name == "F32"

    @kernel
    def pairs(item, a, scratch):  # type: ignore[no-untyped-def]
        blocks = get_i64(a + ops.PAIRS.blocks)
        panel = get_i64(a + ops.PAIRS.w) + item * blocks * group_record
        out = get_i64(a + ops.PAIRS.out) + item * blocks * BLOCK // 2 * 64
        if not direct:
            unpack(panel, blocks, scratch)
            panel = scratch
        for i in range(blocks * BLOCK // 2):
            pair(panel + 128 * i, panel + 128 * i + 64, out + 64 * i)

    return pairs


@kernel
def multiply(item, a, scratch):  # type: ignore[no-untyped-def]
    """y (+)= x w^T by a kernel of matmul.py. item: `step` row groups, group_bytes from one to the next of y."""
    M = ops.MULTIPLY
    function, w, blocks = get_i64(a + M.matmul), get_i64(a + M.w), get_i64(a + M.blocks)
    x, n, y, stride = get_i64(a + M.x), get_i64(a + M.n), get_i64(a + M.y), get_i64(a + M.stride)
    add, group_bytes, step = get_i64(a + M.add), get_i64(a + M.group_bytes), get_i64(a + M.step)
    first, end = item * step, min((item + 1) * step, get_i64(a + M.groups))
    if group_bytes == 4 * ROWS:
        call_matmul(function, w, blocks, first, end, x, n, y, stride, add, scratch)
        return
    for g in range(first, end):
        call_matmul(function, w, blocks, g, g + 1, x, n, y + g * (group_bytes - 4 * ROWS), stride, add, scratch)


# ---- forward ---------------------------------------------------------------------------------------------------------


@kernel
def embed(item, a, scratch):  # type: ignore[no-untyped-def]
    """item: a token."""
    E = ops.EMBED
    dim = get_i64(a + E.dim)
    out = get_i64(a + E.out) + 4 * item * dim
    token = get_i64(get_i64(a + E.ids) + 8 * item)
    call_row(get_i64(a + E.look_up), get_i64(a + E.w), get_i64(a + E.blocks), token, out, scratch)


store_kv, attention = make_attention("f32", "f32")


@kernel
def store_keys(item, a, scratch):  # type: ignore[no-untyped-def]
    """Rotate q in place; k, rotated, and v into their page. item: (token, KV head)."""
    block, heads = get_i64(a + ops.STORE_KV.block), get_i64(get_i64(a + ops.STORE_KV.block) + B.n_kv_heads)
    qkv = get_i64(a + ops.STORE_KV.qkv)
    store_kv(block, get_i64(a + ops.STORE_KV.layer), item // heads, item % heads, qkv, scratch)


def attend(a, tid):  # type: ignore[no-untyped-def]
    """Output over q; it claims its own items."""
    scratch = get_i64(a + ops.ATTEND.scratch) + tid * get_i64(a + ops.ATTEND.scratch_bytes)
    block, layer = get_i64(a + ops.ATTEND.block), get_i64(a + ops.ATTEND.layer)
    attention(block, layer, get_i64(a + ops.ATTEND.counter), get_i64(a + ops.ATTEND.qkv), scratch, 0)


@kernel
def merge_one(item, a, scratch):  # type: ignore[no-untyped-def]
    """What `attend` left of a document of one token."""
    block = get_i64(a + ops.MERGE.block)
    segment = get_i64(block + B.segments) + 8 * S.size * get_i64(a + ops.MERGE.segment)
    row = get_i64(a + ops.MERGE.qkv) + 4 * get_i64(segment + S.first) * get_i64(a + ops.MERGE.stride)
    merge_spans(block, segment, row, scratch)


# ---- backward --------------------------------------------------------------------------------------------------------


@kernel
def norm_back(item, a, scratch):  # type: ignore[no-untyped-def]
    """y = x r w, r = 1 / sqrt(mean(x^2) + eps):  dx += r w dy - x r^3 / dim sum(x w dy);  dw = sum of dy x r.

    dw, unless parts is 0, as one row for each item of TOKENS tokens.
    """
    N = ops.NORM_BACK
    dim, weight, parts = get_i64(a + N.dim), get_i64(a + N.weight), get_i64(a + N.parts)
    part = parts + 4 * item * dim
    if parts:
        for i in range(0, dim, LANES):
            vstore(part + 4 * i, vsplat(f32(0.0)))
    for t in range(item * TOKENS, min((item + 1) * TOKENS, get_i64(a + N.n))):
        x, dy, dx = get_i64(a + N.x) + 4 * t * dim, get_i64(a + N.dy) + 4 * t * dim, get_i64(a + N.dx) + 4 * t * dim
        squares, dots = vsplat(f32(0.0)), vsplat(f32(0.0))
        for i in range(0, dim, LANES):
            v = vload(x + 4 * i)
            squares = vfma(v, v, squares)
            dots = vfma(v, vload(weight + 4 * i) * vload(dy + 4 * i), dots)
        r = f32(1.0) / sqrt(vsum(squares) / f32(dim) + get_f32(a + N.eps))
        scale, back = vsplat(r), vsplat(-r * r * r * vsum(dots) / f32(dim))
        for i in range(0, dim, LANES):
            v, d = vload(x + 4 * i), vload(dy + 4 * i)
            inner = vfma(v, back, scale * vload(weight + 4 * i) * d)
            vstore(dx + 4 * i, vload(dx + 4 * i) + inner)
            if parts:
                vstore(part + 4 * i, vfma(d, v * scale, vload(part + 4 * i)))


@kernel
def sum_parts(item, a, scratch):  # type: ignore[no-untyped-def]
    """out += the sum of `count` rows of `width`. item: 16 columns."""
    P = ops.SUM_PARTS
    out, first = get_i64(a + P.out) + 64 * item, get_i64(a + P.parts) + 64 * item
    total = vload(out)
    for i in range(get_i64(a + P.count)):
        total = total + vload(first + 4 * i * get_i64(a + P.width))
    vstore(out, total)


@kernel
def swiglu_back(item, a, scratch):  # type: ignore[no-untyped-def]
    """h = silu(g) u:  dg = dh u s (1 + g (1 - s)) over g, du = dh g s over u, s = 1 / (1 + exp(-g)). item: a token."""
    W = ops.SWIGLU_BACK
    gate = get_i64(a + W.gate) + 4 * item * get_i64(a + W.gate_stride)
    up = get_i64(a + W.up) + 4 * item * get_i64(a + W.up_stride)
    dh, one, zero = get_i64(a + W.dh) + 4 * item * get_i64(a + W.k), vsplat(f32(1.0)), vsplat(f32(0.0))
    for i in range(0, get_i64(a + W.k), LANES):
        g, u, d = vload(gate + 4 * i), vload(up + 4 * i), vload(dh + 4 * i)
        s = one / (one + vexp(zero - g))
        ds = d * s
        vstore(gate + 4 * i, ds * u * vfma(g, one - s, one))
        vstore(up + 4 * i, ds * g)


TILE = QUERY_TILE * QUERY_TILE * 4  # bytes of a tile of attention
STEP = 8 if TIER.row_lanes == 16 else 2  # rows of one call of the matmul's tile
product = make_tile(PANELS["F32"], 0, {STEP: 1})


@kernel
def tile_product(w, x, rows, y, stride, add):  # type: ignore[no-untyped-def]
    """y[r] (+)= sum over i < 64 of x[i][r] w[i]: x (64, 64), w in panels [4][64][16], stride of y in floats."""
    for g in range(QUERY_TILE // ROWS):
        for r in range(0, rows, STEP):
            panel = w + g * QUERY_TILE * ROWS * 4
            product(
                STEP, panel, QUERY_TILE // BLOCK, x + 4 * r, QUERY_TILE, y + 4 * (r * stride + g * ROWS), stride, add
            )


@kernel
def tile_of_rows(x, stride, rows, panels, turned):  # type: ignore[no-untyped-def]
    """64 dims of `rows` rows, zeros up to 64: as panels [4][64 rows][16 dims] and as turned [64 dims][64 rows]."""
    for d in range(0, HEAD_DIM, LANES):
        panel = panels + 4 * d * QUERY_TILE
        for r in range(QUERY_TILE):
            vstore(panel + 64 * r, vload(x + 4 * (r * stride + d)) if r < rows else vsplat(f32(0.0)))
        for r in range(0, QUERY_TILE, LANES):
            transpose(panel + 64 * r, 64, turned + 4 * (d * QUERY_TILE + r), 4 * QUERY_TILE)


@kernel
def weights_back(s, dp, dots, softmax, softmax_stride, rows, diagonal):  # type: ignore[no-untyped-def]
    """Scores -> P over s, dP -> dS = P (dP - D) over dp; 0 beyond the diagonal and below the rows.

    dots: D of each row. softmax: m and l of the first row.
    """
    zero = vsplat(f32(0.0))
    for r in range(QUERY_TILE):
        line = 4 * QUERY_TILE * r
        seen = min(r + 1, QUERY_TILE) if diagonal else QUERY_TILE
        if r >= rows:
            seen = 0
        m, scale, dot = zero, zero, zero
        if seen:
            m = vsplat(get_f32(softmax + 4 * r * softmax_stride))
            scale = vsplat(f32(1.0) / get_f32(softmax + 4 * r * softmax_stride + 4))
            dot = vsplat(get_f32(dots + 4 * r))
        for j in range(0, QUERY_TILE, LANES):
            if j >= seen:
                vstore(s + line + 4 * j, zero)
                vstore(dp + line + 4 * j, zero)
            else:
                p = vfirst(seen - j, vexp(vload(s + line + 4 * j) - m) * scale, zero)
                vstore(s + line + 4 * j, p)
                vstore(dp + line + 4 * j, vfirst(seen - j, p * (vload(dp + line + 4 * j) - dot), zero))


@kernel
def attend_back(item, a, scratch):  # type: ignore[no-untyped-def]
    """dq, dk, dv (n, n_heads, 64) of one head of one segment, all rotated; k and v not yet summed over their group.

    item: (segment, head). q: (n, n_heads, 64) rotated and scaled; out, dout: attention's output and its gradient.
    """
    W = ops.ATTEND_BACK
    block, layer = get_i64(a + W.block), get_i64(a + W.layer)
    heads = get_i64(block + B.n_heads)
    head, width = item % heads, heads * HEAD_DIM
    segment = get_i64(block + B.segments) + 8 * S.size * (item // heads)
    count, first = get_i64(segment + S.count), get_i64(segment + S.first)
    kv_head = head // (heads // get_i64(block + B.n_kv_heads))
    offset = layer * get_i64(block + B.layer_bytes) + kv_head * get_i64(block + B.head_bytes)
    here = 4 * (first * width + head * HEAD_DIM)
    q, o, do = get_i64(a + W.q) + here, get_i64(a + W.out) + here, get_i64(a + W.dout) + here
    dq, dk, dv = get_i64(a + W.dq) + here, get_i64(a + W.dk) + here, get_i64(a + W.dv) + here
    softmax = get_i64(block + B.softmax) + 8 * (first * heads + head)
    k_panels, v_turned = scratch, scratch + TILE
    q_panels, q_turned, o_panels, o_turned = (
        scratch + 2 * TILE, scratch + 3 * TILE, scratch + 4 * TILE, scratch + 5 * TILE,
    )  # fmt: skip
    s, ds, turned = scratch + 6 * TILE, scratch + 7 * TILE, scratch + 8 * TILE
    dq_tile, dk_tile, dv_tile, dots = (
        scratch + 9 * TILE, scratch + 10 * TILE, scratch + 11 * TILE, scratch + 13 * TILE,
    )  # fmt: skip
    for j0 in range(0, count, QUERY_TILE):
        key = get_i64(get_i64(segment + S.pages) + j0 // PAGE * 8) + offset
        value = key + get_i64(block + B.value_offset)
        for d in range(0, HEAD_DIM, LANES):
            for j in range(0, QUERY_TILE, LANES):  # K lies as [4][64 dims][16 positions], V as [64 positions][64 dims]
                transpose(key + 4 * (j * HEAD_DIM + LANES * d), 64, k_panels + 4 * (d * QUERY_TILE + LANES * j), 64)
                transpose(value + 4 * (j * HEAD_DIM + d), 256, v_turned + 4 * (j * HEAD_DIM + LANES * d), 64)
        for r0 in range(j0, count, QUERY_TILE):
            rows = min(QUERY_TILE, count - r0)
            some = (rows + STEP - 1) // STEP * STEP
            row = 4 * r0 * width
            tile_of_rows(q + row, width, rows, q_panels, q_turned)
            tile_of_rows(do + row, width, rows, o_panels, o_turned)
            for r in range(rows):
                total = vsplat(f32(0.0))
                for d in range(0, HEAD_DIM, LANES):
                    total = vfma(vload(o + row + 4 * (r * width + d)), vload(do + row + 4 * (r * width + d)), total)
                put_f32(dots + 4 * r, vsum(total))
            tile_product(key, q_turned, some, s, QUERY_TILE, 0)
            tile_product(v_turned, o_turned, some, ds, QUERY_TILE, 0)
            weights_back(s, ds, dots, softmax + 8 * r0 * heads, 2 * heads, rows, r0 == j0)
            for r in range(0, QUERY_TILE, LANES):
                for j in range(0, QUERY_TILE, LANES):
                    transpose(ds + 4 * (r * QUERY_TILE + j), 256, turned + 4 * (j * QUERY_TILE + r), 256)
            later = r0 > j0
            tile_product(o_panels, s, QUERY_TILE, dv_tile, HEAD_DIM, later)
            tile_product(q_panels, ds, QUERY_TILE, dk_tile, HEAD_DIM, later)
            tile_product(k_panels, turned, some, dq_tile, HEAD_DIM, 0)
            for r in range(rows):
                for d in range(0, HEAD_DIM, LANES):
                    here, part = dq + row + 4 * (r * width + d), vload(dq_tile + 4 * (r * HEAD_DIM + d))
                    vstore(here, vload(here) + part if j0 else part)
        for j in range(min(QUERY_TILE, count - j0)):
            for d in range(0, HEAD_DIM, LANES):
                to, of = 4 * ((j0 + j) * width + d), 4 * (j * HEAD_DIM + d)
                vstore(dk + to, vload(dk_tile + of))
                vstore(dv + to, vload(dv_tile + of))


@kernel
def rotate_back(x, table, scale, out):  # type: ignore[no-untyped-def]
    """The transpose of pointwise.rope: the angle negated."""
    s = vsplat(scale)
    for i in range(0, HEAD_DIM // 2, LANES):
        low, high = vload(x + 4 * i), vload(x + 4 * (i + HEAD_DIM // 2))
        cos, sin = vload(table + 4 * i), vload(table + 4 * (i + HEAD_DIM // 2))
        vstore(out + 4 * i, vfma(low, cos, high * sin) * s)
        vstore(out + 4 * (i + HEAD_DIM // 2), vfma(high, cos, (vsplat(f32(0.0)) - low) * sin) * s)


@kernel
def rope_back(item, a, scratch):  # type: ignore[no-untyped-def]
    """Gradient of a token's row of qkv: heads rotated back, k and v summed over their group. item: a token."""
    R = ops.ROPE_BACK
    block = get_i64(a + R.block)
    heads, kv_heads = get_i64(block + B.n_heads), get_i64(block + B.n_kv_heads)
    group = heads // kv_heads
    segment = get_i64(block + B.segments)
    while item >= get_i64(segment + S.first) + get_i64(segment + S.count):
        segment += 8 * S.size
    table = get_i64(block + B.rope) + (item - get_i64(segment + S.first)) * HEAD_DIM * 4
    here = 4 * item * heads * HEAD_DIM
    dq, dk, dv = get_i64(a + R.dq) + here, get_i64(a + R.dk) + here, get_i64(a + R.dv) + here
    out = get_i64(a + R.dqkv) + 4 * item * (heads + 2 * kv_heads) * HEAD_DIM
    for h in range(heads):
        rotate_back(dq + 4 * HEAD_DIM * h, table, f32(0.125), out + 4 * HEAD_DIM * h)
    for h in range(kv_heads):
        for d in range(0, HEAD_DIM, LANES):
            k, v = vsplat(f32(0.0)), vsplat(f32(0.0))
            for i in range(h * group, (h + 1) * group):
                k = k + vload(dk + 4 * (i * HEAD_DIM + d))
                v = v + vload(dv + 4 * (i * HEAD_DIM + d))
            vstore(scratch + 4 * d, k)
            vstore(out + 4 * ((heads + kv_heads + h) * HEAD_DIM + d), v)
        rotate_back(scratch, table, f32(1.0), out + 4 * HEAD_DIM * (heads + h))


def make_tiles_of_panels(pairs: bool) -> Any:
    """`tiles` of an even number of groups of columns of what lies as `panels`. item: a tile of T tokens."""
    step = 2 if pairs else 1

    @kernel
    def tiles_of_panels(item, a, scratch):  # type: ignore[no-untyped-def]
        P = ops.TILES_OF_PANELS
        rows, first, count, t0 = get_i64(a + P.rows), get_i64(a + P.first), get_i64(a + P.count), item * T
        slots = min(T, get_i64(a + P.n) - t0)
        out, lines = get_i64(a + P.out) + 4 * t0 * count * ROWS // step, scratch + 8 * LANES
        for j in range(T):
            put_i64(scratch + 8 * j, lines + 64 * j)
        for g in range(0, count, step):
            for j in range(slots):
                for i in range(step):
                    line, group = lines + 64 * j + 32 * i, first + g + i
                    x = get_i64(a + P.panels) + 64 * (group * rows + t0 + j)
                    if group >= get_i64(a + P.groups):
                        x = lines + 64 * T
                        vstore(x, vsplat(f32(0.0)))
                    if pairs:
                        round_16(x, line)
                    else:
                        vstore(line, vload(x))
            target = out + 4 * (g // step) * ROWS * slots
            if WIDE and slots == T:
                transpose_slots(scratch, 0, target)
            else:
                for j in range(slots):
                    interleave(lines + 64 * j, ROWS, target + 4 * j, 4 * slots)

    return tiles_of_panels


@kernel
def loss(item, a, scratch):  # type: ignore[no-untyped-def]
    """-weight log softmax(x)[target] of a row of logits, which lie as `panels`. item: a row; those behind n become 0.

    stats: x[target] - max, sum of exp(x - max). With `gradient` the row becomes weight (softmax - onehot), and 0 behind
    the vocabulary.
    """
    L = ops.LOSS
    vocab, groups, step = get_i64(a + L.vocab), get_i64(a + L.groups), 64 * get_i64(a + L.rows)
    x, low, zero = get_i64(a + L.logits) + 64 * item, vsplat(f32(float("-inf"))), vsplat(f32(0.0))
    if item >= get_i64(a + L.n):
        for g in range(groups):
            vstore(x + g * step, zero)
        return
    target, stats = get_i64(get_i64(a + L.targets) + 8 * item), get_i64(a + L.stats) + 8 * item
    top = low
    for g in range(groups):
        top = vmax(top, vfirst(vocab - ROWS * g, vload(x + g * step), low))
    m = vhmax(top)
    mine = x + target // ROWS * step + 4 * (target % ROWS)
    put_f32(stats, get_f32(mine) - m)
    total = zero
    for g in range(groups):
        e = vfirst(vocab - ROWS * g, vexp(vload(x + g * step) - vsplat(m)), zero)
        vstore(x + g * step, e)
        total = total + e
    put_f32(stats + 4, vsum(total))
    if get_i64(a + L.gradient):
        weight = get_f32(get_i64(a + L.weights) + 4 * item)
        scale = vsplat(weight / vsum(total))
        for g in range(groups):
            vstore(x + g * step, vload(x + g * step) * scale)
        put_f32(mine, get_f32(mine) - weight)


@kernel
def embed_back(item, a, scratch):  # type: ignore[no-untyped-def]
    """Add each token's row to the row of its id, token after token. dw: an F32 panel. item: COLUMN_STEP columns."""
    E = ops.EMBED_BACK
    dim, ids, dw = get_i64(a + E.dim), get_i64(a + E.ids), get_i64(a + E.dw)
    for t in range(get_i64(a + E.n)):
        token, dx = get_i64(ids + 8 * t), get_i64(a + E.dx) + 4 * t * dim
        lane = dw + 4 * (token // ROWS * ROWS * dim + token % ROWS)
        for c in range(item * COLUMN_STEP, (item + 1) * COLUMN_STEP):
            put_f32(lane + 64 * c, get_f32(lane + 64 * c) + get_f32(dx + 4 * c))


# ---- optimiser -------------------------------------------------------------------------------------------------------


@kernel
def squares(item, a, scratch):  # type: ignore[no-untyped-def]
    """parts[item] = sum of x^2 of CHUNK numbers."""
    x, total = get_i64(a + ops.SQUARES.x), vsplat(f32(0.0))
    for i in range(item * CHUNK, min((item + 1) * CHUNK, get_i64(a + ops.SQUARES.count)), LANES):
        v = vload(x + 4 * i)
        total = vfma(v, v, total)
    put_f32(get_i64(a + ops.SQUARES.parts) + 4 * item, vsum(total))


@kernel
def adamw(item, a, scratch):  # type: ignore[no-untyped-def]
    """One step of AdamW (arXiv 1711.05101) on CHUNK numbers, in torch's order; the gradient becomes 0.

    correction1, correction2: 1 - beta1^step, sqrt(1 - beta2^step). clip: factor of the gradient.
    """
    W = ops.ADAMW
    p, g, m, v = get_i64(a + W.p), get_i64(a + W.g), get_i64(a + W.m), get_i64(a + W.v)
    one, lr = f32(1.0), get_f32(a + W.lr)
    keep1, keep2 = vsplat(one - get_f32(a + W.beta1)), vsplat(one - get_f32(a + W.beta2))
    beta2, clip, eps = vsplat(get_f32(a + W.beta2)), vsplat(get_f32(a + W.clip)), vsplat(get_f32(a + W.eps))
    shrink, rate = vsplat(one - lr * get_f32(a + W.decay)), vsplat(lr / get_f32(a + W.correction1))
    root = vsplat(get_f32(a + W.correction2))
    for i in range(item * CHUNK, min((item + 1) * CHUNK, get_i64(a + W.count)), LANES):
        o = 4 * i
        d, mean = vload(g + o) * clip, vload(m + o)
        mean = vfma(keep1, d - mean, mean)
        square = vfma(keep2 * d, d, vload(v + o) * beta2)
        vstore(m + o, mean)
        vstore(v + o, square)
        vstore(p + o, vload(p + o) * shrink - rate * mean / (vsqrt(square) / root + eps))
        vstore(g + o, vsplat(f32(0.0)))


MAKERS: dict[str, Any] = {  # with and without "_bf16"
    "tiles": make_tiles,
    "columns": make_columns,
    "panels": make_row_panels,
    "panel_tiles": make_tiles_of_panels,
}
OPS: dict[str, Any] = {
    "multiply": multiply,
    "copy": copy,
    "embed": embed,
    "store": store_keys,
    "merge": merge_one,
    "norm_back": norm_back,
    "sum": sum_parts,
    "swiglu_back": swiglu_back,
    "attend_back": attend_back,
    "rope_back": rope_back,
    "loss": loss,
    "embed_back": embed_back,
    "squares": squares,
    "adamw": adamw,
}


def _body(name: str, pairs: bool) -> Any:
    kind, _, fmt = name.partition("_")
    if name in MAKERS:
        return MAKERS[name](pairs)
    if kind == "turn":
        return make_turn(fmt, pairs)
    return make_pairs(fmt) if kind == "pairs" else OPS[name]


def make_op(name: str) -> Callable[..., None]:
    """job(block, tid) of an op: of OPS, "attend", "pairs_FORMAT"; of MAKERS or "turn_FORMAT", also with "_bf16"."""
    if name == "attend":
        return attend
    body = _body(name.removesuffix("_bf16"), name.endswith("_bf16"))

    def job(block, tid):  # type: ignore[no-untyped-def]
        counter, items = get_i64(block + A.counter), get_i64(block + A.items)
        scratch = get_i64(block + A.scratch) + tid * get_i64(block + A.scratch_bytes)
        while True:
            item = claim(counter, 1)
            if item >= items:
                return
            body(item, block, scratch)

    return job
