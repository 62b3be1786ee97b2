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
from smolrun.generate.speculate import (
    FEAR,
    INCOME,
    KINDS,
    MOST,
    PLAIN,
    PURSE,
    SAVINGS,
    Acceptance,
    Costs,
    Lookup,
    Median,
    Speculator,
)
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
    costs, median = Costs(), Median()
    assert not median
    for seconds in (50.0, 1.0, 1.2, 1.4, 60.0, 1.3):
        median.add(seconds)
    assert median.value == 1.3
    assert costs(1) == 1 < costs.hope[2] < costs.fear[2] == 1 + FEAR < costs(40)
    costs.add(3, 1.2)
    assert costs.hope[3] == costs.fear[3] == costs(3) == 1.2 < costs.hope[4] < costs.fear[4]
    costs.add(3, 9.0)  # disturbed
    assert costs(3) == 1.2
    costs.add(2, 9.0)
    assert costs(2) == 2  # two passes over one id are no dearer
    for count, passes in ((40, 4.0), (400, 40.0)):
        costs.add(count, passes)
    assert costs(100) == pytest.approx(10)


# how much to guess: the real controller, models without weights, a clock that only they move


N = 400
ONE = 0.003  # seconds of a plain pass


class Clock:
    """Seconds: as they should be, and as they are seen, with time slices that go to others."""

    def __init__(self, noise):
        self.true = self.seen = 0.0
        self.noise, self.random = noise, np.random.RandomState(1)

    def __call__(self):
        return self.seen

    def take(self, seconds):
        self.true += seconds
        late = 5 if self.random.rand() < 0.05 else 1 + 0.2 * self.random.rand()
        busy = 1.5 if self.true // (60 * ONE) % 2 else 1.0  # a neighbour comes and goes
        self.seen += seconds * {"quiet": 1, "noisy": late, "busy": busy}[self.noise]


class Timed(MockModel):
    """A pass takes `one`, and `more` for each id but the first; every id of a long one a tenth of `one`."""

    def __init__(self, clock, one, more, **options):
        super().__init__(**options)
        self.clock, self.one, self.more = clock, one, more

    def step(self, work):
        count = sum(len(ids) for _, ids in work)
        self.clock.take(self.one * (0.1 * count if count > 16 else 1 + self.more * (count - 1)))
        return super().step(work)


@functools.cache
def truth(prompt, n=N):
    plain = MockModel(context=1024, chunk=512)
    return [step.id for step in generate_ids(plain, prompt, max_tokens=n, sampling=SAMPLINGS["greedy"])]


def answers(share, draft, more, noise, prompts):
    """Of each prompt: plain passes that the answer took, its speculation; the ids of each pass until then."""
    clock = Clock(noise)
    large = Timed(clock, ONE, more, context=1024, chunk=512)
    small = Timed(clock, ONE * draft, 0.1, context=1024, chunk=512)
    speculator, random = Speculator(lookup=False, draft=small, clock=clock), np.random.RandomState(2)
    for prompt in prompts:
        expected = truth(prompt)
        shares = np.broadcast_to(share, (len(prompts), N))[prompts.index(prompt)]
        small.script = [id if random.rand() < p else id ^ 1 for id, p in zip(expected, shares, strict=True)]
        small.script_from = len(prompt)
        speculation = speculator.begin(SAMPLINGS["greedy"], len(prompt))
        found = generate_ids(large, prompt, max_tokens=N, sampling=SAMPLINGS["greedy"], speculation=speculation)
        ids, begin = [next(found).id], clock.true
        ids += [step.id for step in found]
        assert ids == expected
        yield (clock.true - begin) / ONE, speculation, [count for _, count in large.passes if count <= 16]


PROMPTS = [tuple(np.random.RandomState(seed).randint(0, 50, 20).tolist()) for seed in range(4)]
HALF = np.arange(N) < N // 2
SHARES = {
    "never": 0.0,
    "half": 0.5,
    "mostly": 0.9,
    "no longer": np.where(HALF, 0.9, 0),
    "some answers": np.array([[0.9], [0], [0], [0.9]]),
}


@pytest.mark.parametrize("noise", ["quiet", "noisy", "busy"])
@pytest.mark.parametrize("more", [0.1, 0.3])
@pytest.mark.parametrize("draft", [0.03, 0.1, 0.35, 1.0])
@pytest.mark.parametrize("name", SHARES)
def test_never_slower(name, draft, more, noise):
    """Whatever a draft costs, a further id costs, and however right it is: beside the time of plain decoding."""
    found = list(answers(SHARES[name], draft, more, noise, PROMPTS))
    for passes, *_ in found:
        assert N / passes >= 0.97
    assert sum(passes for passes, *_ in found) <= (1 + INCOME) * len(PROMPTS) * N + PURSE
    if noise == "busy":
        return  # giving up when a pass seems dear costs gains, and only these
    mean = len(PROMPTS) * N / sum(passes for passes, *_ in found)
    least = {
        ("mostly", 0.1): {0.03: 2.4, 0.1: 1.9},
        ("mostly", 0.3): {0.03: 1.5, 0.1: 1.35},
        ("half", 0.1): {0.03: 1.2},
    }
    assert mean >= least.get((name, more), {}).get(draft, 0.97)


@pytest.mark.parametrize("more", [0.1, 0.3])
def test_a_wrong_belief_costs_what_the_purse_holds(more, monkeypatch):
    """Guesses that are never right, and a controller that never learns it."""
    monkeypatch.setattr(Acceptance, "add", lambda *_: None)
    found = [passes for passes, *_ in answers(0, 0.03, more, "quiet", PROMPTS)]
    assert PURSE / 2 < found[0] - N < INCOME * N + PURSE
    assert sum(found) - N * len(found) < INCOME * N * len(found) + PURSE


def test_right_guesses_grow_long_and_plain_passes_stay():
    """A plain pass now and then is the measure of the others."""
    ((_, speculation, sizes),) = answers(1, 0.03, 0.05, "quiet", PROMPTS[:1])
    assert speculation.accepted == speculation.guessed > 0.75 * N
    assert max(sizes) == MOST + 1
    ((_, _, sizes),) = answers(1, 0.03, 0.9, "quiet", PROMPTS[:1])  # hardly worth it: short ones
    assert max(sizes) < MOST / 2 and len(sizes) > 3 * PLAIN
    assert all(1 in sizes[at : at + PLAIN + 1] for at in range(len(sizes) - PLAIN))


@pytest.mark.parametrize("share", [0, 1])
def test_a_reading_is_paid(share):
    """A long prompt is read once earlier answers have won its time, and never on a promise."""
    long = tuple(np.random.RandomState(9).randint(0, 50, 300).tolist())
    first = list(answers(share, 0.1, 0.1, "quiet", [long]))
    assert first[0][1].guessed == 0 and first[0][0] < N + PURSE
    # a tenth of 300 ids by a tenth of a pass: 3 passes
    (_, (passes, speculation, _)) = answers(share, 0.1, 0.1, "quiet", [PROMPTS[0], long])
    assert (speculation.guessed > 200) == bool(share)
    assert passes < (1 + INCOME) * N + SAVINGS


# with real kernels


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("large"), fmt="Q8_0")


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("draft"), n_layers=1, fmt="Q4_0", max_positions=100)


def by_passes(llm):
    """A clock that each pass of the large model moves, and hardly anything else: what is guessed no longer depends on
    the machine."""
    hidden, ticks, passes = llm._model.hidden, itertools.count(), itertools.count(1)
    now = 0

    def counted(*work):
        nonlocal now
        now = next(passes)
        return hidden(*work)

    llm._model.hidden = counted
    llm._speculator.clock = lambda: now + next(ticks) / 1000
    return llm


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
        by_passes(llm)
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
        timings = by_passes(llm).generate("Once", max_tokens=100, sampling=SAMPLINGS["warm"], ignore_eos=True).timings
    assert timings.accepted_tokens == timings.guessed_tokens > 80


def test_streams_that_take_turns(tiny, draft):
    with (
        smolrun.load(tiny.gguf, context=256, threads=1) as plain,
        smolrun.load(tiny.gguf, context=256, threads=1, speculate="lookup", draft=draft.gguf) as llm,
    ):
        by_passes(llm)
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
