"""The sampler against naive float64, and its promise: the same seed gives the same ids on every CPU."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest

from smolrun.errors import ModelFileError, OptionError
from smolrun.generate import sampler as module
from smolrun.generate.sampler import Sampler, Sampling


def random_logits(seed, vocab_size=1000, spread=3.0):
    """Bell-shaped, made of whole numbers: the same everywhere."""
    bell = np.random.default_rng(seed).integers(-(1 << 20), 1 << 20, (4, vocab_size)).sum(axis=0)
    return bell.astype(np.float32) * np.float32(spread / (1 << 20))


def pick(logits, *, ids=(0,), prompt_length=1, **options):
    return Sampler(Sampling(**options)).sample(np.array(logits, dtype=np.float32), list(ids), prompt_length)


def naive_candidates(logits, temperature, top_k, top_p, min_p):
    """Ids by full sorts and float64 sums."""
    x = logits.astype(np.float64) / temperature
    order = np.lexsort((np.arange(len(x)), -x))[: top_k or None]
    p = np.exp(x[order] - x.max())
    p /= p.sum()
    keep = np.concatenate([[0.0], np.cumsum(p)[:-1]]) < top_p
    keep &= p >= min_p * p[0]
    return np.sort(order[keep]), p


def test_tables_are_exact_to_the_last_bit():
    with localcontext() as context:
        context.prec = 60
        for bits, table in ((10, module._COARSE), (20, module._FINE)):
            exact = [Decimal(2) ** (31 - Decimal(i) / 2**bits) for i in range(1024)]
            assert table.tolist() == [int((value + Decimal("0.5")).to_integral_value("ROUND_FLOOR")) for value in exact]


@pytest.mark.parametrize("temperature", [0.01, 0.2, 1.0, 7.0])
def test_weights_are_the_exponential(temperature):
    x = np.linspace(-20 * temperature, 0, 3000).astype(np.float32)
    exact = np.exp((x.astype(np.float64) - float(x.max())) / temperature)
    weights = module._weights(x, temperature) / 2**40
    assert weights[-1] == 1
    assert np.abs(weights / exact - 1).max() < 1e-6 + 2**-40 / exact.min()


def test_weights_do_not_depend_on_neighbours():
    x = random_logits(5, 20000)
    apart = np.concatenate([module._weights(np.append(x[i : i + 37], x.max()), 0.7)[:-1] for i in range(0, len(x), 37)])
    assert np.array_equal(module._weights(x, 0.7), apart)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 0.2, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 30.0, "top_p": 0.95},
        {"temperature": 1.0, "top_p": 1.0, "top_k": 40},
        {"temperature": 1.5, "top_p": 0.8, "top_k": 700},
        {"temperature": 1.0, "top_p": 1.0, "min_p": 0.05},
        {"temperature": 0.8, "top_p": 0.7, "top_k": 50, "min_p": 0.1},
    ],
)
def test_candidates_are_the_naive_ones(options, seed):
    logits = random_logits(seed, 6000, 1.5)
    ids, weights = Sampler(Sampling(**options)).candidates(logits)
    expected, _ = naive_candidates(logits, **{"top_k": 0, "min_p": 0.0} | options)
    assert np.array_equal(ids, expected)
    exact = np.exp((logits[ids].astype(np.float64) - float(logits.max())) / options["temperature"])
    assert np.abs(weights / 2**40 - exact).max() < 1e-6


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_among_equals_the_lowest_ids_stay(count):
    logits = np.array([1, 3, 3, 2, 3], dtype=np.float32)
    best = [1, 2, 4, 3, 0]
    assert module._best(logits, count).tolist() == best[:count]
    ids, _ = Sampler(Sampling(temperature=1.0, top_p=1.0, top_k=count)).candidates(logits)
    assert ids.tolist() == sorted(best[:count])
    flat = np.zeros(2000, dtype=np.float32)
    assert module._best(flat, count).tolist() == list(range(count))
    ids, _ = Sampler(Sampling(temperature=1.0, top_p=count / 2000)).candidates(flat)
    assert ids.tolist() == list(range(count))


def test_greedy_takes_the_lowest_of_the_best():
    assert pick([0, 5, 1, 5], temperature=0).id == 1
    assert pick([0, 5, 1, 5], temperature=9.0, top_k=1).id == 1


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    draw = Sampler(Sampling(temperature=1.0, top_p=1.0, seed=1)).sample
    counts = np.bincount([draw(logits, [0] * n, 0).id for n in range(4000)], minlength=4)
    expected = 4000 * np.array([0.5, 0.3, 0.15, 0.05])
    assert ((counts - expected) ** 2 / expected).sum() < 16.27  # chi-square, 3 degrees of freedom, 0.1 %


def test_a_draw_depends_on_seed_and_step_only():
    logits = random_logits(1, spread=1)
    options = {"temperature": 1.0, "top_p": 1.0}

    def draw(seed, step, prompt):
        return Sampler(Sampling(seed=seed, **options)).sample(logits, [7] * (prompt + step), prompt).id

    ids = [draw(3, step, 1) for step in range(20)]
    assert ids == [draw(3, step, 9) for step in range(20)]
    once = Sampler(Sampling(seed=3, **options))
    assert ids == [once.sample(logits, [7] * step, 0).id for step in reversed(range(20))][::-1]
    assert ids != [draw(4, step, 1) for step in range(20)]
    assert len(set(ids)) > 10


GOLDEN = {
    "default": ({}, [520, 706, 148, 218, 619, 772, 908, 12, 467, 712, 446, 738]),
    "hot": ({"temperature": 1.0, "top_p": 1.0}, [520, 706, 148, 466, 619, 122, 908, 574, 721, 763, 525, 17]),
    "all": (
        {"temperature": 1.3, "top_p": 0.8, "top_k": 200, "min_p": 0.01, "repetition_penalty": 1.2},
        [520, 706, 153, 519, 619, 111, 908, 574, 724, 763, 527, 17],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_ids(name):
    """Literals: whatever CPU, NumPy or libm runs this, the ids are these."""
    options, expected = GOLDEN[name]
    sampler, ids = Sampler(Sampling(seed=2025, **options)), [1]
    for step in range(12):
        ids.append(sampler.sample(random_logits(step), ids, 1).id)
    assert ids[1:] == expected


def test_random_bits_are_splitmix64s():
    assert module._mix(0) == 0xE220A8397B1DCDAF  # its first output from state 0, as published
    assert module._mix(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4  # the second


def test_libm_has_no_say_in_a_draw(monkeypatch):
    logits = random_logits(8)
    sampler = Sampler(Sampling(temperature=1.0, seed=5, top_k=300, min_p=0.001, frequency_penalty=0.5))
    ids = [sampler.sample(logits, [3] * n, 0).id for n in range(20)]
    exp = np.exp
    monkeypatch.setattr(np, "exp", lambda x, out=None: exp(x * 0.5, out=out))
    assert ids == [sampler.sample(logits, [3] * n, 0).id for n in range(20)]


def test_penalties():
    logits = np.array([2.0, -2.0, 4.0, 1.0, 0.5], dtype=np.float32)
    ids = [0, 1, 2, 2, 3]  # the prompt is 0, 1
    sampler = Sampler(Sampling(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5))
    assert sampler._modified(logits, ids, 2).tolist() == [1.0, -4.0, 2.0 - 0.25 - 1.0, 0.5 - 0.25 - 0.5, 0.5]
    assert logits.tolist() == [2.0, -2.0, 4.0, 1.0, 0.5]  # the caller's array stays


def test_penalties_beyond_float32_stay_finite():
    assert pick([3e38, -3e38, 0], ids=[0, 1], temperature=0, repetition_penalty=1e-9).id == 0
    assert pick([3e38, -3e38, 0], ids=[0, 1], temperature=0.5, repetition_penalty=1e9).id == 0


def test_bias():
    assert pick([0, 1, 2], temperature=0, logit_bias={0: 2.5}).id == 0
    assert pick([0, 1, 2], temperature=0, logit_bias={2: -math.inf}).id == 1
    assert {
        pick([0, 1, 9], ids=[0] * n, temperature=1.0, logit_bias={2: -math.inf}, seed=n).id for n in range(1, 40)
    } == {0, 1}
    assert pick([0, 1, 2], temperature=1.0, top_k=3, logit_bias={0: -math.inf, 1: -math.inf}).id == 2
    with pytest.raises(OptionError, match="id 3, the vocabulary has ids 0 to 2"):
        pick([0, 1, 2], logit_bias={3: 1})
    for temperature in (0, 1.0):
        with pytest.raises(OptionError, match="bans all 2 ids"):
            pick([0, 1], temperature=temperature, logit_bias={0: -math.inf, 1: -math.inf})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite(bad, temperature):
    with pytest.raises(ModelFileError, match=r"after 4 ids are not finite \(id 2: .*damaged"):
        pick([0, 1, bad, 3], ids=[1, 2, 3, 4], temperature=temperature)


def test_log_probabilities_are_of_the_unmodified_distribution():
    logits = random_logits(11)
    sample = pick(logits, ids=[1, 2], temperature=0.3, top_k=5, repetition_penalty=1.5, logit_bias={4: 50}, logprobs=3)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    best = np.argsort(-exact)[:3]
    assert sample.id == 4
    assert sample.logprob == pytest.approx(exact[4], abs=1e-5)
    assert [id for id, _ in sample.top] == best.tolist()
    assert [logprob for _, logprob in sample.top] == pytest.approx(exact[best].tolist(), abs=1e-5)
    assert len(pick([0, 1], logprobs=9).top) == 2


def test_extreme_logits():
    for temperature in (1e-9, 0.2, 1e9):
        assert pick([-3e38, 3e38, 0], temperature=temperature, top_p=0.3).id == 1
    assert pick([3e38, -3e38], temperature=0).logprob == 0
    assert pick([7.0], temperature=1.0).id == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", "hot"), ("temperature", True),
        ("top_p", 0), ("top_p", 1.01), ("top_k", -1), ("top_k", 1.5), ("min_p", -0.1), ("min_p", 1.1),
        ("repetition_penalty", 0), ("presence_penalty", math.inf), ("frequency_penalty", math.nan),
        ("logit_bias", [1]), ("logit_bias", {-1: 0.0}), ("logit_bias", {1: math.inf}), ("logit_bias", {"a": 1}),
        ("seed", -1), ("seed", 1 << 64), ("seed", 0.5), ("logprobs", -1), ("logprobs", True),
    ],
)  # fmt: skip
def test_options_out_of_range(name, value):
    with pytest.raises(OptionError, match=name) as caught:
        Sampling(**{name: value})
    assert "expected" in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_fresh_seed_is_told():
    seeds = {Sampling().seeded().seed for _ in range(8)}
    assert len(seeds) > 1
    assert Sampling(seed=9).seeded().seed == 9
    one = Sampler(Sampling(temperature=2.0))
    again = Sampler(one.sampling)
    logits = random_logits(2)
    assert [one.sample(logits, [0] * n, 0).id for n in range(9)] == [
        again.sample(logits, [0] * n, 0).id for n in range(9)
    ]
