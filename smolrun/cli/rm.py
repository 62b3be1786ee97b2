"""`smolrun rm`: delete downloaded models."""

from __future__ import annotations

import sys

import click

from smolrun.cli.options import verbose_option
from smolrun.cli.table import size


@click.command("rm")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@verbose_option
def command(models: tuple[str, ...], yes: bool) -> None:
    """Delete downloaded models.

    MODEL is a repository, one of its @revisions, or one :file.gguf. The cache is shared with other programs that use
    the Hub, so a terminal is asked first.
    """
    from smolrun.files import sources

    for model in models:
        if not yes and sys.stdin.isatty():
            click.confirm(f"delete {model} from the Hub cache?", abort=True, err=True)
        click.echo(f"{model}: {size(sources.remove(model))} freed")
