"""smolrun beside its peers: same weights, same ids, in turns, each in a child process of its own environment.

    python benchmarks/peers.py                          # everything; prints what it will take first
    python benchmarks/peers.py --peers llama.cpp --sizes 135m --formats q4_0,q8_0 --tests pp512,tg128 --threads 1,2
    python benchmarks/peers.py --prepare                # environments and model files only, so that a run only measures
    python benchmarks/peers.py --quick                  # 135M, Q4_0 and Q8_0, three samples

A row is one test at one size, weight format and thread count; all runtimes that have such weights meet in it. Round
after round each takes its turn while the others' processes are stopped (SIGSTOP). Rows are saved as they come, and one
that is there already is not measured again: a run may be interrupted, split and extended.

No timing without its check: over 64 positions of prose a runtime's logits must be those of the weights it was given,
mean KL to our two-term ("exact") logits below a bound for its precision. What cannot be installed, fails, or says
something else is named with its reason instead of a figure.

135m is the real model in llama.cpp's formats, made from the installed one; 360m and 1.7b have their true shapes and
random weights (shapes.py). Peers that read no GGUF convert the F16 file through a Hugging Face folder.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import shapes

from smolrun import bench, peer
from smolrun.bench import Case
from smolrun.errors import SmolrunError
from smolrun.export import write_folder
from smolrun.files.checkpoint import open_checkpoint
from smolrun.files.sources import resolve
from smolrun.model.machine import available_cores
from smolrun.peer import Child, Runtime
from smolrun.text.tokenizer import Tokenizer
from smolrun.verify import Comparison, sample_text

HERE = Path(__file__).parent
ROOT = HERE.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smolrun-peers"
FORMATS = ("q4_0", "q4_1", "q8_0", "q4_k_m", "q5_k_m", "q6_k", "f16", "f32")
TESTS = "pp512,tg128,tg128@d4096,tg128@d7680"
WARM_PREFILL, WARM_DECODE = 512, 8  # ids of the round that is thrown away, at most
CHECK_TOKENS = 64

# llama.cpp as pip builds it, for this CPU, for any with AVX2, and for those before: name -> CMAKE_ARGS
AVX2 = "-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON"
SSE42 = AVX2.replace("=ON", "=OFF") + " -DGGML_BMI2=OFF -DGGML_SSE42=ON"
LLAMA = {"llama.cpp": "", "llama.cpp-avx2": AVX2, "llama.cpp-sse42": SSE42}
# peer -> what pip installs
PACKAGES = {
    **{name: ["llama-cpp-python"] for name in LLAMA},
    "openvino": ["openvino", "openvino-genai", "openvino-tokenizers", "nncf"],
    "ctranslate2": ["ctranslate2", "transformers<5", "torch"],
    "onnxruntime-genai": ["onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "transformers", "torch"],
    "torch": ["torch", "transformers"],
    "peft": ["torch", "transformers", "peft"],  # benchmarks/tune.py
}
# peer -> our format -> its own precisions of about that width. A precision that is a GGUF format is made from that very
# file, any other from the F16 file.
PRECISIONS: dict[str, dict[str, list[str]]] = {
    "openvino": {"q4_0": ["q4_0"], "q8_0": ["int8"]},
    "ctranslate2": {"q8_0": ["int8"]},
    "onnxruntime-genai": {"q4_0": ["int4"]},
    "torch": {"f16": ["bf16"], "f32": ["fp32"]},
}
# Mean KL to our exact logits of the weights that were given, in nats. int4 rounds them anew: Q4_0 itself is 0.3 from
# F16 here. The rest is ten times what such arithmetic costs.
BOUNDS = {"fp32": 1e-3, "bf16": 0.02, "int8": 0.1, "int4": 0.7}
FILE_BOUND = bench.CHECK_KL  # of a runtime that reads the same file

# Tokens/s of 135M on one thread, for the estimate alone: (prefill, decode). Sizes divide it.
RATES = {"smolrun": (1000, 200), "llama.cpp": (350, 100), "torch": (300, 20)}
OTHER_RATES = (700, 60)
SIZES = {"135m": 1.0, "360m": 2.7, "1.7b": 12.7}


# ---- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    """One runtime in one setting.

    Attributes:
        peer: "smolrun", a key of PACKAGES, or "llama-bench".
        precision: of ours "fast" or "exact"; the GGUF format, or the peer's own name of its precision.
        setting: what else differs: {"kv": "q8_0"}, {"flash": False}, {"tier": "avx2"}.
    """

    peer: str
    precision: str
    setting: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Unique in a row: `llama.cpp q4_0 flash=off`."""
        shown = {True: "on", False: "off"}
        words = [f"{key}={shown.get(value, value)}" for key, value in self.setting]
        return " ".join([self.peer, self.precision, *words])


@dataclass(frozen=True)
class Key:
    """Which row."""

    size: str
    format: str
    test: str
    threads: int

    @property
    def case(self) -> Case:
        return parse_test(self.test)

    def __str__(self) -> str:
        return f"{self.size} {self.format} {self.test}, {self.threads} thread{'s' * (self.threads > 1)}"


@dataclass
class Result:
    """A contestant's part of a row.

    Attributes:
        samples: tokens/s, in the order of the rounds.
        check: {"kl", "top1", "bound", "positions"}, or what stands in for logits.
        failed: why there are no samples.
        share_of_peak: bytes that decode must read over read bandwidth, medians of the same rounds, ours only.
    """

    name: str
    samples: list[float] = field(default_factory=list)
    check: dict[str, Any] = field(default_factory=dict)
    failed: str | None = None
    share_of_peak: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def parse_test(text: str) -> Case:
    """pp512, tg128, tg128@d4096 (llama-bench's names, blanks allowed).

    Raises:
        ValueError: anything else.
    """
    found = re.fullmatch(r"(pp|tg)([1-9]\d*)(?: ?@ ?d(\d+))?", text.strip())
    if found is None:
        raise ValueError(f"test {text!r}: expected ppN or tgN, perhaps with @dDEPTH, as in tg128@d4096")
    return Case(found[1], int(found[2]), int(found[3] or 0))


def contestants(key: Key, options: argparse.Namespace) -> list[Contestant]:
    """Who meets in a row, we first."""
    ours = []
    for spec in options.ours.split(","):
        precision, _, kv = spec.partition(":")
        setting = [("kv", kv)] if kv else []
        ours.append(Contestant("smolrun", precision, (*setting, *([("tier", options.tier)] if options.tier else []))))
    others: list[Contestant] = []
    for name in filter(None, options.peers.split(",")):
        if name in LLAMA:
            flash = {"auto": None, "on": True, "off": False}
            for choice in options.flash.split(","):
                setting = [] if flash[choice] is None else [("flash", flash[choice])]
                others.append(Contestant(name, key.format, tuple(setting)))
        else:
            others += [Contestant(name, p) for p in PRECISIONS[name].get(key.format, ())]
    if options.llama_bench:
        others.append(Contestant("llama-bench", key.format))
    return ours + others


def estimate(key: Key, runners: Iterable[Contestant], repeats: int) -> float:
    """Seconds that a row will take, roughly: the rounds, filling the depth once, and opening."""
    total = 0.0
    for runner in runners:
        prefill, decode = RATES.get(runner.peer.partition("-")[0], OTHER_RATES)
        case, speed = key.case, (1 + 0.7 * (key.threads > 1)) / SIZES[key.size]
        rate = (prefill if case.kind == "pp" else decode / (1 + case.depth / 3000)) * speed
        total += (repeats + 0.5) * case.size / rate + case.depth / prefill / speed * 1.5 + 2
    return total


def figures(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One flat line for each peer of a row beside the row's first of ours: the table, and everything made from it."""
    results = [Result(**r) for r in row["results"]]
    ours = results[0]
    lines = []
    for r in results[1:]:
        line: dict[str, Any] = {k: row[k] for k in ("size", "format", "test", "threads")}
        line |= {"ours": None, "spread": None, "share_of_peak": ours.share_of_peak, "peer": r.name, "failed": r.failed}
        line |= dict.fromkeys(("median", "best", "ratio", "ratio_to_best"))
        if ours.samples:
            line |= {"ours": ours.median, "spread": (max(ours.samples) - min(ours.samples)) / 2 / ours.median}
        if r.samples:
            line |= {"median": r.median, "best": max(r.samples)}
        if ours.samples and r.samples:
            line |= {"ratio": ours.median / r.median, "ratio_to_best": ours.median / max(r.samples)}
        lines.append(line)
    return lines


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """For people: every contestant of every row, whatever became of it."""
    head = f"{'size':<6}{'format':<8}{'test':<12}{'threads':>7}{'smolrun':>10}{'+-':>6}{'of peak':>9}  "
    lines = [head + f"{'peer':<30}{'median':>9}{'best':>9}{'ratio':>8}{'to best':>9}"]
    for f in (line for row in rows for line in figures(row)):
        text = f"{f['size']:<6}{f['format']:<8}{f['test']:<12}{f['threads']:>7}"
        text += f"{f['ours']:>10,.1f}{f['spread']:>6.0%}" if f["ours"] else f"{'failed':>16}"
        text += (f"{f['share_of_peak']:>9.0%}" if f["share_of_peak"] else " " * 9) + f"  {f['peer']:<30}"
        if f["failed"]:
            text += f"  failed: {f['failed']}"
        elif f["ratio"]:
            text += f"{f['median']:>9,.1f}{f['best']:>9,.1f}{f['ratio']:>7.2f}x{f['ratio_to_best']:>8.2f}x"
        lines.append(text.rstrip())
    return "\n".join(lines)


# ---- the document ----------------------------------------------------------------------------------------------------


class Document:
    """The JSON file of results: `runs` (machine, versions, roofline), `rows` (each of one run), `cold` (starts)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"runs": [], "rows": [], "cold": []}
        if path.exists():
            self.data = json.loads(path.read_text(encoding="utf-8"))

    def save(self) -> None:
        """Atomically: a run may be interrupted at any time."""
        write_json(self.path, self.data)

    def has(self, key: Key, runners: Iterable[Contestant], repeats: int) -> bool:
        """Whether a row holds all of them, each with enough samples or with the reason why not."""
        wanted = {runner.name for runner in runners}
        for row in self.data["rows"]:
            done = {r["name"] for r in row["results"] if r["failed"] or len(r["samples"]) >= repeats}
            if self.key(row) == key and wanted <= done:
                return True
        return False

    def add(self, key: Key, results: Sequence[Result], **facts: Any) -> None:
        """A new row, in place of those of the same key whose contestants it has all."""
        names = {r.name for r in results}
        self.data["rows"] = [
            row for row in self.data["rows"] if self.key(row) != key or {r["name"] for r in row["results"]} - names
        ]
        row = {**asdict(key), "run": len(self.data["runs"]) - 1, **facts, "results": [asdict(r) for r in results]}
        self.data["rows"].append(row)
        self.save()

    @staticmethod
    def key(row: Mapping[str, Any]) -> Key:
        return Key(row["size"], row["format"], row["test"], row["threads"])


def write_json(path: Path, data: Any) -> None:
    """Beside the file, then renamed: whoever reads it finds the old or the new one, whole."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(data, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():  # a VM may say "AMD EPYC" of two generations: family and model tell them apart
        lines = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", info.read_text(), re.MULTILINE))
        cpu = lines.get("model name", cpu) + "".join(f", {k} {lines[k]}" for k in ("cpu family", "model") if k in lines)
    return {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": available_cores(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def stolen(stat: Path = Path("/proc/stat")) -> tuple[int, int]:
    """(ticks the hypervisor took from us, all ticks) since boot; zeros where there is no /proc/stat."""
    if not stat.exists():
        return 0, 0
    ticks = [int(n) for n in stat.read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[7], sum(ticks)


# ---- environments and files ------------------------------------------------------------------------------------------


class Unavailable(SmolrunError):
    """A peer that cannot take part; says why."""


@dataclass
class Workshop:
    """Where environments and files are, each made when it is first asked for and kept."""

    envs: Path
    models: Path
    pythons: dict[str, str]
    say: Callable[[str], object] = print

    def python(self, name: str) -> str:
        """The interpreter of a peer's environment.

        Raises:
            Unavailable: pip could not install it; with pip's last line.
        """
        if name in self.pythons:
            return self.pythons[name]
        if name == "smolrun" or (name == "llama.cpp" and peer.available()):
            return sys.executable
        wanted = json.dumps([PACKAGES[name], LLAMA.get(name), (HERE / "peers.txt").read_text(), sys.version])
        folder = self.envs / f"{name}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"
        python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        if not (folder / "done").exists():
            self.say(f"installing {name} into {folder}")
            run([sys.executable, "-m", "venv", "--clear", str(folder)])
            install = [str(python), "-m", "pip", "install", "--quiet", "-c", str(HERE / "peers.txt"), *PACKAGES[name]]
            build = {"CMAKE_ARGS": LLAMA[name]} if LLAMA.get(name) else {}
            run([*install, *(["--no-cache-dir", "--no-binary", "llama-cpp-python"] if build else [])], build)
            (folder / "done").touch()
        return str(python)

    def versions(self, name: str) -> dict[str, str]:
        """Package -> version of what matters in a peer's environment."""
        names = [re.split(r"[<=]", package)[0] for package in PACKAGES[name]]
        script = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
        return dict(json.loads(run([self.python(name), "-c", script, *names])))

    def gguf(self, size: str, fmt: str) -> Path:
        """The model in a format."""
        path = self.models / f"{size}-{fmt}.gguf"
        if not path.exists():
            self.say(f"making {path.name}")
            self.models.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            if size == "135m":
                peer.requantise(resolve(None, offline=True), part, fmt.upper())
            elif fmt == "q8_0":
                shapes.write(size, fmt, part)
            else:
                peer.requantise(self.gguf(size, "q8_0"), part, fmt.upper())
            part.replace(path)
        return path

    def source(self, runner: Contestant, size: str) -> Path:
        """The GGUF file whose weights a contestant is given."""
        return self.gguf(size, runner.precision if runner.precision in FORMATS else "f16")

    def folder(self, size: str) -> Path:
        """The F16 weights as a Hugging Face folder, its weights written last."""
        folder = self.models / f"hf-{size}"
        if not (folder / "model.safetensors").exists():
            with open_checkpoint(self.gguf(size, "f16")) as checkpoint:
                write_folder(checkpoint, folder, "f16")
        return folder

    def converted(self, runner: Contestant, size: str) -> Path:
        """The peer's own form of the model.

        Raises:
            Unavailable: it cannot be installed or converted.
        """
        target = self.models / f"{runner.peer}-{size}-{runner.precision}"
        if not target.exists():
            source = self.source(runner, size) if runner.peer == "openvino" else self.folder(size)
            self.say(f"converting {size} for {runner.name}")
            part = target.with_name(target.name + ".part")
            if part.is_symlink():
                part.unlink()
            shutil.rmtree(part, ignore_errors=True)
            child = Child(self.command(runner), name=runner.peer, env=self.environment(runner))
            try:
                child.ask("convert", source=str(source), target=str(part), precision=runner.precision)
            finally:
                child.close()
            part.rename(target)
        return target

    def command(self, runner: Contestant) -> list[str]:
        """Starts a contestant's child."""
        if runner.peer in LLAMA:
            return [self.python(runner.peer), "-m", "smolrun.peer"]
        return [self.python(runner.peer), str(HERE / "adapters.py"), runner.peer]

    def environment(self, runner: Contestant) -> dict[str, str]:
        """Variables of a contestant's child: it finds this checkout, and the tier if one is forced."""
        tier = dict(runner.setting).get("tier")
        return {**os.environ, "PYTHONPATH": str(ROOT)} | ({"SMOLRUN_TIER": tier} if tier else {})

    def prepare(self, runner: Contestant, key: Key) -> dict[str, Any]:
        """Arguments that open the model."""
        setting = {k: v for k, v in runner.setting if k != "tier"}
        if runner.peer == "smolrun":
            return {"path": str(self.gguf(key.size, key.format)), "kv": "f16", "precision": runner.precision} | setting
        if runner.peer in LLAMA:
            return {"path": str(self.gguf(key.size, key.format))} | setting
        path = {"path": str(self.converted(runner, key.size))}
        return path | ({"precision": runner.precision} if runner.peer in ("ctranslate2", "torch") else {})

    def open(self, runner: Contestant, key: Key, context: int) -> Runtime:
        """A contestant with its model, in its child."""
        arguments = self.prepare(runner, key) | {"context": context, "threads": key.threads}
        return Runtime(self.command(runner), name=runner.name, env=self.environment(runner), **arguments)


class LlamaBench:
    """Any build of llama.cpp, by its llama-bench; a process each turn. It shows no logits."""

    def __init__(self, binary: Path, path: Path, threads: int) -> None:
        self.command = [str(binary), "-m", str(path), "-t", str(threads), "-r", "1", "-o", "json"]

    def _run(self, test: str, n: int, depth: int) -> dict[str, Any]:
        sizes = ["-p", str(n if test == "pp" else 0), "-n", str(n if test == "tg" else 0)]
        found = json.loads(run([*self.command, *sizes, *(["-d", str(depth)] if depth else [])]))
        return dict(found[0])

    def identity(self) -> dict[str, Any]:
        """What it says it ran: {"parameters", "bytes", "build"}."""
        found = self._run("tg", 1, 0)
        return {"parameters": found["model_n_params"], "bytes": found["model_size"], "build": found["build_commit"]}

    def prefill(self, ids: Sequence[int], *, depth: Sequence[int] = ()) -> float:
        return len(ids) / float(self._run("pp", len(ids), len(depth))["avg_ts"])

    def decode(self, ids: Sequence[int], *, depth: Sequence[int] = ()) -> float:
        return len(ids) / float(self._run("tg", len(ids), len(depth))["avg_ts"])

    def pause(self) -> None:
        pass

    def close(self) -> None:
        pass


def run(command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """A command's stdout.

    Raises:
        Unavailable: it failed; with its last line.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})})
    except OSError as error:
        raise Unavailable(f"{command[0]}: {error}") from error
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()
        told = next((w for w in reversed(words) if "error" in w.lower()), words[-1])
        raise Unavailable(f"{Path(command[0]).name} {command[1]} ... exit code {done.returncode}: {told.strip()}")
    return done.stdout


# ---- measuring -------------------------------------------------------------------------------------------------------


class Referee:
    """Our exact logits of each file, computed once, and what others' are held against."""

    def __init__(self, shop: Workshop) -> None:
        self.shop = shop
        self.known: dict[Path, tuple[list[int], np.ndarray]] = {}

    def truth(self, path: Path) -> tuple[list[int], np.ndarray]:
        """(ids, float32 (ids, vocab_size))."""
        if path not in self.known:
            with open_checkpoint(path) as checkpoint:
                tokenizer = Tokenizer.from_source(checkpoint.tokenizer, vocab_size=checkpoint.config.vocab_size)
                ids = tokenizer.encode(sample_text())[:CHECK_TOKENS]
            us = Contestant("smolrun", "exact")
            arguments = {"path": str(path), "kv": "f16", "precision": "exact", "threads": available_cores()}
            with Runtime(
                self.shop.command(us), name=us.name, env=self.shop.environment(us), context=CHECK_TOKENS, **arguments
            ) as ours:
                self.known[path] = ids, ours.logits(ids)
        return self.known[path]

    def check(self, runner: Contestant, runtime: Runtime | LlamaBench, key: Key) -> dict[str, Any]:
        """What is recorded of a contestant's answers.

        Raises:
            Unavailable: it runs another model, or wrongly.
        """
        path = self.shop.source(runner, key.size) if runner.peer != "smolrun" else self.shop.gguf(key.size, key.format)
        if isinstance(runtime, LlamaBench):
            found = runtime.identity()
            with open_checkpoint(path) as checkpoint:
                count = sum(int(np.prod(t.shape)) for t in checkpoint.tensors.values())
            if found["parameters"] != count:
                raise Unavailable(f"it ran a model of {found['parameters']:,} parameters, the file has {count:,}")
            return {**found, "note": "shows no logits: only the model's size is checked"}
        ids, truth = self.truth(path)
        return compare(truth, runtime.logits(ids), ids, BOUNDS.get(runner.precision, FILE_BOUND))


def compare(truth: np.ndarray, found: np.ndarray, ids: Sequence[int], bound: float) -> dict[str, Any]:
    """{"kl", "top1", "bound", "positions", "hash"} of logits (positions, vocab_size).

    Raises:
        Unavailable: not finite, or mean KL above the bound.
    """
    if found.shape != truth.shape or not np.isfinite(found).all():
        raise Unavailable(f"logits {found.shape} with NaN or infinity; finite {truth.shape} expected")
    both = Comparison([("truth", "found")])
    both.add({"truth": truth, "found": found}, ids)
    summary = both.summary("truth", "found")
    if not summary.kl_mean <= bound:
        raise Unavailable(f"wrong: mean KL to the exact logits {summary.kl_mean:.3g}, at most {bound} expected")
    digest = hashlib.sha256(np.ascontiguousarray(found).tobytes()).hexdigest()[:16]
    return {"kl": summary.kl_mean, "top1": summary.top1, "bound": bound, "positions": len(ids), "hash": digest}


def rounds(
    runtimes: Mapping[str, Any],
    case: Case,
    ids: Sequence[int],
    repeats: int,
    budget: float,
    each: Callable[[], object] = lambda: None,
) -> dict[str, Result]:
    """Samples of every runtime, in turns: each round starts with the next one; the first round only warms up.

    budget: seconds after which a runtime with at least one sample gets no more turns. each: called before each round.
    """
    results = {name: Result(name) for name in runtimes}
    spent = dict.fromkeys(runtimes, 0.0)
    depth, work = ids[: case.depth], ids[case.depth : case.depth + case.size]
    for turn in range(repeats + 1):
        order = list(runtimes)
        order = order[turn % len(order) :] + order[: turn % len(order)]
        each()
        part = work if turn else work[: WARM_PREFILL if case.kind == "pp" else WARM_DECODE]
        for name in order:
            result, runtime = results[name], runtimes[name]
            if result.failed or (result.samples and spent[name] > budget):
                continue
            try:
                seconds = (runtime.prefill if case.kind == "pp" else runtime.decode)(part, depth=depth)
                runtime.pause()
            except (SmolrunError, OSError) as problem:
                result.failed, result.samples = str(problem), []
                continue
            if turn:
                spent[name] += seconds
                result.samples.append(len(part) / seconds)
    return results


def _note_state(peaks: list[float], handed: list[float], threads: int) -> None:
    peaks.append(bench.read_bandwidth(threads))
    if min(threads, available_cores()) > 1:
        handed.append(bench.hand_over())


def meet(
    shop: Workshop, referee: Referee, keys: Sequence[Key], options: argparse.Namespace, document: Document
) -> None:
    """Rows that differ in their test alone: everyone opens the model once and is checked once."""
    runners = contestants(keys[0], options)
    context = max(CHECK_TOKENS, max(k.case.depth + k.case.size for k in keys))
    opened: dict[str, Any] = {}
    checks: dict[str, dict[str, Any]] = {}
    absent: dict[str, str] = {}
    try:
        for runner in runners:
            try:
                if runner.peer == "llama-bench":
                    path = shop.gguf(keys[0].size, keys[0].format)
                    runtime: Any = LlamaBench(options.llama_bench, path, keys[0].threads)
                else:
                    runtime = shop.open(runner, keys[0], context)
                opened[runner.name] = runtime
                checks[runner.name] = referee.check(runner, runtime, keys[0])
                runtime.pause()
            except (SmolrunError, OSError) as problem:
                absent[runner.name] = str(problem)
                if gone := opened.pop(runner.name, None):
                    gone.close()
        with open_checkpoint(shop.gguf(keys[0].size, keys[0].format)) as checkpoint:
            ids = bench.prompt(checkpoint.config.vocab_size, context)
            for key in keys:
                began, before = time.perf_counter(), stolen()
                # one a round: what memory gives, and how far cores are apart, changes within a minute, for all alike
                peaks: list[float] = []
                handed: list[float] = []
                look = partial(_note_state, peaks, handed, key.threads)
                results = rounds(opened, key.case, ids, options.repeats, options.budget, look)
                peak, after = statistics.median(peaks), stolen()
                for runner in runners:
                    result = results.setdefault(runner.name, Result(runner.name, failed=absent.get(runner.name)))
                    result.check = checks.get(runner.name, {})
                    if runner.peer == "smolrun" and key.case.kind == "tg" and result.samples:
                        kv = dict(runner.setting).get("kv", "f16")
                        read = bench.bytes_per_token(checkpoint, key.case, kv)
                        result.share_of_peak = result.median * read / peak
                document.add(
                    key,
                    [results[runner.name] for runner in runners],
                    read_peak=peak,
                    read_peaks=peaks,
                    hand_overs=handed,
                    steal=(after[0] - before[0]) / max(1, after[1] - before[1]),
                    seconds=round(time.perf_counter() - began, 1),
                )
                print("\n".join(table([document.data["rows"][-1]]).splitlines()[1:]), flush=True)
    finally:
        for runtime in opened.values():
            runtime.close()
    first = keys[0]
    plain = first.size == "135m" and not first.case.depth and not options.tier
    if plain and first.threads == max(map(int, options.threads.split(","))):
        arguments = {"context": bench.COLD_CONTEXT, "threads": first.threads}
        seconds, memory = bench.cold_start(shop.gguf(first.size, first.format), arguments)
        start = {"size": first.size, "format": first.format, "threads": first.threads}
        kept = [c for c in document.data["cold"] if any(c[k] != v for k, v in start.items())]
        document.data["cold"] = [*kept, {**start, "first_token": seconds, "peak_memory": memory}]
        document.save()


def plan(options: argparse.Namespace, document: Document) -> list[list[Key]]:
    """The rows that are missing, those that share open models together; shallow and deep contexts apart."""
    groups: dict[tuple[Any, ...], list[Key]] = {}
    for size in options.sizes.split(","):
        for fmt in options.formats.split(","):
            for threads in map(int, options.threads.split(",")):
                for test in options.tests.split(","):
                    key = Key(size, fmt, parse_test(test).name.replace(" ", ""), threads)
                    runners = contestants(key, options)
                    if options.again or not document.has(key, runners, options.repeats):
                        groups.setdefault((size, fmt, threads, parse_test(test).depth), []).append(key)
    return list(groups.values())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; SystemExit names a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--peers", default="llama.cpp,openvino,ctranslate2,onnxruntime-genai,torch", help=f"of {', '.join(PACKAGES)}")
    add("--sizes", default="135m,360m,1.7b")
    add("--formats", default="q4_0,q4_1,q8_0,q4_k_m,f16", help=f"of {', '.join(FORMATS)}")
    add("--tests", default=TESTS)
    add("--threads", default=",".join(map(str, sorted({1, available_cores()}))))
    add("-r", "--repeats", type=int, default=5)
    add("--budget", type=float, default=120, help="seconds of one runtime in one row; fewer samples beyond")
    add(
        "--ours",
        default="fast",
        help="fast or exact, and :KV for another cache: fast,exact,fast:q8_0; the first counts",
    )
    add("--tier", default="", help="force our kernels' tier, as SMOLRUN_TIER does")
    add("--flash", default="auto,off", help="llama.cpp's flash attention: auto, on, off")
    add("--llama-bench", type=Path, help="a llama-bench binary, as one more peer")
    add("--python", action="append", default=[], metavar="PEER=PATH", help="use an environment that is there already")
    add("--models", type=Path, default=CACHE / "models")
    add("--envs", type=Path, default=CACHE / "envs")
    add("--out", type=Path, default=HERE / "results" / "peers.json")
    add("--quick", action="store_true", help="135m, q4_0 and q8_0, pp512 and tg32, 3 samples")
    add("--again", action="store_true", help="measure rows that are there already, too")
    add("--prepare", action="store_true", help="make environments and files, measure nothing")
    options = parser.parse_args(arguments)
    if options.quick:
        options.sizes, options.formats, options.tests, options.repeats = "135m", "q4_0,q8_0", "pp512,tg32", 3
    known = {"peers": PACKAGES, "sizes": SIZES, "formats": FORMATS, "flash": ("auto", "on", "off")}
    for name, values in known.items():
        if unknown := [word for word in filter(None, getattr(options, name).split(",")) if word not in values]:
            parser.error(f"--{name}: {', '.join(unknown)} unknown; choose from {', '.join(values)}")
    try:
        list(map(parse_test, options.tests.split(",")))
        options.pythons = dict(pair.split("=", 1) for pair in options.python)
    except ValueError as error:
        parser.error(str(error))
    return options


def main() -> None:
    """Prepare, tell the time it takes, measure, print the table."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # children that are stopped have to be woken and ended
    document = Document(options.out)
    shop = Workshop(options.envs, options.models, options.pythons)
    groups = plan(options, document)
    runners = {(k.size, k.format, r): k for keys in groups for k in keys[:1] for r in contestants(k, options)}
    versions: dict[str, Any] = {}
    for (_, _, runner), key in runners.items():
        try:
            if runner.peer != "llama-bench":
                shop.prepare(runner, key)
                shop.command(runner)
            if runner.peer in PACKAGES:
                versions[runner.peer] = shop.versions(runner.peer)
        except (SmolrunError, OSError) as problem:  # told again, in its rows
            print(f"{runner.name}: {problem}", flush=True)
    total = sum(estimate(k, contestants(k, options), options.repeats) for keys in groups for k in keys)
    print(f"{sum(map(len, groups))} rows to measure, about {total / 60:.0f} minutes", flush=True)
    if options.prepare or not groups:
        return
    threads = sorted({k.threads for keys in groups for k in keys})
    roofline = {str(n): bench.roofline(n) for n in threads}
    document.data["runs"].append({**machine(), "versions": versions, "roofline": roofline})
    document.save()
    referee = Referee(shop)
    for keys in groups:
        meet(shop, referee, keys, options, document)
    print(table(document.data["rows"]))


if __name__ == "__main__":
    main()
