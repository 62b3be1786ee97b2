"""Products of bf16 in pairs, summed in f32 (`vdpbf16ps`): for training alone, on CPUs that have it.

The instruction rounds and flushes in its own way, so bits are those of no other tier; they are still the same for any
number of threads. Everything that is summed over, k, comes in pairs:

    w    panels [k / 2][16 rows][2] bf16         x    [tile of T tokens][k / 2][T][2] bf16

A pair is 32 bits: what moves f32 about, moves pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from .jit import TIER
from .matmul import tiled
from .panels import BLOCK, ROWS
from .simd import (
    I32,
    I64,
    V16F32,
    V16I32,
    at,
    const,
    declare,
    emit_f32_to_bf16,
    i64,
    load,
    splat,
    store,
    void,
    word,
)
from .target import token_tile

PAIR = 4  # bytes
STEPS = 2  # pairs of k of one round: two chains of sums


class BFloat(ir.types._BaseFloatType):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite lacks."""

    null, intrinsic_name = "0.0", "bf16"

    def __str__(self) -> str:
        return "bfloat"


BFloat._create_instance()


def _dot(b: ir.IRBuilder, total: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    """total[i] + w[2i] x[2i] + w[2i + 1] x[2i + 1] of pairs in i32x16."""
    pairs = ir.VectorType(BFloat(), 32)
    function = declare(b, "llvm.x86.avx512bf16.dpbf16ps.512", V16F32, [V16F32, pairs, pairs])
    return b.call(function, [total, b.bitcast(w, pairs), b.bitcast(x, pairs)])


def _emit_tile(
    b: ir.IRBuilder, tokens: int,
    w: ir.Value, nb: ir.Value, x: ir.Value, slots: ir.Value, y: ir.Value, y_stride: ir.Value, add: ir.Value,
) -> None:  # fmt: skip
    chains = [[cgutils.alloca_once(b, V16F32) for _ in range(tokens)] for _ in range(STEPS)]
    for a in (a for chain in chains for a in chain):
        b.store(const(V16F32, 0.0), a)
    line, step = PAIR * ROWS, b.mul(slots, ir.Constant(I64, PAIR))
    with cgutils.for_range(b, b.mul(nb, ir.Constant(I64, BLOCK // 2 // STEPS)), intp=I64) as loop:
        k = b.mul(loop.index, ir.Constant(I64, STEPS))
        start, first = b.add(w, b.mul(k, ir.Constant(I64, line))), b.add(x, b.mul(k, step))
        for i, chain in enumerate(chains):
            weights = load(b, at(b, start, line * i), V16I32)
            row = b.add(first, b.mul(step, ir.Constant(I64, i)))
            for t, a in enumerate(chain):
                b.store(_dot(b, b.load(a), weights, splat(b, load(b, at(b, row, PAIR * t), I32))), a)
    for t, parts in enumerate(zip(*chains, strict=True)):
        out = b.add(y, b.mul(y_stride, ir.Constant(I64, 4 * t)))
        total = b.fadd(*map(b.load, parts))
        kept = cgutils.alloca_once(b, V16F32)
        b.store(const(V16F32, 0.0), kept)
        with b.if_then(b.icmp_signed("!=", add, ir.Constant(I64, 0))):
            b.store(load(b, out, V16F32), kept)
        store(b, out, b.fadd(total, b.load(kept)))


def make_matmul() -> Callable[..., None]:
    """matmul(...) as in matmul.py, of operands in pairs."""
    full = token_tile(TIER, 0)

    def tiles(sizes: Iterable[int]) -> Any:
        def emit(b: ir.IRBuilder, tokens: ir.Value, *arguments: ir.Value) -> None:
            for size in sizes:
                with b.if_then(b.icmp_signed("==", tokens, ir.Constant(I64, size))):
                    _emit_tile(b, size, *arguments)

        return word(void, [i64] * 8, emit)

    return tiled(tiles, full, 1, PAIR * ROWS * BLOCK // 2, PAIR, PAIR * BLOCK // 2)


def _pair(b: ir.IRBuilder, x: ir.Value, y: ir.Value, out: ir.Value) -> None:
    low, high = (emit_f32_to_bf16(b, load(b, address, V16F32)) for address in (x, y))
    store(b, out, b.or_(low, b.shl(high, const(V16I32, 16))))


pair = word(void, [i64] * 3, _pair)  # 16 of x and 16 of y, lane by lane, as 16 pairs


def _round(b: ir.IRBuilder, x: ir.Value, out: ir.Value) -> None:
    store(b, out, b.trunc(emit_f32_to_bf16(b, load(b, x, V16F32)), ir.VectorType(ir.IntType(16), ROWS)))


round_16 = word(void, [i64] * 2, _round)  # 16 neighbours as 8 pairs of neighbours
