"""Keeping the best documents: a classifier head on the model's own hidden states.

FineWeb-Edu, FineMath and Stack-Edu were made so.

    document --model--> hidden states (n, dim) --mean--> (dim,) --head--> score

The head is a ridge regression of the labels. Its penalty is the one with the least squared error when each labelled
document is predicted by a head that has not seen it, which for ridge regression needs no second fit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smolrun.errors import OptionError
from smolrun.files.whole import whole
from smolrun.model.llama import Llama
from smolrun.text.tokenizer import Tokenizer
from smolrun.train.data import Progress
from smolrun.train.rows import BadRow, Row, files, look_up, read_rows

Floats = NDArray[np.float64]
PENALTIES = 10.0 ** np.arange(-3, 7)
LEAST = 8  # labelled documents


@dataclass(frozen=True)
class Head:
    """score = (mean hidden state - mean) / deviation . weights + bias

    Attributes:
        correlation: Pearson's, of the labels with what heads that had not seen them say.
    """

    mean: Floats
    deviation: Floats
    weights: Floats
    bias: float
    penalty: float
    correlation: float

    @classmethod
    def fit(cls, features: Floats, labels: Floats) -> Head:
        """
        Args:
            features: (documents, dim).
            labels: (documents,), the higher the better.

        Raises:
            OptionError: too few labels, or all the same.
        """
        if len(labels) < LEAST or not np.ptp(labels):
            raise OptionError(
                f"{len(labels)} labelled documents with {len(np.unique(labels))} different labels: {LEAST} or more, of "
                "different labels, expected"
            )
        mean, deviation, bias = features.mean(axis=0), features.std(axis=0) + 1e-9, float(labels.mean())
        u, s, vt = np.linalg.svd((features - mean) / deviation, full_matrices=False)
        y = labels - bias
        best: tuple[float, float, Floats] | None = None
        for penalty in PENALTIES:
            shrunk = s**2 / (s**2 + penalty)
            leverage = (u**2) @ shrunk + 1 / len(y)  # how much a document draws its own prediction
            unseen = y - (y - u @ (shrunk * (u.T @ y))) / np.maximum(1 - leverage, 1e-9)
            error = float(((y - unseen) ** 2).mean())
            if best is None or error < best[0]:
                best = error, float(penalty), unseen
        assert best is not None
        penalty = best[1]
        weights = vt.T @ (s / (s**2 + penalty) * (u.T @ y))
        correlation = float(np.corrcoef(best[2], y)[0, 1])
        return cls(mean, deviation, weights, bias, penalty, correlation)

    def score(self, features: Floats) -> Floats:
        """Of features (documents, dim): (documents,)."""
        return (features - self.mean) / self.deviation @ self.weights + self.bias


class Reader:
    """A model that reads documents."""

    def __init__(self, model: Llama, tokenizer: Tokenizer, tokens: int = 512) -> None:
        """tokens: of a document that are read, from its beginning."""
        self._model, self._tokenizer, self._tokens = model, tokenizer, min(tokens, model.context)

    def features(self, text: str) -> Floats:
        """The mean of a text's hidden states: (dim,)."""
        ids = self._tokenizer.encode(text)[: self._tokens]
        total = np.zeros(self._model.config.dim)
        slot = self._model.open([])
        try:
            for first in range(0, len(ids), self._model.chunk):
                total += self._model.hidden(slot, ids[first : first + self._model.chunk]).sum(axis=0, dtype=np.float64)
        finally:
            slot.close()
        return total / max(len(ids), 1)


@dataclass(frozen=True)
class Kept:
    """What a filter did.

    Attributes:
        threshold: the lowest score that was kept.
        bad: rows that could not be read; they are not kept.
    """

    documents: int
    kept: int
    threshold: float
    head: Head
    bad: list[BadRow]


def keep_best(
    reader: Reader,
    source: str,
    labelled: str,
    target: Path,
    *,
    share: float,
    field: str = "text",
    label: str = "label",
    progress: Progress | None = None,
) -> Kept:
    """Score the documents of `source` by a head learnt on `labelled`, and write the best share of them as JSON lines.

    Raises:
        OptionError: a share outside of (0, 1], labels that are no numbers.
    """
    if not 0 < share <= 1:
        raise OptionError(f"keep = {share}: a share above 0, at most 1, expected")
    known = list(_rows(labelled))
    features, labels = [], []
    for row in known:
        if isinstance(row, BadRow):
            raise OptionError(f"{row.where}: {row.problem}")
        text, value = look_up(row, field), row.value.get(label)
        number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
        if isinstance(text, BadRow) or not abs(number) < math.inf:
            problem = text.problem if isinstance(text, BadRow) else f"{label} is {value!r}, a number expected"
            raise OptionError(f"{row.where}: {problem}")
        features.append(reader.features(text))
        labels.append(float(number))
        if progress:
            progress("label", len(labels), len(known) + 1)
    head = Head.fit(np.array(features), np.array(labels))
    bad, scores = list[BadRow](), list[float]()
    for text in _texts(source, field, bad):
        scores.append(float(head.score(reader.features(text)[None])[0]))
        if progress:
            progress("score", len(scores), len(scores) + 1)
    if not scores:
        raise OptionError(f"{source}: no documents with a field {field!r}")
    count = max(1, round(share * len(scores)))
    order = np.argsort(-np.array(scores), kind="stable")[:count]
    chosen, threshold, number = set(order.tolist()), scores[int(order[-1])], 0
    with whole(target) as file:
        for row in _rows(source):
            if isinstance(row, Row) and not isinstance(look_up(row, field), BadRow):
                if number in chosen:
                    line = json.dumps(row.value | {"score": round(scores[number], 4)}, ensure_ascii=False)
                    file.write(line.encode() + b"\n")
                number += 1
    if progress:
        progress("score", 1, 1)
    return Kept(len(scores), count, threshold, head, bad)


def _rows(path: str) -> Iterator[Row | BadRow]:
    for file in files(path):
        yield from read_rows(file)


def _texts(path: str, field: str, bad: list[BadRow]) -> Iterable[str]:
    for row in _rows(path):
        text = look_up(row, field) if isinstance(row, Row) else row
        if isinstance(text, BadRow):
            bad.append(text)
        else:
            yield text
