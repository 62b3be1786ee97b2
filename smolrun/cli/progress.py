"""One line on stderr that says what is being waited for; nothing at all when stderr is no terminal."""

from __future__ import annotations

import sys
from typing import Any

import click

_LONG_PROMPT = 1024  # shorter ones are read before a line about it could be
_SAYS = {
    "compile": "compiling kernels (once)",
    "load": "loading",
    "compiling": "compiling kernels",
    "packing": "packing the weights",
    "read": "reading",
    "calibrate": "calibrating, layer",
    "quantize": "writing tensor",
    "compare": "comparing, window",
    "tokenize": "reading documents, byte",
    "label": "reading labelled document",
    "score": "scoring document",
    "vocabulary": "training the tokenizer",
}


def loading() -> dict[str, Any]:
    """Keyword arguments for smolrun.load: its `progress`, if there is a terminal to show it."""
    return {"progress": _show} if sys.stderr.isatty() else {}


def reading() -> dict[str, Any]:
    """Keyword arguments for LLM.stream and LLM.chat: their `progress`, if there is a terminal to show it."""

    def show(done: int, total: int) -> None:
        if total >= _LONG_PROMPT:
            _show("read", done, total)

    return {"progress": show} if sys.stderr.isatty() else {}


def _show(stage: str, done: int, total: int) -> None:
    text = f"{_SAYS.get(stage, stage)} {done:,}/{total:,}" if done < total else ""
    click.echo(f"\r\x1b[K{text}", nl=False, err=True)
