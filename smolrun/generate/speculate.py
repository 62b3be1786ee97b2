"""Speculative decoding (Leviathan, Kalman, Matias 2023; prompt lookup: Saxena 2023): cheap guesses, one pass to check.

    plain          [last] -> logits -> sample                                 one pass of the model per id
    speculative    [last, g1 .. gk] -> k + 1 rows of logits -> sample, sample ... as long as the sample is the guess

A pass over a few ids costs little more than one over a single id, because both read all weights. The engine samples
every row with the sampler and the random number that plain decoding uses at that position, and the logits of a row are
bit-identical however many rows are computed together: so the answer, greedy or sampled, is bit for bit that of plain
decoding. A guess g is kept with the probability that the model gives it, which is the acceptance rule of the paper for
a guess without chance; the distribution is right by construction.

What is left to decide is how much to guess, and it changes speed only. A guess of k ids is worth

    (1 + p + p^2 + .. + p^k) / (seconds(k + 1) + seconds to guess)       ids per second, against 1 / seconds(1)

with p, the share of right guesses of this kind, and the seconds both measured while it runs. And because a measurement
is no promise there is a purse: it starts with the time of 2 plain passes, gets 1 % of the time of every pass, what
guessing gains goes in, what it loses comes out, and no guess is made that could lose more than it holds. So however the
text turns, n ids take at most the time of 1.01 n + 2 plain passes.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from smolrun.generate.sampler import Ids, Sampler, Sampling
from smolrun.model.llama import Cancelled

if TYPE_CHECKING:
    from smolrun.generate.engine import CachedSequence, Cancel, Model

Clock = Callable[[], float]
Result = TypeVar("Result")

MOST = 15  # ids guessed at once: 16 rows are two tiles of the matmul or fewer
PURSE = 2.0  # plain passes that guessing may lose at first
PURSE_LIMIT = 6.0  # passes: no fortune lets a bad stretch be long
RESERVE = 1.0  # of the purse: not for guesses that are made only to know how good they are
INCOME = 0.01  # of each pass: what guessing may lose in the long run
MATCHED = 16  # ids of a match that are looked at
KINDS = 8  # matches of so many ids and more are of one kind
OCCURRENCES = 8  # the latest places of a pair that are looked at
SLOPE = 0.25  # of a plain pass: one more row while nothing is measured; 0.2 to 0.5 on Zen 4, hope finds out sooner
READING = 32  # guesses that are to pay for a draft model's reading of the prompt
LATEST = 7  # samples of a cost; their median counts, so one time slice lost to a neighbour does not
MEMORY = 0.9  # of the acceptance counts at each guess: some 10 guesses are remembered


class Guesser(Protocol):
    """A source of guesses for one answer."""

    def kind(self, ids: Ids) -> int:
        """How good a guess after `ids` would be, a small number: acceptance is measured by it. 0: there is none."""

    def reading(self) -> float:
        """Seconds until the first guess can be made; 0 from then on."""

    def seconds(self, count: int) -> float:
        """What a guess of so many ids will take, without the reading."""

    def guess(self, count: int, cancel: Cancel | None) -> list[int]:
        """At most so many ids, after those of the last `kind`; fewer once cancelled."""

    def close(self) -> None:
        """Gives back what must not be held while another answer is computed."""


class Lookup:
    """Prompt lookup: what followed the longest earlier occurrence of the last ids, the latest of equals.

    A copy may run into itself: after `a b c a b` the guess is `c a b c a b ...`.

    >>> lookup = Lookup()
    >>> lookup.kind(np.array([1, 2, 3, 9, 1, 2])), lookup.guess(6)
    (2, [3, 9, 1, 2, 3, 9])
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._after: defaultdict[tuple[int, int], list[int]] = defaultdict(list)  # a pair of ids -> what follows it
        self._from = 0

    def kind(self, ids: Ids) -> int:
        """Ids of the match, at most KINDS; 0 if the last two never occurred before."""
        known = self._ids
        for id in ids[len(known) :].tolist():
            if len(known) > 1:
                self._after[known[-2], known[-1]].append(len(known))
            known.append(id)
        best = 0
        if len(known) > 1:
            for start in reversed(self._after.get((known[-2], known[-1]), ())[-OCCURRENCES:]):
                same = 2
                while same < min(start, MATCHED) and known[start - 1 - same] == known[-1 - same]:
                    same += 1
                if same > best:
                    best, self._from = same, start
        return min(best, KINDS)

    def reading(self) -> float:
        return 0.0

    def seconds(self, count: int) -> float:
        return 0.0

    def guess(self, count: int, cancel: Cancel | None = None) -> list[int]:
        period = len(self._ids) - self._from
        return [self._ids[self._from + at % period] for at in range(count)]

    def close(self) -> None:
        pass


class Costs:
    """Measured seconds of a pass by its number of ids: the median of the latest samples, straight lines between."""

    def __init__(self) -> None:
        self._samples: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=LATEST))
        self._median: dict[int, float] = {}
        self._known: dict[int, float] = {}

    @property
    def plain(self) -> float:
        """Seconds of a pass over one id; 0 until three were measured."""
        return self._median[1] if len(self._samples[1]) > 2 else 0.0

    def add(self, count: int, seconds: float) -> None:
        samples = self._samples[count]
        samples.append(seconds)
        self._median[count] = sorted(samples)[len(samples) // 2]
        self._known.clear()

    def __call__(self, count: int) -> float:
        """Seconds of a pass over `count` ids; 0 while nothing is measured."""
        if count not in self._known:
            self._known[count] = self._estimate(count)
        return self._known[count]

    def _estimate(self, count: int) -> float:
        median = self._median
        below = max((n for n in median if n <= count), default=0)
        above = min((n for n in median if n >= count), default=0)
        if not below or below == above:
            return median.get(count, 0.0)
        if not above:
            return median[below] + SLOPE * median.get(1, median[below]) * (count - below)
        return median[below] + (median[above] - median[below]) * (count - below) / (above - below)


class Draft:
    """A small model of the same vocabulary guesses for one answer: with the sampler and the random number that the
    large model's id will be drawn with, so that both draw the same id where they agree."""

    def __init__(self, model: Model, costs: Costs, clock: Clock, sampler: Sampler, prompt_length: int) -> None:
        self._model, self._costs, self._clock = model, costs, clock
        self._sampler, self._prompt_length = sampler, prompt_length
        self._seq: CachedSequence | None = None
        self._ids: Ids = np.empty(0, np.int64)

    def kind(self, ids: Ids) -> int:
        self._ids = ids
        return 1 if len(ids) < self._model.context else 0

    def reading(self) -> float:
        return self._costs(len(self._ids)) if self._seq is None else 0.0

    def seconds(self, count: int) -> float:
        if self._seq is None:
            return count * self._costs(1)
        behind = len(self._ids) - min(self._seq.length, len(self._ids) - 1)
        return self._costs(behind) + (count - 1) * self._costs(1)

    def guess(self, count: int, cancel: Cancel | None) -> list[int]:
        have = len(self._ids)
        ids = np.concatenate([self._ids, np.zeros(min(count, self._model.context - have), np.int64)])
        if self._seq is None:
            self._seq = self._model.open(self._ids.tolist())
        self._seq.truncate(min(self._seq.length, have - 1))  # what it holds beyond were wrong guesses
        end = have
        try:
            while end < len(ids) and not (cancel is not None and cancel.is_set()):
                begin, start = self._clock(), self._seq.length
                todo = ids[start : min(end, start + self._model.chunk)].tolist()
                hidden = self._model.hidden(self._seq, todo, int(start + len(todo) == end))
                if len(hidden):
                    row = self._model.logits(hidden)[0]
                    ids[end] = self._sampler.sample(row, ids[:end], self._prompt_length).id
                    end += 1
                self._costs.add(len(todo), self._clock() - begin)
        except Cancelled:
            pass
        guess: list[int] = ids[have:end].tolist()
        return guess

    def close(self) -> None:
        if self._seq is not None:
            self._seq.close()
            self._seq = None


class Acceptance:
    """Share of right guesses by kind; the latest count most."""

    def __init__(self, expected: float) -> None:
        self._right, self._all = 2 * expected, 2.0

    @property
    def share(self) -> float:
        return self._right / self._all

    def add(self, right: int, wrong: int) -> None:
        self._right = MEMORY * self._right + right
        self._all = MEMORY * self._all + right + wrong


class Speculator:
    """What a model's answers share: the draft model and all that was measured.

    Args:
        lookup: guess by prompt lookup.
        draft: a model of the same vocabulary, or None. It is not closed here.
        clock: seconds that pass, as time.perf_counter.
    """

    def __init__(self, *, lookup: bool, draft: Model | None, clock: Clock) -> None:
        self.lookup, self.draft, self.clock = lookup, draft, clock
        self.costs, self.draft_costs = Costs(), Costs()
        self.purse = PURSE  # plain passes
        self._acceptance: dict[tuple[type[Any], int], Acceptance] = {}

    def begin(self, sampling: Sampling, prompt_length: int) -> Speculation:
        """Guesses for one answer. `sampling` has its seed."""
        guessers: list[Guesser] = [Lookup()] if self.lookup else []
        if self.draft is not None:
            guessers.append(Draft(self.draft, self.draft_costs, self.clock, Sampler(sampling), prompt_length))
        return Speculation(self, guessers)

    def acceptance(self, guesser: Guesser, kind: int) -> Acceptance:
        """Of guesses of this kind. A long match is believed at once, a short one hardly."""
        key = (type(guesser), kind)
        if key not in self._acceptance:
            self._acceptance[key] = Acceptance(0.7 if isinstance(guesser, Draft) else kind / (kind + 2))
        return self._acceptance[key]


class Speculation:
    """The guesses of one answer.

    Attributes:
        guessed, accepted: ids so far.
    """

    def __init__(self, speculator: Speculator, guessers: Sequence[Guesser]) -> None:
        self.guessed = self.accepted = 0
        self._shared, self._guessers = speculator, guessers
        self._guess: list[int] = []
        self._seconds = 0.0  # that the guess itself took
        self._acceptance: Acceptance | None = None

    def guess(self, ids: Ids, most: int, cancel: Cancel | None) -> list[int]:
        """What may follow `ids`: at most `most` ids, often none."""
        shared, plain = self._shared, self._shared.costs.plain
        self._guess, self._seconds, self._acceptance = [], 0.0, None
        if plain == 0 or most < 1:
            return []
        best_rate, chosen, count = 1.0, None, 0
        for guesser in self._guessers:
            if not (kind := guesser.kind(ids)):
                continue
            acceptance, reading = shared.acceptance(guesser, kind), guesser.reading()
            expected = power = 1.0
            for k in range(1, min(most, MOST) + 1):
                power *= acceptance.share
                expected += power
                seconds = guesser.seconds(k) + reading / READING
                passes = (shared.costs(k + 1) + seconds) / plain
                left = shared.purse - (passes - 1)
                trying = chosen is None and k == 1 and left - reading / plain >= RESERVE
                if left >= 0 and (expected / passes > best_rate or trying):
                    # a try pays for the reading at once, it is not expected to pay later
                    seconds += 0 if expected / passes > best_rate else reading
                    best_rate, chosen, count = max(expected / passes, best_rate), guesser, k
                    self._acceptance, self._seconds = acceptance, seconds
        if chosen is not None:
            self._guess = chosen.guess(count, cancel)
        return self._guess

    def timed(self, work: Callable[[], Result]) -> Result:
        """The pass over the last id and the guess; its time is measured."""
        begin = self._shared.clock()
        result = work()
        if result is not None:
            self._shared.costs.add(1 + len(self._guess), self._shared.clock() - begin)
        return result

    def verified(self, accepted: int) -> None:
        """So many ids of the last guess were right; the next one, if there is one, was not. Counts a guess once."""
        shared, plain, guessed = self._shared, self._shared.costs.plain, len(self._guess)
        if plain == 0:
            return
        shared.purse += INCOME
        if self._acceptance is not None and guessed:
            # medians, not what this very pass took: a time slice lost to another process is nobody's fault
            shared.purse += accepted + 1 - (shared.costs(1 + guessed) + self._seconds) / plain
            self._acceptance.add(accepted, int(accepted < guessed))
            self.guessed += guessed
            self.accepted += accepted
            self._guess = []
        shared.purse = min(shared.purse, PURSE_LIMIT)

    def close(self) -> None:
        """Gives the draft model's cache slot back; may be called twice, and guessing may go on afterwards."""
        for guesser in self._guessers:
            guesser.close()
