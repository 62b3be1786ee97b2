"""GGUF block formats: their bytes as NumPy dtypes, and the reference way from float32 to them and back.

A format is one entry of FORMATS. Rows of a tensor are runs of blocks; `block` weights share one scale. Everything here
is plain NumPy and gives, bit for bit, what llama.cpp's `quantize_row_*_ref` and `dequantize_row_*` (ggml-quants.c) give
when compiled without contraction: every product and every sum is rounded to float32, in that order. Sizes are never
typed: they follow from the dtypes.

Drawings: `[name n]` is a field of n bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Blocks = NDArray[Any]  # (...,) of a format's dtype
F32Array = NDArray[np.float32]

CHUNK = (
    1 << 16
)  # weights per step: 256 KB of float32 stays in L2 (whole tensors at once: 2.5x slower) and bounds the scratch
TINY = np.float32(1e-15)  # llama.cpp's GROUP_MAX_EPS: a group below it is all zero


@dataclass(frozen=True)
class Format:
    """One way to store weights.

    Attributes:
        name: GGUF's name, "Q4_0".
        ggml_type: the number a GGUF tensor carries, or NO_GGML_TYPE.
        block: weights per block.
        dtype: one block as it lies in the file.
        dequantize: blocks (n,) -> float32 (n, block).
        quantize: float32 (n, block) -> blocks (n,), or None where only reading is offered.
    """

    name: str
    ggml_type: int
    block: int
    dtype: np.dtype[Any]
    dequantize: Callable[[Blocks], F32Array]
    quantize: Callable[[F32Array], Blocks] | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits in the file for one weight, scales included."""
        return self.dtype.itemsize * 8 / self.block

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of `cols` weights; ValueError if blocks do not divide it."""
        if cols % self.block:
            raise ValueError(f"{self.name}: rows of {cols} weights do not divide into blocks of {self.block}")
        return cols // self.block * self.dtype.itemsize


def by_ggml_type(ggml_type: int) -> Format:
    """The format of a GGUF tensor's type number; ValueError names the type if we do not read it."""
    for fmt in FORMATS.values():
        if fmt.ggml_type == ggml_type != NO_GGML_TYPE:
            return fmt
    known = ", ".join(f"{f.ggml_type}={f.name}" for f in FORMATS.values() if f.ggml_type != NO_GGML_TYPE)
    raise ValueError(f"ggml type {ggml_type} is not one we read (known: {known})")


def dequantize_ref(fmt: Format, blocks: Blocks) -> F32Array:
    """Weights of blocks.

    Args:
        fmt: their format.
        blocks: (..., n) of fmt.dtype, or the same as bytes: uint8 (..., n * itemsize).

    Returns:
        float32 (..., n * fmt.block).
    """
    blocks = np.ascontiguousarray(blocks).view(fmt.dtype)  # (..., n)
    out = np.empty((blocks.size, fmt.block), np.float32)
    flat = blocks.reshape(-1)
    step = max(1, CHUNK // fmt.block)
    with np.errstate(over="ignore", invalid="ignore"):  # scales a file may hold: inf, NaN
        for i in range(0, flat.size, step):
            out[i : i + step] = fmt.dequantize(flat[i : i + step])
    return out.reshape(*blocks.shape[:-1], blocks.shape[-1] * fmt.block)


def quantize_ref(fmt: Format, x: NDArray[Any]) -> Blocks:
    """Blocks of weights, as llama.cpp's reference quantiser gives them.

    Args:
        fmt: the format wanted; ValueError if it is one we only read.
        x: float32 (..., k), k a multiple of fmt.block (else ValueError).

    Returns:
        (..., k / fmt.block) of fmt.dtype.
    """
    if fmt.quantize is None:
        able = ", ".join(f.name for f in FORMATS.values() if f.quantize)
        raise ValueError(f"{fmt.name} can be read but not written (can be written: {able})")
    n = fmt.row_bytes(x.shape[-1]) // fmt.dtype.itemsize  # blocks per row
    flat = np.ascontiguousarray(x, np.float32).reshape(-1, fmt.block)
    out = np.empty(len(flat), fmt.dtype)
    step = max(1, CHUNK // fmt.block)
    # f16 scales may overflow to inf or vanish, reciprocals of denormals are inf: the reference lets them
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        for i in range(0, len(flat), step):
            out[i : i + step] = fmt.quantize(flat[i : i + step])
    return out.reshape(*x.shape[:-1], n)


# ---- plain numbers ---------------------------------------------------------------------------------------------------


def _dequantize_plain(blocks: Blocks) -> F32Array:
    return blocks.astype(np.float32)[:, None]


def _quantize_f32(x: F32Array) -> Blocks:
    return x[:, 0]


def _quantize_f16(x: F32Array) -> Blocks:
    return x[:, 0].astype(np.float16)


def _dequantize_bf16(blocks: Blocks) -> F32Array:
    return (blocks.astype(np.uint32) << 16).view(np.float32)[:, None]


def _quantize_bf16(x: F32Array) -> Blocks:
    """Upper half of float32, round to nearest even; NaN stays NaN (its quiet bit set)."""
    u = np.ascontiguousarray(x[:, 0]).view(np.uint32)
    nan = (u & 0x7FFFFFFF) > 0x7F800000
    rounded = (u + (0x7FFF + ((u >> 16) & 1))) >> 16  # u32 wrap-around only for NaNs
    return np.where(nan, (u >> 16) | 64, rounded).astype(np.uint16)


# ---- 32 weights, one scale -------------------------------------------------------------------------------------------

# Q8_0   [d 2][qs 32]                 w = d * q          d f16, q int8
Q8_0 = np.dtype([("d", "<f2"), ("qs", "i1", 32)])
# Q4_0   [d 2][qs 16]                 w = d * (q - 8)    byte j = weight j+16 (high nibble), weight j (low)
Q4_0 = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
# Q4_1   [d 2][m 2][qs 16]            w = d * q + m
Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)])
# Q5_0   [d 2][qh 4][qs 16]           w = d * (q - 16)   qh: bit j = bit 4 of weight j (little endian u32)
Q5_0 = np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
# Q5_1   [d 2][m 2][qh 4][qs 16]      w = d * q + m
Q5_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
# IQ4_NL [d 2][qs 16]                 w = d * LEVELS[q]
IQ4_NL = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def _scale(blocks: Blocks, field: str = "d") -> F32Array:
    """One f16 field as a float32 column (n, 1)."""
    column: F32Array = blocks[field].astype(np.float32)[:, None]
    return column


def _nibbles(qs: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, 16) bytes -> (n, 32): low nibbles, then high ones."""
    return np.concatenate([qs & 15, qs >> 4], axis=1)


def _fifth_bits(qh: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, 4) bytes -> (n, 32) of 0 or 16."""
    return np.unpackbits(qh, axis=1, bitorder="little") << 4


def _reciprocal(d: F32Array) -> F32Array:
    """1/d, and 0 where d is 0."""
    return np.where(d == 0, np.float32(0), np.float32(1) / d)


def _to_int(x: F32Array, top: int) -> NDArray[np.uint8]:
    """C's (int8_t)x, capped at `top`: cut off towards zero; inf and NaN (a denormal scale) give 0, as on x86."""
    return np.minimum(np.where(np.isfinite(x), x, np.float32(0)).astype(np.int32), top).astype(np.uint8)


def _extreme(x: F32Array) -> F32Array:
    """The first weight of largest magnitude, with its sign: (n, k) -> (n, 1)."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)


def _symmetric(x: F32Array, half: int) -> tuple[F32Array, NDArray[np.uint8]]:
    """Q4_0, Q5_0: the extreme weight becomes -half. Returns d (n,) and q (n, 32) in 0..2*half-1."""
    d = (_extreme(x) + np.float32(0)) / np.float32(-half)  # + 0: a block of -0.0 gives d = -0.0, as the reference
    q = _to_int(x * _reciprocal(d) + np.float32(half + 0.5), 2 * half - 1)
    return d[:, 0], q


def _affine(x: F32Array, top: int) -> tuple[F32Array, F32Array, NDArray[np.uint8]]:
    """Q4_1, Q5_1: [min, max] becomes 0..top. Returns d (n,), m (n,) and q (n, 32)."""
    m = x.min(axis=1, keepdims=True)
    d = (x.max(axis=1, keepdims=True) - m) / np.float32(top)
    q = _to_int((x - m) * _reciprocal(d) + np.float32(0.5), top)
    return d[:, 0], m[:, 0], q


def _dequantize_q8_0(blocks: Blocks) -> F32Array:
    return blocks["qs"].astype(np.float32) * _scale(blocks)


def _quantize_q8_0(x: F32Array) -> Blocks:
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    v = x * _reciprocal(d)
    v = np.where(np.isfinite(v), v, np.float32(0))
    a = np.abs(v)
    whole = np.floor(a)
    q = np.copysign(whole + (a - whole >= 0.5), v)  # C's roundf: halves away from zero (np.round takes them to even)
    return _with_levels(Q8_0, q.astype(np.int8), d=d[:, 0])


def _dequantize_q4_0(blocks: Blocks) -> F32Array:
    return (_nibbles(blocks["qs"]).astype(np.float32) - np.float32(8)) * _scale(blocks)


def _quantize_q4_0(x: F32Array) -> Blocks:
    d, q = _symmetric(x, 8)
    return _with_levels(Q4_0, q, d=d)


def _dequantize_q4_1(blocks: Blocks) -> F32Array:
    return _nibbles(blocks["qs"]).astype(np.float32) * _scale(blocks) + _scale(blocks, "m")


def _quantize_q4_1(x: F32Array) -> Blocks:
    d, m, q = _affine(x, 15)
    return _with_levels(Q4_1, q, d=d, m=m)


def _dequantize_q5_0(blocks: Blocks) -> F32Array:
    q = _nibbles(blocks["qs"]) | _fifth_bits(blocks["qh"])
    return (q.astype(np.float32) - np.float32(16)) * _scale(blocks)


def _quantize_q5_0(x: F32Array) -> Blocks:
    d, q = _symmetric(x, 16)
    return _with_levels(Q5_0, q, d=d)


def _dequantize_q5_1(blocks: Blocks) -> F32Array:
    q = _nibbles(blocks["qs"]) | _fifth_bits(blocks["qh"])
    return q.astype(np.float32) * _scale(blocks) + _scale(blocks, "m")


def _quantize_q5_1(x: F32Array) -> Blocks:
    d, m, q = _affine(x, 31)
    return _with_levels(Q5_1, q, d=d, m=m)


def _dequantize_iq4_nl(blocks: Blocks) -> F32Array:
    return LEVELS[_nibbles(blocks["qs"])] * _scale(blocks)


# ---- 256 weights, sub-blocks of 16 or 32 with integer scales of their own --------------------------------------------

# Q6_K   [ql 128][qh 64][scales 16][d 2]         w = (d * scales[i / 16]) * (q - 32)      scales int8
#        each half of 128 weights (h = 0, 1) has 64 bytes of ql and 32 of qh; for j = 0..31:
#        ql[64h + j]      = weight 64 + j (high nibble), weight j (low)      bits 3..0
#        ql[64h + 32 + j] = weight 96 + j (high nibble), weight 32 + j (low)
#        qh[32h + j]      = weights 96 + j, 64 + j, 32 + j, j  (two bits each, highest first)    bits 5..4
Q6_K = np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")])
# Q2_K   [scales 16][qs 64][d 2][dmin 2]         w = (d * (s & 15)) * q - dmin * (s >> 4),  s = scales[i / 16]
#        qs[32h + j] = weights 96 + j, 64 + j, 32 + j, j of half h (two bits each, highest first)
Q2_K = np.dtype([("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")])
# Q3_K   [hmask 32][qs 64][scales 12][d 2]       w = (d * (s - 32)) * (q - 4)
#        low two bits in qs as in Q2_K; hmask[j] bit i = bit 2 of weight 32 i + j
#        sixteen 6-bit scales: byte j < 8 = low 4 bits of s[8 + j] (high nibble) and s[j] (low);
#        byte 8 + j = top 2 bits of s[12 + j], s[8 + j], s[4 + j], s[j] (highest first)
Q3_K = np.dtype([("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")])
# Q4_K   [d 2][dmin 2][scales 12][qs 128]        w = (d * s) * q - dmin * m,   s and m of i / 32, 6 bits each
#        byte j < 4: bits 5..4 of s[4 + j], s[j]    byte 4 + j: bits 5..4 of m[4 + j], m[j]
#        byte 8 + j: bits 3..0 of m[4 + j], bits 3..0 of s[4 + j]
#        qs[32c + j] = weight 64c + 32 + j (high nibble), weight 64c + j (low)
Q4_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)])
# Q5_K   [d 2][dmin 2][scales 12][qh 32][qs 128] as Q4_K; qh[j] bit i = bit 4 of weight 32 i + j
Q5_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)])
# IQ4_XS [d 2][scales_h 2][scales_l 4][qs 128]   w = (d * (s - 32)) * LEVELS[q]
#        s of sub-block i: low 4 bits in nibble i of scales_l, top 2 bits at bit 2 i of scales_h (u16)
#        qs[16i + j] = weight 32 i + 16 + j (high nibble), weight 32 i + j (low)
IQ4_XS = np.dtype([("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)])


def _fields(packed: NDArray[np.uint8], run: int, width: int) -> NDArray[np.uint8]:
    """Bit fields of `width`, lowest first, of runs of `run` bytes: (n, bytes) -> (n, bytes * 8 / width).

    Of each run the lowest field of every byte comes first, then the next field: the order of all K-quants.
    """
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    runs = packed.reshape(len(packed), -1, 1, run)
    return ((runs >> shifts) & np.uint8((1 << width) - 1)).reshape(len(packed), -1)


def _pack_fields(q: NDArray[np.uint8], run: int, width: int) -> NDArray[np.uint8]:
    """(n, weights) of `width` bits -> (n, weights * width / 8): the inverse of _fields."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    fields = q.reshape(len(q), -1, 8 // width, run) << shifts
    return np.bitwise_or.reduce(fields, axis=2).reshape(len(q), -1)


def _spread(scales: F32Array, blocks: int) -> F32Array:
    """(n, s) scales -> (n, s, 1), to multiply weights (n, s, 256 / s)."""
    return scales.reshape(blocks, -1, 1)


def _dequantize_q6_k(blocks: Blocks) -> F32Array:
    n = len(blocks)
    q = _fields(blocks["ql"], 64, 4) | _fields(blocks["qh"], 32, 2) << 4  # (n, 256)
    scale = _scale(blocks) * blocks["scales"].astype(np.float32)  # (n, 16)
    return (_spread(scale, n) * (q.reshape(n, 16, 16).astype(np.float32) - np.float32(32))).reshape(n, 256)


def _dequantize_q2_k(blocks: Blocks) -> F32Array:
    n = len(blocks)
    q = _fields(blocks["qs"], 32, 2).reshape(n, 16, 16).astype(np.float32)
    scale = _scale(blocks) * (blocks["scales"] & 15).astype(np.float32)
    low = _scale(blocks, "dmin") * (blocks["scales"] >> 4).astype(np.float32)
    return (_spread(scale, n) * q - _spread(low, n)).reshape(n, 256)


def _dequantize_q3_k(blocks: Blocks) -> F32Array:
    n = len(blocks)
    q = _fields(blocks["qs"], 32, 2) | _fields(blocks["hmask"], 32, 1) << 2  # (n, 256), 0..7
    packed = blocks["scales"]
    s = _fields(packed[:, :8], 8, 4) | _fields(packed[:, 8:], 4, 2) << 4  # (n, 16), 0..63
    scale = _scale(blocks) * (s.astype(np.float32) - np.float32(32))
    return (_spread(scale, n) * (q.reshape(n, 16, 16).astype(np.float32) - np.float32(4))).reshape(n, 256)


def _scales_and_mins(packed: NDArray[np.uint8]) -> tuple[F32Array, F32Array]:
    """The twelve bytes of Q4_K and Q5_K: (n, 12) -> s (n, 8), m (n, 8) as float32."""
    s, m, tail = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([s & 63, tail & 15 | s >> 6 << 4], axis=1)
    mins = np.concatenate([m & 63, tail >> 4 | m >> 6 << 4], axis=1)
    return scales.astype(np.float32), mins.astype(np.float32)


def _dequantize_q45_k(blocks: Blocks, q: NDArray[np.uint8]) -> F32Array:
    n = len(blocks)
    scales, mins = _scales_and_mins(blocks["scales"])
    scale, low = _scale(blocks) * scales, _scale(blocks, "dmin") * mins  # (n, 8)
    return (_spread(scale, n) * q.reshape(n, 8, 32).astype(np.float32) - _spread(low, n)).reshape(n, 256)


def _dequantize_q4_k(blocks: Blocks) -> F32Array:
    return _dequantize_q45_k(blocks, _fields(blocks["qs"], 32, 4))


def _dequantize_q5_k(blocks: Blocks) -> F32Array:
    return _dequantize_q45_k(blocks, _fields(blocks["qs"], 32, 4) | _fields(blocks["qh"], 32, 1) << np.uint8(4))


def _dequantize_iq4_xs(blocks: Blocks) -> F32Array:
    n = len(blocks)
    low = _fields(blocks["scales_l"], 1, 4)  # (n, 8)
    high = (blocks["scales_h"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16)) & 3
    scale = _scale(blocks) * ((low | high << 4).astype(np.float32) - np.float32(32))
    return (_spread(scale, n) * LEVELS[_fields(blocks["qs"], 16, 4)].reshape(n, 8, 32)).reshape(n, 256)


def _nearest(x: F32Array) -> F32Array:
    """Round to nearest, halves to even, by the reference's magic number; exact below 2**22."""
    magic = np.float32(12582912)  # 1.5 * 2**23: adding it leaves no bit for a fraction
    return (x + magic) - magic


def _best_scales(x: F32Array) -> tuple[F32Array, NDArray[np.uint8]]:
    """Scales of groups of 16 weights for levels -32..31: llama.cpp's make_qx_quants, all groups side by side.

    Tries the 19 steps that put the extreme weight at -31.1 .. -32.9 and keeps the one whose least-squares scale,
    weighted by x * x, explains most. Sums run over the 16 weights in order, each term rounded to float32: another
    order would choose other levels.

    Args:
        x: float32 (16, groups), so that every operation runs over contiguous groups.

    Returns:
        scale float32 (groups,), levels (16, groups) in 0..63.
    """
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]  # (groups,)
    zero = np.abs(extreme) < TINY
    extreme = np.where(zero, np.float32(1), extreme)
    square = x * x
    cube = square * x

    def fit(step: float) -> tuple[F32Array, F32Array, F32Array]:
        top = np.float32(32) + np.float32(0.1) * np.float32(step)
        levels = np.clip(_nearest((-top / extreme) * x), np.float32(-32), np.float32(31))
        sum_lx = np.zeros_like(extreme)
        sum_ll = np.zeros_like(extreme)
        for term_lx, term_ll in zip(cube * levels, square * levels * levels, strict=True):
            sum_lx += term_lx
            sum_ll += term_ll
        return levels, sum_lx, sum_ll

    levels, sum_lx, sum_ll = fit(0)
    scale = np.where(sum_ll == 0, np.float32(0), sum_lx / sum_ll)
    best = scale * sum_lx
    for step in range(-9, 10):
        if step == 0:
            continue
        new, sum_lx, sum_ll = fit(step)
        better = (sum_ll > 0) & (sum_lx * sum_lx > best * sum_ll)
        np.copyto(levels, new, where=better)
        scale = np.where(better, sum_lx / sum_ll, scale)
        best = np.where(better, scale * sum_lx, best)
    scale[zero] = 0
    return scale, np.where(zero, np.float32(0), levels + np.float32(32)).astype(np.uint8)


def _quantize_q6_k(x: F32Array) -> Blocks:
    n = len(x)
    groups = np.ascontiguousarray(x.reshape(n * 16, 16).T)  # (16, n * 16)
    scales, levels = _best_scales(groups)
    scales = scales.reshape(n, 16)
    extreme = _extreme(scales)  # (n, 1)
    empty = np.abs(extreme[:, 0]) < TINY
    inverse = np.float32(-128) / np.where(empty[:, None], np.float32(1), extreme)
    out = np.zeros(n, Q6_K)
    out["d"] = np.where(empty, np.float32(0), np.float32(1) / inverse[:, 0])
    out["scales"] = np.minimum(_nearest(inverse * scales), np.float32(127)).astype(np.int8)

    # levels again, against the scale as it is stored
    stored = (_scale(out) * out["scales"].astype(np.float32)).reshape(-1)  # (n * 16,)
    with np.errstate(divide="ignore", invalid="ignore"):
        again = np.clip(_nearest(groups / stored), np.float32(-32), np.float32(31)) + np.float32(32)
    again = np.where(stored == 0, levels.astype(np.float32), again)
    put_levels(out, again.astype(np.uint8).T.reshape(n, 256))
    out[empty] = np.zeros((), Q6_K)
    return out


# ---- levels into blocks ----------------------------------------------------------------------------------------------


def put_levels(blocks: Blocks, q: NDArray[Any]) -> None:
    """Write the levels of blocks (n,): q (n, block), int8 for Q8_0, else the unsigned q of the drawings as uint8."""
    dtype, names = blocks.dtype, blocks.dtype.names or ()
    if dtype == Q8_0:
        blocks["qs"] = q
    elif dtype == Q6_K:
        blocks["ql"], blocks["qh"] = _pack_fields(q & 15, 64, 4), _pack_fields(q >> 4, 32, 2)
    elif "dmin" in names:
        blocks["qs"] = _pack_fields(q & 15, 32, 4)
        if "qh" in names:
            blocks["qh"] = _pack_fields(q >> 4, 32, 1)
    else:
        blocks["qs"] = _pack_fields(q & 15, 16, 4)
        if "qh" in names:
            blocks["qh"] = np.packbits(q >> 4, axis=1, bitorder="little")


def _with_levels(dtype: np.dtype[Any], q: NDArray[Any], **fields: F32Array) -> Blocks:
    """New blocks of these levels and fields."""
    out = np.empty(len(q), dtype)
    for name, values in fields.items():
        out[name] = values
    put_levels(out, q)
    return out


def pack_scales_and_mins(s: NDArray[np.uint8], m: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The twelve bytes of Q4_K and Q5_K from 6-bit s (n, 8) and m (n, 8): the inverse of _scales_and_mins."""
    top_s, top_m, tail = s[:, 4:] >> 4 << 6, m[:, 4:] >> 4 << 6, (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4
    return np.concatenate([s[:, :4] | top_s, m[:, :4] | top_m, tail], axis=1)


# ---- GPTQ and AWQ: 4 bits, groups that share an f16 scale and an integer zero point; no GGUF type -------------------

# G4_n   [d 2][z 1][qs n / 2]         w = d * (q - z)    each 32 weights of qs as in Q4_0, n = 32, 64, 128
G4 = {n: np.dtype([("d", "<f2"), ("z", "u1"), ("qs", "u1", n // 2)]) for n in (32, 64, 128)}
NO_GGML_TYPE = -1


def _dequantize_g4(blocks: Blocks) -> F32Array:
    d, q = _scale(blocks), _fields(blocks["qs"], 16, 4).astype(np.float32)
    return d * q - d * blocks["z"].astype(np.float32)[:, None]  # all exact; so zeros are +0, as in the kernels


def pack_g4(d: NDArray[np.float16], z: NDArray[np.uint8], q: NDArray[np.uint8]) -> Blocks:
    """Blocks of G4_n from scales (rows, blocks), zero points of that shape and levels 0..15 (rows, blocks * n)."""
    out = np.empty(d.shape, G4[q.shape[1] // d.shape[1]])
    out["d"], out["z"] = d, z
    out["qs"] = _pack_fields(q.reshape(d.size, -1), 16, 4).reshape(*d.shape, -1)
    return out


FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        Format("F32", 0, 1, np.dtype("<f4"), _dequantize_plain, _quantize_f32),
        Format("F16", 1, 1, np.dtype("<f2"), _dequantize_plain, _quantize_f16),
        Format("BF16", 30, 1, np.dtype("<u2"), _dequantize_bf16, _quantize_bf16),
        Format("Q8_0", 8, 32, Q8_0, _dequantize_q8_0, _quantize_q8_0),
        Format("Q4_0", 2, 32, Q4_0, _dequantize_q4_0, _quantize_q4_0),
        Format("Q4_1", 3, 32, Q4_1, _dequantize_q4_1, _quantize_q4_1),
        Format("Q5_0", 6, 32, Q5_0, _dequantize_q5_0, _quantize_q5_0),
        Format("Q5_1", 7, 32, Q5_1, _dequantize_q5_1, _quantize_q5_1),
        Format("Q2_K", 10, 256, Q2_K, _dequantize_q2_k),
        Format("Q3_K", 11, 256, Q3_K, _dequantize_q3_k),
        Format("Q4_K", 12, 256, Q4_K, _dequantize_q4_k),
        Format("Q5_K", 13, 256, Q5_K, _dequantize_q5_k),
        Format("Q6_K", 14, 256, Q6_K, _dequantize_q6_k, _quantize_q6_k),
        Format("IQ4_NL", 20, 32, IQ4_NL, _dequantize_iq4_nl),
        Format("IQ4_XS", 23, 256, IQ4_XS, _dequantize_iq4_xs),
        *(Format(f"G4_{n}", NO_GGML_TYPE, n, dtype, _dequantize_g4) for n, dtype in G4.items()),
    )
}
