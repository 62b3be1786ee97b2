"""`smolrun bench`: speed, by smolrun.bench and smolrun.measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

import click

from smolrun.cli.options import ADAPTER, LoadOptions, load_options, verbose_option
from smolrun.errors import OptionError


def _numbers(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """`512` or `128,512`, as llama-bench takes them."""
    try:
        return None if text is None else tuple(int(number) for number in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r}: whole numbers between commas expected", ctx, param) from None


class _Bench(click.Group):
    """`smolrun bench [MODEL]` measures; `smolrun bench compare FILE FILE` compares."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args[:1] == ["compare"] else ["run", *args])


command = _Bench("bench", help="Measure speed.")


@command.command("run")
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
@click.option("--sustained", type=float, metavar="SECONDS", help="Decode so long: heat, clock, energy.")
@click.option(
    "--format", "shape", type=click.Choice(["table", "json", "csv", "html", "svg"]), default="table", show_default=True
)
@click.option("-o", "--output", type=click.File("w", encoding="utf-8"), default="-", help="File to write.")
@load_options("context", "threads", *ADAPTER)
@verbose_option
def run(
    model: str | None, sustained: float | None, shape: str, output: IO[str], load: LoadOptions, **given: object
) -> None:
    """Measure speed.

    Prefill and decode: median, spread, bandwidth, memory, first-token time; with a hash of the logits. With --speculate
    or --draft: answers to real prompts with and without guesses, in turns. With --sustained: one long decode.

    `smolrun bench compare A.json B.json` puts results of --format json side by side.
    """
    path, settings = load.path(model), dict(load.settings)
    measures: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    guess = {name: settings.pop(name) for name in ("speculate", "draft") if name in settings}
    report: Any
    if guess or sustained is not None:
        if guess and sustained is not None:
            raise OptionError("--sustained and guesses are measured apart")
        allowed = {"threads", "repeats"} if guess else {"threads"}
        if unknown := sorted(measures.keys() - allowed):
            raise OptionError(f"{', '.join(unknown)}: not with {'guesses' if guess else '--sustained'}")
        if "threads" in measures:
            (*more, measures["threads"]) = measures["threads"]
            if more:
                raise OptionError("one thread count expected here")
    say: dict[str, Any] = {"progress": lambda line: click.echo(line, err=True)}
    if guess:
        from smolrun.measure.speculation import run as guessing

        if "draft" in guess:
            guess["draft"] = load.path(guess["draft"])
        report = guessing(path, **guess, **measures, **settings, **say)
    elif sustained is not None:
        from smolrun.measure.sustained import run as sustain

        report = sustain(path, duration=sustained, **measures, **settings, **say)
    else:
        from smolrun.bench import run as speed

        report = speed(path, **measures, **settings, **say)
    if shape in ("html", "svg"):
        from smolrun.measure import results

        found = [results.Result(path.stem, json.loads(report.to_json()))]
        text = results.html(found) if shape == "html" else results.svg(found)
    else:
        text = {"table": report.table, "json": report.to_json, "csv": report.to_csv}[shape]()
    click.echo(text, file=output)


@command.command("compare")
@click.argument(
    "files",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="A.json B.json",
)
@click.option("--format", "shape", type=click.Choice(["table", "html", "svg"]), default="table", show_default=True)
@click.option("-o", "--output", type=click.File("w", encoding="utf-8"), default="-", help="File to write.")
def compare(files: tuple[Path, ...], shape: str, output: IO[str]) -> None:
    """Put results side by side.

    Files of `smolrun bench --format json -o FILE`, of several devices or versions; ratios are to the first.
    """
    from smolrun.measure import results

    found = [results.read(path) for path in files]
    click.echo({"table": results.table, "html": results.html, "svg": results.svg}[shape](found), file=output)
