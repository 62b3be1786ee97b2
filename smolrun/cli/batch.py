"""`smolrun batch`: many prompts in, many answers out, as lines of JSON."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

import click

from smolrun.cli.options import AnswerOptions, LoadOptions, answer_options, load_options, verbose_option
from smolrun.cli.running import run
from smolrun.cli.status import as_dict
from smolrun.errors import OptionError

if TYPE_CHECKING:
    from smolrun import Chunk


def _prompts(file: IO[bytes]) -> Iterator[Any]:
    """A prompt a line."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"line {number} of the prompts: JSON expected ({error})") from error
        if isinstance(prompt, dict):
            prompt = prompt.get("messages", prompt.get("prompt"))
        yield prompt


@click.command("batch")
@click.argument("file", type=click.File("rb"), default="-")
@click.option("-m", "--model", metavar="MODEL", help="Model to run (see `smolrun --help`).")
@click.option("--max-batch", type=int, metavar="N", help="Answers computed at once [8].")
@answer_options()
@load_options("speculate", "draft")  # guesses and batches do not combine
@verbose_option
def command(
    file: IO[bytes], model: str | None, max_batch: int | None, answer: AnswerOptions, load: LoadOptions
) -> None:
    """Answer every line of FILE, or of standard input.

    A line is a JSON string to continue, a list of chat messages, or an object with "prompt" or "messages". A line of
    output is one answer, in the order they end; "index" counts the prompts from 0. Exit code 1 if a prompt was refused.
    """
    arguments = answer.arguments() | ({"max_batch": max_batch} if max_batch is not None else {})
    prompts = list(_prompts(file))  # a broken line is told before any work
    parts: defaultdict[int, list[Chunk]] = defaultdict(list)
    reasons = set()
    with (
        load.load(model) as llm,
        contextlib.closing(run(lambda cancel: llm.batch(prompts, stream=True, cancel=cancel, **arguments))) as stream,
    ):
        for index, chunk in stream:
            parts[index].append(chunk)
            if chunk.finish_reason is not None:
                reasons.add(chunk.finish_reason)
                error = {"error": str(chunk.error)} if chunk.error is not None else {}
                line = {"index": index, **as_dict(parts.pop(index)), **error}
                click.echo(json.dumps(line, ensure_ascii=False))
    if "cancelled" in reasons:
        raise KeyboardInterrupt
    if "error" in reasons:
        click.get_current_context().exit(1)
