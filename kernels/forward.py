"""The whole Llama pass as one function that every thread of the team runs, layer by layer, phase by phase.

    embed                     ids -> x                             tokens are claimed
    a layer   prepare         norm(x) -> act                       tokens
              q, k, v         act -> qkv                           row groups, 16 rows of a matrix each
              store           rotate q and k; k, v -> KV pages     (token, KV head)
              attention       q, pages -> over q                   (KV head, rows); of a single token (KV head, span)
              prepare, o      q -> act; x += act                   tokens; row groups
              prepare         norm(x) -> act                       tokens
              gate, up        act -> gate = silu(gate) * up        row groups
              prepare, down   gate -> act; x += act                tokens; row groups
    norm                      x -> out                             tokens

Behind the keys and values of the last layer only those rows go on that are wanted: of a prompt the last one, none of
its chunks before.

A phase ends when all of its items are done, whoever did them (team.py). Of a single token, `prepare` is no phase: every
thread makes the activations for itself, which takes less than waiting for them; and where each sequence has one token,
nor is `store`: attention rotates and stores what it needs. A matrix may have an adapter: `prepare` then makes its u
too, and who multiplies a row group adds u up^T. `classify` is a second entry: prefill needs logits of its last token
only, and the classifier is 21 % of the 135M weights.

Phases make half of what a thread reads the work of others: all rows of its tokens, all tokens of its rows. So a few
threads with many tokens do without. Each has a stretch of the tokens, and runs the phases of a layer alone on half of
it at a time; what it writes stays in its cache, and it waits only for keys and values of tokens in front of its own:

    tokens        0 ..            n / 2 ..           n       layer 1 of stretch 1 needs layer 0 of both, never the
    layer 0       stretch 0       stretch 1                  other way round: thread 0 gets ahead, and takes halves
    layer 1       stretch 0       stretch 1                  of what is left of stretch 1 when its own is done
    ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .attention import make_attention, merge_spans, segment_of
from .block import (
    ATTENTION_SCRATCH,
    HEAD_DIM,
    LAYER,
    LINE,
    MOST_RANK,
    PHASES,
    TAIL_BYTES,
    A,
    B,
    S,
    W,
    unpack_bytes,
)
from .jit import TIER, kernel
from .matmul import MATMUL, ROW
from .pointwise import interleave, quantise, rmsnorm, swiglu
from .simd import call_word, f32, get_f32, get_i64, i64, put_i64, vload, void, vsplat, vstore
from .target import one_tile, record_bytes
from .team import claim, claim_left, done, wait

call_matmul = call_word(void, MATMUL.args)
call_row = call_word(void, ROW.args)
bytes_of_record = kernel(record_bytes)
bytes_unpacked = kernel(unpack_bytes)


@kernel
def unpacked_of(block, row):  # type: ignore[no-untyped-def]
    """Where a thread unpacks a row group, behind its row of floats and its activations (block.scratch_bytes)."""
    return row + 16 * get_i64(block + B.max_k)


PASS = void(i64, i64)
ONE_TILE = one_tile(TIER)
STRETCHES = 5  # most of them; of the claim counters of a layer each has two words


@kernel
def activations(block, terms, row):  # type: ignore[no-untyped-def]
    """Where the activations of `terms` int8 terms (0: f32) lie: those of a single token in each thread's scratch."""
    if get_i64(block + B.n) == 1:
        return row + 4 * get_i64(block + B.max_k) * (3 - terms)
    if terms == 0:
        return get_i64(block + B.act_f32)
    return get_i64(block + (B.act if terms == 1 else B.act_2))


@kernel
def prepare(block, x, k, t, modes, row):  # type: ignore[no-untyped-def]
    """Write token t's k floats at x as activations of the next matmuls. modes: bit 1 for one int8 term, bit 2 for two,
    bit 0 for f32; row: the thread's.
    """
    n = get_i64(block + B.n)
    for terms in range(1, 3):
        if modes & (1 << terms):
            tile = get_i64(block + (B.tile_1 if terms == 1 else B.tile_2)) if n >= ONE_TILE else n
            t0 = t // tile * tile
            size = bytes_of_record(terms)
            out = activations(block, terms, row) + (t0 * (k // 32) + t - t0) * size
            quantise(x, k, terms, out, min(tile, n - t0) * size)
    if modes & 1:
        tile = get_i64(block + B.tile_f32)
        t0 = t // tile * tile
        interleave(x, k, activations(block, 0, row) + (t0 * k + t - t0) * 4, min(tile, n - t0) * 4)


@kernel
def narrowed(block, a, row):  # type: ignore[no-untyped-def]
    """Where u of an adapter lies: that of a single token in each thread's scratch."""
    if get_i64(block + B.n) == 1:
        return unpacked_of(block, row) + bytes_unpacked(get_i64(block + B.max_k)) + 4 * MOST_RANK * get_i64(a + A.place)
    return get_i64(a + A.u) + 4 * 32 * get_i64(a + A.blocks) * get_i64(block + B.behind)


@kernel
def narrow(block, w, t, x, row):  # type: ignore[no-untyped-def]
    """Token t's u of w's adapter, from the f32 row x that w multiplies."""
    a, n, out = get_i64(w + W.adapter), get_i64(block + B.n), unpacked_of(block, row)
    rank, groups, tile = 32 * get_i64(a + A.blocks), get_i64(a + A.groups), get_i64(block + B.tile_f32)
    vstore(out + 64 * groups, vsplat(f32(0.0)))  # ranks come in 32, row groups in 16
    call_matmul(
        get_i64(a + A.matmul), get_i64(a + A.down), get_i64(w + W.blocks), 0, groups, x, 1, out, rank, 0, 0
    )  # fmt: skip
    scale = vsplat(get_f32(a + A.scale))
    for j in range(0, rank, 16):
        vstore(out + 4 * j, vload(out + 4 * j) * scale)
    t0 = t // tile * tile
    interleave(out, rank, narrowed(block, a, row) + (t0 * rank + t - t0) * 4, min(tile, n - t0) * 4)


@kernel
def product(block, w, g, end, y, y_stride, add, row):  # type: ignore[no-untyped-def]
    """Row groups g..end of y (+)= act W^T, and what w's adapter adds."""
    n, unpacked = get_i64(block + B.n), unpacked_of(block, row)
    call_matmul(
        get_i64(w + W.matmul), get_i64(w + W.panel), get_i64(w + W.blocks), g, end,
        activations(block, get_i64(w + W.terms), row), n, y, y_stride, add, unpacked,
    )  # fmt: skip
    a = get_i64(w + W.adapter)
    if a:
        call_matmul(
            get_i64(a + A.matmul), get_i64(a + A.up), get_i64(a + A.blocks), g, end,
            narrowed(block, a, row), n, y, y_stride, 1, unpacked,
        )  # fmt: skip


@kernel
def share(block, items):  # type: ignore[no-untyped-def]
    """Items of one claim where each is little work: all threads want the counter's line, and neighbours' lines."""
    claims = 8 * get_i64(block + B.threads)
    return (items + claims - 1) // claims


@kernel
def groups_of(w, count):  # type: ignore[no-untyped-def]
    """Row groups of `count` consecutive matrices from w on."""
    groups = 0
    for i in range(count):
        groups += get_i64(w + 8 * i * W.size + W.groups)
    return groups


@kernel
def step_of(block, w, groups):  # type: ignore[no-untyped-def]
    """Row groups of one claim: long runs of memory for fewer tokens than a tile has, else what stays in L2 while tile
    after tile passes over it."""
    n = get_i64(block + B.n)
    if n < get_i64(block + B.tile_1):
        claims = (2 if n == 1 else 4) * get_i64(block + B.threads)
        return (groups + claims - 1) // claims
    return get_i64(w + W.step)


def by_claims(run: Any) -> Any:
    """multiply(block, w, count, counter, y, y_stride, add, row): runs of the row groups of `count` matrices from w on
    are claimed, and run(block, w, count, g, end, y, y_stride, add, row) done with each. Returns how many there are.

    Claims are numbered such that threads that take turns, as equals do, go on where their last run ended: 0 2 1 3 for
    two threads. What a tile has fetched ahead is then read by who fetched it.
    """

    @kernel
    def multiply(block, w, count, counter, y, y_stride, add, row):  # type: ignore[no-untyped-def]
        threads, groups, finished = get_i64(block + B.threads), groups_of(w, count), 0
        step = step_of(block, w, groups)
        turns = (groups + step * threads - 1) // (step * threads)
        k = claim(counter, 1)
        while k < turns * threads:
            g = (k % threads * turns + k // threads) * step
            end = min(g + step, groups)
            if g < end:
                run(block, w, count, g, end, y, y_stride, add, row)
                finished += end - g
            k = claim_left(counter, turns * threads, 1)
        if finished:
            done(counter, finished)
        return groups

    return multiply


@kernel
def products(block, w, count, g, end, y, y_stride, add, row):  # type: ignore[no-untyped-def]
    """Row groups g..end of y (+)= act W^T, the matrices one behind the other in a row of y."""
    first = 0  # row groups of the matrices before
    for i in range(count):
        matrix = w + 8 * i * W.size
        own = get_i64(matrix + W.groups)
        begin, stop = max(g - first, 0), min(end - first, own)
        if begin < stop:
            product(block, matrix, begin, stop, y + 64 * first, y_stride, add, row)
        first += own


@kernel
def gate_and_up(block, w, _count, g, end, gate, hidden, _add, row):  # type: ignore[no-untyped-def]
    """Row groups g..end of gate = silu(act Wg^T) * (act Wu^T): three steps, while they are in cache. w: Wg, then Wu."""
    up = get_i64(block + B.up)
    product(block, w, g, end, gate, hidden, 0, row)
    product(block, w + 8 * W.size, g, end, up, hidden, 0, row)
    for t in range(get_i64(block + B.n)):
        first = 4 * (t * hidden + 16 * g)
        swiglu(gate + first, up + first, 16 * (end - g))


multiply, multiply_gated = by_claims(products), by_claims(gate_and_up)


@kernel
def prepare_row(block, x, t, k, norm, w, readers, modes, split, row):  # type: ignore[no-untyped-def]
    """Activations of one token; the arguments are those of prepare_rows."""
    if split:
        segment = segment_of(block, t)
        if get_i64(segment + S.count) == 1:
            merge_spans(block, segment, row, unpacked_of(block, row))
            x = row
    if norm:
        rmsnorm(x, norm, k, get_f32(block + B.eps), row)
        x = row
    prepare(block, x, k, t, modes, row)
    for i in range(readers):
        if get_i64(w + 8 * i * W.size + W.adapter):
            narrow(block, w + 8 * i * W.size, t, x, row)


@kernel
def prepare_rows(block, counter, rows, stride, k, norm, w, readers, split, row):  # type: ignore[no-untyped-def]
    """Activations of `readers` consecutive matrices from w on, tokens claimed. Returns 1 when the pass was cancelled.

    rows: k floats each, `stride` floats apart. norm: weight of an RMSNorm to apply first, or 0. split: rows are
    attention, that of a single token still in partials. row: the thread's.

    A thread that comes late to a single token may read rows that are being overwritten: then all items of the phase
    that needs them are done, and what it has made is never read.
    """
    n, modes = get_i64(block + B.n), 0
    for i in range(readers):
        modes |= 1 << get_i64(w + 8 * i * W.size + W.terms)
    if n == 1:
        prepare_row(block, rows, 0, k, norm, w, readers, modes, split, row)
        return 0
    step = share(block, n)
    while True:
        t = claim(counter, step)
        if t >= n:
            break
        end = min(t + step, n)
        for i in range(t, end):
            prepare_row(block, rows + 4 * i * stride, i, k, norm, w, readers, modes, split, row)
        done(counter, end - t)
    return wait(get_i64(block + B.team), counter, n)


@kernel
def embed(block, counter, x, dim, unpacked):  # type: ignore[no-untyped-def]
    """x = rows of the embedding, tokens claimed."""
    w, n = get_i64(block + B.embed), get_i64(block + B.n)
    step = share(block, n)
    while True:
        first = claim(counter, step)
        if first >= n:
            return
        end = min(first + step, n)
        for t in range(first, end):
            token = get_i64(get_i64(block + B.ids) + 8 * t)
            look_up = get_i64(block + B.embed_row)
            call_row(look_up, get_i64(w + W.panel), get_i64(w + W.blocks), token, x + 4 * t * dim, unpacked)
        done(counter, end - first)


@kernel
def width_of(block):  # type: ignore[no-untyped-def]
    """Floats of a row of qkv."""
    return (get_i64(block + B.n_heads) + 2 * get_i64(block + B.n_kv_heads)) * HEAD_DIM


@kernel
def section(block, first, count, place):  # type: ignore[no-untyped-def]
    """The block of tokens first .. first + count - 1 alone of a pass of one segment, written to `place`."""
    segment = get_i64(block + B.segments)
    for i in range(0, 8 * B.size, 8):
        put_i64(place + i, get_i64(block + i))
    own = place + 8 * B.size
    for i in range(0, 8 * S.size, 8):
        put_i64(own + i, get_i64(segment + i))
    put_i64(own + S.count, count)
    put_i64(own + S.start, get_i64(segment + S.start) + first)
    put_i64(place + B.segments, own)
    put_i64(place + B.n, count)
    put_i64(place + B.x, get_i64(block + B.x) + 4 * first * get_i64(block + B.dim))
    put_i64(place + B.qkv, get_i64(block + B.qkv) + 4 * first * width_of(block))
    return place


@kernel
def wanted(block, tail):  # type: ignore[no-untyped-def]
    """The block of those tokens whose hidden states are wanted: this one, or at `tail` one of the last tokens alone."""
    n, rows = get_i64(block + B.n), get_i64(block + B.rows)
    return block if rows == n else section(block, n - rows, rows, tail)


@kernel
def unit_of(block):  # type: ignore[no-untyped-def]
    """Tokens that sections are multiples of: tiles, a dozen tokens at least."""
    tile = get_i64(block + B.tile_1)
    return (11 + tile) // tile * tile


@kernel
def in_stretches(block):  # type: ignore[no-untyped-def]
    """Whether a pass is long enough to give every thread a stretch of its tokens, and of one segment."""
    n, threads = get_i64(block + B.n), get_i64(block + B.threads)
    enough = n >= 4 * threads * unit_of(block) and get_i64(block + B.n_segments) == 1
    return enough and 1 < threads <= STRETCHES


@kernel
def stretch_of(block, owner):  # type: ignore[no-untyped-def]
    """First token of a thread's stretch, that of the thread behind the last being n."""
    n, threads, unit = get_i64(block + B.n), get_i64(block + B.threads), unit_of(block)
    return n if owner == threads else n // unit * owner // threads * unit


@kernel
def alone(block, tid, n):  # type: ignore[no-untyped-def]
    """Make a section one thread's: activations, gate and up lie in the thread's share of their buffers, which stays in
    its cache from section to section; claims are its own. Returns its first claim counter."""
    behind = tid * (n // get_i64(block + B.threads))
    max_k, hidden = get_i64(block + B.max_k), 4 * get_i64(block + B.hidden_dim)
    put_i64(block + B.behind, behind)
    put_i64(block + B.threads, 1)
    put_i64(block + B.act, get_i64(block + B.act) + behind * (max_k // 32) * bytes_of_record(1))
    put_i64(block + B.act_2, get_i64(block + B.act_2) + behind * (max_k // 32) * bytes_of_record(2))
    put_i64(block + B.act_f32, get_i64(block + B.act_f32) + behind * 4 * max_k)
    put_i64(block + B.gate, get_i64(block + B.gate) + behind * hidden)
    put_i64(block + B.up, get_i64(block + B.up) + behind * hidden)
    counter = block + TAIL_BYTES - PHASES * LINE
    for m in range(PHASES):
        put_i64(counter + m * LINE, 0)
        put_i64(counter + m * LINE + 8, 0)
    return counter


@kernel
def normalise(block, counter):  # type: ignore[no-untyped-def]
    """out = norm(x), tokens claimed; nobody waits for it but the caller of the pass."""
    n, dim = get_i64(block + B.n), get_i64(block + B.dim)
    while True:
        t = claim(counter, 1)
        if t >= n:
            return
        x, out = get_i64(block + B.x) + 4 * t * dim, get_i64(block + B.out) + 4 * t * dim
        rmsnorm(x, get_i64(block + B.final_norm), dim, get_f32(block + B.eps), out)


def make_layer(key: str, value: str) -> tuple[Any, Any]:
    """(project, complete): the two parts of a layer, for a KV cache of these kinds (block.KV_BYTES)."""
    store_kv, attention = make_attention(key, value)

    @kernel
    def project(block, i, counter, scratch, row, single):  # type: ignore[no-untyped-def]
        """A layer up to its keys and values; counter: its first claim counter; single: every segment is one token, and
        `attention` will store its key. Returns 1 when the pass is cancelled."""
        team, n = get_i64(block + B.team), get_i64(block + B.n)
        dim, x, qkv = get_i64(block + B.dim), get_i64(block + B.x), get_i64(block + B.qkv)
        kv_heads = get_i64(block + B.n_kv_heads)
        w = get_i64(block + B.layers) + i * LAYER.bytes

        if prepare_rows(block, counter, x, dim, dim, get_i64(w + LAYER.attn_norm), w + LAYER.q, 3, 0, row):
            return 1
        groups = multiply(block, w + LAYER.q, 3, counter + LINE, qkv, width_of(block), 0, row)
        if wait(team, counter + LINE, groups):
            return 1
        if single:
            return 0
        items = n * kv_heads
        step = share(block, items)
        while True:
            item = claim(counter + 2 * LINE, step)
            if item >= items:
                break
            end = min(item + step, items)
            for j in range(item, end):
                store_kv(block, i, j // kv_heads, j % kv_heads, qkv, scratch)
            done(counter + 2 * LINE, end - item)
        return wait(team, counter + 2 * LINE, items)

    @kernel
    def complete(block, i, counter, scratch, row, single):  # type: ignore[no-untyped-def]
        """The rest of it."""
        team, dim, hidden = get_i64(block + B.team), get_i64(block + B.dim), get_i64(block + B.hidden_dim)
        x, qkv, gate = get_i64(block + B.x), get_i64(block + B.qkv), get_i64(block + B.gate)
        q_dim, width = get_i64(block + B.n_heads) * HEAD_DIM, width_of(block)
        w = get_i64(block + B.layers) + i * LAYER.bytes

        items = attention(block, i, counter + 3 * LINE, qkv, scratch, single)
        if wait(team, counter + 3 * LINE, items):
            return 1
        if prepare_rows(block, counter + 4 * LINE, qkv, width, q_dim, 0, w + LAYER.o, 1, 1, row):
            return 1
        groups = multiply(block, w + LAYER.o, 1, counter + 5 * LINE, x, dim, 1, row)
        if wait(team, counter + 5 * LINE, groups):
            return 1
        if prepare_rows(block, counter + 6 * LINE, x, dim, dim, get_i64(w + LAYER.ffn_norm), w + LAYER.gate, 2, 0, row):
            return 1
        groups = multiply_gated(block, w + LAYER.gate, 1, counter + 7 * LINE, gate, hidden, 0, row)
        if wait(team, counter + 7 * LINE, groups):
            return 1
        if prepare_rows(block, counter + 8 * LINE, gate, hidden, hidden, 0, w + LAYER.down, 1, 0, row):
            return 1
        groups = multiply(block, w + LAYER.down, 1, counter + 9 * LINE, x, dim, 1, row)
        return wait(team, counter + 9 * LINE, groups)

    return project, complete


def make_by_stretches(project: Any, complete: Any) -> Any:
    """by_stretches(block, counters, scratch, row, tid) of these parts of a layer."""

    @kernel
    def settle(block, i, owner, counters, scratch, row, tid):  # type: ignore[no-untyped-def]
        """Bring a stretch of the tokens to the keys and values of layer i: half of it at a time from those of the layer
        before, which all tokens in front of the stretch have, too. Returns 1 when the pass is cancelled."""
        begin, end, unit = stretch_of(block, owner), stretch_of(block, owner + 1), unit_of(block)
        half = begin + (end - begin + 2 * unit - 1) // (2 * unit) * unit
        counter = counters + (1 + i * PHASES) * LINE + 16 * owner
        while True:
            k = claim(counter, 1)
            if k > 1:
                return wait(get_i64(block + B.team), counter, 2)
            first, stop = (half, end) if k else (begin, half)
            place = scratch + get_i64(block + B.scratch_bytes) - TAIL_BYTES
            part = section(block, first, stop - first, place)
            own = alone(part, tid, get_i64(block + B.n))
            if i and complete(part, i - 1, own, scratch, row, 0):
                return 1
            if project(part, i, own, scratch, row, 0):
                return 1
            done(counter, 1)

    @kernel
    def by_stretches(block, counters, scratch, row, tid):  # type: ignore[no-untyped-def]
        """All tokens up to the keys and values of the last layer. Returns 1 when the pass is cancelled.

        A layer of a stretch waits for the layer before of all in front of it. So they are looked after first: then a
        thread that others wait for has their help, and who is through helps those behind.
        """
        threads, n_layers = get_i64(block + B.threads), get_i64(block + B.n_layers)
        for i in range(n_layers + 1):
            for owner in range(tid if i else 0):
                if settle(block, i - 1, owner, counters, scratch, row, tid):
                    return 1
            if i < n_layers and settle(block, i, tid, counters, scratch, row, tid):
                return 1
        for i in range(n_layers):
            for owner in range(tid + 1, threads):
                if settle(block, i, owner, counters, scratch, row, tid):
                    return 1
        return 0

    return by_stretches


def make_forward(key: str, value: str) -> Callable[..., None]:
    """forward(block, tid) for a KV cache of these kinds."""
    project, complete = make_layer(key, value)
    by_stretches = make_by_stretches(project, complete)

    def forward(block, tid):  # type: ignore[no-untyped-def]
        counters, n_layers = get_i64(block + B.counters), get_i64(block + B.n_layers)
        scratch = get_i64(block + B.scratch) + tid * get_i64(block + B.scratch_bytes)
        row = scratch + ATTENTION_SCRATCH
        embed(block, counters, get_i64(block + B.x), get_i64(block + B.dim), unpacked_of(block, row))
        if wait(get_i64(block + B.team), counters, get_i64(block + B.n)):
            return
        stretches, n = in_stretches(block), get_i64(block + B.n)
        # of tokens nobody wants the last layer has no attention that could store their keys
        single = n == get_i64(block + B.n_segments) and n == get_i64(block + B.rows)
        if stretches and by_stretches(block, counters, scratch, row, tid):
            return
        for i in range(n_layers - 1 if stretches else 0, n_layers):
            counter = counters + (1 + i * PHASES) * LINE
            if not stretches and project(block, i, counter, scratch, row, single):
                return
            if i == n_layers - 1:
                block = wanted(block, scratch + get_i64(block + B.scratch_bytes) - TAIL_BYTES)
            if get_i64(block + B.n) == 0 or complete(block, i, counter, scratch, row, single):
                return
        normalise(block, counters + (1 + n_layers * PHASES) * LINE)

    return forward


def classify(block, tid):  # type: ignore[no-untyped-def]
    """logits (n, 16 head.groups) = out (n, dim) times the classifier."""
    head = get_i64(block + B.head)
    counters, dim = get_i64(block + B.counters), get_i64(block + B.dim)
    row = get_i64(block + B.scratch) + tid * get_i64(block + B.scratch_bytes) + ATTENTION_SCRATCH
    if prepare_rows(block, counters, get_i64(block + B.out), dim, dim, 0, head, 1, 0, row):
        return
    stride = 16 * get_i64(head + W.groups)
    multiply(block, head, 1, counters + LINE, get_i64(block + B.logits), stride, 0, row)
