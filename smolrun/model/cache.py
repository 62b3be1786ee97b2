"""The KV cache: pages of 64 positions, a table of them per slot, and the slot with the longest common prefix for every
prompt.

slot A  ids 1 9 7 ...   pages [p0][p1][p2]           full pages are shared between slots (p0), a half-full one is copied
slot B  ids 1 9 8 ...   pages [p0][p3]               before it is written; all slots together stay within `capacity`
pages
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from smolrun.errors import ContextOverflow
from smolrun.kernels.block import PAGE
from smolrun.model.memory import Arena

MAX_SLOTS = 8


class Page:
    """64 positions of every layer and KV head."""

    __slots__ = ("data", "extra", "users")

    def __init__(self, data: NDArray[np.uint8], extra: bool) -> None:
        self.data = data
        self.extra = extra
        self.users = 1


class Slot:
    """A sequence in the cache: `ids` are the tokens whose keys and values are valid."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self.ids: list[int] = []
        self.pages: list[Page] = []
        self.table: NDArray[np.int64] = np.zeros(cache.capacity, np.int64)
        self.table_address = self.table.ctypes.data
        self.busy = False
        self.used = 0

    @property
    def length(self) -> int:
        """Valid positions."""
        return len(self.ids)

    def truncate(self, n: int) -> None:
        """Forget all positions from n on."""
        del self.ids[n:]
        self._cache.drop_pages(self, -(-n // PAGE))

    def close(self) -> None:
        """Give the slot back; its positions stay for later prompts, as far as the capacity allows."""
        self.busy = False
        self._cache.shrink()


class KVCache:
    """Slots over a bounded number of pages.

    Args:
        page_size: bytes of a page.
        context: positions that one sequence may have; all slots together hold as many.
    """

    def __init__(self, page_size: int, context: int) -> None:
        self.page_size, self.context = page_size, context
        self.capacity = -(-context // PAGE)
        self._slots: list[Slot] = []
        self._free: list[Page] = []
        # one mapping, touched only as it fills: huge pages halve the time of a scattered read at depth
        self._memory = Arena({"pages": page_size * self.capacity}).arrays["pages"].reshape(self.capacity, page_size)
        self._pages = 0
        self._clock = 0

    def open(self, ids: Sequence[int]) -> Slot:
        """The slot for a prompt: holds its longest known prefix, at most len(ids) - 1 positions of it."""
        self._clock += 1
        best, keep = None, 0
        for slot in self._slots:
            if not slot.busy:
                common = min(_common(slot.ids, ids), max(len(ids) - 1, 0))
                if best is None or common > keep:
                    best, keep = slot, common
        if best is not None and (keep == best.length or keep == len(ids) - 1 == best.length - 1):
            slot = best  # it goes on where it stopped
            slot.truncate(keep)
        else:
            slot = self._fork(best, keep)
        slot.busy, slot.used = True, self._clock
        return slot

    def reserve(self, slot: Slot, n: int) -> None:
        """Make room for n positions in the slot and own every page that they will write.

        Raises:
            ContextOverflow: n is more than the context.
        """
        if n > self.context:
            raise ContextOverflow(n, self.context, "sequence")
        for index in range(slot.length // PAGE, min(len(slot.pages), -(-n // PAGE))):
            shared = slot.pages[index]
            if shared.users > 1:
                self._make_room()
            if shared.users > 1:  # else the other user was forgotten to make room
                page = self._page()
                page.data[:] = shared.data
                slot.pages[index] = page
                slot.table[index] = page.data.ctypes.data
                shared.users -= 1
        while len(slot.pages) * PAGE < n:
            self._make_room()
            slot.pages.append(self._page())
            slot.table[len(slot.pages) - 1] = slot.pages[-1].data.ctypes.data

    def drop_pages(self, slot: Slot, keep: int) -> None:
        """Give back a slot's pages from `keep` on."""
        dropped = slot.pages[keep:]
        del slot.pages[keep:]  # first: an exception in between may lose a page, but never free one twice
        for page in dropped:
            page.users -= 1
            if page.users == 0 and page.extra:
                self._pages -= 1
            elif page.users == 0:
                self._free.append(page)

    def shrink(self) -> None:
        """Forget idle slots until the pages are within the capacity again, which several busy slots may exceed."""
        while self._pages > self.capacity and self._evict():
            pass

    def _fork(self, source: Slot | None, keep: int) -> Slot:
        slot = Slot(self)
        slot.busy = True  # not to be evicted
        if source is not None and keep:
            slot.ids = source.ids[:keep]
            slot.pages = source.pages[: -(-keep // PAGE)]
            slot.table[: len(slot.pages)] = source.table[: len(slot.pages)]
            for page in slot.pages:
                page.users += 1
        self._slots.append(slot)
        if len(self._slots) > MAX_SLOTS:  # after the fork: the one to forget may be the source
            self._evict(source)
        return slot

    def _evict(self, spare: Slot | None = None) -> bool:
        """Forget the idle slot that was used longest ago; False when there is none."""
        idle = sorted((s for s in self._slots if not s.busy), key=lambda s: (s is spare, s.used))
        if not idle:
            return False
        self.drop_pages(idle[0], 0)
        self._slots.remove(idle[0])
        return True

    def _make_room(self) -> None:
        """Forget idle slots until a page can be had within the capacity."""
        while not self._free and self._pages >= self.capacity and self._evict():
            pass

    def _page(self) -> Page:
        """A page for one user; its content is arbitrary."""
        if self._free:
            page = self._free.pop()
            page.users = 1
            return page
        extra = self._pages >= self.capacity  # several slots are busy at once
        data = Arena({"page": self.page_size}).arrays["page"] if extra else self._memory[self._pages]
        self._pages += 1
        return Page(data, extra)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(different[0]) if len(different) else n
