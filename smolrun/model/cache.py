"""The KV cache: pages of 64 positions, a table of them per slot, and the slot with the longest common prefix for every
prompt.

slot A  ids 1 9 7 ...   pages [p0][p1][p2]           full pages are shared between slots (p0), a half-full one is copied
slot B  ids 1 9 8 ...   pages [p0][p3]               before it is written

All slots together stay within `capacity` pages: the memory is that of one sequence as long as the context, however many
share it. Idle slots are forgotten when a busy one needs their pages; a busy one never is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from smolrun.errors import ContextOverflow, SmolrunError
from smolrun.kernels.block import PAGE
from smolrun.model.memory import Arena

MAX_IDLE = 8  # slots kept for later prompts


class CacheFull(SmolrunError):
    """Busy slots hold so many pages that another one cannot be had; no slot has changed."""


class Page:
    """64 positions of every layer and KV head."""

    __slots__ = ("data", "users")

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data = data
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
        """Give the slot back; its positions stay for later prompts until others need the room."""
        self.busy = False
        self._cache.forget()


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

    @property
    def room(self) -> int:
        """Positions that busy slots do not hold."""
        held = {id(page) for slot in self._slots if slot.busy for page in slot.pages}
        return int(PAGE * (self.capacity - len(held)))

    def open(self, ids: Sequence[int]) -> Slot:
        """A slot for a prompt: holds its longest known prefix, at most len(ids) - 1 positions of it."""
        self._clock += 1
        best, keep = None, 0
        for slot in self._slots:
            common = min(_common(slot.ids, ids), max(len(ids) - 1, 0))
            if best is None or (common, best.busy) > (keep, slot.busy):
                best, keep = slot, common
        if best is not None and not best.busy and (keep == best.length or keep == len(ids) - 1 == best.length - 1):
            slot = best  # it goes on where it stopped
            slot.truncate(keep)
        else:
            slot = self._fork(best, keep)
        slot.busy, slot.used = True, self._clock
        return slot

    def reserve(self, work: Sequence[tuple[Slot, int]]) -> None:
        """Make room for n positions in each slot, and let it own every page that they will write.

        Raises:
            ContextOverflow: an n is more than the context.
            CacheFull: the pages are not there, because of busy slots; idle ones may have been forgotten.
        """
        for _, n in work:
            if n > self.context:
                raise ContextOverflow(n, self.context, "sequence")
        try:
            for slot, n in work:
                self._reserve(slot, n)
        except CacheFull:
            for slot, _ in work:
                self.drop_pages(slot, -(-slot.length // PAGE))
            raise

    def _reserve(self, slot: Slot, n: int) -> None:
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
            if page.users == 0:
                self._free.append(page)

    def forget(self) -> None:
        """Forget the idle slots that are too many."""
        while sum(not slot.busy for slot in self._slots) > MAX_IDLE:
            self._evict()

    def clear(self) -> None:
        """Forget all idle slots: what computes keys and values has changed."""
        while self._evict():
            pass

    def _fork(self, source: Slot | None, keep: int) -> Slot:
        slot = Slot(self)
        if source is not None and keep:
            slot.ids = source.ids[:keep]
            slot.pages = source.pages[: -(-keep // PAGE)]
            slot.table[: len(slot.pages)] = source.table[: len(slot.pages)]
            for page in slot.pages:
                page.users += 1
        self._slots.append(slot)
        return slot

    def _evict(self) -> bool:
        """Forget the idle slot that was used longest ago; False when there is none."""
        idle = min((slot for slot in self._slots if not slot.busy), key=lambda slot: slot.used, default=None)
        if idle is None:
            return False
        self.drop_pages(idle, 0)
        self._slots.remove(idle)
        return True

    def _make_room(self) -> None:
        """Forget idle slots until a page can be had."""
        while not self._free and self._pages >= self.capacity and self._evict():
            pass

    def _page(self) -> Page:
        """A page for one user; its content is arbitrary."""
        if self._free:
            page = self._free.pop()
            page.users = 1
            return page
        if self._pages == self.capacity:
            raise CacheFull(
                f"the sequences computed at once need more than the {self.context:,} positions they share: "
                "compute fewer at once, or load with a larger context"
            )
        self._pages += 1
        return Page(self._memory[self._pages - 1])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(different[0]) if len(different) else n
