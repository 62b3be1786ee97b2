"""One step of training, on a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from smolrun.errors import OptionError, SmolrunError
from smolrun.train.model import Batch, Model
from smolrun.train.objective import Objective, next_token
from smolrun.train.optimiser import AdamW, Schedule


@dataclass(frozen=True)
class Step:
    """What a step did.

    Attributes:
        number: steps done, this one included.
        loss: of the objective, before the step.
        gradient_norm: before it was clipped.
        tokens: ids that were read.
        figures: what else the objective tells.
    """

    number: int
    loss: float
    lr: float
    gradient_norm: float
    tokens: int
    figures: dict[str, float] = field(default_factory=dict)


class Trainer:
    """A model, an optimiser, a schedule and an objective.

    >>> trainer = Trainer(model, AdamW(model.parameters, model.ops), constant(1e-3))      # doctest: +SKIP
    >>> trainer.step([Batch.of([tokenizer.encode("The sea is blue.")])]).loss             # doctest: +SKIP
    """

    def __init__(
        self,
        model: Model,
        optimiser: AdamW,
        schedule: Schedule,
        objective: Objective = next_token,
        *,
        clip: float | None = 1.0,
    ) -> None:
        """clip: the gradients' norm is made at most this."""
        self.model, self.optimiser, self.schedule = model, optimiser, schedule
        self.objective, self.clip = objective, clip

    def step(self, batches: Sequence[Batch]) -> Step:
        """One step on one or more batches, whose gradients add up.

        Raises:
            SmolrunError: the gradients are no longer numbers; the parameters are as before the step.
        """
        number = self.optimiser.steps
        self.model.dropout_seed = number
        figures = self.objective(self.model, batches)
        norm = self.optimiser.gradient_norm()
        if not np.isfinite(norm):
            raise SmolrunError(
                f"step {number}: loss {figures['loss']}, gradient norm {norm}: training diverged; "
                "lower the learning rate"
            )
        lr = self.schedule(number)
        clip = 1.0 if self.clip is None else min(1.0, self.clip / (norm + 1e-6))
        self.optimiser.step(lr, clip)
        tokens = sum(len(batch.ids) for batch in batches)
        return Step(number + 1, figures.pop("loss"), lr, norm, tokens, figures)

    def state(self) -> dict[str, np.ndarray]:
        """All that a later run needs to go on with the same bits: views of the parameters, the moments, the step."""
        o = self.optimiser
        return {"values": self.model.parameters.values, "m": o.m, "v": o.v, "steps": np.array([o.steps])}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a `state` of a trainer of the same shapes.

        Raises:
            OptionError: it is of another model.
        """
        mine = self.state()
        for name, values in mine.items():
            if name not in state or state[name].shape != values.shape:
                found = state[name].shape if name in state else "nothing"
                raise OptionError(f"state {name}: {values.shape} expected, {found} found: it is of another model")
            values[...] = state[name]
        self.optimiser.steps = int(state["steps"][0])
        self.model.parameters.gradients[:] = 0
