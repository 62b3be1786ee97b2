"""How fast: tokens per second, gigabytes per second, seconds to the first token, memory; beside llama.cpp if wanted.

Tests have llama-bench's names and meaning: `pp512` is one prompt of 512 ids from an empty cache, `tg128` is 128 ids one
by one, and `@ d4096` puts 4,096 ids into the cache first, untimed. `tg128 x8` is 128 ids of each of 8 sequences, an id
of each in every pass; its tokens are those of all. A peer runs in a child process that sleeps during our turn; turns
alternate, so a noisy minute hits both. Our median is held against its median and against its best. No row without a
check: the hash of our logits, and their divergence from the peer's.
"""

from __future__ import annotations

import csv
import ctypes
import hashlib
import io
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from smolrun.errors import OptionError, SmolrunError
from smolrun.files.checkpoint import Checkpoint, open_checkpoint
from smolrun.generate.engine import CachedSequence, Model, passes
from smolrun.kernels import load, target
from smolrun.kernels.block import MAX_THREADS, PAGE, TEAM_BYTES, T
from smolrun.kernels.panels import ROWS
from smolrun.model.llama import Llama
from smolrun.model.machine import HERE, available_cores
from smolrun.model.memory import SEGMENTS, Arena, page_bytes
from smolrun.model.workers import give_way
from smolrun.peer import Peer
from smolrun.text.tokenizer import Tokenizer
from smolrun.verify import Comparison, Logits, logits_in_cuts, sample_text, weight_format

SPECIALS = 17  # of SmolLM2's vocabulary, ids 0-16
CHECK_TOKENS = 64  # ids of prose whose logits are hashed and compared
CHECK_KL = 0.05  # ten times what int8 activations cost: above it one of the two runs another model
PROBE_BYTES = 1 << 30
PROBE_STREAMS = (1, 2, 4, 8)
PROBE_STEP = 512 * 8  # parts are whole numbers of what the widest kernel reads at once
PROBE_PASSES = 5
PROBE_L1 = 8192  # bytes a thread's peak kernel reads (matmul.PEAK_BYTES)
PROBE_COLUMNS = 32  # of a step of it
PROBE_STEPS = 500_000  # about 0.1 s
PROBE_HANDED = 300  # at most 0.1 ms, where each thread has a core
COLD_RUNS = 3
COLD_TOKENS = 128
COLD_CONTEXT = 2048

# What a user's first script would be; its own process, so that nothing of the measurement counts as memory.
COLD_SCRIPT = """
import json, pathlib, re, sys
import smolrun
with smolrun.load(sys.argv[1], **json.loads(sys.argv[2])) as llm:
    for n, chunk in enumerate(llm.stream("The sea is", max_tokens=int(sys.argv[3]), ignore_eos=True)):
        if n == 0:
            print("first", flush=True)
    status = pathlib.Path("/proc/self/status")
    print(int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) * 1024 if status.exists() else 0)
"""


@dataclass(frozen=True)
class Case:
    """One measurement: pp or tg of `size` ids behind `depth` ids, of `batch` sequences at once."""

    kind: str
    size: int
    depth: int
    batch: int = 1

    @property
    def name(self) -> str:
        """llama-bench's name; it has none for a batch."""
        batch = f" x{self.batch}" if self.batch > 1 else ""
        return f"{self.kind}{self.size}{batch}" + (f" @ d{self.depth}" if self.depth else "")


@dataclass(frozen=True)
class Row:
    """Samples of one test at one thread count, in tokens per second.

    Attributes:
        bytes_per_token: weights and cache read for a token of tg; 0 for pp, which reads them once for many.
        peak: measured read bandwidth of as many threads, bytes per second.
        peer: the other runtime's samples, empty without one.
    """

    test: str
    threads: int
    samples: tuple[float, ...]
    bytes_per_token: int
    peak: float
    peer: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the range of the samples, relative to the median."""
        return (max(self.samples) - min(self.samples)) / 2 / self.median

    def figures(self) -> dict[str, Any]:
        """One flat line for table, CSV and JSON; None where it does not apply."""
        speed = self.median * self.bytes_per_token
        return {
            "test": self.test,
            "threads": self.threads,
            "tokens_per_s": round(self.median, 2),
            "spread": round(self.spread, 4),
            "gb_per_s": round(speed / 1e9, 2) if speed else None,
            "share_of_peak": round(speed / self.peak, 3) if speed else None,
            "peer_tokens_per_s": round(statistics.median(self.peer), 2) if self.peer else None,
            "peer_best": round(max(self.peer), 2) if self.peer else None,
            "ratio": round(self.median / statistics.median(self.peer), 3) if self.peer else None,
            "ratio_to_best": round(self.median / max(self.peer), 3) if self.peer else None,
        }


def as_csv(lines: Sequence[Mapping[str, Any]]) -> str:
    """Lines of the same columns, under their names."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue().rstrip("\n")


@dataclass(frozen=True)
class Report:
    """Everything `smolrun bench` found.

    Attributes:
        logits_hash: SHA-256 (16 digits) of our logits of fixed ids: the same on every CPU and thread count.
        peer_kl: mean KL(peer, ours) over the same ids.
        first_token: seconds from the start of a fresh process to its first token, median.
        peak_memory: VmHWM of that process after COLD_TOKENS tokens in a context of COLD_CONTEXT, bytes; 0 if not known.
        bandwidth: threads -> measured read bandwidth, bytes per second.
        device: where it was measured.
    """

    model: str
    weight_format: str
    model_bytes: int
    tier: str
    logits_hash: str
    peer: str | None
    peer_kl: float | None
    first_token: float
    peak_memory: int
    bandwidth: dict[int, float]
    rows: tuple[Row, ...]
    device: dict[str, str] = field(default_factory=HERE.describe)

    def to_json(self) -> str:
        """Everything, each sample included."""
        document = {"kind": "speed", **asdict(self)}
        document["rows"] = [{**row.figures(), "samples": row.samples, "peer_samples": row.peer} for row in self.rows]
        return json.dumps(document, indent=2)

    def to_csv(self) -> str:
        """A line for each row, with the columns of Row.figures() behind model, tier and hash."""
        common = {"model": self.model, "tier": self.tier, "logits_hash": self.logits_hash}
        return as_csv([{**common, **row.figures()} for row in self.rows])

    def table(self) -> str:
        """For people."""
        lines = [
            f"{self.model}: mostly {self.weight_format}, {self.model_bytes / 1e6:.0f} MB, CPU tier {self.tier}, "
            f"logits {self.logits_hash}",
            f"first token {self.first_token:.2f} s after process start, peak memory {self.peak_memory / 1e6:.0f} MB",
        ]
        peaks = ", ".join(f"{peak / 1e9:.1f} GB/s with {n}" for n, peak in self.bandwidth.items())
        lines.append(f"measured read bandwidth by threads: {peaks}")
        head = f"{'test':>14}{'threads':>8}{'tokens/s':>11}{'+-':>7}{'GB/s':>8}{'of peak':>9}"
        if self.peer:
            lines.append(f"beside {self.peer}, same file, ids and threads; mean KL {self.peer_kl:.1e}")
            head += f"{self.peer:>13}{'its best':>10}{'ratio':>8}{'to best':>9}"
        lines.append(head)
        for f in (row.figures() for row in self.rows):
            line = f"{f['test']:>14}{f['threads']:>8}{f['tokens_per_s']:>11,.1f}{f['spread']:>7.1%}"
            line += f"{f['gb_per_s'] or '':>8}" + (f"{f['share_of_peak']:>9.0%}" if f["share_of_peak"] else " " * 9)
            if self.peer and f["ratio"] is not None:
                line += f"{f['peer_tokens_per_s']:>13,.1f}{f['peer_best']:>10,.1f}"
                line += f"{f['ratio']:>7.2f}x{f['ratio_to_best']:>8.2f}x"
            lines.append(line.rstrip())
        return "\n".join(lines)


def run(
    path: Path,
    *,
    prompt_sizes: Sequence[int] = (512,),
    decode_sizes: Sequence[int] = (128,),
    depths: Sequence[int] = (0,),
    batches: Sequence[int] = (1,),
    threads: Sequence[int] | None = None,
    repeats: int = 5,
    compare: str | None = None,
    quantize: str | None = None,
    kv: str = "f16",
    precision: str = "fast",
    force: bool = False,
    progress: Callable[[str], object] = lambda _: None,
) -> Report:
    """Measures a model.

    Args:
        path: a GGUF file or a checkpoint folder.
        prompt_sizes, decode_sizes, depths: every pp and every tg is measured at every depth.
        batches: every tg is measured with so many sequences; the peer's with one only.
        threads: thread counts; 1 and all cores if None.
        repeats: samples of each figure, after one that is thrown away.
        compare: "llama.cpp" (needs a GGUF file), or None.
        quantize, kv, precision, force: as for smolrun.load.
        progress: gets a line for every test.

    Raises:
        OptionError: a size, a depth or a peer that cannot be.
        SmolrunError: our logits and the peer's are of different models.
    """
    kinds = [("pp", n, 1) for n in prompt_sizes] + [("tg", n, batch) for n in decode_sizes for batch in batches]
    tests = [Case(kind, n, depth, batch) for depth in depths for kind, n, batch in kinds]
    teams = list(dict.fromkeys(threads or (1, available_cores())))
    _check(path, tests, teams, repeats, compare)
    context = max(CHECK_TOKENS, *(test.size + test.depth for test in tests))
    shared = [test.batch * -(-(test.size + test.depth) // PAGE) * PAGE for test in tests if test.batch > 1]
    options: dict[str, Any] = {"quantize": quantize, "kv": kv, "precision": precision, "force": force}
    rows: list[Row] = []
    hashes: dict[int, str] = {}
    kl: float | None = None
    progress("read bandwidth")
    bandwidth = {n: read_bandwidth(n) for n in teams}
    with open_checkpoint(path) as checkpoint:
        ids = prompt(checkpoint.config.vocab_size, context)
        check = _prose(checkpoint)
        for n in teams:
            with ExitStack() as opened:
                model = opened.enter_context(Llama(checkpoint, context=max([context, *shared]), threads=n, **options))
                peer = opened.enter_context(Peer(path, context=context, threads=n)) if compare else None
                ours = logits_in_cuts(model, check, [model.chunk])
                hashes[n] = hashlib.sha256(ours.tobytes()).hexdigest()[:16]
                kl = _agreement(path, peer, ours, check) if peer else None
                for test in tests:
                    progress(f"{test.name}, {n} thread{'s' * (n > 1)}")
                    samples, others = measure(model, peer, test, ids, repeats)
                    per_token = bytes_per_token(checkpoint, test, kv) if test.kind == "tg" and not quantize else 0
                    rows.append(Row(test.name, n, samples, per_token, bandwidth[n], others))
        if len(set(hashes.values())) > 1:
            raise SmolrunError(f"logits differ between thread counts, please report this as a bug: {hashes}")
        progress("first token of a fresh process")
        cold = {"context": min(COLD_CONTEXT, checkpoint.config.max_positions), "threads": teams[-1]}
        first_token, peak_memory = cold_start(path, cold | options)
        return Report(
            model=path.name,
            weight_format=weight_format(checkpoint),
            model_bytes=checkpoint.bytes_total,
            tier=target.choose().name,
            logits_hash=next(iter(hashes.values())),
            peer=compare,
            peer_kl=kl,
            first_token=first_token,
            peak_memory=peak_memory,
            bandwidth=bandwidth,
            rows=tuple(rows),
        )


def _check(path: Path, tests: Sequence[Case], teams: Sequence[int], repeats: int, compare: str | None) -> None:
    if not tests:
        raise OptionError("nothing to measure: give prompt sizes or decode sizes")
    for test in tests:
        if test.size < 1 or test.depth < 0:
            raise OptionError(f"{test.name}: sizes start at 1 and depths at 0")
        if not 1 <= test.batch <= SEGMENTS:
            raise OptionError(f"{test.name}: 1 to {SEGMENTS} sequences expected, not {test.batch}")
    if not all(1 <= n <= MAX_THREADS for n in teams):
        raise OptionError(f"threads are {', '.join(map(str, teams))}: 1 to {MAX_THREADS} expected")
    if repeats < 1:
        raise OptionError(f"repeats is {repeats}: at least 1 expected")
    if compare not in (None, "llama.cpp"):
        raise OptionError(f"compare is {compare!r}: the only peer is 'llama.cpp'")
    if compare and path.is_dir():
        raise OptionError(f"{path} is a folder: llama.cpp reads only GGUF, so give bench a .gguf file to compare")


def _prose(checkpoint: Checkpoint) -> list[int]:
    """Ids to check: of random words llama.cpp's Q6_K is 0.15 from exact and says nothing about who runs which model."""
    tokenizer = Tokenizer.from_source(checkpoint.tokenizer, vocab_size=checkpoint.config.vocab_size)
    return tokenizer.encode(sample_text())[:CHECK_TOKENS]


def _agreement(path: Path, peer: Peer, ours: Logits, check: Sequence[int]) -> float:
    """Mean KL of our logits from the peer's.

    Raises:
        SmolrunError: they are of different models.
    """
    both = Comparison([("peer", "ours")])
    both.add({"peer": peer.logits(check), "ours": ours}, check)
    kl = both.summary("peer", "ours").kl_mean
    if not kl <= CHECK_KL:
        raise SmolrunError(
            f"{path.name}: mean KL between llama.cpp's logits and ours is {kl:.3g}, at most {CHECK_KL} "
            "expected: timings of different models compare nothing (run `smolrun verify`)"
        )
    return kl


def prompt(vocab_size: int, n: int) -> list[int]:
    """n ids that are the same everywhere: random words, no specials (llama-bench takes random ids too)."""
    draw = random.Random(0)
    return [draw.randrange(SPECIALS, vocab_size) for _ in range(n)]


def bytes_per_token(checkpoint: Checkpoint, test: Case, kv: str) -> int:
    """Bytes read for a decoded token: the cache and a share of the weights (but an embedding that is no classifier)."""
    config = checkpoint.config
    weights = checkpoint.bytes_total
    if not config.tied:
        weights -= checkpoint.tensors["token_embd.weight"].nbytes
    positions = test.depth + (test.size + 1) / 2  # the mean over the run
    return round(weights / test.batch + positions * page_bytes(config, kv) / int(PAGE))


def measure(
    model: Model, peer: Peer | None, test: Case, ids: Sequence[int], repeats: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Samples in tokens per second, ours and the peer's in turns; the first round warms up and is thrown away."""
    depth, work = ids[: test.depth], ids[test.depth : test.depth + test.size]
    ours: list[float] = []
    others: list[float] = []
    for _ in range(repeats + 1):
        elapsed = seconds(model, work, depth, one_by_one=test.kind == "tg", batch=test.batch)
        ours.append(test.batch * test.size / elapsed)
        if peer is not None and test.batch == 1:
            timed = peer.decode if test.kind == "tg" else peer.prefill
            others.append(test.size / timed(work, depth=depth))
    return tuple(ours[1:]), tuple(others[1:])


def seconds(model: Model, ids: Sequence[int], depth: Sequence[int], *, one_by_one: bool, batch: int = 1) -> float:
    """Seconds for ids behind `depth` ids: logits of each (decode, of `batch` sequences at once), or of the last."""
    whole = [*depth, *ids]
    texts = [[*whole[i:], *whole[:i]] for i in range(batch)]  # nothing in common
    seqs: list[CachedSequence] = []
    try:
        for text in texts:
            seqs.append(seq := model.open(text))
            seq.truncate(min(seq.length, len(depth)))
            for _ in passes(model, seq, text[: len(depth)], 0):
                pass
        begin = time.perf_counter()
        if one_by_one:
            for at in range(len(depth), len(whole)):
                model.logits(model.step([(seq, [text[at]]) for seq, text in zip(seqs, texts, strict=True)]))
        else:
            *_, hidden = passes(model, seqs[0], whole, 1)
            assert hidden is not None  # nobody cancels
            model.logits(hidden)
        return time.perf_counter() - begin
    finally:
        for seq in seqs:
            seq.close()


def roofline(threads: int) -> dict[str, float]:
    """What so many threads can do at best: bytes read and multiply-adds, int8 and f32, per second."""
    return {"read": read_bandwidth(threads), "int8": peak(threads, "int8"), "f32": peak(threads, "f32")}


def peak(threads: int, kind: str) -> float:
    """Multiply-adds per second of a prefill tile's inner loop with all data in the L1 cache; kind: "int8" or "f32"."""
    tier = target.choose()
    kernel = f"peak_{kind}"
    work = load.c_function(load.addresses(tier, [kernel])[kernel], 2, ctypes.c_int64)
    memory = Arena({"probe": PROBE_L1 * threads})
    memory.arrays["probe"].fill(0x3F)  # f32 0.75
    start = memory.address("probe")
    step = PROBE_COLUMNS * ROWS * target.peak_tokens(tier, int(kind == "int8"))
    return _together(threads, lambda i: work(start + i * PROBE_L1, PROBE_STEPS), step * PROBE_STEPS)


def read_bandwidth(threads: int) -> float:
    """Bytes per second that so many threads read at best, each its part of 1 GB in 1, 2, 4 or 8 parallel streams."""
    kernels = load.addresses(target.choose(), [f"read_{streams}" for streams in PROBE_STREAMS])
    part = PROBE_BYTES // threads // PROBE_STEP * PROBE_STEP
    memory = Arena({"probe": part * threads})
    memory.arrays["probe"].fill(1)  # pages that were never written all lie on one page of zeros
    start = memory.address("probe")

    def reading(address: int) -> Callable[[int], object]:
        read = load.c_function(address, 3, ctypes.c_int64)
        return lambda i: read(start + i * part, part, 1)

    return max(_together(threads, reading(address), part) for address in kernels.values())


def hand_over() -> float:
    """Seconds that a cache line takes from one core to another, at best: what two threads wait for each other.

    Some 40 ns where they share a last-level cache, 200 where they do not. A system, or the host of a virtual machine,
    that moves threads between such cores changes what two of them compute, and what memory gives them, within seconds.
    """
    work = load.c_function(load.addresses(target.choose(), ["hand_over"])["hand_over"], 3, ctypes.c_int64)
    memory = Arena({"team": TEAM_BYTES})
    memory.arrays["team"].view(np.int64)[T.give_way // 8] = give_way()
    team = memory.address("team")
    return 1 / _together(2, lambda turn: work(team, turn, PROBE_HANDED), PROBE_HANDED)


def _together(threads: int, work: Callable[[int], object], amount: float) -> float:
    """Units per second of so many threads that each do work(i), `amount` units, at once; the best of PROBE_PASSES."""
    gate = threading.Barrier(threads)

    def timed(i: int) -> tuple[float, float]:
        gate.wait()
        begin = time.perf_counter()
        work(i)
        return begin, time.perf_counter()

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(PROBE_PASSES):
            spans = list(pool.map(timed, range(threads)))
            best = max(best, amount * threads / (max(end for _, end in spans) - min(begin for begin, _ in spans)))
    return best


def cold_start(path: Path, options: dict[str, Any]) -> tuple[float, int]:
    """Median seconds from the start of a process to its first token, and the most memory one took, in bytes.

    One process before those that count makes what is kept for later starts, where that is missing.
    """
    waits: list[float] = []
    memory = 0
    command = [sys.executable, "-c", COLD_SCRIPT, str(path.absolute()), json.dumps(options), str(COLD_TOKENS)]
    for run in range(1 + COLD_RUNS):
        begin = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as child:
            assert child.stdout
            first = child.stdout.readline()
            wait = time.perf_counter() - begin
            rest = child.stdout.read()
        if first != "first\n" or child.returncode:
            raise SmolrunError(f"a fresh process gave no token, exit code {child.returncode}; its reason is above")
        if run:
            waits.append(wait)
            memory = max(memory, int(rest))
    return statistics.median(waits), memory
