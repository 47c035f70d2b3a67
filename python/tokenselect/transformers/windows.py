"""Exact attention within a sliding window, from dense attention over page tables of single tokens.

A block of queries at positions `[s, e)` sees, of a window of `w` tokens, a triangle of its own tokens and another one of the `w - 1`
tokens before it: query `t` sees the last `w - 1 - t` of them. Both are what dense attention computes:

1. over the block's own tokens, as the kernel sees causality: query `t` sees the first `t + 1`;
2. over the `w - 1` tokens before, queries and tokens in reverse order: the query that comes as `t'` is `T - 1 - t'`, and sees
   the first `w - T + t'` of the list, which are the last `w - 1 - t` of the tokens.

The two are merged through their log-sum-exp. Keys carry their rotation, so their order in a list means nothing. Queries at positions
below `w` see all before them and need the first alone, as does a single query, over its last `w` tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tokenselect import Batch, Context, KvView

from .contexts import Kernels
from .pages import Ints, Rows

__all__ = ["WindowPlan"]

# Queries of one pass: outputs of its two parts are f32.
_MAX_PASS_LEN = 8192


@dataclass(frozen=True)
class _Pass:
    begin: int
    end: int
    own: Batch
    before: Batch | None
    # Of the pass's queries, those that `before` has, in its order.
    reverse: torch.Tensor | None


class WindowPlan:
    """What all layers with one window do for the rows of a forward. Pages are of one token."""

    def __init__(self, rows: Rows, window: int, device: torch.device) -> None:
        self.num_query_tokens = sum(rows.num_queries)
        self.max_rows, self.max_block_len, self.max_kv_tokens = 1, 1, 1
        self._passes: list[_Pass] = []
        blocks = [block for row in range(len(rows.slots)) for block in _blocks(rows, row, window)]
        begin = 0
        while blocks:
            lens = list(itertools.accumulate(block.num_queries for block in blocks))
            count = max(sum(length <= _MAX_PASS_LEN for length in lens), 1)
            self._passes.append(self._pass(blocks[:count], begin, begin + lens[count - 1], device))
            begin += lens[count - 1]
            del blocks[:count]

    def attend(self, kernels: Kernels, kv: KvView, q: torch.Tensor) -> torch.Tensor:
        """Queries `[num_query_tokens, num_qo_heads, head_dim]` to outputs alike. `kv` has the keys and values of all of them."""
        context = kernels.step(self.max_rows, self.max_block_len, self.max_kv_tokens)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for part in self._passes:
            _attend(context, part, kv, q[part.begin : part.end], out[part.begin : part.end])
        return out

    def _pass(self, blocks: list[_Block], begin: int, end: int, device: torch.device) -> _Pass:
        own = self._batch([(block.own, block.num_queries) for block in blocks])
        starts = [0, *itertools.accumulate(block.num_queries for block in blocks)]
        banded = [(start, block) for start, block in zip(starts, blocks, strict=False) if len(block.before)]
        if not banded:
            return _Pass(begin, end, own, None, None)
        before = self._batch([(block.before, block.num_queries) for _, block in banded])
        reverse = np.concatenate([np.arange(start + block.num_queries - 1, start - 1, -1) for start, block in banded])
        return _Pass(begin, end, own, before, torch.from_numpy(reverse).to(device))

    def _batch(self, rows: list[tuple[Ints, int]]) -> Batch:
        queries = [count for _, count in rows]
        tokens = [len(slots) for slots, _ in rows]
        self.max_rows = max(self.max_rows, len(rows))
        self.max_block_len = max(self.max_block_len, *queries)
        self.max_kv_tokens = max(self.max_kv_tokens, sum(tokens))
        indices = np.concatenate([slots for slots, _ in rows])
        return Batch(
            1, [0, *itertools.accumulate(queries)], [0, *itertools.accumulate(tokens)], indices, [1] * len(rows)
        )


@dataclass(frozen=True)
class _Block:
    num_queries: int
    own: Ints
    before: Ints  # reversed


def _blocks(rows: Rows, row: int, window: int) -> list[_Block]:
    slots, begin, num_queries = rows.slots[row], rows.begins[row], rows.num_queries[row]
    length = begin + len(slots)
    position = length - num_queries
    nothing: Ints = np.empty(0, np.int32)
    if num_queries == 1:
        return [_Block(1, slots[max(length - window, begin) - begin :], nothing)]
    blocks = []
    if position < window:
        end = min(length, window)
        blocks.append(_Block(end - position, slots[: end - begin], nothing))
        position = end
    step = max(window - 1, 1)
    while position < length:
        end = min(length, position + step)
        before = slots[position - window + 1 - begin : position - begin][::-1]
        blocks.append(_Block(end - position, slots[position - begin : end - begin], before))
        position = end
    return blocks


def _attend(context: Context, part: _Pass, kv: KvView, q: torch.Tensor, out: torch.Tensor) -> None:
    if part.before is None:
        context.attend_dense(part.own, kv, q, out=out)
        return
    assert part.reverse is not None
    outs: Any = torch.zeros((2, *q.shape), dtype=torch.float32, device=q.device)
    lses: Any = torch.full((2, *q.shape[:2]), -torch.inf, dtype=torch.float32, device=q.device)
    context.attend_dense(part.own, kv, q, out=outs[0], lse=lses[0])
    reversed_q = q[part.reverse]
    reversed_out, reversed_lse = context.attend_dense(
        part.before,
        kv,
        reversed_q,
        out=torch.empty(reversed_q.shape, dtype=torch.float32, device=q.device),
        lse=torch.empty(reversed_q.shape[:2], dtype=torch.float32, device=q.device),
    )
    outs[1].index_copy_(0, part.reverse, reversed_out)
    lses[1].index_copy_(0, part.reverse, reversed_lse)
    context.merge(outs, lses, out)
