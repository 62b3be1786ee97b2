"""SmolLM2-360M and 1.7B in their true shapes with seeded random weights: what a model costs does not depend on what it
says.

    python benchmarks/shapes.py 1.7b q4_0 big.gguf && smolrun bench big.gguf --compare llama.cpp

The vocabulary is taken from an installed model, so both runtimes open the file. Matrices repeat one quantised pool of
rows from different offsets: quantising 1.7 billion numbers would take minutes and change nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from smolrun.config import ModelConfig
from smolrun.files.checkpoint import expected_shapes
from smolrun.files.gguf import WriteTensor, read_gguf, write_gguf
from smolrun.files.sources import resolve
from smolrun.kernels.formats import FORMATS, quantize_ref

# layers, dim, hidden_dim, heads, KV heads, rope theta (the models' cards)
SHAPES = {
    "135m": (30, 576, 1536, 9, 3, 100_000.0),
    "360m": (32, 960, 2560, 15, 5, 100_000.0),
    "1.7b": (24, 2048, 8192, 32, 32, 130_000.0),
}
POOL_ROWS = 2048


def write(size: str, fmt: str, path: Path, seed: int = 0) -> None:
    """Write the model; the embedding is Q6_K, or Q8_0 where 256 does not divide its width, for 4-bit files as llama.cpp
    does.
    """
    layers, dim, hidden, heads, kv_heads, theta = SHAPES[size]
    source = read_gguf(resolve(None, offline=True))
    metadata: dict[str, Any] = {k: v for k, v in source.metadata.items() if k.startswith("tokenizer.")}
    vocab = len(metadata["tokenizer.ggml.tokens"])
    metadata |= {
        "general.architecture": "llama",
        "general.name": f"random weights in the shape of SmolLM2-{size}",
        "llama.block_count": layers,
        "llama.context_length": 8192,
        "llama.embedding_length": dim,
        "llama.feed_forward_length": hidden,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.rope.freq_base": theta,
        "llama.rope.dimension_count": dim // heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": vocab,
    }
    config = ModelConfig.from_gguf(metadata, tied=True)
    rng = np.random.default_rng(seed)
    pools: dict[tuple[str, int], np.ndarray] = {}

    def matrix(name: str, rows: int, cols: int) -> WriteTensor:
        embedding = name.startswith("token_embd") and fmt.startswith("q4")
        kind = ("Q8_0" if cols % 256 else "Q6_K") if embedding else fmt.upper()
        if (kind, cols) not in pools:
            values = rng.standard_normal((POOL_ROWS, cols), np.float32) / np.sqrt(np.float32(cols))
            blocks = np.ascontiguousarray(quantize_ref(FORMATS[kind], values))
            pools[kind, cols] = blocks.view(np.uint8).reshape(POOL_ROWS, -1)
        order = rng.integers(0, POOL_ROWS, rows)
        return WriteTensor(name, kind, (rows, cols), lambda: pools[kind, cols][order])

    tensors = []
    for name, shape in expected_shapes(config).items():
        if len(shape) == 1:
            tensors.append(WriteTensor(name, "F32", shape, np.ones(shape, np.float32)))
        elif name != "output.weight":
            tensors.append(matrix(name, *shape))
    write_gguf(path, metadata, tensors)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("format", choices=["f16", "bf16", "q8_0", "q4_0", "q4_1", "q6_k"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.size, options.format, options.path, options.seed)
