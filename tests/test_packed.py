"""Models kept on disk: the same as read anew, never a stale or damaged file, never more than allowed."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smolrun
from smolrun.errors import ModelFileError, OptionError
from smolrun.files import packed as container
from smolrun.files.checkpoint import START, Checkpoint, identity, open_checkpoint
from smolrun.kernels import load as kernels
from smolrun.model import memory, packed, weights
from smolrun.model.llama import Llama
from smolrun.model.packed import open_model
from smolrun.text.bpe import TableBpe
from smolrun.text.tokenizer import LibraryBpe, Tokenizer
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


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc/self/smaps")
def test_a_copy_is_not_made_beside_resident_pages_of_the_map(
    tiny: Tiny, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of which less than half lies on huge pages is copied; looking at it has made those resident."""
    logits(tiny.gguf)
    (path,) = packs(folder)
    resident: list[int] = []

    def look(arena: memory.Arena) -> bool:
        resident.append(kilobytes())  # of the head and the tables
        assert arena.whole.sum() and kilobytes() > resident[0]
        return False

    def kilobytes() -> int:
        after = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").split(str(path))[1:]
        return sum(int(text.split("Rss:")[1].split()[0]) for text in after)

    def read(*args: Any) -> None:
        resident.append(kilobytes())
        copy(*args)

    copy = packed._read
    monkeypatch.setattr(packed, "_has_huge_pages", look)
    monkeypatch.setattr(packed, "_read", read)
    logits(tiny.gguf)
    before, beside_the_copy = resident
    assert beside_the_copy <= before


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


def test_a_source_whose_times_say_nothing(tmp_path: Path) -> None:
    """Then its first bytes and a sample of the others tell."""

    def seen() -> str:
        ((_, _, _, _, digest),) = identity(path)
        return str(digest)

    path, data = tmp_path / "model.gguf", bytearray(3 * START)
    path.write_bytes(data)
    found = {seen()}
    for at in (0, START - 1, len(data) * 63 // 64):
        data[at] ^= 1
        path.write_bytes(data)
        found.add(seen())
    assert len(found) == 4
    assert identity(tmp_path / "gone") == identity(tmp_path / "gone" / "there") == []
    os.mkfifo(tmp_path / "pipe")
    assert identity(tmp_path / "pipe") == []


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


# ---- the rest of a checkpoint


@pytest.fixture
def openings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every vocabulary that is parsed and built."""
    made: list[str] = []
    build = LibraryBpe.__init__

    def counted(*args: Any, **facts: Any) -> None:
        made.append("built")
        build(*args, **facts)

    monkeypatch.setattr(LibraryBpe, "__init__", counted)
    return made


def same(kept: Checkpoint, anew: Checkpoint) -> None:
    """In all that a load asks for; the tokenizer is tables here, the library there."""
    assert (kept.path, kept.config, kept.chat_template) == (anew.path, anew.config, anew.chat_template)
    assert kept.tensors == anew.tensors and kept.bytes_total == anew.bytes_total and kept.identity == anew.identity
    assert all(np.array_equal(t.raw, anew.tensors[name].raw) for name, t in kept.tensors.items())
    one, other = (Tokenizer.from_source(c.tokenizer, vocab_size=c.config.vocab_size) for c in (kept, anew))
    assert isinstance(one._bpe, TableBpe) and isinstance(other._bpe, LibraryBpe)
    assert (one.specials, one.bos_id, one.eos_ids) == (other.specials, other.bos_id, other.eos_ids)
    assert one.vocab_size == other.vocab_size
    assert all(one.token_bytes(i) == other.token_bytes(i) for i in range(one.vocab_size))
    for text in ("the cat 12 sat <|im_end|> on 300 mats\n\n", "\t\x00é 中文 ㉐㉐ 🙂 'll", ""):
        assert one.encode(text) == other.encode(text) and one.encode_with_ends(text) == other.encode_with_ends(text)
        decoders = [t.stream_decoder() for t in (one, other)]
        assert len({"".join([*map(d.push, one.encode(text)), d.flush()]) for d in decoders}) == 1


@pytest.mark.parametrize("container", ["gguf", "folder"])
def test_the_second_load_parses_nothing(container: str, tmp_path: Path, folder: Path, openings: list[str]) -> None:
    """It gives the same answer, and the files that it did not open can still be read."""
    source = make_tiny(tmp_path, fmt="F16", embd_fmt="F16")
    path = getattr(source, container)
    answers = []
    for expected in (1, 0, 0):  # the tables of the first are made by another one
        openings.clear()
        with smolrun.load(path, context=64, threads=1) as llm:
            answers.append(llm.generate("the cat", max_tokens=8, sampling=smolrun.Sampling(seed=1)).ids)
            assert isinstance(llm.tokenizer._bpe, LibraryBpe if expected else TableBpe)
        assert len(openings) == 2 * expected
    assert answers[0] == answers[1] == answers[2] and len(packs(folder)) == 1
    with open_model(path) as kept, open_checkpoint(path) as anew:
        assert kept._files == [] and kept.tensors == anew.tensors and kept._files == []
        same(kept, anew)


def test_sessions_of_the_first_load_are_read_by_the_second(tiny: Tiny, tmp_path: Path, folder: Path) -> None:
    for step in ("save", "load"):
        with smolrun.load(tiny.gguf, context=64, threads=1) as llm:
            if step == "save":
                llm.save_session(tmp_path / "session", "the cat sat on the mat")
            else:
                assert isinstance(llm.tokenizer._bpe, TableBpe)
                assert llm.load_session(tmp_path / "session") is not None


def test_blocks_are_of_the_files_that_were_loaded(tiny: Tiny, folder: Path) -> None:
    logits(tiny.gguf)
    with open_model(tiny.gguf) as kept:
        os.utime(tiny.gguf, ns=(1, 1))
        with pytest.raises(ModelFileError, match="was written to since it was loaded"):
            _ = kept.tensors["output_norm.weight"].raw


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_folder_that_changed_is_read_again(name: str, tmp_path: Path, folder: Path, openings: list[str]) -> None:
    """Any of its files, one that was not there as well."""
    source = make_tiny(tmp_path, fmt="F16", embd_fmt="F16").folder
    logits(source)
    with open_model(source) as kept:
        assert kept.tokenizer.tables is not None
    path = source / name
    path.write_text((path.read_text() if path.exists() else "{{ messages }}") + "\n")
    openings.clear()
    with open_model(source) as anew:
        assert anew.tokenizer.tables is None
        assert anew.chat_template == (path.read_text() if path.suffix == ".jinja" else kept.chat_template)
    logits(source)
    assert len(openings) == 1 and len(packs(folder)) == 1  # its tables are made again
    with open_model(source) as kept, open_checkpoint(source) as anew:
        same(kept, anew)


def test_damaged_tables_are_made_again(tiny: Tiny, folder: Path, packings: list[str]) -> None:
    truth = logits(tiny.gguf)
    (path,) = packs(folder)
    sound = bytearray(path.read_bytes())
    at = container.PackedModel(path).facts["arrays"]["ends"][0]
    path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
    with open_model(tiny.gguf) as anew:
        assert anew.tokenizer.tables is None
    assert np.array_equal(logits(tiny.gguf), truth) and len(packings) == 2 and path.read_bytes() == sound


def test_damaged_weights_are_packed_again_beside_sound_tables(tiny: Tiny, folder: Path, packings: list[str]) -> None:
    """The files that a kept model did not open are opened for that."""
    logits(tiny.gguf)
    (path,) = packs(folder)
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with open_model(tiny.gguf) as kept, Llama(kept, context=64, threads=1):
        assert kept.tokenizer.tables is not None
    assert len(packings) == 2 and path.read_bytes() == sound


BENT: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda facts: [facts],
    "no arrays": lambda facts: facts | {"arrays": []},
    "no sums": lambda facts: {k: v for k, v in facts.items() if k != "sums"},
    "no heads": lambda facts: facts | {"config": facts["config"] | {"n_kv_heads": 0}},
    "text for a number": lambda facts: facts | {"config": facts["config"] | {"dim": "64"}},
    "another config": lambda facts: facts | {"config": {"a": 1}},
    "shapes of text": lambda facts: facts | {"tensors": {k: ["F32", "a", "b"] for k in facts["tensors"]}},
    "another format": lambda facts: facts | {"tensors": {k: ["Q9", *v[1:]] for k, v in facts["tensors"].items()}},
    "no specials": lambda facts: facts | {"tokenizer": {"bos_id": 1}},
    "tables outside": lambda facts: facts | {"arrays": facts["arrays"] | {"ends": [1 << 80, 4]}},
    "tables that do not fit": lambda facts: facts | {"arrays": facts["arrays"] | {"ends": facts["arrays"]["pairs"]}},
    "deep": lambda facts: "[" * 100_000,
}


@pytest.mark.parametrize("how", BENT)
def test_a_bent_head_is_no_head(how: str, tiny: Tiny, folder: Path) -> None:
    """Its hash is right: somebody wrote it so."""
    truth = logits(tiny.gguf)
    (path,) = packs(folder)
    content = path.read_bytes()
    facts = BENT[how](container.read_facts(content) or {})
    text = (facts if isinstance(facts, str) else json.dumps(facts)).encode()
    start = container.MAGIC + container.LENGTH.pack(len(text)) + text + container.hashlib.sha256(text).digest()
    path.write_bytes(start.ljust(container.HEAD, b"\0") + content[container.HEAD :])
    with open_model(tiny.gguf) as anew:
        assert anew.tokenizer.tables is None
    assert np.array_equal(logits(tiny.gguf), truth)


def test_a_tokenizer_without_tables_is_built_at_each_load(tmp_path: Path, folder: Path, packings: list[str]) -> None:
    source = make_tiny(tmp_path, fmt="F16", embd_fmt="F16").folder
    path = source / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["ignore_merges"] = True
    path.write_text(json.dumps(data))
    for _ in range(2):
        with smolrun.load(source, context=64, threads=1) as llm:
            assert isinstance(llm.tokenizer._bpe, LibraryBpe)
    assert len(packings) == 1  # the weights are kept


def test_a_head_of_megabytes_is_not_kept(tmp_path: Path, folder: Path, packings: list[str]) -> None:
    source = make_tiny(tmp_path, fmt="F16", embd_fmt="F16").folder
    (source / "chat_template.jinja").write_text("a" * container.HEAD)
    first = logits(source)
    assert np.array_equal(logits(source), first) and len(packings) == 2 and packs(folder) == []
