"""What each op of training is told: one block of 64-bit words an op, named here. Nothing here needs Numba.

An op is a job of the team over a number of items that own their outputs: tiles of tokens, row groups, heads. Threads
claim items through `counter`, so bits do not depend on their number.

    word     0         1        2         3               4 ...
            [counter] [items]  [scratch] [scratch_bytes]  the op's own, in the order below

Letters: n tokens, k columns; addresses unless said; strides in floats. Rows are f32, one token after the other.

    source      rows x (stride, n, k), and what is done to a row first, in this order:
                  norm    weight of an RMSNorm (eps), or 0
                  up      rows (up_stride) of SwiGLU's other operand: silu(x) * up, or 0
                  keep    f32: dropout, each element kept with this probability and divided by it (seed), or 1
                  factor  f32
    operands of a product, drawn in matmul.py and panels.py; T tokens of a tile:
      tiles     [tile of T][k][T]   its x, summed over k        a token is a row of the source
      columns   [tile of T][n][T]   its x, summed over tokens   a "token" is a column of the source; n a multiple of 32
      panels    [k / 16][n][16]     its w, summed over tokens   lanes are columns of the source
      turned    [k / 16][rows][16]  its w, summed over rows of a weight matrix: the matrix, transposed
"""

from __future__ import annotations

from .block import words

SOURCE = "x stride n k norm eps up up_stride keep seed factor"


def _op(names: str):  # type: ignore[no-untyped-def]
    return words("counter items scratch scratch_bytes " + names)


TILES = _op(SOURCE + " out")
COLUMNS = _op(SOURCE + " rows out")  # rows: n rounded up to 32; the rest is zero
ROW_PANELS = _op(SOURCE + " rows out")
TURN = _op("w groups blocks rows out")  # rows: of the output, from the first group on; beyond the groups they are zero
PAIRS = _op("w blocks out")  # for bf16, drawn in bf16.py
MULTIPLY = _op("matmul w blocks groups step x n y stride group_bytes add")
COPY = _op(SOURCE + " out out_stride add")
EMBED = _op("look_up w blocks ids dim out")
NORM_BACK = _op("x n dim weight eps dy dx parts")
SUM_PARTS = _op("parts count width out")
SWIGLU_BACK = _op("gate gate_stride up up_stride dh n k")
STORE_KV = _op("block layer qkv")
ATTEND = _op("block layer qkv")
MERGE = _op("block qkv stride segment")
ATTEND_BACK = _op("block layer q out dout dq dk dv")
ROPE_BACK = _op("block dq dk dv dqkv")
TILES_OF_PANELS = _op("panels rows n groups first count out")  # `count` groups from `first` on; beyond `groups` zero
LOSS = _op("logits rows n groups vocab targets weights stats gradient")
EMBED_BACK = _op("ids n dim dx dw")
SQUARES = _op("x count parts")
ADAMW = _op("count p g m v lr beta1 beta2 eps decay correction1 correction2 clip")

WORDS = {
    "tiles": TILES,
    "columns": COLUMNS,
    "panels": ROW_PANELS,
    "panel_tiles": TILES_OF_PANELS,
    "multiply": MULTIPLY,
    "copy": COPY,
    "embed": EMBED,
    "store": STORE_KV,
    "attend": ATTEND,
    "merge": MERGE,
    "norm_back": NORM_BACK,
    "sum": SUM_PARTS,
    "swiglu_back": SWIGLU_BACK,
    "attend_back": ATTEND_BACK,
    "rope_back": ROPE_BACK,
    "loss": LOSS,
    "embed_back": EMBED_BACK,
    "squares": SQUARES,
    "adamw": ADAMW,
}
PER_FORMAT = {"turn": TURN, "pairs": PAIRS}  # + "_FORMAT"
IN_PAIRS = ("tiles", "columns", "panels", "panel_tiles", "turn")  # also + "_bf16": their output in pairs of bf16

TOKENS = 32  # tokens of an item of most ops, and what counts of them are rounded up to where they are summed over
COLUMN_STEP = 32  # columns of an item of EMBED_BACK
CHUNK = 1 << 14  # numbers of an item of SQUARES and ADAMW
QUERY_TILE = 64  # queries and keys of a tile of attention's backward pass

# Bytes of scratch of a thread: a tile of sources, or attention's tiles (backward.py), or an unpacked row group
ATTEND_BACK_SCRATCH = 4 * (13 * QUERY_TILE * QUERY_TILE + QUERY_TILE)
