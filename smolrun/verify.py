"""How exact the logits are: ours and llama.cpp's on the same file, against the exact model of that file.

The exact model is the file's weights dequantised to float32 and computed in float32: llama.cpp on the file requantised
to F32, with a float32 cache. Both runtimes compute with 8-bit activations and differ from it; the precision contract
(limit_of) bounds by how much we may. Besides, our own logits have to be the same bits whichever way the work is cut:
that needs no peer and is checked too.

Comparison, identity and Report know arrays and one protocol only, no files.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolrun.errors import OptionError
from smolrun.files.checkpoint import Checkpoint, open_checkpoint
from smolrun.generate.engine import Model, generate_ids
from smolrun.generate.sampler import Sampling
from smolrun.model.llama import Llama
from smolrun.model.machine import available_cores
from smolrun.peer import Peer, requantise
from smolrun.text.tokenizer import Tokenizer

Logits = NDArray[np.float32]  # (n, vocab_size)
F64Array = NDArray[np.float64]

WINDOW = 512  # tokens per independent window: 100 MB of logits for each runtime at 49,152 words
BLOCK_ROWS = 16  # rows per step of the comparison: 6 MB of float64 stays in cache
GREEDY_PROMPT = 32
GREEDY_TOKENS = 64
GREEDY_RUNS = 4
IDENTITY_TOKENS = 160  # tokens of the identity checks, once one by one


@dataclass(frozen=True)
class Limit:
    """What the precision contract demands of a format and precision; None where it demands nothing."""

    kl_ratio: float | None = None  # mean KL(exact, ours) / mean KL(exact, llama.cpp)
    kl_exact: float | None = None  # mean KL(exact, ours)
    kl_peer: float | None = None  # mean KL(llama.cpp, ours)
    ppl_change: float | None = None  # |ppl(ours) / ppl(exact) - 1|


FAST = Limit(kl_ratio=1.05, ppl_change=0.004)  # one int8 term, as llama.cpp
EXACT = Limit(kl_exact=1e-5, ppl_change=0.004)  # two int8 terms
FLOAT = Limit(
    kl_peer=1e-4, ppl_change=0.004
)  # F32 and F16: both runtimes are as good as exact, a ratio of noise says nothing


def limit_of(weight_format: str, precision: str) -> Limit:
    """The contract for a file of mostly `weight_format` weights, computed with `precision` "fast" or "exact"."""
    if weight_format in ("F32", "F16"):
        return FLOAT
    return EXACT if precision == "exact" else FAST


# ---- comparison: arrays only -----------------------------------------------------------------------------------------


def log_softmax(logits: NDArray[Any]) -> F64Array:
    """Natural logarithms of probabilities, float64 of the shape given: (n, vocab_size)."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


@dataclass(frozen=True)
class Summary:
    """How far one runtime is from the truth over some tokens; KL in nats, perplexity over predicted tokens."""

    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float
    ppl: float


class Comparison:
    """Gathers windows of logits of several runtimes and compares pairs of them: (truth, other).

    >>> both = Comparison([("exact", "ours")])
    >>> both.add({"exact": np.eye(3, dtype=np.float32), "ours": np.eye(3, dtype=np.float32)}, [0, 1, 2])
    >>> both.summary("exact", "ours").kl_mean
    0.0
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self.names = sorted({name for pair in pairs for name in pair})
        self._kl: dict[tuple[str, str], list[F64Array]] = {pair: [] for pair in pairs}
        self._same: dict[tuple[str, str], list[NDArray[np.bool_]]] = {pair: [] for pair in pairs}
        self._loss: dict[str, list[F64Array]] = {name: [] for name in self.names}

    def add(self, logits: Mapping[str, Logits], ids: Sequence[int]) -> None:
        """One window: each runtime's logits of all its positions, (len(ids), vocab_size); row i predicts ids[i + 1]."""
        shapes = {name: logits[name].shape for name in self.names}
        if len(set(shapes.values())) != 1 or len(logits[self.names[0]]) != len(ids):
            raise ValueError(f"logits of {shapes} for {len(ids)} ids")
        targets = np.asarray(ids, np.intp)
        for i in range(0, len(ids), BLOCK_ROWS):
            log_p = {name: log_softmax(logits[name][i : i + BLOCK_ROWS]) for name in self.names}
            following = targets[i + 1 : i + 1 + BLOCK_ROWS]
            for name, lp in log_p.items():
                self._loss[name].append(-lp[np.arange(len(following)), following])
            for truth, other in self._kl:
                p, q = log_p[truth], log_p[other]
                self._kl[truth, other].append((np.exp(p) * (p - q)).sum(axis=1))
                self._same[truth, other].append(p.argmax(axis=1) == q.argmax(axis=1))

    def ppl(self, name: str) -> float:
        """Perplexity of a runtime over everything added; NaN if that is nothing."""
        return float(np.exp(_join(self._loss[name]).mean()))

    def summary(self, truth: str, other: str) -> Summary:
        """A pair over everything added; NaN if that is nothing."""
        kl = _join(self._kl[truth, other])
        return Summary(
            kl_mean=float(kl.mean()),
            kl_p99=float(np.quantile(kl, 0.99)),
            kl_max=float(kl.max()),
            top1=float(_join(self._same[truth, other]).mean()),
            ppl=self.ppl(other),
        )


def _join(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.full(1, np.nan)


def windows(ids: Sequence[int], size: int = WINDOW) -> Iterator[Sequence[int]]:
    """Independent runs of at most `size` ids; a last one too short to predict anything is dropped."""
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        if len(part) > 1:
            yield part


def match_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids agree."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


# ---- identity: the same bits however the work is cut -----------------------------------------------------------------


def logits_in_cuts(model: Model, ids: Sequence[int], sizes: Sequence[int], *, reuse: bool = False) -> Logits:
    """Logits of ids computed in passes of the sizes given (the last one repeats): (len(ids), vocab_size).

    With reuse, starts behind whatever the cache already holds of ids: fewer rows come back, those of the rest.
    """
    seq = model.open(ids)
    try:
        if not reuse:
            seq.truncate(0)
        at, turn = seq.length, 0
        rows: list[Logits] = []
        while at < len(ids):
            size = min(sizes[min(turn, len(sizes) - 1)], model.chunk)
            rows.append(model.logits(model.hidden(seq, ids[at : at + size])))
            at, turn = at + size, turn + 1
        return np.concatenate(rows)
    finally:
        seq.close()


def identity(model: Model, ids: Sequence[int]) -> dict[str, int]:
    """Rows of logits that differ in any bit from those of the plain prefill, for every way of cutting the same ids.

    Args:
        model: ours, or a mock.
        ids: at least 8 of them.

    Returns:
        name of the way -> rows that differ; all 0 when the promise is kept.
    """
    n = len(ids)
    plain = logits_in_cuts(model, ids, [model.chunk])
    ways: dict[str, Logits] = {
        "one by one": logits_in_cuts(model, ids, [1]),
        "chunks of 7": logits_in_cuts(model, ids, [7]),
        "uneven chunks": logits_in_cuts(model, ids, [n // 2 + 1, 1, n // 4, 3]),
    }
    fork = [*ids[: n // 2], *reversed(ids[: n - n // 2])]  # shares half, then differs: its prefix is reused
    logits_in_cuts(model, fork, [model.chunk])
    ways["reused prefix"] = logits_in_cuts(model, ids, [model.chunk], reuse=True)
    return {name: differing_rows(plain[n - len(rows) :], rows) for name, rows in ways.items()}


def differing_rows(a: Logits, b: Logits) -> int:
    """Rows that are not the same bits: (n, vocab_size) both."""
    return int((a.view(np.uint32) != b.view(np.uint32)).any(axis=1).sum())


# ---- the verdict -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """Everything `smolrun verify` found.

    Attributes:
        ours, peer: both runtimes against the exact model; to_peer: ours against llama.cpp.
        greedy_ours, greedy_peer: leading ids equal to the exact model's greedy continuation, one entry per prompt.
        identity: way of cutting -> rows of logits whose bits differ.
    """

    model: str
    weight_format: str
    precision: str
    tokens: int
    window: int
    exact_ppl: float
    ours: Summary
    peer: Summary
    to_peer: Summary
    greedy_tokens: int
    greedy_ours: tuple[int, ...]
    greedy_peer: tuple[int, ...]
    identity: dict[str, int]

    @property
    def failures(self) -> list[str]:
        """What breaks the contract, in words; NaN breaks it."""
        limit = limit_of(self.weight_format, self.precision)
        ratio = self.ours.kl_mean / self.peer.kl_mean if self.peer.kl_mean else float("inf")
        checks = (
            ("mean KL to exact, over llama.cpp's", ratio, limit.kl_ratio),
            ("mean KL to exact", self.ours.kl_mean, limit.kl_exact),
            ("mean KL to llama.cpp", self.to_peer.kl_mean, limit.kl_peer),
            ("relative change of perplexity", abs(self.ours.ppl / self.exact_ppl - 1), limit.ppl_change),
        )
        found = [
            f"{what}: {value:.3g}, the contract allows {bound:.3g}"
            for what, value, bound in checks
            if bound is not None and not value <= bound
        ]
        return found + [f"{way}: {rows} rows of logits differ in bits" for way, rows in self.identity.items() if rows]

    @property
    def ok(self) -> bool:
        """Whether the precision contract and the identity of bits hold."""
        return not self.failures

    def to_json(self) -> str:
        """Every figure, the verdict and its reasons."""
        return json.dumps({**asdict(self), "ok": self.ok, "failures": self.failures}, indent=2)

    def table(self) -> str:
        """For people."""
        lines = [
            f"{self.model}: mostly {self.weight_format}, precision {self.precision}, "
            f"{self.tokens:,} tokens in windows of {self.window}",
            f"{'against the exact model':26}{'mean KL':>11}{'99 %':>11}{'max':>11}{'top-1':>8}{'perplexity':>12}"
            f"{'greedy':>16}",
        ]
        greedy = {"smolrun": self.greedy_ours, "llama.cpp": self.greedy_peer}
        for name, s in (("smolrun", self.ours), ("llama.cpp", self.peer), ("smolrun to llama.cpp", self.to_peer)):
            matched = "/".join(map(str, greedy[name])) if name in greedy else ""
            lines.append(
                f"{name:26}{s.kl_mean:11.2e}{s.kl_p99:11.2e}{s.kl_max:11.2e}{s.top1:8.4f}{s.ppl:12.4f}{matched:>16}"
            )
        lines.append(f"{'exact model':26}{'':41}{self.exact_ppl:12.4f}{f'of {self.greedy_tokens} each':>16}")
        lines += [
            f"bits, {way:20}{'same' if not rows else f'{rows} rows differ'}" for way, rows in self.identity.items()
        ]
        lines += [f"BREAKS THE CONTRACT: {failure}" for failure in self.failures] or ["the precision contract holds"]
        return "\n".join(lines)


def sample_text() -> str:
    """The text shipped for this purpose: prose, science, code, a list, a letter, a dialogue; 1,200 tokens."""
    return (Path(__file__).parent / "verify.txt").read_text(encoding="utf-8")


# ---- the run ---------------------------------------------------------------------------------------------------------


def weight_format(checkpoint: Checkpoint) -> str:
    """The format that holds most of the weights."""
    weights: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        weights[tensor.format] += math.prod(tensor.shape)
    return weights.most_common(1)[0][0]


def run(
    path: Path,
    *,
    text_file: Path | str | None = None,
    max_tokens: int = 4096,
    window: int = WINDOW,
    precision: str = "fast",
    threads: int | None = None,
    kv: str = "f16",
    force: bool = False,
    progress: Callable[[str], object] = lambda _: None,
) -> Report:
    """Compares smolrun and llama.cpp with the exact model of a file, and smolrun with itself.

    Needs llama-cpp-python, and room for the model in float32 both in the temporary folder and in memory.

    Args:
        path: a GGUF file (llama.cpp reads nothing else).
        text_file: UTF-8 text to predict; the shipped sample_text() if None.
        max_tokens: how many of its tokens at most.
        window: tokens of each independent run.
        precision, threads, kv, force: as for smolrun.load.
        progress: gets a line for every step.

    Raises:
        OptionError: not a GGUF file, a text too short, or llama-cpp-python is missing.
        PeerError: llama.cpp refused the file.
    """
    if path.is_dir():
        raise OptionError(f"{path} is a folder: llama.cpp reads only GGUF, so give verify a .gguf file")
    with open_checkpoint(path) as checkpoint:
        text = sample_text() if text_file is None else Path(text_file).read_text(encoding="utf-8")
        ids = Tokenizer.from_source(checkpoint.tokenizer).encode(text)[:max_tokens]
        if len(ids) < 2 * GREEDY_PROMPT:
            raise OptionError(f"the text has {len(ids)} tokens: give at least {2 * GREEDY_PROMPT}")
        parts = list(windows(ids, window))
        context, probe = max(len(parts[0]), GREEDY_PROMPT + GREEDY_TOKENS), parts[0][:IDENTITY_TOKENS]
        load = partial(Llama, checkpoint, context=context, kv=kv, precision=precision, force=force)
        with load(threads=threads) as model:
            logits, matches = _beside_llama_cpp(model, path, parts, threads or available_cores(), progress)
            progress("the same bits, however the work is cut")
            differing = identity(model, probe)
            plain = logits_in_cuts(model, probe, [model.chunk])
        for count in (1, 2):
            with load(threads=count) as model:
                rows = logits_in_cuts(model, probe, [model.chunk])
                differing[f"{count} thread{'s' * (count > 1)}"] = differing_rows(plain, rows)
        return Report(
            model=path.name,
            weight_format=weight_format(checkpoint),
            precision=precision,
            tokens=len(ids),
            window=window,
            exact_ppl=logits.ppl("exact"),
            ours=logits.summary("exact", "ours"),
            peer=logits.summary("exact", "peer"),
            to_peer=logits.summary("peer", "ours"),
            greedy_tokens=GREEDY_TOKENS,
            greedy_ours=matches["ours"],
            greedy_peer=matches["peer"],
            identity=differing,
        )


def _beside_llama_cpp(
    model: Llama, path: Path, parts: Sequence[Sequence[int]], threads: int, progress: Callable[[str], object]
) -> tuple[Comparison, dict[str, tuple[int, ...]]]:
    """Logits of all parts, and the greedy ids that "ours" and "peer" have in common with the exact model."""
    found = Comparison([("exact", "ours"), ("exact", "peer"), ("peer", "ours")])
    prompts = [part[:GREEDY_PROMPT] for part in parts if len(part) >= GREEDY_PROMPT][:GREEDY_RUNS]
    with tempfile.TemporaryDirectory(prefix="smolrun-verify-") as folder:
        exact_path = Path(folder) / "exact.gguf"
        progress("the exact model: every tensor as float32")
        requantise(path, exact_path, "F32")
        with (
            Peer(exact_path, context=model.context, threads=threads, exact=True, patient=True) as exact,
            Peer(path, context=model.context, threads=threads, patient=True) as peer,
        ):
            for i, part in enumerate(parts):
                progress(f"window {i + 1} of {len(parts)}")
                ours = logits_in_cuts(model, part, [model.chunk])
                found.add({"exact": exact.logits(part), "peer": peer.logits(part), "ours": ours}, part)
            progress("greedy continuations")
            wanted = [exact.greedy(prompt, GREEDY_TOKENS) for prompt in prompts]
            texts = {
                "ours": [greedy(model, prompt, GREEDY_TOKENS) for prompt in prompts],
                "peer": [peer.greedy(prompt, GREEDY_TOKENS) for prompt in prompts],
            }
    return found, {name: tuple(map(match_length, its, wanted)) for name, its in texts.items()}


def greedy(model: Model, ids: Sequence[int], n: int) -> list[int]:
    """Our n most probable continuations, end-of-text ignored."""
    steps = generate_ids(model, ids, max_tokens=n, sampling=Sampling(temperature=0.0), stop_ids=())
    return [step.id for step in steps if step.id is not None]
