"""A model that learns: the forward pass with a tape, the backward pass, on packed documents.

    ids --embed--> x[0] --layer 0--> x[1] ... x[n_layers] --norm, head--> log p of each target
    tape of a layer   x (n, dim)   q (n, q_dim), rotated   pages of k and v   att (n, q_dim)   m, l of its softmax
                      mid (n, dim)   gate, up (n, hidden_dim); norms and silu(gate) up are computed where they are read

The forward pass is inference's in its f32 mode, op by op, so its hidden states have the same bits. Documents of a batch
are segments as in a batch of answers: each begins at position 0 and sees itself alone.

Logits exist for `LOGIT_ROWS` tokens at a time, as panels, and become their own gradient in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from smolrun.config import ModelConfig
from smolrun.errors import ContextOverflow, OptionError
from smolrun.export import float_tensor
from smolrun.files.checkpoint import Checkpoint, expected_shapes
from smolrun.kernels.block import HEAD_DIM, MATRICES, MAX_THREADS, PAGE, PART, B, S
from smolrun.kernels.ops import COLUMN_STEP, TOKENS
from smolrun.kernels.panels import BLOCK, ROWS
from smolrun.model import rope
from smolrun.model.machine import available_cores
from smolrun.model.memory import Arena
from smolrun.model.weights import TENSOR
from smolrun.train.adapters import Adapter, LoRA
from smolrun.train.ops import Ops, Rows
from smolrun.train.parameters import Frozen, Matrix, Norm, Parameters, standard_deviation

Floats = NDArray[np.float32]
LOGIT_ROWS = 256  # tokens whose logits exist at a time
HEAD_ROWS = 4096  # rows of the classifier that are transposed at a time
CLAIM_BYTES = 128 << 10  # panels of one item of a product
PAIRS = "pairs"  # the format of an operand in pairs of bf16
IGNORED = -1  # a target that is not to be learnt


@dataclass(frozen=True)
class Batch:
    """Documents, one after the other, that share a pass and do not see each other.

    Attributes:
        ids, targets: int64 (n,); the id that follows each, or IGNORED.
        lengths: tokens of each document; n in all.
    """

    ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, documents: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]] | None = None) -> Batch:
        """Of whole documents, two ids or more each; masks: which of their ids are to be learnt, all if None."""
        inputs, targets = [], []
        if not documents:
            raise OptionError("no documents: a batch has one or more")
        if masks is not None and [len(mask) for mask in masks] != [len(document) for document in documents]:
            raise OptionError("masks of other lengths than their documents")
        for i, document in enumerate(documents):
            ids = np.asarray(document, np.int64)
            if len(ids) < 2:
                raise OptionError(f"document {i} has {len(ids)} ids: a next one to learn needs 2")
            wanted = np.ones(len(ids), bool) if masks is None else np.asarray(masks[i], bool)
            inputs.append(ids[:-1])
            targets.append(np.where(wanted[1:], ids[1:], IGNORED))
        return cls(np.concatenate(inputs), np.concatenate(targets), tuple(len(ids) for ids in inputs))

    @property
    def learnt(self) -> NDArray[np.bool_]:
        """Which positions have a target: bool (n,)."""
        return self.targets >= 0


@dataclass(frozen=True)
class Layer:
    """Weights of a layer, by block.MATRICES."""

    attn_norm: Norm
    ffn_norm: Norm
    matrices: dict[str, Matrix]
    adapters: dict[str, Adapter]


def buffer_sizes(
    c: ModelConfig, n: int, context: int, *, lora: LoRA | None = None, recompute: bool = False, bf16: bool = False
) -> dict[str, int]:
    """Bytes of each buffer of a model that takes n tokens at a time; pages of keys and values come beside them."""
    rank = lora.padded if lora else 0
    rounded, widest = -(-n // TOKENS) * TOKENS, max(c.dim, c.hidden_dim, c.q_dim, rank)
    layers = 1 if recompute else c.n_layers
    width = c.q_dim + 2 * c.kv_dim
    largest = max(c.hidden_dim, c.q_dim, rank) * max(c.dim, rank)
    rows = min(LOGIT_ROWS, rounded)
    head = min(HEAD_ROWS, -(-c.vocab_size // BLOCK) * BLOCK)
    groups = -(-c.vocab_size // ROWS)
    floats = {f"x{i}": n * c.dim for i in range(c.n_layers + 1)}
    for i in range(layers):
        floats |= {f"q{i}": n * c.q_dim, f"att{i}": n * c.q_dim, f"mid{i}": n * c.dim}
        floats |= {f"gate{i}": n * c.hidden_dim, f"up{i}": n * c.hidden_dim, f"softmax{i}": 2 * n * c.n_heads}
    for target in lora.targets if lora else ():
        floats |= {f"u_{target}{i}": n * rank for i in range(layers)}
    floats |= {"qkv": n * width, "dx": n * c.dim, "dh": n * c.dim, "da": n * max(c.hidden_dim, c.q_dim)}
    floats |= {"dq": n * c.q_dim, "dk": n * c.q_dim, "dv": n * c.q_dim, "dqkv": n * width}
    floats |= {"du": n * rank, "dropped": n * widest if lora and lora.dropout else 0}
    floats |= {"tiles": max(n * widest, rows * head), "columns": rounded * widest, "panels": rounded * widest}
    floats |= {"pairs": max(largest, head * max(c.dim, rows)) // 2 if bf16 else 0}
    floats |= {"turned": max(largest, head * c.dim), "parts": rounded // TOKENS * c.dim}
    floats |= {"hx": n * c.dim, "dhx": n * c.dim, "logits": rows * ROWS * groups, "stats": 2 * n, "weights": n}
    floats |= {"rope": context * HEAD_DIM}
    return {name: 4 * size for name, size in floats.items()} | {"ids": 8 * n, "targets": 8 * n, "slack": 64}


class Model:
    """Weights with gradients. Not for concurrent callers.

    Attributes:
        config: its shape.
        parameters: what is trained.
        tokens: ids that one batch takes at most.
        use_adapters: False computes without them: the frozen model, a reference for DPO.
    """

    def __init__(
        self,
        source: Checkpoint | ModelConfig,
        *,
        tokens: int,
        lora: LoRA | None = None,
        quantize: str | None = None,
        precision: str = "f32",
        recompute: bool = False,
        threads: int | None = None,
        seed: int = 0,
        context: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """
        Args:
            source: a checkpoint to go on from, or a shape to begin with at random (seed).
            tokens: ids of a batch, at most.
            lora: train adapters beside the checkpoint's own frozen weights, whatever their format; None: all weights
                as f32.
            quantize: format of float weights once frozen, as smolrun.load.
            precision: of the products: "f32", the runtime's own, or "bf16", operands rounded and sums in f32 (weights,
                gradients and all else stay f32), on CPUs with AVX512-BF16.
            recompute: keep only x of each layer, and compute its tape again when it is needed.
            context: longest document; None: the model's own, or `tokens` if that is less.
            progress: (done, all) of kernels that are compiled.
        """
        if precision not in ("f32", "bf16"):
            raise OptionError(f"precision={precision!r}: expected f32 or bf16")
        c = source if isinstance(source, ModelConfig) else source.config
        self.config, self.tokens, self.use_adapters = c, tokens, True
        if not 1 <= tokens <= 1 << 20:
            raise OptionError(f"tokens={tokens}: expected 1..1,048,576")
        if context is not None and context < 1:
            raise OptionError(f"context={context}: expected 1 or more")
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise OptionError(f"threads={threads}: expected 1..{MAX_THREADS}")
        if quantize is not None and lora is None:
            raise OptionError(f"quantize={quantize!r}: weights that are trained are f32; with `lora` they are frozen")
        self.context = min(context or c.max_positions, tokens)
        shapes = expected_shapes(c)
        frozen = None
        if lora is None:
            self.parameters = Parameters(shapes)
            if isinstance(source, ModelConfig):
                self.parameters.initialise(seed, standard_deviation(c))
            else:
                self.parameters.read(source)
        elif isinstance(source, ModelConfig):
            raise OptionError("adapters need a checkpoint beneath them, not a shape alone")
        else:
            frozen = Frozen(source, quantize)
            self.parameters = Parameters(lora.shapes(c, shapes))
            lora.initialise(self.parameters)
        matrix = self.parameters.matrix if frozen is None else frozen.matrix
        norm = (lambda name: Norm(*self.parameters.address(name))) if frozen is None else frozen.norm
        widest = max(c.dim, c.hidden_dim, c.q_dim, lora.padded if lora else 0)
        self.ops = Ops(
            frozen.formats if frozen else (), widest, threads or available_cores(), precision == "bf16", progress
        )
        self._frozen = frozen
        self.recompute = recompute
        self._allocate(lora)
        self.layers: list[Layer] = []
        for i in range(c.n_layers):
            matrices = {m: matrix(f"blk.{i}.{TENSOR[m]}.weight") for m in MATRICES}
            adapters = {}
            for target in lora.targets if lora else ():
                number = i * len(MATRICES) + MATRICES.index(target)
                stem = f"blk.{i}.{TENSOR[target]}.lora_"
                a, b = (self.parameters.matrix(stem + part) for part in "ab")
                adapters[target] = Adapter(a, b, self._u[target, i], lora, number)  # type: ignore[arg-type]
            self.layers.append(
                Layer(norm(f"blk.{i}.attn_norm.weight"), norm(f"blk.{i}.ffn_norm.weight"), matrices, adapters)
            )
        self.final_norm = norm("output_norm.weight")
        self.embedding = matrix("token_embd.weight")
        self.head = self.embedding if c.tied else matrix("output.weight")
        self.batch: Batch | None = None
        self.dropout_seed = 0
        self._learning = True

    # ---- memory ------------------------------------------------------------------------------------------------------

    def _allocate(self, lora: LoRA | None) -> None:
        c = self.config
        self._rank = lora.padded if lora else 0
        sizes = buffer_sizes(c, self.tokens, self.context, lora=lora, recompute=self.recompute, bf16=self.ops.bf16)
        self._arena = Arena(sizes)
        self._at = {name: self._arena.address(name) for name in sizes}
        self._u = {
            (target, i): self._at[f"u_{target}{0 if self.recompute else i}"]
            for target in (lora.targets if lora else ())
            for i in range(c.n_layers)
        }
        self.rope(c.rope_theta)
        self._pages = Arena({"pages": 0})
        self._words: NDArray[np.int64] = np.zeros(B.size, np.int64)
        self._told = self._words.ctypes.data
        self._tell(
            n_heads=c.n_heads, n_kv_heads=c.n_kv_heads, rope=self._at["rope"], threads=self.ops.threads,
            head_bytes=8 * PAGE * HEAD_DIM, value_offset=4 * PAGE * HEAD_DIM,
            layer_bytes=0 if self.recompute else c.n_kv_heads * 8 * PAGE * HEAD_DIM,
        )  # fmt: skip

    @property
    def bytes(self) -> int:
        """Memory of weights, gradients and buffers, without the optimiser's moments."""
        return 8 * self.parameters.size + len(self._arena.whole) + len(self._pages.whole)

    def _tell(self, **words: int) -> None:
        for word, value in words.items():
            self._words[getattr(B, word) // 8] = value

    def _floats(self, name: str) -> Floats:
        return self._arena.arrays[name].view(np.float32)

    def rope(self, theta: float) -> None:
        """Take another theta, as a stage of longer documents does."""
        self.config = replace(self.config, rope_theta=theta)
        self._floats("rope")[:] = rope.table(theta, 0, self.context).reshape(-1)

    # ---- products ----------------------------------------------------------------------------------------------------

    def _rows(self, name: str, k: int, layer: int = -1, norm: Norm | None = None) -> Rows:
        """Rows of a buffer; `layer`: of that layer's tape."""
        name = name if layer < 0 else f"{name}{self._place(layer)}"
        return Rows(self._at[name], k, norm=norm.address if norm else 0, eps=self.config.norm_eps)

    def _place(self, layer: int) -> int:
        return 0 if self.recompute else layer

    def _multiply(
        self, m: Matrix, x: int, n: int, y: int, stride: int = 0, *, add: bool = False, group_bytes: int = 4 * ROWS
    ) -> None:
        """y (+)= x W^T, x as `tiles` or `columns`."""
        step = max(1, CLAIM_BYTES // (64 * m.cols))
        step = min(step, -(-m.groups // (4 * self.ops.threads)))
        w, matmul = m.address, "pairs_matmul" if self.ops.bf16 else f"matmul_{m.format}_f32"
        if self.ops.bf16 and m.format != PAIRS:
            w = self._at["pairs"]
            self.ops(f"pairs_{m.format}", m.groups, w=m.address, blocks=m.cols // BLOCK, out=w)
        self.ops(
            "multiply", -(-m.groups // step), matmul=self.ops.code[matmul], w=w, blocks=m.cols // BLOCK,
            groups=m.groups, step=step, x=x, n=n, y=y, stride=stride or m.rows, group_bytes=group_bytes, add=int(add),
        )  # fmt: skip

    def _operand(self, rows: int, cols: int, address: int) -> Matrix:
        """What an op has made to be multiplied with."""
        return Matrix("", rows, cols, PAIRS if self.ops.bf16 else "F32", address)

    def _tiles(self, x: Rows) -> int:
        self.ops("tiles", -(-self._n // self.ops.tile), x, n=self._n, out=self._at["tiles"])
        return self._at["tiles"]

    def _dropped(self, x: Rows, adapter: Adapter) -> Rows:
        """What the adapter sees of x."""
        if not adapter.lora.dropout or not self._learning:
            return x
        return replace(x, keep=1 - adapter.lora.dropout, seed=(self.dropout_seed * 1_000_003 + adapter.number) % 2**32)

    def _adapter(self, layer: Layer, name: str) -> Adapter | None:
        return layer.adapters.get(name) if self.use_adapters else None

    def _forward(self, layer: Layer, x: Rows, outs: dict[str, tuple[int, int]], add: bool = False) -> None:
        """y (+)= x W^T of matrices that share their x; outs: name -> (address, stride) of y."""
        at = self._tiles(x)
        for name, (y, stride) in outs.items():
            self._multiply(layer.matrices[name], at, self._n, y, stride, add=add)
        for name, (y, stride) in outs.items():
            if adapter := self._adapter(layer, name):
                self._multiply(adapter.a, self._tiles(self._dropped(x, adapter)), self._n, adapter.u)
                u = Rows(adapter.u, self._rank, factor=adapter.lora.scale)
                self._multiply(adapter.b, self._tiles(u), self._n, y, stride, add=True)

    def _gradient(self, m: Matrix, dy: Rows, x: Rows) -> None:
        """dW += dy^T x."""
        rows = -(-self._n // TOKENS) * TOKENS
        self.ops("panels", rows // TOKENS, dy, n=self._n, rows=rows, out=self._at["panels"])
        self.ops("columns", rows // TOKENS, x, n=self._n, rows=rows, out=self._at["columns"])
        dy_panels = self._operand(m.rows, rows, self._at["panels"])
        self._multiply(dy_panels, self._at["columns"], m.cols, m.gradient, ROWS, add=True, group_bytes=64 * m.cols)

    def _turned(self, m: Matrix) -> Matrix:
        """W^T; W has an even number of row groups, or zeros stand for the missing one."""
        rows = -(-m.rows // BLOCK) * BLOCK
        self.ops(
            f"turn_{m.format}", rows // ROWS, w=m.address, blocks=m.cols // BLOCK, groups=m.groups, rows=rows,
            out=self._at["turned"],
        )  # fmt: skip
        return self._operand(m.cols, rows, self._at["turned"])

    def _backward(self, layer: Layer, x: Rows, douts: dict[str, Rows], dx: int | None, add: bool = False) -> None:
        """From the gradients of y = x W^T those of W, of adapters, and dx (+)= sum of dy W, rows of x.k floats."""
        for name, dy in douts.items():
            m, adapter = layer.matrices[name], self._adapter(layer, name)
            if m.gradient:
                self._gradient(m, dy, x)
            if dx is not None or adapter:
                at = self._tiles(dy)
            if dx is not None:
                self._multiply(self._turned(m), at, self._n, dx, add=add)
                add = True
            if adapter:
                scale, du = adapter.lora.scale, self._at["du"]
                self._gradient(adapter.b, dy, Rows(adapter.u, self._rank, factor=scale))
                self._multiply(self._turned(adapter.b), at, self._n, du)
                seen, back = self._dropped(x, adapter), Rows(du, self._rank, factor=scale)
                self._gradient(adapter.a, back, seen)
                if dx is not None:
                    self._adapter_back(adapter, back, seen, dx)

    def _adapter_back(self, adapter: Adapter, du: Rows, seen: Rows, dx: int) -> None:
        """dx += dropout(du A)."""
        at, turned = self._tiles(du), self._turned(adapter.a)
        if seen.keep == 1:
            self._multiply(turned, at, self._n, dx, add=True)
            return
        self._multiply(turned, at, self._n, self._at["dropped"])
        back = Rows(self._at["dropped"], seen.k, keep=seen.keep, seed=seen.seed)
        self._copy(back, dx, seen.k, add=True)

    def _copy(self, x: Rows, out: int, stride: int, *, add: bool = False) -> None:
        self.ops("copy", -(-self._n // TOKENS), x, n=self._n, out=out, out_stride=stride, add=int(add))

    # ---- the pass ----------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Floats:
        """Hidden states before the final norm, float32 (n, dim), a view; the tape is kept for `backward`.

        Raises:
            OptionError: too many ids, one outside the vocabulary, or lengths that are not theirs.
            ContextOverflow: a document longer than the context.
        """
        n, c = len(batch.ids), self.config
        if not 1 <= n <= self.tokens or sum(batch.lengths) != n or min(batch.lengths) < 1 or len(batch.targets) != n:
            raise OptionError(
                f"{n} ids, {len(batch.targets)} targets, documents of {sum(batch.lengths)}: "
                f"expected 1..{self.tokens}, all equal"
            )
        if max(batch.lengths) > self.context:
            raise ContextOverflow(max(batch.lengths), self.context, "document")
        for what, values, least in (("id", batch.ids, 0), ("target", batch.targets, IGNORED)):
            if values.min() < least or values.max() >= c.vocab_size:
                raise OptionError(f"{what}s from {values.min()} to {values.max()}: expected below {c.vocab_size:,}")
        self.batch, self._n = batch, n
        self._segment(batch.lengths)
        self._arena.arrays["ids"].view(np.int64)[:n] = batch.ids
        e = self.embedding
        self.ops(
            "embed", n, look_up=self.ops.code[f"row_{e.format}"], w=e.address, blocks=c.dim // BLOCK,
            ids=self._at["ids"], dim=c.dim, out=self._at["x0"],
        )  # fmt: skip
        for i in range(c.n_layers):
            self._layer(i)
        return self._floats(f"x{c.n_layers}")[: n * c.dim].reshape(n, c.dim)

    def _segment(self, lengths: tuple[int, ...]) -> None:
        """Segments of the batch, each with pages of its own."""
        c = self.config
        counts = [-(-length // PAGE) for length in lengths]
        size = (1 if self.recompute else c.n_layers) * c.n_kv_heads * 8 * PAGE * HEAD_DIM
        if len(self._pages.whole) < size * sum(counts):
            self._pages = Arena({"pages": size * sum(counts)})
        self._table = self._pages.address("pages") + size * np.arange(sum(counts), dtype=np.int64)
        self._parts: Floats = np.zeros((lengths.count(1), c.n_heads, PART), np.float32)
        self._segments = np.zeros((len(lengths), S.size), np.int64)
        first, page, parts = 0, 0, self._parts.ctypes.data
        for row, length, count in zip(self._segments, lengths, counts, strict=True):
            values = {"first": first, "count": length, "start": 0, "pages": self._table[page:].ctypes.data}
            values["parts"] = parts
            parts += 4 * c.n_heads * PART * (length == 1)
            for word, value in values.items():
                row[getattr(S, word) // 8] = value
            first, page = first + length, page + count
        self._tell(n=self._n, n_segments=len(lengths), segments=self._segments.ctypes.data)

    def _layer(self, i: int) -> None:
        """x[i] -> x[i + 1], and the tape of layer i."""
        c, layer, at, n = self.config, self.layers[i], self._at, self._n
        width, place = c.q_dim + 2 * c.kv_dim, self._place(i)
        qkv, mid, gate, up = at["qkv"], at[f"mid{place}"], at[f"gate{place}"], at[f"up{place}"]
        self._tell(softmax=at[f"softmax{place}"])
        h = Rows(at[f"x{i}"], c.dim, norm=layer.attn_norm.address, eps=c.norm_eps)
        starts = {"q": qkv, "k": qkv + 4 * c.q_dim, "v": qkv + 4 * (c.q_dim + c.kv_dim)}
        self._forward(layer, h, {name: (y, width) for name, y in starts.items()})
        self.ops("store", n * c.n_kv_heads, block=self._told, layer=i, qkv=qkv)
        self._copy(Rows(qkv, c.q_dim, width), at[f"q{place}"], c.q_dim)
        self.ops("attend", 0, block=self._told, layer=i, qkv=qkv)
        for s in np.flatnonzero(self._segments[:, S.count // 8] == 1):
            self.ops("merge", 1, block=self._told, segment=int(s), qkv=qkv, stride=width)
        self._copy(Rows(qkv, c.q_dim, width), at[f"att{place}"], c.q_dim)
        self._copy(Rows(at[f"x{i}"], c.dim), mid, c.dim)
        self._forward(layer, self._rows("att", c.q_dim, i), {"o": (mid, c.dim)}, add=True)
        outs = {"gate": (gate, c.hidden_dim), "up": (up, c.hidden_dim)}
        self._forward(layer, self._rows("mid", c.dim, i, layer.ffn_norm), outs)
        self._copy(Rows(mid, c.dim), at[f"x{i + 1}"], c.dim)
        self._forward(layer, self._gated(i), {"down": (at[f"x{i + 1}"], c.dim)}, add=True)

    def _gated(self, i: int) -> Rows:
        """silu(gate) up."""
        gate = self._rows("gate", self.config.hidden_dim, i)
        return replace(gate, up=self._at[f"up{self._place(i)}"], up_stride=self.config.hidden_dim)

    # ---- targets -----------------------------------------------------------------------------------------------------

    def log_probs(self) -> Floats:
        """log p of each target after `forward`: float32 (n,), 0 where there is none."""
        return self._classify(None)

    def _classify(self, weights: Floats | None) -> Floats:
        """log p; with weights, from loss = -sum(weights log p), also the head's gradients and dx of the last layer."""
        c, batch, n = self.config, self.batch, self._n
        assert batch is not None
        places = np.flatnonzero(batch.learnt)
        hx = self._floats("hx")[: len(places) * c.dim].reshape(-1, c.dim)
        dhx = self._floats("dhx")[: len(places) * c.dim].reshape(-1, c.dim)
        hx[:] = self._floats(f"x{c.n_layers}")[: n * c.dim].reshape(n, c.dim)[places]
        self._arena.arrays["targets"].view(np.int64)[: len(places)] = batch.targets[places]
        if weights is not None:
            self._floats("weights")[: len(places)] = weights[places]
        for first in range(0, len(places), LOGIT_ROWS):
            self._chunk(first, min(LOGIT_ROWS, len(places) - first), weights is not None)
        out = np.zeros(n, np.float32)
        stats = self._floats("stats")[: 2 * len(places)].reshape(-1, 2)
        out[places] = stats[:, 0] - np.log(stats[:, 1], dtype=np.float64)
        if weights is not None:
            dx = self._floats("dx")[: n * c.dim].reshape(n, c.dim)
            dx[: len(places)] = 0
            self._norm_back(self.final_norm, self._at["hx"], self._at["dhx"], len(places))
            dhx[:] = dx[: len(places)]
            dx[:] = 0
            dx[places] = dhx
        return out

    def _chunk(self, first: int, n: int, gradient: bool) -> None:
        """Logits of n rows of hx, what they say of the targets, and their way back to dhx and the head."""
        c, at, head, whole = self.config, self._at, self.head, self._n
        self._n = n
        rows = -(-n // TOKENS) * TOKENS
        x = Rows(at["hx"] + 4 * first * c.dim, c.dim, norm=self.final_norm.address, eps=c.norm_eps)
        tiles, group_bytes = self._tiles(x), 64 * rows
        for group, part in head.parts(HEAD_ROWS // ROWS):
            self._multiply(part, tiles, n, at["logits"] + group * group_bytes, ROWS, group_bytes=group_bytes)
        self.ops(
            "loss", rows, logits=at["logits"], rows=rows, n=n, groups=head.groups, vocab=c.vocab_size,
            targets=at["targets"] + 8 * first, weights=at["weights"] + 4 * first, stats=at["stats"] + 8 * first,
            gradient=int(gradient),
        )  # fmt: skip
        if gradient:
            if head.gradient:
                self.ops("columns", rows // TOKENS, x, n=n, rows=rows, out=at["columns"])
                for group, part in Matrix("", head.rows, rows, "F32", at["logits"]).parts(HEAD_ROWS // ROWS):
                    dw, group_bytes = head.gradient + 64 * c.dim * group, 64 * c.dim
                    self._multiply(part, at["columns"], c.dim, dw, ROWS, add=True, group_bytes=group_bytes)
            for group, part in head.parts(HEAD_ROWS // ROWS):
                turned = self._turned(part)
                self.ops(
                    "panel_tiles", -(-n // self.ops.tile), panels=at["logits"], rows=rows, n=n, groups=head.groups,
                    first=group, count=turned.cols // ROWS, out=at["tiles"],
                )  # fmt: skip
                self._multiply(turned, at["tiles"], n, at["dhx"] + 4 * first * c.dim, add=group > 0)
        self._n = whole

    # ---- backward ----------------------------------------------------------------------------------------------------

    def backward(self, weights: Floats) -> Floats:
        """Add the gradient of -sum(weights log p) to the gradients; log p as `log_probs`.

        Args:
            weights: float32 (n,), of each position of the last `forward`; what has no target does not count.
        """
        batch, c, at = self.batch, self.config, self._at
        assert batch is not None, "forward first"
        out = self._classify(weights)
        for i in reversed(range(c.n_layers)):
            if self.recompute:
                self._layer(i)
            self._layer_back(i)
        e = self.embedding
        if e.gradient:
            self.ops(
                "embed_back", c.dim // COLUMN_STEP, ids=at["ids"], n=self._n, dim=c.dim, dx=at["dx"], dw=e.gradient
            )
        self.batch = None  # the tape is used up
        return out

    def _layer_back(self, i: int) -> None:
        """dx of x[i + 1] -> dx of x[i], and the gradients of layer i."""
        c, layer, at, n = self.config, self.layers[i], self._at, self._n
        place, hidden = self._place(i), c.hidden_dim
        gate, up, mid = at[f"gate{place}"], at[f"up{place}"], at[f"mid{place}"]
        dx, dh, da = at["dx"], at["dh"], at["da"]
        self._backward(layer, self._gated(i), {"down": Rows(dx, c.dim)}, da)
        self.ops("swiglu_back", n, gate=gate, gate_stride=hidden, up=up, up_stride=hidden, dh=da, n=n, k=hidden)
        h = self._rows("mid", c.dim, i, layer.ffn_norm)
        self._backward(layer, h, {"gate": Rows(gate, hidden), "up": Rows(up, hidden)}, dh)
        self._norm_back(layer.ffn_norm, mid, dh, n)
        self._backward(layer, self._rows("att", c.q_dim, i), {"o": Rows(dx, c.dim)}, da)
        self._tell(softmax=at[f"softmax{place}"])
        self.ops(
            "attend_back", len(self._segments) * c.n_heads, block=self._told, layer=i, q=at[f"q{place}"],
            out=at[f"att{place}"], dout=da, dq=at["dq"], dk=at["dk"], dv=at["dv"],
        )  # fmt: skip
        self.ops("rope_back", n, block=self._told, dq=at["dq"], dk=at["dk"], dv=at["dv"], dqkv=at["dqkv"])
        h = Rows(at[f"x{i}"], c.dim, norm=layer.attn_norm.address, eps=c.norm_eps)
        width, first, douts = c.q_dim + 2 * c.kv_dim, at["dqkv"], {}
        for name, rows in (("q", c.q_dim), ("k", c.kv_dim), ("v", c.kv_dim)):
            douts[name] = Rows(first, rows, width)
            first += 4 * rows
        self._backward(layer, h, douts, dh)
        self._norm_back(layer.attn_norm, at[f"x{i}"], dh, n)

    def _norm_back(self, norm: Norm, x: int, dy: int, n: int) -> None:
        """dx += the norm's gradient."""
        c, parts = self.config, self._at["parts"]
        count = -(-n // TOKENS)
        self.ops(
            "norm_back", count, x=x, n=n, dim=c.dim, weight=norm.address, eps=c.norm_eps, dy=dy, dx=self._at["dx"],
            parts=parts if norm.gradient else 0,
        )  # fmt: skip
        if norm.gradient:
            self.ops("sum", c.dim // ROWS, parts=parts, count=count, width=c.dim, out=norm.gradient)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Forward passes without dropout."""
        before, self._learning = self._learning, False
        try:
            yield
        finally:
            self._learning = before

    def checkpoint(self, base: Checkpoint) -> Checkpoint:
        """What was trained, as a checkpoint to be written; tokenizer and template are those of `base`.

        Raises:
            OptionError: adapters alone were trained, see LoRA.low_rank.
        """
        if self._frozen is not None:
            raise OptionError("adapters were trained: their factors can be written, or merged into the base")
        tensors = {
            name: float_tensor(name, shape, partial(self.parameters.get, name))
            for name, shape in self.parameters.shapes.items()
        }
        return replace(base, config=self.config, tensors=tensors)

    def close(self) -> None:
        """End the threads."""
        self.ops.close()
