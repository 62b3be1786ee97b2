"""`smolrun list`: the models on this disk."""

from __future__ import annotations

import json

import click

from smolrun.cli.options import verbose_option
from smolrun.cli.table import columns, size


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@verbose_option
def command(as_json: bool) -> None:
    """Show the models on this disk, by name."""
    from smolrun.files import sources

    models = sources.list_models()
    if as_json:
        fields = ("source", "path", "bytes", "complete")
        click.echo(json.dumps([{name: getattr(model, name) for name in fields} for model in models], default=str))
        return
    if not models:
        click.echo(f"no models here: `smolrun pull {sources.DEFAULT}` gets one", err=True)
        return
    rows = [(model.source, size(model.bytes), "" if model.complete else "incomplete", model.path) for model in models]
    click.echo(columns([("MODEL", "SIZE", "", "PATH"), *rows]))
