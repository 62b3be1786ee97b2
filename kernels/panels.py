"""Panels: the one layout of weights that every CPU reads, and the way from a file's blocks into it and back.

16 rows make a row group. Along k a row group is a row of records; a record holds one 32-wide block of 16 rows
(K-quants: eight of them) as bit planes, behind the scales of the 16 rows: what a kernel needs first comes first, and
the hardware fetches ahead a stream that is read in order. A quad is 4 neighbouring k of one row: 4 bytes, one lane of
i32x16.

    8-bit plane, 512 B    vector j (64 B) = quad j of rows 0..15                                   j = 0..7
    4-bit plane, 256 B    vector j        = quad j in the low nibbles, quad j + 4 in the high ones   j = 0..3
    2-bit plane, 128 B    vector u        = quad u + 2 f in bits 2f, 2f + 1                          u = 0..1, f = 0..3
    1-bit plane,  64 B    the one vector  = quad j in bit j                                          j = 0..7

    Q4_0  [16 x f16 d][4-bit plane]                        288 B = 16 x  18, the bytes of the file
    Q4_1  [16 x f16 d][16 x f16 m][4-bit plane]            320 B = 16 x  20
    Q8_0  [16 x f16 d][8-bit plane]                        544 B = 16 x  34
    Q5_0  [16 x f16 d][4-bit plane][1-bit plane]           352 B = 16 x  22
    Q5_1  [16 x f16 d][16 x f16 m][4-bit plane][1-bit plane]  384 B = 16 x 24
    Q4_K  [8 subs][16 rows] u8, [8 minima][16 rows] u8, [16 x f16 d][16 x f16 dmin], 8 x [4-bit plane]   2,368 B
    Q5_K  as Q4_K, 8 x [4-bit plane][1-bit plane]          2,880 B; both 64 B more than the file, whose subs have 6 bits
    Q6_K  [16 subs][16 rows] i8, [16 x f16 d], 8 x [4-bit plane][2-bit plane]     3,360 B = 16 x 210
    Q3_K  as Q6_K, 8 x [2-bit plane][1-bit plane]          1,824 B, 64 more than the file, whose subs have 6 bits
    Q2_K  [16 subs][16 rows] u8 as in the file, [16 x f16 d][16 x f16 dmin], 8 x [2-bit plane]   1,344 B = 16 x 84
    IQ4_NL  as Q4_0, the nibble being an index into 16 levels      288 B = 16 x 18
    IQ4_XS  [8 subs][16 rows] i8, [16 x f16 d], 8 x [4-bit plane]   2,208 B, 32 more than the file
    G4_n    [16 x f16 d][16 x u8 z], n / 32 x [4-bit plane]: GPTQ and AWQ   304, 560, 1,072 B, as the file to 3 %
    F32, F16, BF16        k vectors of 16 rows

A weight is S * (u - zero) + M with the unsigned u of the planes, or S * codebook[u]. Rows beyond the matrix are zero,
k is a multiple of the block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .formats import FORMATS, LEVELS

Bytes = NDArray[np.uint8]
ROWS = 16  # rows of a row group = lanes
BLOCK = 32  # k of a block


@dataclass(frozen=True)
class Panel:
    """How one format lies in memory.

    Attributes:
        name: format name as in GGUF.
        planes: bits of each plane, the low bits of u first; empty for float formats.
        zero: u that means 0; for 8 bits, what makes them unsigned.
        blocks: 32-wide blocks in a record.
        group: k that share a scale, 32 or 16.
        scales: "d" (f16), "dm" (f16 scale and minimum), "d_sub" (f16 times an int8 per group), "dm_sub" (two f16, each
            times a uint8 per block: scale and subtracted minimum), "dm_sub4" (the same per group, two nibbles of one
            uint8, scale low), "dz" (f16 and a uint8 zero point: M = -d z, exact in f32); "" for float formats.
        pack: file bytes (rows, row_bytes) -> (groups, records, record_bytes); rows a multiple of 16.
        codebook: int8 weights that a 4-bit u stands for; () where u is the number itself.
    """

    name: str
    planes: tuple[int, ...]
    zero: int
    blocks: int
    group: int
    scales: str
    pack: Callable[[Bytes], Bytes]
    codebook: tuple[int, ...] = ()

    @property
    def bits(self) -> int:
        """Bits of a weight in a dot product; 8 are signed, fewer are u."""
        return 8 if self.codebook else sum(self.planes)

    @property
    def is_float(self) -> bool:
        """True where weights are floats and activations stay f32."""
        return not self.planes

    @property
    def block_bytes(self) -> int:
        """Bytes of the planes of one block of 16 rows."""
        return sum(self.planes) * ROWS * BLOCK // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of one record, which it begins with."""
        subs = self.blocks * BLOCK // self.group
        each = {"d": 2, "dm": 4, "d_sub": 2 + subs, "dm_sub": 4 + 2 * subs, "dm_sub4": 4 + subs, "dz": 3, "": 0}
        return ROWS * each[self.scales]

    @property
    def record_bytes(self) -> int:
        """Bytes of one record; for float formats of 32 k."""
        if self.is_float:
            return ROWS * BLOCK * (4 if self.name == "F32" else 2)
        return self.scale_bytes + self.blocks * self.block_bytes


def _lanes(per_row: NDArray[np.generic]) -> NDArray[np.generic]:
    """(rows, records, ...) -> (groups, records, ..., 16): the row becomes the innermost axis."""
    groups = per_row.reshape(-1, ROWS, *per_row.shape[1:])
    return np.moveaxis(groups, 1, -1)


def _record(*parts: NDArray[np.generic]) -> Bytes:
    """Parts of (groups, records, ...) joined byte by byte into (groups, records, record_bytes)."""
    flat = [np.ascontiguousarray(p).view(np.uint8).reshape(p.shape[0], p.shape[1], -1) for p in parts]
    return np.concatenate(flat, axis=2)


def _quads(values: Bytes) -> NDArray[np.uint32]:
    """(rows, records, 4 q) bytes -> (groups, records, q, 16) quads."""
    return _lanes(np.ascontiguousarray(values).view("<u4"))  # type: ignore[return-value]


def _pack_q4_0(raw: Bytes) -> Bytes:
    # byte j of a file block holds k = j (low) and k = j + 16 (high): exactly the plane's pairing of quads j and j + 4
    blocks = raw.reshape(len(raw), -1, 18)
    return _record(_lanes(np.ascontiguousarray(blocks[..., :2]).view("<u2")), _quads(blocks[..., 2:]))


def _pack_q4_1(raw: Bytes) -> Bytes:
    blocks = raw.reshape(len(raw), -1, 20)
    return _record(_lanes(np.ascontiguousarray(blocks[..., :4]).view("<u2")), _quads(blocks[..., 4:]))


def _plane1(bits: Bytes) -> Bytes:
    """(..., 32) zeros and ones, k upwards -> (..., 4) bytes: bit j of byte i is k = 4 j + i."""
    quads = bits.reshape(*bits.shape[:-1], BLOCK // 4, 4)
    return np.packbits(quads, axis=-2, bitorder="little").reshape(*bits.shape[:-1], 4)


def _pack_q5(scale_bytes: int) -> Callable[[Bytes], Bytes]:
    """Q5_0 (2 bytes of scales) and Q5_1 (4): scales, 32 high bits, then nibbles as in Q4_0."""

    def pack(raw: Bytes) -> Bytes:
        blocks = raw.reshape(len(raw), -1, scale_bytes + 20)
        scales, high, nibbles = np.split(blocks, [scale_bytes, scale_bytes + 4], axis=-1)
        planes = np.concatenate([nibbles, _plane1(np.unpackbits(high, axis=-1, bitorder="little"))], axis=-1)
        return _record(_lanes(np.ascontiguousarray(scales).view("<u2")), _quads(planes))

    return pack


def _pack_k_with_minima(high_bits: bool) -> Callable[[Bytes], Bytes]:
    """Q4_K, and Q5_K with 32 bytes of high bits: d, dmin, 12 bytes of 6-bit scales and minima, then nibbles."""

    def pack(raw: Bytes) -> Bytes:
        blocks = raw.reshape(len(raw), -1, 176 if high_bits else 144)
        d, packed, high, nibbles = np.split(blocks, [4, 16, 48 if high_bits else 16], axis=-1)
        # 6-bit fields: the first four scales and minima in the low bits of bytes 0-7, the others in nibbles of bytes
        # 8-11 with their top bits in the high bits of bytes 0-7
        low, top = packed[..., :8] & 63, packed[..., :8] >> 6
        rest = np.concatenate([packed[..., 8:] & 15, packed[..., 8:] >> 4], axis=-1) | (top << 4)
        subs = np.concatenate([low[..., :4], rest[..., :4], low[..., 4:], rest[..., 4:]], axis=-1)
        # file: chunks of 64 k, the first 32 in the low nibbles of 32 bytes, the others in the high ones
        chunks = nibbles.reshape(*nibbles.shape[:2], 4, 1, BLOCK)
        values = np.concatenate([chunks & 15, chunks >> 4], axis=3).reshape(*nibbles.shape[:2], 8, BLOCK)
        planes = values[..., :16] | (values[..., 16:] << 4)
        if high_bits:
            bits = (high[..., None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & 1  # (rows, records, block, 32)
            planes = np.concatenate([planes, _plane1(bits)], axis=-1)
        quads = _quads(planes.reshape(*blocks.shape[:2], -1))
        return _record(_lanes(subs), _lanes(np.ascontiguousarray(d).view("<u2")), quads)

    return pack


def _pack_q8_0(raw: Bytes) -> Bytes:
    blocks = raw.reshape(len(raw), -1, 34)
    return _record(_lanes(np.ascontiguousarray(blocks[..., :2]).view("<u2")), _quads(blocks[..., 2:]))


def _plane2(twos: Bytes) -> Bytes:
    """(..., 32) of 0..3, k upwards -> (..., 8) bytes: quad u + 2 f in bits 2f, 2f + 1 of bytes 4 u .. 4 u + 3."""
    fields = twos.reshape(*twos.shape[:-1], 4, 8)
    return fields[..., 0, :] | (fields[..., 1, :] << 2) | (fields[..., 2, :] << 4) | (fields[..., 3, :] << 6)


def _halves_of_twos(packed: Bytes) -> Bytes:
    """(rows, records, 64) bytes -> (rows, records, block, 32): in each half of 128 k, k = 32 f + i is bits 2f, 2f + 1
    of byte i.
    """
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    return ((packed.reshape(*packed.shape[:2], 2, 1, BLOCK) >> shifts) & 3).reshape(*packed.shape[:2], 8, BLOCK)


def _pack_q6_k(raw: Bytes) -> Bytes:
    blocks = raw.reshape(len(raw), -1, 210)
    low, high, subs, d = np.split(blocks, [128, 192, 208], axis=-1)
    # file: two halves of 128 k; k = 32 f + i lives in low[half, (f & 1) * 32 + i] nibble f >> 1, and in high[half, i]
    low = low.reshape(*low.shape[:2], 2, 1, 2, BLOCK)
    nibbles = np.concatenate([low & 15, low >> 4], axis=3)  # (rows, records, half, f >> 1, f & 1, 32)
    nibbles = nibbles.reshape(*nibbles.shape[:2], 8, BLOCK)  # (rows, records, block, 32)
    plane4 = nibbles[..., :16] | (nibbles[..., 16:] << 4)
    planes = np.concatenate([plane4, _plane2(_halves_of_twos(high))], axis=3).reshape(*blocks.shape[:2], -1)
    return _record(_lanes(subs), _lanes(np.ascontiguousarray(d).view("<u2")), _quads(planes))


def _pack_q3_k(raw: Bytes) -> Bytes:
    blocks = raw.reshape(len(raw), -1, 110)
    high, low, packed, d = np.split(blocks, [32, 96, 108], axis=-1)
    bits = (high[..., None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & 1  # (rows, records, block, 32)
    planes = np.concatenate([_plane2(_halves_of_twos(low)), _plane1(bits)], axis=3).reshape(*blocks.shape[:2], -1)
    # 6-bit subs 4 i + j: low bits in nibbles of bytes 0-7, top bits at 2 i of byte 8 + j
    nibbles = np.concatenate([packed[..., :8] & 15, packed[..., :8] >> 4], axis=-1)
    top = (packed[..., None, 8:] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3
    subs = (nibbles | (top.reshape(nibbles.shape) << 4)) - np.uint8(32)  # wraps: int8 from here on
    return _record(_lanes(subs), _lanes(np.ascontiguousarray(d).view("<u2")), _quads(planes))


def _pack_q2_k(raw: Bytes) -> Bytes:
    blocks = raw.reshape(len(raw), -1, 84)
    subs, twos, d = np.split(blocks, [16, 80], axis=-1)
    planes = _plane2(_halves_of_twos(twos)).reshape(*blocks.shape[:2], -1)
    return _record(_lanes(subs), _lanes(np.ascontiguousarray(d).view("<u2")), _quads(planes))


def _pack_iq4_xs(raw: Bytes) -> Bytes:
    blocks = raw.reshape(len(raw), -1, 136)
    d, high, low, nibbles = np.split(blocks, [2, 4, 8], axis=-1)
    top = (np.ascontiguousarray(high).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)) & 3
    low = np.stack([low & 15, low >> 4], axis=-1).reshape(top.shape)
    subs = (low | (top.astype(np.uint8) << 4)) - np.uint8(32)  # wraps: int8 from here on
    return _record(_lanes(subs), _lanes(np.ascontiguousarray(d).view("<u2")), _quads(nibbles))


def _pack_g4(blocks: int) -> Callable[[Bytes], Bytes]:
    def pack(raw: Bytes) -> Bytes:
        records = raw.reshape(len(raw), -1, 3 + 16 * blocks)
        d = _lanes(np.ascontiguousarray(records[..., :2]).view("<u2"))
        return _record(d, _lanes(records[..., 2:3]), _quads(records[..., 3:]))

    return pack


def _pack_float(itemsize: int) -> Callable[[Bytes], Bytes]:
    def pack(raw: Bytes) -> Bytes:
        values = np.ascontiguousarray(raw).view(f"<u{itemsize}").reshape(len(raw), -1, BLOCK)
        return _record(_lanes(values))

    return pack


_LEVELS = tuple(int(level) for level in LEVELS)
PANELS: dict[str, Panel] = {
    p.name: p
    for p in (
        Panel("F32", (), 0, 1, 32, "", _pack_float(4)),
        Panel("F16", (), 0, 1, 32, "", _pack_float(2)),
        Panel("BF16", (), 0, 1, 32, "", _pack_float(2)),
        Panel("Q4_0", (4,), 8, 1, 32, "d", _pack_q4_0),
        Panel("Q4_1", (4,), 0, 1, 32, "dm", _pack_q4_1),
        Panel("Q5_0", (4, 1), 16, 1, 32, "d", _pack_q5(2)),
        Panel("Q5_1", (4, 1), 0, 1, 32, "dm", _pack_q5(4)),
        Panel("Q8_0", (8,), 128, 1, 32, "d", _pack_q8_0),
        Panel("IQ4_NL", (4,), 128, 1, 32, "d", _pack_q4_0, _LEVELS),
        Panel("Q2_K", (2,), 0, 8, 16, "dm_sub4", _pack_q2_k),
        Panel("Q3_K", (2, 1), 4, 8, 16, "d_sub", _pack_q3_k),
        Panel("Q4_K", (4,), 0, 8, 32, "dm_sub", _pack_k_with_minima(False)),
        Panel("Q5_K", (4, 1), 0, 8, 32, "dm_sub", _pack_k_with_minima(True)),
        Panel("Q6_K", (4, 2), 32, 8, 16, "d_sub", _pack_q6_k),
        Panel("IQ4_XS", (4,), 128, 8, 32, "d_sub", _pack_iq4_xs, _LEVELS),
        *(Panel(f"G4_{n}", (4,), 0, n // BLOCK, BLOCK, "dz", _pack_g4(n // BLOCK)) for n in (32, 64, 128)),
    )
}


def pack(name: str, raw: Bytes, rows: int, out: Bytes | None = None) -> Bytes:
    """File bytes of a matrix -> panels.

    Args:
        name: format, a key of PANELS.
        raw: the tensor's bytes, uint8, rows after each other.
        rows: rows of the matrix.
        out: where to write, contiguous; a new array if None.

    Returns:
        (groups, records, record_bytes) uint8; groups = ceil(rows / 16), the last one filled with zero rows.
    """
    panel = PANELS[name]
    matrix = raw.reshape(rows, -1)
    fmt = FORMATS[name]
    records = matrix.shape[1] // fmt.dtype.itemsize * fmt.block // (panel.blocks * BLOCK)
    shape = (-(-rows // ROWS), records, panel.record_bytes)
    target = np.empty(shape, np.uint8) if out is None else out.reshape(shape)
    step = max(
        1, (1 << 20) // (records * panel.record_bytes)
    )  # about 1 MB at a time stays in cache and bounds the copies
    for first in range(0, shape[0], step):
        part = matrix[first * ROWS : (first + step) * ROWS]
        short = -len(part) % ROWS
        if short:
            part = np.concatenate([part, np.zeros((short, part.shape[1]), np.uint8)])
        target[first : first + step] = panel.pack(part)
    return target
