"""Integer dot products, one class per instruction set; and what else of integers a tier does in its own way.

A quad of weights is 64 x i8, 16 rows x 4 k (panels.py). All sums are exact, so every class gives the same integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from llvmlite import ir

from .jit import TIER
from .panels import ROWS, Panel
from .simd import I8, I16, I32, I64, at, const, declare, emit_rint, load, splat

V64I8 = ir.VectorType(I8, 64)
V8I8, V16I8, V8I16, V4I32, V2I64 = (ir.VectorType(t, n) for t, n in ((I8, 8), (I8, 16), (I16, 8), (I32, 4), (I64, 2)))


def pieces(b: ir.IRBuilder, value: ir.Value, count: int) -> list[ir.Value]:
    """A vector cut into equal parts."""
    lanes = value.type.count // count
    return [shuffle(b, value, value, range(i * lanes, (i + 1) * lanes)) for i in range(count)] if count > 1 else [value]


def join(b: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
    """The inverse of `pieces`, of a power of two."""
    while len(parts) > 1:
        parts = [shuffle(b, low, high, range(low.type.count * 2)) for low, high in zip(*[iter(parts)] * 2, strict=True)]
    return parts[0]


def shuffle(b: ir.IRBuilder, x: ir.Value, y: ir.Value, lanes: Iterable[int]) -> ir.Value:
    """Lanes of x, then of y, by number."""
    index = [*lanes]
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(index)), index))


def _by_register(b: ir.IRBuilder, name: str, result: ir.VectorType, *args: ir.Value) -> ir.Value:
    """An x86 intrinsic on whole values, register by register; `name` has {bits} where the width goes."""
    width = 32 * TIER.row_lanes
    count = result.count * result.element.width // width
    cut = [pieces(b, a, count) for a in args]
    part = ir.VectorType(result.element, result.count // count)
    function = declare(b, name.format(bits=width), part, [c[0].type for c in cut])
    return join(b, [b.call(function, [c[i] for c in cut]) for i in range(count)])


_SHUFFLE = {4: "llvm.x86.ssse3.pshuf.b.128", 8: "llvm.x86.avx2.pshuf.b", 16: "llvm.x86.avx512.pshuf.b.512"}

_SIGN = {4: "llvm.x86.ssse3.psign.b.128", 8: "llvm.x86.avx2.psign.b"}

_MADDUBS = {
    4: "llvm.x86.ssse3.pmadd.ub.sw.128", 8: "llvm.x86.avx2.pmadd.ub.sw", 16: "llvm.x86.avx512.pmaddubs.w.512",
}  # fmt: skip

_PAIRS = {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}


def emit_half_sums(b: ir.IRBuilder, q: ir.Value) -> ir.Value:
    """Sums of 16 x i8 each in every fourth lane of i32; made positive, bytes are what CPUs have a sum of."""
    kind, positive = ir.VectorType(I32, q.type.count // 4), b.xor(q, const(q.type, -128))
    if not TIER.x86:
        total = const(kind, 0)
        for i, part in enumerate(pieces(b, positive, q.type.count // 16)):
            wide = b.zext(part, ir.VectorType(I32, 16))
            half = b.call(declare(b, "llvm.vector.reduce.add.v16i32", I32, [wide.type]), [wide])
            total = b.insert_element(total, half, ir.Constant(I32, 4 * i))
    else:
        bits = min(32 * TIER.row_lanes, 8 * q.type.count)
        parts = pieces(b, positive, 8 * q.type.count // bits)
        of_eight = declare(b, _SAD[bits], ir.VectorType(I64, bits // 64), [parts[0].type] * 2)
        eights = b.bitcast(join(b, [b.call(of_eight, [p, const(p.type, 0)]) for p in parts]), kind)
        total = b.add(eights, shuffle(b, eights, eights, [i ^ 2 for i in range(kind.count)]))
    return b.sub(total, const(kind, 128 * 16))


def emit_nearest(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """f32 to the nearest i32, ties to even, of a magnitude below 2^31."""
    kind = ir.VectorType(I32, x.type.count)
    if not TIER.x86:
        return b.fptosi(emit_rint(b, x), kind)
    if TIER.row_lanes < 16:
        return _by_register(b, _NEAREST[TIER.row_lanes], kind, x)
    mask = ir.IntType(16)
    parts = []
    for part in pieces(b, x, x.type.count // 16):
        of = ir.VectorType(I32, 16)
        function = declare(b, "llvm.x86.avx512.mask.cvtps2dq.512", of, [part.type, of, mask, I32])
        parts.append(b.call(function, [part, const(of, 0), ir.Constant(mask, -1), ir.Constant(I32, 4)]))
    return join(b, parts)


_NEAREST = {4: "llvm.x86.sse2.cvtps2dq", 8: "llvm.x86.avx.cvt.ps2dq.256"}
_SAD = {128: "llvm.x86.sse2.psad.bw", 256: "llvm.x86.avx2.psad.bw", 512: "llvm.x86.avx512.psad.bw.512"}


def look_up(b: ir.IRBuilder, table: list[int], index: ir.Value) -> ir.Value:
    """table[index] of many i8 in 0..15: a shuffle of bytes, or as many selects where the tier has none."""
    if not TIER.x86:
        tbl = declare(b, "llvm.aarch64.neon.tbl1.v16i8", V16I8, [V16I8, V16I8])
        parts = pieces(b, index, index.type.count // 16)
        return join(b, [b.call(tbl, [ir.Constant(V16I8, table), part]) for part in parts])
    if TIER.dot != "plain":
        lanes = ir.Constant(index.type, table * (index.type.count // 16))  # the shuffle stays within 16 bytes
        return _by_register(b, _SHUFFLE[TIER.row_lanes], index.type, lanes, index)
    value = const(V64I8, table[0])
    for i, level in enumerate(table[1:], 1):
        value = b.select(b.icmp_unsigned("==", index, const(V64I8, i)), const(V64I8, level), value)
    return value


def emit_pairs(b: ir.IRBuilder, total: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    """total[i] + x[2i] y[2i] + x[2i + 1] y[2i + 1]: i32 and twice as many i16; exact while it fits i32."""
    if TIER.dot.startswith("vnni"):
        return _by_register(b, "llvm.x86.avx512.vpdpwssd.{bits}", total.type, total, x, y)
    if TIER.x86:
        return b.add(total, _by_register(b, _PAIRS[TIER.row_lanes], total.type, x, y))
    for parity in (0, 1):  # smlal
        lanes = range(parity, x.type.count, 2)
        mine, theirs = (b.sext(shuffle(b, v, v, lanes), total.type) for v in (x, y))
        total = b.add(total, b.mul(mine, theirs))
    return total


class Dots:
    """Sums of quad products of one scale group for some tokens; subclasses are instruction sets.

    `add(j, w, x)` takes quad j of the weights and the address of each token's block of 32 activations; `total(i)` gives
    the sum, i32 of each row.

    Attributes:
        unsigned: 8-bit weights are wanted with 128 added.
        step: adjacent quads that are wanted one after the other.
    """

    unsigned = False
    step = 1

    @staticmethod
    def rows(sums: int) -> int:
        """How many of the 16 rows to take at once, where each has so many sums: tokens times terms."""
        return ROWS

    def __init__(self, b: ir.IRBuilder, panel: Panel, starts: list[ir.Value]) -> None:
        self.b, self.bits, self.lanes = b, panel.bits, starts[0].type.count if starts else ROWS
        self.shorts = ir.VectorType(I16, 2 * self.lanes)
        self.sums = list(starts)

    def add(self, j: int, w: ir.Value, x: list[ir.Value]) -> None:
        raise NotImplementedError

    def total(self, i: int) -> ir.Value:
        return self.sums[i]

    def _x(self, address: ir.Value, j: int) -> ir.Value:
        """Quad j of a token's activations for all rows."""
        return splat(self.b, load(self.b, at(self.b, address, 4 * j), I32), self.lanes)


def emit_dot(b: ir.IRBuilder, total: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
    """total[i] + the four products of lane i of unsigned u and signed s, bytes (vpdpbusd)."""
    kind = total.type
    width = min(32 * kind.count, 32 * TIER.row_lanes)
    count = 32 * kind.count // width
    cut = [pieces(b, a, count) for a in (total, u, s)]
    function = declare(b, f"llvm.x86.avx512.vpdpbusd.{width}", cut[0][0].type, [c[0].type for c in cut])
    return join(b, [b.call(function, [c[i] for c in cut]) for i in range(count)])


class VnniDots(Dots):
    """vpdpbusd: unsigned weights x signed activations, four products into i32."""

    unsigned = True

    def add(self, j: int, w: ir.Value, x: list[ir.Value]) -> None:
        b = self.b
        for i, address in enumerate(x):
            quad, total = b.bitcast(self._x(address, j), w.type), self.sums[i]
            self.sums[i] = emit_dot(b, total, w, quad)

    def cross(self, p: int, u: ir.Value, s: ir.Value, x: list[ir.Value]) -> None:
        """Add quads p and p + 4 crossed, from their factors u and s (unpack.py)."""
        b = self.b
        for i, address in enumerate(x):
            low, high = (b.bitcast(self._x(address, j), u.type) for j in (p, p + 4))
            self.sums[i] = emit_dot(b, self.sums[i], b.add(u, high), b.add(s, low))


class MaddubsDots(Dots):
    """vpmaddubsw: products of two neighbours into i16, which holds 32767 / (2 x 127 u) of them before vpmaddwd widens.

    8-bit weights are signed: |w| and x with the sign of w, since 128-offset weights would saturate the i16.
    """

    @staticmethod
    def rows(sums: int) -> int:
        return 8 if TIER.row_lanes == 4 else ROWS  # sums of 16 rows would take all registers of 4 lanes

    def __init__(self, b: ir.IRBuilder, panel: Panel, starts: list[ir.Value]) -> None:
        super().__init__(b, panel, starts)
        self.room = 32767 // (2 * 127 * (128 if self.bits == 8 else (1 << self.bits) - 1))
        self.held, self.pairs = 0, [None] * len(starts)

    def add(self, j: int, w: ir.Value, x: list[ir.Value]) -> None:
        b = self.b
        if self.held == self.room:
            self._widen()
        magnitude = self._signed_as(w, w) if self.bits == 8 else w
        for i, address in enumerate(x):
            quad = b.bitcast(self._x(address, j), w.type)
            quad = self._signed_as(w, quad) if self.bits == 8 else quad
            pairs = _by_register(b, _MADDUBS[TIER.row_lanes], self.shorts, magnitude, quad)
            self.pairs[i] = pairs if self.pairs[i] is None else b.add(self.pairs[i], pairs)
        self.held += 1

    def _signed_as(self, w: ir.Value, value: ir.Value) -> ir.Value:
        """The value, negated where w is negative; where w is 0 it does not matter."""
        if TIER.row_lanes in _SIGN:
            return _by_register(self.b, _SIGN[TIER.row_lanes], w.type, value, w)
        zero = const(w.type, 0)
        return self.b.select(self.b.icmp_signed("<", w, zero), self.b.sub(zero, value), value)

    def _widen(self) -> None:
        for i, pairs in enumerate(self.pairs):
            self.sums[i] = emit_pairs(self.b, self.sums[i], pairs, const(self.shorts, 1))
        self.held, self.pairs = 0, [None] * len(self.sums)

    def total(self, i: int) -> ir.Value:
        if self.held:
            self._widen()
        return self.sums[i]


class PairDots(Dots):
    """pmaddwd, which every x86-64 has: two products of i16 into i32. Of weights the even and the odd bytes; of
    activations two terms at once, their even and odd k apart. For 8-bit weights no slower than MaddubsDots of one term.
    """

    def add(self, j: int, w: ir.Value, x: list[ir.Value]) -> None:
        even_odd = self._even_odd(w, self.b.ashr if self.bits == 8 else self.b.lshr)
        for i, address in enumerate(x):
            for mine, theirs in zip(even_odd, self._activations(address, j), strict=True):
                self.sums[i] = emit_pairs(self.b, self.sums[i], mine, theirs)

    def _even_odd(self, quad: ir.Value, down: Callable[..., ir.Value]) -> list[ir.Value]:
        wide, eight = self.b.bitcast(quad, self.shorts), const(self.shorts, 8)
        return [down(self.b.shl(wide, eight), eight), down(wide, eight)]

    def _activations(self, address: ir.Value, j: int) -> list[ir.Value]:
        return [self.b.bitcast(self._x(address, 2 * j + odd), self.shorts) for odd in (0, 1)]


class PlainDots(PairDots):
    """The same of one term."""

    def _activations(self, address: ir.Value, j: int) -> list[ir.Value]:
        return self._even_odd(self._x(address, j), self.b.ashr)


# ---- AArch64: registers of 4 rows x 4 k ------------------------------------------------------------------------------


def _fitting(sums: int) -> int:
    """Rows, at least 4, of which so many sums each take up to 8 of the 32 registers, of 4 lanes; f32 sums take 16."""
    return max(rows for rows in (4, 8, 16) if rows == 4 or rows * sums <= 4 * 8)


class SdotDots(Dots):
    """sdot by element: four signed products into i32; a register of activations holds four quads."""

    @staticmethod
    def rows(sums: int) -> int:
        return _fitting(sums)

    def __init__(self, b: ir.IRBuilder, panel: Panel, starts: list[ir.Value]) -> None:
        super().__init__(b, panel, [])
        self.registers = starts[0].type.count // 4  # of a quad of weights, and of sums
        self.parts = [pieces(b, start, self.registers) for start in starts]

    def _quad(self, address: ir.Value, j: int) -> ir.Value:
        """Quad j of a token's activations, four times; LLVM loads each register once."""
        four = load(self.b, at(self.b, address, 16 * (j // 4)), V4I32)
        return self.b.bitcast(shuffle(self.b, four, four, [j % 4] * 4), V16I8)

    def add(self, j: int, w: ir.Value, x: list[ir.Value]) -> None:
        sdot = declare(self.b, "llvm.aarch64.neon.sdot.v4i32.v16i8", V4I32, [V4I32, V16I8, V16I8])
        parts = pieces(self.b, w, self.registers)
        for i, address in enumerate(x):
            quad = self._quad(address, j)
            self.parts[i] = [self.b.call(sdot, [s, part, quad]) for s, part in zip(self.parts[i], parts, strict=True)]

    def total(self, i: int) -> ir.Value:
        return join(self.b, self.parts[i])


class SmmlaDots(SdotDots):
    """smmla: 2 rows x 8 k times 8 k x 2 tokens into [row][token] i32; a token without a partner is its own.

    A register of weights is a zip of two adjacent quads, one of activations 8 of one token and 8 of the other.
    """

    step = 2

    def __init__(self, b: ir.IRBuilder, panel: Panel, starts: list[ir.Value]) -> None:
        super().__init__(b, panel, starts)
        self.tokens = [(i, min(i + 1, len(starts) - 1)) for i in range(0, len(starts), 2)]
        self.sums = []  # of two tokens and four rows: [row][token] of the first two rows, of the others
        for pair in self.tokens:
            registers = [*zip(*(self.parts[i] for i in pair), strict=True)]
            self.sums.append([[shuffle(b, *r, rows) for r in registers] for rows in ((0, 4, 1, 5), (2, 6, 3, 7))])

    def add(self, j: int, w: ir.Value, x: list[ir.Value]) -> None:
        b, smmla = self.b, declare(self.b, "llvm.aarch64.neon.smmla.v4i32.v16i8", V4I32, [V4I32, V16I8, V16I8])
        quads = [b.bitcast(part, V4I32) for part in pieces(b, w, self.registers)]
        if j % 2 == 0:
            self.even = quads
            return
        pairs = [*zip(self.even, quads, strict=True)]
        rows = [[b.bitcast(shuffle(b, *pair, z), V16I8) for pair in pairs] for z in ((0, 4, 1, 5), (2, 6, 3, 7))]
        for tokens, sums in zip(self.tokens, self.sums, strict=True):
            first, second = (load(b, at(b, x[i], 16 * (j // 4)), V2I64) for i in tokens)
            both = b.bitcast(shuffle(b, first, second, (j // 2 % 2, 2 + j // 2 % 2)), V16I8)
            for half, parts in enumerate(rows):
                sums[half] = [b.call(smmla, [s, w, both]) for s, w in zip(sums[half], parts, strict=True)]

    def total(self, i: int) -> ir.Value:
        of_token = (0, 2, 4, 6) if i % 2 == 0 else (1, 3, 5, 7)
        return join(self.b, [shuffle(self.b, *pair, of_token) for pair in zip(*self.sums[i // 2], strict=True)])


class SmullDots(SdotDots):
    """smull, smlal: products into i16, which holds 32767 / (127 u) of them before sadalp adds neighbours into i32.

    Two i32 of a row are then added by addp.
    """

    @staticmethod
    def rows(sums: int) -> int:
        return _fitting(2 * sums)

    def __init__(self, b: ir.IRBuilder, panel: Panel, starts: list[ir.Value]) -> None:
        super().__init__(b, panel, starts)
        self.room, self.held = 32767 // (127 * (128 if self.bits == 8 else (1 << self.bits) - 1)), 0
        self.products: list[list[ir.Value | None]] = [[None] * 2 * self.registers for _ in starts]  # of 2 rows x 4 k
        self.halves: list[list[ir.Value | None]] = [[None] * 2 * self.registers for _ in starts]  # of 2 rows x 2

    def add(self, j: int, w: ir.Value, x: list[ir.Value]) -> None:
        b = self.b
        if self.held == self.room:
            self._widen()
        smull = declare(b, "llvm.aarch64.neon.smull.v8i16", V8I16, [V8I8, V8I8])
        rows = pieces(b, w, 2 * self.registers)
        for i, address in enumerate(x):
            quads = pieces(b, self._quad(address, j), 2)
            for r, part in enumerate(rows):
                product, sums = b.call(smull, [part, quads[r % 2]]), self.products[i]
                sums[r] = product if sums[r] is None else b.add(sums[r], product)
        self.held += 1

    def _widen(self) -> None:
        b = self.b
        pairs = declare(b, "llvm.aarch64.neon.saddlp.v4i32.v8i16", V4I32, [V8I16])
        for products, halves in zip(self.products, self.halves, strict=True):
            for r, product in enumerate(products):
                sums = b.call(pairs, [product])
                halves[r] = sums if halves[r] is None else b.add(halves[r], sums)
            products[:] = [None] * len(products)
        self.held = 0

    def total(self, i: int) -> ir.Value:
        if self.held:
            self._widen()
        b, halves = self.b, self.halves[i]
        addp = declare(b, "llvm.aarch64.neon.addp.v4i32", V4I32, [V4I32, V4I32])
        sums = [b.call(addp, [halves[r], halves[r + 1]]) for r in range(0, len(halves), 2)]
        return join(b, [b.add(start, s) for start, s in zip(self.parts[i], sums, strict=True)])


DOTS: dict[str, type[Dots]] = {
    "vnni512": VnniDots,
    "vnni256": VnniDots,
    "maddubs": MaddubsDots,
    "plain": PlainDots,
    "smmla": SmmlaDots,
    "sdot": SdotDots,
    "smull": SmullDots,
}


def dots_of(tokens: int, terms: int = 1) -> type[Dots]:
    """How this tier sums for so many tokens, activations of so many int8 terms."""
    if TIER.pairs and terms == 2:
        return PairDots
    return SdotDots if TIER.dot == "smmla" and tokens == 1 else DOTS[TIER.dot]
