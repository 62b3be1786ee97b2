"""`smolrun verify`: the precision contract, by smolrun.verify."""

from __future__ import annotations

from typing import Any

import click

from smolrun.cli.options import ADAPTER, LoadOptions, load_options, verbose_option


@click.command("verify")
@click.argument("model", required=False)
@click.option("--text", "text_file", type=click.Path(exists=True, dir_okay=False), help="Text to score.")
@click.option("--max-tokens", type=int, metavar="N", help="Tokens of the text at most.")
@click.option("--window", type=int, metavar="N", help="Tokens of each independent run.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@load_options("context", "quantize", "speculate", "draft", *ADAPTER)
@verbose_option
def command(model: str | None, as_json: bool, load: LoadOptions, **given: object) -> None:
    """Check the precision contract.

    Compares smolrun and llama.cpp with the exact weights of MODEL, a GGUF file. Exit code 1 if the contract is broken.
    """
    from smolrun.verify import run

    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    report = run(load.path(model), **chosen, **load.settings, progress=lambda line: click.echo(line, err=True))
    click.echo(report.to_json() if as_json else report.table())
    click.get_current_context().exit(0 if report.ok else 1)
