"""A GGUF file as the Hugging Face folder that other runtimes convert from: the same weights, in f16 or f32.

    python benchmarks/hf_folder.py model.gguf FOLDER

Blocks of a quantised file become the f16 numbers nearest to what they stand for: give an F16 file to lose nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from smolrun.files.checkpoint import Checkpoint, Tensor, hf_name, open_checkpoint
from smolrun.kernels.formats import FORMATS, dequantize_ref


def write(source: Path, folder: Path) -> None:
    """Writes the folder beside, then renames it.

    Raises:
        FileExistsError: there is one already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists: remove it, or give another")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with open_checkpoint(source) as checkpoint:
        weights = {hf_name(name): values(tensor) for name, tensor in checkpoint.tensors.items()}
        save_file(weights, part / "model.safetensors", {"format": "pt"})
        (part / "config.json").write_text(json.dumps(config(checkpoint), indent=1))
        tokenizer(checkpoint).save(str(part / "tokenizer.json"))
        end = checkpoint.tokenizer.vocab[checkpoint.tokenizer.eos_ids[0]]
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end, "unk_token": end}
        (part / "tokenizer_config.json").write_text(json.dumps(names, indent=1))
    part.rename(folder)


def values(tensor: Tensor) -> np.ndarray:
    """The numbers, q and k rows in Hugging Face's order: float32 for norms, float16 for matrices."""
    numbers = dequantize_ref(FORMATS[tensor.format], tensor.raw).reshape(tensor.shape)
    if len(tensor.shape) == 1:
        return numbers
    if tensor.permuted:  # a head's rows 0 1 2 3 ... are the pairs (0, 32) (1, 33) ...
        numbers = numbers.reshape(-1, 32, 2, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
    return np.ascontiguousarray(numbers, np.float16)


def config(checkpoint: Checkpoint) -> dict[str, object]:
    """config.json of a LlamaForCausalLM."""
    c = checkpoint.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": c.dim,
        "intermediate_size": c.hidden_dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_positions,
        "rope_theta": c.rope_theta,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float16",
        "bos_token_id": checkpoint.tokenizer.eos_ids[0],  # never prepended; converters ask for one
        "eos_token_id": checkpoint.tokenizer.eos_ids[0],
    }


def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """tokenizer.json of the GGUF's vocabulary and merges."""
    source = checkpoint.tokenizer
    vocab = {token: i for i, token in enumerate(source.vocab)}
    bpe = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in source.merges]))
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(split)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, special=True) for token in source.specials])
    return bpe


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    write(options.source, options.folder)
