"""The team: threads that run one function together and meet at barriers.

Every thread calls the same pass(block, tid). A matrix's row groups are claimed through an atomic counter, so a thread
that the system has put aside costs its own claim and not half of the matrix; each output has one writer, so claims
never change bits.

    Python thread 0            worker (a Python thread inside `worker_loop`, without the GIL)
    team_rouse: awake = 1      spin on gen; after a while asleep = 1 and, unless awake, back to Python, which
    (wakes the sleepers)       blocks on a lock until thread 0 finds the flag
    team_run: job, gen += 1    sees it: job(argument, tid)
    job(argument, 0)           last barrier of the job, then spin again

Sleepers are woken before the job is posted, and posting and running are one call: an exception in Python (Ctrl-C) finds
either no job or a finished one, never a team at a barrier that thread 0 will not reach.
"""

from __future__ import annotations

from .block import LINE, T
from .jit import kernel
from .simd import atomic_add, atomic_get, atomic_swap, call_word, get_i64, i64, pause, put_i64, void

call_job = call_word(void, [i64, i64])
call_yield = call_word(i64, [])

SPINS_BEFORE_YIELD = 256  # about 10 us: longer than any fair wait, shorter than a time slice
SPINS_BEFORE_SLEEP = 20_000  # about 1 ms with yields between: the pause between two tokens stays below


@kernel
def spin(team, i):  # type: ignore[no-untyped-def]
    """One round of waiting: pause, and give the core away when the wait is long."""
    pause(0)
    if i >= SPINS_BEFORE_YIELD and i % 16 == 0:
        call_yield(get_i64(team + T.give_way))


@kernel
def barrier(team, threads):  # type: ignore[no-untyped-def]
    """Wait for all threads. Returns 0, or 1 for every thread alike when the pass was cancelled."""
    if threads > 1:
        epoch = atomic_get(team + T.epoch)
        if atomic_add(team + T.arrived, 1) == threads - 1:
            put_i64(team + T.stop, atomic_get(team + T.cancel))
            put_i64(team + T.arrived, 0)
            atomic_swap(team + T.epoch, epoch + 1)
        else:
            i = 0
            while atomic_get(team + T.epoch) == epoch:
                spin(team, i)
                i += 1
        return get_i64(team + T.stop)
    return atomic_get(team + T.cancel)


@kernel
def claim(counters, phase, step):  # type: ignore[no-untyped-def]
    """First of the next `step` items of a phase that nobody has claimed."""
    return atomic_add(counters + phase * LINE, step)


def team_rouse(team, _job, _argument):  # type: ignore[no-untyped-def]
    """Let no worker fall asleep; returns how many do sleep and must be woken by Python, which looks at their flags."""
    atomic_swap(team + T.awake, 1)
    sleepers = 0
    for tid in range(1, get_i64(team + T.threads)):
        sleepers += atomic_get(team + T.asleep + tid * LINE)
    return sleepers


def team_run(team, job, argument):  # type: ignore[no-untyped-def]
    """Publish a job and take part in it as thread 0. Returns 0."""
    put_i64(team + T.job, job)
    put_i64(team + T.argument, argument)
    atomic_add(team + T.generation, 1)
    call_job(job, argument, 0)
    return 0


def worker_loop(team, tid, seen):  # type: ignore[no-untyped-def]
    """Run jobs until none comes for a while; returns the generation last run, with this thread's asleep flag set."""
    asleep = team + T.asleep + tid * LINE
    i = 0
    while True:
        generation = atomic_get(team + T.generation)
        if generation != seen:
            seen = generation
            call_job(get_i64(team + T.job), get_i64(team + T.argument), tid)
            i = 0
        elif i < SPINS_BEFORE_SLEEP:
            spin(team, i)
            i += 1
        else:
            atomic_swap(asleep, 1)  # flag first, then a last look; team_rouse looks after its word: one of the two sees
            if atomic_get(team + T.generation) == seen and atomic_get(team + T.awake) == 0:
                return seen
            atomic_swap(asleep, 0)
            i = 0
