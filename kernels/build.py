"""The compiling child: `python -m smolrun.kernels.build KIND TIER NAME ...` writes code to stdout as it is done.

KIND is "image" (a file of image.py), "object" (what link.py takes) or "assembly" (text). A process per tier, because
LLVM's target is fixed at Numba's first compile; a child, because then the run-time never imports Numba (0.5 s and 90
MB) and a forced or foreign tier is the same road as the host's. Frames on stdout: one JSON line, then the bytes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable

from .block import KV_PAIRS
from .target import ALL_TIERS

NAMES = """forward_KIND forward_KIND_KIND (K and V of the cache) classify team_rouse team_run worker_loop
matmul_FORMAT_int8 matmul_FORMAT_int8x2 matmul_FORMAT_f32 row_FORMAT
op_NAME (training: backward.OPS) pairs_matmul (bf16)
smolrun_FUNCTION (of smolrun.h; for the plainest tier) smolrun_symbol,NAME,... (what a library of these names holds)
read_STREAMS peak_int8 peak_f32 hand_over (measure the machine)
rmsnorm swiglu rope quantise interleave half (for tests alone)"""


def _function(name: str):  # type: ignore[no-untyped-def]
    """(function, signature) of an entry point."""
    from . import forward, matmul, pointwise, team
    from .simd import f32, i64, void

    kind, _, rest = name.partition("_")
    if kind == "forward":
        return forward.make_forward(*KV_PAIRS[rest]), forward.PASS
    if name == "classify":
        return forward.classify, forward.PASS
    if name == "pairs_matmul":
        from . import bf16

        return bf16.make_matmul(), matmul.MATMUL
    if kind == "matmul":
        fmt, _, mode = rest.rpartition("_")
        return matmul.make_matmul(fmt, {"int8": 1, "int8x2": 2, "f32": 0}[mode]), matmul.MATMUL
    if kind == "op":
        from . import backward

        return backward.make_op(rest), forward.PASS
    if kind == "row":
        return matmul.make_row(rest), matmul.ROW
    if kind == "read":
        return pointwise.make_read(int(rest)), pointwise.READ
    if kind == "peak":
        return matmul.make_peak({"int8": 1, "f32": 0}[rest]), matmul.PEAK
    if kind == "smolrun":
        from . import capi

        symbol, _, names = name.partition(",")
        return (capi.make_symbol(names.split(",")), i64(i64)) if names else capi.function(symbol)
    if name in ("team_rouse", "team_run", "worker_loop", "hand_over"):
        return getattr(team, name), i64(i64, i64, i64)
    arguments = {
        "rmsnorm": (i64, i64, i64, f32, i64),
        "swiglu": (i64, i64, i64),
        "rope": (i64, i64, f32, i64),
        "quantise": (i64, i64, i64, i64, i64),
        "interleave": (i64, i64, i64, i64),
        "half": (i64, i64, i64),
    }
    if name in arguments:
        return getattr(pointwise, name).py_func, void(*arguments[name])
    raise ValueError(f"no kernel {name!r}; there are {NAMES}")


def main(kind: str, tier: str, names: Iterable[str], triple: str = "") -> None:
    """Compile entry points for a tier; triple: for which system, "": this one."""
    target = ALL_TIERS[tier]
    os.environ.update(SMOLRUN_BUILD_TIER=tier, NUMBA_CPU_NAME=target.cpu, NUMBA_CPU_FEATURES=target.features)
    # Numba's own optimiser would run on every function before it is linked: ours runs once, on the whole (jit.py)
    os.environ.update(NUMBA_DISABLE_JIT="0", NUMBA_OPT="0", NUMBA_DEBUGINFO="0")
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing but frames goes to stdout
    from .image import link, seal
    from .jit import compile_c
    from .load import image_key

    for name in names:
        began = time.perf_counter()
        emit = "assembly" if kind == "assembly" else "object"
        code = compile_c(name.partition(",")[0], *_function(name), emit, triple)
        code = seal(*link(code), image_key(target, name)) if kind == "image" else code
        frame = {"name": name, "bytes": len(code), "seconds": round(time.perf_counter() - began, 3)}
        out.write(json.dumps(frame).encode() + b"\n" + code)
        out.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
