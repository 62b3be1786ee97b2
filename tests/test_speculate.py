"""Speculative decoding: the same answer bit for bit, whatever is guessed; and never much slower."""

import functools
import itertools
import threading

import numpy as np
import pytest

import smolrun
from mock_model import MockModel, common_prefix
from smolrun.errors import OptionError
from smolrun.generate.engine import generate_ids
from smolrun.generate.sampler import Sampling
from smolrun.generate.speculate import INCOME, KINDS, MOST, PURSE, Costs, Lookup, Speculation, Speculator
from tiny import make_tiny

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]
SAMPLINGS = {
    "greedy": Sampling(temperature=0, logprobs=2),
    "warm": Sampling(temperature=2.0, top_p=0.95, seed=3),
    "all": Sampling(
        temperature=1.0, top_k=9, min_p=0.01, repetition_penalty=1.3, presence_penalty=0.3, frequency_penalty=0.2,
        logit_bias={5: 2.0, 7: -np.inf}, seed=8, logprobs=1,
    ),
}  # fmt: skip


class Told:
    """Guesses by order: after `have` ids, the first n(have) ids of the truth, then m(have) wrong ones."""

    def __init__(self, truth, seed):
        self.truth, self.random = truth, np.random.RandomState(seed)
        self.accepted, self.closed = [], 0

    def guess(self, ids, most, cancel):
        assert ids.tolist() == self.truth[: len(ids)]
        right = self.truth[len(ids) :][: self.random.randint(5)]
        wrong = self.random.randint(0, 50, self.random.randint(4)).tolist()
        return [*right, *wrong][:most]

    def timed(self, work):
        return work()

    def verified(self, accepted):
        self.accepted.append(accepted)

    def close(self):
        self.closed += 1


class Always:
    """A source that always has a guess; the share of right ones is `share`."""

    def __init__(self, truth, share, seconds=0.0):
        self.truth, self.share, self.cost = truth, share, seconds
        self.random, self.have = np.random.RandomState(0), 0

    def kind(self, ids):
        self.have = len(ids)
        return 1

    def reading(self):
        return 0.0

    def seconds(self, count):
        return self.cost * count

    def guess(self, count, cancel):
        ids = self.truth[self.have :][:count]
        return [id if self.random.rand() < self.share else id ^ 1 for id in ids]

    def close(self):
        pass


class Clock:
    """Time that passes only when the model works: 1 for a pass, 0.3 for each further id of it."""

    def __init__(self, model):
        self.model = model

    def __call__(self):
        return sum(1 + 0.3 * (n - 1) for _, n in self.model.passes)


def steps(model, speculation=None, **options):
    out = list(generate_ids(model, PROMPT, speculation=speculation, **options))
    assert not model.opened
    return out


@pytest.mark.parametrize("chunk", [3, 16])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("seed", range(5))
def test_steps_are_those_of_plain_decoding(sampling, seed, chunk):
    """Ids, log-probabilities, likeliest ids, reasons: for max_tokens, the end of the context, stop ids."""
    plain = steps(MockModel(chunk=chunk), sampling=sampling)
    truth = [*PROMPT, *(step.id for step in plain)]
    stop = truth[len(PROMPT) + 17]
    for options in ({}, {"max_tokens": 1}, {"max_tokens": 13}, {"stop_ids": {stop}}):
        expected = steps(MockModel(chunk=chunk), sampling=sampling, **options)
        model, told = MockModel(chunk=chunk), Told(truth, seed)
        assert steps(model, told, sampling=sampling, **options) == expected
        assert told.closed == 1
        assert model.slots[0] == truth[: len(model.slots[0])]  # no wrong guess stays in the cache
        assert max(first + n for first, n in model.passes) <= model.context
        if not options and chunk == 16:
            assert max(told.accepted) > 2 and min(told.accepted) == 0
            assert len(model.passes) < len(expected)


@pytest.mark.parametrize("after", range(1, 12))
@pytest.mark.parametrize("how", ["cancel", "close"])
def test_an_end_in_the_middle_of_a_guess(how, after):
    plain = steps(MockModel(), sampling=SAMPLINGS["warm"], max_tokens=20)
    truth = [*PROMPT, *(step.id for step in plain)]
    model, cancel = MockModel(), threading.Event()
    told = Told(truth, after)
    running = generate_ids(model, PROMPT, sampling=SAMPLINGS["warm"], max_tokens=20, cancel=cancel, speculation=told)
    assert [next(running) for _ in range(after)] == plain[:after]
    count = len(model.passes)
    if how == "cancel":
        cancel.set()
        last = next(running)
        assert (last.id, last.finish_reason, next(running, None)) == (None, "cancelled", None)
        assert len(model.passes) == count
    else:
        running.close()
    assert not model.opened and told.closed == 1
    assert model.slots[0] == truth[: len(model.slots[0])]
    assert len(PROMPT) + after - 1 <= len(model.slots[0]) <= len(PROMPT) + after


def test_an_answer_that_gave_way_goes_on():
    sampling = SAMPLINGS["all"]
    whole = steps(MockModel(), sampling=sampling, max_tokens=20)
    truth = [*PROMPT, *(step.id for step in whole)]
    for split in (1, 7, 19):
        rest = generate_ids(
            MockModel(), truth[: len(PROMPT) + split], sampling=sampling, max_tokens=20, prompt_length=len(PROMPT),
            speculation=Told(truth, split),
        )  # fmt: skip
        assert list(rest) == whole[split:]


def test_the_distribution_is_the_models():
    """Chi-square of the third id over 2,000 seeds against the exact probabilities, and the share of kept guesses."""
    vocab, prompt, n = 6, [1, 2, 3], 2000
    exact = np.zeros(vocab)
    weights = {}
    hot = Sampling(temperature=1.5, top_p=1.0, seed=0)

    @functools.cache
    def probabilities(*ids):
        x = MockModel(vocab_size=vocab).truth(ids).astype(np.float64) / 1.5
        return np.exp(x - x.max()) / np.exp(x - x.max()).sum()

    for a in range(vocab):
        for b in range(vocab):
            weights[a, b] = probabilities(*prompt)[a] * probabilities(*prompt, a)[b]
            exact += weights[a, b] * probabilities(*prompt, a, b)
    assert exact.max() < 0.8  # there is something to test

    class Likely:
        def guess(self, ids, most, cancel):
            return [int(probabilities(*ids.tolist()).argmax())][:most]

        def timed(self, work):
            return work()

        def verified(self, accepted):
            tries.append(accepted)

        def close(self):
            pass

    tries: list[int] = []
    counts = np.zeros(vocab)
    guesser = Likely()
    for seed in range(n):
        sampling = Sampling(temperature=hot.temperature, top_p=1.0, seed=seed)
        model = MockModel(vocab_size=vocab)
        answer = list(generate_ids(model, prompt, sampling=sampling, max_tokens=3, speculation=guesser))
        counts[answer[2].id] += 1
    chi_square = ((counts - n * exact) ** 2 / (n * exact)).sum()
    assert chi_square < 20.5  # 5 degrees of freedom: one in a thousand is above
    assert sum(tries) > n / 4


# what to guess


def naive_lookup(ids, count):
    """Longest match of the end of `ids` that ends earlier; the latest of equals, of the latest places of a pair."""
    best, start = 0, 0
    ends = [end for end in range(2, len(ids)) if ids[end - 2 : end] == ids[-2:]]
    for end in ends[-8:]:
        same = common_prefix(ids[:end][::-1][:16], ids[::-1])
        if same >= max(best, 2):
            best, start = same, end
    out = list(ids)
    for at in range(count):
        out.append(out[start + at])
    return min(best, KINDS), out[len(ids) :]


@pytest.mark.parametrize("seed", range(20))
def test_lookup_is_the_naive_one(seed):
    rng = np.random.RandomState(seed)
    ids, lookup = rng.randint(0, 3 + seed % 3, 60).tolist(), Lookup()
    for end in range(1, len(ids)):
        kind = lookup.kind(np.array(ids[:end]))
        expected = naive_lookup(ids[:end], 9)
        assert kind == expected[0]
        if kind:
            assert lookup.guess(9) == expected[1]


def test_costs():
    costs = Costs()
    assert costs(4) == 0 == costs.plain
    for seconds in (1.0, 50.0, 1.2):
        costs.add(1, seconds)
    assert costs.plain == 1.2 == costs(1)
    assert costs(1) < costs(2) < costs(9)  # a guess, before it is measured
    costs.add(3, 2.0)
    assert costs(2) == pytest.approx(1.6)
    assert costs(3) == 2.0


@pytest.mark.parametrize(("share", "cost", "least"), [(0, 0, 0.97), (0.3, 0, 0.97), (0.9, 0.9, 0.97), (1, 0.1, 1.6)])
def test_never_slower(share, cost, least):
    """Whatever the guesses are worth: time beside that of plain decoding; good guesses grow long by themselves."""
    n = 300
    plain = MockModel(context=512)
    truth = [*PROMPT, *(step.id for step in steps(plain, sampling=SAMPLINGS["greedy"], max_tokens=n))]
    model = MockModel(context=512, chunk=32)
    speculator = Speculator(lookup=False, draft=None, clock=Clock(model))
    source = Always(truth, share, cost)
    speculation = Speculation(speculator, [source])
    spent = 0.0
    guess = source.guess

    def counted(count, cancel):
        nonlocal spent
        spent += source.seconds(count)
        return guess(count, cancel)

    source.guess = counted
    answer = steps(model, speculation, sampling=SAMPLINGS["greedy"], max_tokens=n)
    assert [step.id for step in answer] == truth[len(PROMPT) :]
    time = speculator.clock() + spent - (len(PROMPT) * 0.3 + 0.7)
    assert (n - 1) / time > least
    assert time <= (1 + INCOME) * n + PURSE
    if share == 1:
        assert speculation.accepted == speculation.guessed > 0.75 * n
        assert max(count for _, count in model.passes[2:]) == MOST + 1


# with real kernels


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("large"), fmt="Q8_0")


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("draft"), n_layers=1, fmt="Q4_0", max_positions=100)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("how", ["lookup", "draft", "same", "both"])
def test_answers_are_those_without(tiny, draft, how, threads):
    """Greedy and sampled; texts that repeat and texts that do not; over page borders and past the draft's context."""
    path = {"draft": draft.gguf, "both": draft.gguf, "same": tiny.gguf}.get(how)
    speculate = "lookup" if how in ("lookup", "both") else None
    options = {"context": 256, "threads": threads}
    guessed = accepted = 0
    with (
        smolrun.load(tiny.gguf, **options) as plain,
        smolrun.load(tiny.gguf, speculate=speculate, draft=path, **options) as llm,
    ):
        for text, sampling in itertools.product(("a b a b a b a b a", "Once upon a time"), SAMPLINGS.values()):
            expected = plain.generate(text, max_tokens=120, sampling=sampling, ignore_eos=True)
            answer = llm.generate(text, max_tokens=120, sampling=sampling, ignore_eos=True)
            assert (answer.ids, answer.logprobs, answer.top) == (expected.ids, expected.logprobs, expected.top)
            assert (answer.text, answer.finish_reason) == (expected.text, expected.finish_reason)
            assert answer.timings.decode_tokens == 119
            guessed += answer.timings.guessed_tokens
            accepted += answer.timings.accepted_tokens
            assert expected.timings.guessed_tokens == 0
        assert guessed > 0
        assert accepted == guessed if how == "same" else accepted >= 0
        again = [*llm.tokenize("a b a b a b a b a"), *answer.ids]
        assert np.array_equal(llm.logits(again), plain.logits(again))  # the cache holds no wrong guess


def test_the_draft_draws_with_the_same_random_numbers(tiny):
    """A draft that is the model itself is always right, when sampled too."""
    with smolrun.load(tiny.gguf, draft=tiny.gguf, context=256, threads=1) as llm:
        timings = llm.generate("Once", max_tokens=100, sampling=SAMPLINGS["warm"], ignore_eos=True).timings
    assert timings.accepted_tokens == timings.guessed_tokens > 0


def test_streams_that_take_turns(tiny, draft):
    with (
        smolrun.load(tiny.gguf, context=256, threads=1) as plain,
        smolrun.load(tiny.gguf, context=256, threads=1, speculate="lookup", draft=draft.gguf) as llm,
    ):
        options = {"max_tokens": 40, "sampling": SAMPLINGS["warm"], "ignore_eos": True}
        expected = plain.generate("a b a b a", **options).ids
        stream = llm.stream("a b a b a", **options)
        ids = [next(stream).id for _ in range(20)]
        assert llm.generate("a b a b a", **options).ids == expected
        assert [*ids, *(chunk.id for chunk in stream)] == expected


def test_a_draft_of_another_vocabulary_is_refused(tiny, tmp_path):
    fewer = make_tiny(tmp_path / "a", vocab_size=300)
    with pytest.raises(OptionError, match="300 ids, the model 333"):
        smolrun.load(tiny.gguf, draft=fewer.gguf, context=64)
    with pytest.raises(OptionError, match="speculate is 'draft', 'lookup' or None"):
        smolrun.load(tiny.gguf, speculate="draft")


def test_the_threads_are_shared(tiny, draft):
    """Two teams would spin against each other."""

    def count():
        return sum(thread.name.startswith("smolrun-") for thread in threading.enumerate())

    before = count()
    with smolrun.load(tiny.gguf, draft=draft.gguf, context=64, threads=2):
        assert count() == before + 1
    assert count() == before
