"""Writes a checkpoint as GGUF, in another weight format: what llama.cpp's converter and quantiser do, in one step.

    safetensors folder or GGUF --(rows as float32)--> kernels.rounding --(blocks)--> files.gguf.write_gguf

A tensor is made when its turn to be written comes, some thousand rows at a time, so memory holds one finished tensor.
Which tensor gets which format follows llama.cpp's names (KINDS): "q4_k_m" is mostly Q4_K, with Q6_K where it tells
most. With a calibration text the model reads it once in float32, and every column of a matrix is rounded with the
weight that its activations had (`importance`).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolrun.errors import ModelFileError, OptionError
from smolrun.export import is_rotary, merge, repaired, rows_of, values_of
from smolrun.files.checkpoint import Checkpoint, Tensor, open_checkpoint
from smolrun.files.gguf import WriteTensor, write_gguf
from smolrun.files.peft import read_adapter
from smolrun.files.sources import resolve
from smolrun.kernels.block import HEAD_DIM
from smolrun.kernels.formats import FORMATS, dequantize_ref
from smolrun.kernels.rounding import quantize
from smolrun.model import memory, rope
from smolrun.model.llama import Llama
from smolrun.model.machine import available_cores
from smolrun.text.tokenizer import Tokenizer, gguf_vocabulary
from smolrun.verify import WINDOW, Comparison, Summary, logits_in_cuts, windows

F32Array = NDArray[np.float32]
Progress = Callable[[str, int, int], object]

STEP_WEIGHTS = 1 << 20  # weights rounded by one thread at once: 4 MB as float32
CALIBRATION_TOKENS = 4096
COMPARED_TOKENS = 4096


@dataclass(frozen=True)
class Kind:
    """One of llama.cpp's file types.

    Attributes:
        file_type: its number, GGUF's general.file_type.
        base: format of most matrices.
        more: format of attn_v and ffn_down in the layers that `gets_more` names.
        head: format of the output matrix, or of the embedding where that is the output too.
    """

    file_type: int
    base: str
    more: str = ""
    head: str = ""


KINDS = {
    "f32": Kind(0, "F32"),
    "f16": Kind(1, "F16"),
    "bf16": Kind(32, "BF16"),
    "q8_0": Kind(7, "Q8_0"),
    "q6_k": Kind(18, "Q6_K"),
    "q5_k_m": Kind(17, "Q5_K", "Q6_K", "Q6_K"),
    "q5_1": Kind(9, "Q5_1", "", "Q6_K"),
    "q5_0": Kind(8, "Q5_0", "", "Q6_K"),
    "q4_k_m": Kind(15, "Q4_K", "Q6_K", "Q6_K"),
    "q4_1": Kind(3, "Q4_1", "", "Q6_K"),
    "q4_0": Kind(2, "Q4_0", "", "Q6_K"),
}
FLOATS = ("F32", "F16", "BF16")
# where rows do not divide into blocks of 256: 576 and 960, the widths of 135M and 360M
NARROW = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class Quantized:
    """A file that was written.

    Attributes:
        tensors: matrices and norms by format.
        twice: matrices that had been rounded to another quantised format before, by that format; better quantise from
            the weights those came from.
    """

    path: Path
    bytes: int
    parameters: int
    tensors: Mapping[str, int]
    twice: Mapping[str, int]

    @property
    def bits_per_weight(self) -> float:
        """Bits of the whole file, vocabulary included, for one parameter."""
        return self.bytes * 8 / self.parameters


def quantize_file(
    source: str | Path | None,
    target: str | os.PathLike[str],
    kind: str = "q4_k_m",
    *,
    calibrate: str | None = None,
    adapter: str | Path | None = None,
    adapter_scale: float = 1.0,
    threads: int | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Quantized:
    """Writes a model as a GGUF file that smolrun and llama.cpp open.

    Args:
        source: as for `smolrun.load`: a folder, a GGUF file, a Hub id, an alias.
        target: the GGUF file, replaced if it exists; it appears whole or not at all.
        kind: a key of KINDS.
        calibrate: a text that says which columns matter, at most CALIBRATION_TOKENS of it; some pages of what the model
            is to read.
        adapter: a LoRA folder that is merged into the weights first, as `LLM.set_adapter` takes it.
        adapter_scale: how much of it.
        threads: None: one per physical core.
        offline: never ask the network.
        progress: called with (stage, done, total).

    Raises:
        OptionError: an unknown kind, the source as target, a text too short.
        ModelNotFound, ModelFileError, UnsupportedModel: the source, see `smolrun.load`; weights that are NaN or too
            large for the format.
        OSError: the folder cannot be written.
    """
    if kind not in KINDS:
        raise OptionError(f"format {kind!r}: expected one of {', '.join(KINDS)}")
    path = resolve(source, offline=offline)
    target = Path(target)
    if adapter is None and adapter_scale != 1.0:
        raise OptionError(f"adapter_scale is {adapter_scale}, and there is no adapter")
    if target.exists() and path.exists() and target.samefile(path):
        raise OptionError(f"{target} is the source itself: give another file to write")
    if path.is_dir() and target.exists() and target.parent.samefile(path) and target.suffix != ".gguf":
        raise OptionError(f"{target} is a file of the source: give another one to write")
    say, threads = progress or (lambda *_: None), available_cores() if threads is None else threads
    memory.check_threads(threads)
    with open_checkpoint(path) as opened, ThreadPoolExecutor(threads) as pool:
        checkpoint = opened
        if adapter is not None:
            checkpoint = merge(opened, read_adapter(adapter, opened.config), adapter_scale)
        metadata = gguf_metadata(checkpoint, KINDS[kind].file_type)
        weights: Mapping[str, F32Array] = {}
        if calibrate is not None:
            ids = Tokenizer.from_source(checkpoint.tokenizer).encode(calibrate)[:CALIBRATION_TOKENS]
            weights = importance(checkpoint, ids, progress=progress)
        tensors, twice = [], Counter[str]()
        for done, (name, tensor) in enumerate(checkpoint.tensors.items()):
            wanted = format_of(checkpoint, tensor, KINDS[kind])
            twice[tensor.format] += tensor.format not in (wanted, *FLOATS) and wanted not in FLOATS

            def make(tensor: Tensor = tensor, wanted: str = wanted, done: int = done) -> NDArray[Any]:
                blocks = _blocks(tensor, wanted, weights.get(tensor.name), pool, f"{path.name}: tensor {tensor.name}")
                tensor.release()
                say("quantize", done + 1, len(checkpoint.tensors))
                return blocks

            tensors.append(WriteTensor(name, wanted, tensor.shape, make))
        write_gguf(target, metadata, tensors)
        return Quantized(
            path=target,
            bytes=target.stat().st_size,
            parameters=sum(math.prod(tensor.shape) for tensor in tensors),
            tensors=dict(Counter(tensor.format for tensor in tensors)),
            twice=dict(+twice),
        )


def format_of(checkpoint: Checkpoint, tensor: Tensor, kind: Kind) -> str:
    """The format of a tensor in a file of this kind, as llama.cpp chooses it."""
    if len(tensor.shape) == 1:
        return "F32"
    config, wanted = checkpoint.config, kind.base
    part, *_ = tensor.name.removeprefix("blk.").split(".")
    if tensor.name == ("token_embd.weight" if config.tied else "output.weight"):
        wanted = kind.head or wanted
    elif tensor.name.endswith(("attn_v.weight", "ffn_down.weight")) and gets_more(int(part), config.n_layers):
        wanted = kind.more or wanted
    return NARROW[wanted] if tensor.shape[1] % FORMATS[wanted].block else wanted


def gets_more(layer: int, n_layers: int) -> bool:
    """llama.cpp's choice: the first and the last eighth of the layers, and every third between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def _blocks(
    tensor: Tensor, wanted: str, weights: F32Array | None, pool: ThreadPoolExecutor, label: str
) -> NDArray[Any]:
    """The tensor's blocks in another format, rows in GGUF's order. What has that format already is kept as it is."""
    fmt = FORMATS[wanted]
    if len(tensor.shape) == 1:
        return values_of(tensor)
    raw = tensor.raw.reshape(tensor.shape[0], -1)
    if tensor.format == wanted:
        return repaired(raw, True) if is_rotary(tensor) and not tensor.permuted else raw
    rows, cols = tensor.shape
    out = np.empty((rows, cols // fmt.block), fmt.dtype)
    step = max(1, STEP_WEIGHTS // cols // HEAD_DIM) * HEAD_DIM

    def convert(first: int) -> None:
        values = rows_of(tensor, raw[first : first + step], permuted=True)
        out[first : first + step] = quantize(fmt, values, weights)

    try:
        list(pool.map(convert, range(0, rows, step)))
    except ValueError as error:
        raise ModelFileError(f"{label}: {error}") from None
    return out


# ---- metadata --------------------------------------------------------------------------------------------------------


def gguf_metadata(checkpoint: Checkpoint, file_type: int) -> dict[str, Any]:
    """The keys of a GGUF file of this checkpoint. Of a GGUF source all are kept but those about its own quantisation.

    Raises:
        UnsupportedModel: a tokenizer that GGUF cannot describe.
    """
    c = checkpoint.config
    vocabulary = gguf_vocabulary(checkpoint.tokenizer, c.vocab_size)
    about = {"general.file_type": file_type, "general.quantization_version": 2}
    if "general.architecture" in checkpoint.metadata:
        kept = {k: v for k, v in checkpoint.metadata.items() if v != [] and not k.startswith("quantize.")}
        return kept | vocabulary | about
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": c.name,
        "general.license": c.licence,
        "llama.block_count": c.n_layers,
        "llama.context_length": c.max_positions,
        "llama.embedding_length": c.dim,
        "llama.feed_forward_length": c.hidden_dim,
        "llama.attention.head_count": c.n_heads,
        "llama.attention.head_count_kv": c.n_kv_heads,
        "llama.attention.key_length": c.head_dim,
        "llama.attention.value_length": c.head_dim,
        "llama.attention.layer_norm_rms_epsilon": c.norm_eps,
        "llama.rope.dimension_count": c.head_dim,
        "llama.rope.freq_base": c.rope_theta,
        "llama.vocab_size": c.vocab_size,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        **vocabulary,
    }
    tokenizer = checkpoint.tokenizer
    ids = {"bos": tokenizer.bos_id} | dict(zip(("eos", "eot", "eom"), tokenizer.eos_ids, strict=False))
    names = checkpoint.metadata.get("tokenizer_config.json", {})
    for key, entry in (("unknown", names.get("unk_token")), ("padding", names.get("pad_token"))):
        text = entry.get("content") if isinstance(entry, dict) else entry
        ids[key] = tokenizer.specials.get(text) if isinstance(text, str) else None
    metadata |= {f"tokenizer.ggml.{key}_token_id": i for key, i in ids.items() if i is not None}
    if checkpoint.chat_template is not None:
        metadata["tokenizer.chat_template"] = checkpoint.chat_template
    return metadata | about


# ---- calibration -----------------------------------------------------------------------------------------------------


def importance(checkpoint: Checkpoint, ids: Sequence[int], *, progress: Progress | None = None) -> dict[str, F32Array]:
    """Mean square of every matrix's inputs over a text: tensor name -> float32 (cols,).

    A plain float32 forward pass in windows of WINDOW, layer by layer, so that one layer's weights are float32 at once.

    Raises:
        OptionError: fewer than two ids.
    """
    parts = [np.asarray(part) for part in windows(ids)]
    if not parts:
        raise OptionError(f"the calibration text has {len(ids)} tokens: give some thousand")
    c, tensors = checkpoint.config, checkpoint.tensors
    sums: dict[str, F32Array] = {}
    count = sum(map(len, parts))

    def matrix(name: str) -> F32Array:
        return rows_of(tensors[name], tensors[name].raw.reshape(tensors[name].shape[0], -1), permuted=False)

    def note(x: F32Array, *names: str) -> None:
        for name in names:
            sums[name] = sums.get(name, np.zeros(x.shape[1], np.float32)) + np.square(x).sum(axis=0) / np.float32(count)

    embedding = tensors["token_embd.weight"]
    raw = embedding.raw.reshape(c.vocab_size, -1)
    states = [dequantize_ref(FORMATS[embedding.format], raw[part]).reshape(len(part), -1) for part in parts]
    turns = rope.table(c.rope_theta, 0, WINDOW)
    for i in range(c.n_layers):
        at = f"blk.{i}."
        names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        q, k, v, o, gate, up, down = (f"{at}{name}.weight" for name in names)
        w = {name: matrix(name) for name in (q, k, v, o, gate, up, down)}
        for x in states:  # (n, dim), changed in place
            h = _rmsnorm(x, values_of(tensors[f"{at}attn_norm.weight"]), c.norm_eps)
            note(h, q, k, v)
            h = _attention(h @ w[q].T, h @ w[k].T, h @ w[v].T, turns[: len(x)])
            note(h, o)
            x += h @ w[o].T
            h = _rmsnorm(x, values_of(tensors[f"{at}ffn_norm.weight"]), c.norm_eps)
            note(h, gate, up)
            g = h @ w[gate].T
            h = g / (1 + np.exp(-g)) * (h @ w[up].T)
            note(h, down)
            x += h @ w[down].T
        for name in w:
            tensors[name].release()
        if progress:
            progress("calibrate", i + 1, c.n_layers)
    for x in states:
        note(
            _rmsnorm(x, values_of(tensors["output_norm.weight"]), c.norm_eps),
            "token_embd.weight" if c.tied else "output.weight",
        )
    return sums


def _rmsnorm(x: F32Array, weight: F32Array, eps: float) -> F32Array:
    out: F32Array = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + np.float32(eps)) * weight
    return out


def _attention(q: F32Array, k: F32Array, v: F32Array, turns: F32Array) -> F32Array:
    """Causal attention of one window: q (n, q_dim), k and v (n, kv_dim), turns (n, 2, 32) -> (n, q_dim)."""
    n, half = len(q), HEAD_DIM // 2
    cos, sin = turns[:, 0], turns[:, 1]

    def heads(x: F32Array) -> F32Array:
        out: F32Array = x.reshape(n, -1, HEAD_DIM).swapaxes(0, 1)  # (heads, n, 64)
        return out

    def turned(x: F32Array) -> F32Array:
        low, high = x[..., :half], x[..., half:]
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    hidden = np.triu(np.full((n, n), -np.inf, np.float32), 1)
    keys, values = turned(heads(k)), heads(v)
    out: F32Array = np.empty((q.shape[1] // HEAD_DIM, n, HEAD_DIM), np.float32)
    for i, query in enumerate(turned(heads(q))):
        group = i * len(keys) // len(out)
        p = query @ keys[group].T * np.float32(HEAD_DIM**-0.5) + hidden
        p = np.exp(p - p.max(axis=1, keepdims=True))
        out[i] = p / p.sum(axis=1, keepdims=True) @ values[group]
    joined: F32Array = out.swapaxes(0, 1).reshape(n, -1)
    return joined


# ---- what it cost ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fidelity:
    """How far a quantised model is from its source over a text; KL in nats."""

    tokens: int
    source_ppl: float
    target: Summary


def fidelity(
    source: Path,
    target: Path,
    text: str,
    *,
    max_tokens: int = COMPARED_TOKENS,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Fidelity:
    """Compares two models on a text: both with a float32 cache, the source's activations in float32 too.

    The target runs with precision "exact", so what is measured is the weights and not the arithmetic.

    Raises:
        OptionError: a text too short.
    """
    with open_checkpoint(source) as a, open_checkpoint(target) as b:
        ids = Tokenizer.from_source(a.tokenizer).encode(text)[:max_tokens]
        parts = list(windows(ids))
        if not parts:
            raise OptionError(f"the text to compare on has {len(ids)} tokens: give some thousand")
        both = Comparison([("source", "target")])
        options: dict[str, Any] = {"context": WINDOW, "threads": threads, "kv": "f32", "force": force}
        with Llama(a, precision="f32", **options) as one, Llama(b, precision="exact", **options) as other:
            for done, part in enumerate(parts):
                rows = [logits_in_cuts(model, part, [model.chunk]) for model in (one, other)]
                both.add(dict(zip(("source", "target"), rows, strict=True)), part)
                if progress:
                    progress("compare", done + 1, len(parts))
    return Fidelity(sum(map(len, parts)), both.ppl("source"), both.summary("source", "target"))
