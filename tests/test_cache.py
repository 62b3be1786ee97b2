"""The KV cache's bookkeeping alone: seeded turmoil over pages that hold the ids, checked after every step."""

from collections import Counter

import numpy as np
import pytest

from smolrun.errors import ContextOverflow
from smolrun.kernels.block import PAGE
from smolrun.model.cache import MAX_SLOTS, KVCache, Slot


def write(cache: KVCache, slot: Slot, ids: list[int], *, keep: bool = True) -> None:
    """What a pass does: room, keys and values (here the id) into the pages, and the ids unless it was cancelled."""
    start = slot.length
    cache.reserve(slot, start + len(ids))
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
    assert not any(users[id(page)] or page.extra for page in cache._free)
    assert len(users) + len(cache._free) == cache._pages
    if not any(slot.busy for slot in cache._slots):
        assert cache._pages <= cache.capacity and len(cache._slots) <= MAX_SLOTS


@pytest.mark.parametrize("seed", range(40))
def test_turmoil(seed: int) -> None:
    """Prompts of four families, forks, truncations, cancelled passes, and up to nine slots busy at once."""
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
            write(cache, slot, ids[slot.length : slot.length + count], keep=rng.randint(20) > 0)
        check(cache)
        busy.append(slot)
        while busy and (len(busy) > 9 or rng.randint(3)):
            busy.pop(int(rng.randint(len(busy)))).close()
            check(cache)
    for slot in busy:
        slot.close()
    check(cache)


def test_a_prefix_is_taken_from_the_only_idle_slot() -> None:
    """All other slots are busy, and the one to fork from is the one to forget."""
    cache = KVCache(4 * PAGE, 1024)
    ids = list(range(100))
    slot = cache.open(ids)
    write(cache, slot, ids)
    slot.close()
    busy = [cache.open([1000 + i]) for i in range(MAX_SLOTS - 1)]
    other = cache.open([*ids[:90], 7, 7])
    assert other.length == 90 and len(busy) == MAX_SLOTS - 1
    write(cache, other, [7, 7])
    check(cache)


def test_more_than_the_context_is_refused_before_anything_changes() -> None:
    cache = KVCache(4 * PAGE, 100)
    slot = cache.open([1])
    write(cache, slot, list(range(100)))
    with pytest.raises(ContextOverflow):
        cache.reserve(slot, 101)
    assert slot.length == 100
    check(cache)
