"""The whole Llama pass as one function that every thread of the team runs, layer by layer, phase by phase.

    embed                                                                 ids -> x
    per layer   0 norm, prepare      x -> act                             tokens are claimed
                1-3 q, k, v          act -> qkv                           row groups are claimed
                4 rope, store        qkv -> qkv, KV pages                 (token, KV head)
                5 attention          qkv, pages -> qkv (over q)           (KV head, rows); one token: (KV head, span)
                0' prepare           qkv -> act                           tokens
                o                    x += act                             row groups
                norm, prepare        x -> act                             tokens
                gate, up, swiglu     act -> gate                          row groups
                prepare, down        gate -> act; x += act                tokens; row groups
    final norm                                                            x -> out

A barrier ends each phase. `classify` is a second entry: prefill needs logits of its last token only, and the classifier
is 21 % of the 135M weights.
"""

from __future__ import annotations

from collections.abc import Callable

from .attention import finish, make_span, merge
from .block import ATTENTION_SCRATCH, HEAD_DIM, LAYER, LINE, PAGE, PART, PHASES, ROW_TILE, SPAN, B, W
from .jit import kernel
from .matmul import MATMUL, ROW
from .pointwise import interleave, quantise, rmsnorm, rope, swiglu
from .simd import (
    I16,
    call_word,
    f32,
    get_f32,
    get_i64,
    i64,
    load,
    put_f32,
    store,
    vload,
    void,
    vstore,
    vstore_half,
    word,
)
from .target import RECORD_BYTES
from .team import barrier, claim

call_matmul = call_word(void, MATMUL.args)
call_row = call_word(void, ROW.args)
copy_i16 = word(void, [i64, i64], lambda b, source, target: store(b, target, load(b, source, I16)))

PASS = void(i64, i64)


@kernel
def prepare(block, row, k, t, terms, floats):  # type: ignore[no-untyped-def]
    """Write token t's row of k floats as activations of the next matmuls: int8 of 1 or 2 terms (0: none), and f32 if
    `floats`.
    """
    n = get_i64(block + B.n)
    if terms:
        tile = get_i64(block + (B.tile_1 if terms == 1 else B.tile_2))
        t0 = t // tile * tile
        size = RECORD_BYTES * terms
        quantise(row, k, terms, get_i64(block + B.act) + (t0 * (k // 32) + t - t0) * size, min(tile, n - t0) * size)
    if floats:
        tile = get_i64(block + B.tile_f32)
        t0 = t // tile * tile
        interleave(row, k, get_i64(block + B.act_f32) + (t0 * k + t - t0) * 4, min(tile, n - t0) * 4)


@kernel
def activations(block, w):  # type: ignore[no-untyped-def]
    """Where a matrix finds its activations."""
    return get_i64(block + (B.act if get_i64(w + W.terms) else B.act_f32))


@kernel
def multiply(block, w, counter, y, y_stride, add, scratch):  # type: ignore[no-untyped-def]
    """y (+)= act W^T, row groups claimed in steps."""
    groups, step = get_i64(w + W.groups), get_i64(w + W.step)
    act = activations(block, w)
    while True:
        g = claim(counter, 0, step)
        if g >= groups:
            return
        call_matmul(
            get_i64(w + W.matmul), get_i64(w + W.panel), get_i64(w + W.blocks), g, min(g + step, groups),
            act, get_i64(block + B.n), y, y_stride, add, scratch,
        )  # fmt: skip


@kernel
def gated(block, layer, counter, scratch):  # type: ignore[no-untyped-def]
    """gate = silu(act Wg^T) * (act Wu^T): the three steps on the same row groups, while they are in cache."""
    wg, wu = layer + LAYER.gate, layer + LAYER.up
    gate, up = get_i64(block + B.gate), get_i64(block + B.up)
    n, hidden = get_i64(block + B.n), get_i64(block + B.hidden_dim)
    groups, step = get_i64(wg + W.groups), get_i64(wg + W.step)
    while True:
        g = claim(counter, 0, step)
        if g >= groups:
            return
        end = min(g + step, groups)
        for w, y in ((wg, gate), (wu, up)):
            call_matmul(
                get_i64(w + W.matmul), get_i64(w + W.panel), get_i64(w + W.blocks), g, end,
                activations(block, w), n, y, hidden, 0, scratch,
            )  # fmt: skip
        for t in range(n):
            first = 4 * (t * hidden + 16 * g)
            swiglu(gate + first, up + first, 16 * (end - g))


def make_forward(element: str) -> Callable[..., None]:
    """forward(block, tid) for a KV cache of "F16" or "F32"."""
    half = element == "F16"
    size = 2 if half else 4
    span_1, span_3, span_6 = (make_span(rows, element) for rows in (1, 3, ROW_TILE))

    @kernel
    def store_kv(block, layer, t, head, qkv, scratch):  # type: ignore[no-untyped-def]
        """Rotate the queries of one KV head's group and its key; write key and value into their page."""
        heads, kv_heads = get_i64(block + B.n_heads), get_i64(block + B.n_kv_heads)
        group = heads // kv_heads
        position = get_i64(block + B.start) + t
        table = get_i64(block + B.rope) + position * HEAD_DIM * 4
        row = qkv + 4 * t * (heads + 2 * kv_heads) * HEAD_DIM
        for h in range(head * group, (head + 1) * group):
            rope(row + 4 * HEAD_DIM * h, table, f32(0.125), row + 4 * HEAD_DIM * h)  # 1 / sqrt(head_dim): exact
        page = (
            get_i64(get_i64(block + B.pages) + position // PAGE * 8)
            + layer * get_i64(block + B.layer_bytes)
            + head * get_i64(block + B.head_bytes)
        )
        inside = position % PAGE
        rope(row + 4 * HEAD_DIM * (heads + head), table, f32(1.0), scratch)
        value = row + 4 * HEAD_DIM * (heads + kv_heads + head)
        to = page + get_i64(block + B.value_offset) + inside * HEAD_DIM * size
        lane = page + (inside // 16 * HEAD_DIM * 16 + inside % 16) * size
        if half:
            for d in range(0, HEAD_DIM, 16):
                vstore_half(scratch + 2 * d, vload(scratch + 4 * d))  # in place: writes stay behind reads
                vstore_half(to + 2 * d, vload(value + 4 * d))
            for d in range(HEAD_DIM):
                copy_i16(scratch + 2 * d, lane + 32 * d)
        else:
            for d in range(0, HEAD_DIM, 16):
                vstore(to + 4 * d, vload(value + 4 * d))
            for d in range(HEAD_DIM):
                put_f32(lane + 64 * d, get_f32(scratch + 4 * d))

    @kernel
    def any_span(rows, q, first_row, group, start, first, pages, offset, value_offset, s, parts):  # type: ignore[no-untyped-def]
        if rows == ROW_TILE:
            span_6(q, first_row, group, start, first, pages, offset, value_offset, s, parts)
        elif rows == 3:
            span_3(q, first_row, group, start, first, pages, offset, value_offset, s, parts)
        else:
            span_1(q, first_row, group, start, first, pages, offset, value_offset, s, parts)

    @kernel
    def attend_rows(block, layer, head, first_row, end_row, qkv, scratch):  # type: ignore[no-untyped-def]
        """All spans of rows first_row..end_row of a KV head, merged as they come; output over q."""
        heads, kv_heads = get_i64(block + B.n_heads), get_i64(block + B.n_kv_heads)
        group, start = heads // kv_heads, get_i64(block + B.start)
        stride = (heads + 2 * kv_heads) * HEAD_DIM
        offset = layer * get_i64(block + B.layer_bytes) + head * get_i64(block + B.head_bytes)
        q, s = scratch, scratch + 4 * ROW_TILE * HEAD_DIM
        total = s + 4 * ROW_TILE * SPAN
        part = total + 4 * ROW_TILE * PART
        while first_row < end_row:
            left = end_row - first_row
            rows = ROW_TILE if left >= ROW_TILE else (3 if left >= 3 else 1)
            for r in range(rows):
                source = qkv + 4 * (
                    (first_row + r) // group * stride + (head * group + (first_row + r) % group) * HEAD_DIM
                )
                for d in range(0, HEAD_DIM, 16):
                    vstore(q + 4 * (r * HEAD_DIM + d), vload(source + 4 * d))
            last = start + (first_row + rows - 1) // group
            for first in range(0, last + 1, SPAN):
                into = part if first else total
                any_span(
                    rows, q, first_row, group, start, first, get_i64(block + B.pages), offset,
                    get_i64(block + B.value_offset), s, into,
                )  # fmt: skip
                if first:
                    for r in range(rows):
                        if get_f32(part + 4 * PART * r + 4) > f32(0.0):
                            merge(total + 4 * PART * r, part + 4 * PART * r)
            for r in range(rows):
                target = qkv + 4 * (
                    (first_row + r) // group * stride + (head * group + (first_row + r) % group) * HEAD_DIM
                )
                finish(total + 4 * PART * r, target)
            first_row += rows

    @kernel
    def attend_span(block, layer, head, first, qkv, scratch):  # type: ignore[no-untyped-def]
        """One span of a single token's rows of a KV head, kept as partials for `merge_spans`."""
        heads, kv_heads = get_i64(block + B.n_heads), get_i64(block + B.n_kv_heads)
        group, start = heads // kv_heads, get_i64(block + B.start)
        offset = layer * get_i64(block + B.layer_bytes) + head * get_i64(block + B.head_bytes)
        r = 0
        while r < group:
            left = group - r
            rows = ROW_TILE if left >= ROW_TILE else (3 if left >= 3 else 1)
            h = head * group + r
            part = get_i64(block + B.parts) + 4 * PART * (first // SPAN * heads + h)
            any_span(
                rows, qkv + 4 * HEAD_DIM * h, r, group, start, first, get_i64(block + B.pages), offset,
                get_i64(block + B.value_offset), scratch + 4 * ROW_TILE * HEAD_DIM, part,
            )  # fmt: skip
            r += rows

    @kernel
    def merge_spans(block, qkv):  # type: ignore[no-untyped-def]
        heads = get_i64(block + B.n_heads)
        parts = get_i64(block + B.parts)
        for h in range(heads):
            for first in range(SPAN, get_i64(block + B.start) + 1, SPAN):
                merge(parts + 4 * PART * h, parts + 4 * PART * (first // SPAN * heads + h))
            finish(parts + 4 * PART * h, qkv + 4 * HEAD_DIM * h)

    @kernel
    def attention(block, layer, counter, qkv, scratch):  # type: ignore[no-untyped-def]
        heads, kv_heads = get_i64(block + B.n_heads), get_i64(block + B.n_kv_heads)
        n = get_i64(block + B.n)
        if n == 1:
            spans = get_i64(block + B.start) // SPAN + 1
            while True:
                i = claim(counter, 0, 1)
                if i >= spans * kv_heads:
                    return
                attend_span(block, layer, i % kv_heads, i // kv_heads * SPAN, qkv, scratch)
        rows = n * (heads // kv_heads)
        tiles = (rows + ROW_TILE - 1) // ROW_TILE
        while True:
            i = claim(counter, 0, 1)
            if i >= tiles * kv_heads:
                return
            # the longest rows first, so that the last claim is a short one
            tile = tiles - 1 - i // kv_heads
            attend_rows(block, layer, i % kv_heads, tile * ROW_TILE, min(rows, (tile + 1) * ROW_TILE), qkv, scratch)

    def forward(block, tid):  # type: ignore[no-untyped-def]
        team, threads, n = get_i64(block + B.team), get_i64(block + B.threads), get_i64(block + B.n)
        counters = get_i64(block + B.counters)
        dim, hidden = get_i64(block + B.dim), get_i64(block + B.hidden_dim)
        heads, kv_heads = get_i64(block + B.n_heads), get_i64(block + B.n_kv_heads)
        eps = get_f32(block + B.eps)
        x, qkv, gate = get_i64(block + B.x), get_i64(block + B.qkv), get_i64(block + B.gate)
        attn_scratch = get_i64(block + B.scratch) + tid * get_i64(block + B.scratch_bytes)
        row = attn_scratch + ATTENTION_SCRATCH
        unpacked = row + 4 * get_i64(block + B.max_k)
        q_dim, kv_dim = heads * HEAD_DIM, kv_heads * HEAD_DIM
        width = q_dim + 2 * kv_dim

        embed = get_i64(block + B.embed)
        while True:
            t = claim(counters, 0, 1)
            if t >= n:
                break
            token = get_i64(get_i64(block + B.ids) + 8 * t)
            call_row(
                get_i64(block + B.embed_row),
                get_i64(embed + W.panel),
                get_i64(embed + W.blocks),
                token,
                x + 4 * t * dim,
                unpacked,
            )
        if barrier(team, threads):
            return
        for i in range(get_i64(block + B.n_layers)):
            layer = get_i64(block + B.layers) + i * LAYER.bytes
            counter = counters + (1 + i * PHASES) * LINE
            wq, wk, wv, wo, wd = layer + LAYER.q, layer + LAYER.k, layer + LAYER.v, layer + LAYER.o, layer + LAYER.down
            wg, wu = layer + LAYER.gate, layer + LAYER.up

            tq, tk, tv = get_i64(wq + W.terms), get_i64(wk + W.terms), get_i64(wv + W.terms)
            while True:
                t = claim(counter, 0, 1)
                if t >= n:
                    break
                rmsnorm(x + 4 * t * dim, get_i64(layer + LAYER.attn_norm), dim, eps, row)
                prepare(block, row, dim, t, max(tq, tk, tv), min(tq, tk, tv) == 0)
            if barrier(team, threads):
                return
            multiply(block, wq, counter + LINE, qkv, width, 0, unpacked)
            multiply(block, wk, counter + 2 * LINE, qkv + 4 * q_dim, width, 0, unpacked)
            multiply(block, wv, counter + 3 * LINE, qkv + 4 * (q_dim + kv_dim), width, 0, unpacked)
            if barrier(team, threads):
                return
            while True:
                item = claim(counter, 4, 1)
                if item >= n * kv_heads:
                    break
                store_kv(block, i, item // kv_heads, item % kv_heads, qkv, attn_scratch)
            if barrier(team, threads):
                return
            attention(block, i, counter + 5 * LINE, qkv, attn_scratch)
            if barrier(team, threads):
                return
            while True:
                t = claim(counter, 6, 1)
                if t >= n:
                    break
                if n == 1:
                    merge_spans(block, qkv)
                prepare(block, qkv + 4 * t * width, q_dim, t, get_i64(wo + W.terms), get_i64(wo + W.terms) == 0)
            if barrier(team, threads):
                return
            multiply(block, wo, counter + 7 * LINE, x, dim, 1, unpacked)
            if barrier(team, threads):
                return
            tg, tu = get_i64(wg + W.terms), get_i64(wu + W.terms)
            while True:
                t = claim(counter, 8, 1)
                if t >= n:
                    break
                rmsnorm(x + 4 * t * dim, get_i64(layer + LAYER.ffn_norm), dim, eps, row)
                prepare(block, row, dim, t, max(tg, tu), min(tg, tu) == 0)
            if barrier(team, threads):
                return
            gated(block, layer, counter + 9 * LINE, unpacked)
            if barrier(team, threads):
                return
            while True:
                t = claim(counter, 10, 1)
                if t >= n:
                    break
                prepare(block, gate + 4 * t * hidden, hidden, t, get_i64(wd + W.terms), get_i64(wd + W.terms) == 0)
            if barrier(team, threads):
                return
            multiply(block, wd, counter + 11 * LINE, x, dim, 1, unpacked)
            if barrier(team, threads):
                return
        last = counters + (1 + get_i64(block + B.n_layers) * PHASES) * LINE
        while True:
            t = claim(last, 0, 1)
            if t >= n:
                break
            rmsnorm(x + 4 * t * dim, get_i64(block + B.final_norm), dim, eps, get_i64(block + B.out) + 4 * t * dim)
        barrier(team, threads)

    return forward


def classify(block, tid):  # type: ignore[no-untyped-def]
    """logits (n, 16 head.groups) = out (n, dim) times the classifier."""
    team, threads, n = get_i64(block + B.team), get_i64(block + B.threads), get_i64(block + B.n)
    counters, dim, head = get_i64(block + B.counters), get_i64(block + B.dim), get_i64(block + B.head)
    unpacked = (
        get_i64(block + B.scratch)
        + tid * get_i64(block + B.scratch_bytes)
        + ATTENTION_SCRATCH
        + 4 * get_i64(block + B.max_k)
    )
    while True:
        t = claim(counters, 0, 1)
        if t >= n:
            break
        row = get_i64(block + B.out) + 4 * t * dim
        prepare(block, row, dim, t, get_i64(head + W.terms), get_i64(head + W.terms) == 0)
    if barrier(team, threads):
        return
    stride = 16 * get_i64(head + W.groups)
    multiply(block, head, counters + LINE, get_i64(block + B.logits), stride, 0, unpacked)
    barrier(team, threads)
