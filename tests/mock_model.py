"""A model without weights: its logits are a hash of all ids before them, so a wrong prefix shows in the answer."""

import threading
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from smolrun.config import ModelConfig
from smolrun.model.cache import CacheFull
from smolrun.model.llama import Cancelled


class MockSequence:
    """Ids whose "keys and values" are valid. The hidden states come from this list alone, never from the caller's."""

    def __init__(self, model: "MockModel", ids: list[int]) -> None:
        self.model, self.ids = model, ids

    @property
    def length(self) -> int:
        return len(self.ids)

    def truncate(self, length: int) -> None:
        del self.ids[length:]

    def close(self) -> None:
        if self in self.model.opened:
            self.model.opened.remove(self)
            self.model.slots.append(list(self.ids))


class MockModel:
    """Obeys generate.engine.Model.

    Attributes:
        script: ids the answer shall have whatever the hash says; `script_from` is the length of the prompt.
        segments: sequences of a pass; all open ones together hold `context` positions.
        passes: (first position, number of ids) of every sequence of every pass.
        sizes: sequences of every pass.
        on_pass: called at the start of every pass.
        word: the cancel word; a pass that finds it set ends with Cancelled.
    """

    def __init__(self, *, vocab_size: int = 50, context: int = 64, chunk: int = 8, segments: int = 1) -> None:
        self.config = ModelConfig(64, 64, 1, 1, 1, 64, vocab_size, context, 1e5, 1e-5, True)
        self.context, self.chunk, self.segments = context, chunk, segments
        self.slots: list[list[int]] = []
        self.opened: list[MockSequence] = []
        self.passes: list[tuple[int, int]] = []
        self.sizes: list[int] = []
        self.script: list[int] = []
        self.script_from = 0
        self.on_pass: Callable[[], object] = lambda: None
        self.word = threading.Event()
        self.closed = False

    def open(self, ids: Sequence[int]) -> MockSequence:
        assert not self.closed and len(self.opened) < self.segments
        self.word.clear()
        prefixes = [common_prefix(slot, ids) for slot in [*self.slots, *(seq.ids for seq in self.opened)]]
        self.opened.append(MockSequence(self, list(ids[: min(max(prefixes, default=0), len(ids) - 1)])))
        return self.opened[-1]

    @property
    def room(self) -> int:
        return self.context - sum(len(seq.ids) for seq in self.opened)

    def hidden(self, seq: MockSequence, ids: Sequence[int], rows: int | None = None) -> np.ndarray:
        return self.step([(seq, ids)])[max(len(ids) - rows, 0) if rows is not None else 0 :]

    def step(self, work: Sequence[tuple[MockSequence, Sequence[int]]]) -> np.ndarray:
        assert 1 <= sum(len(ids) for _, ids in work) <= self.chunk and len(work) <= self.segments
        assert all(ids and seq in self.opened for seq, ids in work)
        if sum(len(ids) for _, ids in work) > self.room:
            raise CacheFull
        self.on_pass()
        if self.word.is_set():
            self.word.clear()
            raise Cancelled
        self.sizes.append(len(work))
        rows = []
        for seq, ids in work:
            self.passes.append((len(seq.ids), len(ids)))
            for id in ids:
                seq.ids.append(id)
                rows.append([*divmod(zlib.crc32(repr(seq.ids).encode()), 1 << 16), len(seq.ids)])
        return np.array(rows, dtype=np.float32)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        out = np.empty((len(hidden), self.config.vocab_size), dtype=np.float32)
        for row, (high, low, length) in zip(out, hidden.tolist(), strict=True):
            row[:] = np.random.default_rng([int(high), int(low)]).normal(0, 3, self.config.vocab_size)
            at = int(length) - self.script_from
            if 0 <= at < len(self.script):
                row[self.script[at]] = 100
        return out

    def cancel(self) -> None:
        self.word.set()

    def close(self) -> None:
        assert not self.closed and not self.opened
        self.closed = True

    def truth(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after `ids` by a fresh model, the naive way."""
        fresh = MockModel(vocab_size=self.config.vocab_size, context=self.context, chunk=self.context)
        fresh.script, fresh.script_from = self.script, self.script_from
        return fresh.logits(fresh.hidden(fresh.open(ids), ids)[-1:])[0]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
