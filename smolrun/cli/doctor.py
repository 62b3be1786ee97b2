"""`smolrun doctor`: what this machine is to smolrun, and what is amiss, by smolrun.doctor."""

from __future__ import annotations

import dataclasses
import json
import shutil
import textwrap
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from smolrun.cli.options import ADAPTER, LoadOptions, load_options, verbose_option
from smolrun.cli.table import size

if TYPE_CHECKING:
    from smolrun.doctor import Report


@click.command("doctor")
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@load_options("context", "threads", "quantize", "kv", "precision", "speculate", "draft", "force", *ADAPTER)
@verbose_option
def command(model: str | None, as_json: bool, load: LoadOptions) -> None:
    """Examine this machine.

    CPU and kernels, threads, memory, caches, packages; what is amiss, and the command that mends it. Exit code 1 if
    something keeps smolrun from running.
    """
    from smolrun.doctor import examine

    report = examine(model=load.path(model) if model else None)
    click.echo(json.dumps(dataclasses.asdict(report), ensure_ascii=False) if as_json else _table(report))
    click.get_current_context().exit(0 if report.ok else 1)


_NAME = 16  # columns
_WHOLE: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}  # a path can be copied
_SAYS: dict[str, Callable[[Any], str]] = {
    "available": size,
    "compiled": lambda found: f"{found['count']} kernels of this version, {size(found['bytes'])}",
    "weights": lambda found: (
        f"{found['count']} file{'s' * (found['count'] != 1)}, {size(found['bytes'])}"
        + ("" if found["limit"] is None else f" of at most {size(found['limit'])}")
    ),
    "needs": lambda found: f"{size(found['bytes'])} with a context of {found['context']:,}",
    "temperature": lambda found: f"{found:.0f} degrees Celsius",
    "hertz": lambda found: f"{found / 1e9:.2f} GHz now",
}


def _table(report: Report) -> str:
    width = max(min(shutil.get_terminal_size().columns, 110), 50)
    lines = []
    for section, facts in report.facts.items():
        lines.append(click.style(section, bold=True))
        for name, value in facts.items():
            indent = " " * (_NAME + 4)
            head = f"  {name.replace('_', ' '):{_NAME}}  "
            texts = [textwrap.wrap(part, width - len(indent), **_WHOLE) or [""] for part in _say(name, value)]
            rows = [row for text in texts for row in text]
            lines += [head + rows[0], *(indent + row for row in rows[1:])]
    lines.append("")
    if not report.findings:
        lines.append(click.style("nothing amiss", fg="green", bold=True))
    for finding in report.findings:
        sign, colour = ("x", "red") if finding.error else ("!", "yellow")
        rows = textwrap.wrap(finding.problem, width - 2, **_WHOLE)
        lines += [click.style(sign, fg=colour, bold=True) + " " + rows[0], *(f"  {row}" for row in rows[1:])]
        if finding.mend:
            lines.append(click.style(f"  -> {finding.mend}", bold=True))
    return "\n".join(lines)


def _say(name: str, value: Any) -> list[str]:
    """A fact in words, a line for each part."""
    if value is None:
        return ["not known" if name == "available" else "missing"]
    if name in _SAYS:
        return [_SAYS[name](value)]
    if isinstance(value, Mapping):
        return [f"{key}: {', '.join(part) if isinstance(part, list) else part}" for key, part in value.items()]
    return [", ".join(map(str, value)) if isinstance(value, list) else str(value)]
