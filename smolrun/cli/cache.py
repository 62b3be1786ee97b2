"""`smolrun cache`: what smolrun keeps on this disk to start quickly, and how to be rid of it."""

from __future__ import annotations

import contextlib
import json
import shutil
from datetime import datetime
from pathlib import Path

import click

from smolrun.cli.options import verbose_option
from smolrun.cli.table import columns, size


@click.group("cache", invoke_without_command=True)
@verbose_option
@click.pass_context
def command(ctx: click.Context) -> None:
    """Show what is kept for quick starts: compiled kernels, packed models (weights, tokenizer), documents as ids (of
    `smolrun train`).

    `smolrun cache clear` deletes it; all of it is made again when it is needed. SMOLRUN_CACHE_DIR moves it,
    SMOLRUN_CACHE_SIZE bounds the packed models.
    """
    if ctx.invoked_subcommand is not None:
        return
    from smolrun.kernels.load import MODULES, fingerprint, user_cache
    from smolrun.model import packed

    current = {fingerprint(module) for module in {*MODULES.values(), "pointwise"}}
    kernels = dict[str, tuple[int, float]]()
    for folder in _folders("kernels"):
        made_from, _, tier = folder.name.partition("-")
        state = tier if made_from in current else f"{tier}, of another version"
        count, used = kernels.get(state, (0, 0.0))
        kernels[state] = count + _bytes(folder), max(used, _used(folder))
    rows = [("kernels", count, used, state) for state, (count, used) in kernels.items()]
    for entry in packed.entries():
        rows.append(("weights", entry.bytes, entry.used, entry.model or "a fragment"))
    rows += [("documents", _bytes(folder), _used(folder), _read_from(folder)) for folder in _folders("tokens")]
    total = sum(row[1] for row in rows)
    click.echo(f"{user_cache()}: {size(total)}, weights at most {size(packed.limit())}", err=True)
    if rows:
        table = [(what, size(count), _day(used), name) for what, count, used, name in rows]
        click.echo(columns([("WHAT", "SIZE", "LAST USE", "FOR"), *table]))


@command.command("clear")
@click.option("--kernels", is_flag=True, help="Only the compiled kernels.")
@click.option("--weights", is_flag=True, help="Only the packed weights.")
@click.option("--documents", is_flag=True, help="Only the documents of `smolrun train`.")
def clear(kernels: bool, weights: bool, documents: bool) -> None:
    """Delete compiled kernels, packed weights and documents; running processes go on."""
    from smolrun.model import packed

    everything = not (kernels or weights or documents)
    freed = 0
    for name, wanted in (("kernels", kernels), ("tokens", documents)):
        for folder in _folders(name) if wanted or everything else ():
            before = _bytes(folder)
            shutil.rmtree(folder, ignore_errors=True)  # another process may write into it, or delete it too
            if left := _bytes(folder):
                click.echo(f"{folder}: {size(left)} could not be deleted", err=True)
            freed += before - left
    if weights or everything:
        for entry in packed.entries():
            freed += entry.bytes
            entry.path.unlink(missing_ok=True)
    click.echo(f"{size(freed)} freed")


def _folders(name: str) -> list[Path]:
    from smolrun.kernels.load import user_cache

    folder = user_cache() / name
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _read_from(folder: Path) -> str:
    """The data file whose documents a folder holds."""
    try:
        return str(json.loads((folder / "about.json").read_text(encoding="utf-8"))["file"])
    except (OSError, ValueError, KeyError):
        return "a fragment"


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):  # other processes write and delete here
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _used(folder: Path) -> float:
    with contextlib.suppress(OSError):
        return folder.stat().st_mtime
    return 0.0


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M") if seconds else ""
