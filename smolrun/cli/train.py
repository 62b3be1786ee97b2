"""`smolrun train`: a group of tasks; a recipe's `task` says which class of smolrun.train reads it."""

from __future__ import annotations

import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolrun.cli import progress
from smolrun.cli.options import ADAPTER, LoadOptions, load_options, verbose_option
from smolrun.cli.table import columns, size
from smolrun.errors import OptionError

if TYPE_CHECKING:
    from smolrun.train.rows import BadRow
    from smolrun.train.tasks import Plan

_SAY_SECONDS = 10.0  # between two lines where there is no terminal


@click.group("train")
@verbose_option
def command() -> None:
    """Train on the kernels that run the model. What a run does stands in a TOML file, see examples/train."""


def recipe_options(task: Callable[..., None]) -> Callable[..., None]:
    """CONFIG and --set."""
    changes = click.option(
        "--set",
        "changes",
        multiple=True,
        metavar="KEY=VALUE",
        help="Instead of what CONFIG says, as run.out=elsewhere.",
    )
    config = click.argument("config", type=click.Path(dir_okay=False, path_type=Path))
    return config(changes(verbose_option(task)))


def task_command(name: str, help_: str) -> None:
    """`smolrun train NAME CONFIG`."""

    @command.command(name, help=help_)
    @click.option("--fresh", is_flag=True, help="Forget the checkpoints in run.out instead of going on from the last.")
    @click.option("--force", is_flag=True, help="Begin even if memory seems too small.")
    @recipe_options
    def run(config: Path, changes: tuple[str, ...], fresh: bool, force: bool) -> None:
        from smolrun.train import tasks

        with tasks.prepare(config, changes, task=name, force=force, **progress.loading()) as plan:
            _estimate(plan)
            show = _Show()
            with _ctrl_c() as stop:
                finished = plan.run(fresh=fresh, listen=show, stop=stop.is_set)
            show.end()
            if finished:
                click.echo(f"done: {plan.result}")
            else:
                click.echo(f"stopped; the same command goes on: smolrun train {name} {config}", err=True)
                click.get_current_context().exit(130)


task_command(
    "pretrain",
    """Train a model from scratch, or go on with one, on plain documents.

    A run that was stopped or killed goes on from its last checkpoint, with the same bits.
    """,
)


task_command(
    "sft",
    """Fine-tune a model on dialogues, or on prompts and completions; LoRA and QLoRA with a table [lora].

    The result is a Hugging Face folder in run.out/model, or an adapter in run.out/adapter for `smolrun chat --adapter`.
    """,
)
task_command(
    "dpo",
    """Fine-tune a model on pairs of answers, one chosen and one rejected, by direct preference optimisation.""",
)


@command.command("check")
@recipe_options
def check(config: Path, changes: tuple[str, ...]) -> None:
    """Check CONFIG and its data, and tell what the run would take."""
    from smolrun.train import tasks

    with tasks.prepare(config, changes, **progress.loading()) as plan:
        _estimate(plan)
        click.echo("nothing amiss")


@command.command("tokenizer")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write.")
@click.option("--vocab-size", type=int, default=4096, show_default=True, metavar="N", help="Tokens.")
@click.option("--field", default="text", show_default=True, help="Of a row, the text.")
@verbose_option
def tokenizer(sources: tuple[str, ...], out: Path, vocab_size: int, field: str) -> None:
    """Train a tokenizer like SmolLM2's (byte-level BPE) on files or folders of documents."""
    from smolrun.train.data import texts
    from smolrun.train.recipe import Source
    from smolrun.train.vocabulary import train_vocabulary

    bad: list[Any] = []
    every = (text for path in sources for text in texts(Source(path=path, field=field, held_out=0), bad))
    first = next(every, None)
    if first is None:
        _bad_rows(bad)
        raise OptionError(f"{', '.join(sources)}: no text there")
    count = train_vocabulary(itertools.chain([first], every), vocab_size, out)
    _bad_rows(bad)
    click.echo(f"{out}: {count:,} tokens")


@command.command("filter")
@click.argument("model")
@click.argument("source")
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--labelled", required=True, metavar="PATH", help="Documents with a number each, the higher the better.")
@click.option("--keep", "share", type=float, default=0.1, show_default=True, metavar="SHARE", help="Of all documents.")
@click.option("--field", default="text", show_default=True, help="Of a row, the text.")
@click.option("--label", default="label", show_default=True, help="Of a labelled row, the number.")
@click.option("--tokens", type=int, default=512, show_default=True, metavar="N", help="Of a document that are read.")
@load_options("context", "kv", "speculate", "draft", *ADAPTER)
@verbose_option
def filter_(
    model: str, source: str, target: Path, labelled: str, share: float, field: str, label: str, tokens: int,
    load: LoadOptions,
) -> None:  # fmt: skip
    """Write the best documents of SOURCE to TARGET (JSON lines).

    A classifier head is trained on the hidden states that MODEL has of the labelled documents; it scores the others.
    """
    from smolrun.files.checkpoint import open_checkpoint
    from smolrun.model.llama import Llama
    from smolrun.text.tokenizer import Tokenizer
    from smolrun.train.filter import Reader, keep_best

    shown = progress.loading()
    with open_checkpoint(load.path(model)) as checkpoint:
        vocabulary = Tokenizer.from_source(checkpoint.tokenizer, vocab_size=checkpoint.config.vocab_size)
        context = min(tokens, checkpoint.config.max_positions)
        llama = Llama(checkpoint, context=context, **load.settings, **shown)
    with llama:
        found = keep_best(
            Reader(llama, vocabulary, tokens), source, labelled, target, share=share, field=field, label=label, **shown
        )
    _bad_rows(found.bad)
    rows = [
        ("kept", f"{found.kept:,} of {found.documents:,} documents, scores from {found.threshold:.3f}"),
        ("head", f"correlation {found.head.correlation:.3f} with labels it had not seen"),
    ]
    click.echo(columns(rows))


def _bad_rows(bad: Sequence[BadRow]) -> None:
    for row in bad[:5]:
        click.echo(f"! {row.where}: {row.problem}", err=True)
    if len(bad) > 5:
        click.echo(f"! {len(bad):,} rows cannot be used in all", err=True)


def _estimate(plan: Plan) -> None:
    speed = plan.rate()
    took = ("time", f"about {duration(plan.tokens / speed)} ({speed:,.0f} tokens/s in a first pass)")
    click.echo(columns([*plan.facts, ("memory", size(plan.memory)), took]), err=True)
    for line in plan.warnings:
        click.echo(f"! {line}", err=True)


def duration(seconds: float) -> str:
    """1:02:03, 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Show:
    """Steps on one line of a terminal, or now and then on a line of their own."""

    def __init__(self) -> None:
        self._terminal, self._said, self._open = sys.stderr.isatty(), 0.0, False

    def __call__(self, facts: dict[str, Any]) -> None:
        kind = facts["kind"]
        if kind == "step":
            last = facts["step"] == facts["steps"]
            if not self._terminal and not last and time.monotonic() - self._said < _SAY_SECONDS:
                return
            self._said = time.monotonic()
            text = (
                f"step {facts['step']:,}/{facts['steps']:,}  loss {facts['loss']:.4f}  lr {facts['lr']:.2e}  "
                f"norm {facts['gradient_norm']:.2f}  {facts['tokens_per_second']:,.0f} tok/s  "
                f"{duration(facts['seconds_left'])} left"
            )
            if self._terminal:
                click.echo(f"\r\x1b[K{text}", nl=False, err=True)
                self._open = True
            else:
                click.echo(text, err=True)
            return
        self.end()
        if kind == "evaluation":
            figures = (f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items() if k != "kind")
            click.echo("evaluation: " + "  ".join(figures), err=True)
        elif kind == "resume":
            click.echo(f"going on from {facts['path']}", err=True)
        elif kind == "note":
            click.echo(facts["text"], err=True)

    def end(self) -> None:
        """Finish the line."""
        if self._open:
            click.echo(err=True)
        self._open = False


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """The first Ctrl-C, or SIGTERM, sets the event: the step ends, is saved, the run stops. A second one interrupts."""
    event = threading.Event()

    def stop(number: int, _: object) -> None:
        event.set()
        signal.signal(number, before[signal.Signals(number)])
        click.echo("\nstopping after this step (once more: at once, without saving)", err=True)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
