"""Whose turn it is: one caller computes at a time, the others wait in the order they came.

A caller between two tokens *rests*: a stream whose reader is busy, or was forgotten without being closed. Were the turn
a plain lock, that stream would block everybody for ever, its own thread included. So when someone waits, a rest longer
than `patience` ends the turn: the holder gives way, and queues up again should it ever want to go on.
"""

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol

from smolrun.errors import ModelClosed, OptionError

_SLICE_SECONDS = 0.05  # how often the first in the queue looks at the holder, and any waiter at its cancel event
_INTERRUPT_SECONDS = 0.005  # how often a closing model tells the running pass to end


class Holder(Protocol):
    """Who has a turn."""

    def give_way(self) -> None:
        """Gives back what must not be held while another computes. Never called while the holder computes, perhaps by
        another thread, perhaps twice."""


class Cancel(Protocol):
    """Anything with `is_set`: a threading.Event, say."""

    def is_set(self) -> bool: ...


class Turns:
    """A queue of callers, for any thread.

    A fork of the process starts with an empty queue. If another thread was computing when it was forked, the model is
    in an unknown state there and `take` refuses.
    """

    def __init__(self, patience: float = 0.25) -> None:
        """`patience`: seconds a holder may rest while others wait."""
        self._patience = patience
        self._holder: Holder | None = None
        self._thread = 0  # the holder's, while it computes
        self._resting = False
        self._rests = 0  # so that one long rest differs from many short ones
        self._closed = False
        self._torn = False
        self._empty()
        if hasattr(os, "register_at_fork"):
            forked = weakref.WeakMethod(self._forked)
            os.register_at_fork(after_in_child=lambda: (method := forked()) and method())

    def _empty(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Holder] = deque()

    def _forked(self) -> None:
        self._torn |= self._holder is not None and not self._resting and not self._computes_here()
        self._empty()  # the old lock may be held by a thread that is not in this process

    @property
    def closed(self) -> bool:
        """`close` was called."""
        return self._closed

    def take(self, who: Holder, cancel: Cancel | None = None) -> bool:
        """Waits until it is the turn of `who`, or goes on with it after a rest. False: `cancel` was set meanwhile.

        Raises:
            ModelClosed: the queue is closed, or was torn by a fork.
            OptionError: the caller computes already (it is in a progress callback) and would wait for itself.
        """
        with self._changed:
            self._check_open()
            if self._holder is not who:
                if self._computes_here():
                    raise OptionError(
                        "a model was asked for an answer by its own progress callback: ask after the answer"
                    )
                self._waiting.append(who)
                try:
                    if not self._wait(who, cancel):
                        return False
                    self._holder = who
                finally:
                    self._waiting.remove(who)
                    self._changed.notify_all()
            self._resting, self._thread = False, threading.get_ident()
            return True

    def rest(self, who: Holder) -> None:
        """`who` stops computing, but wants to go on soon."""
        with self._changed:
            if self._holder is who:
                self._resting = True
                self._rests += 1

    def leave(self, who: Holder) -> bool:
        """`who` gives way for good; harmless if it has no turn. True: it was the last one, the queue is closed."""
        with self._changed:
            if self._holder is not who:
                return False
            who.give_way()
            self._holder = None
            self._changed.notify_all()
            return self._closed

    def close(self, interrupt: Callable[[], None]) -> bool:
        """Refuses all further turns; calls `interrupt` until the holder has left. True: nobody computes any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while not self._torn and (holder := self._holder) is not None:
                if self._resting:
                    holder.give_way()
                    self._holder = None
                elif self._computes_here():
                    return False
                else:
                    interrupt()
                    self._changed.wait(_INTERRUPT_SECONDS)
        return True

    def _wait(self, who: Holder, cancel: Cancel | None) -> bool:
        """Until `who` is first and nobody holds the turn; False if cancelled."""
        rested, rest = 0.0, -1
        while True:
            self._check_open()
            if cancel is not None and cancel.is_set():
                return False
            first = self._waiting[0] is who
            holder = self._holder
            if first and holder is None:
                return True
            if not self._resting or self._rests != rest:
                rested, rest = 0.0, self._rests
            elif first and holder is not None and rested >= self._patience:
                holder.give_way()
                return True
            if not self._changed.wait(_SLICE_SECONDS if first or cancel is not None else None):
                rested += _SLICE_SECONDS

    def _computes_here(self) -> bool:
        return self._holder is not None and not self._resting and self._thread == threading.get_ident()

    def _check_open(self) -> None:
        if self._closed:
            raise ModelClosed("the model is closed: load it again")
        if self._torn:
            raise ModelClosed(
                "this process was forked while another thread computed, so the model is in an unknown state here: "
                "fork while it rests, or load the model again"
            )
