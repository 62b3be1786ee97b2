"""What an answer is: its pieces, its whole, its clocks, and the state it takes to compute one step after another."""

import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field, replace

from smolrun.errors import OptionError, SmolrunError
from smolrun.generate.batch import Event, Seat
from smolrun.generate.engine import Cancel, FinishReason, Model, Progress, Step, generate_ids
from smolrun.generate.sampler import Sampling
from smolrun.generate.speculate import Speculator
from smolrun.text.stops import StopFinder
from smolrun.text.tokenizer import StreamDecoder

Stop = str | int | Iterable[str | int]
AtEnd = Callable[[str, list[int]], None]  # gets an answer's text and ids


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of an answer went. Seconds count while the model worked, not while the reader of a stream did.

    Attributes:
        queue_seconds: waited for other callers.
        prompt_tokens: ids of the prompt.
        prefill_tokens: those that were computed; the others came from the cache.
        prefill_seconds: spent on them.
        first_token_seconds: from the start of the answer to its first id, the queue included; None without one.
        decode_tokens: ids after the first one, a stop id included.
        decode_seconds: spent on them.
        guessed_tokens, accepted_tokens: of speculative decoding.
    """

    queue_seconds: float
    prompt_tokens: int
    prefill_tokens: int
    prefill_seconds: float
    first_token_seconds: float | None
    decode_tokens: int
    decode_seconds: float
    guessed_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def cached_tokens(self) -> int:
        """Ids of the prompt that were not computed again."""
        return max(self.prompt_tokens - self.prefill_tokens, 0)

    @property
    def prefill_rate(self) -> float:
        """Computed ids of the prompt per second; 0 if none were."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def decode_rate(self) -> float:
        """Ids per second after the first; 0 if there are none."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer: one id and the text that became certain with it ("" inside a character or a stop string).

    Attributes:
        text: whole characters; all chunks joined are the answer.
        id: None in a last chunk that only tells the end.
        logprob: of the id in the model's unmodified distribution (see `Sampling`); None without id.
        top: the likeliest (id, log-probability), as many as `Sampling.logprobs`.
        finish_reason: None but in the last chunk: "stop" (the model or a stop id ended it), "length" (max_tokens),
            "context" (the context is full), "stop_string", "cancelled", "error" (one prompt of a batch).
        timings, seed: in the last chunk; `seed` repeats the answer.
        error: what ended it, with "error".
    """

    text: str
    id: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    timings: Timings | None = None
    seed: int | None = None
    error: SmolrunError | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer.

    Attributes:
        text: without the stop string.
        ids: as sampled, without a stop id. May go back into `LLM.chat` as {"role": "assistant", "content": text,
            "ids": ids}.
        finish_reason: as in `Chunk`.
        timings: where the time went.
        seed: with it in `Sampling` the same call gives the same answer.
        logprobs: log-probability of each id.  # len(ids)
        top: the likeliest (id, log-probability) beside each id, as many as `Sampling.logprobs`.  # len(ids)
        error: what ended one answer of a batch; None but with "error".
    """

    text: str
    ids: list[int]
    finish_reason: FinishReason
    timings: Timings
    seed: int
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    error: SmolrunError | None = None


class Request:
    """The checked arguments of an answer."""

    def __init__(
        self,
        ids: list[int],
        max_tokens: int | None,
        sampling: Sampling | None,
        stop: Stop,
        ignore_eos: bool,
        cancel: Cancel | None,
        progress: Progress | None,
    ) -> None:
        if max_tokens is not None and (
            isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 0
        ):
            raise OptionError(f"max_tokens is {max_tokens!r}, None or a whole number >= 0 expected")
        stops = [stop] if isinstance(stop, (str, int)) else list(stop)
        for one in stops:
            if isinstance(one, bool) or not isinstance(one, (str, int)) or one == "":
                raise OptionError(f"stop holds {one!r}, non-empty strings or ids expected")
        self.ids = ids
        self.max_tokens = max_tokens
        self.sampling = sampling or Sampling()
        self.stop_strings = [one for one in stops if isinstance(one, str)]
        self.stop_ids = [one for one in stops if isinstance(one, int)]
        self.ignore_eos = ignore_eos
        self.cancel = cancel
        self.progress = progress


class Speaker:
    """Steps -> chunks: whole characters, and none of a stop string, wherever the borders between tokens lie."""

    def __init__(self, decoder: StreamDecoder, stop_strings: list[str]) -> None:
        self._decoder, self._stops = decoder, StopFinder(stop_strings)

    def say(self, step: Step) -> Chunk:
        """The text that became certain. A stop string ends the answer: then the chunk has a finish reason."""
        own = step.id if step.finish_reason != "stop" else None
        text = self._stops.push(self._decoder.push(own)) if own is not None else ""
        if step.finish_reason is not None and not self._stops.found:
            text += self._stops.push(self._decoder.flush()) + self._stops.flush()
        reason: FinishReason | None = "stop_string" if self._stops.found else step.finish_reason
        return Chunk(text, own, step.logprob if own is not None else None, step.top, reason)


class Answer:
    """An answer on its way: its clocks, and what it takes to go on after another caller had the model.

    It may `give_way` between any two steps: the next one opens the cache again with the ids so far. As logits and draws
    do not depend on what the cache held, the answer stays the same.
    """

    def __init__(
        self, model: Model, request: Request, stop_ids: set[int], speculator: Speculator | None = None
    ) -> None:
        self.request = request
        self.sampling = request.sampling.seeded()
        self._speculation = speculator.begin(self.sampling, len(request.ids)) if speculator is not None else None
        self.ids: list[int] = []
        self.queue_seconds = 0.0
        self._model = model
        self._stop_ids = stop_ids
        self._steps: Generator[Step, None, None] | None = None
        self._prefill_tokens = 0  # of finished prefills: an answer that gave way may need more than one
        self._prefill_now = 0
        self._prefill_seconds = 0.0
        self._first_seconds: float | None = None
        self._decode_from = 0.0
        self._busy_seconds = 0.0
        self._count = 0
        self._started = 0.0

    def step(self, cancel: Cancel | None) -> Step:
        """Computes one step."""
        self._started = time.perf_counter()
        if self._steps is None:
            self._prefill_tokens, self._prefill_now = self._prefill_tokens + self._prefill_now, 0
            self._steps = generate_ids(
                self._model,
                [*self.request.ids, *self.ids],
                max_tokens=self.request.max_tokens,
                sampling=self.sampling,
                stop_ids=self._stop_ids,
                cancel=cancel,
                progress=self._progress,
                prompt_length=len(self.request.ids),
                speculation=self._speculation,
            )
        step = next(self._steps)
        self._busy_seconds += time.perf_counter() - self._started
        if step.id is not None:
            self._count += 1
            if self._first_seconds is None:
                self._first_seconds = self.queue_seconds + self._busy_seconds
                self._decode_from = self._busy_seconds - self._prefill_seconds
            if step.finish_reason != "stop":
                self.ids.append(step.id)
        return step

    def give_way(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def timings(self) -> Timings:
        decoding = self._busy_seconds - self._prefill_seconds - self._decode_from
        return Timings(
            queue_seconds=self.queue_seconds,
            prompt_tokens=len(self.request.ids),
            prefill_tokens=self._prefill_tokens + self._prefill_now,
            prefill_seconds=self._prefill_seconds,
            first_token_seconds=self._first_seconds,
            decode_tokens=max(self._count - 1, 0),
            decode_seconds=max(decoding, 0.0) if self._count > 1 else 0.0,
            guessed_tokens=self._speculation.guessed if self._speculation else 0,
            accepted_tokens=self._speculation.accepted if self._speculation else 0,
        )

    def _progress(self, done: int, total: int) -> None:
        if done:
            now = time.perf_counter()
            self._prefill_seconds += now - self._started
            self._busy_seconds += now - self._started
            self._started = now
        self._prefill_now = done
        if self.request.progress is not None:
            self.request.progress(done, total)


class BatchAnswer:
    """One answer of a batch: its text and its clocks. Passes are shared, so the seconds of several answers overlap."""

    def __init__(
        self,
        index: int,
        seat: Seat,
        speaker: Speaker,
        seed: int | None,
        at_end: AtEnd | None,
    ) -> None:
        self.index, self.seat = index, seat
        self._speaker, self._seed, self._at_end = speaker, seed, at_end
        self._said: list[str] = []
        self._ids: list[int] = []
        self._computed = 0  # of the seat, as last seen
        self._count = 0
        self._prefill_tokens = 0
        self._queue_seconds = self._prefill_seconds = self._decode_seconds = 0.0

    def spend(self, seconds: float) -> None:
        """Time went by: in the queue, or in a pass that the answer was part of."""
        computed = self.seat.computed - self._computed
        self._computed += computed
        if not computed:
            self._queue_seconds += seconds
        elif self._count:
            self._decode_seconds += seconds
        else:
            self._prefill_seconds += seconds
            self._prefill_tokens += computed

    def chunk(self, event: Event) -> Chunk:
        """What comes out of an event."""
        if isinstance(event.step, SmolrunError):
            return replace(failed(event.step, self._seed), timings=self._timings())
        self._count += event.step.id is not None
        chunk = self._speaker.say(event.step)
        self._said.append(chunk.text)
        if chunk.id is not None:
            self._ids.append(chunk.id)
        if chunk.finish_reason is None:
            return chunk
        if self._at_end is not None and self._ids:
            self._at_end("".join(self._said), self._ids)
        return replace(chunk, timings=self._timings(), seed=self._seed)

    def _timings(self) -> Timings:
        return Timings(
            queue_seconds=self._queue_seconds,
            prompt_tokens=self.seat.prompt_length,
            prefill_tokens=self._prefill_tokens,
            prefill_seconds=self._prefill_seconds,
            first_token_seconds=self._queue_seconds + self._prefill_seconds if self._count else None,
            decode_tokens=max(self._count - 1, 0),
            decode_seconds=self._decode_seconds,
        )


def failed(error: SmolrunError, seed: int | None) -> Chunk:
    """The only chunk of a prompt that has no answer."""
    return Chunk("", finish_reason="error", timings=Timings(0.0, 0, 0, 0.0, None, 0, 0.0), seed=seed or 0, error=error)


def collect(chunks: Iterable[Chunk]) -> Completion:
    texts, ids, logprobs, top = [], [], [], []
    last: Chunk | None = None
    for last in chunks:
        texts.append(last.text)
        if last.id is not None and last.logprob is not None:
            ids.append(last.id)
            logprobs.append(last.logprob)
            top.append(last.top)
    assert last is not None and last.finish_reason is not None and last.timings is not None and last.seed is not None
    return Completion("".join(texts), ids, last.finish_reason, last.timings, last.seed, logprobs, top, last.error)
