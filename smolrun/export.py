"""A model out of the house: as a Hugging Face folder, and with an adapter merged into its weights.

    Checkpoint --merge--> Checkpoint --write_folder--> config.json, model.safetensors, tokenizer.json ...
                                     --quantize.write_file--> model.gguf

What was trained is a `Checkpoint` too (`train.Model.checkpoint`), whose tensors are read when their turn comes, so
memory holds one of them beside the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolrun.errors import ModelFileError, OptionError
from smolrun.files.checkpoint import Checkpoint, Tensor, hf_name
from smolrun.files.peft import Factors, LowRank
from smolrun.files.whole import whole
from smolrun.kernels.block import HEAD_DIM
from smolrun.kernels.formats import FORMATS, dequantize_ref, quantize_ref
from smolrun.text.tokenizer import tokenizer_json

Floats = NDArray[np.float32]
DTYPES = {"f32": ("F32", "float32"), "f16": ("F16", "float16"), "bf16": ("BF16", "bfloat16")}


def is_rotary(tensor: Tensor) -> bool:
    """Whether its rows are pairs to be rotated."""
    return tensor.name.endswith(("attn_q.weight", "attn_k.weight"))


def repaired(rows: NDArray[Any], interleave: bool) -> NDArray[Any]:
    """Rows of heads with pairs (i, i + 32) as neighbours (2i, 2i + 1), or back."""
    pairs = (2, HEAD_DIM // 2) if interleave else (HEAD_DIM // 2, 2)
    out: NDArray[Any] = rows.reshape(-1, *pairs, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
    return out


def rows_of(tensor: Tensor, raw: NDArray[np.uint8], *, permuted: bool) -> Floats:
    """Rows (n, row_bytes), whole heads of them, as float32 in interleaved (permuted) or half-split rotary order."""
    values: Floats = dequantize_ref(FORMATS[tensor.format], raw).reshape(len(raw), -1)
    return values if tensor.permuted == permuted or not is_rotary(tensor) else repaired(values, permuted)


def values_of(tensor: Tensor) -> Floats:
    """A tensor as float32, in its own shape and half-split rotary order."""
    raw = tensor.raw.reshape(tensor.shape[0] if len(tensor.shape) == 2 else 1, -1)
    return rows_of(tensor, raw, permuted=False).reshape(tensor.shape)


def float_tensor(name: str, shape: tuple[int, ...], values: Callable[[], Floats]) -> Tensor:
    """A tensor of a checkpoint that is made when it is read: float32, half-split rotary order."""

    def read() -> NDArray[np.uint8]:
        return np.ascontiguousarray(values(), np.float32).reshape(-1).view(np.uint8)

    return Tensor(name, "F32", shape, 4 * int(np.prod(shape)), False, read, lambda: None)


def merge(checkpoint: Checkpoint, adapter: LowRank, scale: float = 1.0) -> Checkpoint:
    """The checkpoint with an adapter in its weights: W + scale B A, float32, whatever W was; the rest is as it was."""
    tensors = dict(checkpoint.tensors)
    for stem, factors in adapter.factors.items():
        tensor = tensors[f"{stem}.weight"]

        def merged(tensor: Tensor = tensor, factors: Factors = factors) -> Floats:
            out = values_of(tensor) + factors.delta(scale)
            tensor.release()
            return out

        tensors[tensor.name] = float_tensor(tensor.name, tensor.shape, merged)
    return replace(checkpoint, tensors=tensors)


def write_folder(checkpoint: Checkpoint, path: str | os.PathLike[str], dtype: str = "bf16") -> None:
    """A folder that transformers and smolrun open: config, tokenizer, and weights in one file that comes last.

    Args:
        path: made if need be; files of these names in it are replaced, each at once and whole.
        dtype: of the weights, one of DTYPES.

    Raises:
        OptionError: an unknown dtype; the checkpoint's own folder as target.
        ModelFileError: a value that is no number, or too large for the dtype.
        OSError: it cannot be written.
    """
    if dtype not in DTYPES:
        raise OptionError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    folder, (fmt, name) = Path(path), DTYPES[dtype]
    if folder.exists() and checkpoint.path.exists() and folder.samefile(checkpoint.path):
        raise OptionError(f"{folder} is the source itself: give another folder to write")
    folder.mkdir(parents=True, exist_ok=True)
    documents = _documents(checkpoint, name)
    documents["tokenizer.json"] = checkpoint.tokenizer.json or tokenizer_json(checkpoint.tokenizer)
    for file_name, text in documents.items():
        with whole(folder / file_name) as file:
            file.write(text.encode())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, size = 0, FORMATS[fmt].dtype.itemsize
    for tensor in checkpoint.tensors.values():
        nbytes = int(np.prod(tensor.shape)) * size
        place = {"dtype": fmt, "shape": list(tensor.shape), "data_offsets": [offset, offset + nbytes]}
        header[hf_name(tensor.name)] = place
        offset += nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with whole(folder / "model.safetensors") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in checkpoint.tensors.values():
            with np.errstate(over="ignore"):
                blocks = quantize_ref(FORMATS[fmt], values_of(tensor))
            if not np.isfinite(dequantize_ref(FORMATS[fmt], blocks)).all():
                raise ModelFileError(f"{tensor.name}: a value that is no number, or too large for {dtype}")
            file.write(np.ascontiguousarray(blocks).reshape(-1).view(np.uint8).data)
            tensor.release()


def _documents(checkpoint: Checkpoint, dtype: str) -> dict[str, str]:
    """File name -> text of what describes the model."""
    c, source = checkpoint.config, checkpoint.tokenizer
    names = {i: text for text, i in source.specials.items()}
    eos = source.eos_ids[0] if source.eos_ids else None
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": source.bos_id,
        "eos_token_id": eos,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.dim,
        "initializer_range": c.dim**-0.5,
        "intermediate_size": c.hidden_dim,
        "max_position_embeddings": c.max_positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": c.n_heads,
        "num_hidden_layers": c.n_layers,
        "num_key_value_heads": c.n_kv_heads,
        "rms_norm_eps": c.norm_eps,
        "rope_scaling": None,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": c.tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": c.vocab_size,
    }
    generation = {"bos_token_id": source.bos_id, "eos_token_id": list(source.eos_ids) or None}
    tokens: dict[str, Any] = dict(checkpoint.metadata.get("tokenizer_config.json") or {})
    if not tokens:
        tokens = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "model_max_length": c.max_positions}
        ids = {"bos": source.bos_id, "eos": eos, "pad": eos, "unk": source.specials.get("<|endoftext|>")}
        tokens |= {f"{key}_token": names[i] for key, i in ids.items() if i is not None and i in names}
    tokens.pop("chat_template", None)
    if checkpoint.chat_template is not None:
        tokens["chat_template"] = checkpoint.chat_template
    card = f"---\nlicense: {c.licence}\n---\n" if c.licence else ""
    documents = {"config.json": config, "generation_config.json": generation, "tokenizer_config.json": tokens}
    texts = {name: json.dumps(value, indent=2, ensure_ascii=False) for name, value in documents.items()}
    return texts | ({"README.md": card} if card else {})
