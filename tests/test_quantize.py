"""`smolrun quantize`: the search finds better blocks than the reference, and both runtimes read the files."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from smolrun import peer
from smolrun.cli import main
from smolrun.errors import ModelFileError, OptionError
from smolrun.files.checkpoint import open_checkpoint
from smolrun.files.gguf import WriteTensor, read_gguf, write_gguf
from smolrun.kernels.formats import FORMATS, dequantize_ref, put_levels, quantize_ref
from smolrun.kernels.rounding import KEEP_EXTREMES, quantize, writable
from smolrun.model.llama import Llama
from smolrun.quantize import KINDS, gets_more, importance, quantize_file
from smolrun.verify import Comparison, logits_in_cuts
from tiny import Tiny, make_tiny

IDS = [1, 20, 30, 45, 60, 99, 120, 250, 17, 300, 5, 77, 200, 201, 202, 33]
# squared error on normal weights, as a part of quantize_ref's; of the K-quants without one, as a part of the variance
ERROR = {
    "Q8_0": 0.9,
    "Q4_0": 0.92,
    "Q5_0": 0.93,
    "Q6_K": 0.97,
    "Q4_1": 0.85,
    "Q5_1": 0.85,
    "Q4_K": 5.6e-3,
    "Q5_K": 1.4e-3,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Widths that K-quants divide, and layers enough for a mixture."""
    return make_tiny(tmp_path_factory.mktemp("tiny"), dim=256, hidden_dim=512, n_layers=3)


def error(name: str, blocks: np.ndarray, x: np.ndarray, w: np.ndarray | float = 1.0) -> float:
    return float((np.square(dequantize_ref(FORMATS[name], blocks) - x) * w).sum() / (np.square(x) * w).sum())


@pytest.mark.parametrize("name", ERROR)
def test_search_beats_the_reference(name: str) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((40, 512)).astype(np.float32)
    w = np.exp(rng.standard_normal(512)).astype(np.float32)
    fmt = FORMATS[name]
    ones = np.ones(512, np.float32)
    plain, weighted = quantize(fmt, x, ones), quantize(fmt, x, w)
    reference = error(name, quantize_ref(fmt, x), x) if fmt.quantize else 1.0
    assert error(name, plain, x) <= ERROR[name] * reference
    assert error(name, weighted, x, w) <= 0.97 * error(name, plain, x, w)
    assert error(name, quantize(fmt, -x, ones), -x) <= ERROR[name] * reference
    assert np.array_equal(plain[7:9], quantize(fmt, x[7:9], ones)), "depends on how the rows are cut"
    assert np.array_equal(plain, quantize(fmt, x, np.full(512, 2.0**-30, np.float32))), "importance has no unit"
    unweighted = quantize_ref(fmt, x) if name in KEEP_EXTREMES else plain
    assert np.array_equal(quantize(fmt, x), unweighted)


@pytest.mark.parametrize("name", writable())
def test_odd_weights(name: str) -> None:
    x = np.zeros((6, 256), np.float32)
    x[1], x[2, 7], x[3], x[4] = 0.25, -3.0, 1e-30, np.linspace(0, 60_000, 256)
    x[5] = -x[4]
    back = dequantize_ref(FORMATS[name], quantize(FORMATS[name], x))
    assert not back[0].any() and abs(back[3]).max() < 1e-6
    assert np.allclose(back, x, atol=5_000, rtol=0) and np.allclose(back[:4], x[:4], atol=0.2)
    if name in ERROR or name == "F16":
        for bad in (np.nan, np.inf, 1e6):
            with pytest.raises(ValueError, match=f"{name}: a weight of magnitude"):
                quantize(FORMATS[name], np.full((1, 256), bad, np.float32))


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_levels_lie_where_they_are_read(name: str) -> None:
    blocks = np.frombuffer(
        np.random.default_rng(3).bytes(50 * FORMATS[name].dtype.itemsize), FORMATS[name].dtype
    ).copy()
    one = blocks.copy()
    for field in ("d", "dmin", "m"):
        if field in (one.dtype.names or ()):
            one[field] = field == "d"
    if name in ("Q4_K", "Q5_K"):
        one["scales"] = [1] * 4 + [0] * 4 + [1] * 4
    if name == "Q6_K":
        one["scales"] = 1
    zero = {"Q4_0": 8, "Q6_K": 32}.get(name, 0)
    q = dequantize_ref(FORMATS[name], one).reshape(50, -1) + zero
    again = one.copy()
    for field in ("qs", "qh", "ql"):
        if field in (one.dtype.names or ()):
            again[field] = 0
    put_levels(again, q.astype(np.int8 if name == "Q8_0" else np.uint8))
    assert np.array_equal(again, one)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_from_both_containers(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    """The same tensors from GGUF and from a folder, near to the weights, of the expected formats."""
    files = []
    for source in (tiny.gguf, tiny.folder):
        written = quantize_file(source, tmp_path / f"{source.name}.{kind}.gguf", kind)
        files.append(read_gguf(written.path))
        assert written.bytes == written.path.stat().st_size
        assert written.parameters == sum(values.size for values in tiny.weights.values())
    a, b = files
    assert a.metadata["general.file_type"] == KINDS[kind].file_type
    assert all(np.array_equal(a.raw(name), b.raw(name)) for name in a.tensors)
    with open_checkpoint(a.path) as checkpoint:
        assert list(checkpoint.tensors) == list(a.tensors)
        for name, tensor in checkpoint.tensors.items():
            values = dequantize_ref(FORMATS[tensor.format], tensor.raw).reshape(tensor.shape)
            if tensor.permuted:
                values = values.reshape(-1, 32, 2, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
            gap = np.sqrt(np.square(values - tiny.weights[name]).mean() / np.square(tiny.weights[name]).mean())
            assert gap <= (0 if kind == "f32" or len(tensor.shape) == 1 else 0.1), name
    if kind == "q4_k_m":
        formats = {name: info.format.name for name, info in a.tensors.items()}
        assert formats["blk.0.attn_q.weight"] == "Q4_K" and formats["token_embd.weight"] == "Q6_K"
        assert [formats[f"blk.{i}.ffn_down.weight"] for i in range(3)] == ["Q4_K", "Q4_K", "Q6_K"]


def test_metadata_is_the_converters(tiny: Tiny, tmp_path: Path) -> None:
    ours = read_gguf(quantize_file(tiny.folder, tmp_path / "a.gguf", "q8_0").path).metadata
    wanted = read_gguf(tiny.gguf).metadata
    wanted["general.license"] = ""  # the tiny folder has no model card
    assert {key: ours.get(key) for key in wanted} == wanted
    kept = read_gguf(quantize_file(tiny.gguf, tmp_path / "b.gguf", "q8_0").path).metadata
    assert kept == read_gguf(tiny.gguf).metadata | {"general.file_type": 7, "general.quantization_version": 2}


def test_the_mixture_is_llama_cpps() -> None:
    """The layers to which llama.cpp itself gave Q6_K in a Q4_K_M of the 135M model."""
    assert [i for i in range(30) if gets_more(i, 30)] == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]


@pytest.mark.parametrize("kind, gqa, tied", [("q4_k_m", True, True), ("q5_k_m", False, False), ("q4_1", True, False)])
@pytest.mark.reference
def test_llama_cpp_opens_it_and_agrees(kind: str, gqa: bool, tied: bool, tmp_path: Path) -> None:
    if not peer.available():
        pytest.skip("llama-cpp-python is not installed (extra `reference`)")
    tiny = make_tiny(tmp_path, dim=256, hidden_dim=512, gqa=gqa, tied=tied)
    path = quantize_file(tiny.folder, tmp_path / "out.gguf", kind).path
    with open_checkpoint(path) as checkpoint, peer.Peer(path, context=64) as theirs:
        model = Llama(checkpoint, context=64, threads=1, precision="exact")
        both = Comparison([("peer", "ours")])
        both.add({"peer": theirs.logits(IDS), "ours": logits_in_cuts(model, IDS, [16])}, IDS)
        model.close()
    assert both.summary("peer", "ours").kl_mean < 1e-3


def test_importance_is_the_models_own(tiny: Tiny) -> None:
    """The last states of the NumPy pass are the engine's, and the first ones follow from the embedding."""
    with open_checkpoint(tiny.gguf) as checkpoint:
        found = importance(checkpoint, IDS)
        model = Llama(checkpoint, context=64, threads=1, kv="f32", precision="f32")
        slot = model.open(IDS)
        states = model.hidden(slot, IDS)
        model.close()
    assert found.keys() == {name for name, values in tiny.weights.items() if values.ndim == 2}
    assert np.allclose(found["token_embd.weight"], np.square(states).mean(axis=0), rtol=1e-3)
    x = tiny.weights["token_embd.weight"][IDS]
    x = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-5) * tiny.weights["blk.0.attn_norm.weight"]
    assert np.allclose(found["blk.0.attn_q.weight"], np.square(x).mean(axis=0), rtol=1e-4)


def test_calibration_and_loss_on_the_command_line(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat and the dog in the rain " * 12)
    out = str(tmp_path / "out.gguf")
    common = ["quantize", str(tiny.gguf), out, "--format", "q4_0", "--threads", "1"]
    assert main([*common, "--kl", str(text), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main([*common, "--kl", str(text), "--json", "--calibrate", str(text)]) == 0
    calibrated = json.loads(capsys.readouterr().out)
    assert plain["bytes"] == calibrated["bytes"] and plain["tensors"]["Q4_0"] == 21
    losses = {found["fidelity"]["target"]["kl_mean"] for found in (plain, calibrated)}
    assert len(losses) == 2 and 0 < min(losses) <= max(losses) < 0.5
    assert main([*common]) == 0
    assert "bits per weight" in capsys.readouterr().out


def test_refusals_leave_nothing(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="q3_k"):
        quantize_file(tiny.gguf, tmp_path / "a.gguf", "q3_k")
    with pytest.raises(OptionError, match="is the source itself"):
        quantize_file(tiny.gguf, tiny.gguf, "q4_0")
    with pytest.raises(OptionError, match="is a file of the source"):
        quantize_file(tiny.folder, tiny.folder / "model.safetensors", "q4_0")
    for threads in (0, -3, 257):
        with pytest.raises(OptionError, match=f"threads={threads}"):
            quantize_file(tiny.gguf, tmp_path / "a.gguf", "q4_0", threads=threads)
    with pytest.raises(FileNotFoundError, match=r"'nowhere/a\.gguf'"):
        quantize_file(tiny.gguf, "nowhere/a.gguf", "q4_0")
    with pytest.raises(OptionError, match="there is no adapter"):
        quantize_file(tiny.gguf, tmp_path / "a.gguf", "q4_0", adapter_scale=0.5)
    os.mkfifo(tmp_path / "pipe")  # as /dev/null, which root could replace
    with pytest.raises(FileExistsError, match="is no file"):
        quantize_file(tiny.gguf, tmp_path / "pipe", "q8_0")
    (tmp_path / "pipe").unlink()
    with pytest.raises(OptionError, match="has 1 tokens"):
        quantize_file(tiny.gguf, tmp_path / "a.gguf", "q4_0", calibrate="a")
    whole = read_gguf(tiny.gguf)
    tensors = [WriteTensor(n, i.format.name, i.shape, whole.raw(n)) for n, i in whole.tensors.items()]
    bad = tensors[2].data.copy()
    bad.view(np.float32)[5] = np.nan
    tensors[2] = WriteTensor(tensors[2].name, tensors[2].format, tensors[2].shape, bad)
    metadata = {key: value for key, value in whole.metadata.items() if value != []}
    write_gguf(tmp_path / "nan.gguf", metadata, tensors)
    with pytest.raises(
        ModelFileError, match=r"nan\.gguf: tensor blk\.0\.attn_q\.weight: Q4_0: a weight of magnitude nan"
    ):
        quantize_file(tmp_path / "nan.gguf", tmp_path / "a.gguf", "q4_0")
    assert [path.name for path in tmp_path.iterdir()] == ["nan.gguf"]
