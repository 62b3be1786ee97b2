"""Seeded tiny checkpoints: the same weights as GGUF and as Hugging Face folder, with a real byte-level BPE tokenizer.

    tiny = make_tiny(tmp_path, fmt="Q4_0")
    tiny.gguf      tmp_path/tiny.gguf        q and k rows permuted, as llama.cpp's converter does
    tiny.folder    tmp_path/tiny             config.json, model.safetensors, tokenizer.json, ... (half-split rows)
    tiny.weights   the exact model: name -> float32, half-split rows, already rounded to `fmt`

A quantised format exists in GGUF only: its folder holds the dequantised weights as F32, so both hold the same numbers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import naive
from smolrun.config import ModelConfig
from smolrun.files.gguf import WriteTensor, write_gguf
from smolrun.kernels.formats import FORMATS, dequantize_ref, quantize_ref

HEAD_DIM = 64

# fmt: off
MERGES = [  # the first of SmolLM2
    "Ġ t", "Ġ a", "i n", "h e", "Ġ Ġ", "r e", "o n", "e r", "Ġt he", "a t", "Ġ s", "Ġ o", "e n", "Ġ c", "e s", "Ġ w",
    "n d", "i t", "o r", "i s", "a l", "Ġ p", "in g", "Ġ f", "a n", "e d", "Ġ b", "o u", "a r", "Ġ in", "Ġo f",
    "Ġ m", "Ġa nd", "i on", "i c", "Ġ d", "Ġt o", "ĠĠ ĠĠ", "l e", "r o", "a s", "en t", "Ġ h", "Ġt h", "c t", "Ġ e",
    "Ġ re", "e l", "o m", "i l", "s t", "Ġ l", "Ġ n", "e t", "i m", "v e", "o l", "at ion", "Ġ g", "i d",
]
SPECIALS = [  # ids 0 to 16
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>",
    "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>",
    "<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>",
]
# fmt: on

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

FULL_VOCAB = len(SPECIALS) + 256 + len(MERGES)  # 333: no multiple of 16
SAFETENSORS_DTYPE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# canonical name -> name in a Hugging Face checkpoint
HF_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
HF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Tiny:
    """A checkpoint on disk, twice, and what is in it."""

    gguf: Path
    folder: Path
    config: ModelConfig
    weights: dict[str, np.ndarray]
    vocab: list[str]
    merges: list[str]


def make_tiny(
    dir: Path,
    *,
    seed: int = 0,
    gqa: bool = True,
    tied: bool = True,
    base: bool = False,
    vocab_size: int = FULL_VOCAB,
    dim: int = 192,
    hidden_dim: int = 352,
    n_layers: int = 2,
    fmt: str = "F32",
    embd_fmt: str | None = None,
    mix: Mapping[str, str] | None = None,
    max_positions: int = 2048,
    rope_theta: float = 100_000.0,
    shards: int = 1,
) -> Tiny:
    """Write `dir`/tiny.gguf and `dir`/tiny/ and return them.

    Args:
        gqa: 1 KV head for all query heads, else as many as query heads.
        base: no chat template, bos = eos = <|endoftext|>.
        vocab_size: fewer than FULL_VOCAB drops merges, more pads with unused ids.
        dim: dim / 64 heads. For K-quants take dim and hidden_dim divisible by 256, or get Q8_0.
        fmt: format of the matrices, random bits where nobody here quantises; norms are F32 in GGUF and in quantised
            models' folders.
        embd_fmt: format of token_embd (and output), `fmt` when None.
        mix: other formats by part of a name, {"attn_v": "Q6_K"}.
        shards: safetensors files; more than 1 writes an index.
    """
    heads = dim // HEAD_DIM
    config = ModelConfig(
        dim=dim,
        hidden_dim=hidden_dim,
        n_layers=n_layers,
        n_heads=heads,
        n_kv_heads=1 if gqa else heads,
        head_dim=HEAD_DIM,
        vocab_size=vocab_size,
        max_positions=max_positions,
        rope_theta=rope_theta,
        norm_eps=1e-5,
        tied=tied,
        name="tiny",
        licence="apache-2.0",
    )
    vocab, merges = make_vocab(vocab_size)
    plain = fmt if fmt in SAFETENSORS_DTYPE else "F32"  # what the folder holds
    weights, files = {}, []
    for name, values in make_weights(config, seed).items():
        wanted = (embd_fmt or fmt) if name in ("token_embd.weight", "output.weight") else fmt
        wanted = (mix or {}).get(name.split(".")[-2], wanted)
        if values.shape[-1] % FORMATS[wanted].block:
            wanted = "Q8_0"
        if values.ndim == 1:
            wanted, values = "F32", round_to(plain, values)
        format = FORMATS[wanted]
        if format.quantize:
            blocks = quantize_ref(format, permute(values, config, name))
        else:
            blocks = naive.blocks(wanted, *values.shape, seed + len(files), float(values.std())).view(format.dtype)
        files.append(WriteTensor(name, format.name, values.shape, blocks))
        weights[name] = permute(dequantize_ref(format, blocks).reshape(values.shape), config, name, inverse=True)
    dir.mkdir(parents=True, exist_ok=True)
    gguf, folder = dir / "tiny.gguf", dir / "tiny"
    write_gguf(gguf, gguf_metadata(config, vocab, merges, base=base), files)
    write_folder(folder, config, weights, vocab, merges, plain=plain, base=base, shards=shards)
    return Tiny(gguf, folder, config, weights, vocab, merges)


def make_weights(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Canonical name -> float32, standard deviation 1 / sqrt(columns); norms around 1.

    q and k are twice as large: attention must look at single positions, or greedy ids soon repeat themselves.
    """
    bits = np.random.PCG64(seed)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (config.vocab_size, config.dim)}
    for i in range(config.n_layers):
        shapes |= {
            f"blk.{i}.attn_norm": (config.dim,),
            f"blk.{i}.attn_q": (config.q_dim, config.dim),
            f"blk.{i}.attn_k": (config.kv_dim, config.dim),
            f"blk.{i}.attn_v": (config.kv_dim, config.dim),
            f"blk.{i}.attn_output": (config.dim, config.q_dim),
            f"blk.{i}.ffn_norm": (config.dim,),
            f"blk.{i}.ffn_gate": (config.hidden_dim, config.dim),
            f"blk.{i}.ffn_up": (config.hidden_dim, config.dim),
            f"blk.{i}.ffn_down": (config.dim, config.hidden_dim),
        }
    shapes["output_norm"] = (config.dim,)
    if not config.tied:
        shapes["output"] = (config.vocab_size, config.dim)
    out = {}
    for name, shape in shapes.items():
        values = nearly_normal(bits, shape)
        scale = (2 if name.endswith(("attn_q", "attn_k")) else 1) / np.sqrt(shape[-1])
        out[f"{name}.weight"] = 1 + values / 10 if len(shape) == 1 else values * np.float32(scale)
    return out


def nearly_normal(bits: np.random.PCG64, shape: tuple[int, ...]) -> np.ndarray:
    """float32 of mean 0 and variance 1: each the sum of four 16-bit integers.

    Generator.standard_normal calls the platform's exp and log and may change with NumPy; golden ids must not.
    """
    raw = bits.random_raw(int(np.prod(shape))).astype("<u8").view("<u2").reshape(-1, 4)
    sums = raw.sum(axis=1, dtype=np.int64) - 2 * 65_535
    return (sums.astype(np.float32) * np.float32(np.sqrt(12 / 4) / 65_536)).reshape(shape)


def permute(rows: np.ndarray, config: ModelConfig, name: str, *, inverse: bool = False) -> np.ndarray:
    """q and k rows from half-split rotary pairs to interleaved (as convert_hf_to_gguf.py), or back."""
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return rows
    pairs = (HEAD_DIM // 2, 2) if inverse else (2, HEAD_DIM // 2)
    split = rows.reshape(-1, *pairs, rows.shape[1])  # (heads, 2, 32, dim)
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)


def round_to(fmt: str, values: np.ndarray) -> np.ndarray:
    """float32 values as `fmt` holds them."""
    return dequantize_ref(FORMATS[fmt], quantize_ref(FORMATS[fmt], values)).reshape(values.shape)


def byte_alphabet() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes, in the order of their code points."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in sorted([*printable, *range(256, 256 + 256 - len(printable))])]


def make_vocab(vocab_size: int) -> tuple[list[str], list[str]]:
    """(tokens by id, merges): 17 specials, 256 bytes, then one token per merge. May be shorter than vocab_size."""
    merges = MERGES[: max(0, vocab_size - len(SPECIALS) - 256)]
    return SPECIALS + byte_alphabet() + [merge.replace(" ", "") for merge in merges], merges


def gguf_metadata(config: ModelConfig, vocab: list[str], merges: list[str], *, base: bool = False) -> dict[str, Any]:
    """The keys llama.cpp's converter writes for SmolLM2."""
    pads = config.vocab_size - len(vocab)
    kinds = [3] * len(SPECIALS) + [1] * (len(vocab) - len(SPECIALS)) + [5] * pads  # control, normal, unused
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": config.name,
        "general.license": config.licence,
        "llama.block_count": config.n_layers,
        "llama.context_length": config.max_positions,
        "llama.embedding_length": config.dim,
        "llama.feed_forward_length": config.hidden_dim,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.rope.freq_base": config.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.vocab_size": config.vocab_size,
        "llama.rope.dimension_count": config.head_dim,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocab + [f"[PAD{len(vocab) + i}]" for i in range(pads)],
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0 if base else 1,
        "tokenizer.ggml.eos_token_id": 0 if base else 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    if not merges:
        del metadata["tokenizer.ggml.merges"]
    if not base:
        metadata["tokenizer.chat_template"] = CHAT_TEMPLATE
    return metadata


def tokenizer_json(vocab: list[str], merges: list[str]) -> dict[str, Any]:
    """tokenizer.json as SmolLM2's: every digit alone, then the GPT-2 regex."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(SPECIALS)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(vocab)},
            "merges": merges,
        },
    }


def hf_config(config: ModelConfig, *, base: bool = False, plain: str = "F32") -> dict[str, Any]:
    """config.json as SmolLM2's."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0 if base else 1,
        "eos_token_id": 0 if base else 2,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": config.hidden_dim,
        "max_position_embeddings": config.max_positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": config.norm_eps,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "torch_dtype": SAFETENSORS_DTYPE[plain],
        "vocab_size": config.vocab_size,
    }


def hf_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    stem = name.removesuffix(".weight")
    if stem in HF_NAMES:
        return HF_NAMES[stem] + ".weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{HF_LAYER[part]}.weight"


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], plain: str = "F32") -> None:
    """float32 arrays -> a safetensors file of dtype `plain`, put together by hand so that tests can bend it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, values in tensors.items():
        start = len(data)
        data += quantize_ref(FORMATS[plain], values).tobytes()
        header[name] = {"dtype": plain, "shape": list(values.shape), "data_offsets": [start, len(data)]}
    path.write_bytes(safetensors_bytes(header, bytes(data)))


def safetensors_bytes(header: dict[str, Any], data: bytes) -> bytes:
    """length u64 | JSON header, padded with spaces to 8 | data"""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def write_folder(
    folder: Path,
    config: ModelConfig,
    weights: dict[str, np.ndarray],
    vocab: list[str],
    merges: list[str],
    *,
    plain: str = "F32",
    base: bool = False,
    shards: int = 1,
) -> None:
    """A Hugging Face checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    bos, eos = (0, 0) if base else (1, 2)
    tokenizer_config = {
        "add_prefix_space": False,
        "bos_token": SPECIALS[bos],
        "eos_token": SPECIALS[eos],
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": SPECIALS[0],
    }
    if not base:
        tokenizer_config["chat_template"] = CHAT_TEMPLATE
    documents = {
        "config.json": hf_config(config, base=base, plain=plain),
        "generation_config.json": {"_from_model_config": True, "bos_token_id": bos, "eos_token_id": eos},
        "tokenizer.json": tokenizer_json(vocab, merges),
        "tokenizer_config.json": tokenizer_config,
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2, ensure_ascii=False), encoding="utf-8")
    named = {hf_name(name): values for name, values in weights.items()}
    if shards == 1:
        write_safetensors(folder / "model.safetensors", named, plain)
        return
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(named)}
    for file in set(weight_map.values()):
        write_safetensors(folder / file, {name: named[name] for name in named if weight_map[name] == file}, plain)
    index = {"metadata": {"total_size": sum(values.nbytes for values in named.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
