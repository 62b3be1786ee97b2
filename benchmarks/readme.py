"""README's tables, made from benchmarks/results/*.json so that no figure is typed by hand.

smolrun bench MODEL --compare llama.cpp --format json -o benchmarks/results/bench-NAME.json
smolrun verify MODEL --text FILE --json > benchmarks/results/verify-NAME.json
python benchmarks/readme.py            # rewrites the part of README.md between the markers
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures: made by benchmarks/readme.py -->\n", "<!-- end of figures -->\n"


def _load(kind: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(f"{kind}-*.json"))]


def speed(reports: list[dict[str, Any]]) -> str:
    """One line a model, test and thread count."""
    lines = [
        "| model | test | threads | smolrun tok/s | llama.cpp tok/s (best) | ratio (to its best) | of read peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        for row in report["rows"]:
            peak = f"{row['share_of_peak']:.0%}" if row["share_of_peak"] else ""
            lines.append(
                f"| {Path(report['model']).stem} | {row['test']} | {row['threads']} | {row['tokens_per_s']:,.0f} "
                f"± {row['spread']:.0%} | {row['peer_tokens_per_s']:,.0f} ({row['peer_best']:,.0f}) "
                f"| **{row['ratio']:.2f}x** ({row['ratio_to_best']:.2f}x) | {peak} |"
            )
    return "\n".join(lines)


def accuracy(reports: list[dict[str, Any]]) -> str:
    """One line a model and precision."""
    lines = [
        "| model | precision | mean KL: smolrun | llama.cpp | top-1: smolrun | llama.cpp "
        "| perplexity: exact | smolrun | llama.cpp |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in reports:
        ours, peer = r["ours"], r["peer"]
        lines.append(
            f"| {Path(r['model']).stem} | {r['precision']} | **{ours['kl_mean']:.1e}** | {peer['kl_mean']:.1e} "
            f"| {ours['top1']:.4f} | {peer['top1']:.4f} "
            f"| {r['exact_ppl']:.3f} | {ours['ppl']:.3f} | {peer['ppl']:.3f} |"
        )
    return "\n".join(lines)


def figures() -> str:
    """The whole generated part."""
    benches, checks = _load("bench"), _load("verify")
    machine = (RESULTS / "machine.txt").read_text(encoding="utf-8").strip()
    read = "; ".join(
        f"{Path(b['model']).stem} " + ", ".join(f"{p / 1e9:.1f} GB/s with {n}" for n, p in b["bandwidth"].items())
        for b in benches
    )
    cold = "; ".join(
        f"{Path(b['model']).stem} {b['first_token']:.2f} s, {b['peak_memory'] / 1e6:.0f} MB" for b in benches
    )
    tokens = ", ".join(sorted({f"{r['tokens']:,} tokens of wiki.test.raw in windows of {r['window']}" for r in checks}))
    return f"""{machine} Medians; every sample is in `benchmarks/results/`.

{speed(benches)}

Read bandwidth measured in the same runs, by threads: {read}.
First token after the start of a fresh process, and its peak memory after 128 tokens at context 2,048: {cold}.

Against the exact model (the file's weights as f32), {tokens}:

{accuracy(checks)}
"""


def insert(readme: str, text: str) -> str:
    """README with the generated part replaced."""
    head, rest = readme.split(BEGIN)
    return head + BEGIN + text + END + rest.split(END)[1]


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(insert(path.read_text(encoding="utf-8"), figures()), encoding="utf-8")
