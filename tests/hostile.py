"""Model files that lie, built by code: a tiny sound one, bent in one place each.

GGUF and FOLDER name the cases and what the error must tell; write_gguf_case and bend_folder make the files. GGUF
headers are put together here byte by byte, not by our writer, which refuses to write most of this.
"""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny import Tiny, safetensors_bytes


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return u64(len(data)) + data


def kv(key: str | bytes, code: int, value: bytes) -> bytes:
    return string(key) + u32(code) + value


def tensor(name: str, dims: list[int], code: int, offset: int) -> bytes:
    return string(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(code) + u64(offset)


def container(
    kvs: list[bytes] = [],  # noqa: B006
    tensors: list[bytes] = [],  # noqa: B006
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: bytes = u32(3),
    n_kv: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF file from its parts; the counts may lie."""
    counts = u64(len(tensors) if n_tensors is None else n_tensors) + u64(len(kvs) if n_kv is None else n_kv)
    head = magic + version + counts + b"".join(kvs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def nested(depth: int) -> bytes:
    """An array in an array in an array ..."""
    return (u32(9) + u64(1)) * depth + u32(0) + u64(1) + b"\x05"


F32, Q4_0 = 0, 2
FOUR = bytes(16)  # four float32 zeros
HUGE = 2**64 - 1

# id -> (bytes, what the message must tell)
GGUF: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "only_magic": (b"GGUF", "24 bytes"),
    "wrong_magic": (container(magic=b"GGML"), "not a GGUF file"),
    "html": (b"<!DOCTYPE html><html>404</html>" * 4, "not a GGUF file"),
    "version_0": (container(version=u32(0)), "GGUF version 0"),
    "version_1": (container(version=u32(1)), "GGUF version 1"),
    "version_4": (container(version=u32(4)), "GGUF version 4"),
    "big_endian": (container(version=struct.pack(">I", 3)), "big-endian"),
    "huge_kv_count": (container(n_kv=HUGE), "metadata entries"),
    "kv_count_off_by_one": (container([kv("a", 4, u32(1))], n_kv=2), "metadata entry 1: key of 0"),
    "huge_tensor_count": (container(n_tensors=HUGE), "tensors"),
    "tensor_count_2_63": (container(n_tensors=2**63), "tensors"),
    "tensor_count_off_by_one": (container(tensors=[tensor("a", [4], F32, 0)], data=FOUR * 9, n_tensors=2), "tensor 1"),
    "huge_key": (container([u64(HUGE) + bytes(40)]), "key of"),
    "empty_key": (container([kv("", 4, u32(1)), bytes(40)], n_kv=1), "key of 0 bytes"),
    "key_past_end": (container([u64(60_000) + bytes(40)]), "60,000 bytes expected"),
    "key_not_utf8": (container([kv(b"\xff\xfe", 4, u32(1))]), "not UTF-8"),
    "duplicate_key": (container([kv("twin", 4, u32(1))] * 2), "metadata twin: the key occurs twice"),
    "type_13": (container([kv("k", 13, bytes(32))]), "unknown value type 13"),
    "type_huge": (container([kv("k", 2**32 - 1, bytes(32))]), "unknown value type 4294967295"),
    "bool_2": (container([kv("k", 7, b"\x02")]), "bool of value 2"),
    "bools_7": (container([kv("k", 9, u32(7) + u64(2) + b"\x01\x07")]), "bool of value 7"),
    "huge_string": (container([kv("k", 8, u64(HUGE) + bytes(32))]), "metadata k: string"),
    "string_2_63": (container([kv("k", 8, u64(2**63) + bytes(32))]), "metadata k: string"),
    "string_not_utf8": (container([kv("k", 8, string(b"\xc3\x28"))]), "not UTF-8"),
    "surrogate": (container([kv("k", 8, string(b"\xed\xa0\x80"))]), "not UTF-8"),
    "huge_array": (container([kv("k", 9, u32(0) + u64(HUGE) + bytes(32))]), "elements"),
    "array_overflow": (container([kv("k", 9, u32(10) + u64(2**61) + bytes(32))]), "elements"),
    "array_too_long": (container([kv("k", 9, u32(0) + u64(2**22 + 1) + bytes(2**22 + 1))]), "at most 4,194,304"),
    "array_past_end": (container([kv("k", 9, u32(12) + u64(1000) + bytes(32))]), "8,000 bytes expected"),
    "strings_past_end": (container([kv("k", 9, u32(8) + u64(3) + string("a") * 2 + u64(9**9))]), "element 2 of 3"),
    "strings_huge": (container([kv("k", 9, u32(8) + u64(2) + string("a") + u64(HUGE) + bytes(9))]), "element 1 of 2"),
    "strings_cut": (container([kv("k", 9, u32(8) + u64(2) + string("a" * 16) + b"a")], alignment=1), "element 1 of 2"),
    "strings_not_utf8": (container([kv("k", 9, u32(8) + u64(2) + string("a") + string(b"\xff"))]), "element 1 is not"),
    "array_type_13": (container([kv("k", 9, u32(13) + u64(1) + bytes(32))]), "unknown element type 13"),
    "nested_deep": (container([kv("k", 9, nested(5000))]), "nested deeper"),
    "nested_wide": (container([kv("k", 9, u32(9) + u64(2**40) + bytes(99))]), "elements"),
    "alignment_0": (container([kv("general.alignment", 4, u32(0))]), "power of two"),
    "alignment_1": (container([kv("general.alignment", 4, u32(1))]), "power of two"),
    "alignment_33": (container([kv("general.alignment", 4, u32(33))]), "power of two"),
    "alignment_2_31": (container([kv("general.alignment", 4, u32(2**31))]), "power of two"),
    "alignment_text": (container([kv("general.alignment", 8, string("32"))]), "power of two"),
    "alignment_bool": (container([kv("general.alignment", 7, b"\x01")]), "power of two"),
    "name_empty": (container(tensors=[tensor("", [4], F32, 0), bytes(9)], data=FOUR, n_tensors=1), "name of 0 bytes"),
    "name_long": (container(tensors=[tensor("n" * 65, [4], F32, 0)], data=FOUR), "name of 65 bytes"),
    "name_twice": (container(tensors=[tensor("n", [4], F32, 0)] * 2, data=FOUR * 9), "tensor n: the name occurs"),
    "dims_0": (container(tensors=[tensor("n", [], F32, 0) + bytes(9)], data=FOUR), "0 dimensions"),
    "dims_5": (container(tensors=[tensor("n", [1] * 5, F32, 0)], data=FOUR), "5 dimensions"),
    "dims_huge": (container(tensors=[string("n") + u32(2**32 - 1) + bytes(64)]), "4,294,967,295 dimensions"),
    "dim_zero": (container(tensors=[tensor("n", [4, 0], F32, 0)], data=FOUR), "at least 1"),
    "dims_overflow": (container(tensors=[tensor("n", [2**32, 2**32], F32, 0)], data=FOUR), "2**63"),
    "dims_wrap": (container(tensors=[tensor("n", [2**62, 4], F32, 0)], data=FOUR), "2**63"),
    "nbytes_wrap": (container(tensors=[tensor("n", [2**61, 2], F32, 0)], data=FOUR), "bytes expected"),
    "type_unknown": (container(tensors=[tensor("n", [4], 9999, 0)], data=FOUR), "9999"),
    "type_removed": (container(tensors=[tensor("n", [32], 4, 0)], data=FOUR), "tensor n: ggml type 4"),
    "half_block": (container(tensors=[tensor("n", [31], Q4_0, 0)], data=FOUR * 9), "multiple of 32"),
    "offset_unaligned": (container(tensors=[tensor("n", [4], F32, 4)], data=FOUR * 9), "multiple of the alignment"),
    "offset_huge": (container(tensors=[tensor("n", [4], F32, 2**64 - 32)], data=FOUR), "file ends at"),
    "data_short": (container(tensors=[tensor("n", [4], F32, 0)], data=FOUR[:15]), "tensor n: 16 bytes expected at"),
    "no_data": (container(tensors=[tensor("n", [4], F32, 0)]), "tensor n: 16 bytes expected at"),
    "overlap": (
        container(tensors=[tensor("a", [16], F32, 0), tensor("b", [4], F32, 32)], data=bytes(64)),
        "tensor b: starts at",
    ),
    "overlap_same": (
        container(tensors=[tensor("a", [4], F32, 0), tensor("b", [4], F32, 0)], data=bytes(64)),
        "inside a",
    ),
}


def write_gguf_case(name: str, folder: Path) -> Path:
    """The file of a GGUF case."""
    path = folder / "hostile.gguf"
    path.write_bytes(GGUF[name][0])
    return path


# --- Hugging Face folders: functions that bend a sound one -----------------------------------------------------------


def _edit(name: str, **changes: Any) -> Callable[[Path], None]:
    """Change keys of a JSON file; `...` removes one."""

    def bend(folder: Path) -> None:
        document = json.loads((folder / name).read_text(encoding="utf-8"))
        document |= changes
        document = {key: value for key, value in document.items() if value is not ...}
        (folder / name).write_text(json.dumps(document), encoding="utf-8")

    return bend


def _write(name: str, data: bytes) -> Callable[[Path], None]:
    def bend(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return bend


def _remove(name: str) -> Callable[[Path], None]:
    def bend(folder: Path) -> None:
        (folder / name).unlink()

    return bend


def _header(change: Callable[[dict[str, Any]], None], extra: bytes = b"") -> Callable[[Path], None]:
    """Rewrite the header of model.safetensors."""

    def bend(folder: Path) -> None:
        path = folder / "model.safetensors"
        whole = path.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8:start])
        change(header)
        path.write_bytes(safetensors_bytes(header, whole[start:] + extra))

    return bend


NORM, HEAD = "model.norm.weight", "lm_head.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj"


def _add(name: str, shape: list[int]) -> Callable[[Path], None]:
    """One more float32 tensor of zeros at the end."""
    size = 4
    for length in shape:
        size *= length

    def change(header: dict[str, Any]) -> None:
        end = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}

    return _header(change, bytes(size))


def _rename(old: str, new: str) -> Callable[[Path], None]:
    return _header(lambda header: header.__setitem__(new, header.pop(old)))


def _set(name: str, **changes: Any) -> Callable[[Path], None]:
    return _header(lambda header: header[name].update(changes))


def _index(weight_map: Any) -> Callable[[Path], None]:
    """An index in place of model.safetensors, which is moved to part.safetensors."""

    def bend(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        whole = (folder / "part.safetensors").read_bytes()
        names = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
        full = {name: "part.safetensors" for name in names if name != "__metadata__"}
        document = {"weight_map": weight_map(full) if callable(weight_map) else weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(document), encoding="utf-8")

    return bend


def _link(name: str, target: str) -> Callable[[Path], None]:
    """Replace a file by a symbolic link to a file outside of the folder."""

    def bend(folder: Path) -> None:
        outside = folder.parent / "outside"
        (folder / name).rename(outside)
        os.symlink(target.format(outside=outside), folder / name)

    return bend


def _nan_norm(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(whole[:8], "little")
    offset = start + json.loads(whole[8:start])[NORM]["data_offsets"][0]
    whole[offset : offset + 4] = struct.pack("<f", float("nan"))
    path.write_bytes(whole)


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _fifo(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

# id -> (how to bend a sound folder, error class name, what the message must tell)
FOLDER: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "config_missing": (_remove(CONFIG), "ModelFileError", "config.json is missing"),
    "config_empty": (_write(CONFIG, b""), "ModelFileError", "config.json: not sound JSON"),
    "config_list": (_write(CONFIG, b"[]"), "ModelFileError", "object expected"),
    "config_cut": (_write(CONFIG, b'{"model_type": "lla'), "ModelFileError", "not sound JSON"),
    "config_deep": (_write(CONFIG, DEEP), "ModelFileError", "not sound JSON"),
    "config_not_utf8": (_write(CONFIG, b'{"a": "\xff"}'), "ModelFileError", "not UTF-8"),
    "config_huge": (_write(CONFIG, b" " * (9 << 20)), "ModelFileError", "more than"),
    "config_nan": (_write(CONFIG, b'{"rope_theta": NaN}'), "ModelFileError", "NaN is not JSON"),
    "config_huge_number": (_write(CONFIG, b'{"a": ' + b"9" * 5000 + b"}"), "ModelFileError", "not sound JSON"),
    "config_fifo": (_fifo, "ModelFileError", "not a regular file"),
    "config_link": (_link(CONFIG, "{outside}"), "ModelFileError", "outside of"),
    "layers_huge": (_edit(CONFIG, num_hidden_layers=10**9), "ModelFileError", "num_hidden_layers is 1000000000"),
    "layers_more": (
        _edit(CONFIG, num_hidden_layers=3),
        "ModelFileError",
        "layers.2.input_layernorm.weight is missing",
    ),
    "layers_fewer": (_edit(CONFIG, num_hidden_layers=1), "UnsupportedModel", "no such tensor"),
    "vocab_differs": (_edit(CONFIG, vocab_size=400), "ModelFileError", "shape (400, 192) expected, (333, 192) found"),
    "untied_no_head": (_edit(CONFIG, tie_word_embeddings=False), "ModelFileError", "lm_head.weight is missing"),
    "eos_beyond": (_edit(CONFIG, eos_token_id=333), "ModelFileError", "token id 333"),
    "eos_negative": (_edit("generation_config.json", eos_token_id=[-1]), "ModelFileError", "token id -1"),
    "eos_object": (_edit(CONFIG, eos_token_id={"a": 1}), "ModelFileError", "token id {'a': 1}"),
    "bos_true": (_edit(CONFIG, bos_token_id=True), "ModelFileError", "token id True"),
    "tokenizer_missing": (_remove("tokenizer.json"), "ModelFileError", "tokenizer.json is missing"),
    "tokenizer_added": (_edit("tokenizer.json", added_tokens=[1]), "ModelFileError", "added_tokens"),
    "tokenizer_huge": (_write("tokenizer.json", b" " * ((64 << 20) + 1)), "ModelFileError", "more than"),
    "adds_bos": (_edit("tokenizer_config.json", add_bos_token=True), "UnsupportedModel", "add_bos_token"),
    "template_number": (
        _edit("tokenizer_config.json", chat_template=5),
        "ModelFileError",
        "chat_template is no string",
    ),
    "template_link": (_link("tokenizer_config.json", "../outside"), "ModelFileError", "outside of"),
    "weights_missing": (_remove(WEIGHTS), "ModelFileError", "no model.safetensors"),
    "weights_empty": (_write(WEIGHTS, b""), "ModelFileError", "empty"),
    "weights_cut": (_cut, "ModelFileError", "model.safetensors"),
    "weights_link": (_link(WEIGHTS, "{outside}"), "ModelFileError", "outside of"),
    "header_huge": (_write(WEIGHTS, u64(2**63) + b"{}"), "ModelFileError", "model.safetensors"),
    "header_past_end": (_write(WEIGHTS, u64(100) + b"{}"), "ModelFileError", "model.safetensors"),
    "header_no_json": (_write(WEIGHTS, u64(8) + b"[[[[[[[["), "ModelFileError", "model.safetensors"),
    "tail": (_header(lambda header: None, b"tail"), "ModelFileError", "model.safetensors"),
    "offsets_past_end": (_set(NORM, data_offsets=[0, 10**15]), "ModelFileError", "model.safetensors"),
    "offsets_reversed": (_set(NORM, data_offsets=[8, 0]), "ModelFileError", "model.safetensors"),
    "offsets_overlap": (_set(NORM, data_offsets=[0, 768]), "ModelFileError", "model.safetensors"),
    "shape_overflow": (_set(NORM, shape=[2**63, 4]), "ModelFileError", "model.safetensors"),
    "shape_other": (_set(NORM, shape=[2, 96]), "ModelFileError", "shape (192,) expected, (2, 96) found"),
    "dtype_i32": (_set(NORM, dtype="I32"), "UnsupportedModel", "model.norm.weight is I32"),
    "dtype_unknown": (_set(NORM, dtype="F33"), "ModelFileError", "model.safetensors"),
    "tensor_missing": (
        _rename(NORM, "model.layers.0.rotary_emb.inv_freq"),
        "ModelFileError",
        "model.norm.weight is miss",
    ),
    "tensor_unknown": (_add("model.extra.weight", [4]), "UnsupportedModel", "model.extra.weight"),
    "tensor_bias": (_add(f"{Q_PROJ}.bias", [192]), "UnsupportedModel", "biases"),
    "head_differs": (_add(HEAD, [333, 192]), "ModelFileError", "lm_head differs"),
    "head_smaller": (_add(HEAD, [2, 192]), "ModelFileError", "lm_head differs"),
    "norm_nan": (_nan_norm, "ModelFileError", "model.norm.weight"),
    "index_list": (_index([]), "ModelFileError", "weight_map"),
    "index_numbers": (_index({"a": 1}), "ModelFileError", "weight_map"),
    "index_empty": (_index({}), "ModelFileError", "is missing"),
    "index_absent_file": (_index(lambda full: full | {"x": "gone.safetensors"}), "ModelFileError", "gone.safetensors"),
    "index_absent_tensor": (_index(lambda full: full | {"x": "part.safetensors"}), "ModelFileError", "tensor x"),
    "index_forgets": (_index(lambda full: dict(list(full.items())[1:])), "ModelFileError", "nowhere"),
    "index_parent": (_index({"x": "../outside.safetensors"}), "ModelFileError", "no plain file name"),
    "index_absolute": (_index({"x": "/etc/passwd"}), "ModelFileError", "no plain file name"),
    "index_backslash": (_index({"x": "..\\outside"}), "ModelFileError", "no plain file name"),
    "index_dot": (_index({"x": "."}), "ModelFileError", "no plain file name"),
    "index_parent_itself": (_index({"x": ".."}), "ModelFileError", "no plain file name"),
    "index_nul": (_index({"x": "a\0b"}), "ModelFileError", "no plain file name"),
    "index_long_name": (_index({"x": "n" * 5000}), "ModelFileError", "no plain file name"),
    "index_surrogate": (_index({"x": "\ud800"}), "ModelFileError", "no plain file name"),
    "index_config": (_index({"x": "config.json"}), "ModelFileError", "config.json"),
}


def bend_folder(name: str, tiny: Tiny) -> Path:
    """Bend the folder of a tiny checkpoint that the test owns."""
    FOLDER[name][0](tiny.folder)
    return tiny.folder
