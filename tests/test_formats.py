"""Block formats against the `gguf` package and llama.cpp's own library, bit for bit."""

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smolrun.kernels.formats import CHUNK, FORMATS, NO_GGML_TYPE, Format, by_ggml_type, dequantize_ref, quantize_ref

GGUF = [f for f in FORMATS.values() if f.ggml_type != NO_GGML_TYPE]
WRITABLE = [f for f in FORMATS.values() if f.quantize]
COLS = 1024  # divides into every block size


def id_of(fmt: Format) -> str:
    return fmt.name


@pytest.fixture(scope="session")
def ggml() -> ctypes.CDLL:
    """llama.cpp's base library, without loading any of its compute backends."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        pytest.skip("llama-cpp-python is not installed (extra `reference`)")
    folder = Path(spec.origin).parent / "lib"
    paths = [p for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll") for p in folder.glob(name)]
    if not paths:
        pytest.skip(f"no ggml-base library in {folder.name}/ of llama-cpp-python")
    lib = ctypes.CDLL(str(paths[0]))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    i64, ptr = ctypes.c_int64, ctypes.c_void_p
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, ptr, ptr, i64, i64, i64, ptr]
    return lib


def ggml_quantize(lib: ctypes.CDLL, fmt: Format, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    out = np.zeros((len(x), x.shape[1] // fmt.block), fmt.dtype)
    written = lib.ggml_quantize_chunk(fmt.ggml_type, x.ctypes.data, out.ctypes.data, 0, *x.shape, None)
    assert written == out.nbytes
    return out


def weights(rows: int = 256) -> np.ndarray[Any, Any]:
    """Random rows of different spread, and the rows that break a careless quantiser."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((rows, COLS)) * np.exp(rng.uniform(-12, 6, (rows, 1)))
    x[0] = 0.0
    x[1] = -0.0
    x[2] = 0.37  # all equal
    x[3] = 1e-30  # below GROUP_MAX_EPS, scale vanishes in f16
    x[4] = 1e-42 * np.arange(COLS)  # denormal: the reciprocal of the scale is inf
    x[5] = np.arange(COLS) % 255 - 127  # every int8
    x[6] = np.round(x[6] / abs(x[6]).max() * 127 * 2) / 2  # halves: ties of every rounding
    x[7] = np.where(np.arange(COLS) % 2, 1.0, -1.0)  # extreme value of both signs
    x[8, 16:] = 0.0  # one group of 16 alone
    x[9] = 3e6 * rng.standard_normal(COLS)  # d overflows f16
    x[10] = np.arange(COLS) % 32 - 16
    return np.ascontiguousarray(x, np.float32)


def random_blocks(fmt: Format, n: int = 512) -> np.ndarray[Any, Any]:
    """Every bit pattern a file may hold, with finite scales."""
    blocks = np.random.default_rng(11).integers(0, 256, (n, fmt.dtype.itemsize), np.uint8).view(fmt.dtype)[:, 0].copy()
    for field in ("d", "dmin", "m"):
        if field in (fmt.dtype.names or ()):
            blocks[field] = np.random.default_rng(12).standard_normal(n).astype(np.float16)
    if fmt.name in ("F32", "F16", "BF16"):
        exponent = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}[fmt.name]
        bits = blocks.view(np.dtype(f"<u{fmt.dtype.itemsize}"))
        bits[bits & exponent == exponent] = 0  # NaN and inf: the comparison below is on bits
    return blocks


def same_bits(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def test_sizes_are_those_of_gguf() -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra `test`)")
    for fmt in GGUF:
        kind = gguf.GGMLQuantizationType[fmt.name]
        assert fmt.ggml_type == int(kind)
        assert gguf.GGML_QUANT_SIZES[kind] == (fmt.block, fmt.dtype.itemsize)


@pytest.mark.parametrize("fmt", GGUF, ids=id_of)
def test_dequantize_equals_gguf(fmt: Format) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra `test`)")
    blocks = random_blocks(fmt)
    theirs = gguf.quants.dequantize(blocks.view(np.uint8), gguf.GGMLQuantizationType[fmt.name])
    assert same_bits(dequantize_ref(fmt, blocks), np.asarray(theirs, np.float32).reshape(-1))


@pytest.mark.parametrize("fmt", [f for f in GGUF if f.block > 1], ids=id_of)
@pytest.mark.reference
def test_dequantize_equals_llama_cpp(fmt: Format, ggml: ctypes.CDLL) -> None:
    blocks = random_blocks(fmt)
    theirs = np.empty(blocks.size * fmt.block, np.float32)
    row: Callable[..., None] = getattr(ggml, f"dequantize_row_{fmt.name.lower().replace('_k', '_K')}")
    row(ctypes.c_void_p(blocks.ctypes.data), ctypes.c_void_p(theirs.ctypes.data), ctypes.c_int64(theirs.size))
    assert same_bits(dequantize_ref(fmt, blocks), theirs)


@pytest.mark.parametrize("fmt", WRITABLE, ids=id_of)
@pytest.mark.reference
def test_quantize_equals_llama_cpp(fmt: Format, ggml: ctypes.CDLL) -> None:
    x = weights()
    ours, theirs = quantize_ref(fmt, x), ggml_quantize(ggml, fmt, x)
    wrong = [i for i in range(len(x)) if not same_bits(ours[i], theirs[i])]
    assert not wrong, f"rows {wrong[:10]} differ"


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantize_equals_gguf(name: str) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra `test`)")
    x = weights()[[0, 2, *range(11, 256)]]  # gguf warns (overflow, division) on the others
    theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType[name])
    assert same_bits(quantize_ref(FORMATS[name], x).view(np.uint8).reshape(len(x), -1), theirs)


@pytest.mark.parametrize("fmt", WRITABLE, ids=id_of)
def test_any_shape_and_many_chunks(fmt: Format) -> None:
    x = weights(rows=2 * CHUNK // COLS + 12)
    x = np.ascontiguousarray(x[: len(x) // 12 * 12]).reshape(-1, 4, 3, COLS)
    whole = quantize_ref(fmt, x)
    assert whole.shape == (*x.shape[:-1], COLS // fmt.block)
    assert same_bits(whole[-1, -1, -1], quantize_ref(fmt, x[-1, -1, -1]))
    back = dequantize_ref(fmt, whole)
    assert back.shape == x.shape and back.dtype == np.float32
    raw = whole.view(np.uint8).reshape(*x.shape[:-1], -1)
    assert same_bits(dequantize_ref(fmt, raw), back)  # bytes as they lie in the file
    columns_first = np.asfortranarray(x[0, 0])
    assert same_bits(quantize_ref(fmt, columns_first), whole[0, 0])


@pytest.mark.parametrize("fmt", WRITABLE, ids=id_of)
def test_error_budget(fmt: Format) -> None:
    """Relative RMS error on Gaussian rows, 15 % above what each format measures."""
    budget = {"F32": 0.0, "F16": 2.4e-4, "BF16": 1.9e-3, "Q8_0": 6.1e-3, "Q4_0": 0.098, "Q4_1": 0.0895}
    budget |= {"Q5_0": 0.0488, "Q5_1": 0.0434, "Q6_K": 0.0203}
    x = np.random.default_rng(3).standard_normal((64, COLS)).astype(np.float32)
    error = dequantize_ref(fmt, quantize_ref(fmt, x)) - x
    assert float(np.sqrt((error**2).mean() / (x**2).mean())) <= budget[fmt.name]


def test_bf16_keeps_nan_and_inf() -> None:
    x = np.array([[np.nan, np.inf, -np.inf, 0.0, -0.0, 3.4e38]], np.float32)
    x.view(np.uint32)[0, 0] = 0x7F800001  # a NaN whose upper half alone would read as inf
    back = dequantize_ref(FORMATS["BF16"], quantize_ref(FORMATS["BF16"], x))
    assert np.isnan(back[0, 0]) and same_bits(back[0, 1:5], x[0, 1:5]) and back[0, 5] == np.inf


def test_refusals_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="ggml type 99"):
        by_ggml_type(99)
    with pytest.raises(ValueError, match="Q4_0: rows of 577"):
        quantize_ref(FORMATS["Q4_0"], np.zeros((2, 577), np.float32))
    with pytest.raises(ValueError, match=r"Q4_K can be read but not written .*Q4_0"):
        quantize_ref(FORMATS["Q4_K"], np.zeros((2, 256), np.float32))
    assert by_ggml_type(14).name == "Q6_K"
    assert FORMATS["Q6_K"].bits_per_weight == 6.5625 and FORMATS["Q4_0"].row_bytes(576) == 324
