"""LoRA adapters at work: the bits of training, exact on quantised weights, swapped without a trace; folders of peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import smolrun
from smolrun.errors import ModelFileError, ModelNotFound, OptionError, SessionError, SmolrunError, UnsupportedModel
from smolrun.files.checkpoint import open_checkpoint
from smolrun.files.peft import CONFIG, WEIGHTS, Factors, LowRank, read_adapter, write_adapter
from smolrun.kernels.target import runnable
from smolrun.model.llama import Llama
from smolrun.train import Batch, LoRA, Model
from tiny import Tiny, make_tiny

ALL = ("q", "k", "v", "o", "gate", "up", "down")


def an_adapter(tiny: Tiny, targets: tuple[str, ...] = ALL, rank: int = 8, seed: int = 0) -> LowRank:
    """Random factors, large enough to be heard."""
    lora, random = LoRA(rank=rank, alpha=2.0 * rank, targets=targets), np.random.default_rng(seed)
    with open_checkpoint(tiny.folder) as checkpoint:
        model = Model(checkpoint, tokens=8, lora=lora, threads=1)
    for name, (rows, cols) in model.parameters.shapes.items():
        values = random.standard_normal((rows, cols)) / (np.sqrt(cols) if name.endswith("a") else 30)
        if name.endswith("a"):
            values[rank:] = 0
        else:
            values[:, rank:] = 0
        model.parameters.set(name, values)
    model.close()
    return lora.low_rank(model.parameters, "tiny/base")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder")
    write_adapter(path, an_adapter(tiny))
    return path


def hidden(path: Path, adapter: LowRank | None, ids: list[int], cuts: int = 100, **options: object) -> np.ndarray:
    with open_checkpoint(path) as checkpoint:
        llama = Llama(checkpoint, **({"kv": "f32", "precision": "f32", "threads": 1, "context": 256} | options))  # type: ignore[arg-type]
    llama.set_adapter(adapter)
    slot = llama.open(ids)
    out = np.concatenate([llama.hidden(slot, ids[i : i + cuts]) for i in range(0, len(ids), cuts)])
    llama.close()
    return out


# ---- computed beside the weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["F32", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("rank", [8, 40])
def test_inference_has_the_bits_of_training(fmt: str, rank: int, tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path, fmt=fmt)
    adapter, ids = an_adapter(tiny, rank=rank), np.random.default_rng(1).integers(17, 300, 90).tolist()
    lora = LoRA.of(adapter, 2)
    with open_checkpoint(tiny.gguf) as checkpoint:
        model = Model(checkpoint, tokens=96, lora=lora, threads=1)
    lora.read(adapter, model.parameters)
    batch = Batch.of([[*ids, 0]])
    x = model.forward(batch).copy()
    found = hidden(tiny.gguf, adapter, ids)
    norm = tiny.weights["output_norm.weight"]
    expected = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + np.float32(1e-5)) * norm
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    model.use_adapters = False
    plain = model.forward(batch)
    assert np.abs(plain - x).max() > 0.1 * np.abs(x).max()
    model.close()


def test_same_bits_for_cuts_threads_and_tiers(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, ids = an_adapter(tiny), np.random.default_rng(2).integers(17, 300, 230).tolist()
    expected = hidden(tiny.gguf, adapter, ids, precision="fast")
    for cuts in (1, 7, 64):
        assert np.array_equal(hidden(tiny.gguf, adapter, ids, cuts, precision="fast"), expected), cuts
    for threads in (2, 3, 16):  # two and three share the tokens out
        assert np.array_equal(hidden(tiny.gguf, adapter, ids, threads=threads, precision="fast"), expected), threads
    for tier in runnable():
        monkeypatch.setenv("SMOLRUN_TIER", tier.name)
        assert np.array_equal(hidden(tiny.gguf, adapter, ids, precision="fast"), expected), tier.name


def test_swaps_leave_no_trace(tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    """Each adapter, scale and none: the logits of a model that never had another, whatever the cache knew."""
    write_adapter(tmp_path / "other", an_adapter(tiny, ("q", "down"), rank=3, seed=5))
    ids = list(range(20, 90))
    options = {"context": 256, "threads": 1}
    states = [(None, 1.0), (folder, 1.0), (tmp_path / "other", 1.0), (folder, 0.5), (folder, 0.0)]
    fresh = []
    for source, scale in states:
        with smolrun.load(tiny.gguf, adapter=source, adapter_scale=scale, **options) as llm:  # type: ignore[arg-type]
            fresh.append(llm.logits(ids, rows=3))
    assert np.array_equal(fresh[0], fresh[4])
    assert all(not np.array_equal(fresh[i], fresh[j]) for i in range(4) for j in range(i))
    with smolrun.load(tiny.gguf, **options) as llm:  # type: ignore[arg-type]
        for i in (0, 1, 0, 2, 3, 1, 4):
            llm.set_adapter(*states[i])
            assert np.array_equal(llm.logits(ids, rows=3), fresh[i]), i
        llm.set_adapter(folder)
        chunks = llm.stream(ids, max_tokens=6, ignore_eos=True)
        next(chunks)
        llm.set_adapter(None)  # while a stream rests: it goes on with the new one
        list(chunks)
        assert np.array_equal(llm.logits(ids, rows=3), fresh[0])


def test_a_session_belongs_to_its_adapter(tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    with smolrun.load(tiny.gguf, context=256, threads=1, adapter=folder) as llm:
        llm.save_session(tmp_path / "s", "A long prompt")
        llm.set_adapter(folder, 0.5)
        with pytest.raises(SessionError, match="adapter"):
            llm.load_session(tmp_path / "s")
        llm.set_adapter(folder)
        assert llm.load_session(tmp_path / "s").ids == llm.tokenize("A long prompt")
        llm.set_adapter(None)
        with pytest.raises(SessionError):
            llm.load_session(tmp_path / "s")


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_gives_back_what_was_written(tiny: Tiny, folder: Path) -> None:
    written, found = an_adapter(tiny), read_adapter(folder, tiny.config)
    assert (found.rank, found.alpha, found.base) == (8, 16.0, "tiny/base")
    assert found.digest == written.digest and found.targets == written.targets and len(found.targets) == 7
    settings = json.loads((folder / CONFIG).read_text())
    settings["use_rslora"] = True
    (folder / CONFIG).write_text(json.dumps(settings))
    try:
        scales = {f.scale for f in read_adapter(folder, tiny.config).factors.values()}
        assert scales == {16 / np.sqrt(8)}
    finally:
        write_adapter(folder, written)


def settings(**changes: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        found = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps(found | changes))

    return change


def tensors(rename: Callable[[str], str] = str, **changes: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        from safetensors.numpy import load_file, save_file

        found = {rename(name): values for name, values in load_file(path / WEIGHTS).items()}
        for part, values in changes.items():
            for name in [name for name in found if part in name]:
                if values is None:
                    del found[name]
                else:
                    found[name] = values
        save_file(found, path / WEIGHTS)

    return change


def cut(path: Path) -> None:
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[: len(data) // 2])


BAD: dict[str, tuple[Callable[[Path], object], type[SmolrunError], str]] = {
    "no config": (lambda path: (path / CONFIG).unlink(), ModelFileError, "adapter_config.json is missing"),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), ModelFileError, "adapter_model.safetensors is missing"),
    "no JSON": (lambda path: (path / CONFIG).write_text("{"), ModelFileError, "not sound JSON"),
    "cut": (cut, ModelFileError, WEIGHTS),
    "another method": (settings(peft_type="LOHA"), UnsupportedModel, "peft_type is 'LOHA'"),
    "DoRA": (settings(use_dora=True), UnsupportedModel, "use_dora"),
    "PiSSA": (settings(init_lora_weights="pissa"), UnsupportedModel, "init_lora_weights"),
    "patterns": (settings(alpha_pattern={"q_proj": 3}), UnsupportedModel, "alpha_pattern"),
    "rank 0": (settings(r=0), ModelFileError, "r is 0"),
    "rank text": (settings(r="8"), ModelFileError, "a number expected"),
    "huge rank": (settings(r=1 << 40), ModelFileError, "1 to 1024"),
    "another rank": (settings(r=4), ModelFileError, r"\(4, \d+\) expected, \(8, \d+\) found"),
    "alpha": (settings(lora_alpha=None), ModelFileError, "lora_alpha"),
    "another base": (tensors(lora_A=np.zeros((8, 960), np.float32)), ModelFileError, r"an adapter of 'tiny/base'"),
    "embedding": (tensors(lambda n: n.replace("layers.0.self_attn.q_proj", "embed_tokens")), UnsupportedModel, "embed"),
    "more layers": (tensors(lambda n: n.replace("layers.1.", "layers.9.")), UnsupportedModel, "layers 0 to 1"),
    "half": (tensors(**{"layers.1.mlp.up_proj.lora_B": None}), ModelFileError, "lora_A and lora_B"),
    "not a number": (tensors(**{"q_proj.lora_B": np.full((192, 8), np.nan, np.float32)}), ModelFileError, "NaN"),
    "integers": (tensors(**{"q_proj.lora_A": np.zeros((8, 192), np.int8)}), UnsupportedModel, "I8"),
    "empty": (tensors(lora=None), ModelFileError, "no tensors"),
}


@pytest.mark.parametrize("which", BAD)
def test_bad_folders(which: str, tiny: Tiny, tmp_path: Path) -> None:
    write_adapter(tmp_path / "bad", an_adapter(tiny))
    change, kind, message = BAD[which]
    change(tmp_path / "bad")
    with pytest.raises(kind, match=message):
        read_adapter(tmp_path / "bad", tiny.config)


def test_a_scale_alone_is_refused(tiny: Tiny) -> None:
    with pytest.raises(OptionError, match="there is no adapter"):
        smolrun.load(tiny.gguf, adapter_scale=0.5)


def test_a_bad_adapter_changes_nothing(tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    with smolrun.load(tiny.gguf, context=128, threads=1, adapter=folder) as llm:
        before = llm.logits([30, 31, 32])
        for source, scale, kind in ((tmp_path / "none", 1.0, ModelNotFound), (folder, np.inf, OptionError)):
            with pytest.raises(kind):
                llm.set_adapter(source, scale)
        assert np.array_equal(llm.logits([30, 31, 32]), before)
    with pytest.raises(ModelNotFound, match="adapter is a folder"):
        smolrun.load(tiny.gguf, context=128, adapter=tmp_path / "none")


def test_delta() -> None:
    f = Factors(np.array([[1, 2]], np.float32), np.array([[3], [5]], np.float32), 2.0)
    assert f.delta(0.5).tolist() == [[3, 6], [5, 10]]
