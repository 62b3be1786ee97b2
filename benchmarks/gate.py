"""Has smolrun become slower? Ratios of one run, held against committed ones: tokens per second are the machine's.

    python benchmarks/gate.py             # about a minute; exit 1 on a clear fall
    python benchmarks/gate.py --update    # measure three times and commit the medians as this CPU's baseline

Two kinds of ratio for each format and thread count, the best of N samples over the best of N: our prefill and decode
over llama.cpp's on the same file in the same minute, and our decode's bytes over the measured read bandwidth. A ratio
falls clearly when it is below MARGIN of its baseline in ATTEMPTS of ATTEMPTS runs: a virtual machine moves a ratio on
two threads by 30 %, a kernel that lost its vectors by 300 %. A CPU without a baseline is reported and never fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import machine, write_json

from smolrun import bench, peer
from smolrun.bench import Report
from smolrun.files.sources import resolve
from smolrun.kernels import target

BASELINES = Path(__file__).parent / "results" / "gate.json"
FORMATS = ("Q4_0", "Q8_0")
PREFILL, DECODE, REPEATS = 256, 48, 5
MARGIN, ATTEMPTS = 0.5, 2
UPDATES = 3


@dataclass(frozen=True)
class Verdict:
    """One ratio beside its baseline, which is None on a CPU or for a test that has none."""

    name: str
    found: float
    baseline: float | None

    @property
    def share(self) -> float | None:
        """Found over baseline."""
        return self.found / self.baseline if self.baseline else None

    @property
    def fell(self) -> bool:
        return self.share is not None and self.share < MARGIN


def ratios(reports: Sequence[Report]) -> dict[str, float]:
    """Name -> ratio, of everything that was measured."""
    out: dict[str, float] = {}
    for report in reports:
        for row in report.rows:
            name, best = f"{report.weight_format} {row.test} t{row.threads}", max(row.samples)
            out[f"{name} / llama.cpp"] = best / max(row.peer)
            if row.bytes_per_token:
                out[f"{name} / read peak"] = best * row.bytes_per_token / row.peak
    return out


def judge(found: Mapping[str, float], baseline: Mapping[str, float]) -> list[Verdict]:
    """A verdict for each ratio, in the order measured."""
    return [Verdict(name, value, baseline.get(name)) for name, value in found.items()]


def fallen(attempts: Sequence[Sequence[Verdict]]) -> list[str]:
    """Names of the ratios that fell in every attempt."""
    return [v.name for v in attempts[0] if all(any(w.fell and w.name == v.name for w in a) for a in attempts)]


def table(verdicts: Sequence[Verdict]) -> str:
    """For people."""
    lines = [f"{'ratio':<28}{'found':>8}{'baseline':>10}{'share':>8}"]
    for v in verdicts:
        known = f"{v.baseline:>10.2f}{v.share:>8.0%}" if v.baseline else f"{'none':>10}"
        lines.append(f"{v.name:<28}{v.found:>8.2f}{known}{'  fell' if v.fell else ''}")
    return "\n".join(lines)


def this_cpu() -> str:
    """The key of a baseline: ratios of another CPU, tier or number of cores say nothing about this one."""
    here = machine()
    return f"{here['cpu']}, {here['cores']} cores, {target.choose().name}"


def measure() -> dict[str, float]:
    """One run: the installed model in each format."""
    with tempfile.TemporaryDirectory() as folder:
        reports = []
        for fmt in FORMATS:
            path = Path(folder, f"{fmt}.gguf")
            peer.requantise(resolve(None, offline=True), path, fmt)
            reports.append(
                bench.run(
                    path, prompt_sizes=(PREFILL,), decode_sizes=(DECODE,), repeats=REPEATS, compare="llama.cpp"
                )  # checks the logits too
            )
        return ratios(reports)


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each ratio over runs."""
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write this CPU's baseline")
    parser.add_argument("--baselines", type=Path, default=BASELINES)
    options = parser.parse_args()
    known: dict[str, Any] = json.loads(options.baselines.read_text(encoding="utf-8"))
    cpu = this_cpu()
    if options.update:
        runs = [measure() for _ in range(UPDATES)]
        known[cpu] = medians(runs)
        write_json(options.baselines, known)
        spread = max(max(run[n] for run in runs) / min(run[n] for run in runs) for n in runs[0])
        print(
            table(judge(runs[0], known[cpu])),
            f"baseline of {cpu} written; runs differ by {spread:.2f}x at most",
            sep="\n",
        )
        return 0
    if cpu not in known:
        print(f"no baseline for {cpu}: nothing can fail (--update makes one)")
    attempts: list[list[Verdict]] = []
    for _ in range(ATTEMPTS):
        attempts.append(judge(measure(), known.get(cpu, {})))
        print(table(attempts[-1]), flush=True)
        if not fallen(attempts):
            return 0
        print(f"below {MARGIN:.0%} of the baseline: {', '.join(fallen(attempts))}")
    print(f"slower in {ATTEMPTS} of {ATTEMPTS} runs: find the change, or say why and run benchmarks/gate.py --update")
    return 1


if __name__ == "__main__":
    sys.exit(main())
