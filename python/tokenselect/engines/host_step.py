"""A forward whose lengths and page tables are read on the host: prompts, mixed batches, and everything on the processor."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from tokenselect import Batch, Context, Device, Pieces

from .contexts import Contexts, separate
from .layers import Layer, PagedKv

__all__ = ["HostStep", "Ints"]

Ints = np.ndarray[Any, np.dtype[np.int32]]


class HostStep:
    """Rows of a forward, and what its layers share.

    Row `r` has `query_lens[r]` new tokens, which follow those of the rows before, and `kv_lens[r]` tokens with them; `pages[r]` are
    its pages in token order. A row of no tokens at all is padding: nothing is written, and its outputs are zeros. Raises `ValueError`
    where the numbers contradict each other.
    """

    def __init__(
        self, page_size: int, query_lens: Sequence[int], kv_lens: Sequence[int], pages: Sequence[Ints], dense_below: int
    ) -> None:
        if not len(query_lens) == len(kv_lens) == len(pages):
            raise ValueError(
                f"rows must have as many queries, lengths and pages, got {len(query_lens)}, {len(kv_lens)} and {len(pages)}"
            )
        self.page_size = page_size
        starts = itertools.accumulate(query_lens, initial=0)
        self._rows = []
        for start, queries, length, held in zip(starts, query_lens, kv_lens, pages, strict=False):
            needed = -(-length // page_size)
            if (length and length < queries) or len(held) < needed:
                raise ValueError(
                    f"a row of {queries} new tokens must have at least as many cached ones and pages for them, got {length} tokens and "
                    f"{len(held)} pages of {page_size}"
                )
            if queries and length:
                self._rows.append(_Row(start, queries, length, held[:needed]))
        self._num_tokens = sum(row.query_len for row in self._rows)
        self._dense_below = dense_below
        self._parts: dict[bool, list[_Part]] = {}

    def attend(
        self,
        contexts: Contexts,
        device: Device,
        layer: Layer,
        kv: PagedKv,
        q: torch.Tensor,
        new: tuple[torch.Tensor, torch.Tensor] | None,
        out: torch.Tensor,
    ) -> None:
        """Attention of a layer: `q` and `out`, `[tokens, num_qo_heads, head_dim]`, have at least the step's tokens; `out` is zeros for
        padding and what is beyond. `new` are keys and values to write, `[tokens, num_kv_heads, head_dim]`, None where the cache has them."""
        if kv.page_size != self.page_size:
            raise ValueError(
                f"the cache must have pages of {self.page_size} tokens, as the tables, it has {kv.page_size}"
            )
        if self._num_tokens < out.shape[0]:
            out.zero_()
        if layer.is_dense not in self._parts:
            self._parts[layer.is_dense] = self._split(layer.is_dense)
        separate(device)
        for part in self._parts[layer.is_dense]:
            part.attend(contexts, device, layer, kv, q, new, out)

    def _split(self, is_dense: bool) -> list[_Part]:
        """Rows that are computed alike."""
        kinds: dict[_Kind, list[_Row]] = {"dense": [], "token": [], "prompt": []}
        for row in self._rows:
            if is_dense or row.kv_len <= self._dense_below:
                kinds["dense"].append(row)
            else:
                kinds["token" if row.query_len == 1 else "prompt"].append(row)
        return [_Part(kind, rows, self.page_size) for kind, rows in kinds.items() if rows]


_Kind = Literal["dense", "token", "prompt"]


@dataclass(frozen=True)
class _Row:
    begin: int
    query_len: int
    kv_len: int
    pages: Ints


@dataclass
class _Part:
    kind: _Kind
    rows: list[_Row]
    page_size: int
    _batches: dict[Device, Batch] = field(default_factory=dict)
    _pieces: dict[Context, Pieces] = field(default_factory=dict)
    _on_device: dict[Any, torch.Tensor] = field(default_factory=dict)

    def attend(
        self,
        contexts: Contexts,
        device: Device,
        layer: Layer,
        kv: PagedKv,
        q: torch.Tensor,
        new: tuple[torch.Tensor, torch.Tensor] | None,
        out: torch.Tensor,
    ) -> None:
        batch = self._batch(device)
        if new is not None:
            new = (self._take(new[0]), self._take(new[1]))
        begin, end, is_one = self._range()
        to = out[begin:end] if is_one else out.new_empty((batch.num_query_tokens, *out.shape[1:]))
        queries = self._take(q)
        if self.kind == "prompt":
            # Reading a prompt writes its tokens as it goes: those that the cache has already are written once more, unchanged.
            k, v = kv.tokens(self._slots(q.device)) if new is None else new
            reader = contexts.reader(device, layer, max(row.kv_len for row in self.rows))
            if reader not in self._pieces:
                self._pieces[reader] = batch.in_pieces(reader, contexts.options.block_len)
            reader.prefill_kv(self._pieces[reader], kv.view, queries, k, v, out=to)
        else:
            info = batch.info
            kind = layer.dense() if self.kind == "dense" else layer
            context = contexts.growing(device, kind, info.num_rows, info.max_block_len, info.num_token_places)
            if self.kind == "dense":
                if new is not None:
                    context.append(batch, kv.view, *new)
                context.attend_dense(batch, kv.view, queries, out=to)
            else:
                if new is None:
                    context.select(batch, kv.view, queries)
                else:
                    context.append_select(batch, kv.view, queries, *new)
                context.attend(batch, kv.view, queries, out=to)
        if not is_one:
            out.index_copy_(0, self._index(out.device), to)

    def _batch(self, device: Device) -> Batch:
        # A batch copies its tables to the first GPU that it meets.
        if device not in self._batches:
            self._batches[device] = Batch(
                self.page_size,
                [0, *itertools.accumulate(row.query_len for row in self.rows)],
                [0, *itertools.accumulate(len(row.pages) for row in self.rows)],
                np.concatenate([row.pages for row in self.rows]),
                [(row.kv_len - 1) % self.page_size + 1 for row in self.rows],
            )
        return self._batches[device]

    def _range(self) -> tuple[int, int, bool]:
        """The first and the last of its tokens, and whether all between are its."""
        begin, last = self.rows[0].begin, self.rows[-1]
        end = last.begin + last.query_len
        return begin, end, end - begin == sum(row.query_len for row in self.rows)

    def _take(self, tokens: torch.Tensor) -> torch.Tensor:
        begin, end, is_one = self._range()
        return tokens[begin:end] if is_one else tokens.index_select(0, self._index(tokens.device))

    def _index(self, device: torch.device) -> torch.Tensor:
        return self._copied("index", device, lambda row: np.arange(row.begin, row.begin + row.query_len))

    def _slots(self, device: torch.device) -> torch.Tensor:
        def slots(row: _Row) -> Any:
            tokens = np.arange(row.kv_len - row.query_len, row.kv_len)
            return row.pages[tokens // self.page_size].astype(np.int64) * self.page_size + tokens % self.page_size

        return self._copied("slots", device, slots)

    def _copied(self, name: str, device: torch.device, of_row: Any) -> torch.Tensor:
        if (name, device) not in self._on_device:
            numbers = np.concatenate([of_row(row) for row in self.rows]).astype(np.int64)
            self._on_device[name, device] = torch.from_numpy(numbers).to(device)
        return self._on_device[name, device]
