"""Selection over keys and values that another cache keeps, or none: tensors `[batch, num_kv_heads, keys, head_dim]`.

They are read where they lie, as pages of one token, and nothing is copied: token `t` of row `b` is the page `b * stride_batch /
stride_token + t`. Padding is left out of the page tables. Selections are made anew at every step: how such a cache is cropped and
reordered is not known here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tokenselect import Batch, Device, KvView

from .contexts import LayerConfig, kernels_for
from .masks import RowMask
from .options import TokenSelectOptions
from .pages import Ints, Rows
from .steps import pack, unpack
from .windows import WindowPlan

__all__ = ["attend_borrowed"]


def attend_borrowed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: RowMask,
    config: LayerConfig,
    options: TokenSelectOptions,
    device: Device,
    is_dense: bool,
) -> torch.Tensor:
    """`query`, `[batch, num_qo_heads, tokens, head_dim]`, to `[batch, tokens, num_qo_heads, head_dim]`, zeros for padding."""
    if key.shape[2] != mask.kv_length:
        raise ValueError(
            f"keys and values must be those of {mask.kv_length} positions, as the mask says, got {key.shape[2]}: a cache must answer "
            "from `update` all that `get_mask_sizes` announces"
        )
    key, value = _pageable(key), _pageable(value)
    if key.stride() != value.stride():
        key, value = key.contiguous(), value.contiguous()
    stride_batch, stride_head, stride_token, _ = key.stride()
    shared_key = ("borrowed", stride_batch, stride_token, query.device)
    if shared_key not in mask.shared:
        mask.shared[shared_key] = _Forward(mask, stride_batch // stride_token, query.device)
    forward: _Forward = mask.shared[shared_key]
    num_pages = (mask.batch_size - 1) * (stride_batch // stride_token) + key.shape[2]
    shape, strides = (num_pages, 1, key.shape[1], key.shape[3]), (stride_token, stride_token, stride_head, 1)
    kv = KvView(key.as_strided(shape, strides), value.as_strided(shape, strides))
    q = pack(query, forward.index)
    if not forward.rows.num_queries:
        out = q
    elif mask.window is not None:
        out = forward.window_plan(mask.window).attend(kernels_for(device, config.dense()), kv, q)
    elif is_dense:
        batch = forward.dense_batch(device)
        dense = kernels_for(device, config.dense())
        out = dense.step(batch.info.num_rows, batch.info.max_block_len, batch.info.num_token_places).attend_dense(
            batch, kv, q
        )
    else:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        kernels = kernels_for(device, config)
        for piece in forward.pieces(device, config, options):
            info = piece.batch.info
            context = kernels.step(info.num_rows, info.max_block_len, info.num_token_places)
            context.select(piece.batch, kv, q[piece.begin : piece.end])
            context.attend(piece.batch, kv, q[piece.begin : piece.end], out=out[piece.begin : piece.end])
    return unpack(out, forward.index, mask.batch_size, mask.q_length)


@dataclass(frozen=True)
class _Piece:
    begin: int
    end: int
    batch: Batch


class _Forward:
    """What the layers of a forward share: its rows, without padding, and their batches."""

    def __init__(self, mask: RowMask, pages_of_row: int, device: torch.device) -> None:
        self._shared: dict[Any, Any] = {}
        self._device = device
        kept = mask.kept()
        self.index: torch.Tensor | None = None
        if kept is None:
            kept = np.ones((mask.batch_size, mask.num_seen), bool)
        elif not kept[:, mask.q_offset :].all():
            self.index = torch.from_numpy(np.flatnonzero(kept[:, mask.q_offset :])).to(device)
        slots: list[Ints] = []
        begins: list[int] = []
        counts: list[int] = []
        for row in range(mask.batch_size):
            count = int(kept[row, mask.q_offset :].sum())
            if count:
                tokens = np.flatnonzero(kept[row, mask.kv_offset :]).astype(np.int32)
                slots.append(tokens + np.int32(row * pages_of_row))
                begins.append(int(kept[row, : mask.kv_offset].sum()))
                counts.append(count)
        self.rows = Rows(slots, begins, counts)

    def window_plan(self, window: int) -> WindowPlan:
        """The rows within a sliding window."""
        if window not in self._shared:
            self._shared[window] = WindowPlan(self.rows, window, self._device)
        plan: WindowPlan = self._shared[window]
        return plan

    def dense_batch(self, device: Device) -> Batch:
        """The rows with all their tokens."""
        if ("dense", device) not in self._shared:
            self._shared["dense", device] = _batch(self.rows.slots, self.rows.num_queries)
        batch: Batch = self._shared["dense", device]
        return batch

    def pieces(self, device: Device, config: LayerConfig, options: TokenSelectOptions) -> list[_Piece]:
        """The rows in pieces of blocks that select for themselves: one piece where every row has one query."""
        key = (device, config.num_qo_heads, options.block_len, options.max_piece_len, options.max_workspace_bytes)
        if key not in self._shared:
            self._shared[key] = self._pieces(config.num_qo_heads, options)
        pieces: list[_Piece] = self._shared[key]
        return pieces

    def _pieces(self, num_qo_heads: int, options: TokenSelectOptions) -> list[_Piece]:
        rows = self.rows
        if max(rows.num_queries) == 1:
            return [_Piece(0, len(rows.num_queries), _batch(rows.slots, rows.num_queries))]
        pieces = []
        begin = 0
        for slots, count in zip(rows.slots, rows.num_queries, strict=True):
            done = 0
            while done < count:
                # A block has a logit of each head, a vote and its pooled twin for every token before it, f32.
                blocks = max(options.max_workspace_bytes // (4 * (num_qo_heads + 2) * len(slots)), 1)
                length = min(count - done, max(options.max_piece_len, options.block_len), blocks * options.block_len)
                length = max(length // options.block_len, 1) * options.block_len if length < count - done else length
                batch = _batch([slots[: len(slots) - count + done + length]], [length])
                pieces.append(_Piece(begin, begin + length, batch.in_blocks(options.block_len)))
                begin, done = begin + length, done + length
        return pieces


def _batch(slots: Any, counts: Any) -> Batch:
    indptr = [0, *itertools.accumulate(len(tokens) for tokens in slots)]
    return Batch(1, [0, *itertools.accumulate(counts)], indptr, np.concatenate(slots), [1] * len(counts))


def _pageable(states: torch.Tensor) -> torch.Tensor:
    """Where rows do not begin at whole tokens' distances (or elements of a head are apart), a copy that has them so."""
    stride_batch, stride_head, stride_token, stride_dim = states.stride()
    rows_fit = states.shape[0] == 1 or (stride_token and stride_batch % stride_token == 0 and stride_batch > 0)
    return states if stride_dim == 1 and stride_token > 0 and stride_head > 0 and rows_fit else states.contiguous()
