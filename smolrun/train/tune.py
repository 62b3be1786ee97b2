"""Fine-tuning: examples in a shuffled order, anew each epoch, so many a step, packed into passes where each sees itself
alone; the loss that is held out says when to stop, and which weights were the best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from smolrun.errors import OptionError
from smolrun.files.whole import whole
from smolrun.train.examples import Example, Groups
from smolrun.train.model import Batch, Model
from smolrun.train.objective import DPO, Pairs, evaluate
from smolrun.train.recipe import Tune
from smolrun.train.run import Facts

Group = Sequence[Example]  # what cannot be parted: one example, or a pair
BEST = "best.npy"


def packed(groups: Iterable[Group], tokens: int) -> Iterator[list[Group]]:
    """Groups in their order, as many in each pass as fit so many tokens.

    Raises:
        OptionError: one that does not fit.
    """
    part, room = list[Group](), tokens
    for group in groups:
        size = sum(len(example.ids) - 1 for example in group)
        if size > tokens:
            raise OptionError(f"{size:,} tokens that belong together, {tokens:,} in a pass: raise batch.tokens")
        if size > room:
            yield part
            part, room = [], tokens
        part.append(group)
        room -= size
    if part:
        yield part


def batch_of(groups: Sequence[Group]) -> Batch:
    """Examples as documents that do not see each other."""
    examples = [example for group in groups for example in group]
    return Batch.of([e.ids.tolist() for e in examples], [e.mask.tolist() for e in examples])


class Feed:
    """The batches of a run (run.Feed).

    Attributes:
        epoch, next_: where it stands: number of the epoch, and of its next example.
        held: batches of what is held out.
    """

    def __init__(
        self,
        recipe: Tune,
        learnt: Groups,
        held: Groups,
        model: Model,
        score: Callable[[Sequence[Batch]], Facts],
    ) -> None:
        """score: figures on what is held out, "loss" among them."""
        self.recipe, self._learnt, self._model, self._score = recipe, learnt, model, score
        self.epoch, self.next_ = 0, 0
        self._best, self._worse = float("inf"), 0
        self.held = [self._batch(groups) for groups in packed(held, model.tokens)]

    def _batch(self, groups: Sequence[Group]) -> Batch:
        return batch_of(groups)

    @property
    def steps(self) -> int:
        """Of all epochs; an epoch's last step may be smaller."""
        return self.recipe.epochs * -(-len(self._learnt) // self.recipe.rows)

    def order(self, epoch: int) -> list[int]:
        """The examples' numbers in the order of an epoch."""
        random = np.random.Generator(np.random.PCG64([self.recipe.run.seed, epoch]))
        return [int(i) for i in random.permutation(len(self._learnt))]

    def next(self) -> list[Batch]:
        """The batches of the next step."""
        chosen = self.order(self.epoch)[self.next_ : self.next_ + self.recipe.rows]
        self.next_ += len(chosen)
        if self.next_ == len(self._learnt):
            self.epoch, self.next_ = self.epoch + 1, 0
        return [self._batch(groups) for groups in packed([self._learnt[i] for i in chosen], self._model.tokens)]

    def facts(self) -> Facts:
        """The epoch, for the log."""
        return {"epoch": round(self.epoch + self.next_ / len(self._learnt), 3)}

    def due(self, step: int) -> bool:
        """An epoch's end."""
        return self.next_ == 0

    def evaluate(self) -> Facts:
        """Figures on what is held out; keeps the best weights and may ask to stop, if the recipe has `patience`."""
        if not self.held:
            return {}
        figures = self._score(self.held)
        if self.recipe.patience is None:
            return figures
        if figures["loss"] < self._best:
            self._best, self._worse = figures["loss"], 0
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with whole(self._path) as file:
                np.save(file, self._model.parameters.values)
            return figures
        self._worse += 1
        if self._worse < self.recipe.patience:
            return figures
        return {**figures, "stop": f"{self._worse} evaluations without a lower loss than {self._best:.4f}"}

    @property
    def _path(self) -> Path:
        return self.recipe.run.out / BEST

    def restore_best(self) -> None:
        """Take the weights of the lowest loss, if they were kept."""
        if self.recipe.patience is not None and self.held:
            self._model.parameters.values[:] = np.load(self._path)

    def state(self) -> Facts:
        """Where it stands, as JSON."""
        best = self._best if np.isfinite(self._best) else None
        return {"epoch": self.epoch, "next": self.next_, "best": best, "worse": self._worse}

    def restore(self, state: Facts) -> None:
        """Stand where a `state` says."""
        self.epoch, self.next_, self._worse = state["epoch"], state["next"], state["worse"]
        self._best = float("inf") if state["best"] is None else state["best"]


class PairFeed(Feed):
    """Pairs, each with what the reference says of it: the model as it is before its first step."""

    def __init__(self, recipe: Tune, learnt: Groups, held: Groups, model: Model, objective: DPO, kept: bool) -> None:
        """kept: the reference is the model without its adapters, at any time; else all pairs are scored now."""
        self._said: dict[int, tuple[float, ...]] = {}  # a pair -> log p of both answers under the reference
        self._model, self._kept = model, kept
        if not kept:
            for groups in packed(chain(learnt, held), model.tokens):
                self._refer(groups)
        super().__init__(recipe, learnt, held, model, lambda batches: objective.evaluate(model, batches))

    def _refer(self, groups: Sequence[Group]) -> None:
        scored = Pairs.score(self._model, batch_of(groups), adapters=not self._kept).reference.reshape(-1, 2)
        self._said |= {group[0].number: tuple(pair) for group, pair in zip(groups, scored.tolist(), strict=True)}

    def _batch(self, groups: Sequence[Group]) -> Batch:
        if any(group[0].number not in self._said for group in groups):
            self._refer(groups)
        batch = batch_of(groups)
        reference = np.array([self._said[group[0].number] for group in groups]).reshape(-1)
        return Pairs(batch.ids, batch.targets, batch.lengths, reference)


def held_out_loss(model: Model) -> Callable[[Sequence[Batch]], Facts]:
    """Mean cross-entropy of the tokens to be learnt."""
    return lambda batches: {"loss": evaluate(model, batches)}
