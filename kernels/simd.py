"""SIMD from Python: one vector of 16 lanes, in LLVM's words, with one meaning on every CPU.

    f32x16, i32x16      16 lanes; AVX-512 holds them in one register, AVX2 in two, NEON in four (LLVM splits them)

A lane is a row of a matrix, a position of the KV cache, or one of 16 neighbours in an activation. No fast-math flag is
ever set and every multiply-add that is meant to be fused is written `fma`, so that a sum has one order and one rounding
everywhere. Two layers: `emit_*` functions write LLVM IR and are shared with the tile generators of matmul.py and
attention.py; the intrinsics below them are the same words for Numba code. Addresses are plain int64: kernels see no
arrays.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

from .jit import TIER

LANES = 16
I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
V16F32, V16I32, V16F16 = (ir.VectorType(t, LANES) for t in (F32, I32, F16))


class Vec(types.Type):
    """A Numba type whose value is an LLVM vector; locals of it live in registers."""

    def __init__(self, element: str) -> None:
        self.element = element
        super().__init__(name=f"{element}x{LANES}")


@register_model(Vec)
class _VecModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Vec) -> None:
        super().__init__(dmm, fe_type, {"f32": V16F32, "i32": V16I32}[fe_type.element])


f32x16, i32x16 = Vec("f32"), Vec("i32")


# ---- IR emitters, shared with the tile generators --------------------------------------------------------------------


def splat(b: ir.IRBuilder, scalar: ir.Value, lanes: int = LANES) -> ir.Value:
    """The scalar in every lane."""
    vec = ir.VectorType(scalar.type, lanes)
    one = b.insert_element(ir.Constant(vec, ir.Undefined), scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(one, ir.Constant(vec, ir.Undefined), ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def const(vec: ir.VectorType, value: float | int) -> ir.Constant:
    """The constant in every lane."""
    return ir.Constant(vec, [value] * vec.count)


def pointer(b: ir.IRBuilder, address: ir.Value, element: ir.Type) -> ir.Value:
    """An int64 address as a pointer."""
    return b.inttoptr(address, element.as_pointer())


def at(b: ir.IRBuilder, address: ir.Value, offset: int) -> ir.Value:
    """address + constant offset in bytes."""
    return b.add(address, ir.Constant(I64, offset)) if offset else address


def load(b: ir.IRBuilder, address: ir.Value, what: ir.Type) -> ir.Value:
    """A value from an address of any alignment."""
    value = b.load(pointer(b, address, what))
    value.align = 1
    return value


def store(b: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    """A value to an address of any alignment."""
    b.store(value, pointer(b, address, value.type)).align = 1


def declare(b: ir.IRBuilder, name: str, result: ir.Type, args: Sequence[ir.Type]) -> ir.Function:
    """An LLVM intrinsic by its full name (llvmlite's declare_intrinsic cannot name vector types)."""
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(result, args), name)


def call_llvm(b: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    """llvm.NAME.v16f32 or llvm.NAME.f32 of arguments of one type."""
    kind = args[0].type
    suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else {F32: "f32", F64: "f64"}[kind]
    return b.call(declare(b, f"llvm.{name}.{suffix}", kind, [a.type for a in args]), args)


def emit_fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value, fine: bool = True) -> ir.Value:
    """x * y + z of f32, one rounding. fine: False if x * y is known to be a multiple of 2^-178, as an f32 times an
    integer or an f16 is.

    Where the CPU has none, LLVM would call libm lane by lane. There: in f64 the product is exact, and rounding the sum
    once more to f32 is wrong only if the first rounding ended halfway between two f32. Sums that are halfway are made
    again by `_round_once`; of random numbers one in 2^29, of the first product with an f16, which has 35 bits, one in
    2^11. So are results below the normal f32, whose halves lie elsewhere, unless products are coarse: then f64 has all
    bits of such a sum. (Nor does a result of 0 need care: numbers that cancel have so few bits together.)
    """
    if TIER.fma:
        return call_llvm(b, "fma", x, y, z)
    if not isinstance(x.type, ir.VectorType):
        return _round_once(b, x, y, z)
    f64, i64, i32 = (ir.VectorType(t, x.type.count) for t in (F64, I64, I32))
    total = b.fadd(b.fmul(b.fpext(x, f64), b.fpext(y, f64)), b.fpext(z, f64))
    result, before = b.fptrunc(total, x.type), b.block
    low = b.trunc(b.bitcast(total, i64), i32)
    again = b.icmp_unsigned("==", b.and_(low, const(i32, 0x1FFFFFFF)), const(i32, 0x10000000))
    if fine:
        # 0 < magnitude < 2^-126: 0x80000000 more than magnitude - 1, as signed comparisons are the only ones of SSE2
        magnitude = b.and_(b.bitcast(result, i32), const(i32, 0x7FFFFFFF))
        small = b.icmp_signed("<", b.add(magnitude, const(i32, 0x7FFFFFFF)), const(i32, 0x007FFFFF - (1 << 31)))
        again = b.or_(again, small)
    lanes = ir.IntType(x.type.count)
    rare = b.icmp_unsigned("!=", b.bitcast(again, lanes), ir.Constant(lanes, 0))
    with cgutils.if_unlikely(b, rare):
        once, inside = b.call(_round_once_function(b, x.type), [x, y, z]), b.block
    phi = b.phi(x.type)
    phi.add_incoming(result, before)
    phi.add_incoming(once, inside)
    return phi


def _round_once_function(b: ir.IRBuilder, kind: ir.VectorType) -> ir.Function:
    """`_round_once` of vectors as a function of its own: it is called from everywhere and almost never."""
    function = declare(b, f"smolrun_round_once_{kind.count}", kind, [kind] * 3)
    if not function.blocks:
        function.linkage = "linkonce_odr"
        function.attributes.add("noinline")
        inside = ir.IRBuilder(function.append_basic_block())
        inside.ret(_round_once(inside, *function.args))
    return function


def _round_once(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z of f32 by f64: the sum is rounded to odd (if it is inexact, the neighbour with the odd mantissa), and
    from that, f32's 29 bits away, a second rounding is as good as one (Boldo and Melquiond, "Emulation of FMA and
    correctly rounded sums", 2008).
    """
    many = isinstance(x.type, ir.VectorType)
    f64, i64 = (ir.VectorType(t, x.type.count) if many else t for t in (F64, I64))

    def constant(kind: ir.Type, value: float | int) -> ir.Constant:
        return const(kind, value) if many else ir.Constant(kind, value)

    product, z = b.fmul(b.fpext(x, f64), b.fpext(y, f64)), b.fpext(z, f64)
    total = b.fadd(product, z)
    added = b.fsub(total, product)
    error = b.fadd(b.fsub(product, b.fsub(total, added)), b.fsub(z, added))  # exact (Knuth's two-sum)
    bits = b.bitcast(total, i64)
    even = b.icmp_unsigned("==", b.and_(bits, constant(i64, 1)), constant(i64, 0))
    inexact = b.fcmp_ordered("!=", error, constant(f64, 0.0))  # not so for infinities and NaNs
    outwards = b.icmp_signed(">=", b.xor(bits, b.bitcast(error, i64)), constant(i64, 0))  # of one sign
    odd = b.add(bits, b.select(outwards, constant(i64, 1), constant(i64, -1)))
    return b.fptrunc(b.bitcast(b.select(b.and_(even, inexact), odd, bits), f64), x.type)


def emit_rint(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """f32 vector to the nearest integers, ties to even.

    Where the CPU cannot (before SSE4.1), LLVM would call libm: there the unit of 2^23 is 1, so adding it rounds.
    """
    if TIER.rounds:
        return call_llvm(b, "rint", x)
    unit = const(x.type, 2.0**23)
    big = call_llvm(b, "copysign", unit, x)
    rounded = call_llvm(b, "copysign", b.fsub(b.fadd(x, big), big), x)
    return b.select(b.fcmp_ordered("<", call_llvm(b, "fabs", x), unit), rounded, x)


def emit_half_to_f32(b: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """i16 holding IEEE halves -> f32, exactly.

    Where the CPU has no F16C, `fpext half` would call a function the JIT lacks. There: shift exponent and mantissa into
    place, scale by 2^112 (exact, denormals included), and put infinities and NaNs back.
    """
    ints, floats = (ir.VectorType(t, bits.type.count) for t in (I32, F32))
    if TIER.half:
        return b.fpext(b.bitcast(bits, ir.VectorType(F16, bits.type.count)), floats)
    wide = b.zext(bits, ints)
    magnitude = b.shl(b.and_(wide, const(ints, 0x7FFF)), const(ints, 13))
    scaled = b.fmul(b.bitcast(magnitude, floats), const(floats, 2.0**112))
    special = b.icmp_unsigned(">=", magnitude, const(ints, 0x0F800000))
    fixed = b.select(special, b.or_(magnitude, const(ints, 0x7F800000)), b.bitcast(scaled, ints))
    return b.bitcast(b.or_(fixed, b.shl(b.and_(wide, const(ints, 0x8000)), const(ints, 16))), floats)


def emit_f32_to_half(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """f32x16 -> 16 x i16 holding IEEE halves, to nearest even; too large becomes infinity."""
    v16i16 = ir.VectorType(I16, LANES)
    if TIER.half:
        return b.bitcast(b.fptrunc(value, V16F16), v16i16)
    bits = b.bitcast(value, V16I32)
    magnitude = b.and_(bits, const(V16I32, 0x7FFFFFFF))
    odd = b.and_(b.lshr(magnitude, const(V16I32, 13)), const(V16I32, 1))
    rounded = b.lshr(
        b.add(b.sub(magnitude, const(V16I32, 112 << 23)), b.add(odd, const(V16I32, 0xFFF))), const(V16I32, 13)
    )
    tiny = b.bitcast(b.fadd(b.bitcast(magnitude, V16F32), const(V16F32, 0.5)), V16I32)  # the FPU rounds at 2^-24 for us
    small = b.icmp_unsigned("<", magnitude, const(V16I32, 113 << 23))
    half = b.select(small, b.sub(tiny, const(V16I32, 0x3F000000)), rounded)
    half = b.select(b.icmp_unsigned(">=", magnitude, const(V16I32, 143 << 23)), const(V16I32, 0x7C00), half)
    half = b.select(b.icmp_unsigned(">", magnitude, const(V16I32, 255 << 23)), const(V16I32, 0x7E00), half)
    return b.trunc(b.or_(half, b.lshr(b.and_(bits, const(V16I32, 1 << 31)), const(V16I32, 16))), v16i16)


def emit_load_as_f32(b: ir.IRBuilder, address: ir.Value, element: str) -> ir.Value:
    """16 neighbours stored as "F32", "F16" or "BF16" -> f32x16."""
    if element == "F32":
        return load(b, address, V16F32)
    bits = load(b, address, ir.VectorType(I16, LANES))
    if element == "F16":
        return emit_half_to_f32(b, bits)
    return b.bitcast(b.shl(b.zext(bits, V16I32), const(V16I32, 16)), V16F32)


def emit_f32_to_bf16(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """f32x16 -> i32x16 below 2^16 holding bf16, to nearest even."""
    bits = b.bitcast(value, V16I32)
    odd = b.and_(b.lshr(bits, const(V16I32, 16)), const(V16I32, 1))
    rounded = b.lshr(b.add(bits, b.add(odd, const(V16I32, 0x7FFF))), const(V16I32, 16))
    return b.select(b.fcmp_unordered("uno", value, value), const(V16I32, 0x7FC0), rounded)  # NaN stays NaN


def emit_store_from_f32(b: ir.IRBuilder, address: ir.Value, value: ir.Value, element: str) -> None:
    """f32x16 -> 16 neighbours as "F32", "F16" or "BF16", to nearest even."""
    if element == "F16":
        value = emit_f32_to_half(b, value)
    elif element == "BF16":
        value = b.trunc(emit_f32_to_bf16(b, value), ir.VectorType(I16, LANES))
    store(b, address, value)


def broadcast_f32(b: ir.IRBuilder, address: ir.Value, lanes: int = LANES) -> ir.Value:
    """One f32 of memory in all lanes (an embedded broadcast on AVX-512)."""
    return splat(b, load(b, address, F32), lanes)


def emit_hidden(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The same i64, of which LLVM knows nothing: what was loaded through it before is not kept, but loaded again."""
    return b.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [value], False)


def emit_larger(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger of each pair; y where one is no number."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def emit_smaller(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """The smaller of each pair; y where one is no number."""
    return b.select(b.fcmp_ordered("<", x, y), x, y)


# Vectors whose exp is taken together where registers allow it: one alone mostly waits for itself (Zen 5: 8.9 cycles, of
# four 6.8 each)
AT_ONCE = 4 if TIER.row_lanes == 16 else 1
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def emit_exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e**x of an f32 vector, error below 1 ulp, the same bits on every CPU; x is clamped to [-87.3, 88].

    x = n ln2 + r with |r| <= ln2 / 2; ln2 in two parts so that r is exact; degree-6 polynomial in r (Cephes expf); n
    enters the exponent field.
    """
    kind, ints = x.type, ir.VectorType(I32, x.type.count)
    x = emit_smaller(b, emit_larger(b, x, const(kind, -87.3)), const(kind, 88.0))
    n = emit_rint(b, b.fmul(x, const(kind, 1.44269504088896341)))
    r = emit_fma(b, n, const(kind, 2.12194440e-4), emit_fma(b, n, const(kind, -0.693359375), x))
    p = const(kind, EXP[0])
    for coefficient in EXP[1:]:
        p = emit_fma(b, p, r, const(kind, coefficient))
    p = emit_fma(b, p, b.fmul(r, r), b.fadd(r, const(kind, 1.0)))
    return b.fmul(p, b.bitcast(b.shl(b.add(b.fptosi(n, ints), const(ints, 127)), const(ints, 23)), kind))


def emit_prefetch(b: ir.IRBuilder, address: ir.Value, level: int = TIER.ahead[2]) -> None:
    """Ask for the cache line at an address; it need not exist.

    Into L2 but where the tier says otherwise: a Zen 4 core waits for some 24 lines of L1 at a time, at 100 ns a line a
    third of what memory gives.
    """
    function = declare(b, "llvm.prefetch.p0", ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    to_read, nearness, data = 0, {1: 3, 2: 2}[level], 1
    b.call(function, [pointer(b, address, I8), *(ir.Constant(I32, v) for v in (to_read, nearness, data))])


# ---- the same words for Numba code -----------------------------------------------------------------------------------


def word(result: types.Type, args: Sequence[types.Type], emit: Callable[..., Any]) -> Any:
    """A Numba intrinsic of fixed types from an emitter `emit(builder, *values)`."""
    names = [f"a{i}" for i in range(len(args))]

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> Any:
        out = emit(builder, *values)
        return context.get_dummy_value() if result is types.void else out

    scope: dict[str, Any] = {"signature": result(*args), "codegen": codegen}
    # Numba reads the argument names of an intrinsic's function: they must be real names, not *args.
    exec(f"def typing(typingctx, {', '.join(names)}):\n    return signature, codegen\n", scope)
    return intrinsic(scope["typing"])


i64, i32, f32, f64, void = types.int64, types.int32, types.float32, types.float64, types.void

get_i64 = word(i64, [i64], lambda b, p: load(b, p, I64))
get_f32 = word(f32, [i64], lambda b, p: load(b, p, F32))
put_i64 = word(void, [i64, i64], store)
put_f32 = word(void, [i64, f32], store)

vload = word(f32x16, [i64], lambda b, p: load(b, p, V16F32))
vload_half = word(f32x16, [i64], lambda b, p: emit_load_as_f32(b, p, "F16"))
vstore = word(void, [i64, f32x16], store)
vstore_half = word(void, [i64, f32x16], lambda b, p, v: store(b, p, emit_f32_to_half(b, v)))
vstore_i16 = word(void, [i64, i32x16], lambda b, p, v: store(b, p, b.trunc(v, ir.VectorType(I16, LANES))))
vstore_i8 = word(void, [i64, i32x16], lambda b, p, v: store(b, p, b.trunc(v, ir.VectorType(I8, LANES))))
vsplat = word(f32x16, [f32], splat)
vfma = word(f32x16, [f32x16, f32x16, f32x16], emit_fma)
vabs = word(f32x16, [f32x16], lambda b, v: call_llvm(b, "fabs", v))
vrint = word(f32x16, [f32x16], emit_rint)
vto_i32 = word(i32x16, [f32x16], lambda b, v: b.fptosi(v, V16I32))
sqrt = word(f32, [f32], lambda b, v: call_llvm(b, "sqrt", v))
fma = word(f32, [f32, f32, f32], emit_fma)


vmax = word(f32x16, [f32x16, f32x16], emit_larger)
vmin = word(f32x16, [f32x16, f32x16], emit_smaller)
vexp = word(f32x16, [f32x16], emit_exp)


def _tree(
    combine: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value],
) -> Callable[[ir.IRBuilder, ir.Value], ir.Value]:
    """Fold 16 lanes in one order: lane i with i+8, then i+4, i+2, i+1."""

    def emit(b: ir.IRBuilder, v: ir.Value) -> ir.Value:
        lanes = LANES
        while lanes > 1:
            lanes //= 2
            undefined = ir.Constant(v.type, ir.Undefined)
            low, high = (
                b.shuffle_vector(
                    v, undefined, ir.Constant(ir.VectorType(I32, lanes), list(range(first, first + lanes)))
                )
                for first in (0, lanes)
            )
            v = combine(b, low, high)
        return b.extract_element(v, ir.Constant(I32, 0))

    return emit


vsum = word(f32, [f32x16], _tree(lambda b, x, y: b.fadd(x, y)))
vsum_i32 = word(i32, [i32x16], _tree(lambda b, x, y: b.add(x, y)))
vhmax = word(f32, [f32x16], _tree(emit_larger))


def _first_lanes(b: ir.IRBuilder, count: ir.Value, kept: ir.Value, rest: ir.Value) -> ir.Value:
    """Lanes below `count` from kept, the others from rest."""
    index = ir.Constant(V16I32, list(range(LANES)))
    return b.select(b.icmp_signed("<", index, splat(b, b.trunc(count, I32))), kept, rest)


vfirst = word(f32x16, [i64, f32x16, f32x16], _first_lanes)

# x where top > limit, else 0
vwhere = word(
    f32x16,
    [f32x16, f32x16, f32x16],
    lambda b, top, limit, x: b.select(b.fcmp_ordered(">", top, limit), x, const(V16F32, 0.0)),
)


def stack(floats: int) -> Any:
    """Intrinsic: address of so many f32, a multiple of 16, that live as long as the function that asks for them."""

    def emit(b: ir.IRBuilder) -> ir.Value:
        with b.goto_entry_block():
            return b.ptrtoint(b.alloca(V16F32, floats // LANES), I64)

    return word(i64, [], emit)


_OPERATORS: list[tuple[Any, str, str]] = [
    (operator.add, "fadd", "add"),
    (operator.sub, "fsub", "sub"),
    (operator.mul, "fmul", "mul"),
    (operator.truediv, "fdiv", "sdiv"),
]


def _overload_operator(op: Any, float_name: str, int_name: str) -> None:
    words = {
        kind: word(kind, [kind, kind], lambda b, x, y, name=name: getattr(b, name)(x, y))
        for kind, name in ((f32x16, float_name), (i32x16, int_name))
    }

    def typing(x, y):  # type: ignore[no-untyped-def]
        if isinstance(x, Vec) and x == y:
            apply = words[x]
            return lambda x, y: apply(x, y)
        return None

    overload(op)(typing)


for _op in _OPERATORS:
    _overload_operator(*_op)

# Atomics, sequentially consistent: the team's claims, its doors and its sleep protocol rest on them.
atomic_add = word(i64, [i64, i64], lambda b, p, v: b.atomic_rmw("add", pointer(b, p, I64), v, "seq_cst"))
atomic_swap = word(i64, [i64, i64], lambda b, p, v: b.atomic_rmw("xchg", pointer(b, p, I64), v, "seq_cst"))
atomic_get = word(i64, [i64], lambda b, p: b.load_atomic(pointer(b, p, I64), "seq_cst", 8))


def _pause(b: ir.IRBuilder, _: ir.Value) -> None:
    """Tell the core that it spins."""
    if TIER.x86:
        b.call(declare(b, "llvm.x86.sse2.pause", ir.VoidType(), []), [])
    else:
        b.call(declare(b, "llvm.aarch64.hint", ir.VoidType(), [I32]), [ir.Constant(I32, 1)])


pause = word(void, [i64], _pause)


def call_word(result: types.Type, args: Sequence[types.Type]) -> Any:
    """A Numba intrinsic `call(address, *args)` of a C function known by its address only."""
    lower = {types.int64: I64, types.float32: F32, types.void: ir.VoidType()}

    def emit(b: ir.IRBuilder, address: ir.Value, *values: ir.Value) -> ir.Value:
        kind = ir.FunctionType(lower[result], [lower[a] for a in args])
        return b.call(b.inttoptr(address, kind.as_pointer()), values)

    return word(result, [i64, *args], emit)
