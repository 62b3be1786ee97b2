"""`smolrun generate`: a prompt continued, as text or as JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import IO, TYPE_CHECKING

import click

from smolrun.cli.options import (
    AnswerOptions,
    LoadOptions,
    answer_options,
    decode,
    is_verbose,
    load_options,
    read_stdin,
    verbose_option,
)
from smolrun.cli.running import end_line, print_text, run
from smolrun.cli.status import as_dict, status_line

if TYPE_CHECKING:
    from smolrun import Chunk


@click.command("generate")
@click.argument("prompt", required=False)
@click.option("-m", "--model", metavar="MODEL", help="Model to run (see `smolrun --help`).")
@click.option("-f", "--file", type=click.File("rb"), help="Read the prompt from a file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: text, tokens, log-probabilities, timings.")
@answer_options()
@load_options()
@verbose_option
def command(
    prompt: str | None,
    model: str | None,
    file: IO[bytes] | None,
    as_json: bool,
    answer: AnswerOptions,
    load: LoadOptions,
) -> None:
    """Continue a prompt.

    It is PROMPT, a --file or standard input: plain text, no chat template. The last line end of a file or of standard
    input is not part of it.
    """
    if prompt is not None and file is not None:
        raise click.UsageError("a PROMPT and --file cannot both be given")
    if file is not None:
        prompt = decode(file.read(), file.name)
    elif prompt is None or prompt == "-":
        if sys.stdin.isatty():
            raise click.UsageError("no prompt: give PROMPT, --file or standard input")
        prompt = read_stdin()
    arguments = answer.arguments()
    chunks: list[Chunk] = []
    with (
        load.load(model) as llm,
        contextlib.closing(run(lambda cancel: llm.stream(prompt, cancel=cancel, **arguments))) as stream,
    ):
        for chunk in stream:
            chunks.append(chunk)
            if not as_json:
                print_text(chunk.text)
    if as_json:
        click.echo(json.dumps({"prompt": prompt, **as_dict(chunks)}, ensure_ascii=False))
    else:
        end_line("".join(chunk.text for chunk in chunks))
    if is_verbose():
        click.echo(status_line(chunks[-1]), err=True)
    if chunks[-1].finish_reason == "cancelled":
        raise KeyboardInterrupt
