"""A forward over a `TokenSelectCache`: what its layers share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tokenselect import Batch, Context, Device, Pieces

from .masks import RowMask
from .pages import PageTables, Rows
from .windows import WindowPlan

__all__ = ["Step", "pack", "unpack"]


class Step:
    """One forward: the tokens that it adds to the rows, and what its layers share."""

    def __init__(self, mask: RowMask, old_lens: list[int], kept: np.ndarray[Any, Any] | None) -> None:
        self.begin, self.q_length = mask.q_offset, mask.q_length
        self.batch_size = mask.batch_size
        self.old_lens = old_lens
        counts = [mask.q_length] * mask.batch_size if kept is None else kept.sum(axis=1).tolist()
        self.lens = [old + new for old, new in zip(old_lens, counts, strict=True)]
        # Rows that grow, in order: those of the batch.
        self.rows = [row for row, count in enumerate(counts) if count]
        self.counts = [counts[row] for row in self.rows]
        self.num_query_tokens = sum(self.counts)
        self._index = None if kept is None or kept.all() else torch.from_numpy(np.flatnonzero(kept))
        self._on_device: dict[torch.device, torch.Tensor] = {}
        self.grown: set[int | None] = set()
        self._batches: dict[Any, Batch] = {}
        self._pieces: dict[Any, Pieces] = {}
        self._windows: dict[Any, WindowPlan] = {}

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """`[batch, heads, q_length, head_dim]` to `[num_query_tokens, heads, head_dim]`, without padding."""
        return pack(states, self.index(states.device))

    def index(self, device: torch.device) -> torch.Tensor | None:
        """Which of `batch * q_length` tokens are kept; None for all."""
        if self._index is None:
            return None
        if device not in self._on_device:
            self._on_device[device] = self._index.to(device)
        return self._on_device[device]

    def batch(self, tables: PageTables, places: Sequence[int], window: int | None, device: Device) -> Batch:
        """The rows over their pages."""
        # A batch copies its tables to the first GPU that it meets.
        key = (window, device)
        if key not in self._batches:
            pages = [tables.pages(row) for row in self.rows]
            lens = [self.lens[row] - tables.begin(row) for row in self.rows]
            self._batches[key] = Batch(
                tables.page_size,
                [0, *itertools.accumulate(self.counts)],
                [0, *itertools.accumulate(len(held) for held in pages)],
                np.concatenate(pages),
                [(length - 1) % tables.page_size + 1 for length in lens],
                sequence_indices=[places[row] for row in self.rows],
            )
        return self._batches[key]

    def pieces(self, batch: Batch, context: Context, block_len: int) -> Pieces:
        """The rows cut into pieces that a context has room for."""
        key = (batch, context)
        if key not in self._pieces:
            self._pieces[key] = batch.in_pieces(context, block_len)
        return self._pieces[key]

    def window_plan(self, tables: PageTables, window: int, device: torch.device) -> WindowPlan:
        """The rows within a sliding window."""
        key = (window, device)
        if key not in self._windows:
            slots = [tables.slots(row) for row in self.rows]
            rows = Rows(slots, [tables.begin(row) for row in self.rows], self.counts)
            self._windows[key] = WindowPlan(rows, window, device)
        return self._windows[key]


def pack(states: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """`[batch, heads, tokens, head_dim]` to `[batch * tokens, heads, head_dim]`, those of `index` alone. A view where it can be."""
    flat = states.transpose(1, 2).reshape(-1, states.shape[1], states.shape[3])
    return flat if index is None else flat.index_select(0, index)


def unpack(out: torch.Tensor, index: torch.Tensor | None, batch_size: int, q_length: int) -> torch.Tensor:
    """`[tokens, heads, head_dim]` of those of `index` to `[batch_size, q_length, heads, head_dim]`, zeros for others."""
    if index is not None:
        out = out.new_zeros((batch_size * q_length, *out.shape[1:])).index_copy_(0, index, out)
    return out.view(batch_size, q_length, *out.shape[1:])
