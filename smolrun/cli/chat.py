"""`smolrun chat`: a dialogue at a terminal, or one answer in a pipe."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
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
from smolrun.cli.session import restore, save
from smolrun.cli.status import status_line

if TYPE_CHECKING:
    from smolrun import Chunk


@click.command("chat")
@click.argument("model", required=False)
@click.option("--system", metavar="TEXT", help="System message [the model's own].")
@click.option(
    "--session",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Go on with the dialogue in this file, and keep it there.",
)
@answer_options()
@load_options()
@verbose_option
def command(
    model: str | None, system: str | None, session: Path | None, answer: AnswerOptions, load: LoadOptions
) -> None:
    """Chat with MODEL. In a pipe, standard input is one message and only the answer is printed.

    At a terminal: Ctrl-C stops an answer, Ctrl-D leaves, /help tells the rest.
    """
    answer.arguments()  # a wrong option is told before the model is loaded
    if sys.stdin.isatty():
        from smolrun.cli.repl import Repl

        with load.load(model) as llm:
            messages = restore(llm, session, system)
            repl = Repl(llm, answer, messages, verbose=is_verbose())
            try:
                repl.run()
            finally:
                save(llm, session, repl.messages)
        return
    question = read_stdin()
    chunks: list[Chunk] = []
    with load.load(model) as llm:
        messages = [*restore(llm, session, system), {"role": "user", "content": question}]
        with contextlib.closing(
            run(lambda cancel: llm.chat(messages, stream=True, cancel=cancel, **answer.arguments()))
        ) as stream:
            for chunk in stream:
                chunks.append(chunk)
                print_text(chunk.text)
        text = "".join(chunk.text for chunk in chunks)
        end_line(text)
        save(llm, session, [*messages, {"role": "assistant", "content": text}])
    if is_verbose():
        click.echo(status_line(chunks[-1]), err=True)
    if chunks[-1].finish_reason == "cancelled":
        raise KeyboardInterrupt
