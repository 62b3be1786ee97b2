"""GPTQ and AWQ: 4-bit linear layers of a safetensors folder, as blocks of the format G4_n.

    GPTQ   qweight int32 (in / 8, out)    nibble j of word c = input 8 c + j
           qzeros  int32 (groups, out / 8)  nibble j of word c = output 8 c + j, stored less 1 ("gptq_v2": as it is)
           g_idx   int32 (in,)            group of each input; only the plain order i // group_size is run
    AWQ    qweight int32 (in, out / 8)    nibble j of word c = output 8 c + ORDER[j]; qzeros (groups, out / 8) alike
    both   scales  float16 (groups, out)  w[out, in] = scale * (q - zero)

Nothing is rounded: scale and zero stay what they are. Source: the packers of AutoGPTQ and AutoAWQ (gemm).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolrun.errors import ModelFileError, UnsupportedModel
from smolrun.files.folder import Shard
from smolrun.files.mapped import AGAIN
from smolrun.kernels.formats import pack_g4

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AWQ: which output nibble j holds
PLAIN = range(8)
BLOCKS = (128, 64, 32)  # of G4_n; the largest that divides a group


@dataclass(frozen=True, slots=True)
class Packing:
    """What quantization_config says.

    Attributes:
        method: "gptq" or "awq".
        group_size: inputs that share a scale; -1 for all of a row.
        less: by how much stored zero points are too small.
    """

    method: str
    group_size: int
    less: int


def packing(config: Mapping[str, Any]) -> Packing | None:
    """From a config.json; None if its weights are plain.

    Raises:
        UnsupportedModel: another method, width, group size or layout; names it.
    """
    given = config.get("quantization_config")
    if given is None:
        return None
    where = "config.json: quantization_config"
    if not isinstance(given, dict):
        raise ModelFileError(f"{where} is {type(given).__name__}, an object expected {AGAIN}")
    method = given.get("quant_method")
    bits, group = given.get("bits", given.get("w_bit")), given.get("group_size", given.get("q_group_size"))
    layouts = {"gptq": (None, "gptq", "gptq_v2"), "awq": (None, "gemm", "GEMM")}
    if not isinstance(method, str) or method not in layouts:
        raise UnsupportedModel(f"{where}.quant_method is {method!r}; only 'gptq' and 'awq' are supported")
    layout = given.get("checkpoint_format" if method == "gptq" else "version")
    if layout not in layouts[method]:
        raise UnsupportedModel(f"{where}: layout {layout!r} of {method}; only {layouts[method][1:]} are supported")
    if bits != 4:
        raise UnsupportedModel(f"{where}: {bits!r} bits; only 4 are supported")
    if type(group) is not int or (group != -1 and (group < 32 or group % 32)):
        raise UnsupportedModel(f"{where}: groups of {group!r}; only multiples of 32, and -1, are supported")
    return Packing(method, group, int(method == "gptq" and layout != "gptq_v2"))


@dataclass(frozen=True, slots=True)
class Layer:
    """One packed matrix, checked; `read` makes its blocks.

    Attributes:
        block: weights of one block of G4_n.
    """

    label: str
    packing: Packing
    parts: Mapping[str, Shard]
    shape: tuple[int, int]
    block: int

    @property
    def format(self) -> str:
        """Name in kernels.formats.FORMATS."""
        return f"G4_{self.block}"

    def read(self) -> NDArray[np.uint8]:
        """The blocks as bytes: uint8 (nbytes,).

        Raises:
            ModelFileError: a scale that is NaN or infinite.
        """
        cols = self.shape[1]
        gptq = self.packing.method == "gptq"
        scales = self._array("scales", "<f2")
        if not np.isfinite(scales).all():
            raise ModelFileError(f"{self.label}.scales: NaN or infinity in it {AGAIN}")
        order = PLAIN if gptq else ORDER
        zeros = _nibbles(self._array("qzeros", "<u4"), order) + np.uint8(self.packing.less)
        words = self._array("qweight", "<u4")
        levels = _nibbles(np.ascontiguousarray(words.T), order) if gptq else _nibbles(words, order).T  # (rows, cols)
        repeats = cols // len(scales) // self.block
        d, z = (np.repeat(part.T, repeats, axis=1) for part in (scales, zeros))
        blocks: NDArray[np.uint8] = pack_g4(d, z, np.ascontiguousarray(levels)).view(np.uint8).reshape(-1)
        return blocks

    def _array(self, part: str, dtype: str) -> NDArray[Any]:
        shard = self.parts[part]
        return shard.file.view(shard.offset, shard.nbytes).view(dtype).reshape(shard.shape)

    def release(self) -> None:
        """Take the parts' pages out of resident memory."""
        for shard in self.parts.values():
            shard.file.release(shard.offset, shard.nbytes)


def _nibbles(words: NDArray[np.uint32], order: Any) -> NDArray[np.uint8]:
    """(n, m) words -> (n, 8 m): nibble j of word c at 8 c + order[j]."""
    out = np.empty((*words.shape, 8), np.uint8)
    for j, place in enumerate(order):
        out[..., place] = (words >> np.uint32(4 * j)) & np.uint32(15)
    return out.reshape(len(words), -1)


def layer(source: str, packing: Packing, stem: str, shape: tuple[int, int], shards: dict[str, Shard]) -> Layer:
    """Take the parts of the layer `stem` out of `shards`, checked.

    Raises:
        ModelFileError: a part that is missing, or of another shape or dtype than its layout says.
        UnsupportedModel: act-order, or scales of another type than float16.
    """
    (rows, cols), label = shape, f"{source}: tensor {stem}"
    group = cols if packing.group_size == -1 else packing.group_size
    if cols % group or rows % 8 or cols % 32:
        raise ModelFileError(f"{label}.qweight: {cols:,} inputs do not divide into groups of {group} {AGAIN}")
    groups = cols // group
    gptq = packing.method == "gptq"
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "qweight": ("I32", (cols // 8, rows) if gptq else (cols, rows // 8)),
        "qzeros": ("I32", (groups, rows // 8)),
        "scales": ("F16", (groups, rows)),
    }
    if gptq and f"{stem}.g_idx" in shards:
        expected["g_idx"] = ("I32", (cols,))
    parts = {}
    for part, (dtype, wanted) in expected.items():
        shard = shards.pop(f"{stem}.{part}", None)
        if shard is None:
            raise ModelFileError(f"{label}.{part} is missing {AGAIN}")
        if part == "scales" and shard.dtype in ("F32", "BF16"):
            raise UnsupportedModel(f"{label}.scales is {shard.dtype}; only F16 is supported")
        if (shard.dtype, shard.shape) != (dtype, wanted):
            found = f"{shard.dtype} {shard.shape} found"
            raise ModelFileError(f"{label}.{part}: {dtype} {wanted} expected, {found} {AGAIN}")
        parts[part] = shard
    made = Layer(label, packing, parts, shape, next(block for block in BLOCKS if group % block == 0))
    if "g_idx" in parts and not np.array_equal(made._array("g_idx", "<i4"), np.arange(cols) // group):
        raise UnsupportedModel(f"{label}.g_idx: act-order (desc_act) is not supported; quantise with desc_act=False")
    return made
