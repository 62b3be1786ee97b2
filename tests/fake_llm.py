"""A model that answers by rule, for tests of the command line; as a script, the command line with that model.

It answers a message with "echo: <message>", one word a chunk. Messages that order something else:
    count        numbers until it is cancelled
    think        nothing until it is cancelled, as a long prefill
    silent       an empty answer
    refuse       a TemplateError
A chat holds at most `context` words; a longer one is a ContextOverflow, an answer that reaches it ends with "context".
"""

from __future__ import annotations

import json
import os
import sys
import threading
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import smolrun
from smolrun.errors import ContextOverflow, OptionError, TemplateError


@dataclass(frozen=True)
class Timings:
    """As smolrun.Timings, which would import the kernels."""

    queue_seconds: float = 0.0
    prompt_tokens: int = 9
    prefill_tokens: int = 5
    prefill_seconds: float = 0.5
    first_token_seconds: float | None = 0.25
    decode_tokens: int = 6
    decode_seconds: float = 0.5
    guessed_tokens: int = 0
    accepted_tokens: int = 0
    cached_tokens: ClassVar[int] = 4
    prefill_rate: ClassVar[float] = 10.0
    decode_rate: ClassVar[float] = 12.0


@dataclass(frozen=True)
class Chunk:
    """As smolrun.Chunk."""

    text: str
    id: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None
    timings: Any = None
    seed: int | None = None
    error: Exception | None = None


def last(reason: str) -> Chunk:
    return Chunk("", finish_reason=reason, timings=Timings(), seed=7)


class FakeLLM:
    def __init__(self, source: Any = None, **options: Any) -> None:
        self.source, self.options = source, options
        self.context = options.get("context", 10**6)
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []
        self.closed = False

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def tokenize(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def stream(self, prompt: str, *, cancel: threading.Event | None = None, **options: Any) -> Iterator[Chunk]:
        self.calls.append(("stream", prompt, options))
        return self.answer(prompt, cancel or threading.Event(), self.context)

    def save_session(self, path: Any, prompt: Any) -> None:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(prompt, file)

    def load_session(self, path: Any) -> Any:
        with open(path, encoding="utf-8") as file:
            return types.SimpleNamespace(ids=[1], messages=json.load(file))

    def generate(self, prompt: str, **options: Any) -> None:
        self.calls.append(("generate", prompt, options))

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        stream: bool = False,
        cancel: threading.Event | None = None,
        **options: Any,
    ) -> Iterator[Chunk]:
        assert stream
        self.calls.append(("chat", [dict(message) for message in messages], options))
        if "FAKE_LOG" in os.environ:
            with open(os.environ["FAKE_LOG"], "a", encoding="utf-8") as log:
                print(json.dumps(list(messages)), file=log)
        words = sum(len(message["content"].split()) for message in messages)
        if words >= self.context:
            raise ContextOverflow(words + 1, self.context)
        return self.answer(messages[-1]["content"], cancel or threading.Event(), self.context - words)

    def batch(
        self, prompts: Iterable[Any], *, stream: bool, cancel: threading.Event | None = None, **options: Any
    ) -> Iterator[tuple[int, Chunk]]:
        assert stream
        for index, prompt in enumerate(prompts):
            self.calls.append(("batch", prompt, options))
            if prompt is None:
                yield index, replace(last("error"), error=OptionError("no prompt"))
                continue
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            for chunk in self.answer(text, cancel or threading.Event(), self.context):
                yield index, chunk

    def answer(self, text: str, cancel: threading.Event, room: int) -> Iterator[Chunk]:
        if text == "refuse":
            raise TemplateError("the template refuses")
        if text == "think":
            assert cancel.wait(20)
            yield last("cancelled")
        elif text == "count":
            number = 0
            while not cancel.is_set():
                yield Chunk(f"{number} ", number, -0.5)
                number += 1
                cancel.wait(0.005)
            yield last("cancelled")
        elif text == "silent":
            yield last("stop")
        else:
            words = ["echo:", *text.split()]
            for index, word in enumerate(words[:room]):
                yield Chunk(word if index == 0 else f" {word}", index, -0.5, ((index, -0.5),))
            yield last("stop" if len(words) <= room else "context")


if __name__ == "__main__":
    from smolrun.cli import main

    smolrun.load = FakeLLM  # type: ignore[assignment, misc]
    sys.exit(main())
