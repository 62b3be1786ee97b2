"""peft and transformers take what we write, and we take what peft writes (`make train-test`)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np

import smolrun
from smolrun.export import merge, write_folder
from smolrun.files.checkpoint import open_checkpoint
from smolrun.files.peft import write_adapter
from test_adapter import an_adapter
from test_torch import TORCH, pytestmark  # noqa: F401
from tiny import make_tiny

HERE = Path(__file__).parent


def test_both_ways(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path)
    adapter, ids = an_adapter(tiny), np.random.default_rng(3).integers(17, 300, 40)
    write_adapter(tmp_path / "ours", adapter)
    with open_checkpoint(tiny.gguf) as checkpoint:
        write_folder(merge(checkpoint, adapter), tmp_path / "merged", "f32")
    texts = ["Hello 123", " the theory  of\nit", "in on é"]
    np.savez(tmp_path / "given.npz", ids=ids, merged=str(tmp_path / "merged"), texts=texts)
    program = [TORCH, str(HERE / "peft_truth.py"), str(tiny.folder), str(tmp_path / "given.npz")]
    subprocess.run([*program, str(tmp_path / "ours"), str(tmp_path)], check=True)
    expected = {name: np.load(tmp_path / f"{name}.npy") for name in ("given", "merged", "made")}
    np.testing.assert_allclose(expected["merged"], expected["given"], atol=1e-4)
    how = {"context": 256, "kv": "f32", "precision": "exact"}
    with smolrun.load(tiny.folder, adapter=tmp_path / "ours", **how) as llm:  # type: ignore[arg-type]
        plain = np.abs(expected["given"]).max()
        np.testing.assert_allclose(llm.logits(ids), expected["given"], atol=1e-4 * plain)
        llm.set_adapter(tmp_path / "made")
        assert np.abs(expected["made"] - expected["given"]).max() > 0.05 * plain
        np.testing.assert_allclose(llm.logits(ids), expected["made"], atol=1e-4 * plain)
        tokens = np.load(tmp_path / "tokens.npz")
        assert [tokens[f"arr_{i}"].tolist() for i in range(len(texts))] == [llm.tokenize(t) for t in texts]
