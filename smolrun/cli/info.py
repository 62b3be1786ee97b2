"""`smolrun info`: what a model is and what it needs, without loading its weights."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolrun.cli.options import LoadOptions, load_options, verbose_option
from smolrun.cli.table import columns, size

if TYPE_CHECKING:
    from smolrun.files.checkpoint import Checkpoint


@click.command("info")
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@load_options("quantize", "precision", "speculate", "draft")
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
    from smolrun.model import memory
    from smolrun.model.weights import kept, plan

    config = checkpoint.config
    context = given.get("context", config.max_positions)
    kv = given.get("kv", "f16")
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    parameters = 0
    for tensor in checkpoint.tensors.values():
        counts[tensor.format] += 1
        sizes[tensor.format] += tensor.nbytes
        parameters += math.prod(tensor.shape)
    matrices = [(tensor.format, *tensor.shape) for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2]
    needs = memory.estimate(config, matrices, context, kv, given.get("threads", os.cpu_count() or 1))
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
        "formats": {name: {"tensors": counts[name], "bytes": sizes[name]} for name, _ in sizes.most_common()},
        "packed": kept(checkpoint, plan(checkpoint, None)).state(),
        "chat_template": checkpoint.chat_template is not None,
        "memory": {"context": context, "kv_format": kv}
        | {name: getattr(needs, name) for name in ("weights", "kv", "scratch", "total")},
    }


def _table(facts: dict[str, Any]) -> str:
    a, memory = facts["architecture"], facts["memory"]
    parts = ", ".join(f"{name} {size(memory[name])}" for name in ("weights", "kv", "scratch"))
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
