"""AdamW, and learning rates as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from smolrun.errors import OptionError
from smolrun.kernels.ops import CHUNK
from smolrun.model.memory import Arena
from smolrun.train.ops import Ops
from smolrun.train.parameters import Parameters

Schedule = Callable[[int], float]  # step, from 0 -> learning rate


class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101): matrices decay, norms do not.

    Attributes:
        m, v: float32 (size,), first and second moments, laid out like the parameters.
        steps: steps done.
    """

    def __init__(
        self,
        parameters: Parameters,
        ops: Ops,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        decay: float = 0.01,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas) or not eps > 0 or not decay >= 0:
            raise OptionError(
                f"betas={betas}, eps={eps}, decay={decay}: expected betas below 1, eps above 0, decay >= 0"
            )
        self.parameters, self._ops = parameters, ops
        self.betas, self.eps, self.decay, self.steps = betas, eps, decay, 0
        size = parameters.size
        self._arena = Arena({"m": 4 * size, "v": 4 * size, "squares": 4 * -(-size // CHUNK)})
        self.m: NDArray[np.float32] = self._arena.arrays["m"].view(np.float32)
        self.v: NDArray[np.float32] = self._arena.arrays["v"].view(np.float32)

    def gradient_norm(self) -> float:
        """Euclidean norm of all gradients."""
        parts, size = self._arena.arrays["squares"].view(np.float32), self.parameters.size
        x = self.parameters.gradients.ctypes.data
        self._ops("squares", -(-size // CHUNK), x=x, count=size, parts=self._arena.address("squares"))
        return math.sqrt(parts.sum(dtype=np.float64))

    def step(self, lr: float, clip: float = 1.0) -> None:
        """Change the parameters by their gradients times `clip`, and make the gradients 0."""
        self.steps += 1
        beta1, beta2 = self.betas
        p = self.parameters
        arrays = {"p": p.values, "g": p.gradients, "m": self.m, "v": self.v}
        for first, end, decay in ((0, p.decayed, self.decay), (p.decayed, p.size, 0.0)):
            words: dict[str, int | float] = {name: int(a[first:].ctypes.data) for name, a in arrays.items()}
            words |= {"count": end - first, "lr": float(lr), "clip": float(clip), "decay": float(decay)}
            words |= {"beta1": float(beta1), "beta2": float(beta2), "eps": float(self.eps)}
            words |= {"correction1": 1 - beta1**self.steps, "correction2": math.sqrt(1 - beta2**self.steps)}
            self._ops("adamw", -(-(end - first) // CHUNK), None, **words)


def _ramp(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def constant(peak: float, *, warmup: int = 0) -> Schedule:
    """A linear warm-up, then the peak."""
    return lambda step: peak * _ramp(step, warmup)


def cosine(peak: float, steps: int, *, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """A linear warm-up, then half a cosine down to `floor` times the peak at the last step."""

    def rate(step: int) -> float:
        if step < warmup:
            return peak * _ramp(step, warmup)
        part = min(1.0, (step - warmup) / max(1, steps - warmup))
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * part)))

    return rate


def wsd(peak: float, steps: int, *, warmup: int, decay: int) -> Schedule:
    """Warm-up, stable, decay (arXiv 2404.06395): linear up, the peak, over the last `decay` steps linear down to 0."""
    if warmup + decay > steps:
        raise OptionError(f"warmup={warmup} and decay={decay} are more than steps={steps}")

    def rate(step: int) -> float:
        return peak * min(_ramp(step, warmup), max(0.0, (steps - step) / decay) if decay else 1.0)

    return rate
