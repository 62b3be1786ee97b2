"""y = x W^T for every weight format: one tile generator, parameters format x activation mode x instruction set.

Letters: w panel of weights (panels.py), x activations, y f32 (tokens, y_stride); nb blocks of 32 along k; T tokens of a
tile.

Activations are laid out tile by tile, so that a tile reads one stream. For int8 a token's block is a record of 64
bytes, or of 96 with two terms:

    [32 x i8 q]                  x = d q                              one term
    [32 x i8 q1][32 x i8 q2]     x = d q,  q = 256 q1 + q2            two terms
    [32 x i16 q]                 of four k the first, third, second and fourth: two terms of a tier with `pairs`
    then                         f32 d  f32 d*sum  -8*sum  -16*sum  -128*sum  -32*lo  -32*hi  unused     sums are i32
    sum of the 32 q, lo and hi its halves: they take the weights' zero point out of the dot product exactly
    tile of S tokens: [block][token], S = T but for the last tile

    f32 mode: tile of S tokens: [k][token] f32

Order of every sum, the same for any T, thread and CPU: integers inside a block (exact), then one fma per scale group, k
upwards; f32 activations: one chain of fma over the even k, one over the odd (a single token waits less for either, and
reads its weights in one stream), added at the end. T tokens share the load and the unpacking of a quad: weights live in
registers, activations are broadcast from memory.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .dots import V64I8, dots_of, join, look_up
from .jit import TIER, kernel
from .panels import BLOCK, PANELS, ROWS, Panel
from .simd import (
    F32,
    I8,
    I16,
    I32,
    I64,
    V16F32,
    V16I32,
    at,
    broadcast_f32,
    const,
    emit_fma,
    emit_half_to_f32,
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
from .target import record_bytes, token_tile

i64 = types.int64

D, DSUM, SUM8, SUM16, SUM128, LOW32, HIGH32 = range(0, 28, 4)  # byte offsets behind the integers of a record
HALVES = (LOW32, HIGH32)
# A tile of few tokens reads its weights from memory, too slowly for the hardware to look far enough ahead: it is told
FEW, AHEAD = range(TIER.ahead[0], 9), TIER.ahead[1]
TOGETHER = 4  # tokens whose two terms are summed at the same time where there are 16 registers or more
FLOAT_STEP = 2  # k of one round of the f32 tile; with more LLVM keeps the weights of all of them on the stack
Sums = list[list[ir.Value]]  # addresses of f32 sums, of each token by parts of the rows
MATMUL = void(i64, i64, i64, i64, i64, i64, i64, i64, i64, i64)  # w, nb, g0, g1, x, n, y, y_stride, add, scratch


# ---- unpacking: panel bytes -> quads and scales ----------------------------------------------------------------------


class Record:
    """Rows of one block of 16 rows inside IR, or of several row groups: where their planes and scales are.

    record: address of the record; within: number of the block in it; apart: bytes from row group to row group.
    """

    def __init__(
        self, b: ir.IRBuilder, panel: Panel, record: ir.Value, within: ir.Value, apart: ir.Value, first: int = 0,
        rows: int = ROWS,
    ) -> None:  # fmt: skip
        self.b, self.panel, self.apart, self.first, self.rows = b, panel, apart, first, rows
        self.bytes, self.pairs = ir.VectorType(I8, 4 * rows), ir.VectorType(I16, 2 * rows)
        self.halves, self.eights, self.floats = (ir.VectorType(t, rows) for t in (I16, I8, F32))
        self.scales, self.within = record, within
        self.planes = b.add(at(b, record, panel.scale_bytes), b.mul(within, ir.Constant(I64, panel.block_bytes)))
        self.loaded: dict[int, ir.Value] = {}
        self.known: dict[int, tuple[ir.Value, ir.Value | None]] = {}  # scales by group

    def read(self) -> None:
        """Load it here, upwards: the hardware fetches a stream ahead as long as it is read in order."""
        for group in range(BLOCK // self.panel.group):
            self.scale(group)
        for offset in range(0, self.panel.block_bytes, 64):
            self._vector(offset)

    def forget(self) -> None:
        """Load the planes again from here on."""
        self.planes = emit_hidden(self.b, self.planes)
        self.loaded.clear()

    def _vector(self, offset: int) -> ir.Value:
        if offset not in self.loaded:
            self.loaded[offset] = self._load(at(self.b, self.planes, offset + 4 * self.first), self.bytes)
        return self.loaded[offset]

    def _load(self, address: ir.Value, kind: ir.VectorType) -> ir.Value:
        """What lies at an address of the first row group, and there of the others, side by side."""
        b, groups = self.b, max(self.rows // ROWS, 1)
        part = ir.VectorType(kind.element, kind.count // groups)
        return join(b, [load(b, b.add(address, b.mul(self.apart, ir.Constant(I64, i))), part) for i in range(groups)])

    def _field(self, vector: ir.Value, first: int, bits: int, target: int) -> ir.Value:
        """Bits [first, first + bits) of every byte, moved to bit `target`; the others are 0."""
        b = self.b
        # x86 has no byte shift: shift pairs, the mask cuts what came from the neighbour
        lanes = self.pairs if TIER.x86 else self.bytes
        if first != target:
            shift = b.lshr if first > target else b.shl
            vector = b.bitcast(shift(b.bitcast(vector, lanes), const(lanes, abs(first - target))), self.bytes)
        return b.and_(vector, const(self.bytes, ((1 << bits) - 1) << target))

    def quad(self, j: int, unsigned: bool = False) -> ir.Value:
        """Weights of quad j, rows x 4 k of i8: u where it has fewer than 8 bits; else signed, or 128 added."""
        b, panel, offset, low_bits, value = self.b, self.panel, 0, 0, None
        for bits in panel.planes:
            vector = self._vector(offset + 64 * (j % bits))  # a plane of n bits is n vectors
            part = vector if bits == 8 else self._field(vector, bits * (j // bits), bits, low_bits)
            value = part if value is None else b.or_(value, part)
            offset, low_bits = offset + 64 * bits, low_bits + bits
        if panel.codebook:
            return look_up(b, [level + 128 * unsigned for level in panel.codebook], value)
        return b.xor(value, const(self.bytes, 0x80)) if panel.bits == 8 and unsigned else value

    def _f16(self, offset: int) -> ir.Value:
        """The rows' f16 scales at an offset."""
        return emit_half_to_f32(self.b, self._load(at(self.b, self.scales, offset + 2 * self.first), self.halves))

    def _i8(self, index: ir.Value) -> ir.Value:
        """The rows' sub-scales of a number."""
        offset = self.b.mul(index, ir.Constant(I64, ROWS))
        return self._load(at(self.b, self.b.add(self.scales, offset), self.first), self.eights)

    def scale(self, group: int) -> tuple[ir.Value, ir.Value | None]:
        """(S, M) of scale group 0 or 1 of the block, f32 of each row; M is None without minimum."""
        if group not in self.known:
            self.known[group] = self._scale(group)
        return self.known[group]

    def _scale(self, group: int) -> tuple[ir.Value, ir.Value | None]:
        b, panel, floats = self.b, self.panel, self.floats
        if panel.scales == "d":
            return self._f16(0), None
        if panel.scales == "dm":
            return self._f16(0), self._f16(2 * ROWS)
        if panel.scales == "dz":
            d, z = self._f16(0), self._load(at(b, self.scales, 2 * ROWS + self.first), self.eights)
            return d, b.fneg(b.fmul(d, b.uitofp(z, floats)))
        per_block = BLOCK // panel.group
        subs = panel.blocks * per_block
        if panel.scales == "dm_sub":
            parts = []
            for i in range(2):
                sub = self._i8(b.add(self.within, ir.Constant(I64, i * subs)))
                parts.append(b.fmul(self._f16((2 * subs + 2 * i) * ROWS), b.uitofp(sub, floats)))
            return parts[0], b.fneg(parts[1])
        sub = self._i8(b.add(b.mul(self.within, ir.Constant(I64, per_block)), ir.Constant(I64, group)))
        d = self._f16(subs * ROWS)
        if panel.scales == "dm_sub4":
            dmin = self._f16((subs + 2) * ROWS)
            nibbles = b.and_(sub, const(self.eights, 15)), b.lshr(sub, const(self.eights, 4))
            scale, low = (b.fmul(f, b.uitofp(n, floats)) for f, n in zip((d, dmin), nibbles, strict=True))
            return scale, b.fneg(low)
        return b.fmul(d, b.sitofp(sub, floats)), None


def _each_block(
    b: ir.IRBuilder, panel: Panel, w: ir.Value, nb: ir.Value,
    body: Callable[[ir.Value, ir.Value, ir.Value], None], unrolled: bool = False,
) -> None:  # fmt: skip
    """body(address of a record, number of a block in it, number of the block in the row group), k upwards."""
    blocks = ir.Constant(I64, panel.blocks)
    with cgutils.for_range(b, b.sdiv(nb, blocks), intp=I64) as outer:
        record = b.add(w, b.mul(outer.index, ir.Constant(I64, panel.record_bytes)))
        first = b.mul(outer.index, blocks)
        if unrolled or panel.blocks == 1:
            for i in range(panel.blocks):
                body(record, ir.Constant(I64, i), b.add(first, ir.Constant(I64, i)))
        else:
            with cgutils.for_range(b, blocks, intp=I64) as inner:
                body(record, inner.index, b.add(first, inner.index))


# ---- tiles -----------------------------------------------------------------------------------------------------------


def _start(b: ir.IRBuilder, panel: Panel, group: int, fields: ir.Value, rows: int) -> ir.Value:
    """What the sum of a scale group starts from, i32 of each row: -zero times the sum of the record's integers."""
    ints = ir.VectorType(I32, rows)
    if panel.zero == 0 or (panel.bits == 8 and not dots_of(1).unsigned):
        return const(ints, 0)
    if panel.group == 32:
        offset, shift = {8: SUM8, 16: SUM16, 128: SUM128}[panel.zero], 0
    else:
        offset, shift = HALVES[group], {32: 0, 4: 3}[panel.zero]
    total = splat(b, load(b, at(b, fields, offset), I32), rows)
    return b.ashr(total, const(ints, shift)) if shift else total  # exact: a multiple of 32


def _sums(b: ir.IRBuilder, record: Record, group: int, terms: int, x: list[ir.Value]) -> list[ir.Value]:
    """Integer sums of a scale group, for each token i32 of each row; of two terms the first counts 256 times."""
    panel, rows, dots = record.panel, record.rows, dots_of(len(x), terms)
    passes = 1 if TIER.pairs else terms
    ints, quads = ir.VectorType(I32, rows), panel.group // 4
    zeros = [const(ints, 0)] * len(x)
    order = range(group * quads, (group + 1) * quads)

    def starts() -> list[ir.Value]:
        return [_start(b, panel, group, at(b, token, BLOCK * terms), rows) for token in x]

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
            if rows > ROWS and j == BLOCK // 8:  # LLVM would put sums on the stack to keep the planes
                record.forget()
            sums.add(j, record.quad(j, dots.unsigned), [at(b, token, BLOCK * term) for token in x])
        totals = [sums.total(t) for t in range(len(x))]
    return totals


def _int8_block(
    b: ir.IRBuilder, panel: Panel, terms: int, w: ir.Value, within: ir.Value, apart: ir.Value, x: ir.Value, acc: Sums
) -> None:
    """acc[t][i] += dot product of a block of the record at w with token t, part i of the rows.

    apart: bytes from row group to row group; x: address of the first token's record.
    """
    rows = acc[0][0].type.pointee.count
    for part in range(len(acc[0])):
        # hidden, LLVM does not keep an address in a register for each block of a record that it has unrolled
        first = emit_hidden(b, x) if part or (terms == 2 and len(acc) == 1) else x
        records = [at(b, first, record_bytes(terms) * t) for t in range(len(acc))]
        record = Record(b, panel, w, within, apart, part * rows, rows)
        if len(acc) <= 2 and TIER.x86 and (panel.blocks > 1 or len(panel.planes) > 1):  # one plane is read in order
            record.read()
        share = panel.record_bytes // panel.blocks  # of each block, of scales and planes alike: none is left out
        place, coming = b.add(w, b.mul(within, ir.Constant(I64, share))), []
        if rows > ROWS or len(acc) > 8:  # the next row groups, which a full tile has time to fetch
            groups = rows // ROWS
            coming = [b.add(place, b.mul(apart, ir.Constant(I64, groups + i))) for i in range(groups)]
        elif len(acc) in FEW:
            coming = [at(b, place, AHEAD)]
        for start in coming:
            for line in range(0, share, 64):
                emit_prefetch(b, at(b, start, line))
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


def _emit_tile(
    b: ir.IRBuilder, panel: Panel, terms: int, tokens: int, groups: int,
    w: ir.Value, nb: ir.Value, x: ir.Value, slots: ir.Value, y: ir.Value, y_stride: ir.Value, add: ir.Value,
) -> None:  # fmt: skip
    """`tokens` columns of y times `groups` row groups. terms as in make_matmul; 0 needs a float panel."""
    rows = dots_of(tokens, terms).rows(tokens * terms) if terms and groups == 1 else ROWS * groups
    lanes, parts = ir.VectorType(F32, rows), range(max(ROWS // rows, 1))
    count = 1 if terms else 2
    chains: list[Sums] = [[[cgutils.alloca_once(b, lanes) for _ in parts] for _ in range(tokens)] for _ in range(count)]
    for a in itertools.chain(*itertools.chain(*chains)):
        b.store(const(lanes, 0.0), a)
    if terms:
        step = b.mul(slots, ir.Constant(I64, record_bytes(terms)))
        apart = b.mul(b.sdiv(nb, ir.Constant(I64, panel.blocks)), ir.Constant(I64, panel.record_bytes))

        def accumulate(record: ir.Value, within: ir.Value, block: ir.Value) -> None:
            _int8_block(b, panel, terms, record, within, apart, b.add(x, b.mul(block, step)), chains[0])

        # a single token: what the blocks of a record share is then loaded and converted once
        _each_block(b, panel, w, nb, accumulate, unrolled=tokens == 1)
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
    outs = [b.add(y, b.mul(y_stride, ir.Constant(I64, 4 * t))) for t in range(tokens)]
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

    name: format; terms: 1 int8, 2 int8x2, 0 f32 activations. y_stride in floats. scratch: f32 (32 nb, 16), used by the
    f32 mode of quantised formats, which is `unpack` and then the f32 tile.
    """
    panel = PANELS[name]
    if terms == 0 and not panel.is_float:
        return _make_unpacked_matmul(name)
    full = token_tile(TIER, terms)
    size = record_bytes(terms) if terms else 4  # bytes from token to token
    # with sub-scales and minima there is too much to unpack for the six tokens that two row groups leave room for
    groups = TIER.abreast if terms and panel.scales not in ("dm_sub", "dm_sub4") else 1
    tile = make_tile(panel, terms, tile_sizes(full, groups))
    return tiled(tile, full, groups, panel.record_bytes // panel.blocks, size, size if terms else BLOCK * size)


def tile_sizes(full: int, groups: int) -> dict[int, int]:
    """Tokens of the tiles that `tiled` takes, and their row groups."""
    return {t: 1 for t in (1, 2, 4, 8) if t < full} | {full // groups: groups}


def tiled(tile: Any, full: int, groups: int, group_record: int, slot: int, token_block: int) -> Callable[..., None]:
    """matmul(...) of tiles of up to `full` tokens; of so many, as many tiles of `groups` row groups. Bytes:
    group_record of a block of a row group, slot from token to token of a tile, token_block of a token's block.
    """

    def matmul(w, nb, g0, g1, x, n, y, y_stride, add, scratch):  # type: ignore[no-untyped-def]
        for t0 in range(0, n, full):
            slots, first = min(full, n - t0), x + t0 * nb * token_block
            g = g0
            while g < g1:
                whole = slots == full and g + groups <= g1
                j = 0
                while j < slots:
                    tokens = full // groups
                    if not whole:
                        tokens = 8
                        while tokens > slots - j:
                            tokens //= 2
                    out = y + ((t0 + j) * y_stride + g * ROWS) * 4
                    tile(tokens, w + g * nb * group_record, nb, first + j * slot, slots, out, y_stride, add)
                    j += tokens
                g += groups if whole else 1

    return matmul


def make_unpack(name: str) -> Any:
    """Intrinsic unpack(w, nb, out): one row group as f32 (32 nb, 16), the float panel of the same weights."""
    panel = PANELS[name]

    def emit(b: ir.IRBuilder, w: Any, nb: Any, out: Any) -> None:
        def unpack(start: ir.Value, within: ir.Value, block: ir.Value) -> None:
            base = b.add(out, b.mul(block, ir.Constant(I64, BLOCK * ROWS * 4)))
            if panel.is_float:
                for kk in range(BLOCK):
                    value = emit_load_as_f32(b, at(b, start, panel.record_bytes // BLOCK * kk), panel.name)
                    store(b, at(b, base, kk * ROWS * 4), value)
                return
            record = Record(b, panel, start, within, ir.Constant(I64, 0))
            signed = panel.bits == 8
            for j in range(BLOCK // 4):
                scale, minimum = record.scale(4 * j // panel.group)
                quads = b.bitcast(record.quad(j), V16I32)
                for i in range(4):
                    top = b.shl(quads, const(V16I32, 24 - 8 * i))
                    u = b.ashr(top, const(V16I32, 24)) if signed else b.lshr(top, const(V16I32, 24))
                    value = b.sitofp(b.sub(u, const(V16I32, 0 if signed else panel.zero)), V16F32)
                    value = b.fmul(value, scale)
                    if minimum is not None:
                        value = b.fadd(value, minimum)
                    store(b, at(b, base, (4 * j + i) * ROWS * 4), value)

        _each_block(b, panel, w, nb, unpack)

    return word(void, [i64] * 3, emit)


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

    terms: 1 int8, 0 f32. A step is PEAK_QUADS x 4 columns of ROWS rows for token_tile(TIER, terms) tokens. The sum is
    returned so that nothing is dropped.
    """
    tokens, lanes = token_tile(TIER, terms), V16I32 if terms else V16F32

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
