"""One row of logits becomes one id: the same id on every CPU.

A draw must not hang on how a CPU rounds. `exp` of libm and of NumPy's SIMD loops differs by an ulp from machine to
machine, and `np.sum` adds in blocks as wide as the vector registers; either may move the border between two candidates
across the draw. So from the temperature on, everything here is whole numbers:

    octaves below the best  u = (max - logit) * log2(e) / temperature      fixed point, 20 bits behind the point
    weight                  w = 2^40 * 2^-u                                two table look-ups, one product, one shift
    mass, top-p, the draw   sums and comparisons of w                      exact in any order

Weights under 2^-40 of the best are 0: at most 4e-8 of the mass for 49,152 ids. A probability is off by 3e-7 of itself:
less than one ulp of a float32 logit moves it.

The draw at step n is a hash of (seed, n). Nothing is kept between calls: an answer that is resumed or repeated draws
the same ids.
"""

import math
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from smolrun.errors import ModelFileError, OptionError

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_WEIGHT_BITS = 40  # the best id weighs 2^40: 2^22 ids of that weight still add up within int64
_HALF_BITS = 10  # each of the two tables takes this many bits of the fraction
_FRACTION_BITS = 2 * _HALF_BITS
_TABLE_BITS = 31  # bits of a table entry: the product of two fits int64
_U64 = 0xFFFF_FFFF_FFFF_FFFF


def _power_table(step_bits: int) -> Ids:
    """2^(31 - i / 2^step_bits) for i < 1024, rounded: by integer square roots, no libm has a say.  # (1024,) int64"""
    scale_bits = 128
    step = 1 << (scale_bits - 1)  # 1/2, then its square root taken step_bits times: 2^(-1 / 2^step_bits)
    for _ in range(step_bits):
        step = math.isqrt(step << scale_bits)
    power, table = 1 << scale_bits, []
    shift = scale_bits - _TABLE_BITS
    for _ in range(1 << _HALF_BITS):
        table.append((power + (1 << (shift - 1))) >> shift)
        power = (power * step) >> scale_bits
    return np.array(table, dtype=np.int64)


_COARSE = _power_table(_HALF_BITS)
_FINE = _power_table(_FRACTION_BITS)


@dataclass(frozen=True)
class Sampling:
    """How the next id is chosen. The defaults are those of SmolLM2's model card.

    In this order, each step on what the one before has left:

    1. `repetition_penalty`: logits of ids of the prompt or the answer are divided by it if positive, else multiplied.
    2. `presence_penalty`, `frequency_penalty`: ids of the *answer* lose presence + count * frequency.
    3. `logit_bias`: id -> number added to its logit; `-inf` bans the id.
    4. `temperature`: 0 takes the best id (the lowest one of equals); logits are divided by it otherwise.
    5. `top_k`: the k best ids (0: all), lowest ids first among equals.
    6. `top_p`: the fewest best ids with at least this share of the mass.
    7. `min_p`: ids at least this likely relative to the best one.

    `seed`: a whole number below 2^64; None takes a fresh one, which `Completion.seed` reports.

    `logprobs`: how many of the likeliest ids are reported at each step. Log-probabilities are those of the *unmodified*
    distribution: the log-softmax of the model's logits, before penalties, bias and temperature. They are for reading
    (float32 sums, equal to ~1e-6 on all CPUs) and never decide a draw.

    Raises:
        OptionError: a value out of its range.

    >>> Sampling(temperature=0.7, top_k=40, seed=1).top_k
    40
    >>> Sampling(top_p=0)
    Traceback (most recent call last):
    smolrun.errors.OptionError: top_p is 0, a number with 0 < top_p <= 1 expected
    """

    temperature: float = 0.2
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int = 0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, _is_number(self.temperature) and self.temperature >= 0, "a number >= 0")
        _check("top_p", self.top_p, _is_number(self.top_p) and 0 < self.top_p <= 1, "a number with 0 < top_p <= 1")
        _check("top_k", self.top_k, _is_whole(self.top_k) and self.top_k >= 0, "a whole number >= 0 (0: no limit)")
        _check("min_p", self.min_p, _is_number(self.min_p) and 0 <= self.min_p <= 1, "a number with 0 <= min_p <= 1")
        repetition = self.repetition_penalty
        _check("repetition_penalty", repetition, _is_number(repetition) and repetition > 0, "a number > 0 (1: none)")
        _check("presence_penalty", self.presence_penalty, _is_number(self.presence_penalty), "a finite number")
        _check("frequency_penalty", self.frequency_penalty, _is_number(self.frequency_penalty), "a finite number")
        _check("logit_bias", self.logit_bias, isinstance(self.logit_bias, Mapping), "a mapping of ids to numbers")
        for id, bias in self.logit_bias.items():
            fits = _is_whole(id) and id >= 0 and (bias == -math.inf or _is_number(bias))
            _check(f"logit_bias[{id!r}]", bias, fits, "an id >= 0 with a finite number or -inf")
        fits = self.seed is None or (_is_whole(self.seed) and 0 <= self.seed <= _U64)
        _check("seed", self.seed, fits, "None or a whole number below 2^64")
        _check("logprobs", self.logprobs, _is_whole(self.logprobs) and self.logprobs >= 0, "a whole number >= 0")

    def seeded(self) -> "Sampling":
        """This sampling with a seed: its own, else a fresh one (32 bits: short enough to be typed again)."""
        return self if self.seed is not None else replace(self, seed=int.from_bytes(os.urandom(4), "little"))


@dataclass(frozen=True, slots=True)
class Sample:
    """A chosen id. `top`: the likeliest (id, log-probability), best first; as many as `Sampling.logprobs`."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses ids by a `Sampling`; holds no state between calls.

    >>> import numpy as np
    >>> sampler = Sampler(Sampling(temperature=1.0, top_p=1.0, seed=7))
    >>> logits = np.array([0.0, 2.0, 1.0], dtype=np.float32)
    >>> [sampler.sample(logits, [5] * (1 + step), prompt_length=1).id for step in range(12)]
    [1, 1, 1, 1, 1, 1, 2, 2, 2, 1, 2, 1]
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling.seeded()
        self._seed = _mix(operator.index(self.sampling.seed or 0))
        self._bias_ids = np.fromiter(sampling.logit_bias.keys(), dtype=np.int64)
        self._bias = np.fromiter(sampling.logit_bias.values(), dtype=np.float32)
        self._penalises = (
            sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        )

    def sample(self, logits: Logits, ids: Sequence[int] | Ids, prompt_length: int) -> Sample:
        """The next id after `ids`.

        Args:
            logits: float32 (vocab_size,), left as it is.
            ids: prompt and answer so far; the step drawn is len(ids) - prompt_length.
            prompt_length: how many of them are the prompt.

        Raises:
            ModelFileError: logits that are not finite.
            OptionError: a logit_bias for ids outside the vocabulary, or one that bans every id.
        """
        best = logits.max()
        # NaN goes through max and min; either infinity shows in one of them
        if not (math.isfinite(best) and math.isfinite(logits.min())):
            at = int(np.flatnonzero(~np.isfinite(logits))[0])
            raise ModelFileError(
                f"the logits after {len(ids):,} ids are not finite (id {at}: {logits[at]}), numbers expected: "
                "the weights are damaged (fetch the model again, `smolrun verify` checks it)"
            )
        x = self._modified(logits, ids, prompt_length)
        if self.sampling.temperature == 0 or self.sampling.top_k == 1:
            id = int(x.argmax())
        else:
            id = self._draw(x, len(ids) - prompt_length)
        with np.errstate(over="ignore", under="ignore"):
            below = logits - best
            log_mass = float(best) + math.log(float(np.exp(below, out=below).sum()))
        top = _best(logits, min(self.sampling.logprobs, len(logits))).tolist()
        return Sample(id, float(logits[id]) - log_mass, tuple((i, float(logits[i]) - log_mass) for i in top))

    def _modified(self, logits: Logits, ids: Sequence[int] | Ids, prompt_length: int) -> Logits:
        """Logits after penalties and bias: the array itself if there are none, else a copy.  # (vocab_size,)"""
        if not self._penalises and not len(self._bias):
            return logits
        x: Logits = logits.copy()
        if self._penalises:
            sampling, history = self.sampling, np.asarray(ids, dtype=np.int64)
            seen = np.unique(history)
            old = x[seen].astype(np.float64)
            x[seen] = _narrow(np.where(old > 0, old / sampling.repetition_penalty, old * sampling.repetition_penalty))
            said, count = np.unique(history[prompt_length:], return_counts=True)
            x[said] = _narrow(x[said] - (sampling.presence_penalty + sampling.frequency_penalty * count))
        if len(self._bias):
            last = int(self._bias_ids.max())
            if last >= len(x):
                raise OptionError(f"logit_bias for id {last}, the vocabulary has ids 0 to {len(x) - 1:,}")
            x[self._bias_ids] += self._bias
            if x.max() == -math.inf:
                raise OptionError(f"logit_bias bans all {len(x):,} ids of the vocabulary: leave at least one")
        return x

    def _draw(self, x: Logits, step: int) -> int:
        """A random one of the candidates."""
        ids, weights = self.candidates(x)
        mass = np.cumsum(weights)
        # 64 random bits times the mass: off by 2^-64, where the lightest id has 2^-56
        point = (_mix(self._seed + step * 0x9E37_79B9_7F4A_7C15) * int(mass[-1])) >> 64
        return int(ids[np.searchsorted(mass, point, side="right")])

    def candidates(self, x: Logits) -> tuple[Ids, Ids]:
        """Ids that temperature (> 0), top-k, top-p and min-p leave, rising, and their weights; the best has 2^40."""
        sampling = self.sampling
        if 0 < sampling.top_k < len(x):
            ids = np.sort(_best(x, sampling.top_k))
        else:
            # far below the best the weight is 0: 28 > 40 * ln(2). At temperature 0.2 this leaves tens of 49,152 ids
            ids = np.flatnonzero(x >= np.float32(max(float(x.max()) - 28.0 * sampling.temperature, -3.4e38)))
        weights = _weights(x[ids], sampling.temperature)
        if sampling.top_p < 1:
            likely = _nucleus(weights, sampling.top_p)
            ids, weights = ids[likely], weights[likely]
        if sampling.min_p > 0:
            likely = np.flatnonzero(weights >= math.ceil(sampling.min_p * (1 << _WEIGHT_BITS)))
            ids, weights = ids[likely], weights[likely]
        return ids, weights


def _narrow(x: npt.NDArray[np.float64]) -> Logits:
    """float64 -> float32; what leaves its range becomes its greatest number, not infinity."""
    limit = float(np.finfo(np.float32).max)
    return np.clip(x, -limit, limit).astype(np.float32)


def _weights(x: Logits, temperature: float) -> Ids:
    """2^40 * exp((x - max(x)) / temperature) in whole numbers, rounded down.  # (n,) float32 -> (n,) int64"""
    best = x.max().astype(np.float64)
    scale = (1 << _FRACTION_BITS) * math.log2(math.e) / max(temperature, 1e-30)
    mask = (1 << _HALF_BITS) - 1
    weights = np.empty(len(x), dtype=np.int64)
    for start in range(0, len(x), 8192):
        # temporaries of 64 KiB stay in the cache: 0.7 -> 0.3 ms for 49,152 ids
        part = slice(start, start + 8192)
        # exact enough, and the same everywhere: float64 operations of IEEE 754 on float32 numbers
        u = np.minimum((best - x[part]) * scale + 0.5, 2.0**62).astype(np.int64)
        shift = np.minimum(u >> _FRACTION_BITS, _WEIGHT_BITS + 1) + (2 * _TABLE_BITS - _WEIGHT_BITS)
        np.right_shift(_COARSE.take((u >> _HALF_BITS) & mask) * _FINE.take(u & mask), shift, out=weights[part])
    return weights


def _nucleus(weights: Ids, top_p: float) -> Ids:
    """Indices, rising, of the fewest heaviest weights that have `top_p` of the mass; the first ones among equals."""
    wanted = math.ceil(top_p * int(weights.sum()))
    # Sorting all ids of a flat distribution takes 4 ms: halve the range of weights that holds the border, then sort
    inside: list[Ids] = []
    index = np.arange(len(weights))
    low, high = 0, (1 << _WEIGHT_BITS) + 1  # of the weights still looked at: low <= weight < high
    while len(index) > 512 and high - low > 1:
        middle = max(math.isqrt(low * high), low + 1)
        upper = np.flatnonzero(weights >= middle)
        mass = int(weights[upper].sum())
        if mass >= wanted:
            low = middle
        else:
            inside.append(index[upper])
            wanted -= mass
            upper, high = np.flatnonzero(weights < middle), middle
        index, weights = index[upper], weights[upper]
    order = np.argsort(-weights, kind="stable")
    count = int(np.searchsorted(np.cumsum(weights[order]), wanted)) + 1
    return np.sort(np.concatenate([*inside, index[order[:count]]]))


def _best(x: Logits, count: int) -> Ids:
    """Indices of the `count` greatest numbers, greatest first, lowest index first among equals."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    near: Ids = np.arange(len(x))
    columns = len(x) // 64
    if count <= columns // 4:
        # The count-th greatest of the maxima of disjoint columns is a lower bound: 0.4 ms -> 0.02 ms for 5 of 49,152
        maxima = x[: 64 * columns].reshape(64, columns).max(axis=0)
        near = np.flatnonzero(x >= np.partition(maxima, columns - count)[columns - count])
    bound = np.partition(x[near], len(near) - count)[len(near) - count]
    near = near[x[near] >= bound]
    order = np.argsort(-x[near], kind="stable")[:count]
    return near[order]


def _mix(z: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): 64 well mixed bits of a counter."""
    z = (z + 0x9E37_79B9_7F4A_7C15) & _U64
    z = ((z ^ (z >> 30)) * 0xBF58_476D_1CE4_E5B9) & _U64
    z = ((z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB) & _U64
    return z ^ (z >> 31)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check(name: str, value: Any, fits: bool, expected: str) -> None:
    if not fits:
        raise OptionError(f"{name} is {value!r}, {expected} expected")
