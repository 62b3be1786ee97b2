"""Decoding for minutes: tokens per second as the device heats, and what a token costs in energy.

Every sample decodes whole stretches of the same ids behind the same prompt, so that only the machine changes between
two of them. Temperature and clock are read where the system shows them. Energy is RAPL's counters of the processor
packages or, without, what the battery gauge says at the end of each sample: of the whole device then, its screen too.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from smolrun.bench import as_csv, prompt, seconds
from smolrun.errors import OptionError
from smolrun.files.checkpoint import open_checkpoint
from smolrun.generate.engine import Model
from smolrun.model import machine
from smolrun.model.llama import Llama
from smolrun.model.machine import Machine
from smolrun.verify import weight_format

DEPTH = 64  # ids before each stretch
STRETCH = 64  # ids of it
SAMPLE_SECONDS = 1.0  # of whole stretches
RAPL, BATTERY = "RAPL packages", "battery, the whole device"
EDGE = 0.1  # of the samples are the beginning, as many the end; at least 1


@dataclass(frozen=True)
class Sample:
    """Some stretches in a row. Nothing is guessed: None where the system does not tell.

    Attributes:
        at: seconds since the beginning, at the end of the sample.
        celsius, hertz: hottest sensor and fastest core at its end.
        joules: energy that it took.
    """

    at: float
    tokens: int
    tokens_per_s: float
    celsius: float | None = None
    hertz: float | None = None
    joules: float | None = None


@dataclass(frozen=True)
class Report:
    """A run.

    Attributes:
        energy: what its joules are of: RAPL, BATTERY, or "".
    """

    model: str
    weight_format: str
    tier: str
    threads: int
    energy: str
    samples: tuple[Sample, ...]
    device: dict[str, str] = field(default_factory=machine.HERE.describe)

    def figures(self) -> dict[str, Any]:
        """The run in one line."""
        rates = [sample.tokens_per_s for sample in self.samples]
        edge = max(round(EDGE * len(rates)), 1)
        first, last = statistics.median(rates[:edge]), statistics.median(rates[-edge:])
        heat = [sample.celsius for sample in self.samples if sample.celsius is not None]
        paid = [sample for sample in self.samples if sample.joules is not None]
        joules = sum(sample.joules or 0.0 for sample in paid)
        tokens = sum(sample.tokens for sample in self.samples)
        return {
            "test": "sustained decode",
            "threads": self.threads,
            "seconds": round(self.samples[-1].at, 1),
            "tokens": tokens,
            "tokens_per_s": round(statistics.median(rates), 2),
            "first": round(first, 2),
            "last": round(last, 2),
            "kept": round(last / first, 3),
            "celsius": round(max(heat), 1) if heat else None,
            "joules_per_token": round(joules / sum(s.tokens for s in paid), 4) if paid else None,
            "watts": round(joules / sum(s.tokens / s.tokens_per_s for s in paid), 2) if paid else None,
        }

    def to_json(self) -> str:
        """Everything, each sample included."""
        return json.dumps({"kind": "sustained", **asdict(self), "rows": [self.figures()]}, indent=2)

    def to_csv(self) -> str:
        """A line for each sample."""
        return as_csv([asdict(sample) for sample in self.samples])

    def table(self) -> str:
        """For people: at most some twenty lines of the run, and the run as a whole."""
        lines = [
            f"{self.model}: mostly {self.weight_format}, CPU tier {self.tier}, {self.threads} threads",
            f"{'seconds':>8}{'tokens/s':>10}{'celsius':>9}{'GHz':>7}{'watts':>8}",
        ]
        for s in self.samples[:: -(-len(self.samples) // 20)]:
            watts = "" if s.joules is None else f"{s.joules * s.tokens_per_s / s.tokens:.1f}"
            celsius = "" if s.celsius is None else f"{s.celsius:.0f}"
            clock = "" if s.hertz is None else f"{s.hertz / 1e9:.2f}"
            lines.append(f"{s.at:>8.0f}{s.tokens_per_s:>10,.1f}{celsius:>9}{clock:>7}{watts:>8}".rstrip())
        f = self.figures()
        lines.append(
            f"{f['tokens']:,} tokens, {f['tokens_per_s']:,.1f} tok/s; {f['first']:,.1f} at first, {f['last']:,.1f} at "
            f"last: {f['kept']:.0%} kept" + ("" if f["celsius"] is None else f", {f['celsius']:.0f} degrees at most")
        )
        if f["joules_per_token"] is None:
            lines.append("energy: no RAPL counter that we may read, no battery that discharges")
        else:
            lines.append(f"energy: {f['joules_per_token']:.3f} J a token, {f['watts']:.1f} W ({self.energy})")
        return "\n".join(lines)


def run(
    path: Path,
    *,
    duration: float,
    threads: int | None = None,
    quantize: str | None = None,
    kv: str = "f16",
    precision: str = "fast",
    force: bool = False,
    progress: Callable[[str], object] = lambda _: None,
) -> Report:
    """Decodes for `duration` seconds.

    Args:
        path: a GGUF file or a checkpoint folder.
        threads, quantize, kv, precision, force: as for smolrun.load.
        progress: gets a line for every sample.

    Raises:
        OptionError: no time.
    """
    if not duration > 0:
        raise OptionError(f"a run of {duration:g} seconds: more than 0 expected")
    with open_checkpoint(path) as checkpoint:
        context = min(DEPTH + STRETCH, checkpoint.config.max_positions)
        ids, form = prompt(checkpoint.config.vocab_size, context), weight_format(checkpoint)
        with Llama(
            checkpoint, context=context, threads=threads, quantize=quantize, kv=kv, precision=precision, force=force
        ) as model:
            samples, energy = measure(model, ids, duration, machine.HERE, time.perf_counter, progress)
            return Report(path.name, form, model.tier.name, model.threads, energy, tuple(samples))


def measure(
    model: Model,
    ids: list[int],
    duration: float,
    here: Machine,
    clock: Callable[[], float],
    progress: Callable[[str], object],
) -> tuple[list[Sample], str]:
    """Samples until so many seconds have passed, and what their joules are of. The first stretch warms up."""
    depth, stretch = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    seconds(model, stretch, depth, one_by_one=True)
    samples: list[Sample] = []
    counters, energy = here.joules(), ""
    begin = clock()
    while not samples or samples[-1].at < duration:
        tokens, busy, start = 0, 0.0, clock()
        while busy < min(SAMPLE_SECONDS, duration):
            busy += seconds(model, stretch, depth, one_by_one=True)
            tokens += len(stretch)
        now, watts = here.joules(), here.watts()
        joules = None
        if energy != BATTERY and counters and now.keys() == counters.keys():
            energy, joules = RAPL, total(used(counters[name], now[name]) for name in now)
        elif energy != RAPL and watts is not None:  # of one kind in a run: the two do not add up
            energy, joules = BATTERY, watts * (clock() - start)
        counters = now
        sample = Sample(clock() - begin, tokens, tokens / busy, here.temperature(), here.frequency(), joules)
        samples.append(sample)
        progress(f"{sample.at:.0f} s: {sample.tokens_per_s:,.1f} tok/s")
    return samples, energy


def used(before: tuple[float, float], after: tuple[float, float]) -> float | None:
    """Joules between two readings of a counter that begins anew at its second number; None where it is not known."""
    joules = after[0] - before[0] + (after[1] if after[0] < before[0] else 0.0)
    return joules if joules >= 0 else None


def total(joules: Iterable[float | None]) -> float | None:
    """The sum; None if one of them is not known."""
    found = list(joules)
    return None if None in found else sum(filter(None, found))
