"""A runtime in a child process of its own, and llama.cpp as one: the same file, the same ids.

    Runtime(command, ...) --- one JSON line per request ---> a child that calls serve(an object, a method per request)
    Peer(path, ...)       <-- one JSON line, then raw bytes of an array, if any ---     here: llama-cpp-python's C API

Not in our process: its team would share our cores and its memory would count as ours. Between two requests the child
waits in a read; llama.cpp's team stops spinning within milliseconds, and pause() stops one that does not.
The children of the other peers are in benchmarks/adapters.py: this file imports nothing but NumPy, to run in any
environment.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from smolrun.errors import OptionError, SmolrunError

if TYPE_CHECKING:
    from typing_extensions import Self

FTYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q4_K_M": 15,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "BF16": 32,
}
BATCH, UBATCH = 2048, 512  # llama.cpp's defaults: tokens per call and per pass
GGML_TYPE_F32 = 0
LOG_ERROR = 4


class PeerError(SmolrunError):
    """A child refused a request or died; carries its own last words."""


def available() -> bool:
    """Whether llama-cpp-python is installed (it is not imported)."""
    return importlib.util.find_spec("llama_cpp") is not None


class Runtime:
    """A runtime with one model open, in a child process.

    Args:
        command: starts the child.
        name: of the runtime, for messages.
        env: the child's environment; ours if None.
        model: arguments of its request "open", whose reply tells `vocab_size`.

    Raises:
        PeerError: it cannot open the model.
    """

    def __init__(
        self, command: Sequence[str], *, name: str, env: Mapping[str, str] | None = None, **model: Any
    ) -> None:
        self._child = Child(command, name=name, env=env)
        try:
            self.opened = self._child.ask("open", **model)
        except BaseException:
            self._child.close()
            raise
        self.vocab_size = int(self.opened["vocab_size"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child; safe to repeat."""
        self._child.close()

    def pause(self) -> None:
        """Stops the child where it is, threads that spin too, until its next request (POSIX)."""
        self._child.pause()

    def logits(self, ids: Sequence[int], *, one_by_one: bool = False) -> NDArray[np.float32]:
        """Logits of every position from an empty cache, in batches or one by one: float32 (len(ids), vocab_size)."""
        self._child.ask("logits", ids=list(ids), one_by_one=one_by_one)
        raw = self._child.read(len(ids) * self.vocab_size * 4)
        return np.frombuffer(raw, np.float32).reshape(len(ids), self.vocab_size)

    def prefill(self, ids: Sequence[int], *, depth: Sequence[int] = ()) -> float:
        """Seconds for one pass over ids (logits of the last one) behind `depth` ids already in the cache."""
        return float(self._child.ask("prefill", ids=list(ids), depth=list(depth))["seconds"])

    def decode(self, ids: Sequence[int], *, depth: Sequence[int] = ()) -> float:
        """Seconds for ids one by one, logits of each, behind `depth` ids already in the cache."""
        return float(self._child.ask("decode", ids=list(ids), depth=list(depth))["seconds"])


class Peer(Runtime):
    """llama.cpp.

    Args:
        path: a GGUF file.
        context: tokens its cache holds.
        threads: of its team.
        exact: f32 KV cache and plain attention, for the exact model (a file of F32 weights).
        flash: flash attention; None leaves the choice to llama.cpp.
        patient: its team sleeps at barriers instead of spinning: for answers, not for timings. With a busy neighbour
            on two cores 32 tokens of the exact model took 1.2 s so, 30 s spinning.
        python: the interpreter of the environment that llama-cpp-python is installed in; ours if None.

    Raises:
        OptionError: llama-cpp-python is not installed.
        PeerError: it cannot open the file.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int = 2048,
        threads: int = 1,
        exact: bool = False,
        flash: bool | None = None,
        patient: bool = False,
        python: str | None = None,
    ) -> None:
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])} if python else {**os.environ}
        super().__init__(
            _llama_cpp(python),
            name="llama.cpp",
            env=env | ({"OMP_WAIT_POLICY": "passive"} if patient else {}),
            path=str(path), context=context, threads=threads, exact=exact, flash=flash,
        )  # fmt: skip

    def threads(self, n: int) -> None:
        """Sets the size of its team."""
        self._child.ask("threads", threads=n)

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        """The n most probable continuations, end-of-text ignored, lowest id on ties."""
        return [int(i) for i in self._child.ask("greedy", ids=list(ids), n=n)["ids"]]


def requantise(source: Path, target: Path, ftype: str, *, threads: int = 0) -> None:
    """Writes a GGUF file again in another format with llama.cpp's own quantiser, from whatever format it has.

    Args:
        source: a GGUF file.
        target: written anew.
        ftype: a name of FTYPES; "F32" gives every tensor as float32, norms and embedding too: the file's exact model.
        threads: 0 for as many as there are cores.

    Raises:
        OptionError: an unknown ftype, or llama-cpp-python is not installed.
        PeerError: llama.cpp refused.
    """
    if ftype not in FTYPES:
        raise OptionError(f"ftype is {ftype!r}: choose one of {', '.join(FTYPES)}")
    child = Child(_llama_cpp(), name="llama.cpp")
    try:
        child.ask("requantise", source=str(source), target=str(target), ftype=FTYPES[ftype], threads=threads)
    finally:
        child.close()


def _llama_cpp(python: str | None = None) -> list[str]:
    """The command that starts llama.cpp as a child."""
    if python is None and not available():
        raise OptionError(
            'llama.cpp is not installed here: pip install "smolrun[reference]" (compiles C++ for some minutes)'
        )
    return [python or sys.executable, "-m", "smolrun.peer"]


class Child:
    """The pipe to a child that runs serve(): ask() sends one request and returns its reply."""

    def __init__(self, command: Sequence[str], *, name: str, env: Mapping[str, str] | None = None) -> None:
        self._name = name
        self._paused = False
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the child
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, env=env
        )

    def pause(self) -> None:
        """Stops every thread of the child until the next request; nothing where there are no such signals."""
        if hasattr(signal, "SIGSTOP") and self._process.poll() is None:
            self._process.send_signal(signal.SIGSTOP)
            self._paused = True

    def _resume(self) -> None:
        if self._paused:
            self._process.send_signal(signal.SIGCONT)
            self._paused = False

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._resume()
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (BrokenPipeError, ValueError):  # ended before, or closed by us
            line = b""
        if not line:
            raise PeerError(f"{self._name} ended during {do!r}: {self._last_words()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise PeerError(f"{self._name}, {do!r}: {reply['error']}; {self._last_words()}")
        return reply

    def read(self, n: int) -> bytes:
        assert self._process.stdout
        raw = self._process.stdout.read(n)
        if len(raw) != n:
            raise PeerError(f"{self._name} ended while sending: {len(raw):,} of {n:,} bytes came; {self._last_words()}")
        return raw

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        if self._stderr.closed:
            return
        self._resume()
        self._process.stdin.close()  # its read returns nothing: it leaves
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._stderr.close()

    def _last_words(self) -> str:
        if self._stderr.closed:
            return "it was closed"
        code = self._process.poll()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        words = f"its last words: {lines[-1]}" if lines else "it said nothing"
        return words if code is None else f"exit code {code}, {words}"


# ---- the child -------------------------------------------------------------------------------------------------------


class _LlamaCpp:
    """llama.cpp's C API as far as the requests need it; a method per request."""

    def __init__(self) -> None:
        self.lib: Any = importlib.import_module("llama_cpp")
        self._log = self.lib.llama_log_callback(self._on_log)  # kept: C holds a pointer to it
        self.lib.llama_log_set(self._log, ctypes.c_void_p(0))
        self.lib.llama_backend_init()
        self.model: Any = None
        self.context: Any = None
        self.vocab_size = 0
        self.cached: list[int] = []  # the ids in its cache

    @staticmethod
    def _on_log(level: int, text: bytes, _: Any) -> None:
        if level == LOG_ERROR:
            sys.stderr.write(text.decode(errors="replace"))
            sys.stderr.flush()

    def open(
        self, path: str, context: int, threads: int, exact: bool = False, flash: bool | None = None
    ) -> dict[str, Any]:
        lib = self.lib
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not self.model:
            raise ValueError(f"cannot open {path}")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, BATCH, UBATCH
        params.n_threads = params.n_threads_batch = threads
        if exact:
            params.type_k = params.type_v = GGML_TYPE_F32
            flash = False
        if flash is not None:
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise ValueError(f"no context of {context} tokens for {path}")
        self.vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        return {"vocab_size": self.vocab_size}

    def forget(self) -> None:
        self.cached.clear()

    def threads(self, threads: int) -> None:
        self.lib.llama_set_n_threads(self.context, threads, threads)

    def keep(self, ids: Sequence[int]) -> int:
        """Drops what the cache holds beyond its common prefix with ids. Returns that prefix's length."""
        common = 0
        while common < min(len(ids), len(self.cached)) and ids[common] == self.cached[common]:
            common += 1
        self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.context), 0, common, -1)
        del self.cached[common:]
        return common

    def run(self, ids: Sequence[int], *, every: bool) -> None:
        """One pass over ids behind those in the cache; logits of every one, or of the last."""
        start = len(self.cached)
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i] = token, start + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = every or i == len(ids) - 1
            code = self.lib.llama_decode(self.context, batch)
        finally:
            self.lib.llama_batch_free(batch)
        if code:
            raise ValueError(f"llama_decode returned {code} at {start} + {len(ids)} tokens")
        self.cached += ids

    def rows(self, n: int) -> NDArray[np.float32]:
        """The last pass's logits: (n, vocab_size)."""
        return np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), shape=(n, self.vocab_size))

    def fill(self, ids: Sequence[int]) -> None:
        """The cache holds exactly ids; a common prefix is kept."""
        for start in range(self.keep(ids), len(ids), UBATCH):
            self.run(ids[start : start + UBATCH], every=False)

    def logits(self, ids: Sequence[int], one_by_one: bool) -> NDArray[np.float32]:
        self.keep(())
        out = np.empty((len(ids), self.vocab_size), np.float32)
        step = 1 if one_by_one else UBATCH
        for start in range(0, len(ids), step):
            part = ids[start : start + step]
            self.run(part, every=True)
            out[start : start + len(part)] = self.rows(len(part))
        return out

    def greedy(self, ids: Sequence[int], n: int) -> dict[str, Any]:
        self.keep(())  # the last id has to be computed here for its logits
        self.fill(ids)
        out: list[int] = []
        for i in range(n):
            out.append(int(self.rows(1)[0].argmax()))
            if i < n - 1:
                self.run(out[-1:], every=False)
        return {"ids": out}

    def prefill(self, ids: Sequence[int], depth: Sequence[int]) -> dict[str, Any]:
        return self._timed(ids, depth, min(len(ids), BATCH))

    def decode(self, ids: Sequence[int], depth: Sequence[int]) -> dict[str, Any]:
        return self._timed(ids, depth, 1)

    def _timed(self, ids: Sequence[int], depth: Sequence[int], step: int) -> dict[str, Any]:
        """As llama-bench times it: llama_decode of a plain token array, then synchronise."""
        lib = self.lib
        self.fill(depth)
        tokens = (lib.llama_token * len(ids))(*ids)
        parts = [
            lib.llama_batch_get_one(
                ctypes.cast(ctypes.byref(tokens, 4 * i), ctypes.POINTER(lib.llama_token)), min(step, len(ids) - i)
            )
            for i in range(0, len(ids), step)
        ]
        begin = time.perf_counter()
        for part in parts:
            if lib.llama_decode(self.context, part):
                raise ValueError(f"llama_decode failed at {len(depth)} + {len(ids)} tokens")
            lib.llama_synchronize(self.context)
        end = time.perf_counter()
        self.cached += ids
        return {"seconds": end - begin}

    def requantise(self, source: str, target: str, ftype: int, threads: int) -> None:
        params = self.lib.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize, params.nthread = ftype, True, threads
        code = self.lib.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
        if code:
            raise ValueError(f"llama_model_quantize returned {code} for {source}")


def serve(answers: Any) -> None:
    """A child's main loop: the requests on stdin, each answered by the method of its name, until there are no more.

    A method returns None, a dict, or a float32 array. What a library prints goes to stderr: stdout carries replies.
    """
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for line in requests:
        request = json.loads(line)
        array: NDArray[np.float32] | None = None
        try:
            result = getattr(answers, request.pop("do"))(**request)
            if isinstance(result, np.ndarray):
                array, result = np.ascontiguousarray(result, np.float32), {}
            reply = result or {}
        except Exception as problem:
            answers.forget()  # what is in the cache now is anybody's guess: start anew
            reply = {"error": f"{type(problem).__name__}: {problem}"}
        replies.write(json.dumps(reply).encode() + b"\n")
        if array is not None:
            replies.write(array.data.cast("B"))
        replies.flush()


if __name__ == "__main__":
    serve(_LlamaCpp())
