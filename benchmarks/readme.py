"""README's tables and its plot, made from benchmarks/results/*.json so that no figure is typed by hand.

python benchmarks/peers.py             # results/peers.json
python benchmarks/edge.py              # results/edge.json, the table of ARM
python benchmarks/train.py --save      # results/train.json
smolrun verify MODEL --text FILE --json > benchmarks/results/verify-NAME.json
python benchmarks/readme.py            # rewrites the parts of README.md between the markers
python benchmarks/readme.py --plot     # and results/peers.svg (needs matplotlib: pip install "smolrun[plot]")
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from math import floor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- {}: made by benchmarks/readme.py -->\n", "<!-- end of {} -->\n"
PLOT = RESULTS / "peers.svg"
PLAIN = "smolrun fast"

Row = dict[str, Any]


def _load(kind: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(f"{kind}-*.json"))]


def median(samples: list[float]) -> float:
    """Middle of the sorted samples."""
    ordered = sorted(samples)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def never_up(ratio: float) -> str:
    """Two digits, cut off and not rounded."""
    return f"{floor(100 * ratio) / 100:.2f}"


def family(result: dict[str, Any]) -> str:
    """The runtime of a result: `llama.cpp` of `llama.cpp q4_0 flash=off`."""
    return str(result["name"].split()[0])


def best_of(row: Row, runtime: str) -> dict[str, Any] | None:
    """A runtime's fastest setting in a row, by its median; the failed one if all failed, None if it was not there."""
    there = [r for r in row["results"] if family(r) == runtime]
    done = [r for r in there if r["samples"]]
    return max(done, key=lambda r: median(r["samples"])) if done else next(iter(there), None)


def cells(ours: dict[str, Any], peer: dict[str, Any]) -> tuple[str, str, str, str]:
    """(ours, share of the read peak, peer, ratio) at one thread count."""
    if not ours["samples"] or not peer["samples"]:
        return "", "", f"failed: {ours['failed'] or peer['failed']}", ""
    mine, theirs, best = median(ours["samples"]), median(peer["samples"]), max(peer["samples"])
    spread = (max(ours["samples"]) - min(ours["samples"])) / 2 / mine
    share = f"{floor(100 * ours['share_of_peak'])}%" if ours["share_of_peak"] else ""
    ratio = f"**{never_up(mine / theirs)}x** ({never_up(mine / best)}x)"
    return f"{mine:,.0f} ± {spread:.0%}", share, f"{theirs:,.0f} ({best:,.0f})", ratio


def speed(rows: Iterable[Row], runtimes: Iterable[str]) -> str:
    """A line for each model, test, setting of ours and peer; a group of columns for each thread count."""
    rows, runtimes = list(rows), list(runtimes)
    counts = sorted({row["threads"] for row in rows})
    lines: dict[tuple[str, ...], dict[int, tuple[str, ...]]] = {}
    for row in rows:
        for ours in (r for r in row["results"] if family(r) == "smolrun"):
            setting = "" if ours["name"] == PLAIN else f" ({ours['name'].removeprefix('smolrun ')})"
            for peer in filter(None, (best_of(row, name) for name in runtimes)):
                model = f"{row['size'].upper()} {row['format'].upper()}{setting}"
                name = family(peer) if family(peer).startswith("llama.cpp") else peer["name"]
                lines.setdefault((model, row["test"], name), {})[row["threads"]] = cells(ours, peer)
    head = ["model", "test", "peer"]
    for n in counts:
        head += [f"smolrun tok/s, {n} thread{'s' * (n > 1)}", "of read peak", "peer (best)", "ratio (to best)"]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for key, groups in lines.items():
        out.append("| " + " | ".join([*key, *(c for n in counts for c in groups.get(n, ("",) * 4))]) + " |")
    return "\n".join(out)


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


def machine_peaks(document: dict[str, Any]) -> str:
    """What the machine could do in the same runs, by threads."""
    parts = []
    for n in sorted({row["threads"] for row in document["rows"]}):
        read = [row["read_peak"] / 1e9 for row in document["rows"] if row["threads"] == n]
        text = f"{min(read):.1f} to {max(read):.1f} GB/s with {n}"
        peaks = [run["roofline"][str(n)] for run in document["runs"] if str(n) in run["roofline"]]
        if peaks:
            int8, f32 = (max(p[kind] for p in peaks) / 1e9 for kind in ("int8", "f32"))
            text += f" ({int8:.0f} int8 and {f32:.0f} f32 GMAC/s)"
        parts.append(text)
    return ", ".join(parts)


def others(rows: Iterable[Row]) -> list[str]:
    """Runtimes beside us and llama.cpp as it is installed, in the order they come."""
    names = dict.fromkeys(family(r) for row in rows for r in row["results"])
    return [name for name in names if name not in ("smolrun", "llama.cpp")]


def figures() -> str:
    """The whole generated part."""
    document = json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))
    rows, checks = document["rows"], _load("verify")
    machine = (RESULTS / "machine.txt").read_text(encoding="utf-8").strip()
    cold = "; ".join(
        f"{c['format'].upper()} {c['first_token']:.2f} s, {c['peak_memory'] / 1e6:.0f} MB" for c in document["cold"]
    )
    tokens = ", ".join(sorted({f"{r['tokens']:,} tokens of wiki.test.raw in windows of {r['window']}" for r in checks}))
    beside = speed([row for row in rows if others([row])], others(rows)) if others(rows) else ""
    link = f"![prefill and decode beside the peers]({PLOT.relative_to(ROOT).as_posix()})"
    picture = f"{link}\n\n" if PLOT.exists() else ""
    return f"""{machine} Medians; every sample is in `benchmarks/results/`.

{picture}{speed([row for row in rows if best_of(row, "llama.cpp")], ["llama.cpp"])}
{chr(10) + beside + chr(10) if beside else ""}
Read bandwidth measured in the same runs, by threads: {machine_peaks(document)}.
First token of 135M after the start of a fresh process, and its peak memory after 128 tokens at context 2,048: {cold}.

Against the exact model (the file's weights as f32), {tokens}:

{accuracy(checks)}
{training()}"""


def training() -> str:
    """Steps of training beside torch's; "" where none were measured."""
    path = RESULTS / "train.json"
    if not path.exists():
        return ""
    document = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| setting | tok/s (best) | peak MB | against torch | speed | memory |", "|---|---|---|---|---|---|"]
    for row in document["rows"]:
        line = f"| {row['name']} | {row['median']:.0f} ({row['best']:.0f}) | {row['bytes'] / 1e6:,.0f} "
        peer = (
            f"| {row['against']} | **{never_up(row['speed'])}x** | {row['memory']:.0%} |"
            if row["against"]
            else "| | | |"
        )
        lines.append(line + peer)
    shape = f"{document['batch']} x {document['length']} tokens a step, {document['threads']} threads"
    return f"""
Training 135M, {shape}, forward to AdamW, each in a process of its own (`python benchmarks/train.py`):

{chr(10).join(lines)}
"""


def plot(rows: list[Row], path: Path) -> None:
    """Bars of prefill and decode, 135M on all threads: every runtime's median in its fastest setting."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "smolrun", "svg.fonttype": "none"}
    from matplotlib import pyplot

    most = max(row["threads"] for row in rows)
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 5))
    for panel, kind, title in zip(panels, ("pp", "tg"), ("prefill", "decode"), strict=True):
        speeds: dict[str, float] = {}
        for row in rows:
            wanted = (row["size"], row["threads"]) == ("135m", most) and row["test"].startswith(kind)
            if not wanted or "@" in row["test"]:
                continue
            for name in dict.fromkeys(map(family, row["results"])):
                best = best_of(row, name)
                if best and best["samples"]:
                    label = f"{name} {row['format']}" if name in ("smolrun", "llama.cpp") else best["name"]
                    speeds[label] = max(speeds.get(label, 0.0), median(best["samples"]))
        ordered = sorted(speeds, key=lambda name: speeds[name])
        colours = ["#c44e52" if name.startswith("smolrun") else "#8c8c8c" for name in ordered]
        panel.barh(ordered, [speeds[name] for name in ordered], color=colours)
        panel.set_title(f"{title}, 135M, {most} threads, tokens/s")
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})


def edge() -> str:
    """The table of modelled speed on ARM."""
    document = json.loads((RESULTS / "edge.json").read_text(encoding="utf-8"))
    lines = [
        "| core (model) | tier | format | decode: instructions a weight byte | llama.cpp | cycles | llama.cpp "
        "| prefill: MACs a cycle | llama.cpp |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        ours, peer = row["ours"], row["peer"]
        cells = [f"{row['meant']} ({row['model']})", row["tier"], row["format"].upper()]
        for key, digits, best in (
            ("instructions_per_byte", 2, min),
            ("cycles_per_byte", 3, min),
            ("prefill_macs_per_cycle", 1, max),
        ):
            both = [ours[key], peer[key]]
            cells += [f"**{v:.{digits}f}**" if v == best(both) else f"{v:.{digits}f}" for v in both]
        lines.append("| " + " | ".join(cells) + " |")
    llvm, peer = document["llvm"], document["peer"]
    return f"""{chr(10).join(lines)}

Modelled, not measured: the inner loops on LLVM {llvm}'s models of the cores (llvm-mca), all data in the L1 cache;
llama.cpp as in {peer}, by gcc for the same CPU. `python benchmarks/edge.py` makes it again.
"""


PARTS = {"figures": figures, "edge": edge}


def written(readme: str) -> str:
    """README with the generated parts replaced."""
    for name, make in PARTS.items():
        head, rest = readme.split(BEGIN.format(name))
        readme = head + BEGIN.format(name) + make() + END.format(name) + rest.split(END.format(name))[1]
    return readme


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true")
    if parser.parse_args().plot:
        plot(json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))["rows"], PLOT)
    path = ROOT / "README.md"
    path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
