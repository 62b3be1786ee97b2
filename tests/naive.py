"""The truths of the kernels in plain NumPy, and the table of cases that drives their tests and benchmarks/kernels.py.

Everything is float64 from `dequantize_ref` of the file's own blocks: nothing here knows panels, tiles or instructions.
Only the activation records repeat the kernels' float32 arithmetic: their integers are part of the contract.

Letters: x (tokens, k) activations, w (rows, k) weights, y (tokens, rows).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from smolrun.config import ModelConfig
from smolrun.kernels.formats import FORMATS, dequantize_ref, quantize_ref

HEAD_DIM = 64
TERMS = {"f32": 0, "int8": 1, "int8x2": 2}  # activation mode -> int8 terms
FLOATS = ("F32", "F16", "BF16")
QUANTS = (
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "IQ4_NL",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_XS",
    "G4_32",
    "G4_64",
    "G4_128",
)


@dataclass(frozen=True)
class Case:
    """One kernel on one shape."""

    format: str
    mode: str
    rows: int
    k: int
    tokens: int

    @property
    def name(self) -> str:
        """matmul_FORMAT_MODE, the kernel's symbol."""
        return f"matmul_{self.format}_{self.mode}"

    def __str__(self) -> str:
        return f"{self.format}-{self.mode}-{self.rows}x{self.k}-n{self.tokens}"


# 576 x 1536 is down of the 135M model. 56 rows: the last group is half full. 1, 5, 31 tokens: every kind of tile.
SHAPES = ((56, 512, 31), (576, 1536, 1), (1536, 512, 5))
CASES = [
    Case(fmt, mode, rows, k, tokens)
    for fmt in (*FLOATS, *QUANTS)
    for mode in (("f32",) if fmt in FLOATS else ("int8", "int8x2", "f32"))
    for rows, k, tokens in SHAPES
]


@dataclass(frozen=True)
class Budget:
    """How far y may be from the truth, as a part of |x| |w|^T (the sum of the magnitudes of its products).

    arithmetic: against the activations as the kernel sees them (rounded to int8), so only float32 sums are in it.
    total: against the activations as given.
    """

    arithmetic: float
    total: float


# About twice the worst seen over CASES. One int8 term errs by at most 1/254 of its block's largest value, and CASES'
# blocks have outliers; two terms are 256 times finer.
BUDGETS: dict[tuple[str, str], Budget] = {
    **{(fmt, "f32"): Budget(1.2e-6, 1.2e-6) for fmt in (*FLOATS, *QUANTS)},
    **{(fmt, "int8"): Budget(3e-7, 2e-2) for fmt in QUANTS},
    **{(fmt, "int8x2"): Budget(3e-7, 8e-5) for fmt in QUANTS},
}


# ---- weights -------------------------------------------------------------------------------------------------------


MEAN = {"Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}  # of the unsigned integers: minima of this times d make weights centred


def blocks(fmt: str, rows: int, k: int, seed: int = 0, std: float = 1.0) -> np.ndarray:
    """Bytes (rows, row_bytes) of normal weights in a format; random bits of the same spread where nobody quantises."""
    rng = np.random.default_rng(seed)
    format = FORMATS[fmt]
    if format.quantize is None:
        raw = rng.integers(0, 256, (rows, format.row_bytes(k)), np.uint8)
        view = raw.view(format.dtype)

        def set_scales(d: float | np.ndarray) -> None:
            view["d"] = d
            if fmt in MEAN:
                view["dmin"] = d * MEAN[fmt]

        set_scales(1.0)
        set_scales(rng.uniform(0.8, 1.2, view.shape) * std / weights(fmt, raw).std())
        return raw
    values = (rng.standard_normal((rows, k)) * std).astype(np.float32)
    return np.ascontiguousarray(quantize_ref(format, values)).view(np.uint8).reshape(rows, -1)


def weights(fmt: str, raw: np.ndarray) -> np.ndarray:
    """Bytes (rows, row_bytes) -> float32 (rows, k)."""
    return dequantize_ref(FORMATS[fmt], raw)


def magnitudes(fmt: str, raw: np.ndarray) -> np.ndarray:
    """|w|, or |w - minimum| + |minimum| where a kernel sums the two apart: float32 (rows, k)."""
    w = weights(fmt, raw)
    minima = {"m", "dmin", "z"} & set(FORMATS[fmt].dtype.names or ())
    if not minima:
        return np.abs(w)
    without = raw.copy()
    without.view(FORMATS[fmt].dtype)[minima.pop()] = 0
    scaled = weights(fmt, without)
    return np.abs(scaled) + np.abs(w - scaled)


# ---- activations ---------------------------------------------------------------------------------------------------

TINY = np.float32(1e-30)  # a block of 32 whose largest magnitude is not above it counts as zero
_SUMS = ("sum8", "sum16", "sum128", "low32", "high32", "crossed")
LOWEST, HIGHEST = -127, 113  # of one term
# q1, q2 behind it with two terms, by number of terms
RECORD = {
    terms: np.dtype([("q", "i1", (terms, 32)), ("d", "f4"), ("dsum", "f4"), *((name, "i4") for name in _SUMS)])
    for terms in (1, 2)
}


def records(x: np.ndarray, terms: int, crossed: int = 0) -> np.ndarray:
    """float32 (tokens, k) -> RECORD (tokens, k / 32): x = d q, q = 256 q1 + q2 in +-32639, or of one
    term q in -127..113, the largest x at the lower end by the sign of d.

    crossed: pairs of quads that a tier multiplies crosswise.
    """
    blocks = x.astype(np.float32).reshape(len(x), -1, 32)
    top = np.abs(blocks).max(axis=2)
    live = top > TINY
    safe = np.where(live, top, np.float32(1))
    if terms == 2:
        levels = np.float32(127 * 256 + 127)
        d, inverse = safe / levels, levels / safe
    else:
        sign = np.where(blocks.max(axis=2) > -blocks.min(axis=2), np.float32(-1), np.float32(1))
        least = np.minimum(blocks.max(axis=2), -blocks.min(axis=2)).clip(0)
        d = np.maximum(safe * np.float32(1 / -LOWEST), least * np.float32(1 / HIGHEST)) * sign
        inverse = np.float32(1) / d
    d, inverse = (np.where(live, of, np.float32(0)) for of in (d, inverse))
    inverse = inverse[..., None]
    q = np.rint(blocks * inverse).astype(np.int32)
    out = np.zeros(d.shape, RECORD[terms])
    if terms == 2:
        q1 = np.rint(q / 256).astype(np.int32)
        q2 = np.clip(q - 256 * q1, -127, 127)
        q = 256 * q1 + q2
        out["q"] = np.stack([q1, q2], axis=2)
    else:
        out["q"][:, :, 0] = q
    low, high = np.moveaxis(q.reshape(*q.shape[:2], 2, 16).sum(axis=3), 2, 0)
    out["d"], out["dsum"] = d, d * (low + high).astype(np.float32)
    for name, factor in (("sum8", -8), ("sum16", -16), ("sum128", -128)):
        out[name] = (low + high) * factor
    out["low32"], out["high32"] = low * -32, high * -32
    out["crossed"] = -8 * (low + high) - (crossing(q, crossed) if terms == 1 else 0)
    return out


def crossing(q: np.ndarray, pairs: int) -> np.ndarray:
    """What activations q (..., 32) add by themselves where so many pairs of quads are crossed: (..., )."""
    first, second = q[..., : 4 * pairs].astype(np.int32), q[..., 16 : 16 + 4 * pairs].astype(np.int32)
    return ((second - LOWEST) * (first - 1) - LOWEST).sum(axis=-1)


def paired(r: np.ndarray) -> np.ndarray:
    """Records of two terms as tiers with `pairs` lay them out: [32 x i16 q], of four k the even ones first."""
    q = (256 * r["q"][..., 0, :].astype(np.int16) + r["q"][..., 1, :]).reshape(*r.shape, 8, 4)[..., [0, 2, 1, 3]]
    out = r.copy()
    out["q"] = np.ascontiguousarray(q).view(np.int8).reshape(*r.shape, 2, 32)
    return out


def unpaired(r: np.ndarray) -> np.ndarray:
    """The inverse of `paired`."""
    q = np.ascontiguousarray(r["q"]).view(np.int16).reshape(*r.shape, 8, 4)[..., [0, 2, 1, 3]].reshape(*r.shape, 32)
    out, q1 = r.copy(), np.rint(q / 256)
    out["q"] = np.stack([q1, q - 256 * q1], axis=-2)
    return out


def seen(x: np.ndarray, terms: int) -> np.ndarray:
    """Activations as an int8 matmul sees them: float64 (tokens, k)."""
    if terms == 0:
        return x.astype(np.float64)
    r = records(x, terms)
    q = r["q"].astype(np.int32)
    value = q[:, :, 0] if terms == 1 else 256 * q[:, :, 0] + q[:, :, 1]
    return (value * r["d"][:, :, None].astype(np.float64)).reshape(x.shape)


def matmul(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    """y = x w^T in float64."""
    return x.astype(np.float64) @ w.astype(np.float64).T


def relative_error(y: np.ndarray, w: np.ndarray, x: np.ndarray, given: np.ndarray) -> float:
    """Largest |y - x w^T| as a part of |given| |w|^T."""
    scale = matmul(np.abs(w), np.abs(given))
    return float((np.abs(y - matmul(w, x)) / np.maximum(scale, 1e-300)).max())


# ---- the model -----------------------------------------------------------------------------------------------------


def rmsnorm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight.astype(np.float64)


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up."""
    gate = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate)) * up.astype(np.float64)


def angles(positions: np.ndarray, theta: float) -> np.ndarray:
    """Rotary angles (positions, 32); the frequencies are float32, as in transformers."""
    frequencies = (theta ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)).astype(np.float32)
    return positions[:, None].astype(np.float64) * frequencies.astype(np.float64)


def rope(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Half-split rotation of (..., tokens, 64): element i pairs with i + 32."""
    low, high = x[..., : HEAD_DIM // 2].astype(np.float64), x[..., HEAD_DIM // 2 :].astype(np.float64)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal softmax(q k^T / 8) v. q (n_heads, n, 64), k and v (n_kv_heads, n, 64) -> (n_heads, n, 64)."""
    group = len(q) // len(k)
    k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
    scores = q @ k.swapaxes(1, 2) / np.sqrt(HEAD_DIM)
    n = scores.shape[1]
    scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
    p = np.exp(scores - scores.max(axis=2, keepdims=True))
    return p / p.sum(axis=2, keepdims=True) @ v


def stored(x: np.ndarray, kind: str) -> np.ndarray:
    """Keys or values (..., 64) as a KV cache of a kind gives them back: blocks of 32, scales rounded to f16 first.

    "f64": as they are.
    """
    if kind == "f64":
        return x.astype(np.float64)
    x = x.astype(np.float32)
    if kind in ("f32", "f16"):
        return x.astype({"f32": np.float32, "f16": np.float16}[kind]).astype(np.float64)
    if kind == "bf16":
        bits = x.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32).astype(np.float64)
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)
    d = {"q8_0": np.abs(largest) / np.float32(127), "q4_0": largest / np.float32(-8)}[kind].astype(np.float16)
    low, high = {"q8_0": (-127, 127), "q4_0": (-8, 7)}[kind]
    safe = np.where(d == 0, 1, d).astype(np.float64)
    q = np.where(d == 0, 0, np.rint(blocks / safe).clip(low, high))
    return (q * d.astype(np.float64)).reshape(x.shape)


def hadamard(n: int) -> np.ndarray:
    """Sylvester's matrix of a power of two, divided by its square root: orthogonal and symmetric."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(n)


def forward(
    config: ModelConfig, weights: dict[str, np.ndarray], ids: list[int], kv: tuple[str, str] = ("f32", "f32")
) -> np.ndarray:
    """The exact model in float64: logits (len(ids), vocab_size). weights: canonical names, half-split q and k rows; kv:
    what holds keys and values.
    """
    c, n = config, len(ids)
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    angle = angles(np.arange(n), c.rope_theta)

    def heads(x: np.ndarray) -> np.ndarray:
        return x.reshape(n, -1, HEAD_DIM).swapaxes(0, 1)

    x = w["token_embd.weight"][ids]
    for i in range(c.n_layers):
        layer = {name.split(".")[2]: value for name, value in w.items() if name.startswith(f"blk.{i}.")}
        h = rmsnorm(x, layer["attn_norm"], c.norm_eps)
        q, k, v = (heads(matmul(layer[name], h)) for name in ("attn_q", "attn_k", "attn_v"))
        q, k = rope(q, angle), rope(k, angle)
        if kv[0] in ("q8_0", "q4_0"):  # both turned alike; the scores are an int8 matmul of two terms
            q, k = q @ hadamard(HEAD_DIM), k @ hadamard(HEAD_DIM)
            q = seen(q.reshape(-1, HEAD_DIM), 2).reshape(q.shape)
        out = attention(q, stored(k, kv[0]), stored(v, kv[1]))
        x = x + matmul(layer["attn_output"], out.swapaxes(0, 1).reshape(n, -1))
        h = rmsnorm(x, layer["ffn_norm"], c.norm_eps)
        x = x + matmul(layer["ffn_down"], swiglu(matmul(layer["ffn_gate"], h), matmul(layer["ffn_up"], h)))
    head = w.get("output.weight", w["token_embd.weight"])
    return matmul(head, rmsnorm(x, w["output_norm.weight"], c.norm_eps))
