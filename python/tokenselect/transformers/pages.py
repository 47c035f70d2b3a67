"""Page tables of one kind of layer: which pages hold which tokens of which row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["PageTables", "Rows"]

Ints = np.ndarray[Any, np.dtype[np.int32]]


class Rows:
    """Token places of the rows that a step adds tokens to, by slots (`page * page_size + place in the page`).

    `slots[r]` has the tokens of row `r` that are kept, ascending, the last `num_queries[r]` of which are the step's; the first
    of them is token `begins[r]` of the row.
    """

    def __init__(self, slots: Sequence[Ints], begins: Sequence[int], num_queries: Sequence[int]) -> None:
        self.slots, self.begins, self.num_queries = slots, begins, num_queries


class PageTables:
    """Pages of the rows of a batch, shared between rows (beams) until one of them writes.

    A table drops pages from its front, too: layers with a sliding window keep what the window reaches.
    """

    def __init__(self, page_size: int, batch_size: int) -> None:
        self.page_size = page_size
        self.num_pages = 0
        self._pages: list[Ints] = [np.empty(0, np.int32) for _ in range(batch_size)]
        self._num_used = [0] * batch_size  # of each `_pages`, which has room for more
        self._begins = [0] * batch_size  # tokens before the first page
        self._lens = [0] * batch_size
        self._holders = np.zeros(0, np.int32)  # how many rows hold each page
        self._free: list[int] = []

    def pages(self, row: int) -> Ints:
        """Page numbers of a row, in token order."""
        return self._pages[row][: self._num_used[row]]

    def begin(self, row: int) -> int:
        """The first token that the row's pages hold."""
        return self._begins[row]

    def length(self, row: int) -> int:
        """Tokens of a row, those that were dropped from its front included."""
        return self._lens[row]

    def reserve(self, num_pages: int) -> None:
        """Makes page numbers up to `num_pages` free to be taken."""
        if num_pages > self.num_pages:
            self._free.extend(range(num_pages - 1, self.num_pages - 1, -1))
            self._holders = np.pad(self._holders, (0, num_pages - self.num_pages))
            self.num_pages = num_pages

    def grow(
        self, lens: Sequence[int], copy: Callable[[list[int], list[int]], None], more: Callable[[int], None]
    ) -> None:
        """Makes room until row `r` has `lens[r]` tokens.

        `more(needed)` is called where `needed` pages are wanted and not free, and calls `reserve`. `copy(sources, targets)` is
        called for pages that are written and that other rows hold, too.
        """
        size = self.page_size
        shared = [
            row
            for row, (old, new) in enumerate(zip(self._lens, lens, strict=True))
            if new > old and (old - self._begins[row]) % size and self._holders[self.pages(row)[-1]] > 1
        ]
        needed = [-((self._begins[row] - new) // size) - self._num_used[row] for row, new in enumerate(lens)]
        total = sum(needed) + len(shared)
        if total > len(self._free):
            more(total - len(self._free))
        sources: list[int] = []
        targets: list[int] = []
        for row in shared:
            last = self._num_used[row] - 1
            source = int(self._pages[row][last])
            if self._holders[source] == 1:
                continue  # the other rows have taken copies already
            sources.append(source)
            targets.append(self._take())
            self._holders[source] -= 1
            self._pages[row][last] = targets[-1]
        if sources:
            copy(sources, targets)
        for row, count in enumerate(needed):
            used = self._num_used[row]
            if used + count > len(self._pages[row]):
                self._pages[row] = np.concatenate([self.pages(row), np.empty(used + count + 64, np.int32)])
            for place in range(used, used + count):
                self._pages[row][place] = self._take()
            self._num_used[row] += count
        self._lens = list(lens)

    def truncate(self, lens: Sequence[int]) -> None:
        """Drops the tokens of row `r` from `lens[r]` on."""
        for row, length in enumerate(lens):
            keep = max(-((self._begins[row] - length) // self.page_size), 0)
            self._give_back(self.pages(row)[keep:])
            self._num_used[row] = keep
        self._lens = list(lens)

    def drop_before(self, tokens: Sequence[int]) -> None:
        """Drops the pages of row `r` that hold no token from `tokens[r]` on."""
        for row, token in enumerate(tokens):
            count = min(max(token - self._begins[row], 0) // self.page_size, self._num_used[row])
            if count:
                self._give_back(self.pages(row)[:count])
                self._pages[row] = self.pages(row)[count:].copy()
                self._num_used[row] -= count
                self._begins[row] += count * self.page_size

    def take(self, rows: Sequence[int]) -> None:
        """Row `r` becomes a copy of what row `rows[r]` was."""
        for row in rows:
            np.add.at(self._holders, self.pages(row), 1)
        old = [self.pages(row) for row in range(len(self._pages))]
        self._pages, given_back = [old[row].copy() for row in rows], old
        self._num_used = [len(pages) for pages in self._pages]
        self._begins = [self._begins[row] for row in rows]
        self._lens = [self._lens[row] for row in rows]
        for pages in given_back:
            self._give_back(pages)

    def slots(self, row: int) -> Ints:
        """The slot of every token that the row's pages hold, ascending."""
        places = np.arange(self.page_size, dtype=np.int32)
        slots: Ints = np.add.outer(self.pages(row) * np.int32(self.page_size), places, dtype=np.int32)
        return slots.reshape(-1)[: self._lens[row] - self._begins[row]]

    def _take(self) -> int:
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def _give_back(self, pages: Ints) -> None:
        self._holders[pages] -= 1  # a row holds a page once
        self._free.extend(pages[self._holders[pages] == 0].tolist())
