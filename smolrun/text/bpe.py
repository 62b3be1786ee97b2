"""Byte-level BPE without a library, from tables that lie in a file: what a bundle encodes with (smolrun compile).

    tokens   uint8  (bytes)     the bytes of all tokens, id by id
    ends     int32  (ids + 1)   where each begins; the last entry is where the last one ends
    bytes    int32  (256)       id of a single byte, -1: none
    pairs    int64  (merges)    left id << 32 | right id, ascending: found by bisection
    joins    int64  (merges)    rank << 32 | id of the join, in the order of `pairs`
    added    int32  (n)         ids of tokens that are found in plain text before it is split
    digits, numbers, letters, spaces   int32 (ranges, 2)   code points, first and last; digits stand alone

Nothing is built at the start: SmolLM2's tables are 1.5 MB that are mapped, where two dictionaries of 49,000 entries
take 0.1 s and 15 MB. The classes of code points are those of the library that the tables were made with, so a device
with another version of Unicode splits text as the laptop does. Ids equal the library's (tests/test_tokenizer.py).
"""

from __future__ import annotations

import functools
import heapq
import re
from bisect import bisect_left
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from smolrun.errors import ModelFileError

TABLES = {
    "tokens": "<u1",
    "ends": "<i4",
    "bytes": "<i4",
    "pairs": "<i8",
    "joins": "<i8",
    "added": "<i4",
    **dict.fromkeys(("digits", "numbers", "letters", "spaces"), "<i4"),
}
KNOWN_WORDS = 1 << 14  # some 3 MB
LONG = 48  # characters of a word that is not kept


class TableBpe:
    """Encoder and decoder over the tables above.

    Attributes:
        size: ids are 0 <= id < size.
        unknown: stands for a byte without a token.
    """

    def __init__(self, tables: Mapping[str, NDArray[np.uint8]]) -> None:
        """tables: name -> bytes.

        Raises:
            ModelFileError: tables that do not fit each other.
        """
        self._tables = {name: np.frombuffer(tables[name].data, kind) for name, kind in TABLES.items()}
        ends, pairs = self._tables["ends"], self._tables["pairs"]
        self.size = self.unknown = len(ends) - 1
        if (
            len(self._tables["bytes"]) != 256
            or len(pairs) != len(self._tables["joins"])
            or self.size < 1
            or ends[-1] != len(self._tables["tokens"])
        ):
            raise ModelFileError("the tokenizer's tables do not fit each other: compile the bundle again")
        # memoryviews give Python's own integers: bisection is five times as fast as over an array
        self._pairs, self._joins, self._ends = pairs.data, self._tables["joins"].data, ends.data
        self._bytes = [i if i >= 0 else self.unknown for i in self._tables["bytes"].tolist()]
        self._added = {self.token_bytes(i).decode(): i for i in self._tables["added"].tolist()}
        longest_first = sorted(map(re.escape, self._added), key=len, reverse=True)
        self._added_pattern = re.compile(f"({'|'.join(longest_first)})") if longest_first else None
        self._known: dict[str, list[int]] = {}

    def token_bytes(self, i: int) -> bytes:
        """The bytes of an id in range."""
        return self._tables["tokens"][self._ends[i] : self._ends[i + 1]].tobytes()

    def encode(self, text: str) -> list[int]:
        """Ids; `unknown` for a byte without a token."""
        ids: list[int] = []
        for piece in self._added_pattern.split(text) if self._added_pattern else [text]:
            if (one := self._added.get(piece)) is not None:
                ids.append(one)
                continue
            for word in self._words(piece.isascii()).findall(piece):
                if (known := self._known.get(word)) is None:
                    known = self._merge(word.encode())
                    if len(word) < LONG:
                        if len(self._known) >= KNOWN_WORDS:
                            self._known.clear()
                        self._known[word] = known
                ids += known
        return ids

    @functools.cache  # noqa: B019 (a tokenizer lives as long as its process)
    def _words(self, ascii_only: bool) -> re.Pattern[str]:
        """GPT-2's words, digits first set apart; the classes of all of Unicode take 20 ms to compile, ASCII's none."""

        def letters(name: str) -> str:
            ranges = self._tables[name].reshape(-1, 2).tolist()
            ranges = [[a, min(b, 127)] for a, b in ranges if a < 128] if ascii_only else ranges
            return "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in ranges)

        digit, number, letter, space = map(letters, ("digits", "numbers", "letters", "spaces"))
        words = ["'(?:s|t|re|ve|m|ll|d)", f"[{digit}]" if digit else "", f" ?[{letter}]+"]
        words += [f" ?[{number}]+" if number else "", f" ?[^{space}{letter}{number}{digit}]+"]
        words += [f"[{space}]+(?![^{space}{digit}])", f"[{space}]+"]
        return re.compile("|".join(filter(None, words)))

    def _join(self, left: int, right: int) -> int:
        """rank << 32 | id of a pair's join; -1: it has none."""
        at = bisect_left(self._pairs, key := left << 32 | right)
        return self._joins[at] if at < len(self._pairs) and self._pairs[at] == key else -1

    def _merge(self, word: bytes) -> list[int]:
        """Join the pair of least rank, of equal ones the leftmost, until none is left: n log n steps."""
        ids = [self._bytes[byte] for byte in word]
        after = [*range(1, len(ids) + 1)]  # place of the next symbol
        before = [*range(-1, len(ids) - 1)]
        joins = [*(self._join(a, b) for a, b in pairwise(ids)), -1]  # of each symbol with the next one
        heap = [(join >> 32, place, join) for place, join in enumerate(joins) if join >= 0]
        heapq.heapify(heap)
        while heap:
            _, place, join = heapq.heappop(heap)
            # a symbol that is gone has no join. Another pair that gives the same id is joined, as in the library
            if (joins[place] ^ join) & 0xFFFFFFFF or joins[place] < 0:
                continue
            ids[place] = join & 0xFFFFFFFF
            gone = after[place]
            joins[gone], after[place] = -1, after[gone]
            if after[place] < len(ids):
                before[after[place]] = place
            for left in (before[place], place):
                if left >= 0:
                    right = after[left]
                    joins[left] = self._join(ids[left], ids[right]) if right < len(ids) else -1
                    if joins[left] >= 0:
                        heapq.heappush(heap, (joins[left] >> 32, left, joins[left]))
        out, place = [], 0
        while place < len(ids):
            out.append(ids[place])
            place = after[place]
        return out
