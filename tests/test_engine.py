"""The loop from ids to ids, on a model whose every logit depends on all ids before it."""

import threading

import numpy as np
import pytest

from mock_model import MockModel
from smolrun.errors import ContextOverflow, ModelFileError, OptionError
from smolrun.generate.engine import generate_ids, logits_from
from smolrun.generate.sampler import Sampler, Sampling
from smolrun.model.llama import Cancelled

GREEDY = Sampling(temperature=0)
WARM = Sampling(temperature=2.0, top_p=0.95, repetition_penalty=1.1, frequency_penalty=0.2, seed=3)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]


def run(model, ids=PROMPT, **options):
    """(ids, finish reason) of an answer."""
    steps = list(generate_ids(model, ids, **{"sampling": GREEDY} | options))
    assert [step.finish_reason for step in steps[:-1]] == [None] * (len(steps) - 1)
    assert not model.opened
    return [step.id for step in steps], steps[-1].finish_reason


def truth(model, count, sampling=GREEDY, ids=PROMPT):
    """The answer by a fresh model for every id."""
    answer, sampler = [], Sampler(sampling)
    for _ in range(count):
        answer.append(sampler.sample(model.truth([*ids, *answer]), [*ids, *answer], len(ids)).id)
    return answer


@pytest.mark.parametrize("chunk", [1, 7, 20, 64])
@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
def test_the_answer_is_the_naive_one(chunk, sampling):
    model = MockModel(chunk=chunk)
    assert run(model, sampling=sampling, max_tokens=10) == (truth(model, 10, sampling), "length")


def test_a_cached_prefix_is_not_computed_again():
    model = MockModel(chunk=8)
    answer, _ = run(model, max_tokens=6)
    model.passes.clear()
    longer = [*PROMPT, *answer, 11, 12]
    assert run(model, longer, max_tokens=3) == (truth(model, 3, ids=longer), "length")
    assert model.passes == [(25, 3), (28, 1), (29, 1)]  # the last answer's last id was never computed
    model.passes.clear()
    other = [*PROMPT[:10], 0, 0, *PROMPT[12:]]
    assert run(model, other, max_tokens=1) == (truth(model, 1, ids=other), "length")
    assert model.passes == [(10, 8), (18, 2)]


def test_stop_ids():
    model = MockModel()
    answer = truth(model, 8)
    stop = answer[5]
    assert run(model, stop_ids={stop}, max_tokens=20) == (answer[: answer.index(stop) + 1], "stop")
    assert run(model, stop_ids=(), max_tokens=8) == (answer, "length")


def test_max_tokens():
    assert run(MockModel(), max_tokens=1) == (truth(MockModel(), 1), "length")
    model = MockModel(chunk=8)
    assert run(model, max_tokens=0) == ([None], "length")
    assert model.passes == [(0, 8), (8, 8), (16, 4)]  # the prompt is in the cache then


def test_the_end_of_the_context_is_told():
    model = MockModel(context=24)
    assert run(model, max_tokens=None) == (truth(model, 4), "context")
    assert run(model, max_tokens=5) == (truth(model, 4), "context")
    assert run(model, max_tokens=4) == (truth(model, 4), "length")
    assert max(first + n for first, n in model.passes) <= 24


@pytest.mark.parametrize("context", [19, 20])
def test_a_prompt_that_does_not_fit(context):
    with pytest.raises(ContextOverflow) as caught:
        generate_ids(MockModel(context=context), PROMPT, sampling=GREEDY)
    assert (caught.value.needed, caught.value.context) == (21, context)


@pytest.mark.parametrize(("ids", "message"), [([], "no ids"), ([1, 50], "id 50.*0 to 49"), ([-1, 3], "id -1")])
def test_prompts_that_are_none(ids, message):
    with pytest.raises(OptionError, match=message):
        generate_ids(MockModel(), ids, sampling=GREEDY)


def test_progress_counts_what_is_computed():
    model, seen = MockModel(chunk=8), []
    run(model, max_tokens=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 20), (8, 20), (16, 20), (20, 20)]
    seen.clear()
    run(model, [*PROMPT, 1], max_tokens=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 1), (1, 1)]


def test_an_answer_resumes_as_it_would_have_gone_on():
    whole, _ = run(MockModel(), sampling=WARM, max_tokens=12)
    for split in (1, 5, 11):
        rest = run(MockModel(), [*PROMPT, *whole[:split]], sampling=WARM, max_tokens=12, prompt_length=len(PROMPT))
        assert rest == (whole[split:], "length")


def test_log_probabilities_come_along():
    model = MockModel()
    steps = list(generate_ids(model, PROMPT, sampling=Sampling(temperature=0, logprobs=2), max_tokens=3))
    for step in steps:
        assert step.top[0] == (step.id, step.logprob)
        assert len(step.top) == 2


def test_cancelled_before_the_first_pass():
    model, cancel = MockModel(), threading.Event()
    cancel.set()
    assert run(model, cancel=cancel) == ([None], "cancelled")
    assert model.passes == []


def test_cancelled_between_chunks():
    model, cancel = MockModel(chunk=8), threading.Event()
    assert run(model, cancel=cancel, progress=lambda done, _: done == 8 and cancel.set()) == ([None], "cancelled")
    assert model.passes == [(0, 8)]
    cancel.clear()
    assert run(model, cancel=cancel, max_tokens=3) == (truth(model, 3), "length")  # the kept positions are right


def test_cancelled_inside_a_pass():
    """A native pass sees only the cancel word: somebody must set it while the pass runs."""
    model, cancel = MockModel(), threading.Event()

    def on_pass():
        cancel.set()
        assert model.word.wait(30)

    model.on_pass = on_pass
    assert run(model, cancel=cancel) == ([None], "cancelled")
    assert model.passes == []
    assert not [thread for thread in threading.enumerate() if thread.name == "smolrun-cancel"]


def test_cancelled_between_tokens():
    model, cancel = MockModel(), threading.Event()
    steps = generate_ids(model, PROMPT, sampling=GREEDY, cancel=cancel)
    ids = [next(steps).id, next(steps).id]
    count = len(model.passes)
    cancel.set()
    last = next(steps)
    assert (last.id, last.finish_reason) == (None, "cancelled")
    assert len(model.passes) == count
    assert ids == truth(model, 2)
    assert next(steps, None) is None
    assert not model.opened


def test_cancelled_by_the_model_itself():
    model = MockModel()
    model.on_pass = lambda: len(model.passes) == 4 and model.cancel()
    assert run(model, max_tokens=9) == ([*truth(model, 2), None], "cancelled")


def test_a_late_cancel_word_hurts_no_other_answer():
    model = MockModel(chunk=4)
    answer = truth(model, 5)
    late = {2, 6}  # passes that find the word of one before them

    def on_pass():
        if len(model.passes) in late:
            late.remove(len(model.passes))
            model.word.set()

    model.on_pass = on_pass
    assert run(model, max_tokens=5, cancel=threading.Event()) == (answer, "length")
    assert not late


def test_logits_may_be_cancelled_too(monkeypatch):
    model, cancel = MockModel(), threading.Event()

    def logits(hidden):
        cancel.set()
        raise Cancelled

    monkeypatch.setattr(model, "logits", logits)
    assert run(model, cancel=cancel) == ([None], "cancelled")


def test_the_slot_is_given_back_however_it_ends(monkeypatch):
    model = MockModel()
    steps = generate_ids(model, PROMPT, sampling=GREEDY)
    next(steps)
    assert model.opened
    steps.close()
    assert not model.opened

    with pytest.raises(KeyError):
        run(model, progress=lambda done, total: {}[done])
    assert not model.opened

    monkeypatch.setattr(model, "logits", lambda hidden: np.full((1, 50), np.nan, np.float32))
    with pytest.raises(ModelFileError):
        run(model)
    assert not model.opened


@pytest.mark.parametrize("first", [0, 7, 19])
def test_logits_of_positions(first):
    model = MockModel(chunk=8)
    run(model, PROMPT[:12], max_tokens=1)  # a cached prefix longer than `first` must not swallow rows
    parts = list(logits_from(model, PROMPT, first))
    assert not model.opened
    rows = {at + i: row for at, part in parts for i, row in enumerate(part)}
    assert sorted(rows) == list(range(first, 20))
    for position, row in rows.items():
        assert np.array_equal(row, model.truth(PROMPT[: position + 1]))
