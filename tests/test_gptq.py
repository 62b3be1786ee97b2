"""GPTQ and AWQ folders against weights computed straight from the layouts' definitions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import naive
from smolrun.errors import ModelFileError, SmolrunError, UnsupportedModel
from smolrun.files.checkpoint import open_checkpoint
from smolrun.files.gptq import packing
from smolrun.kernels.formats import FORMATS, dequantize_ref
from smolrun.model.llama import Llama
from smolrun.quantize import quantize_file
from smolrun.verify import logits_in_cuts
from tiny import Tiny, hf_name, make_tiny

safetensors = pytest.importorskip("safetensors.numpy")
IDS = [1, 20, 30, 45, 60, 99, 120, 250, 17, 300, 5, 77]
LAYER = "model.layers.0.self_attn.q_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"), dim=256, hidden_dim=512)


def words(values: np.ndarray, order: Any = range(8)) -> np.ndarray:
    """(n, 8 m) of 0..15 -> int32 (n, m), number by number: nibble j of a word is number order[j] of its eight."""
    out = np.zeros((len(values), values.shape[1] // 8), np.int64)
    for row in range(out.shape[0]):
        for c in range(out.shape[1]):
            for j, place in enumerate(order):
                out[row, c] |= int(values[row, 8 * c + place]) << (4 * j)
    return out.astype(np.uint32).view(np.int32)


def write(tiny: Tiny, folder: Path, config: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A packed folder of random levels; returns (what is in its safetensors, the weights by GGUF's names)."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for file in tiny.folder.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    document = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(document))
    gptq = config["quant_method"] == "gptq"
    less = int(gptq and config.get("checkpoint_format") != "gptq_v2")
    stored, weights = {}, {}
    for name, value in tiny.weights.items():
        own = hf_name(name)
        if value.ndim == 1 or "embd" in name:
            stored[own], weights[name] = value.astype(np.float16), value.astype(np.float16).astype(np.float32)
            continue
        (rows, cols), stem = value.shape, own.removesuffix(".weight")
        group = cols if config["group_size"] == -1 else config["group_size"]
        q = rng.integers(0, 16, (rows, cols))
        z = (
            np.full((cols // group, rows), 8)
            if config.get("sym")
            else rng.integers(0, 16, (cols // group, rows)) + less
        )
        s = (rng.uniform(0.5, 1, z.shape) / 5 / np.sqrt(cols)).astype(np.float16)
        of = np.arange(cols) // group
        weights[name] = (s[of].astype(np.float32) * (q.T - z[of]).astype(np.float32)).T
        if gptq:
            stored[f"{stem}.qweight"] = np.ascontiguousarray(words(q).T)  # eight inputs in a word
            stored[f"{stem}.qzeros"] = words(z - less)
            stored[f"{stem}.g_idx"] = of.astype(np.int32)
        else:
            order = [0, 2, 4, 6, 1, 3, 5, 7]
            stored[f"{stem}.qweight"] = words(q.T, order)  # eight outputs in a word
            stored[f"{stem}.qzeros"] = words(z, order)
        stored[f"{stem}.scales"] = s
    safetensors.save_file(stored, folder / "model.safetensors")
    return stored, weights


@pytest.mark.parametrize(
    "config",
    [
        GPTQ,
        GPTQ | {"group_size": 128, "sym": True},
        GPTQ | {"group_size": 64, "checkpoint_format": "gptq_v2"},
        GPTQ | {"group_size": -1},
        AWQ,
        AWQ | {"group_size": 128},
    ],
    ids=lambda c: f"{c['quant_method']}{c['group_size']}",
)
def test_every_weight_is_exact(config: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    _, weights = write(tiny, tmp_path / "m", config)
    with open_checkpoint(tmp_path / "m") as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            assert tensor.raw.nbytes == tensor.nbytes
            values = dequantize_ref(FORMATS[tensor.format], tensor.raw).reshape(tensor.shape)
            assert np.array_equal(values, weights[name]), name
        model = Llama(checkpoint, context=64, threads=2, kv="f32", precision="f32")
        ours = logits_in_cuts(model, IDS, [16])
        model.close()
        width = 128 if config["group_size"] == -1 else config["group_size"]
        assert f"G4_{width}" in model.formats
    wanted = naive.forward(tiny.config, weights, IDS)
    assert np.abs(ours - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_quantize_reads_them(tiny: Tiny, tmp_path: Path) -> None:
    _, weights = write(tiny, tmp_path / "m", AWQ)
    with open_checkpoint(quantize_file(tmp_path / "m", tmp_path / "o.gguf", "f32").path) as checkpoint:
        tensor = checkpoint.tensors["blk.1.ffn_down.weight"]
        assert np.array_equal(tensor.raw.view(np.float32).reshape(tensor.shape), weights[tensor.name])


def save(folder: Path, stored: dict[str, np.ndarray]) -> None:
    safetensors.save_file(stored, folder / "model.safetensors")


@pytest.mark.parametrize(
    "part, change, error, words",
    [
        ("scales", None, ModelFileError, "scales is missing"),
        ("qzeros", None, ModelFileError, "qzeros is missing"),
        ("scales", lambda a: a[:-1].copy(), ModelFileError, r"F16 \(8, 256\) expected"),
        ("scales", lambda a: a.astype(np.float32), UnsupportedModel, "only F16"),
        ("scales", lambda a: a * np.float16(np.nan), ModelFileError, "NaN"),
        ("qweight", lambda a: np.ascontiguousarray(a.T), ModelFileError, r"I32 \(32, 256\) expected"),
        ("qweight", lambda a: a.astype(np.float32), ModelFileError, "I32"),
        ("qweight", lambda a: a.astype(np.int64), UnsupportedModel, "I64"),
        ("g_idx", lambda a: a[::-1].copy(), UnsupportedModel, "act-order"),
        ("bias", lambda a: np.zeros(256, np.float16), UnsupportedModel, "biases"),
    ],
)
def test_damaged_layers_are_refused(
    part: str, change: Any, error: type[SmolrunError], words: str, tiny: Tiny, tmp_path: Path
) -> None:
    stored, _ = write(tiny, tmp_path / "m", GPTQ)
    old = stored.pop(f"{LAYER}.{part}", None)
    if change is not None:
        stored[f"{LAYER}.{part}"] = change(old)
    save(tmp_path / "m", stored)
    with pytest.raises(error, match=words) as caught, open_checkpoint(tmp_path / "m") as checkpoint:
        _ = checkpoint.tensors["blk.0.attn_q.weight"].raw
    assert LAYER in str(caught.value)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"bits": 4}, "quantization_config.quant_method is None"),
        (GPTQ | {"bits": 8}, "8 bits"),
        (GPTQ | {"group_size": 48}, "groups of 48"),
        (GPTQ | {"group_size": "all"}, "groups of 'all'"),
        (AWQ | {"version": "gemv"}, "gemv"),
        (GPTQ | {"checkpoint_format": "marlin"}, "marlin"),
        ("gptq", "str"),
    ],
)
def test_other_packings_are_refused_by_name(given: Any, words: str) -> None:
    with pytest.raises(SmolrunError, match=words):
        packing({"quantization_config": given})
    assert packing({}) is None
