"""`smolrun pull`: download models, or bring them up to date."""

from __future__ import annotations

import click

from smolrun.cli.options import verbose_option


@click.command("pull")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@verbose_option
def command(models: tuple[str, ...]) -> None:
    """Download models from the Hub. An interrupted download continues."""
    from smolrun.files import sources

    for model in models:
        click.echo(sources.pull(model, progress=True))
