"""The model: right against NumPy, the same bits by every way; cache, threads and processes that cannot spoil it."""

import gc
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import naive
from smolrun.errors import ContextOverflow, KernelError, ModelClosed, OptionError
from smolrun.files.checkpoint import open_checkpoint
from smolrun.kernels import load as kernels
from smolrun.kernels.target import runnable
from smolrun.model import memory
from smolrun.model.cache import CacheFull
from smolrun.model.llama import Cancelled, Llama
from tiny import Tiny, make_tiny

PROMPT = [1, 53, 230, 41, 17, 300, 99, 5, 2, 1, 86, 211, 260, 77, 299, 30, 18, 100]
Load = Callable[..., Llama]


def some_ids(n: int, seed: int = 0) -> list[int]:
    """n seeded ids below 300."""
    return np.random.RandomState(seed).randint(0, 300, n).tolist()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Grouped queries, tied, 333 ids, Q4_0 with a Q8_0 embedding."""
    return make_tiny(tmp_path_factory.mktemp("model"), fmt="Q4_0", embd_fmt="Q8_0")


@pytest.fixture
def load() -> Iterator[Load]:
    """Llama of a path; closed at the end of the test."""
    made = []

    def open_model(path: Path, **options: Any) -> Llama:
        with open_checkpoint(path) as checkpoint:
            made.append(Llama(checkpoint, **{"context": 1024, "threads": 1, "kv": "f32"} | options))
        return made[-1]

    yield open_model
    for model in made:
        model.close()


def hidden(model: Llama, ids: Sequence[int], *, reuse: bool = False, step: int | None = None) -> np.ndarray:
    """States of all ids, or with `reuse` of those that the cache lacks; `step` ids a pass."""
    slot = model.open(ids)
    try:
        if not reuse:
            slot.truncate(0)
        parts = []
        while slot.length < len(ids):
            parts.append(model.hidden(slot, ids[slot.length : slot.length + (step or model.chunk)]))
        return np.concatenate(parts)
    finally:
        slot.close()


def greedy(model: Llama, ids: Sequence[int], count: int) -> list[int]:
    """The answer of `count` ids, the lowest id on ties."""
    slot, found = model.open(ids), []
    state = model.hidden(slot, ids[slot.length :])[-1:]
    for _ in range(count):
        found.append(int(model.logits(state)[0].argmax()))
        state = model.hidden(slot, found[-1:])
    slot.close()
    return found


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bits."""
    return a.shape == b.shape and a.tobytes() == b.tobytes()


# ---- right -----------------------------------------------------------------------------------------------------------

K_QUANTS: dict[str, Any] = {"dim": 256, "hidden_dim": 512, "n_layers": 1}
VARIANTS: dict[str, dict[str, Any]] = {  # the mixed ones have their formats where llama.cpp puts them
    "f32": {},
    "f16_untied_mha": {"fmt": "F16", "tied": False, "gqa": False},
    "bf16_padded": {"fmt": "BF16", "vocab_size": 401},
    "q4_0": {"fmt": "Q4_0"},
    "q4_1_q8_0_untied": {"fmt": "Q4_1", "embd_fmt": "Q8_0", "tied": False, "vocab_size": 300},
    "q8_0_mha": {"fmt": "Q8_0", "gqa": False, "dim": 128},
    "q6_k": {"fmt": "Q6_K", **K_QUANTS},
    "q4_k_m": {"fmt": "Q4_K", "embd_fmt": "Q6_K", "mix": {"attn_v": "Q6_K", "ffn_down": "Q6_K"}, **K_QUANTS},
    "q5_k_m": {"fmt": "Q5_K", "embd_fmt": "Q6_K", "mix": {"attn_v": "Q6_K", "ffn_down": "Q5_0"}, **K_QUANTS},
    "q3_k_m": {"fmt": "Q3_K", "embd_fmt": "Q6_K", "mix": {"attn_v": "Q5_K", "attn_output": "Q4_K"}, **K_QUANTS},
    "q2_k": {"fmt": "Q2_K", "embd_fmt": "Q4_K", "mix": {"attn_v": "Q4_K", "ffn_down": "Q3_K"}, **K_QUANTS},
    "q2_k_rows_q3_k_head": {
        "fmt": "Q8_0",
        "embd_fmt": "Q3_K",
        "tied": False,
        "mix": {"token_embd": "Q2_K"},
        **K_QUANTS,
    },
    "iq4_xs": {"fmt": "IQ4_XS", "mix": {"attn_v": "Q5_K", "ffn_down": "IQ4_NL"}, **K_QUANTS},
    "iq4_nl_group_of_9": {"fmt": "IQ4_NL", "mix": {"ffn_down": "Q5_1"}, "dim": 576, "hidden_dim": 160, "n_layers": 1},
    "one_head": {"fmt": "Q8_0", "dim": 64, "hidden_dim": 96},
    "group_of_9": {"fmt": "Q4_0", "dim": 576, "hidden_dim": 160, "n_layers": 1},
}

# precision -> largest error of a logit as a part of their standard deviation; the KV cache is f32, or f16
LOGIT_BUDGET = {("f32", "f32"): 4e-5, ("exact", "f32"): 2e-3, ("exact", "f16"): 4e-2, ("fast", "f16"): 0.5}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_naive_model(variant: str, tmp_path: Path, load: Load) -> None:
    made = make_tiny(tmp_path, **VARIANTS[variant])
    ids = some_ids(70)
    truth = naive.forward(made.config, made.weights, ids)
    for (precision, kv), budget in LOGIT_BUDGET.items():
        model = load(made.gguf, precision=precision, kv=kv)
        found = model.logits(hidden(model, ids))
        assert found.shape == truth.shape
        error = np.abs(found - truth).max() / truth.std()
        assert error <= (budget if variant.startswith(("q", "iq")) or precision == "f32" or kv == "f16" else 2e-3), (
            precision,
            kv,
        )
        model.close()


def test_a_long_context_is_that_of_the_naive_model(tiny: Tiny, load: Load) -> None:
    """More than two spans of 512 positions, by prefill and by single tokens."""
    ids = some_ids(1100)
    truth = naive.forward(tiny.config, tiny.weights, ids)
    model = load(tiny.gguf, context=1100, precision="f32")
    found = hidden(model, ids[:1060])
    single = hidden(model, ids, reuse=True, step=1)
    assert len(single) == 40
    logits = model.logits(np.concatenate([found, single]))
    assert np.abs(logits - truth).max() <= 1e-4 * truth.std()


KV_KINDS = ("f32", "f16", "bf16", "q8_0", "q4_0")
KV_PAIRS = (
    "q4_0,q8_0",
    "q8_0,bf16",
    "bf16,q4_0",
)  # those that other tests do not use, on both sides


@pytest.mark.parametrize("kv", KV_PAIRS)
def test_cache_elements_are_those_of_the_naive_model(kv: str, tmp_path: Path, load: Load) -> None:
    """Rounded as the truth rounds them, in one layer: a tie that falls the other way would spread through the next."""
    made = make_tiny(tmp_path, fmt="Q4_0", embd_fmt="Q8_0", n_layers=1)
    ids = some_ids(560)
    k, v = kv.split(",")
    model = load(made.gguf, precision="f32", kv=kv)
    found = model.logits(hidden(model, ids))

    def error(kv: tuple[str, str]) -> float:
        truth = naive.forward(made.config, made.weights, ids, kv)
        return float(np.median(np.abs(found - truth).max(axis=1)) / truth.std())

    budget = 4e-4 if v in ("q8_0", "q4_0") else 2e-5  # weights of a quantised V are rounded to i16
    assert error((k, v)) <= budget
    for other in ((k, "f32"), ("f32", v)):  # the budget tells the kinds apart
        assert error(other) > 2 * budget


def test_cache_elements_take_the_memory_they_say(tiny: Tiny) -> None:
    sizes = {}
    for kind in KV_KINDS:
        sizes[kind] = memory.page_bytes(tiny.config, kind)
        k, v = memory.head_bytes(f"{kind},f16")
        assert sizes[kind] == tiny.config.n_layers * tiny.config.n_kv_heads * 2 * k and v == 64 * 64 * 2
    assert [64 * sizes[kind] // sizes["f16"] for kind in KV_KINDS] == [128, 64, 64, 34, 18]


# precision (and cache) -> greedy ids and a hash of the logits: on every tier, thread count and operating system
# fmt: off
GOLDEN: dict[str, tuple[list[int], str]] = {
    "fast": ([104, 104, 104, 185, 13, 250, 321, 104, 300, 38, 195, 103, 196, 13, 148, 53, 69, 69, 69, 69, 69, 69],
             "3fed0c086bd109bb"),
    "exact": ([104, 104, 104, 185, 104, 185, 219, 22, 152, 110, 156, 125, 184, 304, 217, 43, 81, 90, 265, 63, 248, 247],
              "16cfc58b6c7cd7f6"),
    "f32": ([104, 104, 104, 185, 104, 185, 219, 22, 152, 110, 156, 125, 184, 304, 217, 43, 81, 90, 265, 63, 248, 247],
            "572ba1577f762a88"),
    "fast q4_0,q8_0": (
        [104, 10, 100, 35, 203, 240, 240, 240, 240, 113, 162, 104, 46, 214, 268, 230, 152, 129, 263, 263, 259, 179],
        "b9b7ebe61c841ba5"),
}
# fmt: on


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("tier", [t.name for t in runnable()])
@pytest.mark.usefixtures("compiled")
def test_golden(tier: str, case: str, tiny: Tiny, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOLRUN_TIER", tier)
    precision, _, kv = case.partition(" ")
    model = load(tiny.gguf, precision=precision, kv=kv or "f16")
    assert model.tier.name == tier
    ids, digest = GOLDEN[case]
    logits = model.logits(hidden(model, PROMPT))
    assert greedy(model, PROMPT, len(ids)) == ids
    assert hashlib.sha256(logits.astype("<f4").tobytes()).hexdigest()[:16] == digest


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "kv"),
    [*((p, kv) for p in ("fast", "exact", "f32") for kv in ("f16", "f32")), *(("fast", kv) for kv in KV_PAIRS)],
)
def test_bits_do_not_depend_on_the_way(precision: str, kv: str, tiny: Tiny, load: Load) -> None:
    """Prefill, chunks, single tokens, threads and a reused prefix."""
    ids = some_ids(600)
    base = load(tiny.gguf, precision=precision, kv=kv)
    states = hidden(base, ids)
    for chunk in (1, 7, 64, 100, 513):
        n = len(ids) if chunk > 7 else 80
        model = load(tiny.gguf, precision=precision, kv=kv, chunk=chunk)
        assert same(hidden(model, ids[:n]), states[:n]), f"chunk {chunk}"
        model.close()
    for threads in (2, 3, 5, 16):  # up to five, long passes are shared out by tokens
        model = load(tiny.gguf, precision=precision, kv=kv, threads=threads)
        assert same(hidden(model, ids), states), f"{threads} threads"
        assert same(hidden(model, ids[:300], step=41), states[:300]), f"{threads} threads, pieces"
        slot = model.open(ids)
        slot.truncate(490)
        for i in range(490, 530):  # over the borders of page and span
            assert same(model.hidden(slot, [ids[i]]), states[i : i + 1]), f"{threads} threads, position {i}"
        slot.close()
        assert same(model.logits(states[-40:]), base.logits(states[-40:]))
        model.close()
    other = some_ids(80, seed=1)
    for keep in (1, 63, 64, 65, 511, 512, 513, 599):
        mixed = ids[:keep] + other
        assert same(hidden(base, mixed, reuse=True)[-1:], hidden(base, mixed)[-1:]), f"prefix {keep}"
    assert same(hidden(base, ids, reuse=True)[-1:], states[-1:])


@pytest.mark.parametrize("kv", ["f16", "f32"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_what_else_is_in_the_pass(threads: int, kv: str, tiny: Tiny, load: Load) -> None:
    """Single tokens and chunks of sequences before, at and behind the borders of pages and spans, in any order."""
    model, alone = load(tiny.gguf, kv=kv, threads=threads, context=2048), load(tiny.gguf, kv=kv)
    prompts = [some_ids(n, seed=n) for n in (1, 2, 63, 130, 513, 700)]
    prompts.append(prompts[-1][:600] + some_ids(30, seed=9))  # shares pages with its neighbour
    truth = [hidden(alone, ids) for ids in prompts]
    done: list[list[np.ndarray]] = [[] for _ in prompts]
    slots = [model.open([ids[0]]) for ids in prompts]
    rng = np.random.RandomState(0)
    while any(slot.length < len(ids) for slot, ids in zip(slots, prompts, strict=True)):
        work, left = [], model.chunk
        if slots[-1].length == 0 and slots[-2].length > 600:
            slots[-1].close()
            slots[-1] = model.open(prompts[-1])
            assert slots[-1].length == 600 and slots[-1].pages[:9] == slots[-2].pages[:9]
            done[-1] = [truth[-1][:600]]
        for i in rng.permutation(len(prompts)):
            slot, ids = slots[i], prompts[i]
            if i == len(prompts) - 1 and slots[-2].length <= 600:
                continue
            n = min(int(rng.choice([1, 1, 2, 9, 100])), len(ids) - slot.length, left)
            if n:
                work.append((i, slot, ids[slot.length : slot.length + n]))
                left -= n
        states = model.step([(slot, ids) for _, slot, ids in work])
        for i, _, ids in work:
            done[i].append(states[: len(ids)])
            states = states[len(ids) :]
    for i, parts in enumerate(done):
        assert same(np.concatenate(parts), truth[i]), f"sequence {i}"


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_rows_that_nobody_wants_are_left_out(threads: int, kv: str, tiny: Tiny, load: Load) -> None:
    ids = some_ids(700)
    expected = hidden(load(tiny.gguf, kv=kv), ids)
    model = load(tiny.gguf, kv=kv, threads=threads)
    for rows in (0, 1, 2, 70, 183):
        slot = model.open(ids)
        slot.truncate(0)
        while slot.length < 512:
            assert model.hidden(slot, ids[slot.length :][: model.chunk], 0).shape == (0, model.config.dim)
        found = model.hidden(slot, ids[512:-5], rows)
        assert same(found, expected[695 - rows : 695]), rows
        assert same(model.hidden(slot, ids[-5:], 9), expected[-5:]), rows
        slot.close()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_single_tokens_that_nobody_wants_are_kept(threads: int, kv: str, tiny: Tiny, load: Load) -> None:
    """Alone and beside other sequences' single tokens: their keys and values are stored in the last layer, too."""
    ids = some_ids(80)
    expected = hidden(load(tiny.gguf, kv=kv), ids)
    model = load(tiny.gguf, kv=kv, threads=threads)
    slots = [model.open(ids) for _ in range(2)]
    for i in ids[:5]:
        assert not model.hidden(slots[0], [i], 0).size
    for i in ids[5:70]:
        model.step([(slots[0], [i]), (slots[1], [ids[slots[1].length]])])
    assert same(model.hidden(slots[0], ids[70:]), expected[70:])
    assert same(model.hidden(slots[1], ids[65:]), expected[65:])


def test_a_cancelled_pass_leaves_every_slot_as_it_was(tiny: Tiny, load: Load) -> None:
    model = load(tiny.gguf, threads=2)
    slots = [model.open(PROMPT[:n]) for n in (3, 5, 7)]
    work = [(slot, PROMPT[:n]) for slot, n in zip(slots, (3, 5, 7), strict=True)]
    model.cancel()
    with pytest.raises(Cancelled):
        model.step(work)
    assert [slot.length for slot in slots] == [0, 0, 0]
    assert same(model.step(work)[3:8], hidden(load(tiny.gguf), PROMPT[:5]))


def test_passes_that_are_refused(tiny: Tiny, load: Load) -> None:
    model = load(tiny.gguf, chunk=64, context=256)
    slots = [model.open([1]) for _ in range(model.segments + 1)]
    for work, message in (
        ([], "0 ids"),
        ([(slots[0], [1]), (slots[1], [])], "at least one"),
        ([(slots[0], [1] * 60), (slots[1], [1] * 5)], "65 ids"),
        ([(slots[0], [1]), (slots[0], [1])], "all different"),
        ([(slot, [1]) for slot in slots], rf"33 slots.*{model.segments}"),
    ):
        with pytest.raises(OptionError, match=message):
            model.step(work)
    model.step([(slot, [1]) for slot in slots[:4]])
    for slot in slots[:4]:
        model.hidden(slot, [1] * 63)
    before = [slot.ids for slot in slots]
    with pytest.raises(CacheFull, match="256 positions"):  # every slot would need a second page
        model.step([(slot, [1]) for slot in slots[:4]])
    assert [slot.ids for slot in slots] == before and model.room == 0


def test_rows_of_logits_do_not_depend_on_each_other(tiny: Tiny, load: Load) -> None:
    model = load(tiny.gguf, chunk=8)  # smaller than a pass of the classifier
    states = hidden(model, some_ids(61))
    whole = model.logits(states)
    assert whole.shape == (61, tiny.config.vocab_size)
    for i in (0, 1, 7, 8, 27, 28, 60):
        assert same(model.logits(states[i]), whole[i : i + 1])
    assert same(model.logits(states[20:50]), whole[20:50])


@pytest.mark.parametrize("fmt", ["F32", "F16", "BF16", "Q4_0"])
def test_both_roads_give_the_same_logits(fmt: str, tmp_path: Path, load: Load) -> None:
    """GGUF with permuted rows, safetensors with half-split ones; a quantised format's folder holds its F32 weights."""
    made = make_tiny(tmp_path, fmt=fmt, tied=False)
    a, b = load(made.gguf, precision="f32"), load(made.folder, precision="f32")
    assert same(a.logits(hidden(a, PROMPT)), b.logits(hidden(b, PROMPT)))


@pytest.mark.parametrize("fmt", ["Q4_0", "Q4_1", "Q8_0"])
def test_quantised_at_load_is_the_quantised_file(fmt: str, tmp_path: Path, load: Load) -> None:
    plain = make_tiny(tmp_path / "plain", fmt="F32")
    file = make_tiny(tmp_path / "file", fmt=fmt)
    a, b = load(file.gguf), load(plain.folder, quantize=fmt.lower())
    assert a.formats == b.formats == [fmt]
    assert same(a.logits(hidden(a, PROMPT)), b.logits(hidden(b, PROMPT)))


def test_ids_of_any_integer_kind(tiny: Tiny, load: Load) -> None:
    model = load(tiny.gguf)
    expected = hidden(model, PROMPT)
    for kind in (np.int32, np.uint16, np.int64):
        array = np.array(PROMPT, kind)
        slot = model.open(array)
        slot.truncate(0)
        assert same(model.hidden(slot, array), expected)
        assert slot.ids == PROMPT and all(type(i) is int for i in slot.ids)
        slot.close()


# ---- the cache -------------------------------------------------------------------------------------------------------


def pages_of(model: Llama) -> int:
    """Different pages that the open and idle slots hold."""
    return len({id(page) for slot in model.cache._slots for page in slot.pages})


def test_two_chats_do_not_evict_each_other(tiny: Tiny, load: Load) -> None:
    model = load(tiny.gguf)
    chats = [some_ids(150, seed) for seed in (1, 2)]
    for _ in range(4):
        for chat in chats:
            hidden(model, chat, reuse=True)
            chat.extend(some_ids(30, len(chat)))
            slot = model.open(chat)
            assert slot.length == len(chat) - 30
            slot.close()


def test_the_last_id_is_always_computed_again(tiny: Tiny, load: Load) -> None:
    model = load(tiny.gguf)
    ids = some_ids(100)
    first = hidden(model, ids)
    for n in (100, 64, 65, 1):
        assert same(hidden(model, ids[:n], reuse=True), first[n - 1 : n])


def test_shared_pages_survive_a_fork(tiny: Tiny, load: Load) -> None:
    """A prompt that leaves another's way in the middle of a page, and both go on in turns."""
    model, fresh = load(tiny.gguf), load(tiny.gguf)
    stem = some_ids(200)
    ways = [stem + some_ids(20, seed) for seed in (1, 2, 3)]
    pages = []
    for way, known in zip(ways, (0, 200, 200), strict=True):
        slot = model.open(way)
        assert slot.length == known
        before = [id(page) for page in slot.pages]
        model.hidden(slot, way[known:])
        pages.append([id(page) for page in slot.pages])
        if known:  # whole pages are shared, the last one is copied as soon as it is written
            assert before[:3] == pages[-1][:3] and before[3] != pages[-1][3]
        slot.close()
    assert len({p[2] for p in pages}) == 1 and len({p[3] for p in pages}) == 3
    bent = stem[:130] + some_ids(40, 9)
    slot = model.open(ways[1] + [7])
    slot.truncate(130)  # into a full page that the others read
    assert same(model.hidden(slot, bent[130:]), hidden(fresh, bent)[130:])
    slot.close()
    for way in (ways[2], ways[0], bent, ways[2]):
        more = [*way, 7]
        slot = model.open(more)
        assert slot.length == len(way)
        assert same(model.hidden(slot, [7]), hidden(fresh, more)[-1:])
        slot.close()


def test_any_order_of_prompts_gives_the_right_answer(tiny: Tiny, load: Load) -> None:
    """Seeded turmoil: forks, truncations, abandoned slots, evictions; a cache of 9 pages."""
    model, fresh = load(tiny.gguf, context=576, chunk=128), load(tiny.gguf, context=576)
    rng = np.random.RandomState(5)
    stems = [some_ids(500, seed) for seed in range(4)]
    truth = [hidden(fresh, stem) for stem in stems]
    held: list[Any] = []
    for turn in range(150):
        which, n = rng.randint(4), int(rng.randint(1, 500))
        slot = model.open(stems[which][:n])
        if rng.randint(4) == 0:
            slot.truncate(int(rng.randint(0, slot.length + 1)))
        while slot.length < n:
            try:
                last = model.hidden(slot, stems[which][slot.length : min(n, slot.length + 128)])
            except CacheFull:  # then a held one must go
                held.pop().close()
        assert same(last[-1:], truth[which][n - 1 : n]), turn
        if rng.randint(5) == 0 and len(held) < 2:
            held.append(slot)
        else:
            slot.close()
        if held and rng.randint(3) == 0:
            held.pop().close()
        assert pages_of(model) <= model.cache.capacity == 9


def test_a_prefix_is_taken_from_the_only_idle_slot(tiny: Tiny, load: Load) -> None:
    """All other slots are busy, and the one to fork from is the one to forget."""
    model, fresh = load(tiny.gguf), load(tiny.gguf)
    ids = some_ids(100)
    hidden(model, ids)
    busy = [model.open(some_ids(5, seed)) for seed in range(10, 17)]
    other = ids[:90] + [3] * 5
    slot = model.open(other)
    assert slot.length == 90
    assert same(model.hidden(slot, other[90:]), hidden(fresh, other)[90:])
    for s in [*busy, slot]:
        s.close()


def test_pages_stay_within_the_context(tiny: Tiny, load: Load) -> None:
    model = load(tiny.gguf, context=320)
    for seed in range(12):
        hidden(model, some_ids(150 + seed, seed))
        assert pages_of(model) + len(model.cache._free) <= 5
    full = some_ids(320)
    hidden(model, full)
    slot = model.open([*full, 1])
    assert slot.length == 320
    with pytest.raises(ContextOverflow) as error:
        model.hidden(slot, [1])
    assert (error.value.needed, error.value.context) == (321, 320)
    assert slot.length == 320
    slot.close()


@pytest.mark.parametrize("context", [1, 63, 65, 511, 513])
def test_contexts_that_are_no_multiple_of_anything(context: int, tiny: Tiny, load: Load) -> None:
    model, wide = load(tiny.gguf, context=context, threads=2), load(tiny.gguf)
    ids = some_ids(context)
    expected = hidden(wide, ids)
    assert same(hidden(model, ids), expected)
    slot = model.open(ids)
    assert same(model.hidden(slot, ids[-1:]), expected[-1:])
    with pytest.raises(ContextOverflow):
        model.hidden(slot, [1])


@pytest.mark.parametrize("ids", [[], [333], [-1], [0] * 9])
def test_ids_that_are_refused(ids: list[int], tiny: Tiny, load: Load) -> None:
    model = load(tiny.gguf, chunk=8)
    slot = model.open([1])
    with pytest.raises(OptionError):
        model.hidden(slot, ids)
    assert slot.length == 0
    assert len(model.hidden(slot, [332])) == 1


@pytest.mark.parametrize(
    "options",
    [{"precision": "best"}, {"kv": "q5_0"}, {"kv": ""}, {"kv": "F16"},
     {"kv": "q8_0,"}, {"kv": "f16,f16,f16"}, {"kv": 8},
     {"threads": 0}, {"threads": 257}, {"context": 0}, {"context": 4096},
     {"quantize": "q3"}, {"quantize": "q8_0"}],
)  # fmt: skip
def test_options_that_are_refused(options: dict[str, Any], tiny: Tiny, load: Load) -> None:
    with pytest.raises(OptionError):
        load(tiny.gguf, **options)


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_cancelled_from_another_thread(threads: int, tiny: Tiny, load: Load) -> None:
    model = load(tiny.gguf, threads=threads, chunk=1024, context=2048)
    ids = some_ids(900)
    expected = hidden(model, ids)
    slot = model.open([5])
    model.hidden(slot, [5])
    stop = threading.Event()

    def keep_cancelling() -> None:
        while not stop.wait(0.0005):
            model.cancel()

    canceller = threading.Thread(target=keep_cancelling)
    canceller.start()
    try:
        with pytest.raises(Cancelled):
            while True:  # a pass may end before its cancellation
                slot.truncate(1)
                model.hidden(slot, ids)
    finally:
        stop.set()
        canceller.join()
    assert slot.ids == [5]
    slot.close()
    assert same(hidden(model, ids), expected)
    slot = model.open([5, 6])
    assert slot.length == 1


def test_cancelled_before_the_pass(tiny: Tiny, load: Load) -> None:
    model = load(tiny.gguf, threads=2)
    slot = model.open(PROMPT)
    model.cancel()
    with pytest.raises(Cancelled):
        model.hidden(slot, PROMPT)
    assert slot.length == 0 and len(model.hidden(slot, PROMPT)) == len(PROMPT)


def tasks() -> int:
    """Threads of this process, as the system counts them; a joined thread may take a moment to vanish."""
    if sys.platform != "linux":
        return threading.active_count()
    counts = [-1]
    while len(counts) < 4 or len(set(counts[-4:])) > 1:
        counts.append(len(os.listdir("/proc/self/task")))
        time.sleep(0.005)
    return counts[-1]


def test_closing_joins_the_threads(tiny: Tiny, load: Load) -> None:
    before, known = tasks(), threading.enumerate()
    model = load(tiny.gguf, threads=5)
    assert tasks() == before + 4
    expected = hidden(model, PROMPT)
    model.close()
    model.close()
    assert tasks() == before and threading.enumerate() == known
    for call in (lambda: model.open(PROMPT), lambda: model.logits(expected)):
        with pytest.raises(ModelClosed):
            call()
    model.cancel()


@pytest.mark.parametrize("threads", [1, 3])
def test_closed_while_another_thread_computes(threads: int, tiny: Tiny, load: Load) -> None:
    """The pass ends, its caller is told, and nobody waits for a thread that has gone."""
    for _ in range(20):
        model = load(tiny.gguf, threads=threads, context=256)
        computing, ends = threading.Event(), []

        def compute(model: Llama = model, computing: threading.Event = computing, ends: list[Any] = ends) -> None:
            try:
                while True:
                    model.logits(hidden(model, PROMPT))
                    computing.set()
            except (Cancelled, ModelClosed) as error:
                ends.append(error)

        other = threading.Thread(target=compute)
        other.start()
        computing.wait()
        model.close()
        other.join(60)
        assert not other.is_alive() and len(ends) == 1


def test_a_forgotten_model_ends_its_threads(tiny: Tiny) -> None:
    before = tasks()
    with open_checkpoint(tiny.gguf) as checkpoint:
        model = Llama(checkpoint, context=128, threads=3)
    hidden(model, PROMPT)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and tasks() == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_fifty_models_leave_nothing(tiny: Tiny) -> None:
    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def one() -> int:
        with open_checkpoint(tiny.gguf) as checkpoint:
            model = Llama(checkpoint, context=1024, threads=3)
        hidden(model, some_ids(700))
        size = sum(array.nbytes for array in model._arena.arrays.values())
        model.close()
        return size

    for _ in range(5):
        size = one()
    before, threads = resident(), tasks()
    for _ in range(50):
        one()
    assert tasks() == threads
    assert resident() - before < 5 * size, "more than 5 of 50 models are still in memory"


# ---- processes -------------------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys, threading, time
from pathlib import Path
import numpy as np
from smolrun.kernels import load
from smolrun.files.checkpoint import open_checkpoint
from smolrun.model.llama import Llama

def model(**options):
    with open_checkpoint(Path(sys.argv[1])) as checkpoint:
        return Llama(checkpoint, **{"context": 1024, "threads": 2} | options)

def hidden(model, ids):
    slot = model.open(ids)
    try:
        slot.truncate(0)
        return np.concatenate([model.hidden(slot, ids[i : i + model.chunk]) for i in range(0, len(ids), model.chunk)])
    finally:
        slot.close()

def poison(*_):
    raise AssertionError("something was compiled")

IDS = [7 * i % 300 for i in range(300)]
"""


def run(body: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """SCRIPT and body in a process of their own; a hang ends in TimeoutExpired, a failure in its output."""
    command = [sys.executable, "-W", "error", "-c", SCRIPT + body, *map(str, arguments)]
    result = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("threads", [1, 3])
def test_a_forked_child_and_its_parent_do_not_disturb_each_other(threads: int, tiny: Tiny) -> None:
    body = f"""
m = model(threads={threads})
ways = [IDS, IDS[::-1]]
truth = [hidden(m, ids) for ids in ways]
pid = os.fork()
right = all(np.array_equal(hidden(m, ways[pid == 0]), truth[pid == 0]) for _ in range(25))
m.close()
if pid == 0:
    os._exit(0 if right else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "the child was wrong"
assert right, "the parent was wrong"
"""
    run(body, tiny.gguf)


def test_the_end_of_the_interpreter_is_clean(tiny: Tiny) -> None:
    """A model left open, also in the middle of a pass of a daemon thread."""
    assert run("m = model(threads=4)\nhidden(m, IDS)\n", tiny.gguf).stderr == ""
    body = """
m = model(threads=4)
started = threading.Event()
def forever():
    while True:
        hidden(m, IDS)
        started.set()
threading.Thread(target=forever, daemon=True).start()
started.wait()
"""
    run(body, tiny.gguf)


def test_passes_between_naps(tiny: Tiny) -> None:
    """Workers that are awake, asleep, or just falling asleep when a pass is posted."""
    body = """
m = model(threads=8, context=256)
slot = m.open([1])
want = m.hidden(slot, [1])
for i in range(300):
    time.sleep(i % 30 / 10_000)
    slot.truncate(0)
    assert np.array_equal(m.hidden(slot, [1]), want)
"""
    run(body, tiny.gguf)


def test_an_exception_anywhere_in_a_pass_leaves_the_team_whole(tiny: Tiny) -> None:
    """KeyboardInterrupt between any two instructions of Team.run."""
    body = """
m = model(threads=3)
want = hidden(m, IDS[:20])
count, target = 0, 0
def inside(frame, event, argument):
    global count
    frame.f_trace_opcodes = True
    if event == "opcode":
        count += 1
        if count == target:
            raise KeyboardInterrupt
    return inside
def calls(frame, event, argument):
    if frame.f_code.co_name == "run" and frame.f_code.co_filename.endswith("workers.py"):
        return inside
hit = 1
while hit:
    for nap in (0, 0.02):
        count, hit, target = 0, 0, target + 1
        time.sleep(nap)
        sys.settrace(calls)
        try:
            hidden(m, IDS[:20])
        except KeyboardInterrupt:
            hit = 1
        finally:
            sys.settrace(None)
        assert np.array_equal(hidden(m, IDS[:20]), want), target
assert target > 40, target
"""
    run(body, tiny.gguf)


def test_a_second_process_compiles_nothing(tiny: Tiny) -> None:
    """And imports nothing that compiles."""
    body = """
load.compile_images = poison
load._compilers()  # looks where the compilers lie, without importing them
sys.modules["numba"] = sys.modules["llvmlite"] = None  # to import one fails
hidden(model(threads=1), IDS)
"""
    run("hidden(model(threads=1), IDS)", tiny.gguf)
    run(body, tiny.gguf)


def test_kernels_that_cannot_be_had(tiny: Tiny, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOLRUN_TIER", "vax")
    with pytest.raises(KernelError, match=rf"vax.*does not exist.*this CPU runs: .*{runnable()[-1].name}"):
        load(tiny.gguf)
    monkeypatch.delenv("SMOLRUN_TIER")
    monkeypatch.setattr(kernels, "_loaded", kernels._Loaded)
    monkeypatch.setenv("SMOLRUN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for executable in ("", str(tmp_path / "no-python"), "/bin/false"):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(KernelError, match="compil"):
            load(tiny.gguf)
