"""Ids in, ids out: prefill in chunks, then one pass per id until something ends the answer.

Prefill computes hidden states only; the classifier (a fifth of the 135M weights) runs for the last position alone. What
a cached prefix already holds is not computed again: `model.open` says how much that is. With speculation a pass also
takes ids that were guessed, and yields as many ids as were guessed right and one more (speculate.py).
"""

import threading
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np

from smolrun.config import ModelConfig
from smolrun.errors import ContextOverflow, OptionError
from smolrun.generate.sampler import Logits, Sampler, Sampling
from smolrun.generate.speculate import Speculation
from smolrun.model.llama import Cancelled

FinishReason = Literal["stop", "length", "context", "cancelled", "stop_string", "error"]
Progress = Callable[[int, int], object]

_POLL_SECONDS = 0.005  # how often a cancel event is looked at during a native pass: about the time of one token


class CachedSequence(Protocol):
    """One conversation's place in the KV cache."""

    @property
    def length(self) -> int:
        """Positions the cache holds already."""

    def truncate(self, length: int, /) -> None:
        """Forgets the positions from `length` on."""

    def close(self) -> None:
        """Gives the slot back; its pages stay for whoever shares the prefix."""


class Model(Protocol):
    """What the engine asks of a model; `smolrun.model.llama.Llama` is one."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def context(self) -> int: ...
    @property
    def chunk(self) -> int: ...
    @property
    def segments(self) -> int: ...
    @property
    def room(self) -> int: ...
    def open(self, ids: Sequence[int], /) -> CachedSequence: ...
    def hidden(self, seq: Any, ids: Sequence[int], rows: int | None = None, /) -> Logits: ...
    def step(self, work: Sequence[tuple[Any, Sequence[int]]], /) -> Logits: ...
    def logits(self, hidden: Logits, /) -> Logits: ...
    def cancel(self) -> None: ...
    def close(self) -> None: ...


class Cancel(Protocol):
    """Anything with `is_set`: a threading.Event, say."""

    def is_set(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an answer; the last one has a finish reason.

    Its id belongs to the answer, except that of "stop" (the stop id itself). None: no id was drawn ("cancelled", or
    max_tokens=0).
    """

    id: int | None
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None


def check_ids(model: Model, ids: Sequence[int]) -> None:
    """Raises OptionError if there are none, or some are outside the vocabulary."""
    if not len(ids):
        raise OptionError("the prompt has no ids, at least one expected")
    low, high, vocab_size = min(ids), max(ids), model.config.vocab_size
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise OptionError(f"the prompt has id {wrong}, the vocabulary has ids 0 to {vocab_size - 1:,}")


def check_prompt(model: Model, ids: Sequence[int]) -> None:
    """As `check_ids`; and raises ContextOverflow if no id fits after the prompt."""
    check_ids(model, ids)
    if len(ids) >= model.context:
        raise ContextOverflow(len(ids) + 1, model.context, "prompt with one id of the answer")


def end_of(model: Model, prompt_length: int, max_tokens: int | None) -> tuple[int, FinishReason]:
    """How many ids prompt and answer may have together, and why no more."""
    if max_tokens is not None and prompt_length + max_tokens <= model.context:
        return prompt_length + max_tokens, "length"
    return model.context, "context"


def generate_ids(
    model: Model,
    ids: Sequence[int],
    *,
    max_tokens: int | None = None,
    sampling: Sampling,
    stop_ids: Collection[int] = (),
    cancel: Cancel | None = None,
    progress: Progress | None = None,
    prompt_length: int | None = None,
    speculation: Speculation | None = None,
) -> Generator[Step, None, None]:
    """Yields the steps of an answer; closing the iterator ends it and gives the cache slot back.

    Args:
        ids: the prompt, perhaps followed by a part of the answer (see prompt_length).
        max_tokens: at most so many ids of the answer ("length"); None: as many as the context holds ("context").
            Prompt and answer together never exceed the context.
        stop_ids: ids that end the answer ("stop").
        cancel: when set, ends the answer ("cancelled") within one token, also inside a prefill.
        progress: called with (ids computed, ids to compute) before and after each chunk of the prefill.
        prompt_length: how many of `ids` are the prompt, None: all. The rest is an answer to be continued: it counts for
            max_tokens, and the same seed goes on drawing what it would have drawn.
        speculation: guesses for this answer; the steps are bit for bit the same with and without.

    Raises:
        OptionError, ContextOverflow: as `check_prompt`, before the first step.
        ModelFileError: logits that are not finite.
    """
    check_prompt(model, ids)
    prompt_length = prompt_length or len(ids)
    return _steps(model, ids, max_tokens, Sampler(sampling), stop_ids, cancel, progress, prompt_length, speculation)


def _steps(
    model: Model,
    prompt: Sequence[int],
    max_tokens: int | None,
    sampler: Sampler,
    stop_ids: Collection[int],
    cancel: Cancel | None,
    progress: Progress | None,
    prompt_length: int,
    speculation: Speculation | None,
) -> Generator[Step, None, None]:
    limit, reason = end_of(model, prompt_length, max_tokens)
    ids = np.empty(max(limit, len(prompt)), dtype=np.int64)  # grows in place: the penalties read it at every step
    count = len(prompt)
    ids[:count] = prompt
    right = 0  # ids of the last guess that were
    seq = model.open(prompt)
    try:
        hidden = None
        for chunk in passes(model, seq, prompt, 1, cancel=cancel, progress=progress):
            hidden = chunk
        if count >= limit and hidden is not None:
            yield Step(None, finish_reason=reason)
            return
        logits = None if hidden is None else run_pass(partial(model.logits, hidden[-1:]), cancel)
        guess: list[int] = []
        while logits is not None:
            right = 0
            for row, guessed in zip(logits, [*guess, None], strict=True):
                if right and cancel is not None and cancel.is_set():
                    break
                sample = sampler.sample(row, ids[:count], prompt_length)
                if sample.id == guessed:
                    right += 1
                else:
                    seq.truncate(count)  # of the ids computed, those before this one are right
                if sample.id in stop_ids:
                    yield Step(sample.id, sample.logprob, sample.top, "stop")
                    return
                ids[count] = sample.id
                count += 1
                if count == limit:
                    yield Step(sample.id, sample.logprob, sample.top, reason)
                    return
                yield Step(sample.id, sample.logprob, sample.top)
                if sample.id != guessed:
                    break
            if cancel is not None and cancel.is_set():
                break
            if speculation is not None:
                speculation.verified(right)
                guess = speculation.guess(ids[:count], min(limit - count - 1, model.chunk - 1), cancel)
            forward = partial(_forward, model, seq, [int(ids[count - 1]), *guess], cancel)
            logits = forward() if speculation is None else speculation.timed(forward)
        yield Step(None, finish_reason="cancelled")
    finally:
        seq.truncate(min(seq.length, count))  # a guess that was right, but that nobody has asked for
        seq.close()
        if speculation is not None:
            speculation.verified(right)
            speculation.close()


def _forward(model: Model, seq: CachedSequence, ids: Sequence[int], cancel: Cancel | None) -> Logits | None:
    """Logits of all of `ids`, appended to a sequence; None if it was cancelled."""
    hidden = run_pass(partial(model.hidden, seq, ids), cancel)
    return None if hidden is None else run_pass(partial(model.logits, hidden), cancel)


def logits_from(
    model: Model, ids: Sequence[int], first: int, *, cancel: Cancel | None = None
) -> Iterator[tuple[int, Logits]]:
    """Logits of the positions from `first` on, in chunks: (position of the first row, float32 (n, vocab_size)).

    Ends early when cancelled.
    """
    seq = model.open(ids)
    try:
        seq.truncate(min(seq.length, first))
        for hidden in passes(model, seq, ids, len(ids) - first, cancel=cancel):
            if hidden is None:
                return
            if len(hidden):
                logits = run_pass(partial(model.logits, hidden), cancel)
                if logits is None:
                    return
                yield seq.length - len(hidden), logits
    finally:
        seq.close()


def passes(
    model: Model,
    seq: CachedSequence,
    ids: Sequence[int],
    wanted: int,
    *,
    cancel: Cancel | None = None,
    progress: Progress | None = None,
) -> Iterator[Logits | None]:
    """Computes what the cache lacks of `ids`: yields by chunks the hidden states of those of the last `wanted` that are
    in the chunk, None (and no more) once cancelled.
    """
    todo = list(ids[seq.length :])
    if progress is not None:
        progress(0, len(todo))
    with watched(model, cancel):
        for start in range(0, len(todo), model.chunk):
            part = todo[start : start + model.chunk]
            after = len(todo) - start - len(part)
            hidden = run_pass(partial(model.hidden, seq, part, max(wanted - after, 0)), cancel)
            yield hidden
            if hidden is None:
                return
            if progress is not None:
                progress(start + len(part), len(todo))


def run_pass(work: Callable[[], Logits], cancel: Cancel | None) -> Logits | None:
    """One pass of the model; None if it was cancelled."""
    while cancel is None or not cancel.is_set():
        try:
            return work()
        except Cancelled:
            if cancel is None:
                return None
            # else the word was meant for the pass before this one, which ended first: nothing was kept, ask again
    return None


@contextmanager
def watched(model: Model, cancel: Cancel | None) -> Iterator[None]:
    """Sets the model's cancel word once `cancel` is set: a native pass cannot look at a Python event.

    The word is set again and again until the passes have ended: one that was just about to start may have cleared it.
    """
    if cancel is None:
        yield
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_POLL_SECONDS):
            if cancel.is_set():
                model.cancel()

    watcher = threading.Thread(target=watch, name="smolrun-cancel", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
