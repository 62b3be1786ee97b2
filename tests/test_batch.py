"""Many answers in one pass: each is the one it gets alone, whatever goes on beside it."""

import itertools
import threading

import numpy as np
import pytest

import smolrun
from mock_model import MockModel
from smolrun.errors import ContextOverflow, ModelClosed, OptionError, TemplateError
from smolrun.generate.batch import Batch
from smolrun.generate.engine import Step, generate_ids
from smolrun.generate.sampler import Sampling
from smolrun.model.llama import Llama
from tiny import make_tiny

GREEDY = Sampling(temperature=0)
WARM = Sampling(temperature=2.0, top_p=0.95, repetition_penalty=1.1, frequency_penalty=0.2)
STEM = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]


def jobs(count, *, longest=40):
    """Prompts of many lengths, some with a common beginning, each with settings of its own."""
    rng = np.random.RandomState(count)
    for i in range(count):
        ids = rng.randint(0, 50, rng.randint(1, longest)).tolist()
        yield {
            "ids": STEM + ids if i % 3 == 0 else ids,
            "max_tokens": int(rng.choice([0, 1, 2, 9, 30])),
            "sampling": GREEDY if i % 2 else Sampling(**{**vars(WARM), "seed": i, "logprobs": i % 3}),
            "stop_ids": rng.randint(0, 50, 2).tolist(),
        }


def alone(model, job):
    """The steps that a prompt gets by itself."""
    fresh = MockModel(context=model.context, chunk=model.chunk)
    return list(generate_ids(fresh, **job))


def finish(batch, waiting=(), *, each=lambda: None):
    """Steps of all answers, in the order of their prompts."""
    waiting = iter(waiting)
    found = {seat: [] for seat in batch.seats}
    while True:
        while batch.wants_more and (job := next(waiting, None)) is not None:
            found[batch.add(**job)] = []
        if not batch.seats:
            return list(found.values())
        for event in batch.step():
            found[event.seat].append(event.step)
        each()


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_every_answer_is_the_one_it_gets_alone(size, chunk):
    model = MockModel(context=2048, chunk=chunk, segments=8)
    work = list(jobs(20))
    assert finish(Batch(model, size), work) == [alone(model, job) for job in work]
    assert not model.opened and min(2, size, chunk) <= max(model.sizes) <= min(size, chunk)


def test_a_small_cache_lets_the_youngest_give_way():
    """Nothing but the order of work changes, and the oldest is never thrown back."""
    model = MockModel(context=400, chunk=16, segments=4)
    work = [{**job, "max_tokens": 200, "stop_ids": ()} for job in jobs(6)]
    batch, gave_way = Batch(model, 4), []
    give_way = batch._give_way
    batch._give_way = lambda seat: (gave_way.append((seat, batch.running[0])), give_way(seat))
    answers = finish(batch, work)
    assert answers == [alone(model, job) for job in work]
    assert gave_way and all(seat is not oldest for seat, oldest in gave_way)


def test_one_prompt_may_fill_the_context():
    model = MockModel(context=64, chunk=16, segments=4)
    work = [{"ids": STEM, "sampling": GREEDY}, {"ids": STEM[:5], "sampling": GREEDY}]
    answers = finish(Batch(model, 4), work)
    assert answers == [alone(model, job) for job in work]
    assert [answer[-1].finish_reason for answer in answers] == ["context", "context"]


def test_a_common_beginning_is_computed_once():
    model = MockModel(context=2048, chunk=8, segments=4)
    work = [{"ids": [*STEM, i], "sampling": GREEDY, "max_tokens": 1} for i in range(4)]
    answers = finish(Batch(model, 4), work)
    assert answers == [alone(model, job) for job in work]
    assert model.passes == [(0, 8), (8, 8), (16, 5), (20, 1), (20, 1), (20, 1)]
    assert model.sizes == [1, 1, 1, 3]


def test_answers_go_on_while_a_prompt_is_computed():
    model = MockModel(context=2048, chunk=8, segments=4)
    batch = Batch(model, 4)
    first = batch.add([7], sampling=GREEDY)
    batch.step()
    batch.add(STEM, sampling=GREEDY)
    events = [event for _ in range(2) for event in batch.step()]
    assert [event.seat for event in events] == [first, first]  # an id a pass
    assert model.passes == [(0, 1), (1, 1), (0, 7), (2, 1), (7, 7)]
    batch.give_way()
    assert not model.opened


def test_giving_way_changes_nothing():
    model = MockModel(context=2048, chunk=16, segments=4)
    work = list(jobs(9))
    batch = Batch(model, 4)
    rounds = itertools.count()
    answers = finish(batch, work, each=lambda: next(rounds) % 5 == 2 and batch.give_way())
    assert answers == [alone(model, job) for job in work]


def test_an_error_ends_its_own_answer_only():
    model = MockModel(context=2048, chunk=16, segments=4)
    good = {"ids": STEM, "sampling": GREEDY, "max_tokens": 5}
    bad = {**good, "sampling": Sampling(logit_bias={50: 1.0})}
    answers = finish(Batch(model, 4), [good, bad, good])
    assert answers[0] == answers[2] == alone(model, good)
    assert isinstance(answers[1][0], OptionError) and len(answers[1]) == 1
    batch = Batch(model, 4)
    with pytest.raises(ContextOverflow):
        batch.add([1] * 2048, sampling=GREEDY)
    assert not batch.seats and not model.opened


def test_cancelled_in_a_pass():
    model, cancel = MockModel(context=2048, chunk=8, segments=4), threading.Event()
    batch = Batch(model, 4)
    seats = [batch.add([i] * 10, sampling=GREEDY) for i in range(6)]

    def on_pass():
        if len(model.sizes) == 2:
            cancel.set()
            assert model.word.wait(30)

    model.on_pass = on_pass
    batch.step(cancel)
    batch.step(cancel)
    events = batch.step(cancel)
    assert [(event.seat, event.step) for event in events] == [(s, Step(None, finish_reason="cancelled")) for s in seats]
    assert not batch.seats and not model.opened and len(model.sizes) == 2
    assert not [thread for thread in threading.enumerate() if thread.name == "smolrun-cancel"]


@pytest.mark.parametrize("size", [0, 5])
def test_sizes_that_are_refused(size):
    with pytest.raises(OptionError, match="1 to 4"):
        Batch(MockModel(segments=4), size)


# ---- text, and real kernels ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("batch"), fmt="Q4_0")


PROMPTS = [
    "Once upon a time",
    [17 + i % 200 for i in range(130)],
    [{"role": "user", "content": "Hi"}],
    "x",
    [{"role": "system", "content": "Be brief. " * 30}, {"role": "user", "content": "Why?"}],
    [{"role": "system", "content": "Be brief. " * 30}, {"role": "user", "content": "How?"}],
    "Once upon a time there was",
]


def one_by_one(llm, prompts, samplings, **options):
    """generate or chat of each; `None` where it is refused."""
    for prompt, sampling in zip(prompts, samplings, strict=True):
        talks = isinstance(prompt, list) and isinstance(prompt[0], dict)
        yield (llm.chat if talks else llm.generate)(prompt, sampling=sampling, **options)


def essence(answer):
    return answer.text, answer.ids, answer.finish_reason, answer.seed, answer.logprobs


@pytest.mark.parametrize("kv", ["f16", "f32"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_real_answers_are_those_of_generate(threads, kv, tiny):
    samplings = [Sampling(temperature=t, seed=i) for i, t in enumerate([0.0, 1.0, 0.0, 2.0, 1.0, 0.5, 1.5])]
    options = {"max_tokens": 40, "ignore_eos": True}
    with smolrun.load(tiny.gguf, context=512, threads=1, kv=kv) as llm:
        options["stop"] = [answer.text[9:14] for answer in one_by_one(llm, PROMPTS[3:5], samplings[3:5], **options)]
        alone = [essence(answer) for answer in one_by_one(llm, PROMPTS, samplings, **options)]
    assert {"length", "stop_string"} <= {answer[2] for answer in alone}
    with smolrun.load(tiny.gguf, context=512, threads=threads, kv=kv) as llm:
        for size in (2, 8):
            answers = llm.batch(PROMPTS, sampling=samplings, max_batch=size, **options)
            assert [essence(answer) for answer in answers] == alone
        assert llm.batch([]) == []


@pytest.fixture(scope="module")
def llm(tiny):
    with smolrun.load(tiny.gguf, context=256, threads=1) as llm:
        yield llm


def test_a_prompt_that_cannot_be_answered_does_not_stop_the_others(llm):
    prompts = ["abc", [5] * 256, "", [999999], [{"role": "king", "content": 7}], 3.5, "\ud800", "abc"]
    answers = llm.batch(prompts, max_tokens=3, sampling=GREEDY, ignore_eos=True)
    assert [answer.finish_reason for answer in answers] == ["length", *["error"] * 6, "length"]
    assert answers[0].ids == answers[-1].ids == llm.generate("abc", max_tokens=3, sampling=GREEDY, ignore_eos=True).ids
    assert isinstance(answers[1].error, ContextOverflow) and answers[1].error.needed == 257
    assert isinstance(answers[4].error, TemplateError)
    assert answers[0].error is None and all(answer.text == "" for answer in answers[1:-1])


def test_prompts_are_read_as_answers_end(llm):
    """A hundred prompts from a generator, never more than the batch of them begun."""
    ended, texts = set(), {}

    def prompts():
        for i in range(100):
            yield [5 + i, 7]
            assert i - len(ended) < 4 + 4  # those of the last pass are told one after the other

    for index, chunk in llm.batch(prompts(), max_tokens=4, sampling=GREEDY, max_batch=4, stream=True):
        texts[index] = texts.get(index, "") + chunk.text
        if chunk.finish_reason is not None:
            ended.add(index)
            assert chunk.timings.prompt_tokens == 2
    assert len(texts) == 100
    for i in (0, 50, 99):
        assert texts[i] == llm.generate([5 + i, 7], max_tokens=4, sampling=GREEDY).text


def test_timings_of_a_batch(llm):
    shared = [9] * 100
    answers = llm.batch([[*shared, i] for i in range(3)], max_tokens=5, sampling=GREEDY, ignore_eos=True)
    for answer in answers:
        timings = answer.timings
        assert (timings.prompt_tokens, timings.decode_tokens) == (101, 4)
        assert timings.decode_seconds > 0 and timings.prefill_seconds > 0 and timings.first_token_seconds > 0
    assert [answer.timings.cached_tokens for answer in answers[1:]] == [100, 100]


def test_an_answer_of_a_batch_is_known_to_the_next_turn(llm):
    messages = [{"role": "user", "content": "Hi"}]
    options = {"max_tokens": 6, "ignore_eos": True}
    (answer,) = llm.batch([messages], sampling=Sampling(temperature=2.0, seed=5), **options)
    messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "And?"}]
    again = llm.chat(messages, **options)
    assert again.timings.cached_tokens >= answer.timings.prompt_tokens + len(answer.ids) - 1


def test_a_batch_left_early_lets_others_in(llm):
    chunks = llm.batch([[5], [6], [7]], max_tokens=50, stream=True, ignore_eos=True)
    _, chunk = next(chunks)
    assert chunk.finish_reason is None
    expected = llm.generate("abc", max_tokens=3, sampling=GREEDY).ids  # the batch rests, so it gives way
    next(chunks)
    chunks.close()
    assert llm.generate("abc", max_tokens=3, sampling=GREEDY).ids == expected


def test_a_batch_is_cancelled(llm):
    cancel, seen = threading.Event(), []
    for index, chunk in llm.batch(
        [[i] for i in range(5, 12)], stream=True, max_batch=2, ignore_eos=True, cancel=cancel
    ):
        seen.append((index, chunk.finish_reason))
        if len(seen) == 6:
            cancel.set()
    assert sorted(index for index, reason in seen if reason == "cancelled") == list(range(7))


def test_options_of_a_batch_that_are_refused(llm):
    for prompts, options, message in (
        ("abc", {}, "a list of prompts"),
        (["abc"], {"max_batch": 33}, "1 to 32"),
        (["abc"], {"sampling": [GREEDY, GREEDY]}, "as many prompts"),
        (iter(["abc"]), {"sampling": [GREEDY]}, "as many prompts"),
        (["abc"], {"max_tokens": -1}, "max_tokens"),
        (["abc"], {"stop": [""]}, "stop"),
    ):
        with pytest.raises(OptionError, match=message):
            llm.batch(prompts, stream=True, **options)


def test_closed_during_a_batch(tiny):
    llm = smolrun.load(tiny.gguf, context=256, threads=2)
    chunks = llm.batch([[5], [6]], stream=True, ignore_eos=True)
    next(chunks)
    llm.close()
    with pytest.raises(ModelClosed):
        list(chunks)
    with pytest.raises(ModelClosed):
        llm.batch(["abc"])


def test_memory_does_not_grow_with_the_batch(llm):
    """Four pages for answers that need all of them: somebody gives way, and nothing else shows."""
    model = llm._model
    assert isinstance(model, Llama)
    prompts = [[i] * 60 for i in range(5, 11)]
    options = {"max_tokens": 150, "sampling": Sampling(temperature=1.0, seed=3), "ignore_eos": True}
    answers = llm.batch(prompts, max_batch=16, **options)
    assert model.cache._pages == model.cache.capacity == 4
    assert not any(slot.busy for slot in model.cache._slots)
    assert [answer.ids for answer in answers] == [llm.generate(ids, **options).ids for ids in prompts]
