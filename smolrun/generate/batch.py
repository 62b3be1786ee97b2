"""Several answers in one pass: each reads the weights once for all of them.

    waiting  [seat e][seat f] ...          in the order they came; who had to give way stands in front
    running  [seat a][seat b][seat c]      oldest first; one pass: a's next id, b's next id, a chunk of c's prompt

A finished answer leaves at once and the next prompt takes its place, in the middle of the others' answers. Logits and
draws do not depend on what else is in the pass, so every answer is the one that `generate_ids` gives alone.

The cache holds as many positions as the context, for all together. A prompt is let in while there is room for it, and
waits while a running prompt is about to compute what it begins with. Answers grow: when the cache is full, the youngest
gives way and is computed again later, so the oldest always ends and memory stays what the context costs.
"""

from collections import deque
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np

from smolrun.errors import OptionError, SmolrunError
from smolrun.generate.engine import CachedSequence, Cancel, Model, Step, check_prompt, end_of, run_pass, watched
from smolrun.generate.sampler import Ids, Logits, Sampler, Sampling
from smolrun.kernels.block import PAGE
from smolrun.model.cache import CacheFull

WORTH_WAITING = 16  # ids of a common prefix: waiting for the pass that computes them costs less than computing them


class Seat:
    """One answer of a batch.

    Attributes:
        ids: prompt and answer so far.
        computed: ids that passes have computed for it, those computed again after giving way included.
    """

    def __init__(
        self, model: Model, prompt: Sequence[int], max_tokens: int | None, sampling: Sampling, stop_ids: Collection[int]
    ) -> None:
        self.prompt_length, self.computed = len(prompt), 0
        self._limit, self._reason = end_of(model, len(prompt), max_tokens)
        self._sampler, self._stop_ids = Sampler(sampling), stop_ids
        self._ids = np.empty(max(self._limit, len(prompt)), np.int64)  # the penalties read it at every step
        self._ids[: len(prompt)] = prompt
        self._count = len(prompt)
        self.slot: CachedSequence | None = None

    @property
    def ids(self) -> Ids:
        return self._ids[: self._count]

    @property
    def held(self) -> int:
        """Positions that the cache holds."""
        return 0 if self.slot is None else self.slot.length

    @property
    def full(self) -> bool:
        """No further id is wanted."""
        return self._count >= self._limit

    def draw(self, logits: Logits) -> Step:
        """The next step, from the logits after the last id."""
        sample = self._sampler.sample(logits, self.ids, self.prompt_length)
        if sample.id in self._stop_ids:
            return Step(sample.id, sample.logprob, sample.top, "stop")
        self._ids[self._count] = sample.id
        self._count += 1
        return Step(sample.id, sample.logprob, sample.top, self._reason if self.full else None)

    def end(self) -> Step:
        """The step of an answer that wants no id."""
        return Step(None, finish_reason=self._reason)

    def close(self) -> None:
        """Gives the cache slot back."""
        if self.slot is not None:
            self.slot.close()
            self.slot = None


@dataclass(frozen=True, slots=True)
class Event:
    """What a pass brought to a seat: a step (the last one has a finish reason), or the error that ended it."""

    seat: Seat
    step: Step | SmolrunError

    @property
    def last(self) -> bool:
        return isinstance(self.step, SmolrunError) or self.step.finish_reason is not None


class Batch:
    """Answers on their way, at most `size` of them in a pass. For one thread at a time."""

    def __init__(self, model: Model, size: int) -> None:
        if not 1 <= size <= model.segments:
            raise OptionError(f"max_batch is {size}, 1 to {model.segments} expected")
        self._model, self._size = model, min(size, model.chunk)
        self.running: list[Seat] = []
        self._waiting: deque[Seat] = deque()

    @property
    def seats(self) -> list[Seat]:
        """All answers that have not ended."""
        return [*self.running, *self._waiting]

    @property
    def wants_more(self) -> bool:
        """A prompt more could be in the next pass."""
        return len(self.running) + len(self._waiting) < self._size

    def add(
        self,
        ids: Sequence[int],
        *,
        max_tokens: int | None = None,
        sampling: Sampling,
        stop_ids: Collection[int] = (),
    ) -> Seat:
        """A prompt more; arguments and errors as `generate_ids`."""
        check_prompt(self._model, ids)
        seat = Seat(self._model, ids, max_tokens, sampling, stop_ids)
        self._waiting.append(seat)
        return seat

    def step(self, cancel: Cancel | None = None) -> list[Event]:
        """One pass: what it brought. Nothing while it computes prompts only; once `cancel` is set all end "cancelled".

        There must be seats.
        """
        self._admit()
        while True:
            work = self._work()
            prefill = any(len(ids) > 1 for _, ids in work)
            try:
                with watched(self._model, cancel) if prefill else nullcontext():
                    hidden = run_pass(partial(self._model.step, [(seat.slot, ids) for seat, ids in work]), cancel)
                break
            except CacheFull:
                if len(self.running) == 1:
                    raise
                self._give_way(self.running[-1])
        if hidden is None:
            return self.cancel()
        events: list[Event] = []
        drawing: dict[Seat, int] = {}  # the row of its last id
        row = -1
        for seat, ids in work:
            row += len(ids)
            seat.computed += len(ids)
            if seat.held == len(seat.ids):  # else the rest of its prompt is for the next pass
                if seat.full:
                    events.append(Event(seat, seat.end()))
                else:
                    drawing[seat] = row
        if drawing:
            logits = run_pass(partial(self._model.logits, hidden[list(drawing.values())]), cancel)
            if logits is None:
                return self.cancel()
            events += [_draw(seat, one) for seat, one in zip(drawing, logits, strict=True)]
        for event in events:
            if event.last:
                self.end(event.seat)
        return events

    def cancel(self) -> list[Event]:
        """Ends all answers."""
        seats = self.seats
        for seat in seats:
            self.end(seat)
        return [Event(seat, Step(None, finish_reason="cancelled")) for seat in seats]

    def end(self, seat: Seat) -> None:
        """The seat leaves; harmless if it has left."""
        seat.close()
        for group in (self.running, self._waiting):
            if seat in group:
                group.remove(seat)

    def give_way(self) -> None:
        """Gives all cache slots back; the next step goes on where this one stopped."""
        while self.running:
            self._give_way(self.running[-1])

    def _give_way(self, seat: Seat) -> None:
        self.running.remove(seat)
        seat.close()
        self._waiting.appendleft(seat)

    def _admit(self) -> None:
        """Lets prompts in, in their order."""
        while self._waiting and len(self.running) < self._size:
            seat = self._waiting[0]
            shared, coming = 0, 0  # ids that a running one holds, and will hold
            for other in self.running:
                common = _common(seat.ids[:-1], other.ids)
                shared, coming = max(shared, min(common, other.held)), max(coming, common)
            if coming > shared and coming >= WORTH_WAITING:
                return
            # a page more for everyone: an answer that is let in and soon gives way was computed in vain
            need = len(seat.ids) - shared // PAGE * PAGE + PAGE * (len(self.running) + 1)
            if self.running and need > self._model.room:
                return
            seat.slot = self._model.open(seat.ids.tolist())
            self.running.append(self._waiting.popleft())

    def _work(self) -> list[tuple[Seat, list[int]]]:
        """Ids of the next pass: one of each answer, then of the prompts what the pass still takes."""
        left = self._model.chunk
        work = []
        for seat in sorted(self.running, key=lambda seat: len(seat.ids) - seat.held > 1):
            if left:
                ids = seat.ids[seat.held : seat.held + left].tolist()
                work.append((seat, ids))
                left -= len(ids)
        return work


def _draw(seat: Seat, logits: Logits) -> Event:
    try:
        return Event(seat, seat.draw(logits))
    except SmolrunError as error:
        return Event(seat, error)


def _common(a: Ids, b: Ids) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
