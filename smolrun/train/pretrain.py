"""Pretraining: stages, each a mixture of sources in exact amounts of tokens, in an order that a few numbers describe.

    source -> documents in a shuffled order, anew each epoch -> parts of at most `length` tokens -> passes -> steps

*Mixture.* The next document comes from the source that is furthest behind its weight, counted in tokens: no draw, so
the amounts are exact to a document. *Packing.* A pass holds parts one after the other, and each sees itself alone; only
the last is cut where the pass ends, and goes on in the next. *Budget.* The last step of a stage is as short as it must
be. A token is a position that is learnt: the end marker after each document is one, the one before it is read only.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from smolrun.train.data import Corpus
from smolrun.train.model import Batch, Model
from smolrun.train.recipe import Pretrain, Reweight
from smolrun.train.run import Facts


@dataclass
class Place:
    """Where a source stands.

    Attributes:
        next: document of the epoch's order.
        offset: tokens of it that were fed.
        tokens: fed in all.
    """

    epoch: int = 0
    next: int = 0
    offset: int = 0
    tokens: int = 0


class Stream:
    """A source's documents, part by part, without an end."""

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self.corpus, self.place = corpus, Place()
        self._seed = [seed, zlib.crc32(corpus.name.encode())]
        self._order = (-1, corpus.learnt)  # epoch, documents

    def part(self, most: int) -> tuple[NDArray[np.int64], bool]:
        """Up to so many tokens of the current document, and one more, the last target; whether the document ended."""
        place = self.place
        if self._order[0] != place.epoch:
            random = np.random.Generator(np.random.PCG64([*self._seed, place.epoch]))
            self._order = place.epoch, random.permutation(self.corpus.learnt)
        document = self.corpus.document(int(self._order[1][place.next]))
        ids = document[place.offset : place.offset + most + 1]
        place.offset += len(ids) - 1
        place.tokens += len(ids) - 1
        ended = place.offset == len(document) - 1
        if ended:
            place.next, place.offset = place.next + 1, 0
            if place.next == len(self._order[1]):
                place.epoch, place.next = place.epoch + 1, 0
        return ids, ended


def pack(parts: Sequence[NDArray[np.int64]]) -> Batch:
    """Parts of documents, each with its last target, as a batch."""
    return Batch(
        np.concatenate([part[:-1] for part in parts]),
        np.concatenate([part[1:] for part in parts]),
        tuple(len(part) - 1 for part in parts),
    )


class Feed:
    """The batches of all stages (run.Feed).

    Attributes:
        mixtures: weights of each stage, as they are after all evaluations so far.
        used: tokens of each source in this stage.
    """

    def __init__(self, recipe: Pretrain, corpora: Mapping[str, Corpus], model: Model) -> None:
        self.recipe, self._corpora, self._model = recipe, corpora, model
        self._streams = {name: Stream(corpus, recipe.run.seed) for name, corpus in corpora.items()}
        self.mixtures = [dict(stage.mixture) or dict.fromkeys(corpora, 1.0) for stage in recipe.stages]
        self._last = np.cumsum([-(-stage.tokens // recipe.batch.tokens) for stage in recipe.stages]).tolist()
        self._stage, self._left, self._current = -1, 0, ""
        self.used = dict[str, int]()
        self._enter(0)

    @property
    def steps(self) -> int:
        """Of all stages."""
        return int(self._last[-1])

    @property
    def tokens(self) -> int:
        """Fed so far."""
        return sum(stream.place.tokens for stream in self._streams.values())

    def _enter(self, stage: int) -> None:
        self._stage, self._left = stage, self.recipe.stages[stage].tokens
        self.used = dict.fromkeys(self._corpora, 0)
        self._apply()

    def _apply(self) -> None:
        """Length and theta as the stages up to this one have set them."""
        self.length = self.recipe.batch.length
        for stage in self.recipe.stages[: self._stage + 1]:
            self.length = stage.length or self.length
            if stage.rope_theta is not None and stage.rope_theta != self._model.config.rope_theta:
                self._model.rope(stage.rope_theta)

    def next(self) -> list[Batch]:
        """The batches of the next step."""
        if not self._left:
            self._enter(self._stage + 1)
        wanted = min(self.recipe.batch.tokens, self._left)
        self._left -= wanted
        batches = []
        while wanted:
            room = min(wanted, self.recipe.batch.at_a_time)
            wanted -= room
            parts = []
            while room:
                part = self._part(min(room, self.length))
                room -= len(part) - 1
                parts.append(part)
            batches.append(pack(parts))
        return batches

    def _part(self, most: int) -> NDArray[np.int64]:
        mixture = self.mixtures[self._stage]
        if not self._current:
            behind = {name: self.used[name] / weight for name, weight in mixture.items() if weight}
            self._current = min(behind, key=lambda name: (behind[name], name))
        name = self._current
        part, ended = self._streams[name].part(most)
        self.used[name] += len(part) - 1
        if ended:
            self._current = ""
        return part

    def facts(self) -> Facts:
        """Stage and tokens, for the log."""
        name = self.recipe.stages[self._stage].name
        named = {"name": name} if name else {}
        return {"stage": self._stage, **named, "tokens": self.tokens, "epoch": round(self.epoch, 3)}

    @property
    def epoch(self) -> float:
        """Of the source that was read most often."""
        return max(s.place.epoch + s.place.next / len(s.corpus.learnt) for s in self._streams.values())

    def due(self, step: int) -> bool:
        """A stage's end."""
        return step in self._last

    def evaluate(self) -> Facts:
        """Loss (nats per token) and bits per byte of each source's held-out documents, and the loss of all together.

        At a stage's end the next mixture follows from them, if the recipe has a rule.
        """
        figures, nats, count = dict[str, float](), 0.0, 0
        for name, corpus in self._corpora.items():
            if found := held_out(self._model, corpus, self.recipe.evaluate_tokens, self.length):
                figures |= {f"{name}.loss": found[0] / found[1], f"{name}.bits_per_byte": bits_per_byte(*found)}
                nats, count = nats + found[0], count + found[1]
        if count:
            figures["loss"] = nats / count
        rule, after = self.recipe.reweight, self._stage + 1
        if rule is not None and not self._left and after < len(self.mixtures):
            bits = {n: figures[f"{n}.bits_per_byte"] for n in self._corpora if f"{n}.bits_per_byte" in figures}
            self.mixtures[after] = reweight(self.mixtures[after], bits, rule)
            return {**figures, "mixture": self.mixtures[after]}
        return dict(figures)

    def state(self) -> Facts:
        """Where it stands, as JSON."""
        return {
            "stage": self._stage,
            "left": self._left,
            "current": self._current,
            "used": self.used,
            "mixtures": self.mixtures,
            "places": {name: asdict(stream.place) for name, stream in self._streams.items()},
        }

    def restore(self, state: Facts) -> None:
        """Stand where a `state` says."""
        self._stage, self._left, self._current = state["stage"], state["left"], state["current"]
        self.used, self.mixtures = dict(state["used"]), [dict(mixture) for mixture in state["mixtures"]]
        for name, place in state["places"].items():
            self._streams[name].place = Place(**place)
        self._apply()


def held_out(model: Model, corpus: Corpus, tokens: int, length: int) -> tuple[float, int, int] | None:
    """(nats, tokens, bytes) of the first held-out documents of about so many tokens; None if there are none."""
    nats, count, size, parts, n = 0.0, 0, 0, list[NDArray[np.int64]](), 0

    def score() -> float:
        model.forward(pack(parts))
        return -float(model.log_probs().sum(dtype=np.float64))

    for i in corpus.held:
        if count >= tokens:
            break
        document = corpus.document(int(i))
        count, size = count + len(document) - 1, size + int(corpus.bytes[i])
        for first in range(0, len(document) - 1, length):
            part = document[first : first + length + 1]
            if n + len(part) - 1 > model.tokens:
                nats, parts, n = nats + score(), [], 0
            parts.append(part)
            n += len(part) - 1
    return (nats + score(), count, size) if parts else None


def bits_per_byte(nats: float, tokens: int, size: int) -> float:
    """Of the text, end markers counted as no byte, though they cost bits."""
    return nats / math.log(2) / size


def reweight(mixture: Mapping[str, float], bits: Mapping[str, float], rule: Reweight) -> dict[str, float]:
    """The mixture with each weight times exp(strength (bits per byte - target)), within [1 / most, most], sum 1.

    What has no figure or no weight keeps its share.
    """
    known = [name for name, weight in mixture.items() if weight and name in bits]
    mean = sum(bits[name] for name in known) / len(known) if known else 0.0
    out = dict(mixture)
    for name in known:
        lag = rule.strength * (bits[name] - rule.targets.get(name, mean))
        out[name] *= math.exp(min(max(lag, -math.log(rule.most)), math.log(rule.most)))
    total = sum(out.values())
    return {name: weight / total for name, weight in out.items()}
