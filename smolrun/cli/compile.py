"""`smolrun compile`: a model as a folder for a device without a compiler, by smolrun.compile."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from smolrun.cli import progress
from smolrun.cli.options import ADAPTER, LoadOptions, load_options, verbose_option
from smolrun.cli.table import size


def _list(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for text in texts for name in text.split(",") if name)


@click.command("compile")
@click.argument("model", required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The folder; an old bundle goes.")
@click.option("--target", required=True, help="x86_64-linux-gnu, aarch64-linux-gnu, aarch64-linux-android ...")
@click.option(
    "--cpu", "cpus", multiple=True, callback=_list, metavar="NAME,NAME", help="Only for these [all of the target]."
)
@click.option("--features", multiple=True, callback=_list, metavar="NAME,NAME", help="And what they have besides.")
@click.option("--kv", multiple=True, metavar="KIND", help="Attention cache it can be run with; repeatable [f16, q8_0].")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@load_options("context", "threads", "kv", "precision", "speculate", "draft", "force", *ADAPTER)
@verbose_option
def command(
    model: str | None,
    output: Path,
    target: str,
    cpus: tuple[str, ...],
    features: tuple[str, ...],
    kv: tuple[str, ...],
    as_json: bool,
    load: LoadOptions,
) -> None:
    """Make a folder that runs MODEL on a device with Python and NumPy alone.

    There: `python FOLDER chat`. Kernels are compiled here, for each kind of CPU that the device may have.
    """
    from smolrun.compile import KV, compile_model
    from smolrun.kernels.link import C_IS_FOR

    path, chosen = load.path(model), {**load.settings, **progress.loading()}
    made = compile_model(path, output, target=target, cpus=cpus, features=features, kv=kv or KV, **chosen)
    if as_json:
        click.echo(json.dumps({"path": str(made.path), "tiers": made.tiers, "bytes": made.bytes, "c": made.c}))
        return
    click.echo(f"{output}: {size(made.bytes)}, for {target} ({', '.join(made.tiers)})")
    if not made.c:
        click.echo(f"without the C interface: {C_IS_FOR}")
    click.echo(f"copy the folder to the device and run: python3 {shlex.quote(made.path.name)} chat")
