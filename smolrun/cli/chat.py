"""`smolrun chat`: a dialogue at a terminal, or one answer in a pipe."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import click

from smolrun.cli.options import (
    AnswerOptions,
    LoadOptions,
    answer_options,
    is_verbose,
    load_options,
    read_stdin,
    verbose_option,
)
from smolrun.cli.running import end_line, print_text, run
from smolrun.cli.status import status_line

if TYPE_CHECKING:
    from smolrun import Chunk


@click.command("chat")
@click.argument("model", required=False)
@click.option("--system", metavar="TEXT", help="System message [the model's own].")
@answer_options()
@load_options()
@verbose_option
def command(model: str | None, system: str | None, answer: AnswerOptions, load: LoadOptions) -> None:
    """Chat with MODEL. In a pipe, standard input is one message and only the answer is printed.

    At a terminal: Ctrl-C stops an answer, Ctrl-D leaves, /help tells the rest.
    """
    answer.arguments()  # a wrong option is told before the model is loaded
    if sys.stdin.isatty():
        from smolrun.cli.repl import Repl

        with load.load(model) as llm:
            Repl(llm, answer, system=system, verbose=is_verbose()).run()
        return
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": read_stdin()})
    chunks: list[Chunk] = []
    with (
        load.load(model) as llm,
        contextlib.closing(
            run(lambda cancel: llm.chat(messages, stream=True, cancel=cancel, **answer.arguments()))
        ) as stream,
    ):
        for chunk in stream:
            chunks.append(chunk)
            print_text(chunk.text)
    end_line("".join(chunk.text for chunk in chunks))
    if is_verbose():
        click.echo(status_line(chunks[-1]), err=True)
    if chunks[-1].finish_reason == "cancelled":
        raise KeyboardInterrupt
