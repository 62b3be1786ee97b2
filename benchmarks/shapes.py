"""SmolLM2-360M and 1.7B in their true shapes with seeded random weights: what a model costs does not depend on what it
says.

    python benchmarks/shapes.py 1.7b q4_k_m big.gguf && smolrun bench big.gguf --compare llama.cpp

The vocabulary is taken from an installed model, so both runtimes open the file. Matrices repeat one pool of rows from
different offsets, quantised, or random bits where nobody here quantises: 1.7 billion numbers would take minutes and
change nothing. Mixtures are llama.cpp's, but for its exceptions in the first layers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import naive
from smolrun.config import ModelConfig
from smolrun.files.checkpoint import expected_shapes
from smolrun.files.gguf import WriteTensor, read_gguf, write_gguf
from smolrun.files.sources import resolve
from smolrun.kernels.formats import FORMATS

# layers, dim, hidden_dim, heads, KV heads, rope theta (the models' cards)
SHAPES = {
    "135m": (30, 576, 1536, 9, 3, 100_000.0),
    "360m": (32, 960, 2560, 15, 5, 100_000.0),
    "1.7b": (24, 2048, 8192, 32, 32, 130_000.0),
}
POOL_ROWS = 2048
# name -> format of most matrices, of some, and whether those are so in every layer or in the outer ones and each third
MIXTURES = {
    "q2_k": ("Q2_K", {"attn_v": "Q3_K", "attn_output": "Q3_K", "ffn_down": "Q3_K"}, True),
    "q3_k_m": ("Q3_K", {"attn_v": "Q4_K", "attn_output": "Q4_K", "ffn_down": "Q4_K"}, True),
    "q4_k_m": ("Q4_K", {"attn_v": "Q6_K", "ffn_down": "Q6_K"}, False),
    "q5_k_m": ("Q5_K", {"attn_v": "Q6_K", "ffn_down": "Q6_K"}, False),
}
# where 256 does not divide the columns
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
PLAIN = ("f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q6_k", "iq4_nl", "iq4_xs")


def format_of(name: str, cols: int, layers: int, fmt: str) -> str:
    """Format of a tensor in a file of kind `fmt`; embeddings of files below 6 bits are Q6_K."""
    most, some, everywhere = MIXTURES.get(fmt, (fmt.upper(), {}, True))
    kind = most
    if name.startswith("token_embd"):
        kind = "Q6_K" if FORMATS[most].bits_per_weight < FORMATS["Q6_K"].bits_per_weight else most
    elif (part := name.split(".")[2]) in some:
        layer, outer = int(name.split(".")[1]), layers // 8
        if everywhere or not outer <= layer < 7 * layers // 8 or (layer - outer) % 3 == 2:
            kind = some[part]
    return FALLBACK[kind] if cols % FORMATS[kind].block else kind


def write(size: str, fmt: str, path: Path, seed: int = 0) -> None:
    """Write the model."""
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
        kind = format_of(name, cols, layers, fmt)
        if (kind, cols) not in pools:
            pools[kind, cols] = naive.blocks(kind, POOL_ROWS, cols, seed, cols**-0.5)
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
    parser.add_argument("format", choices=[*PLAIN, *MIXTURES])
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.size, options.format, options.path, options.seed)
