"""A decoding step whose lengths and page tables stay on the GPU: nothing waits, and all of it may be captured in a CUDA graph.

The tables are translated by a kernel in the stream's order, so that a replay reads what the engine has put into its buffers by then.
What would have to be made anew for that, contexts and slots, is made for the most that may come and never replaced.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from tokenselect import Batch, BatchSlot, Device
from tokenselect.torch.devices import is_capturing

from .contexts import Contexts, separate
from .layers import Layer, PagedKv

__all__ = ["DeviceStep", "Slots", "buffer_like", "check_room", "is_on_device"]

# Slots of steps that no graph has: their tables take 4 bytes a page, and each number of rows has its own.
_MAX_LOOSE_SLOTS = 8


def is_on_device(tensor: torch.Tensor) -> bool:
    """Whether tables that lie where the tensor does are translated there."""
    return bool(tensor.is_cuda)


@dataclass(frozen=True)
class _Place:
    """What a step of some shape has on the device, at addresses that stay."""

    slot: BatchSlot
    kv_lens: torch.Tensor
    is_row: torch.Tensor


def buffer_like(tensor: torch.Tensor, **more: Any) -> torch.Tensor:
    """Memory that may be written within PyTorch's inference mode and outside of it."""
    with torch.inference_mode(False):
        return torch.empty(tensor.shape, **{"dtype": tensor.dtype, "device": tensor.device, **more})


class Slots:
    """Places for tables on the device: those that were captured stay for ever, of others the last few."""

    def __init__(self) -> None:
        self._captured: dict[Any, _Place] = {}
        self._loose: OrderedDict[Any, _Place] = OrderedDict()

    def place(self, kv_lens: torch.Tensor, device: Device, page_size: int, max_pages: int, is_captured: bool) -> _Place:
        """The one for rows of one token, as many as `kv_lens` has. It must have been made before it is captured: by a step of the same
        shape. Raises `RuntimeError` where it was not."""
        num_rows = kv_lens.shape[0]
        key = (device, page_size, num_rows, max_pages)
        if key in self._captured:
            return self._captured[key]
        place = self._loose.pop(key, None)
        if place is None:
            if is_captured:
                raise RuntimeError(
                    f"a decoding step of {num_rows} rows must run once in the stream of the capture before it is captured"
                )
            slot = BatchSlot(device, Batch(page_size, [0, 1], [0, 1], [0], [1]).padded(num_rows, 1), max_pages)
            place = _Place(slot, buffer_like(kv_lens), buffer_like(kv_lens, dtype=torch.bool))
        if is_captured:
            self._captured[key] = place
            return place
        self._loose[key] = place
        while len(self._loose) > _MAX_LOOSE_SLOTS:
            self._loose.popitem(last=False)
        return place


class DeviceStep:
    """Rows of one token each, and what the layers of a forward share.

    `entries`, `[table_rows, width]`, are pages in token order, or with `are_slots` the slot of each token; `rows`, `[num_rows]`, the row
    of `entries` of each row, None for its own number; `kv_lens`, `[num_rows]`, its tokens with the new one, 0 for padding, for which
    outputs are zeros. Rows whose first entry is `null_entry` are padding, too. All are int32 or int64 and stay where they are; rows of
    `entries` may be parts of longer ones. `max_kv_tokens` is what all rows together may have, in whole pages, and `max_rows` what any
    such step has. Raises `NotImplementedError` for tables of other types, or that are not rows of adjacent entries.
    """

    def __init__(
        self,
        slots: Slots,
        entries: torch.Tensor,
        kv_lens: torch.Tensor,
        rows: torch.Tensor | None,
        *,
        are_slots: bool,
        max_rows: int,
        max_kv_tokens: int,
        null_entry: int | None = None,
    ) -> None:
        self._slots, self._entries, self._kv_lens, self._rows = slots, entries, kv_lens, rows
        self._are_slots, self._null_entry = are_slots, null_entry
        self.num_rows = kv_lens.shape[0]
        self.max_rows, self.max_kv_tokens = max_rows, max_kv_tokens
        for name, tensor in {"entries": self._entries, "kv_lens": kv_lens, "rows": rows}.items():
            if tensor is not None and not (tensor.dtype in (torch.int32, torch.int64) and _is_of_rows(tensor)):
                raise NotImplementedError(
                    f"tokenselect translates `{name}` that are int32 or int64 in rows of adjacent entries, got {tensor.dtype} with strides "
                    f"{tensor.stride()}"
                )
        self._batches: dict[Any, Batch] = {}

    def prepare(self, device: Device, page_size: int) -> None:
        """Makes the place for the tables, which a capture that follows must find."""
        self._slots.place(self._kv_lens, device, page_size, self._max_pages(page_size), False)

    def translate(self, device: Device, page_size: int, num_pages: int) -> Batch:
        """The batch over the tables as they are when the device comes to it: translated once for all layers, and once more when that is
        captured. The pool has `num_pages` pages."""
        is_captured = is_capturing(self._kv_lens)
        key = (device, page_size, is_captured)
        if key not in self._batches:
            kv_lens, max_pages = self._kv_lens, self._max_pages(page_size)
            place = self._slots.place(kv_lens, device, page_size, max_pages, is_captured)
            if self._null_entry is not None:
                torch.ne(self._entries[:, 0], self._null_entry, out=place.is_row)
                kv_lens = torch.mul(kv_lens, place.is_row, out=place.kv_lens)
            self._batches[key] = place.slot.translate(
                self._entries, kv_lens, num_pages, slots=self._are_slots, rows=self._rows
            )
        return self._batches[key]

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
        """As `HostStep.attend`."""
        batch = self.translate(device, kv.page_size, kv.num_pages)
        separate(device)
        context = contexts.fixed(device, layer, self.max_rows, self._max_pages(kv.page_size) * kv.page_size)
        count = self.num_rows
        q, to = q[:count], out[:count]
        if new is not None:
            new = (new[0][:count], new[1][:count])
        if layer.is_dense:
            if new is not None:
                context.append(batch, kv.view, *new)
            context.attend_dense(batch, kv.view, q, out=to)
        else:
            if new is None:
                context.select(batch, kv.view, q)
            else:
                context.append_select(batch, kv.view, q, *new)
            context.attend(batch, kv.view, q, out=to)
        if out.shape[0] > count:
            out[count:].zero_()

    def _max_pages(self, page_size: int) -> int:
        return -(-self.max_kv_tokens // page_size)


def _is_of_rows(tensor: torch.Tensor) -> bool:
    """Whether entries of a row, or of a table of one dimension, are adjacent."""
    return bool(tensor.is_contiguous() or (tensor.dim() == 2 and tensor.stride(1) == 1))


def check_room(kv_lens: torch.Tensor, page_size: int, max_kv_tokens: int) -> None:
    """Raises `RuntimeError` where sequences of these lengths, on the host, have more pages than a `DeviceStep` has room for: the device
    would leave rows without tokens and nobody would hear of it."""
    needed = int((torch.div(kv_lens + (page_size - 1), page_size, rounding_mode="floor") * page_size).sum())
    if needed > max_kv_tokens:
        raise RuntimeError(
            f"the sequences of a decoding step have {needed} tokens in whole pages, `max_kv_tokens` is {max_kv_tokens}: set "
            "TOKENSELECT_MAX_KV_TOKENS to more, or let the engine run fewer sequences at a time"
        )
