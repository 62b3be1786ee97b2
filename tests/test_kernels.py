"""Every kernel on every tier of this CPU against NumPy and bit for bit against the other tiers; the rest are read."""

import math
import re
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

import naive
from calling import GUARD, Kernels, emitted, tiers_to_test
from conftest import as_elsewhere, compiled_only
from naive import BUDGETS, CASES, QUANTS, TERMS, Case
from smolrun.kernels.block import SPREAD_BLOCKS, SPREAD_TOKENS
from smolrun.kernels.image import unseal
from smolrun.kernels.load import image_key
from smolrun.kernels.panels import PANELS, pack
from smolrun.kernels.target import TIERS
from smolrun.model import rope

TESTED = tiers_to_test()


@pytest.fixture(scope="session")
def tiers(compiled: None) -> list[Kernels]:
    return [Kernels(name) for name in TESTED]


def same_bits(tiers: list[Kernels], work: Callable[[Kernels], np.ndarray]) -> np.ndarray:
    """The result of all tiers; fails unless all have the same bits."""
    first, *others = [(t.tier.name, work(t)) for t in tiers]
    for name, result in others:
        different = np.flatnonzero(result.view(np.uint8).reshape(-1) != first[1].view(np.uint8).reshape(-1))
        assert not len(different), f"{name} differs from {first[0]} in {len(different)} bytes, first at {different[:4]}"
    as_elsewhere(first[1])
    return first[1]


def bits(x: np.ndarray) -> np.ndarray:
    """float32 as integers, so that -0 is not 0 and NaN is itself."""
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def activations(case: Case) -> np.ndarray:
    """Normal activations with a few outliers, as hidden states have."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((case.tokens, case.k)).astype(np.float32)
    x[:, rng.integers(0, case.k, 4)] *= 30
    return x


# ---- matrices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matmul_is_right_and_alike_on_all_tiers(case: Case, tiers: list[Kernels]) -> None:
    raw, x = naive.blocks(case.format, case.rows, case.k), activations(case)
    y = same_bits(tiers, lambda t: t.matmul(case, raw, x))
    w, budget = naive.weights(case.format, raw), BUDGETS[case.format, case.mode]
    assert naive.relative_error(y, w, naive.seen(x, TERMS[case.mode]), x) <= budget.arithmetic
    assert naive.relative_error(y, w, x, x) <= budget.total


@pytest.mark.parametrize("case", [c for c in CASES if c.tokens > 5], ids=str)
def test_tiles_claims_and_additions_do_not_change_bits(case: Case, tiers: list[Kernels]) -> None:
    """A token's result is the same alone, at any place in a tile, and whichever way row groups are claimed."""
    raw, x = naive.blocks(case.format, case.rows, case.k), activations(case)
    groups = -(-case.rows // 16)
    for tier in tiers:
        y = tier.matmul(case, raw, x)
        for first, end in ((0, 1), (1, 3), (2, 17), (5, 9), (3, 31), (30, 31)):
            part = tier.matmul(case, raw, x[first:end])
            assert np.array_equal(bits(part), bits(y[first:end])), (tier.tier.name, first)
        split = [(g, g + 1) for g in reversed(range(groups))]
        assert np.array_equal(bits(tier.matmul(case, raw, x, groups=split)), bits(y))
        assert np.array_equal(bits(tier.matmul(case, raw, x, groups=[(1, groups), (0, 1)])), bits(y))
        before = np.random.default_rng(2).standard_normal(y.shape).astype(np.float32)
        assert np.array_equal(bits(tier.matmul(case, raw, x, add=before)), bits(y + before))


@pytest.mark.parametrize("mode", ("int8", "int8x2"))
@pytest.mark.parametrize("fmt", QUANTS)
def test_many_tokens_of_long_rows_are_few_of_them(fmt: str, mode: str, tiers: list[Kernels]) -> None:
    """More tokens and blocks than sums and spread weights have room for: several rounds, and the same bits."""
    case = Case(fmt, mode, 40, 1024, SPREAD_TOKENS + 17)
    assert case.k // 32 > SPREAD_BLOCKS
    raw, x = naive.blocks(case.format, case.rows, case.k), activations(case)
    before = np.random.default_rng(2).standard_normal((case.tokens, case.rows)).astype(np.float32)
    y = same_bits(tiers[:1], lambda t: t.matmul(case, raw, x, add=before))
    few = [0, 11, 12, 251, SPREAD_TOKENS - 1, SPREAD_TOKENS, case.tokens - 1]
    alone = same_bits(tiers, lambda t: np.concatenate([t.matmul(case, raw, x[i : i + 1]) for i in few]))
    assert np.array_equal(bits(y[few]), bits(alone + before[few]))


def rounded(exact: Fraction) -> np.float32:
    """The nearest float32, ties to even: an integer number of the unit that float32 has at this size."""
    unit = Fraction(2) ** max(math.frexp(float(exact))[1] - 24, -149)
    return np.float32(round(exact / unit) * unit)


def test_multiply_adds_round_once(tiers: list[Kernels]) -> None:
    """Also where the CPU has none: f64 rounds 1 + 2^-23 + 2^-24 - 2^-54 to a tie, and from there f32 rounds away.

    Of many sizes, down to results that are denormal or 0. Both products at even k, which share a sum.
    """
    case, rng = Case("F32", "f32", 16 * 160, 32, 1), np.random.default_rng(6)
    w, x = np.zeros((case.rows, case.k), np.float32), np.zeros((1, case.k), np.float32)
    size = np.repeat(2.0 ** np.arange(-99, 61), 16) * rng.choice([-1, 1], case.rows)
    w[:, 0] = size * (1 + rng.integers(0, 4, case.rows) * 2.0**-23)
    w[:, 2] = size * 2.0**-24 * rng.choice([1, -1, 1 + 2.0**-15, -1 - 2.0**-15, 0.5, 3.0**-9], case.rows)
    x[0, :3:2] = 2.0**-60, 2.0**-60 * (1 - 2.0**-15)
    y = same_bits(tiers, lambda t: t.matmul(case, w.view(np.uint8), x))[0]
    (first, _, second), rest = ([Fraction(float(v)) for v in x[0, :3]], w[:, :3].tolist())
    truth = [rounded(Fraction(float(rounded(first * Fraction(a)))) + second * Fraction(c)) for a, _, c in rest]
    assert np.array_equal(y, np.array(truth, np.float32))
    assert (y == 0).any() and (np.abs(y[y != 0]) < 2.0**-126).any()
    twice = np.float32([float(first * Fraction(a) + second * Fraction(c)) for a, _, c in rest])  # by way of f64
    assert (twice != y).any(), "nothing here that a second rounding gets wrong"


@pytest.mark.parametrize("exponent", range(-126, -96, 3))
def test_small_products_of_halves_round_once(exponent: int, tiers: list[Kernels]) -> None:
    """Where the CPU has no fma, nothing is done about tiny sums of such products, since f64 has all of their bits."""
    case, rng = Case("F16", "f32", 16 * 64, 32, 1), np.random.default_rng(exponent % 97)
    w, x = np.zeros((case.rows, case.k), np.float16), np.zeros((1, case.k), np.float32)
    w[:, 0:3:2] = rng.integers(-3, 4, (case.rows, 2)) * 2.0**-24 + rng.choice(
        [0, 0, 2.0**-14, -(2.0**-9)], (case.rows, 2)
    )
    x[0, 0:3:2] = 2.0**exponent * (1 + rng.integers(0, 1 << 23, 2) * 2.0**-23)
    y = same_bits(tiers, lambda t: t.matmul(case, w.view(np.uint8), x))[0]
    (first, _, second), rest = ([Fraction(float(v)) for v in x[0, :3]], w[:, :3].astype(np.float32).tolist())
    truth = [rounded(Fraction(float(rounded(first * Fraction(a)))) + second * Fraction(c)) for a, _, c in rest]
    assert np.array_equal(y, np.array(truth, np.float32))
    assert exponent > -112 or (np.abs(y[y != 0]) < 2.0**-126).any()


def test_a_claim_writes_its_rows_only(tiers: list[Kernels]) -> None:
    case = Case("Q4_0", "int8", 56, 512, 5)
    raw = naive.blocks(case.format, case.rows, case.k)
    guard = np.full(1, GUARD * 0x01010101, np.uint32)
    for tier in tiers:
        y = tier.matmul(case, raw, activations(case), groups=[(1, 2)])
        assert (bits(y[:, :16]) == guard).all() and (bits(y[:, 32:]) == guard).all()
        assert (bits(y[:, 16:32]) != guard).all()


def extreme_activations(k: int) -> np.ndarray:
    """One row per kind of trouble, float32."""
    rng = np.random.default_rng(3)
    signs = rng.choice(np.array([-1, 1], np.float32), k)
    normal = rng.standard_normal(k).astype(np.float32)
    rows = [
        np.zeros(k),
        -np.zeros(k),
        np.ones(k),  # every q is the lowest
        -np.ones(k),
        signs,
        np.full(k, 1e30),
        signs * 1e30,
        normal * 1e30,
        normal * 1e-29,
        normal * 1e-30,  # blocks on both sides of TINY
        normal * 1e-40,  # denormals
        np.full(k, 1e-45),
        np.where(np.arange(k) % 32 == 7, 1e4, normal),  # one outlier a block: all else rounds to small integers
        np.where(np.arange(k) // 32 % 2, 0, normal),
        np.where(np.arange(k) % 32 == 0, -127, np.arange(k) % 239 - 126.5),  # every tie
        (np.arange(k) % 255 - 127) / 2,
        (np.arange(k) % 32 - 16) * (127 / 16) + 0.5,
    ]
    return np.array(rows).astype(np.float32)


def extreme_weights(fmt: str, rows: int, k: int) -> np.ndarray:
    """Bytes whose integers take every value, the ends above all, with scales of both signs around 1."""
    rng = np.random.default_rng(4)
    raw = naive.blocks(fmt, rows, k, seed=4).copy()
    view = raw.view(naive.FORMATS[fmt].dtype)
    view["d"] = rng.choice(np.array([1, -1, 0.5, 6e-8, 0], np.float16), view.shape)
    for field in sorted(set(view.dtype.names) - {"d", "m", "dmin"}):  # one order: hashes of results are compared
        integers = rng.integers(0, 256, (*view[field].shape, view[field].dtype.itemsize), np.uint8)
        integers[1::4] = 255
        integers[2::4] = 0
        integers[3::4] = rng.choice(np.array([0x80, 0x7F], np.uint8), integers[3::4].shape)  # the ends of an int8
        view[field] = integers.view(view[field].dtype)[..., 0]
    return raw


@pytest.mark.parametrize("fmt", QUANTS)
@pytest.mark.parametrize("mode", TERMS)
def test_extremes_neither_saturate_nor_differ(fmt: str, mode: str, tiers: list[Kernels]) -> None:
    """The ends of q against -128 and 63 x 127 sums overflow 16 bits where they can; all of it must be exact."""
    x = np.tile(extreme_activations(512), (2, 1))  # as many as it takes for the weights to be unpacked once for all
    case = Case(fmt, mode, 48, 512, len(x))
    roundings = 8 + (case.k if mode == "f32" else case.k // 8)  # of the longest chain: no case is worse
    for raw in (extreme_weights(fmt, case.rows, case.k), naive.blocks(fmt, case.rows, case.k, seed=5)):
        y = same_bits(tiers, lambda t, raw=raw: t.matmul(case, raw, x))
        seen = naive.seen(x, TERMS[mode])
        truth = naive.matmul(naive.weights(fmt, raw), seen)
        scale = naive.matmul(naive.magnitudes(fmt, raw), np.abs(seen))
        assert np.isfinite(y).all()
        assert (np.abs(y - truth) <= roundings * 2.0**-24 * scale + 1e-37).all()


@pytest.mark.parametrize("terms", [1, 2])
def test_quantise_gives_the_records_drawn(terms: int, tiers: list[Kernels]) -> None:
    rng = np.random.default_rng(6)
    wide = rng.standard_normal((20, 544)) * 10.0 ** rng.integers(-20, 20, (20, 1))
    for x in (*extreme_activations(544), *wide.astype(np.float32)):
        found = same_bits(tiers, lambda t, x=x: t.quantise(x, terms, slots=3, slot=1))
        assert (np.ascontiguousarray(found[:, [0, 2]]).view(np.uint8) == GUARD).all(), "wrote into a neighbour's record"
        expected = naive.records(x[None], terms)[0]
        for field in expected.dtype.names:
            assert np.array_equal(found[:, 1][field], expected[field]), field


def test_two_terms_hold_sixteen_bits() -> None:
    x = np.random.default_rng(7).standard_normal((8, 1024)).astype(np.float32)
    top = np.abs(x.reshape(8, -1, 32)).max(axis=2, keepdims=True)
    # half a step; or one and a half where q2 was clipped
    for terms, parts in ((1, 2 * naive.HIGHEST), (2, 2 / 3 * 32639)):
        error = np.abs(naive.seen(x, terms) - x).reshape(8, -1, 32)
        assert (error <= top / parts * 1.001).all()


def test_interleave_moves_bits(tiers: list[Kernels]) -> None:
    x = np.arange(96, dtype=np.uint32).view(np.float32)
    x[:4] = np.array([np.nan, np.inf, -0.0, 1e-45], np.float32)
    found = same_bits(tiers, lambda t: t.interleave(x, 3, 2))
    assert np.array_equal(bits(found[:, 2]), bits(x)) and not bits(found[:, :2]).any()


# ---- panels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("fmt", PANELS)
def test_a_row_of_the_panel_is_the_row_of_the_file(fmt: str, rows: int, tiers: list[Kernels]) -> None:
    """Packing and unpacking lose nothing: bit for bit what the reference gives, every row, padded or not."""
    k = 768
    raw = extreme_weights(fmt, rows, k) if fmt in QUANTS else naive.blocks(fmt, rows, k)
    found = same_bits(tiers, lambda t: t.row(fmt, raw, k, range(rows)))
    assert np.array_equal(bits(found), bits(naive.weights(fmt, raw)))


@pytest.mark.parametrize("fmt", PANELS)
def test_rows_of_padding_are_zero_and_out_is_filled(fmt: str, tiers: list[Kernels]) -> None:
    raw = naive.blocks(fmt, 17, 256)
    panels = pack(fmt, raw, 17)
    out = np.full(panels.size, GUARD, np.uint8)
    assert pack(fmt, raw, 17, out).shape == panels.shape == (2, panels.shape[1], PANELS[fmt].record_bytes)
    assert np.array_equal(out, panels.reshape(-1))
    padding = np.concatenate([raw, np.zeros((15, raw.shape[1]), np.uint8)])
    for tier in tiers:
        assert not tier.row(fmt, padding, 256, range(17, 32)).any()


@pytest.mark.parametrize("fmt", PANELS)
def test_panels_have_the_width_of_the_file(fmt: str) -> None:
    """Decode reads every byte of every panel: at most 6 % more than the file, for sub-scales as whole bytes."""
    raw = naive.blocks(fmt, 16, 256)
    assert raw.nbytes <= pack(fmt, raw, 16).nbytes <= 1.06 * raw.nbytes


def test_large_matrices_pack_in_steps() -> None:
    """More than a step of about 1 MB, the last one short."""
    raw = naive.blocks("Q8_0", 3000, 576)
    small = np.concatenate([pack("Q8_0", raw[i : i + 16], len(raw[i : i + 16])) for i in range(0, 3000, 16)])
    assert np.array_equal(pack("Q8_0", raw, 3000), small)


# ---- halves --------------------------------------------------------------------------------------------------------


def test_every_half_becomes_its_float(tiers: list[Kernels]) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(-1, 32)
    with np.errstate(invalid="ignore"):
        expected = halves.astype(np.float32)
    nan = np.isnan(expected)
    for tier in tiers:
        found = tier.row("F16", halves.view(np.uint8), 32, range(2048))
        assert np.array_equal(np.isnan(found), nan)
        assert np.array_equal(bits(found[~nan]), bits(expected[~nan])), tier.tier.name


def test_every_finite_half_is_a_factor(tiers: list[Kernels]) -> None:
    """The same through the matmul: times the identity."""
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    raw = np.where(np.isfinite(values), values, np.float16(0)).reshape(2048, 32)
    case = Case("F16", "f32", 2048, 32, 32)
    y = same_bits(tiers, lambda t: t.matmul(case, raw.view(np.uint8), np.eye(32, dtype=np.float32)))
    assert np.array_equal(y.T, raw.astype(np.float32))


def test_floats_round_to_halves_as_ieee_says(tiers: list[Kernels]) -> None:
    """All halves, all midpoints between neighbours, and the floats on both sides of each; then random bits."""
    halves = np.arange(0x7C01, dtype=np.uint16).view(np.float16).astype(np.float32)  # 0 .. inf
    with np.errstate(over="ignore"):
        middles = ((halves[:-2].astype(np.float64) + halves[1:-1]) / 2).astype(np.float32)
        ends = np.array([65519.996, 65520, 65536, 1e30, 3.4e38, 1e-45, 2**-25, 2**-26], np.float32)
        edges = np.concatenate([halves, middles, ends])
        near = np.concatenate([np.nextafter(edges, np.float32(to)) for to in (-np.inf, np.inf)])
    random = np.random.default_rng(8).integers(0, 1 << 32, 200_000, np.uint32).view(np.float32)
    x = np.concatenate([edges, near, -edges, -near, random, np.array([np.nan, -np.nan, np.inf, -np.inf], np.float32)])
    x = np.concatenate([x, np.zeros(-len(x) % 16, np.float32)])
    nan = np.isnan(x)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(np.float16)
    for tier in tiers:
        found = tier.half(x)
        assert np.isnan(found[nan]).all(), tier.tier.name
        wrong = np.flatnonzero(found[~nan].view(np.uint16) != expected[~nan].view(np.uint16))
        assert not len(wrong), f"{tier.tier.name}: {x[~nan][wrong[:4]]} became {found[~nan][wrong[:4]]}"


# ---- row-wise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [16, 576, 2048])
def test_rmsnorm(n: int, tiers: list[Kernels]) -> None:
    rng = np.random.default_rng(9)
    weight = rng.standard_normal(n).astype(np.float32)
    for scale in (1, 1e-3, 1e4, 0):
        x = (rng.standard_normal(n) * scale).astype(np.float32)
        found = same_bits(tiers, lambda t, x=x: t.rmsnorm(x, weight, 1e-5))
        np.testing.assert_allclose(found, naive.rmsnorm(x, weight, np.float32(1e-5)), rtol=5e-7)


def test_swiglu_and_its_exp(tiers: list[Kernels]) -> None:
    """silu(g) = g e^g for very negative g: there its error is that of exp, plus four roundings of half an ulp."""
    gate = np.linspace(-87, 30, 1 << 16).astype(np.float32)
    found = same_bits(tiers, lambda t: t.swiglu(gate, np.ones_like(gate)))
    np.testing.assert_allclose(found, naive.swiglu(gate, np.ones_like(gate)), rtol=3 * 2.0**-23, atol=0)
    up = np.random.default_rng(10).standard_normal(len(gate)).astype(np.float32)
    found = same_bits(tiers, lambda t: t.swiglu(gate, up))
    np.testing.assert_allclose(found, naive.swiglu(gate, up), rtol=4 * 2.0**-23, atol=1e-38)


def test_swiglu_beyond_exp(tiers: list[Kernels]) -> None:
    ends = np.array([1e30, 1e4, 200, 104, 89, 88, 87.4, 1e-45], np.float32)
    gate = np.concatenate([-ends, ends])
    found = same_bits(tiers, lambda t: t.swiglu(gate, np.ones_like(gate)))
    assert np.array_equal(found[8:], naive.swiglu(gate, np.ones(16)).astype(np.float32)[8:])
    assert (np.abs(found[1:7]) < 1e-33).all()  # the truth is smaller still: exp is clamped at e^88
    assert found[7] == 0 or abs(found[7]) == np.float32(1e-45)


@pytest.mark.parametrize("position", [0, 1, 63, 511, 8191])
def test_rope(position: int, tiers: list[Kernels]) -> None:
    x = np.random.default_rng(11).standard_normal(64).astype(np.float32)
    table = rope.table(100_000.0, position, position + 1)[0]
    found = same_bits(tiers, lambda t: t.rope(x, table, 0.125))
    expected = naive.rope(x, naive.angles(np.array([position]), 100_000.0)[0]) / 8
    assert np.abs(found - expected).max() <= 1e-7 * np.abs(x).max()


@pytest.mark.parametrize("theta", [10_000.0, 100_000.0, 130_000.0])
def test_the_rotary_table_holds_cosines_and_sines(theta: float) -> None:
    table = rope.table(theta, 0, 8192)
    angle = naive.angles(np.arange(8192), theta)
    # transformers' float32 frequencies may be the neighbour of ours: the angle then differs by 2^-24 of itself
    slack = 2.0**-24 + (np.abs(rope.frequencies(theta) * np.arange(8192)[:, None] - angle))
    assert (np.abs(table[:, 0] - np.cos(angle)) <= slack).all() and (np.abs(table[:, 1] - np.sin(angle)) <= slack).all()
    assert np.abs(rope.frequencies(theta) / naive.angles(np.ones(1), theta)[0] - 1).max() <= 2.0**-23
    assert np.array_equal(rope.table(theta, 700, 900), table[700:900])


# ---- code ----------------------------------------------------------------------------------------------------------


_NEON = ("fcvtl\t", "fcvtl2\t", "fcvtn\t", "fcvtn2\t", "tbl\t", "fmla\t", "ushr\t")
# tier -> instructions that its code must hold, and those it must not
CODE = {
    "avx512vnni": (("vpdpbusd\t", "vpshufb", "%zmm", "vcvtph2ps", "vfmadd"), ("vpmaddubsw", "callq\t*fma")),
    "avx512zen5": (
        ("vpdpbusd\t", "vpshufb", "%zmm", "vcvtph2ps", "vfmadd", "prefetcht0"),
        ("vpmaddubsw", "callq\t*fma"),
    ),
    "avx512": (("vpmaddubsw", "vpmaddwd", "vpshufb", "%zmm", "vcvtph2ps", "vfmadd"), ("vpdpbusd",)),
    "avxvnni": (("{vex}\tvpdpbusd", "vpshufb", "%ymm", "vcvtph2ps", "vfmadd"), ("%zmm", "vpmaddubsw", "{%k")),
    "avx2": (("vpmaddubsw", "vpmaddwd", "vpshufb", "%ymm", "vcvtph2ps", "vfmadd"), ("%zmm", "vpdpbusd", "{%k")),
    "i8mm": (("smmla\t", "sdot\t", *_NEON), ("smull\t", "\tbl\t")),
    "dotprod": (("sdot\t", *_NEON), ("smmla\t", "smull\t", "\tbl\t")),
    "neon": (("smull\t", "smull2\t", "smlal\t", "smlal2\t", "sadalp\t", "addp\t", *_NEON), ("dot\t", "\tbl\t")),
}


@pytest.mark.skipif(not TIERS[TESTED[0]].x86, reason="one kind of machine is enough: others are emulated")
@pytest.mark.parametrize("tier", CODE)
def test_code_holds_the_instructions_claimed(tier: str) -> None:
    found = emitted("assembly", tier, ["matmul_Q4_0_int8", "matmul_Q8_0_int8", "matmul_IQ4_NL_int8", "half"])
    code = "\n".join(text.decode() for text in found.values())
    dots = [line for line in code.splitlines() if re.search("vpdpbusd|vpmaddubsw|sdot|smmla|smull|smlal", line)]
    assert len(dots) >= 8
    register = {"avx512": "%zmm", "avx": "%ymm"}.get(re.match("(avx(512)?)?", tier)[0], "v")
    assert all(register in line for line in dots), [line for line in dots if register not in line][:3]
    holds, lacks = CODE[tier]
    for word in holds:
        assert word in code, f"no {word}"
    for word in lacks:
        assert word not in code, f"has {word}"


@pytest.mark.skipif(not TIERS[TESTED[0]].x86, reason="one kind of machine is enough: others are emulated")
def test_sums_of_a_tile_stay_in_registers() -> None:
    """No loop of products uses the stack: with one token, alone and left of more, with two, and with a whole tile."""
    for name, code in emitted("assembly", "dotprod", ["matmul_Q4_0_int8", "matmul_Q8_0_int8"]).items():
        blocks = re.split(r"^(?=\.?\w+:)", code.decode(), flags=re.MULTILINE)
        loops = [block for block in blocks if block.count("sdot\t") >= 32]
        assert len(loops) == 4 and max(loop.count("sdot\t") for loop in loops) == 32 * TIERS["dotprod"].tiles[1]
        for loop in loops:
            assert re.search(rf"\tb\.ne\t{re.escape(loop.partition(':')[0])}\b", loop), f"{name}: no loop"
            assert "[sp" not in loop, name


@pytest.mark.parametrize("tier", compiled_only())
def test_tiers_that_do_not_run_here_compile(tier: str) -> None:
    names = [
        "forward_f16",
        "classify",
        "team_rouse",
        "team_run",
        "worker_loop",
        "row_Q6_K",
        "matmul_Q6_K_int8x2",
        "matmul_Q4_1_f32",
        "matmul_Q2_K_int8x2",
        "matmul_IQ4_XS_int8",
        "row_Q3_K",
        "op_attend_back",
        "op_tiles",
    ]
    for name, code in emitted("image", tier, names).items():  # linking refuses what is not self-contained
        assert list(unseal(memoryview(code), image_key(TIERS[tier], name))) == [name]
