"""The model: ids and a cache slot in, hidden states and logits out. It fills the argument block and runs the team."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from smolrun.config import ModelConfig
from smolrun.errors import KernelError, ModelClosed, OptionError
from smolrun.files.checkpoint import Checkpoint
from smolrun.files.peft import LowRank
from smolrun.kernels import load as kernels
from smolrun.kernels.block import MATRICES, PART, SPAN, B, S, f32_bits, scratch_bytes
from smolrun.kernels.panels import PANELS, ROWS
from smolrun.kernels.target import choose, token_tile
from smolrun.model import machine, memory, rope
from smolrun.model.adapter import PackedAdapter
from smolrun.model.cache import KVCache, Slot
from smolrun.model.weights import Matrix, Weights, kind_of, plan
from smolrun.model.workers import Team

if TYPE_CHECKING:
    from typing_extensions import Self

Floats = NDArray[np.float32]
MODES = ("f32", "int8", "int8x2")  # activations by their int8 terms
_ALL = (*MATRICES, "head")
# int8 terms of the activations of each matrix. "fast" keeps two where they buy most (benchmarks/LOG.md): for the
# classifier, which prefill runs for one row and decode runs at the speed of memory, and for v, a thirtieth of a
# layer's work. Mean KL to exact 3.7e-3 -> 2.2e-3 (llama.cpp: 3.8e-3), Q4_0.
TWO_TERMS = ("v", "head")
PRECISION = {
    "fast": dict.fromkeys(_ALL, 1) | dict.fromkeys(TWO_TERMS, 2),
    "exact": dict.fromkeys(_ALL, 2),
    "f32": dict.fromkeys(_ALL, 0),
}
ROPE_STEP = 512


TEAM_KERNELS = ("team_rouse", "team_run", "worker_loop")


def matmul_name(fmt: str, terms: int) -> str:
    """The entry point that multiplies a format by activations of so many int8 terms."""
    return f"matmul_{fmt}_{MODES[terms]}"


def terms_of(precision: str) -> Callable[[str, str], int]:
    """(format, matrix) -> int8 terms of its activations."""
    return lambda fmt, matrix: 0 if PANELS[fmt].is_float else PRECISION[precision][matrix]


def kernel_names(matrices: Mapping[str, Matrix], precision: str, kv: str) -> list[str]:
    """The entry points that compute a model: forward, classify, the embedding's rows, then the matrices."""
    key, value = memory.kv_kinds(kv)
    terms = terms_of(precision)
    matmuls = {matmul_name(m.format, terms(m.format, kind_of(name))) for name, m in matrices.items()}
    forward = f"forward_{key}" if key == value else f"forward_{key}_{value}"
    return [forward, "classify", f"row_{matrices['token_embd.weight'].format}", *sorted(matmuls)]


def shape_words(config: ModelConfig, kv: str) -> dict[str, int]:
    """Those words of the argument block that are the model's shape."""
    c, (key_bytes, value_bytes) = config, memory.head_bytes(kv)
    max_k = max(c.dim, c.hidden_dim, c.q_dim)
    return {
        "dim": c.dim,
        "hidden_dim": c.hidden_dim,
        "n_layers": c.n_layers,
        "n_heads": c.n_heads,
        "n_kv_heads": c.n_kv_heads,
        "eps": f32_bits(c.norm_eps),
        "max_k": max_k,
        "scratch_bytes": scratch_bytes(max_k),
        "head_bytes": key_bytes + value_bytes,
        "layer_bytes": c.n_kv_heads * (key_bytes + value_bytes),
        "value_offset": key_bytes,
    }


class Cancelled(Exception):
    """A pass ended early because `cancel` was called; nothing of its chunk is kept."""


class Llama:
    """A loaded model. Calls that run passes must not overlap; `cancel` may come from any thread.

    Attributes:
        config: the model's shape.
        context: positions a sequence may have.
        chunk: ids that one pass takes at most.
        segments: sequences that one pass takes at most.
        tier: the kernels in use.
        formats: weight formats in memory.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        context: int | None = None,
        threads: int | None = None,
        quantize: str | None = None,
        kv: str = "f16",
        precision: str = "fast",
        chunk: int | None = None,
        team: Team | None = None,
        force: bool = False,
        progress: Callable[[str, int, int], object] | None = None,
    ) -> None:
        """As smolrun.load; `team`: that of a model whose passes never overlap with this one's, None: an own one."""
        if precision not in PRECISION:
            raise OptionError(f"precision={precision!r}: expected one of {', '.join(PRECISION)}")
        c = checkpoint.config
        self.config: ModelConfig = c
        ours = machine.HERE.threads()
        self.threads = team.threads if team is not None else ours.count if threads is None else threads
        memory.check_options(c, context, self.threads)
        self.chunk = memory.chunk_of(self.threads) if chunk is None else chunk
        self.segments, self.precision, self.kv = memory.SEGMENTS, precision, kv
        matrices, terms = plan(checkpoint, quantize), terms_of(precision)
        weights = sum(m.bytes for m in matrices.values())
        self.context = memory.default_context(c, weights, kv) if context is None else context
        if not force:
            shapes = [(m.format, m.rows, m.cols) for m in matrices.values()]
            memory.check(checkpoint.path.name, c, shapes, self.context, kv, self.threads)
        names = [*kernel_names(matrices, precision, kv), *TEAM_KERNELS]
        try:
            self.tier = choose()
            code = kernels.addresses(
                self.tier, names, (lambda done, all_, name: progress("compile", done, all_)) if progress else None
            )
        except (kernels.BuildError, RuntimeError) as error:
            raise KernelError(f"{error} (see `smolrun warmup -v`)") from error
        self.weights = Weights(
            c, checkpoint, matrices, lambda f, n: code[matmul_name(f, n)], terms, self.threads, quantize,
            (lambda done, all_: progress("load", done, all_)) if progress else None,
        )  # fmt: skip
        self.formats = sorted({m.format for m in matrices.values()})
        self._adapter: PackedAdapter | None = None
        self.cache = KVCache(memory.page_bytes(c, kv), self.context)
        self._theta = c.rope_theta
        self._rope_filled = 0
        sizes = memory.buffer_sizes(c, chunk=self.chunk, threads=self.threads, context=self.context)
        self._width = ROWS * int(self.weights.tables.head[2])  # floats of a row of logits
        self._span_bytes = 4 * c.n_heads * PART
        self._arena = memory.Arena(sizes, huge=False)  # most of it is for long prompts
        # NumPy takes microseconds for a view or an address, a token few thousand: they are made once
        self._words = {name: self._arena.arrays[name].view(np.int64) for name in ("ids", "segments", "counters")}
        self._floats = {name: self._arena.arrays[name].view(np.float32) for name in ("out", "rope")}
        self._parts = self._arena.address("parts")
        self._jobs = {"forward": code[names[0]], "classify": code["classify"]}
        self._own_team = team is None
        self._team: Team | None = (
            Team(code, self.threads, ours.cpus if self.threads <= ours.count else ()) if team is None else team
        )
        self.block = self._fill(code[names[2]], sizes)
        self._block_address = self.block.ctypes.data

    def _fill(self, embed_row: int, sizes: dict[str, int]) -> NDArray[np.int64]:
        tables = self.weights.tables
        values = shape_words(self.config, self.kv) | {
            "threads": self.threads,
            "tile_f32": token_tile(self.tier, 0),
            "tile_1": token_tile(self.tier, 1),
            "tile_2": token_tile(self.tier, 2),
            "layers": tables.layers.ctypes.data,
            "final_norm": tables.final_norm,
            "embed_row": embed_row,
            "embed": tables.embed.ctypes.data,
            "head": tables.head.ctypes.data,
        }
        values |= {name: self._arena.address(name) for name in sizes}
        block: NDArray[np.int64] = np.zeros(B.size, np.int64)
        for name, value in values.items():
            block[getattr(B, name) // 8] = value
        return block

    @property
    def team(self) -> Team:
        """The team; `close` of another thread may take it at any time, so it is looked at once."""
        if (team := self._team) is None:
            raise ModelClosed("the model is closed: load it again")
        return team

    def _run(self, job: str, **words: int) -> bool:
        team = self.team
        self.block[B.team // 8] = team.address
        for name, value in words.items():
            self.block[getattr(B, name) // 8] = value
        self._words["counters"].fill(0)
        return team.run(self._jobs[job], self._block_address)

    def open(self, ids: Sequence[int]) -> Slot:
        """A cache slot for a prompt; `.length` of its ids, at most all but the last, need not be computed again."""
        self.team.cancel(False)
        return self.cache.open(ids)

    @property
    def room(self) -> int:
        """Positions of the cache that no open slot holds."""
        return self.cache.room

    def hidden(self, slot: Slot, ids: Sequence[int], rows: int | None = None) -> Floats:
        """Append ids to one slot, as `step`; hidden states of the last `rows` of them alone, which is less work."""
        return self._pass([(slot, ids)], rows)

    def step(self, work: Sequence[tuple[Slot, Sequence[int]]]) -> Floats:
        """Append ids to slots, to each its own, in one pass over the weights.

        Args:
            work: 1..segments different slots (from `open`) with one id or more each, 1..chunk in all.

        Returns:
            float32 (ids in all, dim), after the final norm, in the order of work: the same bits as slot by slot.

        Raises:
            Cancelled: `cancel()` was called; every slot is as before.
            ContextOverflow: the context is too small for one of them.
            CacheFull: it is too small for all of them together; every slot is as before.
            OptionError: an id outside the vocabulary, or a wrong number of them.
        """
        return self._pass(work, None)

    def _pass(self, work: Sequence[tuple[Slot, Sequence[int]]], rows: int | None) -> Floats:
        n, slots = sum(len(ids) for _, ids in work), {slot for slot, _ in work}
        if not 1 <= n <= self.chunk or not all(len(ids) for _, ids in work):
            raise OptionError(f"{n} ids in one call: expected 1..{self.chunk}, for every slot at least one")
        if len(work) > self.segments or len(slots) < len(work):
            raise OptionError(f"{len(work)} slots in one call: expected at most {self.segments}, all different")
        array, first = self._words["ids"][:n], 0
        for _, ids in work:
            array[first : first + len(ids)] = ids
            first += len(ids)
        if array.min() < 0 or array.max() >= self.config.vocab_size:
            raise OptionError(
                f"id {array.min() if array.min() < 0 else array.max()}: expected 0..{self.config.vocab_size - 1}"
            )
        self.cache.reserve([(slot, slot.length + len(ids)) for slot, ids in work])
        first, parts, segments = 0, self._parts, self._words["segments"]
        for i, (slot, ids) in enumerate(work):
            start, count = slot.length, len(ids)
            self._extend_rope(start + count)
            segments[S.size * i : S.size * (i + 1)] = first, count, start, slot.table_address, parts
            first += count
            parts += (start // SPAN + 1) * self._span_bytes
        wanted = n if rows is None else min(rows, n)
        if not self._run("forward", n=n, rows=wanted, n_segments=len(work)):
            self.team.cancel(False)
            raise Cancelled
        known, first = array.tolist(), 0
        for slot, ids in work:
            slot.ids.extend(known[first : first + len(ids)])
            first += len(ids)
        hidden: Floats = self._floats["out"][: wanted * self.config.dim].reshape(wanted, self.config.dim).copy()
        return hidden

    def logits(self, hidden: Floats) -> Floats:
        """Next-token logits of hidden states (n, dim): float32 (n, vocab_size)."""
        c = self.config
        states = np.ascontiguousarray(hidden, np.float32).reshape(-1, c.dim)
        out = np.empty((len(states), self._width), np.float32)
        address = out.ctypes.data
        for first in range(0, len(states), self.chunk):
            part = states[first : first + self.chunk]
            self._floats["out"][: part.size] = part.reshape(-1)
            if not self._run("classify", n=len(part), logits=address + 4 * self._width * first):
                self.team.cancel(False)
                raise Cancelled
        return np.ascontiguousarray(out[:, : c.vocab_size])

    def _extend_rope(self, n: int) -> None:
        if n > self._rope_filled:
            end = min(self.context, -(-n // ROPE_STEP) * ROPE_STEP)
            rows = self._floats["rope"].reshape(-1, 2, self.config.head_dim // 2)
            rows[self._rope_filled : end] = rope.table(self._theta, self._rope_filled, end)
            self._rope_filled = end

    def set_adapter(self, adapter: LowRank | None, scale: float = 1.0) -> None:
        """Compute with an adapter for this shape, its own scale times `scale`, or without one. Between passes only.

        Idle slots of the cache are forgotten; those that are open must have been closed.
        """
        found = None
        if adapter is not None:
            try:
                matmul = kernels.addresses(self.tier, ["matmul_F32_f32"])["matmul_F32_f32"]
            except kernels.BuildError as error:
                raise KernelError(f"{error} (see `smolrun warmup -v`)") from error
            layers, chunk = self.config.n_layers, self.chunk
            found = PackedAdapter(adapter.factors, layers, scale=scale, matmul=matmul, chunk=chunk)
        self.weights.adapt(None if found is None else found.words)
        self._adapter = found
        self.cache.clear()

    def cancel(self) -> None:
        """Make a running pass end within one phase of one layer."""
        if (team := self._team) is not None:
            team.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; memory goes with the object."""
        if self._team is not None and self._own_team:
            self._team.close()
        self._team = None
