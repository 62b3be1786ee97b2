"""Speculative decoding (Leviathan, Kalman, Matias 2023; prompt lookup: Saxena 2023): cheap guesses, one pass to check.

    plain          [last] -> logits -> sample                                 one pass of the model per id
    speculative    [last, g1 .. gk] -> k + 1 rows of logits -> sample, sample ... as long as the sample is the guess

A pass over a few ids costs little more than one over a single id, because both read all weights. The engine samples
every row with the sampler and the random number that plain decoding uses at that position, and the logits of a row are
bit-identical however many rows are computed together: so the answer, greedy or sampled, is bit for bit that of plain
decoding. A guess g is kept with the probability that the model gives it, which is the acceptance rule of the paper for
a guess without chance; the distribution is right by construction.

What is left to decide is how much to guess, and it changes speed only. Time is counted in plain passes, as long as they
take at that moment. A guess of k ids, each of which costs d, checked by a pass that costs c(k + 1), makes an id cost

    (k d + c(k + 1)) / (1 + p + p^2 + .. + p^k)        passes; 1 without a guess

with c and d measured while it runs, and p, the share of right guesses of this kind. The best k is taken, 0 if none is
below 1. A draft model that lags behind (at first by the whole prompt) has to read; the ids to come must win that back.

And because a measurement is no promise there are two purses, the model's and the answer's. Each begins with 2 passes,
and gets 1 % of every pass while it holds less. What guessing gains goes in, what it loses comes out, and no guess is
made that could lose more than both hold. So however the text turns, n ids take at most the time of 1.01 n + 2 plain
passes, in one answer and in all: 0.97 times the speed from 97 ids on. Only what earlier answers gained may be lost
besides: 2 passes of it, by reading. Losses are those of the measured medians; what was never measured is feared.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
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
SAVINGS = 4.0  # passes that a purse holds at most: no fortune lets a bad stretch be long
RESERVE = 1.0  # of the purse: not for guesses that are made only to know how good they are
BET = 0.5  # of the purse: for one guess of more than an id, so that bad luck leaves something for the next
INCOME = 0.01  # of each pass: what guessing may lose in the long run
MATCHED = 16  # ids of a match that are looked at
KINDS = 8  # matches of so many ids and more are of one kind
OCCURRENCES = 8  # the latest places of a pair that are looked at
HOPE, FEAR = 0.05, 0.25  # of a pass over one id: one more id where nothing is measured, at best and at worst (Zen 5)
LONG = 0.2  # of a pass over one id: an id of a pass over more than MOST + 1 (Zen 5: 0.16 to 0.25)
HORIZON = 64  # ids that are to win back what a draft model reads
PLAIN = 16  # one pass in so many is plain: the measure of all others must not grow old
LATEST = 5  # samples of a cost; their median counts, so one time slice lost to a neighbour does not
ENOUGH = 3  # samples of a pass over one id: fewer are not believed
MEMORY = 0.9  # of the acceptance counts at each guess: some 10 guesses are remembered


class Guesser(Protocol):
    """A source of guesses for one answer. Costs are in plain passes of the large model."""

    def kind(self, ids: Ids) -> int:
        """How good a guess after `ids` would be, a small number: acceptance is measured by it. 0: there is none."""

    def reading(self) -> float:
        """What the next guess costs besides its ids, because this source lags behind."""

    def each(self) -> float:
        """What an id of a guess costs."""

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

    def each(self) -> float:
        return 0.0

    def guess(self, count: int, cancel: Cancel | None = None) -> list[int]:
        period = len(self._ids) - self._from
        return [self._ids[self._from + at % period] for at in range(count)]

    def close(self) -> None:
        pass


class Median:
    """Of the latest samples; of an even number the lower one of the two."""

    def __init__(self, latest: int = LATEST) -> None:
        self._samples: deque[float] = deque(maxlen=latest)
        self.value = 0.0

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, sample: float) -> None:
        self._samples.append(sample)
        self.value = sorted(self._samples)[(len(self) - 1) // 2]


class Costs:
    """What passes over n ids cost, in plain passes of the large model. One over a single id: 1 until it is measured.

    Attributes:
        hope, fear: by n, up to MOST + 1: as measured, or else at best and at worst.
    """

    def __init__(self) -> None:
        self.hope, self.fear = [0.0], [0.0]
        self._short: defaultdict[int, Median] = defaultdict(Median)
        self._long = Median()  # an id of a pass over more
        self._spread()

    def __len__(self) -> int:
        """Samples of passes over one id."""
        return len(self._short[1])

    def add(self, count: int, passes: float) -> None:
        if count > MOST + 1:
            self._long.add(passes / count)
        else:
            self._short[count].add(min(passes, count))  # dearer than its ids one by one: something else was running
            self._spread()

    def __call__(self, count: int) -> float:
        """Any n, rather too much than too little."""
        if count <= MOST + 1:
            return self.fear[count]
        return count * (self._long.value or LONG * self.fear[1])

    def _spread(self) -> None:
        one = self._short[1].value or 1.0
        hope, fear = (1 - HOPE) * one, (1 - FEAR) * one
        del self.hope[1:], self.fear[1:]
        for count in range(1, MOST + 2):
            known = self._short[count].value
            hope, fear = known or hope + HOPE * one, known or fear + FEAR * one
            self.hope.append(hope)
            self.fear.append(fear)


class Draft:
    """A small model of the same vocabulary guesses for one answer: with the sampler and the random number that the
    large model's id will be drawn with, so that both draw the same id where they agree."""

    def __init__(self, answer: Speculation, model: Model, sampling: Sampling, prompt_length: int) -> None:
        self._answer, self._model = answer, model
        self._sampler, self._prompt_length = Sampler(sampling), prompt_length
        self._costs, self._clock = answer.shared.draft_costs, answer.shared.clock
        self._seq: CachedSequence | None = None
        self._ids: Ids = np.empty(0, np.int64)

    def kind(self, ids: Ids) -> int:
        self._ids = ids
        if len(ids) >= self._model.context:
            return 0
        if self._seq is None:
            self._seq = self._model.open(ids.tolist())
            if len(self._costs) < ENOUGH and self._answer.held >= 1:
                with suppress(Cancelled):  # reads an id and draws one after it, to know what that costs
                    self._read(np.append(ids, 0), self._seq.length + 1, len(ids))
        self._seq.truncate(min(self._seq.length, len(ids) - 1))  # what it holds beyond were wrong guesses
        return 1

    def reading(self) -> float:
        return self._costs(len(self._ids) - (0 if self._seq is None else self._seq.length)) - self._costs(1)

    def each(self) -> float:
        return self._costs(1)

    def guess(self, count: int, cancel: Cancel | None) -> list[int]:
        have = end = len(self._ids)
        ids = np.concatenate([self._ids, np.zeros(min(count, self._model.context - have), np.int64)])
        with suppress(Cancelled):
            while self._seq is not None and end < len(ids) and not (cancel is not None and cancel.is_set()):
                stop = min(end, self._seq.length + self._model.chunk)
                self._read(ids, stop, end)
                end += stop == end
        guess: list[int] = ids[have:end].tolist()
        return guess

    def close(self) -> None:
        if self._seq is not None:
            self._seq.close()
            self._seq = None

    def _read(self, ids: Ids, stop: int, end: int) -> None:
        """Appends ids[:stop] as far as they are new, and draws ids[end] from what it then expects."""
        assert self._seq is not None
        begin, start = self._clock(), self._seq.length
        hidden = self._model.hidden(self._seq, ids[start:stop].tolist(), 1)
        ids[end] = self._sampler.sample(self._model.logits(hidden)[0], ids[:end], self._prompt_length).id
        self._answer.drafted(stop - start, self._clock() - begin)


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


class Purse:
    """Plain passes that may be lost."""

    def __init__(self) -> None:
        self.held = PURSE

    def earn(self) -> None:
        """What every pass gives."""
        self.held = max(self.held, min(self.held + INCOME, PURSE))

    def add(self, passes: float) -> None:
        """What a guess gained, or less than 0."""
        self.held = min(self.held + passes, SAVINGS)


class Speculator:
    """What a model's answers share: the draft model and all that was measured.

    Args:
        lookup: guess by prompt lookup.
        draft: a model of the same vocabulary, or None. It is not closed here.
        clock: seconds that pass, as time.perf_counter.

    Attributes:
        plain: seconds of the latest plain passes.
        guessing: passes with a guess since then.
    """

    def __init__(self, *, lookup: bool, draft: Model | None, clock: Clock) -> None:
        self.lookup, self.draft, self.clock = lookup, draft, clock
        self.plain, self.guessing = Median(ENOUGH), 0
        self.costs, self.draft_costs = Costs(), Costs()
        self.purse = Purse()
        self._acceptance: dict[tuple[type[Any], int], Acceptance] = {}

    def begin(self, sampling: Sampling, prompt_length: int) -> Speculation:
        """Guesses for one answer. `sampling` has its seed."""
        answer = Speculation(self)
        if self.lookup:
            answer.guessers.append(Lookup())
        if self.draft is not None:
            answer.guessers.append(Draft(answer, self.draft, sampling, prompt_length))
        return answer

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

    def __init__(self, shared: Speculator) -> None:
        self.shared = shared
        self.guessers: list[Guesser] = []
        self.guessed = self.accepted = 0
        self._purse = Purse()
        self._guess: list[int] = []
        self._acceptance: Acceptance | None = None

    @property
    def held(self) -> float:
        """Passes that a guess may lose."""
        return min(self._purse.held, self.shared.purse.held)

    def guess(self, ids: Ids, most: int, cancel: Cancel | None) -> list[int]:
        """What may follow `ids`: at most `most` ids, often none."""
        shared = self.shared
        self._guess = []
        known = len(shared.plain) >= ENOUGH and shared.plain.value > 0
        if most > 0 and self.held > 0 and known and shared.guessing < PLAIN:
            guesser, count = self._choose(ids, most)
            if guesser is not None:
                self._guess = guesser.guess(count, cancel)
        return self._guess

    def _choose(self, ids: Ids, most: int) -> tuple[Guesser | None, int]:
        """Who guesses, and how many ids."""
        costs, best = self.shared.costs, 1.0
        chosen: Guesser | None = None
        count = 0
        for guesser in self.guessers:
            if not (kind := guesser.kind(ids)):
                continue
            acceptance, each, reading = self.shared.acceptance(guesser, kind), guesser.each(), guesser.reading()
            held, share = min(self._purse.held, self.shared.purse.held - reading), acceptance.share
            if held <= 0:
                continue
            spread = reading / min(most, HORIZON)
            expected = power = 1.0
            for k in range(1, min(most, MOST) + 1):
                power *= share
                expected += power
                if costs.fear[k + 1] - 1 + k * each > (held if k == 1 else BET * held):
                    continue
                price = (costs.hope[k + 1] + k * each) / expected + spread
                if price < best:
                    best, chosen, count, self._acceptance = price, guesser, k, acceptance
            if chosen is None and costs.fear[2] - 1 + each + reading <= self.held - RESERVE:
                chosen, count, self._acceptance = guesser, 1, acceptance  # only to know; any that pays is preferred
        return chosen, count

    def drafted(self, count: int, seconds: float) -> None:
        """A draft model made a pass over so many ids."""
        shared = self.shared
        shared.draft_costs.add(count, seconds / shared.plain.value)
        cost = shared.draft_costs(count)
        shared.purse.add(-cost)
        self._purse.add(-min(cost, shared.draft_costs(1)))  # earlier gains may pay for a reading

    def timed(self, work: Callable[[], Result]) -> Result:
        """The pass over the last id and the guess; its time is measured."""
        shared = self.shared
        begin = shared.clock()
        result = work()
        if result is not None:
            seconds = shared.clock() - begin
            if self._guess:
                shared.guessing += 1
                shared.costs.add(1 + len(self._guess), max(seconds / shared.plain.value, 1.0))
            else:
                shared.guessing = 0
            if not self._guess or seconds < shared.plain.value:  # a plain pass would not have taken longer
                shared.plain.add(seconds)
        return result

    def verified(self, accepted: int) -> None:
        """So many ids of the last guess were right; the next one, if there is one, was not. Counts a guess once."""
        guessed, gain = len(self._guess), 0.0
        if self._acceptance is not None and guessed:
            # medians, not what this very pass took: a time slice lost to another process is nobody's fault
            gain = accepted + 1 - self.shared.costs(1 + guessed)
            self._acceptance.add(accepted, int(accepted < guessed))
            self.guessed += guessed
            self.accepted += accepted
            self._guess = []
        for purse in (self._purse, self.shared.purse):
            purse.earn()
            purse.add(gain)

    def close(self) -> None:
        """Gives the draft model's cache slot back; may be called twice, and guessing may go on afterwards."""
        for guesser in self.guessers:
            guesser.close()
