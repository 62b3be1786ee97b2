"""The door: text in, text out.

    LLM.generate   one Completion       collects
    LLM.stream     Chunk by Chunk       adds text, stop strings, clocks, the queue of callers
    generate_ids   ids                  (generate/engine.py)

    LLM.batch      Completions          of many prompts, several in each pass (generate/batch.py)

`LLM.chat` renders its messages and goes the same way. It keeps no state: a dialogue is rendered anew each turn, and the
KV cache keeps the longest prefix, so only the new turn is computed. `save_session` takes such a prefix to a file.
"""

import gc
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

import numpy as np

from smolrun.answer import (
    Answer,
    AtEnd,
    BatchAnswer,
    Chunk,
    Completion,
    Request,
    Speaker,
    Stop,
    Timings,
    collect,
    failed,
)
from smolrun.config import ModelConfig
from smolrun.errors import ContextOverflow, ModelClosed, OptionError, SmolrunError
from smolrun.files.peft import read_adapter
from smolrun.files.sources import resolve
from smolrun.generate.batch import Batch, Event, Seat
from smolrun.generate.engine import Cancel, Model, Progress, Step, check_ids, check_prompt, logits_from
from smolrun.generate.sampler import Logits, Sampling
from smolrun.generate.speculate import Speculator
from smolrun.generate.turns import Holder, Turns
from smolrun.model.llama import Llama
from smolrun.model.memory import trim
from smolrun.model.packed import open_model
from smolrun.session import Session, Sessions, model_digest
from smolrun.text.dialogue import AnswerMemory, is_answer
from smolrun.text.template import ChatTemplate
from smolrun.text.tokenizer import Tokenizer

__all__ = ["DEFAULT_MAX_TOKENS", "LLM", "Chunk", "Completion", "Timings", "load"]

Prompt = str | Sequence[int]
Message = Mapping[str, Any]

DEFAULT_MAX_TOKENS = 512


def load(
    source: str | Path | None = None,
    *,
    context: int | None = None,
    threads: int | None = None,
    quantize: str | None = None,
    kv: str = "f16",
    precision: str = "fast",
    speculate: str | None = None,
    draft: str | Path | None = None,
    adapter: str | Path | None = None,
    adapter_scale: float = 1.0,
    force: bool = False,
    offline: bool = False,
    progress: Callable[[str, int, int], object] | None = None,
) -> "LLM":
    """Opens a model.

    Args:
        source: a .gguf file; a folder with config.json, *.safetensors and tokenizer.json; a Hub id
            (`HuggingFaceTB/SmolLM2-360M-Instruct`, `owner/repo:file.gguf`, both with @revision); an alias (`135m`,
            `360m`, `1.7b`, `135m-base` ...); None: the default model.
        context: positions of the KV cache; None: the model's own, bounded by memory.
        threads: None: one per physical core.
        quantize: "q4_0" or "q8_0" quantises safetensors weights; None keeps them.
        kv: elements of the KV cache: "f32", "f16", "bf16", "q8_0" or "q4_0"; "q8_0,q4_0" for keys and values apart.
        precision: "fast" (int8 activations) or "exact" (two int8 terms).
        speculate: "lookup" guesses the next ids from earlier ones of prompt and answer, and checks several in one pass:
            answers that quote (a summary, edited code) come faster. Every answer stays what it is, bit for bit.
        draft: a source of a smaller model of the same vocabulary that guesses. Both may be given.
        adapter: a LoRA folder as `smolrun train` and peft write it, see `LLM.set_adapter`.
        adapter_scale: how much of it; 0 is none, 1 as it was trained.
        force: load it even where the available memory seems too small.
        offline: never ask the network.
        progress: called with ("compile" or "load", done, total): the very first start compiles the kernels.

    Raises:
        ModelNotFound, ModelFileError, UnsupportedModel, OptionError, OutOfMemory, KernelError: see `smolrun.errors`.
    """
    if speculate not in (None, "lookup"):
        raise OptionError(f"speculate is {speculate!r}, 'lookup' or None expected (a model that guesses is `draft`)")
    if adapter is None and adapter_scale != 1.0:
        raise OptionError(f"adapter_scale is {adapter_scale}, and there is no adapter")
    with ExitStack() as opened, _uncollected():
        checkpoint = opened.enter_context(open_model(resolve(source, offline=offline), quantize))
        tokenizer = Tokenizer.from_source(checkpoint.tokenizer, vocab_size=checkpoint.config.vocab_size)
        template = ChatTemplate(checkpoint.chat_template, tokenizer)
        checkpoint.release()  # the header's pages
        trim()
        model = Llama(
            checkpoint,
            context=context,
            threads=threads,
            quantize=quantize,
            kv=kv,
            precision=precision,
            force=force,
            progress=progress,
        )
        checkpoint.release()
        opened.callback(model.close)
        guesser = None
        if draft is not None:
            guesser = load_draft(opened, resolve(draft, offline=offline), model, tokenizer, kv, force, progress)
        speculator = None
        if guesser is not None or speculate is not None:
            speculator = Speculator(lookup=speculate == "lookup", draft=guesser, clock=time.perf_counter)
        digest = partial(model_digest, checkpoint, quantize=quantize, kv=kv, precision=precision)
        release = opened.pop_all().close
    sessions = Sessions(model, digest)
    llm = LLM(model, tokenizer, template, release=release, speculator=speculator, sessions=sessions)
    if adapter is not None:
        try:
            llm.set_adapter(adapter, adapter_scale)
        except BaseException:
            llm.close()
            raise
    return llm


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection while a vocabulary is read: it would look at 200,000 strings again and again."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def load_draft(
    opened: ExitStack,
    path: Path,
    model: Llama,
    tokenizer: Tokenizer,
    kv: str,
    force: bool,
    progress: Callable[[str, int, int], object] | None,
) -> Llama:
    """The draft of a model: it runs on the model's threads, and never while the model runs. `opened` closes it."""
    checkpoint = opened.enter_context(open_model(path))
    other = Tokenizer.from_source(checkpoint.tokenizer, vocab_size=checkpoint.config.vocab_size)
    if other.vocab_size != tokenizer.vocab_size:
        raise OptionError(
            f"the draft {path.name} has {other.vocab_size:,} ids, the model {tokenizer.vocab_size:,}: "
            "a draft model needs the model's own vocabulary"
        )
    for id in range(tokenizer.vocab_size):
        if (its := other.token_bytes(id)) != (own := tokenizer.token_bytes(id)):
            raise OptionError(
                f"id {id} is {its!r} for the draft {path.name}, {own!r} for the model: "
                "a draft model needs the model's own vocabulary"
            )
    context = min(model.context, checkpoint.config.max_positions)
    guesser = Llama(checkpoint, context=context, kv=kv, team=model.team, force=force, progress=progress)
    checkpoint.release()
    opened.callback(guesser.close)
    return guesser


class LLM:
    """A model that answers. Made by `load`; closed by `close` or by the end of a `with`.

    One answer is computed at a time; callers of other threads wait in order. A stream that is not read for a while lets
    waiting callers in and goes on afterwards, with the same ids.

    >>> with smolrun.load(tiny, context=256) as llm:
    ...     ids = llm.tokenize("Hello")
    ...     llm.detokenize(ids)
    'Hello'
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        release: Callable[[], None] | None = None,
        speculator: Speculator | None = None,
        sessions: Sessions | None = None,
    ) -> None:
        """Parts made elsewhere; `load` is the ordinary way. `release` frees them, None: model.close."""
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._speculator, self._sessions = speculator, sessions
        self._turns = Turns()
        self._memory = AnswerMemory()
        self._release = weakref.finalize(self, release or model.close)
        self._release.atexit = False
        self._freeing = threading.Lock()

    @property
    def config(self) -> ModelConfig:
        """Shapes and names of the model."""
        return self._model.config

    @property
    def context(self) -> int:
        """Positions that prompt and answer may fill together."""
        return self._model.context

    @property
    def tokenizer(self) -> Tokenizer:
        """Text <-> ids."""
        return self._tokenizer

    @property
    def template(self) -> ChatTemplate:
        """Messages -> ids."""
        return self._template

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        sampling: Sampling | None = None,
        stop: Stop = (),
        ignore_eos: bool = False,
        cancel: Cancel | None = None,
        progress: Progress | None = None,
    ) -> Completion:
        """Continues a prompt; arguments and errors as `stream`.

        >>> with smolrun.load(tiny, context=256) as llm:
        ...     answer = llm.generate("Once upon", max_tokens=5, sampling=Sampling(seed=1), ignore_eos=True)
        >>> len(answer.ids), answer.finish_reason, answer.seed
        (5, 'length', 1)
        """
        return collect(
            self.stream(
                prompt,
                max_tokens=max_tokens,
                sampling=sampling,
                stop=stop,
                ignore_eos=ignore_eos,
                cancel=cancel,
                progress=progress,
            )
        )

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        sampling: Sampling | None = None,
        stop: Stop = (),
        ignore_eos: bool = False,
        cancel: Cancel | None = None,
        progress: Progress | None = None,
    ) -> Generator[Chunk, None, None]:
        """Continues a prompt piece by piece. Leaving the loop, or closing the generator, ends the work.

        Args:
            prompt: text (read as plain text: `<|im_end|>` in it is ten letters) or ids.
            max_tokens: at most so many ids; None: until the context is full.
            sampling: None: `Sampling()`, the model card's.
            stop: strings or ids, one or several, that end the answer and are not part of it.
            ignore_eos: the model's own end tokens do not end the answer.
            cancel: a threading.Event, say: once set, the answer ends within one token, also inside a long prefill.
            progress: called with (ids computed, ids to compute) during the prefill.

        Raises:
            OptionError, TokenizerError, ContextOverflow: at the call.
            ModelClosed: at the call, or later if the model is closed meanwhile.

        >>> with smolrun.load(tiny, context=256) as llm:
        ...     chunks = list(llm.stream("Once upon", max_tokens=3, ignore_eos=True))
        >>> [chunk.finish_reason for chunk in chunks]
        [None, None, 'length']
        """
        request = Request(self._ids(prompt), max_tokens, sampling, stop, ignore_eos, cancel, progress)
        return self._stream(request)

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[False] = False,
        max_tokens: int | None = ...,
        sampling: Sampling | None = ...,
        stop: Stop = ...,
        ignore_eos: bool = ...,
        cancel: Cancel | None = ...,
        progress: Progress | None = ...,
    ) -> Completion: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[True],
        max_tokens: int | None = ...,
        sampling: Sampling | None = ...,
        stop: Stop = ...,
        ignore_eos: bool = ...,
        cancel: Cancel | None = ...,
        progress: Progress | None = ...,
    ) -> Generator[Chunk, None, None]: ...

    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: bool = False,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        sampling: Sampling | None = None,
        stop: Stop = (),
        ignore_eos: bool = False,
        cancel: Cancel | None = None,
        progress: Progress | None = None,
    ) -> Completion | Generator[Chunk, None, None]:
        """Answers the last of the messages; other arguments and errors as `stream`.

        Args:
            messages: dicts with "role" and "content". If the last one is the assistant's, its content is the beginning
                of the answer and is continued; the result is what follows it. An assistant's message may carry the
                "ids" of its `Completion`; those of this LLM's latest answers are known without.
            stream: False: a Completion; True: a generator of Chunks.

        Raises:
            TemplateError: a base model without a chat template, or messages it refuses.

        >>> with smolrun.load(tiny, context=512) as llm:
        ...     messages = [{"role": "user", "content": "Hi"}]
        ...     answer = llm.chat(messages, max_tokens=4, ignore_eos=True)
        ...     messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "And?"}]
        ...     again = llm.chat(messages, max_tokens=4, ignore_eos=True)
        >>> again.timings.cached_tokens >= answer.timings.prompt_tokens            # only the new turn was computed
        True
        """
        ids, at_end = self._dialogue(messages)
        chunks = self._stream(Request(ids, max_tokens, sampling, stop, ignore_eos, cancel, progress), at_end)
        return chunks if stream else collect(chunks)

    @overload
    def batch(
        self,
        prompts: Iterable[Prompt | Sequence[Message]],
        *,
        stream: Literal[False] = False,
        max_tokens: int | None = ...,
        sampling: Sampling | Sequence[Sampling] | None = ...,
        stop: Stop = ...,
        ignore_eos: bool = ...,
        max_batch: int = ...,
        cancel: Cancel | None = ...,
    ) -> list[Completion]: ...

    @overload
    def batch(
        self,
        prompts: Iterable[Prompt | Sequence[Message]],
        *,
        stream: Literal[True],
        max_tokens: int | None = ...,
        sampling: Sampling | Sequence[Sampling] | None = ...,
        stop: Stop = ...,
        ignore_eos: bool = ...,
        max_batch: int = ...,
        cancel: Cancel | None = ...,
    ) -> Generator[tuple[int, Chunk], None, None]: ...

    def batch(
        self,
        prompts: Iterable[Prompt | Sequence[Message]],
        *,
        stream: bool = False,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        sampling: Sampling | Sequence[Sampling] | None = None,
        stop: Stop = (),
        ignore_eos: bool = False,
        max_batch: int = 8,
        cancel: Cancel | None = None,
    ) -> list[Completion] | Generator[tuple[int, Chunk], None, None]:
        """Answers many prompts, several in each pass: every answer is the one it would get alone, bit for bit.

        A finished answer makes room for the next prompt at once; what prompts have in common is computed once. A prompt
        that cannot be answered (too long, no text, refused by the template) ends with finish_reason "error" and its
        `error`; the others go on. All answers of a pass share the cache's `context` positions, so the memory does not
        grow with max_batch: load with a larger context if long answers keep each other out.

        Args:
            prompts: each is text or ids, as for `generate`, or messages, as for `chat`. Any iterable: it is read as
                answers end.
            stream: False: a list of Completions in the order of the prompts; True: a generator of (index of the prompt,
                Chunk) as they come.
            sampling: one for all, or one for each prompt. Without a seed each answer takes a fresh one.
            max_batch: answers in one pass, 1 to 32.
            cancel: once set, all answers that have not ended end with "cancelled".
            max_tokens, stop, ignore_eos: as `stream`, for each answer.

        Raises:
            OptionError: options, not prompts, that cannot be; at the call.
            ModelClosed: at the call, or later if the model is closed meanwhile.

        >>> with smolrun.load(tiny, context=256) as llm:
        ...     answers = llm.batch(["Once upon", [5, 6, 7], "x" * 9999], max_tokens=4, ignore_eos=True)
        >>> [(len(answer.ids), answer.finish_reason) for answer in answers]
        [(4, 'length'), (4, 'length'), (0, 'error')]
        """
        if isinstance(prompts, (str, bytes)):
            raise OptionError(f"prompts is {type(prompts).__name__}, a list of prompts expected")
        if isinstance(sampling, Sequence):
            if not isinstance(prompts, Sequence) or len(prompts) != len(sampling):
                raise OptionError(f"{len(sampling)} samplings: a list of as many prompts expected, or one Sampling")
            each: Iterable[Sampling | None] = sampling
        else:
            each = repeat(sampling)
        if self._turns.closed:
            raise ModelClosed("the model is closed: load it again")
        shared = Request([], max_tokens, None, stop, ignore_eos, cancel, None)
        chunks = self._batch_chunks(Batch(self._model, max_batch), enumerate(zip(prompts, each, strict=False)), shared)
        if stream:
            return chunks
        parts: defaultdict[int, list[Chunk]] = defaultdict(list)
        answers: dict[int, Completion] = {}
        for index, chunk in chunks:
            parts[index].append(chunk)
            if chunk.finish_reason is not None:
                answers[index] = collect(parts.pop(index))
        return [answers[index] for index in range(len(answers))]

    def save_session(self, path: str | Path, prompt: Prompt | Sequence[Message]) -> None:
        """Writes the keys and values of a prompt to a file; what the cache lacks of them is computed first.

        Args:
            path: replaced when it exists.
            prompt: text, ids, or the messages of a chat: a system message alone, say, or a whole dialogue, which is
                kept with the ids of its answers; of one that is longer than the context, keys and values of its begin.

        Raises:
            SessionError: the file cannot be written.
            OptionError, TokenizerError, TemplateError, ContextOverflow: as `stream` and `chat`.

        >>> with smolrun.load(tiny, context=256) as llm:
        ...     llm.save_session(folder / "long.session", "A long prompt")
        ...     llm.load_session(folder / "long.session").ids == llm.tokenize("A long prompt")
        True
        """
        messages: list[Message] | None = None
        if not isinstance(prompt, str) and len(prompt) and isinstance(prompt[0], Mapping):
            messages = self._memory.with_ids(prompt)  # type: ignore[arg-type]
            ids, _ = self._template.encode(messages, add_generation_prompt=False)
            ids = ids[: self.context]  # an answer that filled it: the template ends the turn beyond
        else:
            ids = self._ids(prompt)  # type: ignore[arg-type]
        self._check_room(ids, "session")
        with self._computing():
            self._own_sessions().save(Path(path), ids, messages)

    def load_session(self, path: str | Path) -> Session:
        """Reads a file of `save_session`: a prompt that begins as the saved one is then computed from there on, with
        the same bits. Returns its `.ids`, and its `.messages` if it was a chat.

        Raises:
            SessionError: no session, damaged, or not of this model as it is loaded; nothing of it is kept then.
            ContextOverflow: it needs a larger context.
        """
        with self._computing():
            session = self._own_sessions().load(Path(path))
        messages = session.messages or []
        for at, message in enumerate(messages):
            if is_answer(message) and "ids" in message:
                self._memory.remember(messages[:at], message["content"], message.pop("ids"))
        return session

    def set_adapter(self, source: str | Path | None, scale: float = 1.0) -> None:
        """Answers from now on with a LoRA adapter, with another one, or with none. The base is not read again.

        It is computed beside the weights in f32, so it is exact on quantised ones too. What the cache knew is
        forgotten. An answer that is being read meanwhile goes on with the new adapter.

        Args:
            source: a folder as `smolrun train` and peft write it (adapter_config.json, adapter_model.safetensors); None
                for the base model alone.
            scale: how much of it: 1 as it was trained, 0.5 half, 0 none.

        Raises:
            ModelNotFound, ModelFileError, UnsupportedModel: no adapter, a damaged one, one of another model or kind;
                everything is then as before.
            OptionError: a scale that is no number.

        >>> with smolrun.load(tiny, context=256) as llm:
        ...     llm.set_adapter(None)
        """
        if not isinstance(self._model, Llama):
            raise OptionError("this LLM was put together by hand: smolrun.load makes one that takes adapters")
        if not np.isfinite(scale):
            raise OptionError(f"the adapter's scale is {scale}, a finite number expected")
        found = None if source is None else read_adapter(source, self.config)
        with self._computing():
            self._model.set_adapter(found, float(scale))
            if self._sessions is not None:
                self._sessions.adapter = b"" if found is None else found.digest + repr(float(scale)).encode()

    def _own_sessions(self) -> Sessions:
        if self._sessions is None:
            raise OptionError("this LLM was put together by hand without `sessions`: smolrun.load makes one with")
        return self._sessions

    def tokenize(self, text: str) -> list[int]:
        """Ids of plain text; text of special tokens stays text.

        Raises:
            TokenizerError: lone surrogates.
        """
        return self._tokenizer.encode(text)

    def detokenize(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens as their text; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(ids)

    def logits(self, ids: Prompt, rows: int | Sequence[int] | None = None) -> Logits:
        """The model's logits: row i scores the id that follows ids[: i + 1].

        Args:
            ids: ids or text.
            rows: None: all; a number: so many of the last ones; a sequence: these positions (-1 is the last one).

        Returns:
            float32 (rows or len(ids), vocab_size).

        Raises:
            OptionError: no ids, ids outside the vocabulary, rows outside the ids.
            ContextOverflow: more ids than the context holds.

        >>> with smolrun.load(tiny, context=256) as llm:
        ...     llm.logits([5, 6, 7], rows=1).shape == (1, llm.config.vocab_size)
        True
        """
        ids = self._ids(ids)
        self._check_room(ids, "input")
        wanted = _positions(rows, len(ids))
        out: Logits = np.empty((len(wanted), self.config.vocab_size), dtype=np.float32)
        if len(wanted):
            with self._computing():
                for first, part in logits_from(self._model, ids[: int(wanted.max()) + 1], int(wanted.min())):
                    here = np.flatnonzero((wanted >= first) & (wanted < first + len(part)))
                    out[here] = part[wanted[here] - first]
        return out

    def score(self, context: Prompt, continuations: Sequence[Prompt]) -> list[float]:
        """Log-probability of each continuation after the context, summed over its ids in float64.

        Texts are encoded jointly, as the model saw them in training: what counts are the ids of context + continuation
        from the first one on that differs from the context's own. The context is computed once.

        Raises:
            OptionError: an empty context.
            ContextOverflow: context and continuation exceed the context.

        >>> with smolrun.load(tiny, context=256) as llm:
        ...     scores = llm.score("The sky is", [" blue", " green"])
        >>> len(scores), max(scores) < 0
        (2, True)
        """
        pairs = [self._joint_ids(context, continuation) for continuation in continuations]
        for ids, _ in pairs:
            self._check_room(ids, "context with the continuation")
        scores = []
        with self._computing():
            for ids, first in pairs:
                total = 0.0
                if first < len(ids):
                    for at, logits in logits_from(self._model, ids[:-1], first - 1):
                        following = np.array(ids[at + 1 : at + 1 + len(logits)])
                        total += float(_log_softmax_at(logits, following).sum())
                scores.append(total)
        return scores

    def close(self) -> None:
        """Frees the model; an answer of another thread ends with ModelClosed. May be called twice."""
        if self._turns.close(self._model.cancel):
            self._free()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ids(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt, each an int."""
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt)
        if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, (Sequence, np.ndarray)):
            raise OptionError(f"the prompt is {type(prompt).__name__}, text or a sequence of ids expected")
        for id in prompt:
            if isinstance(id, bool) or not isinstance(id, (int, np.integer)):
                raise OptionError(f"the prompt holds {id!r}, ids expected (whole numbers)")
        return [int(id) for id in prompt]

    def _check_room(self, ids: Sequence[int], what: str) -> None:
        """As check_prompt, for calls that need no room for an answer."""
        check_ids(self._model, ids)
        if len(ids) > self.context:
            raise ContextOverflow(len(ids), self.context, what)

    def _joint_ids(self, context: Prompt, continuation: Prompt) -> tuple[list[int], int]:
        """Ids of context + continuation, and where the continuation's begin."""
        before = self._ids(context)
        if not before:
            raise OptionError("the context has no ids, at least one expected: give the model's <|endoftext|>, say")
        if not (isinstance(context, str) and isinstance(continuation, str)):
            return [*before, *self._ids(continuation)], len(before)
        ids = self._ids(context + continuation)
        first = next((at for at, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), len(before))
        if first == 0:
            raise OptionError("the continuation changes the first id of its context: give a longer context")
        return ids, min(first, len(ids))

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """A turn for work that is no stream."""
        task = _Task()
        self._turns.take(task)
        try:
            yield
            if self._turns.closed:  # the work was interrupted, what it gave is not whole
                raise ModelClosed("the model was closed during the call: load it again")
        finally:
            self._leave(task)

    def _dialogue(self, messages: Sequence[Message]) -> tuple[list[int], AtEnd]:
        """Ids of messages, and what keeps the ids of their answer for the next turn."""
        messages = self._memory.with_ids(messages)
        begun = messages[-1] if messages and is_answer(messages[-1]) else None
        ids, mask = self._template.encode(
            messages, add_generation_prompt=begun is None, continue_final=begun is not None
        )

        def remember(text: str, sampled: list[int]) -> None:
            if begun is None:
                self._memory.remember(messages, text, sampled)
            else:
                start = len(mask) - mask[::-1].index(False) if False in mask else 0  # of the begun answer
                self._memory.remember(messages[:-1], (begun["content"] or "") + text, [*ids[start:], *sampled])

        return ids, remember

    def _leave(self, who: Holder) -> None:
        if self._turns.leave(who):
            self._free()  # `close` found us computing

    def _free(self) -> None:
        with self._freeing:  # whoever comes second waits until it is done
            self._release()

    def _stop_ids(self, request: Request) -> set[int]:
        return {*(() if request.ignore_eos else self._tokenizer.eos_ids), *request.stop_ids}

    def _stream(self, request: Request, at_end: AtEnd | None = None) -> Generator[Chunk, None, None]:
        if self._turns.closed:
            raise ModelClosed("the model is closed: load it again")
        check_prompt(self._model, request.ids)
        return self._chunks(Answer(self._model, request, self._stop_ids(request), self._speculator), at_end)

    def _chunks(self, answer: Answer, at_end: AtEnd | None) -> Generator[Chunk, None, None]:
        speaker = Speaker(self._tokenizer.stream_decoder(), answer.request.stop_strings)
        said: list[str] = []
        try:
            while True:
                chunk = speaker.say(self._step(answer))
                said.append(chunk.text)
                if chunk.finish_reason is not None:
                    self._leave(answer)
                    yield replace(chunk, timings=answer.timings(), seed=answer.sampling.seed)
                    return
                yield chunk
        finally:
            self._leave(answer)
            if at_end is not None and answer.ids:
                at_end("".join(said), answer.ids)

    def _batch_chunks(
        self,
        batch: Batch,
        prompts: Iterator[tuple[int, tuple[Prompt | Sequence[Message], Sampling | None]]],
        shared: Request,
    ) -> Generator[tuple[int, Chunk], None, None]:
        answers: dict[Seat, BatchAnswer] = {}
        try:
            while True:
                while batch.wants_more and (following := next(prompts, None)) is not None:
                    index, (prompt, sampling) = following
                    sampling = (sampling or Sampling()).seeded()
                    try:
                        ids, at_end = self._prompt(prompt)
                        seat = batch.add(
                            ids, max_tokens=shared.max_tokens, sampling=sampling, stop_ids=self._stop_ids(shared)
                        )
                    except SmolrunError as error:
                        yield index, failed(error, sampling.seed)
                        continue
                    speaker = Speaker(self._tokenizer.stream_decoder(), shared.stop_strings)
                    answers[seat] = BatchAnswer(index, seat, speaker, sampling.seed, at_end)
                if not answers:
                    return
                out = []
                for event in self._batch_step(batch, answers.values(), shared.cancel):
                    answer = answers[event.seat]
                    out.append((answer.index, chunk := answer.chunk(event)))
                    if chunk.finish_reason is not None:
                        batch.end(event.seat)
                        del answers[event.seat]
                if not answers:
                    self._leave(batch)
                yield from out
        finally:
            self._leave(batch)
            batch.give_way()

    def _batch_step(self, batch: Batch, answers: Collection[BatchAnswer], cancel: Cancel | None) -> list[Event]:
        """The next pass of a batch, in its turn."""

        start = time.perf_counter()
        mine = self._turns.take(batch, cancel)
        taken = time.perf_counter()
        for answer in answers:
            answer.spend(taken - start)
        if not mine:
            return batch.cancel()
        try:
            events = batch.step(None if cancel is None else _Stopped(cancel, self._turns))
        finally:
            self._turns.rest(batch)
        if self._turns.closed:
            raise ModelClosed("the model was closed during the batch: load it again")
        for answer in answers:
            answer.spend(time.perf_counter() - taken)
        return events

    def _prompt(self, prompt: Prompt | Sequence[Message]) -> tuple[list[int], AtEnd | None]:
        """Ids of a prompt of a batch: messages if it is a list that begins with one."""
        if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], Mapping):
            return self._dialogue(prompt)
        return self._ids(prompt), None  # type: ignore[arg-type]

    def _step(self, answer: "Answer") -> Step:
        """The next step of an answer, in its turn."""
        cancel = answer.request.cancel
        start = time.perf_counter()
        if not self._turns.take(answer, cancel):
            answer.queue_seconds += time.perf_counter() - start
            return Step(None, finish_reason="cancelled")
        answer.queue_seconds += time.perf_counter() - start
        try:
            stopped = None if cancel is None else _Stopped(cancel, self._turns)
            step = answer.step(stopped)
        finally:
            self._turns.rest(answer)
        if self._turns.closed and step.finish_reason in (None, "cancelled"):
            raise ModelClosed("the model was closed during the answer: load it again")
        return step


class _Task:
    """Work that holds nothing between its steps."""

    def give_way(self) -> None:
        pass


class _Stopped:
    """Set when the caller cancels or the model is closed."""

    def __init__(self, cancel: Cancel, turns: Turns) -> None:
        self._cancel, self._turns = cancel, turns

    def is_set(self) -> bool:
        return self._turns.closed or self._cancel.is_set()


def _positions(rows: int | Sequence[int] | None, length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Positions meant by `rows` of LLM.logits."""
    if rows is None:
        return np.arange(length)
    if isinstance(rows, (int, np.integer)):
        if not 0 <= rows <= length:
            raise OptionError(f"rows is {rows}, 0 to {length:,} expected, the number of ids")
        return np.arange(length - int(rows), length)
    wanted = np.array([int(row) for row in rows], dtype=np.int64)
    if len(wanted) and not (-length <= wanted.min() and wanted.max() < length):
        raise OptionError(f"rows go from {wanted.min()} to {wanted.max()}, {-length:,} to {length - 1:,} expected")
    return np.where(wanted < 0, wanted + length, wanted)


def _log_softmax_at(logits: Logits, ids: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Log-probability of ids[i] in row i.  # (n, vocab_size), (n,) -> (n,)"""
    out = np.empty(len(ids))
    for row, id in enumerate(ids):  # row by row: a float64 copy of all rows would be 100 MB for 256 of them
        below = logits[row].astype(np.float64) - float(logits[row].max())
        out[row] = below[id] - np.log(np.exp(below).sum())
    return out
