"""The KV cache's bookkeeping alone: seeded turmoil over pages that hold the ids, checked after every step."""

from collections import Counter

import numpy as np
import pytest

from smolrun.errors import ContextOverflow
from smolrun.kernels.block import PAGE
from smolrun.model.cache import MAX_IDLE, CacheFull, KVCache, Slot


def write(cache: KVCache, slot: Slot, ids: list[int], *, keep: bool = True) -> None:
    """What a pass does: room, keys and values (here the id) into the pages, and the ids unless it was cancelled."""
    start = slot.length
    cache.reserve([(slot, start + len(ids))])
    for position, i in enumerate(ids, start):
        slot.pages[position // PAGE].data.view(np.int32)[position % PAGE] = i
    if keep:
        slot.ids.extend(ids)


def check(cache: KVCache) -> None:
    """Every slot reads its own ids, and pages are counted right."""
    users = Counter(id(page) for slot in cache._slots for page in slot.pages)
    for slot in cache._slots:
        for index, page in enumerate(slot.pages):
            assert page.users == users[id(page)]
            assert slot.table[index] == page.data.ctypes.data and page.data.ctypes.data % 64 == 0
        pages = [page.data.view(np.int32)[:PAGE] for page in slot.pages]
        assert slot.ids == np.concatenate([*pages, np.zeros(0, np.int32)])[: slot.length].tolist()
    assert not any(users[id(page)] for page in cache._free)
    assert len(users) + len(cache._free) == cache._pages <= cache.capacity
    held = {id(page) for slot in cache._slots if slot.busy for page in slot.pages}
    assert cache.room == PAGE * (cache.capacity - len(held))


@pytest.mark.parametrize("seed", range(40))
def test_turmoil(seed: int) -> None:
    """Prompts of four families, forks, truncations, cancelled passes, and many slots busy at once."""
    rng = np.random.RandomState(seed)
    cache = KVCache(4 * PAGE, PAGE * int(rng.choice([3, 5, 9])) - int(rng.randint(PAGE)))
    busy: list[Slot] = []
    for _ in range(150):
        family, n = 1000 * int(rng.randint(4)), int(rng.randint(1, cache.context + 1))
        ids = [family + i // 50 for i in range(n)]
        slot = cache.open(ids)
        assert slot.ids == ids[: slot.length] and slot.length < n
        if rng.randint(5) == 0:
            slot.truncate(int(rng.randint(slot.length + 1)))
        while slot.length < n:
            count = min(int(rng.choice([1, 7, 64, 100])), n - slot.length)
            try:
                write(cache, slot, ids[slot.length : slot.length + count], keep=rng.randint(20) > 0)
            except CacheFull:  # no slot has changed; without the youngest of the others it fits in the end
                check(cache)
                busy.pop().close()
        check(cache)
        busy.append(slot)
        while busy and (len(busy) > 12 or rng.randint(3)):
            busy.pop(int(rng.randint(len(busy)))).close()
            check(cache)
    for slot in busy:
        slot.close()
    check(cache)
    assert len(cache._slots) <= MAX_IDLE


def test_a_busy_slot_lends_its_prefix() -> None:
    """Whole pages are shared, the half-full one is copied by whoever writes first; room counts a shared page once."""
    cache = KVCache(4 * PAGE, 4 * PAGE)
    ids = list(range(100))
    first = cache.open(ids)
    write(cache, first, ids)
    second = cache.open([*ids, 7])
    assert second.length == 100 and second.pages == first.pages and cache.room == 2 * PAGE
    write(cache, first, [8])
    write(cache, second, [7])
    check(cache)
    assert second.pages[0] is first.pages[0] and second.pages[1] is not first.pages[1] and cache.room == PAGE


def test_a_pass_that_does_not_fit_changes_nothing() -> None:
    cache = KVCache(4 * PAGE, 4 * PAGE)
    slots = [cache.open([i]) for i in range(3)]
    for i, slot in enumerate(slots):
        write(cache, slot, [i] * PAGE)
    with pytest.raises(CacheFull, match=r"256 positions.*larger context"):
        cache.reserve([(slot, PAGE + 1) for slot in slots])
    assert [len(slot.pages) for slot in slots] == [1, 1, 1] and cache.room == PAGE
    check(cache)


def test_a_prefix_is_taken_from_the_only_idle_slot() -> None:
    """All other slots are busy, and the one to fork from is the one to forget: the cache is full."""
    cache = KVCache(4 * PAGE, 8 * PAGE)
    ids = list(range(100))
    slot = cache.open(ids)
    write(cache, slot, ids)
    slot.close()
    for i in range(6):
        write(cache, cache.open([1000 + i]), [1000 + i] * PAGE)
    other = cache.open([*ids[:90], 7, 7])
    assert other.length == 90
    write(cache, other, [7, 7])
    assert slot not in cache._slots
    check(cache)


def test_more_than_the_context_is_refused_before_anything_changes() -> None:
    cache = KVCache(4 * PAGE, 100)
    slot = cache.open([1])
    write(cache, slot, list(range(100)))
    with pytest.raises(ContextOverflow):
        cache.reserve([(slot, 101)])
    assert slot.length == 100
    check(cache)
