"""`smolrun info`: what a model is and what it needs, without loading its weights."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolrun.cli.options import ADAPTER, LoadOptions, load_options, verbose_option
from smolrun.cli.table import columns, size

if TYPE_CHECKING:
    from smolrun.files.checkpoint import Checkpoint


_PARTS = ("weights", "kv", "scratch", "process")


@click.command("info")
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@load_options("precision", "speculate", "draft", "force", *ADAPTER)
@verbose_option
def command(model: str | None, as_json: bool, load: LoadOptions) -> None:
    """Show what a model is and needs.

    Architecture, formats, sizes, licence, and the memory at a --context; the weights are not loaded.
    """
    from smolrun.files.checkpoint import open_checkpoint

    with open_checkpoint(load.path(model)) as checkpoint:
        facts = _facts(checkpoint, load.given)
    click.echo(json.dumps(facts, ensure_ascii=False) if as_json else _table(facts))


def _facts(checkpoint: Checkpoint, given: Any) -> dict[str, Any]:
    from smolrun.model import machine, memory
    from smolrun.model.packed import Pack
    from smolrun.model.weights import plan, sizes

    config = checkpoint.config
    context = given.get("context", config.max_positions)
    kv = given.get("kv", "f16")
    counts: Counter[str] = Counter()
    held: Counter[str] = Counter()
    parameters = 0
    for tensor in checkpoint.tensors.values():
        counts[tensor.format] += 1
        held[tensor.format] += tensor.nbytes
        parameters += math.prod(tensor.shape)
    matrices, pack = plan(checkpoint, given.get("quantize")), Pack.of(checkpoint, given.get("quantize"))
    shapes = [(matrix.format, matrix.rows, matrix.cols) for matrix in matrices.values()]
    threads = given.get("threads", machine.available_cores())
    memory.check_options(config, context, threads)
    needs, room = memory.estimate(config, shapes, context, kv, threads), machine.HERE.available()
    ways: list[str] = []
    if room is not None and needs.model > room.bytes:
        ways = list(memory.fitting(config, shapes, context, kv, threads, room.bytes))
    return {
        "name": config.name or checkpoint.path.stem,
        "path": str(checkpoint.path),
        "licence": config.licence or _card_licence(checkpoint.path) or None,
        "architecture": {
            name: getattr(config, name)
            for name in (
                *("n_layers", "dim", "hidden_dim", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "max_positions"),
                *("rope_theta", "norm_eps", "tied"),
            )
        },
        "parameters": parameters,
        "bytes": checkpoint.bytes_total,
        "formats": {name: {"tensors": counts[name], "bytes": held[name]} for name, _ in held.most_common()},
        "packed": f"packed in {checkpoint.path}" if checkpoint.packed else pack.state(sizes(checkpoint, matrices)),
        "chat_template": checkpoint.chat_template is not None,
        "memory": {"context": context, "kv_format": kv}
        | {name: getattr(needs, name) for name in (*_PARTS, "total")}
        | {
            "available": room.bytes if room else None,
            "available_says": room.source if room else None,
            "would_fit": ways,
        },
    }


def _table(facts: dict[str, Any]) -> str:
    a, memory = facts["architecture"], facts["memory"]
    parts = ", ".join(f"{name} {size(memory[name])}" for name in _PARTS)
    rows: list[tuple[str, str]] = [
        ("name", facts["name"]),
        ("path", facts["path"]),
        ("licence", facts["licence"] or "not stated in the files"),
        ("layers", f"{a['n_layers']} of width {a['dim']:,}, feed-forward {a['hidden_dim']:,}"),
        ("attention", f"{a['n_heads']} heads of {a['head_dim']}, {a['n_kv_heads']} for keys and values"),
        ("rope theta", f"{a['rope_theta']:,.0f}"),
        ("vocabulary", f"{a['vocab_size']:,}, head {'tied' if a['tied'] else 'untied'}"),
        ("context", f"{a['max_positions']:,}"),
        ("parameters", f"{facts['parameters']:,}"),
        ("weights", size(facts["bytes"])),
        *(
            (f"  {name}", f"{size(entry['bytes'])} in {entry['tensors']} tensors")
            for name, entry in facts["formats"].items()
        ),
        ("panels", facts["packed"]),
        ("chat", "yes" if facts["chat_template"] else "no template: a base model, use generate"),
        ("memory", f"{size(memory['total'])} at context {memory['context']:,}, {memory['kv_format']} ({parts})"),
    ]
    if memory["available"] is not None:
        rows.append(("available", f"{size(memory['available'])}: {memory['available_says']}"))
    if memory["would_fit"]:
        rows.append(("would fit", "; ".join(memory["would_fit"])))
    return columns(rows)


def _card_licence(path: Path) -> str:
    """The licence that a downloaded model card names between its first two lines of dashes."""
    try:
        card = (path / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
    head = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    found = re.search(r"^license:[ \t]*(\S+)", head[1], re.MULTILINE) if head else None
    return found[1] if found else ""
