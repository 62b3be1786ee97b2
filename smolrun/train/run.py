"""A run: steps, a log, evaluations, checkpoints. Killed at any point and started again, it goes on with the same bits.

    OUT/log.jsonl                        a line for each step and each evaluation; the curve of the run
    OUT/plot.svg                         drawn from it as it goes
    OUT/checkpoints/step-00000200/       values.npy m.npy v.npy (f32), state.json: where the data stood, how long the
                                         log was; under another name until all of it is on the disk
    OUT/model/                           the result

What comes after a checkpoint is forgotten when a run goes on: the log is cut to the length it had.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from smolrun.errors import OptionError
from smolrun.files.whole import whole
from smolrun.train.model import Batch
from smolrun.train.trainer import Trainer

Facts = dict[str, Any]


class Feed(Protocol):
    """Where batches come from, and where they stand: the task of a run."""

    @property
    def steps(self) -> int:
        """Of the whole run."""
        ...

    def next(self) -> Sequence[Batch]:
        """The batches of the next step."""
        ...

    def facts(self) -> Facts:
        """Of the step that was just fed, for the log: the stage, tokens so far, ..."""
        ...

    def due(self, step: int) -> bool:
        """Whether to evaluate after so many steps, whatever the recipe's `evaluate_every`."""
        ...

    def evaluate(self) -> Facts:
        """Figures on what is held out; {} if nothing is. May change what comes, or ask to stop: "stop" -> why."""
        ...

    def state(self) -> Facts:
        """Where it stands, as JSON."""
        ...

    def restore(self, state: Facts) -> None:
        """Stand where a `state` says."""
        ...


@dataclass
class Loop:
    """Takes a trainer through a feed.

    Attributes:
        out: the run's folder.
        identity: what a checkpoint must have in common with this run to be gone on from: keys and values as JSON.
        listen: told of every step, evaluation and checkpoint, as the log is, and of more for people: tokens_per_second,
            seconds_left.
        stop: asked after each step; True saves and ends the run.
    """

    trainer: Trainer
    feed: Feed
    out: Path
    identity: Facts = field(default_factory=dict)
    save_every: int = 200
    evaluate_every: int = 200
    keep_last: int = 2
    listen: Callable[[Facts], object] = lambda facts: None
    stop: Callable[[], bool] = lambda: False
    _reason: str = ""  # why the run that is gone on from had ended

    def run(self) -> bool:
        """All steps that are left; False if it was stopped before the last.

        Raises:
            OptionError: the folder is in use, or holds a run of another recipe.
        """
        with locked(self.out), self._log() as log:
            return self._steps(log)

    def _steps(self, log: Log) -> bool:
        optimiser, first, began = self.trainer.optimiser, self.trainer.optimiser.steps, time.perf_counter()
        tokens, reason = 0, self._reason
        while optimiser.steps < self.feed.steps and not reason:
            step = self.trainer.step(self.feed.next())
            tokens += step.tokens
            line = {"kind": "step", "step": step.number, "loss": step.loss, "lr": step.lr}
            line |= {"gradient_norm": step.gradient_norm, **step.figures, **self.feed.facts()}
            seconds = time.perf_counter() - began
            log.write(line | {"seconds": round(seconds, 3)})
            left = (self.feed.steps - step.number) * seconds / (step.number - first)
            self.listen(line | {"steps": self.feed.steps, "tokens_per_second": tokens / seconds, "seconds_left": left})
            last = step.number == self.feed.steps
            if last or step.number % self.evaluate_every == 0 or self.feed.due(step.number):
                figures = self.feed.evaluate()
                if figures:
                    log.write({"kind": "evaluation", "step": step.number, **figures})
                    self.listen({"kind": "evaluation", "step": step.number, **figures})
                reason = figures.get("stop", "")
            stopped = self.stop()
            if last or stopped or reason or step.number % self.save_every == 0:
                self.listen({"kind": "checkpoint", "step": step.number, "path": str(self.save(log, reason))})
            if stopped and not last:
                return False
        return True

    @contextlib.contextmanager
    def _log(self) -> Iterator[Log]:
        """The log, after whatever the last checkpoint brought back."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "checkpoints").mkdir(exist_ok=True)
        for part in (self.out / "checkpoints").glob(".*.part"):  # of a run that was killed
            shutil.rmtree(part, ignore_errors=True)
        found = checkpoints(self.out)
        log = Log(self.out / "log.jsonl", self.restore(found[-1]) if found else 0)
        try:
            yield log
        finally:
            log.close()

    def restore(self, folder: Path) -> int:
        """Go on from a checkpoint; how long the log was then, in bytes."""
        damaged = f"{folder}: a damaged checkpoint (%s): delete it to go on from the last"
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OptionError(damaged % error) from error
        for key in sorted(self.identity.keys() | state["identity"].keys()):
            mine, its = (json.dumps(facts.get(key)) for facts in (self.identity, state["identity"]))
            if mine != its:
                raise OptionError(
                    f"{self.out} holds a run with {key} = {its}, here it is {mine}: take another run.out, or begin "
                    "anew with --fresh"
                )
        try:
            arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
        except (OSError, ValueError, EOFError) as error:
            raise OptionError(damaged % error) from error
        self.trainer.restore(arrays)
        self.feed.restore(state["feed"])
        self._reason = state.get("stop", "")
        self.listen({"kind": "resume", "step": self.trainer.optimiser.steps, "path": str(folder)})
        return int(state["log_bytes"])

    def save(self, log: Log, stop: str = "") -> Path:
        """A checkpoint of this moment; older ones than the last few go. stop: why the run ends here."""
        folder = self.out / "checkpoints" / f"step-{self.trainer.optimiser.steps:08}"
        if folder.exists():
            return folder
        part = folder.with_name(f".{folder.name}.{os.urandom(6).hex()}.part")
        part.mkdir()
        try:
            for name, values in self.trainer.state().items():
                with open(part / f"{name}.npy", "xb") as file:
                    np.save(file, values)
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:  # NumPy's own says neither where nor why
            shutil.rmtree(part, ignore_errors=True)
            raise OSError(f"{folder} cannot be written ({error}): make room, the same command goes on") from error
        state = {"identity": self.identity, "feed": self.feed.state(), "log_bytes": log.sync(), "stop": stop}
        with whole(part / "state.json") as file:
            file.write(json.dumps(state, indent=1).encode())
        os.rename(part, folder)
        _sync_folder(folder.parent)
        for old in checkpoints(self.out)[: -self.keep_last]:
            gone = old.with_name(f".{old.name}.part")  # a half-deleted one must not look like one
            os.rename(old, gone)
            shutil.rmtree(gone)
        return folder


class Log:
    """JSON lines, each on its way to the disk as soon as it is written."""

    def __init__(self, path: Path, keep: int) -> None:
        """keep: so many bytes of what is there, if it is."""
        self._file = open(path, "ab")  # noqa: SIM115, closed by close
        self._file.truncate(min(keep, self._file.seek(0, os.SEEK_END)))

    def write(self, line: Facts) -> None:
        """Add a line; numbers that are none become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._file.write(json.dumps(clean).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Bytes so far, all on the disk."""
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def checkpoints(out: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted((out / "checkpoints").glob("step-*"))


def read_log(path: Path) -> list[Facts]:
    """Whole lines of a log."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        return [json.loads(line) for line in file if line.endswith(b"\n")]


def discard(out: Path) -> None:
    """Forget a run's checkpoints and log."""
    with locked(out):
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        (out / "log.jsonl").unlink(missing_ok=True)


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """One process at a time; a killed one's lock is gone with it.

    Raises:
        OptionError: another process has it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a+b") as file:
        try:
            if os.name == "nt":
                import msvcrt

                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OptionError(f"{out}: another process trains there: wait for it, or take another run.out") from None
        yield


def identity_of(recipe: Mapping[str, Any], *ignored: str) -> Facts:
    """A recipe's table flattened, but for what may change between two parts of a run."""
    flat = dict[str, Any]()

    def walk(value: Any, where: str) -> None:
        if where in ignored:
            return
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(inner, f"{where}.{key}" if where else key)
        else:
            flat[where] = json.loads(json.dumps(value, default=str))

    walk(recipe, "")
    return flat


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
