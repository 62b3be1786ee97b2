"""benchmarks/RESULTS.md, README's short tables and its plot, made from results/*.json: no figure is typed by hand.

python benchmarks/peers.py             # results/peers.json; peers-NAME.json is that of another CPU
python benchmarks/edge.py              # results/edge.json, ARM by model
python benchmarks/train.py --save      # results/train.json
smolrun verify MODEL --text FILE --json > benchmarks/results/verify-NAME.json
python benchmarks/readme.py            # rewrites RESULTS.md, and the parts of README.md between the markers
python benchmarks/readme.py --plot     # and results/peers.svg (needs matplotlib: pip install "smolrun[plot]")
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from math import floor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- {}: made by benchmarks/readme.py -->\n", "<!-- end of {} -->\n"
PLOT, TRAIN, EDGE = (RESULTS / name for name in ("peers.svg", "train.json", "edge.json"))
PLAIN = "smolrun fast"
FULL = "[benchmarks/RESULTS.md](benchmarks/RESULTS.md)"
# what README shows; RESULTS.md has everything
SPEEDS = ("135M Q4_0", "135M Q8_0", "135M Q4_K_M", "135M F16", "1.7B Q4_0", "1.7B Q4_K_M")  # beside llama.cpp
ACCURACIES = ("Q4_0", "Q8_0", "Q4_K_M")
TRAINED = ("smolrun f32", "smolrun f32 recompute", "smolrun bf16", "smolrun lora r16 on q8_0")

Row = dict[str, Any]
Result = dict[str, Any]
Beside = dict[tuple[str, str, str], dict[int, tuple[Result, Result]]]  # (model, test, peer) -> threads -> both


def median(samples: list[float]) -> float:
    """Middle of the sorted samples."""
    ordered = sorted(samples)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def never_up(ratio: float) -> str:
    """Two digits, cut off and not rounded."""
    return f"{floor(100 * ratio) / 100:.2f}"


def family(result: Result) -> str:
    """The runtime of a result: `llama.cpp` of `llama.cpp q4_0 flash=off`."""
    return str(result["name"].split()[0])


def best_of(row: Row, runtime: str) -> Result | None:
    """A runtime's fastest setting in a row, by its median; the failed one if all failed, None if it was not there."""
    there = [r for r in row["results"] if family(r) == runtime]
    done = [r for r in there if r["samples"]]
    return max(done, key=lambda r: median(r["samples"])) if done else next(iter(there), None)


def beside(rows: Iterable[Row], runtimes: Sequence[str]) -> Beside:
    """Each setting of ours beside the best of each runtime; of a test that was run twice, the last."""
    out: Beside = {}
    for row in rows:
        for ours in (r for r in row["results"] if family(r) == "smolrun"):
            setting = "" if ours["name"] == PLAIN else f" ({ours['name'].removeprefix('smolrun ')})"
            for peer in filter(None, (best_of(row, name) for name in runtimes)):
                model = f"{row['size'].upper()} {row['format'].upper()}{setting}"
                name = family(peer) if family(peer).startswith("llama.cpp") else peer["name"]
                out.setdefault((model, row["test"], name), {})[row["threads"]] = ours, peer
    return dict(sorted(out.items(), key=lambda item: place(*item[0])))


def place(model: str, test: str, peer: str) -> tuple[Any, ...]:
    """Of a line in a table: the small model first, quantised formats first, prefill, decode, depths."""
    size, fmt, *setting = model.split(" ", 2)
    number = float(size[:-1]) * (1000 if size.endswith("B") else 1)
    return number, fmt.startswith("F"), fmt, setting, "@" in test, test, peer


def table(head: Sequence[str], lines: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *map(list, lines)])


def ratio_of(ours: Result, peer: Result) -> float | None:
    """Our median by theirs; None where one failed."""
    return median(ours["samples"]) / median(peer["samples"]) if ours["samples"] and peer["samples"] else None


def cells(ours: Result, peer: Result) -> tuple[str, str, str, str]:
    """(ours, share of the read peak, peer, ratio) at one thread count."""
    ratio = ratio_of(ours, peer)
    if ratio is None:
        return "", "", f"failed: {ours['failed'] or peer['failed']}", ""
    mine, theirs, best = median(ours["samples"]), median(peer["samples"]), max(peer["samples"])
    spread = (max(ours["samples"]) - min(ours["samples"])) / 2 / mine
    share = f"{floor(100 * ours['share_of_peak'])}%" if ours["share_of_peak"] else ""
    ratios = f"**{never_up(ratio)}x** ({never_up(mine / best)}x)"
    return f"{mine:,.0f} ± {spread:.0%}", share, f"{theirs:,.0f} ({best:,.0f})", ratios


def threads_of(pairs: Beside) -> list[int]:
    return sorted({n for groups in pairs.values() for n in groups})


def speed(pairs: Beside) -> str:
    """A line for each model, test, setting of ours and peer; a group of columns for each thread count."""
    counts, head = threads_of(pairs), ["model", "test", "peer"]
    for n in counts:
        head += [f"smolrun tok/s, {n} thread{'s' * (n > 1)}", "of read peak", "peer (best)", "ratio (to best)"]
    blank = ("",) * 4
    return table(
        head,
        (
            [*key, *(c for n in counts for c in (cells(*both[n]) if n in both else blank))]
            for key, both in pairs.items()
        ),
    )


def in_words(test: str) -> str:
    """`decode at a depth of 7,680` of llama-bench's `tg32@d7680`."""
    kind, size, depth = re.fullmatch(r"(pp|tg)(\d+)(?:@d(\d+))?", test).groups()  # type: ignore[union-attr]
    words = f"prefill of {int(size):,}" if kind == "pp" else "decode"
    return f"{words} at a depth of {int(depth):,}" if depth else words


def short_speed(pairs: Beside) -> str:
    """Medians alone, of SPEEDS beside llama.cpp."""
    counts = threads_of(pairs)
    head = ["", "", *(c for n in counts for c in (f"smolrun, {n} thread{'s' * (n > 1)}", "llama.cpp", "ratio"))]
    lines = []
    for (model, test, peer), both in pairs.items():
        if model not in SPEEDS or peer != "llama.cpp":
            continue
        line = [model, in_words(test)]
        for n in counts:
            ratio = ratio_of(*both[n]) if n in both else None
            speeds = [f"{median(r['samples']):,.0f}" for r in both[n]] if ratio else ["", ""]
            line += [*speeds, f"**{never_up(ratio)}x**" if ratio else ""]
        lines.append(line)
    return table(head, lines)


def behind(pairs: Beside) -> str:
    """A sentence that names every row in which a peer is faster."""
    all_ratios = {
        f"{model}, {in_words(test)}, {n} thread{'s' * (n > 1)}, {peer}": ratio_of(*results)
        for (model, test, peer), both in pairs.items()
        for n, results in both.items()
    }
    ratios = {name: ratio for name, ratio in all_ratios.items() if ratio is not None}
    lost = [f"{name} ({never_up(ratio)}x)" for name, ratio in ratios.items() if ratio < 1]
    if not lost:
        return f"smolrun is ahead in all {len(ratios)} comparisons."
    return f"smolrun is behind in {len(lost)} of {len(ratios)} comparisons: {'; '.join(lost)}."


def verdicts() -> list[dict[str, Any]]:
    """Reports of `smolrun verify --json`."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("verify-*.json"))]


def accuracy(reports: list[dict[str, Any]]) -> str:
    """One line a model and precision."""
    head = ["model", "precision", "mean KL: smolrun", "llama.cpp", "top-1: smolrun", "llama.cpp"]
    lines = []
    for r in reports:
        ours, peer = r["ours"], r["peer"]
        line = [Path(r["model"]).stem, r["precision"], f"**{ours['kl_mean']:.1e}**", f"{peer['kl_mean']:.1e}"]
        line += [f"{ours['top1']:.4f}", f"{peer['top1']:.4f}"]
        lines.append([*line, *(f"{ppl:.3f}" for ppl in (r["exact_ppl"], ours["ppl"], peer["ppl"]))])
    return table([*head, "perplexity: exact", "smolrun", "llama.cpp"], lines)


def text_of(reports: list[dict[str, Any]]) -> str:
    """What was predicted."""
    return ", ".join(sorted({f"{r['tokens']:,} tokens of wiki.test.raw in windows of {r['window']}" for r in reports}))


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


def first_tokens(document: dict[str, Any]) -> str:
    """Of fresh processes."""
    found = (
        f"{c['format'].upper()} {c['first_token']:.2f} s, {c['peak_memory'] / 1e6:.0f} MB" for c in document["cold"]
    )
    return (
        "First token of 135M after the start of a fresh process, and its peak memory after 128 tokens at context "
        f"2,048: {'; '.join(found)}."
    )


def elsewhere() -> list[str]:
    """Names of the CPUs measured besides the one that README shows: NAME of results/peers-NAME.json."""
    return sorted(path.stem.removeprefix("peers-") for path in RESULTS.glob("peers-*.json"))


def everything(cpu: str = "") -> tuple[dict[str, Any], str, Beside, Beside]:
    """(results/peers.json, the machine, pairs beside llama.cpp as it is installed, pairs beside the others)."""
    suffix = f"-{cpu}" if cpu else ""
    document = json.loads((RESULTS / f"peers{suffix}.json").read_text(encoding="utf-8"))
    machine = (RESULTS / f"machine{suffix}.txt").read_text(encoding="utf-8").strip()
    rows = document["rows"]
    return document, machine, beside(rows, ["llama.cpp"]), beside(rows, others(rows))


def figures() -> str:
    """README's figures of the run-time."""
    document, machine, llama, rest = everything()
    reports = [r for r in verdicts() if Path(r["model"]).stem in ACCURACIES]
    link = f"![prefill and decode beside the peers]({PLOT.relative_to(ROOT).as_posix()})"
    older = []
    for _, text, *pairs in map(everything, elsewhere()):
        older.append(f"On {text.split(';')[0]}: {behind(pairs[0] | pairs[1])}\n")
    return f"""{machine}

{link}

Tokens per second, medians, in turns with llama.cpp on the same file; {FULL}
has every model, setting and peer, with spreads.

{short_speed(llama)}

{behind(llama | rest)}
{first_tokens(document)}
{"".join(older)}
Against the exact model (the file's weights as f32), {text_of(reports)}:

{accuracy(reports)}
"""


def speeds(cpu: str = "") -> list[str]:
    """RESULTS.md's part of one CPU."""
    document, machine, llama, rest = everything(cpu)
    return [
        f"## Speed{f' on another CPU, {cpu}' if cpu else ''}\n\n{machine}",
        f"### Beside llama.cpp\n\n{speed(llama)}",
        f"### Beside others\n\n{speed(rest)}" if rest else "",
        behind(llama | rest),
        f"Read bandwidth measured in the same runs, by threads: {machine_peaks(document)}.",
        first_tokens(document),
    ]


def results() -> str:
    """RESULTS.md."""
    reports = verdicts()
    parts = [
        "# Figures\n\nMade by `python benchmarks/readme.py` from `benchmarks/results/`, which has every sample.",
        "pp512 is a prompt of 512 tokens, tg128 are 128 tokens one by one, @d7680 behind as many. Speeds are medians ± "
        "half the range, ratios are of medians; in brackets the peer's best sample, and the ratio to it.",
        *(part for cpu in ["", *elsewhere()] for part in speeds(cpu)),
        f"## Accuracy\n\nAgainst the exact model (the file's weights as f32), {text_of(reports)}:",
        accuracy(reports),
        f"## Training\n\n{steps()}" if TRAIN.exists() else "",
        f"## ARM, by model\n\n{cores()}",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    """Bars of prefill and decode, 135M on all threads: every runtime's median in its fastest setting for this CPU."""
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
            limited = any("tier" in r["name"] for r in row["results"])  # both built for older CPUs
            if not wanted or limited or "@" in row["test"]:
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


def steps(names: Sequence[str] = ()) -> str:
    """Steps of training, the torch's too; or those of the names alone, each beside its torch."""
    document = json.loads(TRAIN.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in document["rows"]}
    head = ["setting", "tok/s (best)", "peak MB", "beside", "tok/s", "peak MB", "speed", "memory"]
    lines = []
    for row in (row for name, row in rows.items() if name in (names or rows)):
        line = [row["name"], f"{row['median']:,.0f} ({row['best']:,.0f})", f"{row['bytes'] / 1e6:,.0f}"]
        if row["failed"]:
            line = [row["name"], f"failed: {row['failed']}", ""]
        if row["against"] and not row["failed"]:
            peer = rows[f"torch {row['against']}"]
            line += [peer["name"], f"{peer['median']:,.0f}", f"{peer['bytes'] / 1e6:,.0f}"]
            line += [f"**{never_up(row['speed'])}x**", f"{row['memory']:.0%}"]
        lines.append(line + [""] * (len(head) - len(line)))
    return (
        f"135M, {document['batch']} x {document['length']} tokens a step, {document['threads']} threads, forward to "
        f"AdamW, each in a process of its own (`python benchmarks/train.py`):\n\n{table(head, lines)}"
    )


def training() -> str:
    """README's figures of training; "" before any were measured."""
    return f"{steps(TRAINED)}\n" if TRAIN.exists() else ""


def cores() -> str:
    """The table of modelled speed on ARM."""
    document = json.loads(EDGE.read_text(encoding="utf-8"))
    head = ["core (model)", "tier", "format", "decode: instructions a weight byte", "llama.cpp", "cycles", "llama.cpp"]
    lines = []
    for row in document["rows"]:
        ours, peer = row["ours"], row["peer"]
        line = [f"{row['meant']} ({row['model']})", row["tier"], row["format"].upper()]
        for key, digits, best in (
            ("instructions_per_byte", 2, min),
            ("cycles_per_byte", 3, min),
            ("prefill_macs_per_cycle", 1, max),
        ):
            both = [ours[key], peer[key]]
            line += [f"**{v:.{digits}f}**" if v == best(both) else f"{v:.{digits}f}" for v in both]
        lines.append(line)
    return f"""{table([*head, "prefill: MACs a cycle", "llama.cpp"], lines)}

Modelled, not measured: the inner loops on LLVM {document["llvm"]}'s models of the cores (llvm-mca), all data in the L1
cache; llama.cpp as in {document["peer"]}, by gcc for the same CPU. `python benchmarks/edge.py` makes it again."""


def edge() -> str:
    """README's figures of ARM: the ratios to llama.cpp, and where it is ahead."""
    rows = json.loads(EDGE.read_text(encoding="utf-8"))["rows"]

    def said(what: str, ratio: Callable[[Row], float]) -> str:
        ratios = {f"{row['core']} {row['format'].upper()}": ratio(row) for row in rows}
        lost = [f"{name} ({never_up(r)}x)" for name, r in ratios.items() if r < 1]
        text = f"{what} is {never_up(min(ratios.values()))} to {never_up(max(ratios.values()))} times as fast"
        return text + (f", and behind on {', '.join(lost)}" if lost else "")

    decode = said("decode", lambda row: row["peer"]["cycles_per_byte"] / row["ours"]["cycles_per_byte"])
    key = "prefill_macs_per_cycle"
    prefill = said("prefill", lambda row: row["ours"][key] / row["peer"][key])
    where = "LLVM's models of the cores, all data in the L1 cache, beside llama.cpp's kernels by gcc"
    return f"""Modelled, not measured, on {where}:
{decode}; {prefill}
([table](benchmarks/RESULTS.md#arm-by-model)).
"""


PARTS = {"figures": figures, "training": training, "edge": edge}


def readme(text: str) -> str:
    """README with the generated parts replaced."""
    for name, make in PARTS.items():
        head, rest = text.split(BEGIN.format(name))
        text = head + BEGIN.format(name) + make() + END.format(name) + rest.split(END.format(name))[1]
    return text


def written() -> dict[Path, str]:
    """What each generated file has to be."""
    path = ROOT / "README.md"
    return {path: readme(path.read_text(encoding="utf-8")), ROOT / "benchmarks" / "RESULTS.md": results()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true")
    if parser.parse_args().plot:
        plot(json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))["rows"], PLOT)
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")
