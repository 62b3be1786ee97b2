"""Result files of `smolrun bench --format json`, of several devices, side by side; and reports of one or more of them.

A row is known by its test and thread count. The first file is what the others are held against. Devices that computed
the same ids must have the same hash of logits: that too is compared.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from smolrun.errors import OptionError
from smolrun.measure import chart

KINDS = ("speed", "sustained", "speculation")


@dataclass(frozen=True)
class Result:
    """A result file: what people call it, and what it holds."""

    label: str
    document: dict[str, Any]

    @property
    def rows(self) -> dict[tuple[str, int], dict[str, Any]]:
        """Rows by test and threads."""
        threads = self.document.get("threads", 0)
        return {(row["test"], row.get("threads", threads)): row for row in self.document["rows"]}


def read(paths: Sequence[Path]) -> list[Result]:
    """Result files, known by their names, or by their paths where names are the same.

    Raises:
        OptionError: a file that is none.
    """
    alike = len({path.stem for path in paths}) < len(paths)
    found = []
    for path in paths:
        try:
            found.append(parse(str(path.with_suffix("")) if alike else path.stem, path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise OptionError(f"{path}: no result of `smolrun bench --format json` ({error})") from error
    return found


def parse(label: str, text: str) -> Result:
    """A result from its JSON; of its texts remains what can be printed.

    Raises:
        ValueError: it is none.
    """
    try:
        document = _printable(json.loads(text))
        _check(document)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return Result(_printable(label), document)


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return "".join(c if c.isprintable() else "\ufffd" for c in value)
    if isinstance(value, dict):
        return {_printable(key): _printable(entry) for key, entry in value.items()}
    return [_printable(entry) for entry in value] if isinstance(value, list) else value


def _check(document: Any) -> None:
    """All that tables and pictures read is there and is what they expect.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is not.
    """
    kind, rows = document["kind"], document["rows"]
    texts = [document["model"], document["tier"], *document["device"].values(), *(row["test"] for row in rows)]
    speeds = [row["tokens_per_s"] for row in rows]
    numbers = [row.get("threads", document.get("threads", 0)) for row in rows]
    optional = [row.get(name) for row in rows for name in ("peer_tokens_per_s", "plain_tokens_per_s")]
    if kind == "sustained":
        samples = document["samples"]
        texts.append(document["energy"])
        speeds += [sample["tokens_per_s"] for sample in samples]
        numbers += [row[name] for row in rows for name in ("kept", "seconds")] + [sample["at"] for sample in samples]
        optional += [row["joules_per_token"] for row in rows]
        optional += [sample[name] for sample in samples for name in ("celsius", "hertz")]
    if kind not in KINDS or not speeds:
        raise ValueError(f"kind {kind!r:.40} with {len(speeds)} figures: one of {', '.join(KINDS)} expected")
    for value in texts:
        if not isinstance(value, str):
            raise ValueError(f"{value!r:.40} found, text expected")
    for value in [*speeds, *numbers, *(value for value in optional if value is not None)]:
        if isinstance(value, bool) or not 0 <= value < 1e15:
            raise ValueError(f"{value!r:.40} found, a number expected")
    if not all(speeds):
        raise ValueError("a speed of 0")


def table(results: Sequence[Result]) -> str:
    """For people: a column of tokens per second for each file, and its ratio to the first."""
    first = results[0]
    width = max(12, *(len(result.label) + 2 for result in results))
    lines = [f"{result.label}: {_where(result)}" for result in results]
    hashes = {r.label: found for r in results if (found := str(r.document.get("logits_hash", "")))}
    if len(hashes) > 1 and len({result.document["model"] for result in results}) == 1:
        lines.append("logits: " + ("the same bits" if len(set(hashes.values())) == 1 else f"DIFFERENT BITS: {hashes}"))
    tests = list(dict.fromkeys(key for result in results for key in result.rows))
    names = max(14, *(len(test) + 2 for test, _ in tests))
    lines.append(f"{'test':>{names}}{'threads':>8}" + "".join(f"{result.label:>{width}}{'':7}" for result in results))
    for test, threads in tests:
        line, base = f"{test:>{names}}{threads or '':>8}", first.rows.get((test, threads))
        for result in results:
            row = result.rows.get((test, threads))
            ratio = "" if row is None or base is None else f"{row['tokens_per_s'] / base['tokens_per_s']:.2f}x"
            line += f"{'' if row is None else format(row['tokens_per_s'], ',.1f'):>{width}}{ratio:>7}"
        lines.append(line.rstrip())
    for result in results:
        for row in result.rows.values():
            if result.document["kind"] == "sustained":
                line = f"{result.label}: {row['kept']:.0%} of the speed kept after {row['seconds']:.0f} s"
                if row["joules_per_token"] is not None:
                    line += f", {row['joules_per_token']:.3f} J a token ({result.document['energy']})"
                lines.append(line)
    return "\n".join(lines)


def _where(result: Result) -> str:
    device = result.document["device"]
    parts = (device.get("name"), device.get("cpu"), device.get("system"), f"tier {result.document['tier']}")
    return f"{result.document['model']} on " + ", ".join(filter(None, parts))


def svg(results: Sequence[Result]) -> str:
    """A picture: bars of tokens per second, and curves over time where a run was sustained."""
    panels: list[chart.Panel] = []
    bars = [result for result in results if result.document["kind"] != "sustained"]
    if bars:
        tests = list(dict.fromkeys(key for result in bars for key in result.rows))
        groups = []
        for test, threads in tests:
            values = {}
            for result in bars:
                row = result.rows.get((test, threads), {})
                values[result.label] = row.get("tokens_per_s")
                for other, name in (("peer_tokens_per_s", "llama.cpp"), ("plain_tokens_per_s", "no guesses")):
                    if row.get(other) is not None:
                        values[f"{result.label}, {name}" if len(bars) > 1 else name] = row[other]
            label = f"{test}, {threads} thread{'s' * (threads > 1)}" if threads else test
            groups.append((label, {name: value for name, value in values.items() if value is not None}))
        panels.append(chart.Bars("tokens per second", groups))
    runs = [result for result in results if result.document["kind"] == "sustained"]
    for name, field, factor in (
        ("tokens per second", "tokens_per_s", 1.0),
        ("degrees Celsius", "celsius", 1.0),
        ("GHz", "hertz", 1e-9),
    ):
        curves = {
            run.label: [(s["at"], s[field] * factor) for s in run.document["samples"] if s[field] is not None]
            for run in runs
        }
        if any(curves.values()):
            panels.append(chart.Curves(name, {label: points for label, points in curves.items() if points}))
    title = ", ".join(dict.fromkeys(str(result.document["model"]) for result in results))
    return chart.svg(title, panels)


def html(results: Sequence[Result]) -> str:
    """A page that needs nothing else: the picture, the table, and the files themselves."""
    files = "".join(
        f"<details><summary>{escape(result.label)}.json</summary>"
        f"<pre>{escape(json.dumps(result.document, indent=1))}</pre></details>"
        for result in results
    )
    title = "smolrun bench: " + ", ".join(result.label for result in results)
    style = "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    style += "pre{overflow-x:auto;background:#f5f5f5;padding:1em;font-size:13px}svg{max-width:100%;height:auto}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{style}</style></head>\n<body><h1>{escape(title)}</h1>\n{svg(results)}\n"
        f"<pre>{escape(table(results))}</pre>\n{files}</body></html>"
    )
