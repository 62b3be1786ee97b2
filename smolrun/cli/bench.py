"""`smolrun bench`: speed, by smolrun.bench."""

from __future__ import annotations

from typing import IO, Any

import click

from smolrun.cli.options import LoadOptions, load_options, verbose_option


def _numbers(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """`512` or `128,512`, as llama-bench takes them."""
    try:
        return None if text is None else tuple(int(number) for number in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r}: whole numbers between commas expected", ctx, param) from None


@click.command("bench")
@click.argument("model", required=False)
@click.option("-p", "--prompt-sizes", callback=_numbers, metavar="N,N", help="Prompts to prefill (pp512).")
@click.option("-n", "--decode-sizes", callback=_numbers, metavar="N,N", help="Answers to decode (tg128).")
@click.option("-d", "--depths", callback=_numbers, metavar="N,N", help="Tokens already in the context (@ d4096).")
@click.option(
    "-b", "--batch", "batches", callback=_numbers, metavar="N,N", help="Sequences decoded at once (tg128 x8)."
)
@click.option("-t", "--threads", callback=_numbers, metavar="N,N", help="Thread counts.")
@click.option("-r", "--repeats", type=int, metavar="N", help="Samples of each figure.")
@click.option("--compare", type=click.Choice(["llama.cpp"]), help="Measure this on the same file in turns.")
@click.option("--format", "shape", type=click.Choice(["table", "json", "csv"]), default="table", show_default=True)
@click.option("-o", "--output", type=click.File("w", encoding="utf-8"), default="-", help="File to write.")
@load_options("context", "threads", "speculate", "draft")
@verbose_option
def command(model: str | None, shape: str, output: IO[str], load: LoadOptions, **given: object) -> None:
    """Measure speed.

    Prefill and decode: median, spread, bandwidth, memory, first-token time; with a hash of the logits.
    """
    from smolrun.bench import run

    measures: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    report = run(load.path(model), **measures, **load.settings, progress=lambda line: click.echo(line, err=True))
    text = {"table": report.table, "json": report.to_json, "csv": report.to_csv}[shape]()
    click.echo(text, file=output)
