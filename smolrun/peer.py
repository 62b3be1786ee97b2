"""llama.cpp as a peer: the same file, the same ids, in a child process of its own.

    Peer(path, ...) --- one JSON line per request ---> python -m smolrun.peer --- llama-cpp-python (low-level C API)
                    <-- one JSON line, then raw bytes of an array, if any ---

Not in our process: its OpenMP team would share our cores and its memory would count as ours. Between two requests the
child waits in a read; its team stops spinning within milliseconds.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from smolrun.errors import OptionError, SmolrunError

FTYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q4_K_M": 15,
    "Q6_K": 18,
    "BF16": 32,
}
BATCH, UBATCH = 2048, 512  # llama.cpp's defaults: tokens per call and per pass
GGML_TYPE_F32 = 0
LOG_ERROR = 4


class PeerError(SmolrunError):
    """llama.cpp refused a request or died; carries its own last words."""


def available() -> bool:
    """Whether llama-cpp-python is installed (it is not imported)."""
    return importlib.util.find_spec("llama_cpp") is not None


class Peer:
    """llama.cpp with one model open, in a child process.

    Args:
        path: a GGUF file.
        context: tokens its cache holds.
        threads: of its team.
        exact: f32 KV cache and plain attention, for the exact model (a file of F32 weights).
        patient: its team sleeps at barriers instead of spinning: for answers, not for timings. With a busy neighbour
            on two cores 32 tokens of the exact model took 1.2 s so, 30 s spinning.

    Raises:
        OptionError: llama-cpp-python is not installed.
        PeerError: it cannot open the file.
    """

    def __init__(
        self, path: Path, *, context: int = 2048, threads: int = 1, exact: bool = False, patient: bool = False
    ) -> None:
        self._child = _Child(patient)
        try:
            reply = self._child.ask("open", path=str(path), context=context, threads=threads, exact=exact)
        except BaseException:
            self._child.close()
            raise
        self.vocab_size = int(reply["vocab_size"])

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child; safe to repeat."""
        self._child.close()

    def threads(self, n: int) -> None:
        """Sets the size of its team."""
        self._child.ask("threads", threads=n)

    def logits(self, ids: Sequence[int], *, one_by_one: bool = False) -> NDArray[np.float32]:
        """Logits of every position from an empty cache, in batches or one by one: float32 (len(ids), vocab_size)."""
        self._child.ask("logits", ids=list(ids), one_by_one=one_by_one)
        raw = self._child.read(len(ids) * self.vocab_size * 4)
        return np.frombuffer(raw, np.float32).reshape(len(ids), self.vocab_size)

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        """The n most probable continuations, end-of-text ignored, lowest id on ties."""
        return [int(i) for i in self._child.ask("greedy", ids=list(ids), n=n)["ids"]]

    def prefill(self, ids: Sequence[int], *, depth: Sequence[int] = ()) -> float:
        """Seconds for one pass over ids (logits of the last one) behind `depth` ids already in the cache."""
        return float(self._child.ask("prefill", ids=list(ids), depth=list(depth))["seconds"])

    def decode(self, ids: Sequence[int], *, depth: Sequence[int] = ()) -> float:
        """Seconds for ids one by one, logits of each, behind `depth` ids already in the cache."""
        return float(self._child.ask("decode", ids=list(ids), depth=list(depth))["seconds"])


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
    child = _Child()
    try:
        child.ask("requantise", source=str(source), target=str(target), ftype=FTYPES[ftype], threads=threads)
    finally:
        child.close()


class _Child:
    """The pipe to the child: ask() sends one request and returns its reply."""

    def __init__(self, patient: bool = True) -> None:
        if not available():
            raise OptionError(
                'llama.cpp is not installed here: pip install "smolrun[reference]" (compiles C++ for some minutes)'
            )
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the child
        self._process = subprocess.Popen(
            [sys.executable, "-m", "smolrun.peer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, "OMP_WAIT_POLICY": "passive"} if patient else None,
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (BrokenPipeError, ValueError):  # ended before, or closed by us
            line = b""
        if not line:
            raise PeerError(f"llama.cpp ended during {do!r}: {self._last_words()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise PeerError(f"llama.cpp, {do!r}: {reply['error']}; {self._last_words()}")
        return reply

    def read(self, n: int) -> bytes:
        assert self._process.stdout
        raw = self._process.stdout.read(n)
        if len(raw) != n:
            raise PeerError(f"llama.cpp ended while sending: {len(raw):,} of {n:,} bytes came; {self._last_words()}")
        return raw

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        if self._stderr.closed:
            return
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

    def open(self, path: str, context: int, threads: int, exact: bool) -> dict[str, Any]:
        lib = self.lib
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not self.model:
            raise ValueError(f"cannot open {path}")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, BATCH, UBATCH
        params.n_threads = params.n_threads_batch = threads
        if exact:
            params.type_k = params.type_v = GGML_TYPE_F32
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise ValueError(f"no context of {context} tokens for {path}")
        self.vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        return {"vocab_size": self.vocab_size}

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


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answers requests until there are no more: the child's main loop."""
    peer = _LlamaCpp()
    for line in requests:
        request = json.loads(line)
        array: NDArray[np.float32] | None = None
        try:
            result = getattr(peer, request.pop("do"))(**request)
            if isinstance(result, np.ndarray):
                array, result = result, {}
            reply = result or {}
        except (ValueError, OSError) as problem:
            peer.cached.clear()  # what is in the cache now is anybody's guess: start anew
            reply = {"error": str(problem)}
        replies.write(json.dumps(reply).encode() + b"\n")
        if array is not None:
            replies.write(array.data.cast("B"))
        replies.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
