"""The Python side of training's ops (kernels/ops.py says what each is told): one call, one job of the team."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from smolrun.errors import KernelError, OptionError
from smolrun.kernels import load as kernels
from smolrun.kernels import ops as told
from smolrun.kernels.block import LINE, f32_bits, scratch_bytes
from smolrun.kernels.target import BF16, choose, host_features, token_tile
from smolrun.model.memory import Arena
from smolrun.model.workers import Team

Address = int


@dataclass(frozen=True)
class Rows:
    """A source of rows, and what is done to each first: kernels/ops.py."""

    x: Address
    k: int
    stride: int = 0  # floats; 0: k
    norm: Address = 0
    eps: float = 0.0
    up: Address = 0
    up_stride: int = 0
    keep: float = 1.0
    seed: int = 0
    factor: float = 1.0

    def words(self) -> dict[str, int | float]:
        """As an op is told them."""
        return asdict(self) | {"stride": self.stride or self.k}


class Ops:
    """Runs ops. `ops("copy", items, **words)`: words by their names in kernels/ops.py, floats as f32."""

    def __init__(
        self,
        formats: Iterable[str],
        max_k: int,
        threads: int,
        bf16: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """formats: of the matrices that are multiplied; max_k: the most columns of a source; bf16: operands of products
        are bf16 in pairs (kernels/bf16.py).

        Raises:
            KernelError: no kernels for this CPU, or their compilation failed.
            OptionError: bf16 on a CPU without AVX512-BF16.
        """
        self.bf16, formats = bf16, sorted({"F32", *formats})
        products = [*told.IN_PAIRS[:-1], *(f"turn_{f}" for f in formats)]
        names = [f"op_{name}" for name in told.WORDS if name not in products]
        names += [f"op_{name}_bf16" if bf16 else f"op_{name}" for name in products]
        names += [f"op_pairs_{f}" if bf16 else f"matmul_{f}_f32" for f in formats] + [f"row_{f}" for f in formats]
        names += ["team_rouse", "team_run", "worker_loop"]
        report = (lambda done, all_, name: progress(done, all_)) if progress else None
        try:
            self.tier = choose()
            if bf16 and (self.tier.dot != BF16.dot or not set(BF16.needs) <= host_features()):
                raise OptionError(
                    "precision='bf16' needs a CPU with AVX512-BF16 (Zen 4, Sapphire Rapids and later), and no "
                    "SMOLRUN_TIER without AVX512-VNNI: take 'f32'"
                )
            self.code = kernels.addresses(self.tier, names, report)
            if bf16:
                self.code |= kernels.addresses(BF16, ["pairs_matmul"], report)
        except (kernels.BuildError, RuntimeError) as error:
            raise KernelError(f"{error} (see `smolrun warmup -v`)") from error
        self.tile = token_tile(self.tier, 0)
        self.threads = threads
        self._team = Team(self.code, threads)
        size = max(scratch_bytes(max_k), 128 + 4 * self.tile * max_k, told.ATTEND_BACK_SCRATCH)
        self._arena = Arena({"counter": LINE, "scratch": threads * size, "block": 8 * 64})
        self._counter = self._arena.arrays["counter"].view(np.int64)
        self._block: NDArray[np.int64] = self._arena.arrays["block"].view(np.int64)
        self._block[:4] = self._arena.address("counter"), 0, self._arena.address("scratch"), size
        self._address = self._arena.address("block")

    def __call__(self, name: str, items: int, source: Rows | None = None, **words: int | float) -> None:
        """Do all items of an op."""
        kind = name.partition("_")[0]
        places = told.WORDS.get(name) or told.PER_FORMAT[kind]
        if self.bf16 and (name in told.IN_PAIRS or kind in told.IN_PAIRS):
            name += "_bf16"
        if source is not None:
            words = source.words() | words
        block = self._block
        for word, value in words.items():
            block[getattr(places, word) // 8] = f32_bits(value) if isinstance(value, float) else value
        block[1] = items
        self._counter[:2] = 0
        self._team.run(self.code[f"op_{name}"], self._address)

    def close(self) -> None:
        """End the threads."""
        self._team.close()
