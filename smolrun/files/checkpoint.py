"""A checkpoint, whatever its container: config, tensors under one set of names, tokenizer, chat template.

    GGUF file              llama.* and tokenizer.* metadata, q and k rows permuted
    packed model           what `smolrun compile` makes: panels instead of blocks, and no way back; or what an earlier
                           load kept of one of the others, whose tensors are still read from there
    Hugging Face folder    config.json, *.safetensors, tokenizer.json, ... q and k rows half-split

Names are GGUF's: token_embd, output_norm, output, blk.{i}.attn_norm | attn_q | attn_k | attn_v | attn_output |
ffn_norm | ffn_gate | ffn_up | ffn_down, each + ".weight". Nothing is copied: a tensor is a view of a read-only map.
"""

import hashlib
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from smolrun.config import ModelConfig
from smolrun.errors import ModelFileError, ModelNotFound, UnsupportedModel
from smolrun.files.folder import Folder, Shard, parse_object
from smolrun.files.gguf import read_gguf
from smolrun.files.gptq import Packing, layer, packing
from smolrun.files.mapped import AGAIN, MappedFile
from smolrun.files.packed import MAGIC, PackedModel
from smolrun.kernels.formats import FORMATS, dequantize_ref

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = {"tokenizer.ggml.tokens": str, "tokenizer.ggml.merges": str, "tokenizer.ggml.token_type": int}
CONTROL = 3  # GGUF token type of specials
STEP = 1 << 22  # bytes compared at a time
ROTARY = (".attn_q.weight", ".attn_k.weight")  # what GGUF keeps in another order

SUFFIXES = (".json", ".jinja", ".safetensors", ".md")  # of a folder's files that a checkpoint is read from
START, SAMPLES, SAMPLE = 2 << 20, 64, 4096  # bytes of a file, places, and bytes at each, that identify it

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


@dataclass(frozen=True, slots=True)
class Tensor:
    """One weight as it lies in its file.

    Attributes:
        name: GGUF's name, "blk.3.attn_q.weight".
        format: name in kernels.formats.FORMATS.
        shape: (rows, cols), or (dim,) for norms.
        nbytes: bytes of the blocks.
        read: gives the blocks, uint8 (nbytes,): a read-only view without a copy, but for GPTQ and AWQ layers, whose
            blocks are put together anew each time.
        permuted: rows are in GGUF's interleaved rotary order (attn_q and attn_k of a GGUF file).
        release: takes the tensor's pages out of resident memory once they are used; they come back when touched again.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    nbytes: int
    permuted: bool
    read: Callable[[], np.ndarray] = field(repr=False, compare=False)
    release: Callable[[], None] = field(repr=False, compare=False)

    @property
    def raw(self) -> np.ndarray:
        """The blocks, uint8 (nbytes,)."""
        return self.read()


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """What a tokenizer is built from: `tables`, `json`, else `vocab`, `merges` and `token_types`.

    Attributes:
        json: the text of a tokenizer.json.
        tables: those of text/bpe.py, uint8 each; a packed model has nothing else.
        eos_ids: the ids that end an answer: every end id the files name, then <|endoftext|>.
        specials: text -> id of the control tokens.
    """

    json: str | None = field(default=None, repr=False)
    vocab: list[str] = field(default_factory=list, repr=False)
    merges: list[str] = field(default_factory=list, repr=False)
    token_types: list[int] = field(default_factory=list, repr=False)
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    specials: dict[str, int] = field(default_factory=dict)
    tables: Mapping[str, np.ndarray] | None = field(default=None, repr=False)


@dataclass(slots=True)
class Checkpoint:
    """An open checkpoint; a context manager.

    Attributes:
        metadata: GGUF's keys but for the vocabulary, which `tokenizer` holds; for a folder its JSON files by name.
        bytes_total: bytes of all tensors in their files.
        identity: of its files, see `identity`, when it was opened.
        packed: the open file of a packed model, whose tensors cannot be read but as panels; None for others.
    """

    path: Path
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    tokenizer: TokenizerSource
    chat_template: str | None
    metadata: dict[str, Any]
    bytes_total: int
    _files: list[MappedFile] = field(default_factory=list, repr=False)
    packed: PackedModel | None = field(default=None, repr=False)
    identity: list[Any] = field(default_factory=list, repr=False)

    def release(self) -> None:
        """Take the files' pages out of resident memory; they come back when touched again."""
        for file in self._files:
            file.release(0, file.size)

    def close(self) -> None:
        """Close the files. Views that are still held stay readable."""
        self.tensors = {}
        for file in self._files:
            file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a GGUF file or a Hugging Face folder and check that it is a whole, plain Llama.

    Raises:
        ModelNotFound: nothing at `path`.
        ModelFileError: damaged, hostile or incomplete; names file, tensor or key, found and expected.
        UnsupportedModel: sound, but another architecture, dtype, RoPE, ... than smolrun runs; names the feature.
    """
    path = Path(path)
    if not os.path.exists(path):  # unlike Path.exists, never raises
        raise ModelNotFound(f"{path}: no such file or folder")
    if not path.is_dir():
        if path.suffix == ".safetensors":
            raise ModelFileError(f"{path.name}: weights alone are no model: give the folder that holds config.json too")
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                return _open_packed(PackedModel(path))
    seen = identity(path)  # before it is read: what is written from here on gives it another one
    checkpoint = _open_folder(path) if path.is_dir() else _open_gguf(path)
    checkpoint.identity = seen
    return checkpoint


def open_kept(model: PackedModel, path: Path, identity: list[Any]) -> Checkpoint:
    """The checkpoint at `path` as `model` keeps it: the tokenizer is tables; the files are opened for the blocks of a
    tensor alone, which raises ModelFileError if they have another `identity` by then.

    Raises:
        ModelFileError, UnsupportedModel: a damaged or hostile `model`.
    """

    @cache
    def source() -> Checkpoint:
        found = open_checkpoint(path)
        if found.identity != identity:
            raise ModelFileError(f"{path.name} was written to since it was loaded: load it again")
        kept._files += found._files
        return found

    kept = _open_packed(model, path, lambda name: source().tensors[name])
    kept.identity = identity
    return kept


def identity(path: Path) -> list[Any]:
    """What the files of a checkpoint are: other as soon as one of them is written to, appears or goes away.

    Of each its path, size, times of the last write and of the last change (which no program can set back), and a hash
    of its first 2 MB and of 64 places, for file systems whose times say little. Empty if they cannot be read.
    """
    try:
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
        return [_identity(file) for file in files]
    except OSError:
        return []


def _identity(path: Path) -> list[Any]:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path}: not a regular file")
    with open(path, "rb", buffering=0) as file:
        state = os.fstat(file.fileno())
        digest = hashlib.sha256(file.read(START))
        for place in range(SAMPLES) if state.st_size > START else ():
            file.seek(state.st_size * place // SAMPLES)
            digest.update(file.read(SAMPLE))
    return [os.path.realpath(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns, digest.hexdigest()]


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a model, in the order of the forward pass."""
    dim, hidden_dim = config.dim, config.hidden_dim
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (config.vocab_size, dim)}
    for i in range(config.n_layers):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (dim,),
            f"blk.{i}.attn_q.weight": (config.q_dim, dim),
            f"blk.{i}.attn_k.weight": (config.kv_dim, dim),
            f"blk.{i}.attn_v.weight": (config.kv_dim, dim),
            f"blk.{i}.attn_output.weight": (dim, config.q_dim),
            f"blk.{i}.ffn_norm.weight": (dim,),
            f"blk.{i}.ffn_gate.weight": (hidden_dim, dim),
            f"blk.{i}.ffn_up.weight": (hidden_dim, dim),
            f"blk.{i}.ffn_down.weight": (dim, hidden_dim),
        }
    shapes["output_norm.weight"] = (dim,)
    if not config.tied:
        shapes["output.weight"] = (config.vocab_size, dim)
    return shapes


def hf_name(name: str) -> str:
    """GGUF's name -> Hugging Face's: blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    stem = name.removesuffix(".weight")
    if stem in HF_NAMES:
        return f"{HF_NAMES[stem]}.weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{HF_LAYER[part]}.weight"


# --- GGUF ------------------------------------------------------------------------------------------------------------


def _open_gguf(path: Path) -> Checkpoint:
    gguf = read_gguf(path)
    try:
        metadata, source = gguf.metadata, path.name
        if metadata.get("split.count", 1) != 1:
            parts = metadata["split.count"]
            raise UnsupportedModel(f"{source}: one of {parts} parts; merge them first (llama-gguf-split --merge)")
        config = ModelConfig.from_gguf(metadata, tied="output.weight" not in gguf.tensors, source=source)
        shapes = expected_shapes(config)
        _check(source, shapes, {name: info.shape for name, info in gguf.tensors.items()})
        tensors = {}
        for name in shapes:
            info = gguf.tensors[name]
            shard = Shard(gguf.file, info.format.name, info.shape, info.offset, info.nbytes)
            tensors[name] = _tensor(f"{source}: tensor {name}", name, shard, permuted=name.endswith(ROTARY))
        tokenizer = _gguf_tokenizer(metadata, config, source)
        template = metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise ModelFileError(f"{source}: tokenizer.chat_template is no string {AGAIN}")
        total = sum(tensor.nbytes for tensor in tensors.values())
        small = {key: value for key, value in metadata.items() if key not in VOCABULARY}  # 15 MB can then be let go
        return Checkpoint(path, config, tensors, tokenizer, template, small, total, [gguf.file])
    except BaseException:
        gguf.close()
        raise


def _gguf_tokenizer(metadata: Mapping[str, Any], config: ModelConfig, source: str) -> TokenizerSource:
    for key, plain in {"model": "gpt2", "pre": "smollm", "add_bos_token": False, "add_space_prefix": False}.items():
        found = metadata.get(f"tokenizer.ggml.{key}", plain if plain is False else None)
        if found != plain:
            raise UnsupportedModel(f"{source}: tokenizer.ggml.{key} is {found!r}; only {plain!r} is supported")
    lists: list[list[Any]] = []
    for key, kind in VOCABULARY.items():
        values = metadata.get(key)
        if not isinstance(values, list) or not values or type(values[0]) is not kind:  # GGUF arrays hold one type
            raise ModelFileError(f"{source}: {key} is missing or no array of {kind.__name__} {AGAIN}")
        lists.append(values)
    vocab, merges, types = lists
    if len(types) != len(vocab):
        raise ModelFileError(f"{source}: {len(vocab):,} tokens but {len(types):,} token types {AGAIN}")
    if len(set(vocab)) != len(vocab):
        raise ModelFileError(f"{source}: a token occurs twice in the vocabulary {AGAIN}")
    specials = {vocab[i]: i for i, kind in enumerate(types) if kind == CONTROL}
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    bos, eos_ids = _special_ids(source, config, specials, metadata.get("tokenizer.ggml.bos_token_id"), ends)
    return TokenizerSource(None, vocab, merges, types, bos, eos_ids, specials)


# --- Hugging Face folder ---------------------------------------------------------------------------------------------


def _open_folder(path: Path) -> Checkpoint:
    folder = Folder(path)
    documents: dict[str, Any] = {}
    for name, need in {"config.json": True, "generation_config.json": False, "tokenizer_config.json": False}.items():
        document = folder.json(name)
        if document is None and need:
            raise ModelFileError(f"{path}: {name} is missing: not a Hugging Face checkpoint, or an incomplete download")
        documents[name] = document or {}
    config = ModelConfig.from_hf(documents["config.json"], name=folder.name, licence=_licence(folder))
    tokenizer = _hf_tokenizer(folder, documents, config)
    template = folder.text("chat_template.jinja") or _hf_template(documents["tokenizer_config.json"])
    shards = folder.shards()
    files = list({id(shard.file): shard.file for shard in shards.values()}.values())
    try:
        tensors = _hf_tensors(folder.name, config, shards, packing(documents["config.json"]))
    except BaseException:
        for file in files:
            file.close()
        raise
    total = sum(tensor.nbytes for tensor in tensors.values())
    return Checkpoint(path, config, tensors, tokenizer, template, documents, total, files)


def _hf_tensors(
    source: str, config: ModelConfig, shards: dict[str, Shard], packed: Packing | None
) -> dict[str, Tensor]:
    # inv_freq follows from theta
    shards = {name: shard for name, shard in shards.items() if not name.endswith(".rotary_emb.inv_freq")}
    head, embedding = shards.get("lm_head.weight"), shards.get("model.embed_tokens.weight")
    if config.tied and head and embedding:
        if not _equal(head, embedding):
            raise ModelFileError(
                f"{source}: tie_word_embeddings is true, but lm_head differs from embed_tokens {AGAIN}"
            )
        del shards["lm_head.weight"]
    shapes = expected_shapes(config)
    names = {name: hf_name(name) for name in shapes}
    tensors: dict[str, Tensor] = {}
    for name, own in names.items() if packed else ():
        stem = own.removesuffix(".weight")
        if f"{stem}.qweight" in shards:
            made = layer(source, packed, stem, shapes[name], shards)  # type: ignore[arg-type]
            nbytes = shapes[name][0] * FORMATS[made.format].row_bytes(shapes[name][1])
            tensors[name] = Tensor(name, made.format, shapes[name], nbytes, False, made.read, made.release)
    expected = {names[name]: shape for name, shape in shapes.items() if name not in tensors}
    _check(source, expected, {name: shard.shape for name, shard in shards.items()})
    return {
        name: tensors.get(name) or _tensor(f"{source}: tensor {own}", name, shards[own], permuted=False)
        for name, own in names.items()
    }


def _hf_tokenizer(folder: Folder, documents: Mapping[str, Any], config: ModelConfig) -> TokenizerSource:
    source = "tokenizer.json"
    text = folder.text(source)
    if text is None:
        raise ModelFileError(f"{folder.path}: {source} is missing: an incomplete download, or a slow tokenizer alone")
    added = parse_object(text, source).get("added_tokens", [])
    try:
        specials = {str(token["content"]): token["id"] for token in added if token["special"]}
    except (TypeError, KeyError):
        raise ModelFileError(
            f"{source}: added_tokens is no list of tokens with id, content and special {AGAIN}"
        ) from None
    plain, generation, names = (
        documents[f"{name}.json"] for name in ("config", "generation_config", "tokenizer_config")
    )
    if names.get("add_bos_token"):
        raise UnsupportedModel("tokenizer_config.json: add_bos_token is true; only false is supported")
    eos = names.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    ends: list[Any] = []
    for value in (plain.get("eos_token_id"), generation.get("eos_token_id")):
        ends += value if isinstance(value, list) else [value]
    ends.append(specials.get(eos) if isinstance(eos, str) else None)
    bos = plain.get("bos_token_id", generation.get("bos_token_id"))
    bos, eos_ids = _special_ids(source, config, specials, bos, ends)
    return TokenizerSource(json=text, bos_id=bos, eos_ids=eos_ids, specials=specials)


def _hf_template(tokenizer_config: Mapping[str, Any]) -> str | None:
    """chat_template: a string, or a list of named ones of which "default" counts."""
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ModelFileError(f"tokenizer_config.json: chat_template is no string {AGAIN}")
    return template


def _licence(folder: Folder) -> str:
    """`license:` of the model card's front matter, if the card is there."""
    try:
        card = folder.text("README.md") or ""
    except ModelFileError:  # nothing runs differently for a bad card
        return ""
    found = re.search(r"^license: *([\w.+-]+) *$", card[:10_000], re.MULTILINE)
    return found[1] if found else ""


# --- packed model ----------------------------------------------------------------------------------------------------


def _open_packed(
    model: PackedModel, path: Path | None = None, original: Callable[[str], Tensor] | None = None
) -> Checkpoint:
    """path, original: of the checkpoint that it was made from, where its tensors can be read from that."""
    try:
        facts, path = model.facts, path or model.file.path
        source = path.name
        config = ModelConfig.from_facts(facts["config"], source=source)
        shapes = {name: tuple(shape) for name, (_, *shape) in facts["tensors"].items()}
        _check(source, expected_shapes(config), shapes)

        def read(name: str) -> np.ndarray:
            if original is None:
                refused = f"{source} holds panels for the kernels alone: use the checkpoint it was made from"
                raise UnsupportedModel(refused)
            return original(name).raw

        def release(name: str) -> None:
            if original is not None:  # other processes may be using a bundle's
                original(name).release()

        tensors = {}
        for name, (format, *shape) in facts["tensors"].items():
            nbytes = FORMATS[format].row_bytes(shape[-1]) * math.prod(shape[:-1])
            permuted = facts.get("permuted", False) and name.endswith(ROTARY)
            does = partial(read, name), partial(release, name)
            tensors[name] = Tensor(name, format, shapes[name], nbytes, permuted, *does)
        tables = {name: model.array(name) for name in facts["arrays"] if name != "weights"}
        special = facts["tokenizer"]
        tokenizer = TokenizerSource(
            tables=tables, bos_id=special["bos_id"], eos_ids=tuple(special["eos_ids"]), specials=special["specials"]
        )
        total = sum(tensor.nbytes for tensor in tensors.values())
        files, packed = ([model.file], model) if original is None else ([], None)
        return Checkpoint(path, config, tensors, tokenizer, facts["template"], facts["metadata"], total, files, packed)
    except BaseException:
        model.file.close()
        raise


# --- both ------------------------------------------------------------------------------------------------------------


def _check(source: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor is there with its shape, and no other: a tensor we would ignore is a model we do not run."""
    for name in found.keys() - expected.keys():
        if name.endswith(".bias"):
            raise UnsupportedModel(f"{source}: tensor {name}: biases are not supported")
        if name.startswith("rope_"):
            raise UnsupportedModel(f"{source}: tensor {name}: RoPE scaling is not supported")
        raise UnsupportedModel(f"{source}: tensor {name}: a plain Llama has no such tensor")
    for name, shape in expected.items():
        if name not in found:
            raise ModelFileError(f"{source}: tensor {name} is missing {AGAIN}")
        if found[name] != shape:
            raise ModelFileError(f"{source}: tensor {name}: shape {shape} expected, {found[name]} found {AGAIN}")


def _tensor(label: str, name: str, shard: Shard, *, permuted: bool) -> Tensor:
    raw = shard.file.view(shard.offset, shard.nbytes)
    if len(shard.shape) == 1 and not np.isfinite(dequantize_ref(FORMATS[shard.dtype], raw)).all():
        raise ModelFileError(f"{label}: NaN or infinity in it: a damaged file, or a failed training")
    file, offset, nbytes = shard.file, shard.offset, shard.nbytes
    return Tensor(name, shard.dtype, shard.shape, nbytes, permuted, lambda: raw, lambda: file.release(offset, nbytes))


def _special_ids(
    source: str, config: ModelConfig, specials: Mapping[str, int], bos: Any, ends: Iterable[Any]
) -> tuple[int | None, tuple[int, ...]]:
    """(bos, stop set): checked, each once, in the order given, then <|endoftext|>."""
    stop = [end for end in (*ends, specials.get(END_OF_TEXT)) if end is not None]
    for number in [*stop, *specials.values(), *([] if bos is None else [bos])]:
        if type(number) is not int or not 0 <= number < config.vocab_size:
            raise ModelFileError(
                f"{source}: token id {number!r}, a number below {config.vocab_size:,} expected {AGAIN}"
            )
    return bos, tuple(dict.fromkeys(stop))


def _equal(one: Shard, other: Shard) -> bool:
    """The same bytes, compared in steps so that neither tensor is ever resident as a whole."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for start in range(0, one.nbytes, STEP):
        size = min(STEP, one.nbytes - start)
        views = [shard.file.view(shard.offset + start, size) for shard in (one, other)]
        if not np.array_equal(views[0], views[1]):
            return False
        for shard in (one, other):
            shard.file.release(shard.offset + start, size)
    return True
