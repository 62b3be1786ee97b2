"""What is trained, and what is frozen: numbers in the layout that every kernel of the runtime reads.

    values, gradients    [matrix][matrix] ... [norm][norm] ...       f32, one run of memory each; decayed | not decayed

A matrix lies as F32 panels (kernels/panels.py), rows rounded up to 16 with zeros; its gradient and moments lie like it.
Names are GGUF's, rows of q and k in half-split rotary order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from smolrun.config import ModelConfig
from smolrun.files.checkpoint import Checkpoint
from smolrun.kernels.formats import FORMATS, dequantize_ref
from smolrun.kernels.panels import ROWS, pack
from smolrun.model import weights
from smolrun.model.memory import Arena, panel_bytes

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Matrix:
    """A weight matrix where kernels find it. Gradient 0: frozen."""

    name: str
    rows: int
    cols: int
    format: str
    address: int
    gradient: int = 0

    @property
    def groups(self) -> int:
        """Row groups of 16."""
        return int(-(-self.rows // ROWS))

    def parts(self, groups: int) -> Iterator[tuple[int, Matrix]]:
        """(first group, matrix) of up to so many row groups each."""
        group_bytes = panel_bytes(self.format, ROWS, self.cols)
        for first in range(0, self.groups, groups):
            rows = min(groups * ROWS, self.rows - first * ROWS)
            yield first, replace(self, rows=rows, address=self.address + first * group_bytes)


@dataclass(frozen=True)
class Norm:
    """A norm's weight. Gradient 0: frozen."""

    address: int
    gradient: int = 0


class Parameters:
    """Everything that is trained.

    Attributes:
        values, gradients: float32 (size,).
        decayed: so many of the first numbers, the matrices, are subject to weight decay.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """shapes: name -> (rows, cols), or (n,) of a norm."""
        self.shapes = dict(sorted(shapes.items(), key=lambda item: -len(item[1])))  # matrices first, order kept
        self._first, size = dict[str, int](), 0
        self.decayed = 0
        for name, shape in self.shapes.items():
            self._first[name] = size
            size += int(-(-shape[0] // ROWS) * ROWS * np.prod(shape[1:], dtype=np.int64))
            self.decayed = size if len(shape) == 2 else self.decayed
        self.size = size
        self._arena = Arena({"values": 4 * size, "gradients": 4 * size})
        self.values: Floats = self._arena.arrays["values"].view(np.float32)
        self.gradients: Floats = self._arena.arrays["gradients"].view(np.float32)

    def __len__(self) -> int:
        """Trained numbers, without padding."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    def address(self, name: str) -> tuple[int, int]:
        """Addresses of a parameter's values and gradient."""
        first = 4 * self._first[name]
        return self._arena.address("values") + first, self._arena.address("gradients") + first

    def matrix(self, name: str) -> Matrix:
        """A matrix to multiply with."""
        rows, cols = self.shapes[name]
        return Matrix(name, rows, cols, "F32", *self.address(name))

    def _part(self, flat: Floats, name: str) -> Floats:
        shape = self.shapes[name]
        if len(shape) == 1:
            return flat[self._first[name] : self._first[name] + shape[0]]
        groups = -(-shape[0] // ROWS)
        size = groups * ROWS * shape[1]
        return flat[self._first[name] : self._first[name] + size].reshape(groups, shape[1], ROWS)

    def get(self, name: str, gradient: bool = False) -> Floats:
        """A copy of a parameter, or of its gradient, in its own shape."""
        part, shape = self._part(self.gradients if gradient else self.values, name), self.shapes[name]
        rows = part if len(shape) == 1 else part.swapaxes(1, 2).reshape(-1, shape[1])[: shape[0]]
        return np.array(rows, np.float32)

    def set(self, name: str, values: Floats) -> None:
        """Overwrite a parameter."""
        part, shape = self._part(self.values, name), self.shapes[name]
        values = np.ascontiguousarray(values, np.float32).reshape(shape)
        if len(shape) == 1:
            part[:] = values
        else:
            pack("F32", values.view(np.uint8), shape[0], part.reshape(-1).view(np.uint8))

    def read(self, checkpoint: Checkpoint) -> None:
        """All values from a checkpoint of the same shapes, whatever its format."""
        for name in self.shapes:
            tensor = checkpoint.tensors[name]
            part = self._part(self.values, name)
            if len(tensor.shape) == 1:
                part[:] = dequantize_ref(FORMATS[tensor.format], tensor.raw.view(FORMATS[tensor.format].dtype)).ravel()
            else:
                weights.Matrix(tensor, "F32").pack_into(part.reshape(-1).view(np.uint8))
            tensor.release()

    def initialise(self, seed: int, std: float) -> None:
        """Normal matrices of this standard deviation, norms of 1: the same on every machine and thread count."""
        random = np.random.Generator(np.random.PCG64(seed))
        for name, shape in self.shapes.items():
            if len(shape) == 1:
                self.set(name, np.ones(shape, np.float32))
            else:
                self.set(name, random.standard_normal(shape, np.float32) * np.float32(std))


class Frozen:
    """The matrices and norms of a checkpoint in their own formats, as the runtime packs and keeps them."""

    def __init__(self, checkpoint: Checkpoint, quantize: str | None) -> None:
        """quantize: as smolrun.load."""
        self._planned = weights.plan(checkpoint, quantize)
        self._arena = weights.panels(checkpoint, self._planned, quantize)

    @property
    def formats(self) -> set[str]:
        """Formats of the matrices."""
        return {m.format for m in self._planned.values()}

    def matrix(self, name: str) -> Matrix:
        """A matrix to multiply with."""
        m = self._planned[name]
        return Matrix(name, m.rows, m.cols, m.format, self._arena.address(name))

    def norm(self, name: str) -> Norm:
        """A norm's weight."""
        return Norm(self._arena.address(name))


def standard_deviation(config: ModelConfig) -> float:
    """Of the weights to begin with: 1 / sqrt(dim), SmolLM2-135M's choice."""
    return float(config.dim**-0.5)
