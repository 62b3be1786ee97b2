"""Panels: the one layout of weights that every CPU reads, and the way from a file's blocks into it and back.

16 rows make a row group. Along k a row group is a row of records; a record holds one 32-wide block of 16 rows
(K-quants: eight of them) as bit planes, then the scales of the 16 rows. A quad is 4 neighbouring k of one row: 4 bytes,
one lane of i32x16.

    8-bit plane, 512 B    vector j (64 B) = quad j of rows 0..15                                   j = 0..7
    4-bit plane, 256 B    vector j        = quad j in the low nibbles, quad j + 4 in the high ones   j = 0..3
    2-bit plane, 128 B    vector u        = quad u + 2 f in bits 2f, 2f + 1                          u = 0..1, f = 0..3
    1-bit plane,  64 B    the one vector  = quad j in bit j                                          j = 0..7

    Q4_0  [4-bit plane][16 x f16 d]                        288 B = 16 x  18, the bytes of the file
    Q4_1  [4-bit plane][16 x f16 d][16 x f16 m]            320 B = 16 x  20
    Q8_0  [8-bit plane][16 x f16 d]                        544 B = 16 x  34
    Q6_K  8 x [4-bit plane][2-bit plane], [16 subs][16 rows] i8, [16 x f16 d]     3,360 B = 16 x 210
    F32, F16, BF16        k vectors of 16 rows

A weight is S * (u - zero) + M with the unsigned u of the planes. Rows beyond the matrix are zero, k is a multiple of
the block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
ROWS = 16  # rows of a row group = lanes
BLOCK = 32  # k of a block


@dataclass(frozen=True)
class Panel:
    """How one format lies in memory.

    Attributes:
        name: format name as in GGUF.
        planes: bits of each plane, the low bits of u first; empty for float formats.
        zero: u that means 0.
        blocks: 32-wide blocks in a record.
        group: k that share a scale, 32 or 16.
        scales: "d" (f16), "dm" (f16 scale and minimum) or "d_sub" (f16 times an int8 per group); "" for float formats.
        pack: file bytes (rows, row_bytes) -> (groups, records, record_bytes); rows a multiple of 16.
    """

    name: str
    planes: tuple[int, ...]
    zero: int
    blocks: int
    group: int
    scales: str
    pack: Callable[[Bytes], Bytes]

    @property
    def is_float(self) -> bool:
        """True where weights are floats and activations stay f32."""
        return not self.planes

    @property
    def block_bytes(self) -> int:
        """Bytes of the planes of one block of 16 rows."""
        return sum(self.planes) * ROWS * BLOCK // 8

    @property
    def record_bytes(self) -> int:
        """Bytes of one record; for float formats of 32 k."""
        if self.is_float:
            return ROWS * BLOCK * (4 if self.name == "F32" else 2)
        tail = {"d": 2, "dm": 4, "d_sub": 2 + self.blocks * BLOCK // self.group}[self.scales]
        return self.blocks * self.block_bytes + ROWS * tail


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
    return _record(_quads(blocks[..., 2:]), _lanes(np.ascontiguousarray(blocks[..., :2]).view("<u2")))


def _pack_q4_1(raw: Bytes) -> Bytes:
    blocks = raw.reshape(len(raw), -1, 20)
    return _record(_quads(blocks[..., 4:]), _lanes(np.ascontiguousarray(blocks[..., :4]).view("<u2")))


def _pack_q8_0(raw: Bytes) -> Bytes:
    blocks = raw.reshape(len(raw), -1, 34)
    return _record(_quads(blocks[..., 2:]), _lanes(np.ascontiguousarray(blocks[..., :2]).view("<u2")))


def _pack_q6_k(raw: Bytes) -> Bytes:
    blocks = raw.reshape(len(raw), -1, 210)
    low, high, subs, d = blocks[..., :128], blocks[..., 128:192], blocks[..., 192:208], blocks[..., 208:]
    # file: two halves of 128 k; k = 32 f + i lives in low[half, (f & 1) * 32 + i] nibble f >> 1, and in high[half, i]
    # bits 2f, 2f + 1
    low = low.reshape(*low.shape[:2], 2, 1, 2, 32)
    nibbles = np.concatenate([low & 15, low >> 4], axis=3)  # (rows, records, half, f >> 1, f & 1, 32)
    nibbles = nibbles.reshape(*nibbles.shape[:2], 8, 32)  # (rows, records, block, 32)
    high = high.reshape(*high.shape[:2], 2, 1, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8).reshape(4, 1)
    twos = ((high >> shifts) & 3).reshape(*nibbles.shape)
    plane4 = nibbles[..., :16] | (nibbles[..., 16:] << 4)
    fields = twos.reshape(*twos.shape[:3], 4, 8)  # quads u + 2 f: f, then 8 bytes = quads u = 0, 1
    plane2 = fields[..., 0, :] | (fields[..., 1, :] << 2) | (fields[..., 2, :] << 4) | (fields[..., 3, :] << 6)
    planes = _quads(np.concatenate([plane4, plane2], axis=3).reshape(*blocks.shape[:2], -1))
    return _record(planes, _lanes(subs), _lanes(np.ascontiguousarray(d).view("<u2")))


def _pack_float(itemsize: int) -> Callable[[Bytes], Bytes]:
    def pack(raw: Bytes) -> Bytes:
        values = np.ascontiguousarray(raw).view(f"<u{itemsize}").reshape(len(raw), -1, BLOCK)
        return _record(_lanes(values))

    return pack


PANELS: dict[str, Panel] = {
    p.name: p
    for p in (
        Panel("F32", (), 0, 1, 32, "", _pack_float(4)),
        Panel("F16", (), 0, 1, 32, "", _pack_float(2)),
        Panel("BF16", (), 0, 1, 32, "", _pack_float(2)),
        Panel("Q4_0", (4,), 8, 1, 32, "d", _pack_q4_0),
        Panel("Q4_1", (4,), 0, 1, 32, "dm", _pack_q4_1),
        Panel("Q8_0", (8,), 128, 1, 32, "d", _pack_q8_0),
        Panel("Q6_K", (4, 2), 32, 8, 16, "d_sub", _pack_q6_k),
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
    records = matrix.shape[1] * ROWS // panel.record_bytes
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
