"""The curve of a run as an SVG, drawn from its log as it goes (extra `plot`)."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import time
from pathlib import Path

from smolrun.files.whole import whole
from smolrun.train.run import Facts, read_log

SECONDS = 30.0  # between two drawings
POINTS = 2000  # of a curve at most


class Drawing:
    """Draws OUT/plot.svg now and then."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._drawn = time.monotonic()
        self._missing, self._said = importlib.util.find_spec("matplotlib") is None, False

    def told(self, facts: Facts) -> str:
        """Draw if it is time to; what a person should know, or ""."""
        if self._missing:
            said, self._said = self._said, True
            return "" if said else "no plot.svg is drawn without matplotlib: pip install 'smolrun[train]'"
        if facts["kind"] in ("evaluation", "step") and time.monotonic() - self._drawn > SECONDS:
            self.draw()
        return ""

    def draw(self) -> None:
        """Draw it now."""
        if not self._missing:
            draw(self.out)
            self._drawn = time.monotonic()


def draw(out: Path) -> None:
    """OUT/log.jsonl -> OUT/plot.svg: loss (and what is held out), learning rate, gradient norm by step.

    Raises:
        ImportError: no matplotlib.
    """
    from matplotlib.figure import Figure

    lines = read_log(out / "log.jsonl")
    steps = [line for line in lines if line["kind"] == "step"]
    if not steps:
        return
    stride = -(-len(steps) // POINTS)
    steps = [*steps[:-1:stride], steps[-1]]
    tests = [line for line in lines if line["kind"] == "evaluation" and line.get("loss") is not None]
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1])
    numbers = [line["step"] for line in steps]
    for axis, name in zip(axes, ("loss", "lr", "gradient_norm"), strict=True):
        values = [float("nan") if line[name] is None else line[name] for line in steps]
        axis.plot(numbers, values, linewidth=0.8, label="training")
        axis.set_ylabel(name.replace("_", " "))
        axis.grid(alpha=0.3)
    if tests:
        axes[0].plot([line["step"] for line in tests], [line["loss"] for line in tests], "o-", label="held out")
        axes[0].legend()
    for previous, line in itertools.pairwise(steps):
        if previous.get("stage") != line.get("stage"):
            for axis in axes:
                axis.axvline(line["step"], color="grey", linestyle=":", linewidth=1)
    axes[-1].set_xlabel("step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    with contextlib.suppress(OSError), whole(out / "plot.svg") as file:  # a full disk must not end a run
        file.write(buffer.getvalue())
