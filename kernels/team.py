"""The team: threads that run one function together, phase by phase.

Every thread calls the same pass(block, tid). A phase is a number of items (row groups, tokens, heads), claimed through
an atomic counter, one or a few at a time, and counted when they are done; a thread goes on when all are. So nobody
waits for a *thread*, only for work: one that the system has put aside between two phases is not missed, one inside
costs what it has claimed, and a worker that wakes late finds the work done and runs after the others. Each output has
one writer, so claims never change bits.

    Python thread 0            worker (a Python thread inside `worker_loop`, without the GIL)
    team_rouse: awake = 1      spin on generation; after a while asleep = 1 and, unless awake, back to Python, which
    (wakes the sleepers)       blocks on a lock until thread 0 finds the flag
    team_run: job, open = 1,   sees it: inside += 1; if open: job(argument, tid); inside -= 1
      generation += 1
    job(argument, 0)
    open = 0; inside == 0?     a worker that comes now finds the door shut

Sleepers are woken before the job is posted, and posting and running are one call: an exception in Python (Ctrl-C) finds
either no job or a finished one, never a team at work.
"""

from __future__ import annotations

from .block import LINE, T
from .jit import kernel
from .simd import atomic_add, atomic_get, atomic_swap, call_word, get_i64, i64, pause, put_i64, void

call_job = call_word(void, [i64, i64])
call_yield = call_word(i64, [])

SPINS_BEFORE_YIELD = 32  # about 1 us; the call costs little where nobody else wants the core, and helps where one does
SPINS_BEFORE_SLEEP = 20_000  # about 1 ms with yields between: the pause between two tokens stays below


@kernel
def spin(team, i):  # type: ignore[no-untyped-def]
    """One round of waiting: pause, and give the core away when the wait is long."""
    pause(0)
    if i >= SPINS_BEFORE_YIELD and i % 16 == 0:
        call_yield(get_i64(team + T.give_way))


@kernel
def claim(counter, step):  # type: ignore[no-untyped-def]
    """First of the next `step` items of a phase that nobody has claimed."""
    return atomic_add(counter, step)


@kernel
def claim_left(counter, items, step):  # type: ignore[no-untyped-def]
    """`claim` of a phase of so many items. When all are claimed the line is only read: who waits for it keeps it."""
    return items if atomic_get(counter) >= items else claim(counter, step)


@kernel
def done(counter, items):  # type: ignore[no-untyped-def]
    """Claimed items are done, their outputs written. It takes the line from those who wait: better once for all."""
    atomic_add(counter + 8, items)


@kernel
def wait(team, counter, items):  # type: ignore[no-untyped-def]
    """Wait until all items of a phase are done. Returns 1 when the pass was cancelled: leave, claim nothing more."""
    i = 0
    while atomic_get(team + T.cancel) == 0:
        if atomic_get(counter + 8) >= items:
            return 0
        spin(team, i)
        i += 1
    return 1


def team_rouse(team, _job, _argument):  # type: ignore[no-untyped-def]
    """Let no worker fall asleep; returns how many do sleep and must be woken by Python, which looks at their flags."""
    atomic_swap(team + T.awake, 1)
    sleepers = 0
    for tid in range(1, get_i64(team + T.threads)):
        sleepers += atomic_get(team + T.asleep + tid * LINE)
    return sleepers


def team_run(team, job, argument):  # type: ignore[no-untyped-def]
    """Publish a job, take part in it as thread 0, and wait until no worker is inside. Returns 0."""
    put_i64(team + T.job, job)
    put_i64(team + T.argument, argument)
    atomic_swap(team + T.open, 1)
    atomic_add(team + T.generation, 1)
    call_job(job, argument, 0)
    atomic_swap(team + T.open, 0)
    i = 0
    while atomic_get(team + T.inside):  # seq_cst: whoever is not seen here sees the door shut
        spin(team, i)
        i += 1
    return 0


def worker_loop(team, tid, seen):  # type: ignore[no-untyped-def]
    """Run jobs until none comes for a while; returns the generation last seen, with this thread's asleep flag set."""
    asleep = team + T.asleep + tid * LINE
    i = 0
    while True:
        generation = atomic_get(team + T.generation)
        if generation != seen:
            seen = generation
            atomic_add(team + T.inside, 1)
            if atomic_get(team + T.open):  # maybe of a later generation already: then it is entered twice, to no harm
                call_job(get_i64(team + T.job), get_i64(team + T.argument), tid)
            atomic_add(team + T.inside, -1)
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


def hand_over(team, turn, times):  # type: ignore[no-untyped-def]
    """One of two threads, turn 0 and 1, that add to the team's `generation` in turns: how long a line takes from core
    to core. Returns 0; then the word is even again."""
    for _ in range(times):
        i = 0
        while atomic_get(team + T.generation) % 2 != turn:
            spin(team, i)
            i += 1
        atomic_add(team + T.generation, 1)
    return 0
