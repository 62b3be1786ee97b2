"""An answer on its way: it works in a thread of its own, so Ctrl-C is heard at once, inside a long prefill too."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import click

Piece = TypeVar("Piece")
_POLL_SECONDS = 0.1  # Windows does not hear Ctrl-C while it waits


def run(start: Callable[[threading.Event], Iterator[Piece]]) -> Generator[Piece, None, None]:
    """Yield what `start(cancel)` yields.

    Ctrl-C sets `cancel`, so the answer ends with "cancelled"; a second one raises KeyboardInterrupt. Closing the
    generator cancels too, and waits.
    """
    cancel = threading.Event()
    chunks: SimpleQueue[Any] = SimpleQueue()

    def work() -> None:
        try:
            for chunk in start(cancel):
                chunks.put(chunk)
        except BaseException as error:
            chunks.put(error)
        finally:
            chunks.put(None)

    worker = threading.Thread(target=work, name="smolrun-answer", daemon=True)
    with _ctrl_c_sets(cancel):
        worker.start()
        try:
            while (chunk := _wait(chunks)) is not None:
                if isinstance(chunk, BaseException):
                    raise chunk
                yield chunk
        finally:
            cancel.set()
            worker.join()


def _wait(chunks: SimpleQueue[Any]) -> Any:
    while True:
        try:
            return chunks.get(timeout=_POLL_SECONDS)
        except Empty:
            continue


@contextmanager
def _ctrl_c_sets(cancel: threading.Event) -> Iterator[None]:
    def stop(*_: object) -> None:
        cancel.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def print_text(text: str) -> None:
    """Show a piece of an answer at once."""
    click.echo(text, nl=False)


def end_line(text: str) -> None:
    """Finish the answer's last line."""
    if not text.endswith("\n"):
        click.echo()
