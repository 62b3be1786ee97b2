"""What a person types: editing and history by the standard library's readline, and messages of several lines."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import click

HISTORY_LINES = 1000
_QUOTES = '"""'


class Lines:
    """Reads messages from a terminal. History is kept in $XDG_STATE_HOME/smolrun/history where that can be written."""

    def __init__(self) -> None:
        try:
            import readline
        except ImportError:  # Windows, some minimal builds: the terminal's own line editing stays
            self._readline = None
            return
        self._readline = readline
        readline.set_history_length(HISTORY_LINES)
        with contextlib.suppress(OSError):
            readline.read_history_file(_history())

    def read(self) -> str:
        """One message.

        Raises:
            EOFError: Ctrl-D on an empty message.
            KeyboardInterrupt: Ctrl-C, or Ctrl-D inside a message of several lines: what was typed is dropped.
        """
        text = self._line("> ")
        if text.lstrip().startswith(_QUOTES):
            text = text.lstrip().removeprefix(_QUOTES)
            while _QUOTES not in text:
                text += "\n" + self._more()
            return text.partition(_QUOTES)[0].strip("\n")
        while text.endswith("\\"):
            text = text[:-1] + "\n" + self._more()
        return text

    def ask(self, question: str) -> bool:
        """A yes-or-no question; Enter is yes, Ctrl-C and Ctrl-D are no."""
        try:
            return self._line(f"{question} [Y/n] ").strip().lower() in ("", "y", "yes")
        except (EOFError, KeyboardInterrupt):
            click.echo(err=True)
            return False

    def save_history(self) -> None:
        """Write the history file; a home that cannot be written is no error."""
        if self._readline is None:
            return
        with contextlib.suppress(OSError):
            path = _history()
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT, 0o600))
            self._readline.write_history_file(path)

    def _more(self) -> str:
        try:
            return self._line(". ")
        except EOFError:
            raise KeyboardInterrupt from None

    def _line(self, prompt: str) -> str:
        if sys.stdout.isatty():
            return input(prompt)  # readline must know the prompt to redraw the line
        click.echo(prompt, nl=False, err=True)
        return input()


def _history() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "smolrun" / "history"
