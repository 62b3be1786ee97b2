"""LoRA (arXiv 2106.09685): y = x W^T + (alpha / rank) dropout(x) A^T B^T, W frozen, A and B trained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from smolrun.config import ModelConfig
from smolrun.errors import OptionError
from smolrun.kernels.block import MATRICES
from smolrun.kernels.panels import BLOCK
from smolrun.model.weights import TENSOR
from smolrun.train.parameters import Matrix, Parameters


@dataclass(frozen=True)
class LoRA:
    """Which matrices get adapters, and of which kind.

    Attributes:
        targets: of q, k, v, o, gate, up, down.
        dropout: probability with which an element of an adapter's input is left out.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "v")
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 1024:
            raise OptionError(f"rank={self.rank}: expected 1..1024")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"dropout={self.dropout}: expected a probability below 1")
        if not self.targets or not set(self.targets) <= set(MATRICES):
            raise OptionError(f"targets={self.targets}: expected some of {', '.join(MATRICES)}")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @property
    def padded(self) -> int:
        """The rank as kernels see it: a multiple of 32, the rest zero (and their gradients too)."""
        return -(-self.rank // BLOCK) * BLOCK

    def shapes(self, config: ModelConfig, matrices: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all adapters: blk.3.attn_q.lora_a (rank, cols), .lora_b (rows, rank)."""
        out: dict[str, tuple[int, ...]] = {}
        for i in range(config.n_layers):
            for target in self.targets:
                stem = f"blk.{i}.{TENSOR[target]}"
                rows, cols = matrices[f"{stem}.weight"]
                out |= {f"{stem}.lora_a": (self.padded, cols), f"{stem}.lora_b": (rows, self.padded)}
        return out

    def initialise(self, parameters: Parameters) -> None:
        """A uniform as torch's Linear (kaiming, a = sqrt 5: +-1 / sqrt(cols)), B zero: at first nothing changes."""
        random = np.random.Generator(np.random.PCG64(self.seed))
        for name, (_, cols) in parameters.shapes.items():
            if name.endswith(".lora_a"):
                values = np.zeros(parameters.shapes[name], np.float32)
                values[: self.rank] = (random.random((self.rank, cols), np.float32) * 2 - 1) / np.sqrt(cols)
                parameters.set(name, values)


@dataclass(frozen=True)
class Adapter:
    """One matrix's adapter at work. u: address of dropout(x) A^T of the batch, f32 (n, padded rank)."""

    a: Matrix
    b: Matrix
    u: int
    lora: LoRA
    number: int  # of all adapters: each drops out on its own
