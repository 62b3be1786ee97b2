"""`smolrun chat --session FILE`: the dialogue and its keys and values, kept between two runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from smolrun.errors import OptionError

if TYPE_CHECKING:
    from smolrun import LLM

Message = dict[str, str]


def restore(llm: LLM, path: Path | None, system: str | None) -> list[Message]:
    """The dialogue to go on with: that of the file if it exists, else a new one. A --system of its own comes first.

    Raises:
        SessionError: the file is damaged, or of another model.
        OptionError: it holds no dialogue, or its folder cannot be written: told before an answer is lost.
    """
    if path is not None and not os.access(path.parent, os.W_OK):
        raise OptionError(f"{path}: the session cannot be written, {path.parent} is no folder of ours")
    messages: list[Message] = []
    if path is not None and path.exists():
        found = llm.load_session(path).messages
        if found is None:
            raise OptionError(f"{path}: the session of a plain prompt, one of a dialogue expected")
        messages = found
        click.echo(f"(session {path}: {len(messages)} messages)", err=True)
    if system is not None:
        has = bool(messages) and messages[0]["role"] == "system"
        messages = [{"role": "system", "content": system}, *messages[has:]]
    return messages


def save(llm: LLM, path: Path | None, messages: list[Message]) -> None:
    """Keep a dialogue, if that is wanted and anything was said."""
    if path is not None and messages:
        llm.save_session(path, messages)
