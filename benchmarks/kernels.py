"""Speed of every matmul kernel on every tier of this CPU, one thread: GMAC/s, and GB/s of weights read.

    python benchmarks/kernels.py [--tiers avx2,...] [--only Q4_0_int8] [--tokens 1,14,252] [--repeats 9] [--json FILE]

Shapes and formats are tests/naive.py's CASES. No figure without its check: the timed result must lie within the case's
error budget of the float64 truth and have the same bits on every tier measured; else the run fails. Weights lie in the
caches when they fit there, as between two claims of a pass; for the memory's own speed see `smolrun bench`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import naive
from calling import Kernels
from naive import BUDGETS, CASES, TERMS, Case
from smolrun.kernels import load
from smolrun.kernels.panels import ROWS, pack
from smolrun.kernels.target import runnable

CLAIM_BYTES = 128 << 10  # as the run-time's: so many bytes of weights meet all tokens before the next ones
SAMPLE_SECONDS = 0.02  # one sample is as many calls as take about this long


def seconds_per_call(run: Callable[[], object], repeats: int) -> list[float]:
    """Samples of the time of one call, the first ones to warm up not among them."""
    began = time.perf_counter()
    run()
    calls = max(1, int(SAMPLE_SECONDS / max(time.perf_counter() - began, 1e-7)))
    samples = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        for _ in range(calls):
            run()
        samples.append((time.perf_counter() - began) / calls)
    return samples[1:]


def measure(kernels: Kernels, case: Case, repeats: int) -> dict[str, object]:
    """One row of the table; SystemExit where the result is wrong."""
    raw = naive.blocks(case.format, case.rows, case.k)
    x = np.random.default_rng(1).standard_normal((case.tokens, case.k)).astype(np.float32)
    size, groups = pack(case.format, raw, case.rows).nbytes, -(-case.rows // ROWS)
    step = max(1, CLAIM_BYTES * groups // size)
    run, result = kernels.prepared(case, raw, x, [(g, min(g + step, groups)) for g in range(0, groups, step)])
    samples = seconds_per_call(run, repeats)
    y, w = result(), naive.weights(case.format, raw)
    error = naive.relative_error(y, w, naive.seen(x, TERMS[case.mode]), x)
    if error > BUDGETS[case.format, case.mode].arithmetic:
        raise SystemExit(f"{case} on {kernels.tier.name} is wrong: error {error:.2e}")
    median = statistics.median(samples)
    spread = (max(samples) - min(samples)) / median
    return {
        "tier": kernels.tier.name,
        **asdict(case),
        "gmac_s": case.rows * case.k * case.tokens / median / 1e9,
        "gb_s": size / median / 1e9,
        "best_gmac_s": case.rows * case.k * case.tokens / min(samples) / 1e9,
        "spread": spread,
        "samples": len(samples),
        "error": error,
        "hash": hashlib.sha256(y.tobytes()).hexdigest()[:16],
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiers", default=",".join(t.name for t in runnable()))
    parser.add_argument("--only", default="", help="FORMAT_MODE, or a part of it")
    parser.add_argument("--tokens", default="1,14,252")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tokens = [int(n) for n in options.tokens.split(",")]
    shapes = [replace(c, tokens=n) for c in CASES if c.rows % ROWS == 0 and options.only in c.name for n in tokens]
    rows: list[dict[str, object]] = []
    hashes: dict[str, object] = {}
    print(f"{'tier':<12}{'kernel':<16}{'rows x k':>12}{'n':>5}{'GMAC/s':>9}{'GB/s':>8}{'spread':>8}  hash")
    for tier in options.tiers.split(","):
        kernels = Kernels(tier)
        load.addresses(kernels.tier, [c.name for c in shapes])  # compiled together, by one child
        for case in shapes:
            row = measure(kernels, case, options.repeats)
            if hashes.setdefault(str(case), row["hash"]) != row["hash"]:
                raise SystemExit(f"{case}: {tier} has other bits than {rows[0]['tier']}")
            rows.append(row)
            print(
                f"{tier:<12}{case.format + ' ' + case.mode:<16}{f'{case.rows} x {case.k}':>12}{case.tokens:>5}"
                f"{row['gmac_s']:>9.1f}{row['gb_s']:>8.1f}{row['spread']:>8.0%}  {row['hash']}",
                flush=True,
            )
    if options.json:
        document = {"cpu": platform.processor() or platform.machine(), "threads": 1, "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
