"""LoRA (arXiv 2106.09685): y = x W^T + (alpha / rank) dropout(x) A^T B^T, W frozen, A and B trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from smolrun.config import ModelConfig
from smolrun.errors import OptionError
from smolrun.files.peft import Factors, LowRank
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
        if not self.alpha or not math.isfinite(self.alpha):
            raise OptionError(f"alpha={self.alpha}: expected a number other than 0")
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
        return int(-(-self.rank // BLOCK) * BLOCK)

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

    def low_rank(self, parameters: Parameters, base: str = "") -> LowRank:
        """What was trained, as the runtime and adapter folders have it."""
        stems = [name.removesuffix(".lora_a") for name in parameters.shapes if name.endswith(".lora_a")]
        factors = {}
        for stem in stems:
            a, b = (parameters.get(f"{stem}.lora_{part}") for part in "ab")
            factors[stem] = Factors(a[: self.rank], np.ascontiguousarray(b[:, : self.rank]), self.scale)
        return LowRank(factors, self.rank, self.alpha, self.dropout, base)

    @classmethod
    def of(cls, adapter: LowRank, n_layers: int, seed: int = 0) -> LoRA:
        """The kind of an adapter that is to be trained on.

        Raises:
            OptionError: a matrix has one in some layers only.
        """
        parts = {stem.split(".")[-1] for stem in adapter.factors}
        targets = tuple(m for m, tensor in TENSOR.items() if tensor in parts)
        if len(adapter.factors) != n_layers * len(targets):
            raise OptionError("an adapter for some of the layers only cannot be trained on")
        scale = next(iter(adapter.factors.values())).scale
        return cls(adapter.rank, scale * adapter.rank, adapter.dropout, targets, seed)

    def read(self, adapter: LowRank, parameters: Parameters) -> None:
        """Go on from an adapter of this kind."""
        for stem, f in adapter.factors.items():
            for part, values in (("a", f.a), ("b", f.b)):
                padded = np.zeros(parameters.shapes[f"{stem}.lora_{part}"], np.float32)
                padded[: values.shape[0], : values.shape[1]] = values
                parameters.set(f"{stem}.lora_{part}", padded)


@dataclass(frozen=True)
class Adapter:
    """One matrix's adapter at work. u: address of dropout(x) A^T of the batch, f32 (n, padded rank)."""

    a: Matrix
    b: Matrix
    u: int
    lora: LoRA
    number: int  # of all adapters: each drops out on its own
