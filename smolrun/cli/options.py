"""The options that verbs share: each is declared once and travels in one bundle, so that none gets lost on its way.

A default is never repeated here: an option that was not given is not passed on, so the engine's own default holds.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from smolrun.cli import progress
from smolrun.errors import OptionError

if TYPE_CHECKING:
    from smolrun import LLM

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass
class Settings:
    """What holds for the whole run, at `ctx.obj` of the outermost context."""

    verbose: bool = False


def is_verbose() -> bool:
    """Whether -v was given, before or after the verb."""
    settings: Settings = click.get_current_context().find_root().ensure_object(Settings)
    return settings.verbose


def _set_verbose(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        ctx.find_root().ensure_object(Settings).verbose = True


verbose_option = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=_set_verbose,
    help="Speeds on stderr; a traceback with an error.",
)


def _kv(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """The value, if the cache can hold such elements."""
    if value is not None:
        from smolrun.model.memory import kv_kinds

        try:
            kv_kinds(value)
        except OptionError as error:
            raise click.BadParameter(str(error)) from error
    return value


_LOAD = {
    "context": click.option("--context", type=int, metavar="N", help="Tokens of prompt and answer [model's own]."),
    "threads": click.option("--threads", type=int, metavar="N", help="Threads to compute with [as the CPU has cores]."),
    "quantize": click.option(
        "--quantize", type=click.Choice(["q4_0", "q8_0"]), help="Shrink safetensors weights while loading."
    ),
    "kv": click.option(
        "--kv",
        metavar="KIND[,KIND]",
        callback=_kv,
        help="Attention cache: f32, f16, bf16, q8_0 or q4_0; two for keys and values apart [f16].",
    ),
    "precision": click.option(
        "--precision", type=click.Choice(["fast", "exact"]), help="Activations in one or two int8 terms [fast]."
    ),
    "speculate": click.option(
        "--speculate", type=click.Choice(["lookup"]), help="Guess ids that were seen before; same answer, often sooner."
    ),
    "draft": click.option("--draft", metavar="MODEL", help="A smaller model that guesses for MODEL; same answer."),
    "adapter": click.option(
        "--adapter", type=click.Path(file_okay=False, path_type=Path), help="A LoRA folder, of peft or smolrun train."
    ),
    "adapter_scale": click.option("--adapter-scale", type=float, metavar="X", help="How much of the adapter [1.0]."),
    "force": click.option("--force", is_flag=True, default=None, help="Load it even if memory seems too small."),
    "offline": click.option("--offline", is_flag=True, default=None, help="Never use the network."),
}

ADAPTER = ("adapter", "adapter_scale")  # for verbs that only look at a model

_SAMPLING = {
    "temperature": click.option("--temperature", type=float, metavar="T", help="0 is greedy [0.2]."),
    "top_p": click.option("--top-p", type=float, metavar="P", help="Draw from this share of the mass [0.9]."),
    "top_k": click.option("--top-k", type=int, metavar="K", help="Draw from the K likeliest; 0 is all [0]."),
    "min_p": click.option(
        "--min-p", type=float, metavar="P", help="Draw from those this likely beside the best [0.0]."
    ),
    "repetition_penalty": click.option(
        "--repetition-penalty", type=float, metavar="X", help="Divide logits of ids in sight by X [1.0]."
    ),
    "presence_penalty": click.option(
        "--presence-penalty", type=float, metavar="X", help="Subtract X from ids already used [0.0]."
    ),
    "frequency_penalty": click.option(
        "--frequency-penalty", type=float, metavar="X", help="Subtract X for each use of an id [0.0]."
    ),
    "seed": click.option("--seed", type=int, metavar="N", help="Same seed, same text."),
    "logprobs": click.option("--logprobs", type=int, metavar="N", help="Report the N likeliest ids (with --json) [0]."),
}

_ANSWER = {
    "max_tokens": click.option("--max-tokens", type=int, metavar="N", help="Length of the answer at most."),
    "stop": click.option("--stop", multiple=True, metavar="TEXT", help="End before this text (repeatable)."),
    "ignore_eos": click.option("--ignore-eos", is_flag=True, default=None, help="Go on after the end token."),
}


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value not in (None, ())}


@dataclass(frozen=True)
class LoadOptions:
    """How to load a model; only the options that were given."""

    given: Mapping[str, Any] = field(default_factory=dict)

    def path(self, source: str | None) -> Path:
        """The model's files, downloaded with a progress bar if need be."""
        from smolrun.files import sources

        return sources.resolve(source, offline=bool(self.given.get("offline")), progress=True)

    @property
    def settings(self) -> dict[str, Any]:
        """Those that say how to compute, for who gets the path and has nothing to download."""
        return {name: value for name, value in self.given.items() if name != "offline"}

    def load(self, source: str | None) -> LLM:
        """The model, ready."""
        import smolrun

        draft = {"draft": self.path(self.given["draft"])} if "draft" in self.given else {}
        return smolrun.load(self.path(source), **{**self.given, **draft}, **progress.loading())


@dataclass
class AnswerOptions:
    """How to answer; only the options that were given. `/set` in a chat changes it."""

    sampling: dict[str, Any] = field(default_factory=dict)
    answer: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of LLM.stream and LLM.chat.

        Raises:
            OptionError: a value out of range.
        """
        import smolrun

        return {"sampling": smolrun.Sampling(**self.sampling), **self.answer, **progress.reading()}


def load_options(*left_out: str) -> Callable[[Command], Command]:
    """Adds the load options (but those left out); the verb gets them as `load: LoadOptions`."""
    chosen = {name: option for name, option in _LOAD.items() if name not in left_out}
    return _bundle(chosen, "load", lambda options: LoadOptions(_given(options)))


def answer_options() -> Callable[[Command], Command]:
    """Adds the options of sampling and stopping; the verb gets them as `answer: AnswerOptions`."""

    def pack(options: dict[str, Any]) -> AnswerOptions:
        given = _given(options)
        return AnswerOptions(
            {name: value for name, value in given.items() if name in _SAMPLING},
            {name: value for name, value in given.items() if name in _ANSWER},
        )

    return _bundle(_SAMPLING | _ANSWER, "answer", pack)


def _bundle(
    options: Mapping[str, Callable[[Any], Any]], name: str, pack: Callable[[dict[str, Any]], Any]
) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def wrapper(**values: Any) -> Any:
            bundle = pack({option: values.pop(option) for option in options})
            return command(**values, **{name: bundle})

        for option in reversed(list(options.values())):
            option(wrapper)
        return wrapper  # type: ignore[return-value]

    return decorate


def parse_setting(name: str, text: str) -> tuple[str, Any]:
    """A setting typed in a chat, as the option of the same name would read it; None for no text, the default.

    Raises:
        OptionError: no such setting, or a value of another type.
    """
    name = name.replace("-", "_")
    if name not in _SAMPLING and name not in _ANSWER:
        raise OptionError(f"no setting {name!r}: {', '.join(_SAMPLING | _ANSWER)}")
    if not text:
        return name, None
    if name == "stop":
        return name, tuple(text.split())
    whole = ("top_k", "seed", "logprobs", "max_tokens")
    kind: Any = click.BOOL if name == "ignore_eos" else click.INT if name in whole else click.FLOAT
    try:
        return name, kind.convert(text, None, None)
    except click.BadParameter as error:
        raise OptionError(f"{name}: {error.message}") from error


def sampling_names() -> tuple[str, ...]:
    """Names of the settings that make a `Sampling`."""
    return tuple(_SAMPLING)


def read_stdin() -> str:
    """All of standard input, without the line end that `echo` and editors put last.

    Raises:
        OptionError: bytes that are not UTF-8.
    """
    return decode(sys.stdin.buffer.read(), "standard input")


def decode(data: bytes, name: str) -> str:
    """UTF-8 bytes as text, without the last line end.

    Raises:
        OptionError: bytes that are not UTF-8.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{name}: UTF-8 expected, byte {data[error.start]:#04x} found at {error.start:,}") from error
    return text.removesuffix("\n").removesuffix("\r")
