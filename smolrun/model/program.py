"""The program of a model (kernels/program.py draws it): what C callers need beside the kernels and the panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolrun.config import ModelConfig
from smolrun.kernels.block import PAGE, SPAN, B
from smolrun.kernels.panels import ROWS
from smolrun.kernels.program import ABI, BASE, BLOCK, MAGIC, NAME_BYTES, K, P, based, symbol_id
from smolrun.model import memory, rope
from smolrun.model.llama import kernel_names, matmul_name, shape_words, terms_of
from smolrun.model.weights import Matrix, Tables, tables

THREADS = 4  # claims of weights are cut for so many
TILES = ("tile_f32", "tile_1", "tile_2")  # numbers of a tier that its library knows


def program(
    config: ModelConfig,
    matrices: Mapping[str, Matrix],
    where: Mapping[str, int],
    *,
    weights: Path,
    kv: Sequence[str],
    precision: str,
    tokens: Sequence[bytes],
    ends: Sequence[int],
) -> bytes:
    """The content of a program's file.

    Args:
        matrices: the weights.
        where: name of each matrix and norm -> where it begins in the file.
        weights: that file; it will stand beside the program's.
        kv: kinds of KV cache, as smolrun.load; the first is the default.
        precision: as smolrun.load.
        tokens: the bytes of every id.
        ends: ids that end an answer.
    """
    c, file, buffers = config, np.memmap(weights, np.uint8, "r"), _buffers(config)
    forwards = [kernel_names(matrices, precision, kind)[0] for kind in kv]
    others = kernel_names(matrices, precision, kv[0])[1:]  # classify, the embedding's rows, matrices
    symbols = [*others, *forwards, *TILES]

    def symbol(name: str) -> int:
        return int(based(BASE.symbol, symbols.index(name)))

    words = shape_words(c, kv[0]) | {name: symbol(name) for name in TILES}
    words |= {"embed_row": symbol(others[1]), "counters_bytes": buffers["counters"][0]}
    found = tables(
        c, matrices, lambda name: based(BASE.weights, where[name]), lambda fmt, n: symbol(matmul_name(fmt, n)),
        terms_of(precision), THREADS,
    )  # fmt: skip
    parts = {
        "head": np.zeros(P.size, np.int64),
        "symbols": np.array([symbol_id(name) for name in symbols], np.int64),
        "kinds": np.array([_kind(c, kind, symbols.index(f)) for kind, f in zip(kv, forwards, strict=True)], np.int64),
        "buffers": np.array([(getattr(BLOCK, name), *size) for name, size in buffers.items()], np.int64),
        "tables": _tables(found, words),
        "ends": np.array(ends, np.int64),
        "rope": rope.table(c.rope_theta, 0, c.max_positions),
        "text": _text(tokens),
        "weights": np.frombuffer(weights.name.encode() + b"\0", np.uint8),
    }
    facts = {
        "magic": MAGIC,
        "abi": ABI,
        "weights_bytes": len(file),
        "weights_sum": _sum(file[: len(file) // 8 * 8]),
        "vocab_size": c.vocab_size,
        "positions": c.max_positions,
        "chunk": memory.CHUNK,
        "n_symbols": len(symbols),
        "n_kinds": len(kv),
        "n_buffers": len(buffers),
        "n_tables": len(parts["tables"]),
        "n_ends": len(ends),
    }
    return _joined(parts, facts)


def _tables(found: Tables, words: Mapping[str, int]) -> NDArray[np.int64]:
    """The argument block with these words and the places of the tables, and the tables behind it."""
    layers = 8 * BLOCK.size
    embed = layers + found.layers.nbytes
    places = {"layers": layers, "embed": embed, "head": embed + found.embed.nbytes}
    values = {**words, "final_norm": found.final_norm, **{name: based(BASE.tables, at) for name, at in places.items()}}
    block: NDArray[np.int64] = np.zeros(BLOCK.size, np.int64)
    for name, value in values.items():
        block[getattr(BLOCK, name) // 8] = value
    return np.concatenate([block, found.layers.reshape(-1), found.embed, found.head])


def _joined(parts: Mapping[str, NDArray[Any]], facts: Mapping[str, int]) -> bytes:
    """The file of these parts: its head tells the facts and where each part begins, and the sum of all words is 0."""
    sizes = {name: part.nbytes for name, part in parts.items()}
    at, size = memory.offsets(sizes), memory.rounded(sizes)
    parts["tables"][B.rope // 8] = based(BASE.program, at["rope"])
    for name, value in {**at, **facts, "bytes": size}.items():
        if name != "head":
            parts["head"][getattr(P, name) // 8] = value
    out: NDArray[np.uint8] = np.zeros(size, np.uint8)
    for name, part in parts.items():
        out[at[name] : at[name] + part.nbytes] = part.reshape(-1).view(np.uint8)
    out.view(np.int64)[P.sum // 8] = -_sum(out)
    return out.tobytes()


def _kind(config: ModelConfig, kv: str, forward: int) -> list[int]:
    """K words of a kind of KV cache."""
    shape = shape_words(config, kv)
    name = np.frombuffer(kv.encode().ljust(NAME_BYTES, b"\0"), np.int64).tolist()
    sizes = [memory.page_bytes(config, kv), *(shape[name] for name in K._fields[4:-1])]
    return [*name, forward, *sizes]


def _buffers(config: ModelConfig) -> dict[str, tuple[int, int, int]]:
    """Buffers of one sequence: name -> bytes, more a thread, more a span of SPAN positions."""

    def sizes(threads: int, spans: int) -> dict[str, int]:
        context = spans * SPAN
        found = memory.buffer_sizes(config, chunk=memory.CHUNK, segments=1, threads=threads, context=context)
        del found["rope"]  # a part of the file
        return found | {"table": 8 * (context // PAGE), "logits": 4 * ROWS * -(-config.vocab_size // ROWS)}

    one, thread, span = sizes(1, 1), sizes(2, 1), sizes(1, 2)
    return {
        name: (3 * size - thread[name] - span[name], thread[name] - size, span[name] - size)
        for name, size in one.items()
    }


def _text(tokens: Sequence[bytes]) -> NDArray[np.uint8]:
    """Where each token's bytes begin and the last one's end, and the bytes."""
    first = 4 * (len(tokens) + 1)
    ends = np.cumsum([first, *map(len, tokens)], dtype=np.uint32)
    return np.frombuffer(ends.tobytes() + b"".join(tokens), np.uint8)


def _sum(content: NDArray[np.uint8]) -> int:
    """Of all 64-bit words, modulo 2^64, as an int64."""
    return int(content.view(np.int64).sum())
