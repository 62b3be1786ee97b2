"""y = x W^T for every weight format: one tile generator, parameters format x activation mode x instruction set.

Letters: w panel of weights (panels.py), x activations, y f32 (tokens, y_stride); nb blocks of 32 along k; T tokens of a
tile.

Activations are laid out tile by tile, so that a tile reads one stream. For int8 a token's block is a record of 64
bytes, or of 96 with two terms:

    [32 x i8 q]                  x = d q                              one term
    [32 x i8 q1][32 x i8 q2]     x = d q,  q = 256 q1 + q2            two terms
    [32 x i16 q]                 of four k the first, third, second and fourth: two terms of a tier with `pairs`
    then                         f32 d  f32 d*sum  -8*sum  -16*sum  -128*sum  -32*lo  -32*hi  crossed    sums are i32
    sum of the 32 q, lo and hi its halves: they take the weights' zero point out of the dot product exactly
    crossed: of one term, -8*sum, and minus what crossed quads of weights 0 add (unpack.py)
    tile of S tokens: [block][token], S = T but for the last tile, and passes of so few tokens that one has all

    f32 mode: tile of S tokens: [k][token] f32

Order of every sum, the same for any T, thread and CPU: integers inside a block (exact), then one fma per scale group, k
upwards; f32 activations: one chain of fma over the even k, one over the odd (a single token waits less for either, and
reads its weights in one stream), added at the end. T tokens share the load of a quad: weights live in registers,
activations are broadcast from memory.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .block import SPREAD_BLOCKS, SPREAD_TOKENS
from .dots import V64I8, dots_of, join
from .jit import TIER, kernel
from .panels import BLOCK, PANELS, ROWS, Panel
from .simd import (
    F32,
    I32,
    I64,
    V16F32,
    V16I32,
    at,
    broadcast_f32,
    const,
    emit_fma,
    emit_hidden,
    emit_load_as_f32,
    emit_prefetch,
    get_f32,
    i32x16,
    load,
    put_f32,
    splat,
    store,
    void,
    vsum_i32,
    word,
)
from .target import one_tile, peak_tokens, record_bytes, token_tile
from .unpack import Record, Spread, SpreadRecord, each_block, make_spread, make_unpack

i64 = types.int64

D, DSUM, SUM8, SUM16, SUM128, LOW32, HIGH32, CROSSED = range(0, 32, 4)  # byte offsets behind the integers of a record
HALVES = (LOW32, HIGH32)
# A tile of few tokens reads its weights from memory, too slowly for the hardware to look far enough ahead: it is told
FEW, AHEAD = range(TIER.ahead[0], 9), TIER.ahead[1]
LINES = 2  # that a tile of spread weights asks for with each of its blocks
TOGETHER = 4  # tokens whose two terms are summed at the same time where there are 16 registers or more
FLOAT_STEP = 2  # k of one round of the f32 tile; with more LLVM keeps the weights of all of them on the stack
Sums = list[list[ir.Value]]  # addresses of f32 sums, of each token by parts of the rows
MATMUL = void(i64, i64, i64, i64, i64, i64, i64, i64, i64, i64)  # w, nb, g0, g1, x, n, y, y_stride, add, scratch


# ---- tiles -----------------------------------------------------------------------------------------------------------


def _start(b: ir.IRBuilder, record: Record, group: int, fields: ir.Value) -> ir.Value:
    """What the sum of a scale group starts from, i32 of each row: -zero times the sum of the record's integers."""
    panel, ints = record.panel, ir.VectorType(I32, record.rows)
    if record.crossed:
        total = load(b, at(b, fields, CROSSED), I32)
        if panel.zero == 0:
            total = b.sub(total, load(b, at(b, fields, SUM8), I32))
        return b.add(splat(b, total, record.rows), record.crossing())
    if panel.zero == 0 or (panel.bits == 8 and not dots_of(1).unsigned):
        return const(ints, 0)
    if panel.group == 32:
        offset, shift = {8: SUM8, 16: SUM16, 128: SUM128}[panel.zero], 0
    else:
        offset, shift = HALVES[group], {32: 0, 4: 3}[panel.zero]
    total = splat(b, load(b, at(b, fields, offset), I32), record.rows)
    return b.ashr(total, const(ints, shift)) if shift else total  # exact: a multiple of 32


def _sums(b: ir.IRBuilder, record: Record, group: int, terms: int, x: list[ir.Value]) -> list[ir.Value]:
    """Integer sums of a scale group, for each token i32 of each row; of two terms the first counts 256 times."""
    panel, rows, dots = record.panel, record.rows, dots_of(len(x), terms)
    passes = 1 if TIER.pairs else terms
    ints, quads = ir.VectorType(I32, rows), panel.group // 4
    zeros = [const(ints, 0)] * len(x)
    order = range(group * quads, (group + 1) * quads)

    def starts() -> list[ir.Value]:
        return [_start(b, record, group, at(b, token, BLOCK * terms)) for token in x]

    if record.crossed:
        sums = dots(b, panel, starts())
        # those not crossed first, since scales are multiplied, too, and come last: 3.9 cycles instead of 4.3
        for p in [*range(record.crossed, 4), *range(record.crossed)]:
            pair = record.quad(p, dots.unsigned), record.quad(p + 4, dots.unsigned)
            if p < record.crossed:
                sums.cross(p, *pair, x)
            else:
                for i, quad in enumerate(pair):
                    sums.add(p + 4 * i, quad, x)
        return [sums.total(t) for t in range(len(x))]
    if not TIER.x86 or len(x) <= TOGETHER:  # both terms at once: sums that do not wait for each other
        # AArch64 has few registers: weights stay in none for long
        many = TIER.x86 or panel.group == 16 or len(x) * terms > 2
        both = [dots(b, panel, zeros if term < passes - 1 else starts()) for term in range(passes)]
        for j in order if many else sorted(order, key=lambda j: (j % panel.planes[0] // dots.step, j)):
            if not TIER.x86 and many and j == 4:
                record.forget()
            w = record.quad(j, dots.unsigned)
            for term, sums in enumerate(both):
                sums.add(j, w, [at(b, token, BLOCK * term) for token in x])
        totals = [[sums.total(t) for t in range(len(x))] for sums in both]
        return [
            functools.reduce(lambda s, n: b.add(b.shl(s, const(ints, 8)), n), of) for of in zip(*totals, strict=True)
        ]
    totals = zeros
    for term in range(passes):
        if term:
            totals = [b.shl(s, const(ints, 8)) for s in totals]
        if term == passes - 1:
            totals = [b.add(s, start) for s, start in zip(totals, starts(), strict=True)]
        sums = dots(b, panel, totals)
        for j in order:
            if rows > ROWS and j % (BLOCK // 8) == 0:  # LLVM would put sums on the stack to keep the planes
                record.forget()
            sums.add(j, record.quad(j, dots.unsigned), [at(b, token, BLOCK * term) for token in x])
        totals = [sums.total(t) for t in range(len(x))]
    return totals


def _fetch_ahead(
    b: ir.IRBuilder, panel: Panel, w: ir.Value, within: ir.Value, apart: ir.Value, tokens: int, groups: int
) -> None:
    """Ask for what comes after a block of the record at w."""
    share = panel.record_bytes // panel.blocks  # of each block, of scales and planes alike: none is left out
    place, coming = b.add(w, b.mul(within, ir.Constant(I64, share))), []
    if tokens > 8 or groups > 1:  # the next row groups, which a full tile has time to fetch
        coming = [b.add(place, b.mul(apart, ir.Constant(I64, groups + i))) for i in range(groups)]
    elif tokens in FEW:
        coming = [at(b, place, AHEAD)]
    for start in coming:
        for line in range(0, share, 64):
            emit_prefetch(b, at(b, start, line))


def _int8_block(
    b: ir.IRBuilder, record_of: Callable[[int, int], Record], terms: int, x: ir.Value, acc: Sums,
    fetch: Callable[[], None] | None = None,
) -> None:  # fmt: skip
    """acc[t][i] += dot product of a block with token t, part i of the rows.

    record_of: its record from the first row on, of so many; x: address of the first token's record; fetch: asks for
    what comes next, behind what is read of this block at once (before it, a token of 1.7B Q4_K_M took 7 % longer).
    """
    rows = acc[0][0].type.pointee.count
    for part in range(len(acc[0])):
        # hidden, LLVM does not keep an address in a register for each block of a record that it has unrolled
        first = emit_hidden(b, x) if part or (terms == 2 and len(acc) == 1) else x
        records = [at(b, first, record_bytes(terms) * t) for t in range(len(acc))]
        record = record_of(part * rows, rows)
        panel = record.panel
        if len(acc) <= 2 and TIER.x86 and (panel.blocks > 1 or len(panel.planes) > 1):  # one plane is read in order
            record.read()
        if fetch and not part:
            fetch()
        for group in range(BLOCK // panel.group):
            sums = _sums(b, record, group, terms, records)
            scale, minimum = record.scale(group)
            if minimum is not None and panel.group == 16:  # the record has -32 times the sum of a half
                minimum = b.fmul(minimum, const(record.floats, -1 / 32))
            for s, token, parts in zip(sums, records, acc, strict=True):
                fields, a = at(b, token, BLOCK * terms), parts[part]
                d = broadcast_f32(b, at(b, fields, D), rows)
                total = emit_fma(b, b.sitofp(s, record.floats), b.fmul(scale, d), b.load(a), fine=False)
                if minimum is not None and panel.group == 32:
                    total = emit_fma(b, minimum, broadcast_f32(b, at(b, fields, DSUM), rows), total)
                elif minimum is not None:
                    half = splat(b, load(b, at(b, fields, HALVES[group]), I32), rows)
                    total = emit_fma(b, b.sitofp(half, record.floats), b.fmul(minimum, d), total, fine=False)
                b.store(total, a)


def _zeros(b: ir.IRBuilder, count: int, tokens: int, parts: int, lanes: ir.VectorType) -> list[Sums]:
    """So many chains of sums, all 0."""
    chains = [[[cgutils.alloca_once(b, lanes) for _ in range(parts)] for _ in range(tokens)] for _ in range(count)]
    for a in itertools.chain(*itertools.chain(*chains)):
        b.store(const(lanes, 0.0), a)
    return chains


def _write(b: ir.IRBuilder, chains: list[Sums], y: ir.Value, y_stride: ir.Value, add: ir.Value) -> None:
    """y (+)= the sums of all chains."""
    outs = [b.add(y, b.mul(y_stride, ir.Constant(I64, 4 * t))) for t in range(len(chains[0]))]
    totals = []
    for sums in zip(*chains, strict=True):
        totals.append(functools.reduce(b.fadd, (join(b, [b.load(a) for a in chain]) for chain in sums)))
    with b.if_else(b.icmp_signed("!=", add, ir.Constant(I64, 0))) as (then, otherwise):
        with then:
            for out, total in zip(outs, totals, strict=True):
                store(b, out, b.fadd(total, load(b, out, total.type)))
        with otherwise:
            for out, total in zip(outs, totals, strict=True):
                store(b, out, b.fadd(total, const(total.type, 0.0)))


def _emit_tile(
    b: ir.IRBuilder, panel: Panel, terms: int, tokens: int, groups: int,
    w: ir.Value, nb: ir.Value, x: ir.Value, slots: ir.Value, y: ir.Value, y_stride: ir.Value, add: ir.Value,
) -> None:  # fmt: skip
    """`tokens` columns of y times `groups` row groups. terms as in make_matmul; 0 needs a float panel."""
    rows = dots_of(tokens, terms).rows(tokens * terms) if terms and groups == 1 else ROWS * groups
    chains = _zeros(b, 1 if terms else 2, tokens, max(ROWS // rows, 1), ir.VectorType(F32, rows))
    if terms:
        step = b.mul(slots, ir.Constant(I64, record_bytes(terms)))
        apart = b.mul(b.sdiv(nb, ir.Constant(I64, panel.blocks)), ir.Constant(I64, panel.record_bytes))

        def accumulate(record: ir.Value, within: ir.Value, block: ir.Value) -> None:
            _int8_block(
                b, lambda first, rows: Record(b, panel, record, within, apart, first, rows), terms,
                b.add(x, b.mul(block, step)), chains[0],
                lambda: _fetch_ahead(b, panel, record, within, apart, tokens, groups),
            )  # fmt: skip

        # a single token: what the blocks of a record share is then loaded and converted once
        each_block(b, panel, w, nb, accumulate, unrolled=tokens == 1)
    else:
        size, step = panel.record_bytes // BLOCK, b.mul(slots, ir.Constant(I64, 4))
        with cgutils.for_range(b, b.mul(nb, ir.Constant(I64, BLOCK // FLOAT_STEP)), intp=I64) as loop:
            k = b.mul(loop.index, ir.Constant(I64, FLOAT_STEP))
            start, first = b.add(w, b.mul(k, ir.Constant(I64, size))), b.add(x, b.mul(k, step))
            if tokens in FEW:
                emit_prefetch(b, at(b, start, AHEAD))
            for kk in range(FLOAT_STEP):
                weights = emit_load_as_f32(b, at(b, start, size * kk), panel.name)
                row = b.add(first, b.mul(step, ir.Constant(I64, kk)))
                for t, (a,) in enumerate(chains[kk % 2]):
                    x_k = broadcast_f32(b, at(b, row, 4 * t))
                    b.store(emit_fma(b, weights, x_k, b.load(a), fine=panel.name != "F16"), a)
    _write(b, chains, y, y_stride, add)


def _emit_spread_tile(
    b: ir.IRBuilder, spread: Spread, tokens: int,
    w: ir.Value, nb: ir.Value, x: ir.Value, slots: ir.Value, y: ir.Value, y_stride: ir.Value, add: ir.Value,
    sums: ir.Value, begun: ir.Value, more: ir.Value, coming: ir.Value,
) -> None:  # fmt: skip
    """`tokens` columns of y times the row groups that lie spread at w, for nb of their blocks.

    sums: f32 (tokens, 16 TIER.abreast), taken from there if `begun`, left there instead of in y if there are `more`
    blocks to come; coming: address of what is read soon, LINES lines of it for each block.
    """
    rows, zero = ROWS * TIER.abreast, ir.Constant(I64, 0)
    chains = _zeros(b, 1, tokens, 1, ir.VectorType(F32, rows))
    places = [(a, at(b, sums, 4 * rows * t)) for t, (a,) in enumerate(chains[0])]
    with b.if_then(b.icmp_signed("!=", begun, zero)):
        for a, place in places:
            b.store(load(b, place, a.type.pointee), a)
    with cgutils.for_range(b, nb, intp=I64) as loop:
        line = b.add(coming, b.mul(loop.index, ir.Constant(I64, 64 * LINES)))
        for i in range(LINES):
            emit_prefetch(b, at(b, line, 64 * i), level=2)
        record = b.add(w, b.mul(loop.index, ir.Constant(I64, TIER.abreast * spread.record_bytes)))
        block = b.add(x, b.mul(loop.index, b.mul(slots, ir.Constant(I64, record_bytes(spread.terms)))))
        _int8_block(b, lambda _, rows: SpreadRecord(b, spread, record, rows), spread.terms, block, chains[0])
    with b.if_else(b.icmp_signed("!=", more, zero)) as (then, otherwise):
        with then:
            for a, place in places:
                store(b, place, b.load(a))
        with otherwise:
            _write(b, chains, y, y_stride, add)


def make_tile(panel: Panel, terms: int, sizes: Mapping[int, int]) -> Any:
    """Intrinsic tile(tokens, w, nb, x, slots, y, y_stride, add): so many columns of y, a key of `sizes`, times its
    value of row groups.
    """

    def emit(b: ir.IRBuilder, tokens: ir.Value, *arguments: ir.Value) -> None:
        for size, groups in sizes.items():
            with b.if_then(b.icmp_signed("==", tokens, ir.Constant(I64, size))):
                _emit_tile(b, panel, terms, size, groups, *arguments)

    return word(void, [i64] * 8, emit)


# ---- whole matrices --------------------------------------------------------------------------------------------------


def make_matmul(name: str, terms: int) -> Callable[..., None]:
    """matmul(w, nb, g0, g1, x, n, y, y_stride, add, scratch): row groups g0..g1 of y (+)= x W^T.

    name: format; terms: 1 int8, 2 int8x2, 0 f32 activations. y_stride in floats. scratch: block.unpack_bytes(32 nb),
    for what is spread, or f32 (32 nb, 16) of the f32 mode of quantised formats: `unpack` and then the f32 tile.
    """
    panel = PANELS[name]
    if terms == 0 and not panel.is_float:
        return _make_unpacked_matmul(name)
    full = token_tile(TIER, terms)
    size = record_bytes(terms) if terms else 4  # bytes from token to token
    # bytes need no unpacking; AArch64's tiles are small, too, but there was no machine to time it on
    spread = terms > 0 and TIER.x86 and (panel.planes != (8,) or TIER.abreast > 1)
    groups = TIER.abreast if terms else 1
    tiles = functools.partial(make_tile, panel, terms)
    packed = tiled(tiles, full, groups, panel.record_bytes // panel.blocks, size, size if terms else BLOCK * size)
    return _make_spread_matmul(panel, terms, packed) if spread else packed


def tiled(
    make: Callable[[Mapping[int, int]], Any], full: int, groups: int, group_record: int, slot: int, token_block: int
) -> Callable[..., None]:
    """matmul(...) of tiles of up to `full` tokens, full ones of `groups` row groups, each from `make` as `make_tile`
    makes them. Bytes: group_record of a block of a row group, slot from token to token of a tile, token_block of a
    token's block.
    """
    tile = make({t: 1 for t in (1, 2, 4, 8) if t < full or groups > 1} | {full: groups})
    alone = make({1: 1})  # a single token waits for memory: a choice of a tile for every row group cost it 3 %
    one = one_tile(TIER) if groups > 1 else 0  # fewer tokens are one tile

    def matmul(w, nb, g0, g1, x, n, y, y_stride, add, scratch):  # type: ignore[no-untyped-def]
        if n == 1:
            for g in range(g0, g1):
                alone(1, w + g * nb * group_record, nb, x, 1, y + g * ROWS * 4, y_stride, add)
            return
        most = full if n >= one else n
        for t0 in range(0, n, max(most, 1)):
            slots, first = min(most, n - t0), x + t0 * nb * token_block
            g = g0
            while g < g1:
                whole = slots == full and g + groups <= g1
                j = 0
                while j < slots:
                    tokens = full if whole else 8
                    while tokens > slots - j:
                        tokens //= 2
                    out = y + ((t0 + j) * y_stride + g * ROWS) * 4
                    tile(tokens, w + g * nb * group_record, nb, first + j * slot, slots, out, y_stride, add)
                    j += tokens
                g += groups if whole else 1

    return matmul


def _make_spread_matmul(panel: Panel, terms: int, packed: Callable[..., None]) -> Callable[..., None]:
    """matmul(...) that spreads TIER.abreast row groups at a time for all whole tiles of tokens; packed: for the rest.

    scratch    [record of each row group] of up to SPREAD_BLOCKS blocks     as many as L1 has room for
               [sums of up to SPREAD_TOKENS tokens]                         until all blocks have passed
    """
    full, groups, size, to = token_tile(TIER, terms), TIER.abreast, record_bytes(terms), Spread(panel, terms)
    panel_bytes, spread_bytes = panel.record_bytes // panel.blocks, groups * to.record_bytes
    lines, sums_bytes, record = 64 * LINES, 4 * ROWS * groups, to.record_bytes
    least = max(2 * full, 12 * groups)  # tokens: for fewer, unpacking once costs more than it saves
    spread, rest = make_spread(to), kernel(packed)
    tile = word(void, [i64] * 11, lambda b, *arguments: _emit_spread_tile(b, to, full, *arguments))

    @kernel
    def together(w, nb, g, x, n, y, y_stride, add, scratch):  # type: ignore[no-untyped-def]
        """Row groups g .. g + groups - 1 of y, for n tokens in whole tiles; w: the first one."""
        parts = (nb + SPREAD_BLOCKS - 1) // SPREAD_BLOCKS
        sums = scratch + SPREAD_BLOCKS * spread_bytes
        next_groups = w + groups * nb * panel_bytes
        coming = next_groups
        for part in range(parts):
            first, end = part * nb // parts, (part + 1) * nb // parts
            for i in range(groups):
                spread(w + i * nb * panel_bytes, first, end, scratch + i * record)
            for t in range(0, n, full):
                place, more = x + (t * nb + first * full) * size, nb - end
                out = y + (t * y_stride + g * ROWS) * 4
                tile(scratch, end - first, place, full, out, y_stride, add, sums + t * sums_bytes, first, more, coming)
                if coming < next_groups + groups * nb * panel_bytes:
                    coming += (end - first) * lines

    def matmul(w, nb, g0, g1, x, n, y, y_stride, add, scratch):  # type: ignore[no-untyped-def]
        whole = n // full * full if n >= least else 0
        last = g1 - (g1 - g0) % groups if whole else g0
        for t in range(0, whole, SPREAD_TOKENS):
            count = min(whole - t, SPREAD_TOKENS)
            for g in range(g0, last, groups):
                row_group, out = w + g * nb * panel_bytes, y + 4 * t * y_stride
                together(row_group, nb, g, x + t * nb * size, count, out, y_stride, add, scratch)
        rest(w, nb, g0, last, x + whole * nb * size, n - whole, y + 4 * whole * y_stride, y_stride, add, scratch)
        rest(w, nb, last, g1, x, n, y, y_stride, add, scratch)

    return matmul


def _make_unpacked_matmul(name: str) -> Callable[..., None]:
    unpack, group_record = make_unpack(name), PANELS[name].record_bytes // PANELS[name].blocks
    float_matmul = kernel(make_matmul("F32", 0))

    def matmul(w, nb, g0, g1, x, n, y, y_stride, add, scratch):  # type: ignore[no-untyped-def]
        for g in range(g0, g1):
            unpack(w + g * nb * group_record, nb, scratch)
            float_matmul(scratch, nb, 0, 1, x, n, y + g * ROWS * 4, y_stride, add, 0)

    return matmul


PEAK = i64(i64, i64)  # address, steps
PEAK_QUADS = 8  # as many as a block has
PEAK_BYTES = 8192  # of activations and weights that peak() reads: less than any L1 cache


def make_peak(terms: int) -> Callable[[int, int], int]:
    """peak(address, steps): the inner loop of a prefill tile alone, all data in the L1 cache: what a core can multiply.

    terms: 1 int8, 0 f32. A step is PEAK_QUADS x 4 columns of ROWS rows for peak_tokens(TIER, terms) tokens. The sum is
    returned so that nothing is dropped.
    """
    tokens, lanes = peak_tokens(TIER, terms), V16I32 if terms else V16F32

    def emit(b: ir.IRBuilder, address: Any, steps: Any) -> ir.Value:
        acc = [cgutils.alloca_once(b, lanes) for _ in range(tokens)]
        for a in acc:
            b.store(const(lanes, 0), a)
        with cgutils.for_range(b, steps, intp=I64) as loop:
            turn = b.and_(loop.index, ir.Constant(I64, 3))
            w = b.add(at(b, address, PEAK_BYTES // 2), b.mul(turn, ir.Constant(I64, PEAK_BYTES // 8)))
            first = emit_hidden(b, address)  # else all of x is kept on the stack, 64 bytes a value
            x = [at(b, first, 4 * 4 * PEAK_QUADS * t) for t in range(tokens)]
            if terms:
                dots = dots_of(tokens)(b, PANELS["Q4_0"], [b.load(a) for a in acc])
                for j in range(PEAK_QUADS):
                    dots.add(j, load(b, at(b, w, 64 * j), V64I8), x)
                for t, a in enumerate(acc):
                    b.store(dots.total(t), a)
            else:
                for j in range(4 * PEAK_QUADS):
                    weights = load(b, at(b, w, 64 * (j % PEAK_QUADS)), V16F32)
                    for t, a in zip(x, acc, strict=True):
                        b.store(emit_fma(b, weights, broadcast_f32(b, at(b, t, 4 * j)), b.load(a)), a)
        total = const(V16I32, 0)
        for a in acc:
            total = b.add(total, b.bitcast(b.load(a), V16I32))
        return total

    loop = word(i32x16, [i64, i64], emit)

    def peak(address, steps):  # type: ignore[no-untyped-def]
        return i64(vsum_i32(loop(address, steps)))

    return peak


ROW = void(i64, i64, i64, i64, i64)  # w, nb, row, out, scratch


def make_row(name: str) -> Callable[..., None]:
    """row(w, nb, row, out, scratch): one row of the matrix as f32 (32 nb,): an embedding look-up. scratch: f32 (32 nb,
    16).
    """
    unpack, group_record = make_unpack(name), PANELS[name].record_bytes // PANELS[name].blocks

    def row(w, nb, row, out, scratch):  # type: ignore[no-untyped-def]
        unpack(w + (row // ROWS) * nb * group_record, nb, scratch)
        for k in range(nb * BLOCK):
            put_f32(out + 4 * k, get_f32(scratch + (k * ROWS + row % ROWS) * 4))

    return row
