"""Panel bytes -> quads and scales: where a record's planes are, and what is unpacked for more than one use.

For many tokens a tier's `abreast` row groups are unpacked at a time, a part of their k that stays in L1, and all tokens
pass over it. (Unpacked for each tile of three tokens, Q4_0 took 15.7 cycles a block and token with AVX2, now 13.8; Q6_K
25.3, now 17.1.) A record of what is spread is a block of 16 rows:

    [f32 S][f32 M, if there is one]      16 rows each, of each scale group
    [i32]                                16 rows, if quads are crossed: minus what they add to a sum by themselves
    [8 quads]                            64 B each, as the dot product wants them

Records of the row groups lie side by side, block by block.

Crossed quads. A dot product of four-bit weights n and activations q takes half as many multiplications as it has terms,
and two additions for each (Winograd, "A new algorithm for inner product", 1968): with terms 1 and 2, for any constants,

    (n1 + q2 + 127) (n2 + q1 - 1)  =  n1 q1 + n2 q2  +  (n1 + 127) (n2 - 1)  +  (q2 + 127) (q1 - 1) + 127

Of the two products too many one is of a row alone, the other of a token. Bytes hold both factors, one unsigned and one
signed, as long as q is in -127..113, and quantise sees to that. It pays where a CPU adds in other pipes than it
multiplies in, as Zen 5 does: with three of the four pairs of quads p and p + 4 crossed, it takes 3.9 cycles a block and
token, with two 4.0, with four 4.1, with none 5.0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .dots import dots_of, emit_dot, join, look_up
from .jit import TIER
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
    const,
    emit_half_to_f32,
    emit_hidden,
    emit_load_as_f32,
    load,
    store,
    void,
    word,
)
from .target import LOWEST

i64 = types.int64


class Record:
    """Rows of one block of 16 rows inside IR, or of several row groups: where their planes and scales are.

    record: address of the record; within: number of the block in it; apart: bytes from row group to row group.
    """

    crossed = 0  # pairs of quads that are multiplied crosswise

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


def each_block(
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


# ---- spread for many tokens ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """What the row groups of a panel are spread into, for activations of so many int8 terms."""

    panel: Panel
    terms: int

    @property
    def minima(self) -> bool:
        """Whether a scale group has a minimum."""
        return self.panel.scales in ("dm", "dz", "dm_sub", "dm_sub4")

    @property
    def crossed(self) -> int:
        """Pairs of quads that are crossed."""
        return TIER.crossed if self.panel.planes == (4,) and not self.panel.codebook and self.terms == 1 else 0

    @property
    def quads_at(self) -> int:
        """Where in a record the quads begin."""
        return 4 * ROWS * (BLOCK // self.panel.group * (1 + self.minima) + (self.crossed > 0))

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return self.quads_at + ROWS * BLOCK


class SpreadRecord(Record):
    """The records of a block, of row groups that lie side by side."""

    def __init__(self, b: ir.IRBuilder, spread: Spread, record: ir.Value, rows: int) -> None:
        super().__init__(b, spread.panel, record, ir.Constant(I64, 0), ir.Constant(I64, spread.record_bytes), 0, rows)
        self.spread, self.crossed = spread, spread.crossed

    def quad(self, j: int, unsigned: bool = False) -> ir.Value:
        return self._load(at(self.b, self.scales, self.spread.quads_at + 4 * ROWS * j), self.bytes)

    def forget(self) -> None:
        self.scales = emit_hidden(self.b, self.scales)

    def crossing(self) -> ir.Value:
        """What the sums of crossed quads start from, i32 of each row."""
        place = at(self.b, self.scales, self.spread.quads_at - 4 * ROWS)
        return self._load(place, ir.VectorType(I32, self.rows))

    def _scale(self, group: int) -> tuple[ir.Value, ir.Value | None]:
        place = at(self.b, self.scales, 4 * ROWS * group * (1 + self.spread.minima))
        minimum = self._load(at(self.b, place, 4 * ROWS), self.floats) if self.spread.minima else None
        return self._load(place, self.floats), minimum


def make_spread(to: Spread) -> Any:
    """Intrinsic spread(w, first, end, out): blocks first..end of the row group at w; out: the first one's record."""
    panel, unsigned = to.panel, dots_of(1).unsigned

    def spread(b: ir.IRBuilder, record: Record, out: ir.Value) -> None:
        place = out
        for group in range(BLOCK // panel.group):
            for value in filter(None, record.scale(group)):
                store(b, place, value)
                place = at(b, place, 4 * ROWS)
        quads = [record.quad(j, unsigned) for j in range(BLOCK // 4)]
        if to.crossed:
            alone = const(V16I32, 0)
            for p in range(to.crossed):
                quads[p] = b.sub(quads[p], const(quads[p].type, LOWEST))
                quads[p + 4] = b.sub(quads[p + 4], const(quads[p].type, 1))
                alone = emit_dot(b, alone, quads[p], quads[p + 4])
            store(b, place, b.sub(const(V16I32, 0), alone))
        for j, quad in enumerate(quads):
            store(b, at(b, out, to.quads_at + 4 * ROWS * j), quad)

    def emit(b: ir.IRBuilder, w: ir.Value, first: ir.Value, end: ir.Value, out: ir.Value) -> None:
        blocks = ir.Constant(I64, panel.blocks)
        with cgutils.for_range(b, b.sub(end, first), intp=I64) as loop:
            block = b.add(first, loop.index)
            start = b.add(w, b.mul(b.sdiv(block, blocks), ir.Constant(I64, panel.record_bytes)))
            record = Record(b, panel, start, b.srem(block, blocks), ir.Constant(I64, 0))
            spread(b, record, b.add(out, b.mul(loop.index, ir.Constant(I64, TIER.abreast * to.record_bytes))))

    return word(void, [i64] * 4, emit)


# ---- as floats -------------------------------------------------------------------------------------------------------


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

        each_block(b, panel, w, nb, unpack)

    return word(void, [i64] * 3, emit)
