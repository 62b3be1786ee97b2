"""What is learnt: functions of (model, batches) that add gradients to a model and return the loss and figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smolrun.errors import OptionError
from smolrun.train.model import Batch, Model

Objective = Callable[[Model, Sequence[Batch]], dict[str, float]]  # figures, "loss" among them


def next_token(model: Model, batches: Sequence[Batch]) -> dict[str, float]:
    """Mean cross-entropy of all targets of the batches together, however they are spread over them."""
    count = sum(int(batch.learnt.sum()) for batch in batches)
    if not count:
        raise OptionError("no position of these batches has a target: nothing to learn")
    total = 0.0
    for batch in batches:
        model.forward(batch)
        total -= float(model.backward(np.full(len(batch.ids), 1 / count, np.float32)).sum(dtype=np.float64))
    return {"loss": total / count, "targets": count}


def evaluate(model: Model, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy of all targets, without gradients and dropout."""
    total, count = 0.0, 0
    for batch in batches:
        with model.evaluating():
            model.forward(batch)
        total -= float(model.log_probs().sum(dtype=np.float64))
        count += int(batch.learnt.sum())
    if not count:
        raise OptionError("no position of these batches has a target: nothing to evaluate")
    return total / count


def document_log_probs(log_probs: NDArray[np.float32], lengths: Sequence[int]) -> NDArray[np.float64]:
    """Sums over each document: float64 (documents,)."""
    return np.add.reduceat(log_probs.astype(np.float64), np.concatenate([[0], np.cumsum(lengths)[:-1]]))


@dataclass(frozen=True)
class Pairs(Batch):
    """Documents that alternate: chosen, rejected, chosen, rejected, ...

    Attributes:
        reference: log p of each document's targets under the reference model, float64 (documents,).
    """

    reference: NDArray[np.float64]

    @classmethod
    def score(cls, model: Model, batch: Batch, *, adapters: bool = False) -> Pairs:
        """The batch, with the model as it is now as its own reference: without its adapters, or with them."""
        before, model.use_adapters = model.use_adapters, adapters
        try:
            with model.evaluating():
                model.forward(batch)
            return cls(batch.ids, batch.targets, batch.lengths, document_log_probs(model.log_probs(), batch.lengths))
        finally:
            model.use_adapters = before


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation (arXiv 2305.18290), with conservative labels where label_smoothing > 0.

    A pair's loss is -(1 - e) log s(h) - e log s(-h), s the sigmoid, h = beta (margin of the model - that of the
    reference), a margin being log p(chosen) - log p(rejected).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __call__(self, model: Model, batches: Sequence[Batch]) -> dict[str, float]:
        """Mean over all pairs; figures: reward margin (h), accuracy (h > 0), rewards of both sides."""
        count = sum(len(batch.lengths) // 2 for batch in batches)
        if not count:
            raise OptionError("no pairs: nothing to learn")
        rewards = []
        for batch in batches:
            rewards.append(self.rewards(model, batch))
            h, e = rewards[-1][0::2] - rewards[-1][1::2], self.label_smoothing
            slope = (1 - np.tanh(h / 2)) / 2 - e  # -d loss / d h = (1 - e) s(-h) - e s(h)
            weights = np.empty(len(batch.lengths))
            weights[0::2], weights[1::2] = slope, -slope
            model.backward(np.repeat(weights * self.beta / count, batch.lengths).astype(np.float32))
        return self.figures(np.concatenate(rewards))

    def rewards(self, model: Model, batch: Batch) -> NDArray[np.float64]:
        """beta (log p - log p of the reference) of each document, after a forward pass: float64 (documents,)."""
        if not isinstance(batch, Pairs) or len(batch.lengths) % 2:
            raise OptionError("DPO learns from Pairs: chosen and rejected documents in turns (Pairs.score)")
        model.forward(batch)
        return self.beta * (document_log_probs(model.log_probs(), batch.lengths) - batch.reference)

    def figures(self, rewards: NDArray[np.float64]) -> dict[str, float]:
        """Means over pairs of rewards, chosen and rejected in turns."""
        chosen, rejected, e = rewards[0::2], rewards[1::2], self.label_smoothing
        h = chosen - rejected
        loss = (1 - e) * np.logaddexp(0, -h) + e * np.logaddexp(0, h)
        named = {"loss": loss, "margin": h, "accuracy": h > 0, "chosen": chosen, "rejected": rejected}
        return {name: float(values.mean()) for name, values in named.items()}

    def evaluate(self, model: Model, batches: Sequence[Batch]) -> dict[str, float]:
        """The figures, without gradients and dropout, and 95 % intervals, margin_low to margin_high, accuracy_low ...

        The margin's is that of a mean of many (1.96 standard errors), the accuracy's is Wilson's.
        """
        with model.evaluating():
            rewards = np.concatenate([self.rewards(model, batch) for batch in batches])
        figures, h, z = self.figures(rewards), rewards[0::2] - rewards[1::2], 1.96
        n, p = len(h), figures["accuracy"]
        error = z * float(h.std()) / math.sqrt(max(n - 1, 1))
        middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
        figures |= {"margin_low": figures["margin"] - error, "margin_high": figures["margin"] + error}
        whole = 1 + z * z / n
        return figures | {"accuracy_low": (middle - spread) / whole, "accuracy_high": (middle + spread) / whole}
