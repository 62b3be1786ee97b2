"""The Python side of the team (kernels/team.py draws it): threads that wait for passes, woken and put to sleep."""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import os
import threading
import weakref
from collections.abc import Collection, Mapping

import numpy as np

from smolrun.errors import ModelClosed
from smolrun.kernels.block import LINE, MAX_THREADS, TEAM_BYTES, T
from smolrun.kernels.load import c_function


def give_way() -> int:
    """Address of the system's function that gives the core to another thread."""
    if os.name == "nt":
        return ctypes.cast(ctypes.WinDLL("kernel32").SwitchToThread, ctypes.c_void_p).value or 0  # type: ignore[attr-defined]
    return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0


class _State:
    """What the workers share; it outlives the Team while one of them still runs."""

    def __init__(self, kernels: Mapping[str, int], threads: int, cpus: Collection[int]) -> None:
        self.cpus = cpus
        self.buffer = np.zeros(TEAM_BYTES + LINE, np.uint8)
        self.address = -(-self.buffer.ctypes.data // LINE) * LINE
        first = self.address - self.buffer.ctypes.data
        self.words = self.buffer[first : first + TEAM_BYTES].view(np.int64)
        self.words[T.threads // 8] = threads
        self.words[T.give_way // 8] = give_way()
        self.loop = c_function(kernels["worker_loop"], 3, ctypes.c_int64)
        self.rouse = c_function(kernels["team_rouse"], 3, ctypes.c_int64)
        self.run = c_function(kernels["team_run"], 3, ctypes.c_int64)
        self.passes = threading.RLock()  # held during a pass: the workers end between two
        self.locks = [_thread.allocate_lock() for _ in range(threads)]
        self.closing = False
        self.pid = os.getpid()
        for lock in self.locks:
            lock.acquire()
        self.workers = [
            threading.Thread(target=_work, args=(self, tid), name=f"smolrun-{tid}", daemon=True)
            for tid in range(1, threads)
        ]
        for worker in self.workers:
            worker.start()

    def wake(self, tid: int) -> None:
        """Let a worker go on if it sleeps. Its lock may be open already: woken once more than it slept, it goes on."""
        if self.words[(T.asleep + tid * LINE) // 8] and self.locks[tid].locked():
            self.locks[tid].release()


def _work(state: _State, tid: int) -> None:
    seen = 0
    if state.cpus and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):  # a core that was taken offline since: the system chooses
            os.sched_setaffinity(0, state.cpus)  # of this thread alone
    while True:
        seen = state.loop(state.address, tid, seen)
        if state.closing:
            return
        state.locks[tid].acquire()
        state.words[(T.asleep + tid * LINE) // 8] = 0
        if state.closing:
            return


def _shut(state: _State) -> None:
    if state.pid != os.getpid():  # the threads stayed in the parent
        return
    state.closing = True
    state.words[T.cancel // 8] = 1  # a pass of another thread (a daemon's, at exit) ends at its next wait
    with state.passes:
        for tid, worker in enumerate(state.workers, 1):
            while worker.is_alive() and worker is not threading.current_thread():  # a worker may collect the garbage
                state.wake(tid)
                worker.join(0.001)


class Team:
    """Runs passes on `threads` threads, the caller's among them. Not for concurrent callers; models that take turns (a
    draft and the model it guesses for) may share one, else the threads of one spin while the other's compute."""

    def __init__(self, kernels: Mapping[str, int], threads: int, cpus: Collection[int] = ()) -> None:
        """cpus: those the workers stay on; none: any. The caller's thread is the application's and is not moved."""
        if not 1 <= threads <= MAX_THREADS:
            raise ValueError(f"threads must be 1..{MAX_THREADS}, not {threads}")
        self._kernels, self.threads, self._cpus = dict(kernels), threads, cpus
        self._start()

    def _start(self) -> None:
        self._state = _State(self._kernels, self.threads, self._cpus)
        self._finalizer = weakref.finalize(self, _shut, self._state)

    @property
    def address(self) -> int:
        """Address of the team's words. A forked child has no workers: there a new team is made first."""
        if self._state.pid != os.getpid():
            self._finalizer.detach()
            self._start()
        return int(self._state.address)

    def run(self, job: int, block: int) -> bool:
        """Run a job (the address of a kernel) on a block; False when it was cancelled.

        Raises:
            ModelClosed: the workers have ended.
        """
        state = self._state
        with state.passes:
            try:
                if self.threads > 1 and state.rouse(state.address, 0, 0):
                    for tid in range(1, self.threads):
                        state.wake(tid)
                if state.closing:
                    raise ModelClosed("the model is closed: load it again")
                state.run(state.address, job, block)
            finally:
                state.words[T.awake // 8] = 0
            return not state.words[T.cancel // 8]

    def cancel(self, wish: bool = True) -> None:
        """Make a running pass end at its next wait; `cancel(False)` takes it back."""
        self._state.words[T.cancel // 8] = wish

    def close(self) -> None:
        """End the workers."""
        self._finalizer()
