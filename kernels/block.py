"""The argument blocks: all that a kernel is told, as one array of 64-bit words. Nothing here needs Numba.

    word     0        1       2      ...
            [n]      [dim]   [..]                 int64 counts, addresses, or the bits of an f32

Kernels read a word by its index (`get_i64(block + 8 * B.dim)`), Python writes it by its name; both take the index from
here.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.int64]


def constants(**named: int) -> Any:
    """Named integers that Numba freezes into the code: a named tuple (it knows no other namespace of ours)."""
    return namedtuple("constants", named)(**named)  # type: ignore[misc]


def words(names: str) -> Any:
    """Names -> byte offsets of consecutive 64-bit words; `.size` is their number."""
    listed = names.split()
    return constants(**{name: 8 * i for i, name in enumerate(listed)}, size=len(listed))


# One pass over n tokens of one or more sequences, a segment each. Buffers, f32 unless said, rows of a token one after
# the other, segment after segment:
#   x (n, dim)   qkv (n, q_dim + 2 kv_dim), attention writes its output over q   gate, up (n, hidden_dim)   out (n, dim)
#   act, act_2, act_f32: activations as the next matmuls read them: one int8 term, two, f32 (drawn in matmul.py)
#   parts (spans, n_heads, PART) of each segment in turn: attention of a single token, its context split over threads
#   rows: how many of the last tokens out is wanted of; where it is not n, the pass is of one segment
#   behind: tokens before the block's own in the u of adapters, which are of all threads (forward.alone)
#   logits (n, 16 head.groups)   softmax (n, n_heads, 2): m and l of each row of attention, for training; or 0
B = words(
    "team counters threads n rows n_segments segments dim hidden_dim n_layers n_heads n_kv_heads eps tile_f32 tile_1 "
    "tile_2 max_k ids x act act_2 act_f32 qkv parts gate up out logits scratch scratch_bytes "
    "layer_bytes head_bytes value_offset rope layers final_norm embed_row embed head softmax behind"
)

# One segment: tokens first .. first + count - 1 of the pass are positions start, start + 1, ... of a sequence. pages:
# address of its table of page addresses; parts: address of its partials.
#
#     tokens      a17 b0 b1 b2 b3 c99      segments   first 0 count 1 start 17    first 1 count 4 start 0    first 5 ...
S = words("first count start pages parts")

# One weight matrix: the kernel that multiplies it, its panels, row groups, k / 32, row groups of one claim, int8 terms
# of its activations (0: f32), and the words of its adapter (0: none).
W = words("matmul panel groups blocks step terms adapter")

# A low-rank adapter beside a matrix: y += u up^T, u = scale x down^T (LoRA, arXiv 2106.09685), all of it f32 whatever
# the matrix. down (rank, k) and up (rows, rank) are F32 panels, `matmul` their kernel. groups: row groups of down;
# blocks: of 32 ranks, zeros beyond the last; u: as the activations of a matmul, for all tokens of a pass; place: of the
# matrix among those that read the same x.
A = words("matmul down up groups blocks scale u place")
MOST_RANK = 1024

# One layer: two norms (addresses of f32 (dim,)), then seven matrices of W.size words.
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
L = words("attn_norm ffn_norm " + " ".join(f"{m}_{i}" for m in MATRICES for i in range(W.size)))
LAYER = constants(
    **{m: getattr(L, f"{m}_0") for m in MATRICES}, attn_norm=L.attn_norm, ffn_norm=L.ffn_norm, bytes=8 * L.size
)

# The team. Words that are spun on or added to stand on cache lines of their own.
LINE = 64
PHASES = 10  # claim counters of one layer, each on its line
T = constants(
    generation=0 * LINE,  # jobs posted so far; workers wait for it to change
    open=1 * LINE,  # 1 while the job may be entered
    inside=2 * LINE,  # workers that entered it and have not left
    cancel=3 * LINE,  # set from Python at any time: threads leave at their next wait
    threads=4 * LINE,
    job=4 * LINE + 8,  # address of f(block, tid)
    argument=4 * LINE + 16,
    give_way=4 * LINE + 24,  # address of sched_yield
    awake=4 * LINE + 32,  # a job is about to be posted: nobody goes to sleep
    asleep=5 * LINE,  # one line a thread
)
MAX_THREADS = 256
TEAM_BYTES = T.asleep + MAX_THREADS * LINE

HEAD_DIM = 64
PAGE = 64  # positions of a KV page
SPAN = 512  # positions whose softmax is computed together; spans merge in order
ROW_TILE = 6  # attention rows computed together
PART = 16 + HEAD_DIM  # floats of a partial result: m, l, 14 unused, o[64]

# Kinds of elements of a KV cache, K and V each: bytes of 32 dims of one position. A pair of kinds is one forward pass.
KV_BYTES = {"f32": 128, "f16": 64, "bf16": 64, "q8_0": 34, "q4_0": 18}
KV_PAIRS = {k if k == v else f"{k}_{v}": (k, v) for k in KV_BYTES for v in KV_BYTES}


def f32_bits(value: float) -> int:
    """The bits of a float32 as an int."""
    return int(np.float32(value).view(np.int32))


# Scratch of attention: queries f32 (rows, 64), then int8 records of them, 256 bytes a row;
QUERIES_SCRATCH = ROW_TILE * (4 * HEAD_DIM + 256)
# that of a span: scores; where V is quantised, i16 weights of a page's two blocks, the blocks' scales, 2 x 16 factors.
SPAN_SCRATCH = 4 * ROW_TILE * SPAN + 2 * (2 * ROW_TILE * PAGE + 4 * PAGE + 64)
# A thread's scratch: attention's, partials and a copy of one head; then one row of max_k floats, and as activations of
# 4 bytes a float each (two int8 terms, one, f32); then what is unpacked; then u of three adapters; at the end the
# block, the segment and the claim counters of a section of the tokens.
ATTENTION_SCRATCH = QUERIES_SCRATCH + SPAN_SCRATCH + 4 * (2 * ROW_TILE * PART + HEAD_DIM)


# Where many tokens multiply what was unpacked once (matmul.py): blocks of two row groups, each up to four f32 of a row
# for its scales, one for what is crossed, and 32 bytes; behind them sums of so many tokens, f32 of 32 rows.
SPREAD_BLOCKS, SPREAD_TOKENS = 18, 504
SPREAD_BYTES = SPREAD_BLOCKS * 2 * 16 * (4 * 5 + 32) + SPREAD_TOKENS * 2 * 16 * 4


def unpack_bytes(max_k: int) -> int:
    """Bytes of scratch that a matmul unpacks to: a row group as f32, or what is spread."""
    return max(64 * max_k, SPREAD_BYTES)


TAIL_BYTES = 8 * (B.size + S.size) + PHASES * LINE


def scratch_bytes(max_k: int) -> int:
    """Bytes of scratch a thread needs for matrices of up to max_k columns; a multiple of a cache line."""
    size = ATTENTION_SCRATCH + (4 + 12) * max_k + unpack_bytes(max_k) + 3 * 4 * MOST_RANK + TAIL_BYTES
    return -(-size // LINE) * LINE
