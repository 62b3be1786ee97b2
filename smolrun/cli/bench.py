"""`smolrun bench`: speed, by smolrun.bench and smolrun.measure."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from smolrun.cli.options import ADAPTER, LoadOptions, load_options, verbose_option
from smolrun.errors import OptionError
from smolrun.files.whole import whole


def _numbers(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """`512` or `128,512`, as llama-bench takes them."""
    try:
        return None if text is None else tuple(int(number) for number in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r}: whole numbers between commas expected", ctx, param) from None


OUTPUT = click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write.")


@contextlib.contextmanager
def _sink(path: Path | None) -> Iterator[Callable[[str], object]]:
    """Where a report goes; what cannot be written is told before anything is measured."""
    if path is None or path == Path("-"):
        yield click.echo
        return
    with open(path, "wb") if path.exists() and not path.is_file() else whole(path) as file:
        yield lambda text: file.write(f"{text}\n".encode(errors="replace"))


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
@OUTPUT
@load_options("context", "threads", *ADAPTER)
@verbose_option
def run(
    model: str | None, sustained: float | None, shape: str, output: Path | None, load: LoadOptions, **given: object
) -> None:
    """Measure speed.

    Prefill and decode: median, spread, bandwidth, memory, first-token time; with a hash of the logits. With --speculate
    or --draft: answers to real prompts with and without guesses, side by side. With --sustained: one long decode.

    `smolrun bench compare A.json B.json` puts results of --format json side by side.
    """
    path, settings = load.path(model), dict(load.settings)
    measures: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    guess = {name: settings.pop(name) for name in ("speculate", "draft") if name in settings}
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
    settings |= {**measures, "progress": lambda line: click.echo(line, err=True)}
    with _sink(output) as write:
        report: Any
        if guess:
            from smolrun.measure.speculation import run as guessing

            if "draft" in guess:
                guess["draft"] = load.path(guess["draft"])
            report = guessing(path, **guess, **settings)
        elif sustained is not None:
            from smolrun.measure.sustained import run as sustain

            report = sustain(path, duration=sustained, **settings)
        else:
            from smolrun.bench import run as speed

            report = speed(path, **settings)
        if shape in ("html", "svg"):
            from smolrun.measure import results

            found = [results.parse(path.stem, report.to_json())]
            write(results.html(found) if shape == "html" else results.svg(found))
        else:
            write({"table": report.table, "json": report.to_json, "csv": report.to_csv}[shape]())


@command.command("compare")
@click.argument(
    "files",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="A.json B.json",
)
@click.option("--format", "shape", type=click.Choice(["table", "html", "svg"]), default="table", show_default=True)
@OUTPUT
def compare(files: tuple[Path, ...], shape: str, output: Path | None) -> None:
    """Put results side by side.

    Files of `smolrun bench --format json -o FILE`, of several devices or versions; ratios are to the first.
    """
    from smolrun.measure import results

    found = results.read(files)
    with _sink(output) as write:
        write({"table": results.table, "html": results.html, "svg": results.svg}[shape](found))
