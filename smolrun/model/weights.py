"""Weights: every matrix of a checkpoint as panels in one arena, and the table of them that the kernels read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smolrun.config import ModelConfig
from smolrun.errors import ModelFileError, OptionError, UnsupportedModel
from smolrun.files.checkpoint import Checkpoint, Tensor
from smolrun.kernels.block import HEAD_DIM, LAYER, MATRICES, L, W
from smolrun.kernels.formats import FORMATS, dequantize_ref, quantize_ref
from smolrun.kernels.panels import BLOCK, PANELS, ROWS, pack
from smolrun.model.memory import Arena, panel_bytes, rounded
from smolrun.model.packed import Pack

QUANTIZE = {"q4_0": "Q4_0", "q4_1": "Q4_1", "q8_0": "Q8_0", "f16": "F16", "bf16": "BF16", "f32": "F32"}
CLAIM_BYTES = 128 << 10  # panels of one claim: they stay in the L2 cache while all tokens pass over them
STEP_ROWS = 1024  # rows converted at once

TENSOR = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def kind_of(name: str) -> str:
    """The matrix a tensor's name stands for: one of MATRICES, or "head" (the tied embedding included)."""
    part = name.split(".")[-2]
    return next((m for m, tensor in TENSOR.items() if tensor == part), "head")


@dataclass(frozen=True)
class Matrix:
    """One matrix as it will be in memory: (rows, cols) in `format`, from a tensor of maybe another format."""

    tensor: Tensor
    format: str

    @property
    def rows(self) -> int:
        """Rows, without padding."""
        return self.tensor.shape[0]

    @property
    def cols(self) -> int:
        """Columns."""
        return self.tensor.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes of the panels."""
        return panel_bytes(self.format, self.rows, self.cols)

    def pack_into(self, out: NDArray[np.uint8]) -> None:
        """Write the panels, rows of q and k in half-split rotary order."""
        t = self.tensor
        raw = t.raw.reshape(self.rows, -1)
        if t.permuted:  # GGUF pairs neighbours (2i, 2i + 1); ours pairs (i, i + 32)
            raw = raw.reshape(-1, HEAD_DIM // 2, 2, raw.shape[1]).swapaxes(1, 2).reshape(self.rows, -1)
        if self.format == t.format:
            pack(self.format, raw, self.rows, out)
            return
        parts = []
        for first in range(0, self.rows, STEP_ROWS):
            blocks = np.ascontiguousarray(raw[first : first + STEP_ROWS]).view(FORMATS[t.format].dtype)
            values = dequantize_ref(FORMATS[t.format], blocks).reshape(len(blocks), -1)
            parts.append(
                np.ascontiguousarray(quantize_ref(FORMATS[self.format], values)).view(np.uint8).reshape(len(values), -1)
            )
        pack(self.format, np.concatenate(parts), self.rows, out)


def plan(checkpoint: Checkpoint, quantize: str | None) -> dict[str, Matrix]:
    """Which format every matrix will have in memory; names as in the checkpoint, `output.weight` only if it is its own.

    Raises:
        OptionError: an unknown `quantize`, or one for weights that are quantised already.
        UnsupportedModel: a format without panels.
    """
    if quantize is not None and checkpoint.packed is not None:
        raise OptionError(
            f"quantize={quantize!r}: {checkpoint.path.name} is packed already: give it to `smolrun compile`"
        )
    if quantize is not None and quantize.lower() not in QUANTIZE:
        raise OptionError(f"quantize={quantize!r}: expected one of {', '.join(QUANTIZE)} or None")
    matrices = {}
    for name, tensor in checkpoint.tensors.items():
        if len(tensor.shape) != 2:
            continue
        if tensor.format not in PANELS:
            raise UnsupportedModel(
                f"{name} is {tensor.format}; this version runs {', '.join(PANELS)} (requantise the file)"
            )
        wanted = QUANTIZE[quantize.lower()] if quantize else tensor.format
        if wanted != tensor.format and not PANELS[tensor.format].is_float:
            raise OptionError(
                f"quantize={quantize!r}: {name} is {tensor.format} already; quantise from F32, F16 or BF16 weights"
            )
        matrices[name] = Matrix(tensor, wanted)
    return matrices


def sizes(checkpoint: Checkpoint, matrices: Mapping[str, Matrix]) -> dict[str, int]:
    """Bytes of the panels and norms of a checkpoint, in the order of their arena."""
    norms = [n for n, t in checkpoint.tensors.items() if len(t.shape) == 1]
    return {name: m.bytes for name, m in matrices.items()} | dict.fromkeys(norms, 4 * checkpoint.config.dim)


def panels(
    checkpoint: Checkpoint,
    matrices: Mapping[str, Matrix],
    quantize: str | None,
    progress: Callable[[int, int], object] | None = None,
) -> Arena:
    """Panels and norms of a checkpoint: where they lie in a packed model's file, else from the cache or packed now.

    Args:
        matrices: from `plan` with this `quantize`.
        progress: called with (bytes packed, bytes to pack).

    Raises:
        ModelFileError: a packed model that is damaged.
    """
    its = sizes(checkpoint, matrices)
    if checkpoint.packed is not None:
        found = checkpoint.packed.array("weights")
        if len(found) != rounded(its):
            raise ModelFileError(f"{checkpoint.path.name}: {len(found):,} bytes of weights, {rounded(its):,} expected")
        return Arena(its, found)
    pack = Pack.of(checkpoint, quantize)
    arena = pack.read(its)
    if arena is None:
        words = pack.prepare(checkpoint, its)
        arena = Arena(its)
        _fill(arena, checkpoint, matrices, progress)
        if words is not None:  # what cannot be kept is packed again; `smolrun info` says so
            pack.write(checkpoint, arena, words)
    return arena


def _fill(
    arena: Arena,
    checkpoint: Checkpoint,
    matrices: Mapping[str, Matrix],
    progress: Callable[[int, int], object] | None,
) -> None:
    """Pack every matrix, and convert the norms."""
    done, total = 0, sum(m.tensor.nbytes for m in matrices.values())
    for name, matrix in matrices.items():
        matrix.pack_into(arena.arrays[name])
        matrix.tensor.release()
        done += matrix.tensor.nbytes
        if progress:
            progress(done, total)
    for name in arena.arrays.keys() - matrices.keys():
        t = checkpoint.tensors[name]
        values = dequantize_ref(FORMATS[t.format], t.raw.view(FORMATS[t.format].dtype))
        arena.arrays[name].view(np.float32)[:] = values.reshape(-1)


@dataclass(frozen=True)
class Tables:
    """What the kernels read of the weights.

    Attributes:
        layers: L words of each layer.
        embed, head: W words of two matrices, of one if they are tied.
        final_norm: where the last norm is.
    """

    layers: NDArray[np.int64]
    embed: NDArray[np.int64]
    head: NDArray[np.int64]
    final_norm: int


def tables(
    config: ModelConfig,
    matrices: Mapping[str, Matrix],
    address: Callable[[str], int],
    kernel: Callable[[str, int], int],
    terms: Callable[[str, str], int],
    threads: int,
) -> Tables:
    """The tables of a model; arguments as those of `Weights`.

    address: name of an array -> where it is.
    """

    def entry(name: str, kind: str) -> list[int]:
        m = matrices[name]
        t = terms(m.format, kind)
        groups, blocks = -(-m.rows // ROWS), m.cols // BLOCK
        step = max(1, min(CLAIM_BYTES * groups // m.bytes, -(-groups // (8 * threads))))
        step += step % 2  # some tiers take two row groups at a time
        values = {"matmul": kernel(m.format, t), "panel": address(name), "groups": groups, "blocks": blocks}
        values |= {"step": step, "terms": t, "adapter": 0}
        return [values[field] for field in W._fields[:-1]]

    layers: NDArray[np.int64] = np.zeros((config.n_layers, L.size), np.int64)
    for i, row in enumerate(layers):
        row[LAYER.attn_norm // 8] = address(f"blk.{i}.attn_norm.weight")
        row[LAYER.ffn_norm // 8] = address(f"blk.{i}.ffn_norm.weight")
        for m in MATRICES:
            first = getattr(LAYER, m) // 8
            row[first : first + W.size] = entry(f"blk.{i}.{TENSOR[m]}.weight", m)
    embed: NDArray[np.int64] = np.array(entry("token_embd.weight", "head"), np.int64)
    head = "output.weight" if "output.weight" in matrices else "token_embd.weight"
    return Tables(layers, embed, np.array(entry(head, "head"), np.int64), address("output_norm.weight"))


class Weights:
    """Panels of all matrices and the kernels' table of layers.

    Args:
        config: the model.
        checkpoint: open; not needed afterwards.
        matrices: from `plan` with this `quantize`.
        kernel: (format, int8 terms of the activations, 0 for f32) -> address of the matmul kernel.
        terms: (format, matrix: one of MATRICES or "head") -> int8 terms.
        threads: claims are cut so that every thread gets several.
    """

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        matrices: Mapping[str, Matrix],
        kernel: Callable[[str, int], int],
        terms: Callable[[str, str], int],
        threads: int,
        quantize: str | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        self.bytes = sum(m.bytes for m in matrices.values())
        self._arena = arena = panels(checkpoint, matrices, quantize, progress)
        self.tables = tables(config, matrices, arena.address, kernel, terms, threads)

    def adapt(self, words: NDArray[np.int64] | None) -> None:
        """Put adapters beside the matrices: addresses (n_layers, len(MATRICES)) of their words, 0 or None for none."""
        for i, m in enumerate(MATRICES):
            at = (getattr(LAYER, m) + W.adapter) // 8
            self.tables.layers[:, at] = 0 if words is None else words[:, i]
