"""The GGUF container: what is written is read, by us and by the `gguf` package; what lies is refused."""

import os
import random
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import hostile
from smolrun.errors import ModelFileError, ModelNotFound, OptionError, SmolrunError, UnsupportedModel
from smolrun.files.gguf import WriteTensor, read_gguf, write_gguf
from tiny import Tiny, make_tiny

METADATA = {
    "bool": True,
    "small": 7,
    "negative": -7,
    "long": 2**40,
    "longest": 2**64 - 1,
    "long_negative": -(2**40),
    "float": 0.5,
    "text": "naïve ⚙ text\0with a zero",
    "empty": "",
    "texts": ["", "a", "⚙"],
    "numbers": [3, -1],
    "bools": [True, False],
    "floats": [0.25, 1],
    "u8": np.uint8(200),
    "i16s": np.array([-5, 5], np.int16),
    "f64": np.float64(0.1),
    "none": np.array([], np.int32),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"), fmt="Q4_0")


def test_metadata_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, METADATA, [])
    read = read_gguf(path)
    expected = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in METADATA.items()}
    assert read.metadata == expected
    assert [type(read.metadata[key]) for key in expected] == [type(value) for value in expected.values()]
    assert read.version == 3 and read.tensors == {}


def test_the_gguf_package_reads_what_we_write(tmp_path: Path, tiny: Tiny) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    write_gguf(path, METADATA, [])
    theirs = gguf.GGUFReader(str(path))
    for key, value in read_gguf(path).metadata.items():
        if key != "none":
            assert theirs.fields[key].contents() == value, key
    theirs, ours = gguf.GGUFReader(str(tiny.gguf)), read_gguf(tiny.gguf)
    assert len(theirs.tensors) == len(ours.tensors) == 20
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert info.format.name == tensor.tensor_type.name
        assert np.array_equal(ours.raw(tensor.name), tensor.data.reshape(-1).view(np.uint8))


def test_we_read_what_the_gguf_package_writes(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_array("texts", ["a", "⚙"])
    writer.add_uint64("long", 2**63)
    writer.add_custom_alignment(64)
    values = np.arange(96, dtype=np.float32).reshape(3, 32)
    writer.add_tensor("a", values)
    writer.add_tensor("b", values[:1].astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = read_gguf(path)
    assert ours.alignment == 64
    assert ours.metadata["texts"] == ["a", "⚙"] and ours.metadata["long"] == 2**63
    assert np.array_equal(ours.raw("a").view(np.float32).reshape(3, 32), values)
    assert ours.tensors["b"].format.name == "F16" and ours.tensors["b"].shape == (1, 32)


def test_version_2(tmp_path: Path) -> None:
    path = tmp_path / "v2.gguf"
    entry = hostile.kv("k", 9, hostile.nested(2))
    path.write_bytes(hostile.container([entry], [hostile.tensor("t", [4], 0, 0)], bytes(16), version=hostile.u32(2)))
    read = read_gguf(path)
    assert read.version == 2 and read.metadata == {"k": [[[5]]]} and read.tensors["t"].shape == (4,)


def test_views_are_read_only_and_outlive_close(tiny: Tiny) -> None:
    read = read_gguf(tiny.gguf)
    raw = read.raw("output_norm.weight")
    before = raw.copy()
    info = read.tensors["output_norm.weight"]
    read.file.release(info.offset, info.nbytes)
    read.close()
    assert np.array_equal(raw, before)
    with pytest.raises(ValueError, match="read-only"):
        raw[0] = 1


@pytest.mark.parametrize("name", hostile.GGUF)
def test_hostile_file_is_refused(name: str, tmp_path: Path) -> None:
    tracemalloc.start()
    with pytest.raises((ModelFileError, UnsupportedModel)) as error:
        read_gguf(hostile.write_gguf_case(name, tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert hostile.GGUF[name][1] in str(error.value)
    assert str(error.value).startswith("hostile.gguf: ")
    assert peak < 4 << 20, "a small file made the reader allocate"


def test_message_of_a_cut_file(tiny: Tiny, tmp_path: Path) -> None:
    info = read_gguf(tiny.gguf).tensors["blk.1.ffn_down.weight"]
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny.gguf.read_bytes()[: info.offset + 100])
    with pytest.raises(ModelFileError) as error:
        read_gguf(path)
    assert str(error.value) == (
        f"model.gguf: tensor blk.1.ffn_down.weight: {info.nbytes:,} bytes expected at offset {info.offset:,}, "
        f"file ends at {info.offset + 100:,} (download again)"
    )


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    """A small file cut at every byte of header and data: always our error, never another, never a success."""
    path = tmp_path / "t.gguf"
    entries = {"texts": ["a", "bc"], "n": 3, "flags": [True], "s": "text", "f": 0.5}
    write_gguf(path, entries, [WriteTensor("w", "F32", (2, 4), np.ones((2, 4), np.float32))])
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelFileError):
            read_gguf(path)


def test_flipped_bytes_never_escape(tmp_path: Path, tiny: Tiny) -> None:
    """Damage anywhere in the header ends in a sound read or in our error."""
    whole = bytearray(tiny.gguf.read_bytes())
    header = read_gguf(tiny.gguf).tensors["token_embd.weight"].offset
    rng = random.Random(0)
    refused = 0
    for _ in range(400):
        bent = bytearray(whole)
        at = rng.randrange(header)
        bent[at : at + 8] = rng.choice([b"\xff" * 8, bytes(8), rng.randbytes(8), struct.pack("<Q", len(whole))])
        path = tmp_path / "b.gguf"
        path.write_bytes(bent)
        try:
            read_gguf(path).close()
        except SmolrunError:
            refused += 1
    assert refused > 100


def test_absent_and_odd_paths(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"gone\.gguf: no such file"):
        read_gguf(tmp_path / "gone.gguf")
    with pytest.raises(ModelFileError, match="not a regular file"):
        read_gguf(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ModelFileError, match="not a regular file"):
        read_gguf(tmp_path / "fifo")


@pytest.mark.parametrize(
    "metadata, tensors, message",
    [
        ({"k": None}, [], "metadata k"),
        ({"k": [1, "a"]}, [], "metadata k"),
        ({"k": []}, [], "metadata k"),
        ({"k": 2**64}, [], "metadata k"),
        ({"k": np.zeros((2, 2))}, [], "2 dimensions"),
        ({"k": np.complex64(1)}, [], "complex64"),
        ({"k": "\ud800"}, [], "lone surrogates"),
        ({"general.alignment": 33}, [], "general.alignment is 33"),
        ({}, [WriteTensor("t", "Q4_0", (2, 31), np.zeros(1))], "blocks of 32"),
        ({}, [WriteTensor("t" * 65, "F32", (1,), np.zeros(1, np.float32))], "64 bytes"),
        ({}, [WriteTensor("t", "F32", (3,), np.zeros(2, np.float32))], "12 bytes expected, 8"),
        ({}, [WriteTensor("t", "F32", (1,), np.zeros(1, np.float32))] * 2, "twice"),
    ],
)
def test_writer_refuses_and_leaves_nothing(
    metadata: dict, tensors: list[WriteTensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        write_gguf(tmp_path / "m.gguf", metadata, tensors)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, {"k": 1}, [])
    before = path.read_bytes()

    def fail() -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(path, {"k": 2}, [WriteTensor("t", "F32", (1,), fail)])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_data_is_made_when_its_turn_comes(tmp_path: Path) -> None:
    alive: list[str] = []

    def make(name: str) -> np.ndarray:
        alive.append(name)
        return np.full(8, len(alive), np.float32)

    tensors = [WriteTensor(name, "F32", (8,), lambda name=name: make(name)) for name in "ab"]
    write_gguf(tmp_path / "m.gguf", {}, tensors)
    assert alive == ["a", "b"]
    assert read_gguf(tmp_path / "m.gguf").raw("b").view(np.float32).tolist() == [2] * 8
