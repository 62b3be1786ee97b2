"""Packed weights on disk: the same bits as packed anew, never a stale or damaged file, never more than allowed."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smolrun.errors import OptionError
from smolrun.files.checkpoint import open_checkpoint
from smolrun.kernels import load as kernels
from smolrun.model import packed, weights
from smolrun.model.llama import Llama
from tiny import Tiny, make_tiny

IDS = [1, 53, 230, 41, 17]
Logits = Callable[..., np.ndarray]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for packed weights; kernels stay where all tests have them."""
    monkeypatch.setattr(packed, "user_cache", lambda: tmp_path / "cache")
    monkeypatch.delenv("SMOLRUN_CACHE_SIZE", raising=False)
    return tmp_path / "cache" / "weights"


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return make_tiny(tmp_path, fmt="Q4_0", embd_fmt="Q8_0")


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """One entry for every model that is packed."""
    made: list[str] = []
    fill = weights._fill

    def counted(*args: Any) -> None:
        made.append("packed")
        fill(*args)

    monkeypatch.setattr(weights, "_fill", counted)
    yield made


def logits(path: Path, **options: Any) -> np.ndarray:
    """Of the last of IDS."""
    with open_checkpoint(path) as checkpoint:
        model = Llama(checkpoint, **{"context": 64, "threads": 1} | options)
    try:
        slot = model.open(IDS)
        return model.logits(model.hidden(slot, IDS)[-1:])
    finally:
        model.close()


def packs(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


@pytest.mark.parametrize("way", ["mapped", "copied"])
def test_the_second_load_packs_nothing(
    way: str, tiny: Tiny, folder: Path, packings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And computes the same bits, from a read-only map or from a copy of it."""
    first = logits(tiny.gguf)
    assert len(packings) == 1 and [path.suffix for path in packs(folder)] == [".pack"]
    monkeypatch.setattr(packed, "_has_huge_pages", lambda _: way == "mapped")
    assert np.array_equal(logits(tiny.gguf).view(np.uint32), first.view(np.uint32)) and len(packings) == 1
    with open_checkpoint(tiny.gguf) as checkpoint:
        model = Llama(checkpoint, context=64, threads=1)
        assert all(a.flags.writeable == (way == "copied") for a in model.weights._arena.arrays.values())
        model.close()


@pytest.mark.parametrize("place", ["magic", "sums", "first", "last", "cut", "longer", "empty"])
def test_a_damaged_file_is_packed_again(place: str, tiny: Tiny, folder: Path, packings: list[str]) -> None:
    truth = logits(tiny.gguf)
    (path,) = packs(folder)
    sound = path.read_bytes()
    spots = {"magic": 0, "sums": sound.index(b"sums") + 9, "first": packed.HEAD, "last": len(sound) - 1}
    if place in spots:
        at = spots[place]
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
    else:
        path.write_bytes({"cut": sound[:-64], "longer": sound + bytes(64), "empty": b""}[place])
    assert np.array_equal(logits(tiny.gguf), truth) and len(packings) == 2
    assert packs(folder) == [path] and path.read_bytes() == sound


def test_a_source_that_changed_is_packed_again(tiny: Tiny, folder: Path, packings: list[str]) -> None:
    """The same path, size and time of writing, other weights: the time of the last change tells."""
    first = logits(tiny.gguf)
    before = tiny.gguf.stat()
    data = bytearray(tiny.gguf.read_bytes())
    with open_checkpoint(tiny.gguf) as checkpoint:
        tensor = checkpoint.tensors["blk.0.ffn_down.weight"].raw.tobytes()
    at = bytes(data).index(tensor) + len(tensor) // 2
    data[at : at + 180] = data[at + 180 : at + 360]
    tiny.gguf.write_bytes(data)
    os.utime(tiny.gguf, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not np.array_equal(logits(tiny.gguf), first) and len(packings) == 2


def test_a_source_whose_times_say_nothing(tiny: Tiny, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then its norms and a sample of its matrices tell."""

    def name() -> str:
        with open_checkpoint(tiny.gguf) as checkpoint:
            checkpoint._files[0].identity = ("", 0, 0, 0)
            matrices = {n: t.format for n, t in checkpoint.tensors.items() if len(t.shape) == 2}
            return packed.pack_of(checkpoint, matrices, {}).path.name

    before, data = name(), bytearray(tiny.gguf.read_bytes())
    for tensor in ("blk.0.attn_norm.weight", "token_embd.weight"):
        with open_checkpoint(tiny.gguf) as checkpoint:
            at = bytes(data).index(checkpoint.tensors[tensor].raw.tobytes())
        data[at] ^= 1
        tiny.gguf.write_bytes(data)
        assert name() != before
        before = name()


def test_options_that_change_panels_have_files_of_their_own(tmp_path: Path, folder: Path, packings: list[str]) -> None:
    source = make_tiny(tmp_path, fmt="F32", embd_fmt="F32")
    for quantize in (None, "q8_0", None, "q8_0"):
        logits(source.gguf, quantize=quantize)
    assert len(packings) == 2 and len(packs(folder)) == 2
    logits(source.gguf, precision="exact", kv="f32", threads=2, context=32)
    assert len(packings) == 2


def test_the_least_recently_used_goes_first(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    for i in range(3):
        (tmp_path / str(i)).mkdir()
        models.append(make_tiny(tmp_path / str(i), fmt="Q4_0", embd_fmt="Q8_0").gguf)
    for model in models[:2]:
        logits(model)
    fragment = folder / ".x.pack.0.part"
    fragment.write_bytes(bytes(100))
    for i, entry in enumerate(packed.entries()[:2]):
        os.utime(entry.path, (1e9 + i, 1e9 + i))
    logits(models[0])  # used again
    monkeypatch.setenv("SMOLRUN_CACHE_SIZE", str(2 * packs(folder)[-1].stat().st_size))
    logits(models[2])
    assert [entry.model for entry in packed.entries()] == [str(models[2]), str(models[0])] and not fragment.exists()


def test_no_room(tiny: Tiny, folder: Path, packings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Too small a bound, too full a disk: the model runs, the reason can be told, no fragment stays."""
    truth = logits(tiny.gguf, threads=2)
    for path in packs(folder):
        path.unlink()
    monkeypatch.setenv("SMOLRUN_CACHE_SIZE", "0")
    assert np.array_equal(logits(tiny.gguf), truth) and packs(folder) == []
    monkeypatch.setenv("SMOLRUN_CACHE_SIZE", "a lot")
    with pytest.raises(OptionError, match="a lot"):
        logits(tiny.gguf)
    monkeypatch.setenv("SMOLRUN_CACHE_SIZE", "1.5G")
    assert packed.limit() == 1_500_000_000
    import shutil

    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert np.array_equal(logits(tiny.gguf), truth) and packs(folder) == []


def test_a_folder_that_cannot_be_written(tiny: Tiny, tmp_path: Path, packings: list[str], monkeypatch: Any) -> None:
    """Read-only, or a file in its place: packed at each load."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(packed, "user_cache", lambda: tmp_path / "file")
    first = logits(tiny.gguf)
    assert np.array_equal(logits(tiny.gguf), first) and len(packings) == 2
    assert (tmp_path / "file").read_text() == "" and kernels.user_cache() != tmp_path / "file"
