"""Attention masks as rows: which tokens of a batch are padding, and how far a query looks back.

transformers describes a mask by a function of positions (`causal_mask_function` and what is combined with it) and a 2-D padding
mask. Kernels that work on rows of their own lengths need neither the function's values nor a tensor `[batch, 1, queries, keys]`:
`tokenselect_mask` recognises the functions that it can honour and refuses the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import masking_utils

__all__ = ["RowMask", "tokenselect_mask"]


class RowMask:
    """What the layers of one kind need of a forward's mask.

    A query at position `p` (of `q_offset + t`) sees the tokens at positions up to `p` that are not padding, and with a `window`
    the last `window` of these: padding between them does not count, as it does in transformers' own masks. Keys given to attention begin at position `kv_offset`.
    """

    # As of the 4-D mask that it stands for: `generate` makes masks before the forward where caches are static, and the forward
    # then asks for their dimensions.
    ndim = 4

    def __init__(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int,
        kv_offset: int,
        window: int | None,
        padding_mask: torch.Tensor | None,
    ) -> None:
        self.batch_size, self.q_length, self.kv_length = batch_size, q_length, kv_length
        self.q_offset, self.kv_offset, self.window = q_offset, kv_offset, window
        self.shape = (batch_size, 1, q_length, kv_length)
        self._padding_mask = padding_mask
        self._kept: np.ndarray[Any, Any] | None = None
        # What layers work out from this mask and share.
        self.shared: dict[Any, Any] = {}

    @property
    def num_seen(self) -> int:
        """Positions up to the last query's."""
        return self.q_offset + self.q_length

    def kept(self) -> np.ndarray[Any, Any] | None:
        """`[batch_size, num_seen]` bool: tokens that are not padding; None where all are. Waits for the device, once."""
        if self._padding_mask is None:
            return None
        if self._kept is None:
            mask = self._padding_mask
            if mask.shape[0] != self.batch_size:
                raise ValueError(f"`attention_mask` must have {self.batch_size} rows, got {mask.shape[0]}")
            kept = mask[:, : self.num_seen].to(device="cpu", dtype=torch.bool).numpy()
            # transformers takes a mask that is too short as padding behind its end.
            self._kept = np.pad(kept, ((0, 0), (0, self.num_seen - kept.shape[1])))
        return self._kept


def tokenselect_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | RowMask | None = None,
    **kwargs: Any,
) -> RowMask:
    """The mask of `attn_implementation="tokenselect"`: arguments as those of `transformers.masking_utils.sdpa_mask`.

    Raises `NotImplementedError` for masks that are not causal with padding, within a sliding window or without.
    """
    if isinstance(attention_mask, RowMask):
        return attention_mask
    window = _window_of(mask_function)
    return RowMask(batch_size, q_length, kv_length, int(q_offset), int(kv_offset), window, attention_mask)


def from_4d(mask: torch.Tensor, kv_length: int) -> RowMask:
    """The rows of a 4-D mask `[batch, 1, queries, keys]`, bool or added to logits, that is causal with padding.

    Raises `NotImplementedError` where it is something else.
    """
    if mask.ndim != 4 or mask.shape[-1] < kv_length:
        raise NotImplementedError(
            f"`attention_mask` must be [batch, keys] or [batch, 1, queries, keys] for {kv_length} keys, got {tuple(mask.shape)}"
        )
    seen = _seen(mask)[..., :kv_length].to("cpu")
    batch_size, heads, q_length, _ = seen.shape
    q_offset = kv_length - q_length
    positions = torch.arange(kv_length)
    causal = positions <= positions[q_offset:, None]
    seen_by = seen[:, 0]
    own = seen_by.diagonal(q_offset, 1, 2)
    # The last query that sees itself is no padding, and sees all that is none.
    order = torch.arange(1, q_length + 1)
    last = (own * order).argmax(1)
    kept = seen_by[torch.arange(batch_size), last] & causal[last] & own.any(1, keepdim=True)
    rows = kept[:, q_offset:, None]
    expected = causal & kept[:, None]
    # What queries of padding see means nothing; but what sees other than nothing, all, itself or the tokens before it is none.
    alone = torch.zeros_like(seen_by)
    alone.diagonal(q_offset, 1, 2).copy_(own)
    is_padding = ~seen_by.any(2) | seen_by.all(2)
    for means_nothing in (alone, expected, expected | alone):
        is_padding |= (seen_by == means_nothing).all(2)
    is_right = (seen_by & rows).equal(expected & rows) and bool((is_padding | rows[..., 0]).all())
    if heads != 1 or not is_right:
        raise NotImplementedError(
            "attn_implementation='tokenselect' takes 4-D masks that are causal with padding; this `attention_mask` of shape "
            f"{tuple(mask.shape)} is not. Give a 2-D mask of padding, or use attn_implementation='sdpa'"
        )
    return RowMask(batch_size, q_length, kv_length, q_offset, 0, None, None if bool(kept.all()) else kept)


def _seen(mask: torch.Tensor) -> torch.Tensor:
    """Which keys a 4-D mask lets queries see."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise NotImplementedError(f"a 4-D `attention_mask` must be bool or added to logits, got {mask.dtype}")
    seen = mask == 0
    if bool((mask[~seen] > _HIDDEN).any()) or bool(mask.isnan().any()):
        raise NotImplementedError(
            "attn_implementation='tokenselect' takes 4-D masks that are added to logits only where they are 0 or hide a token "
            f"({_HIDDEN} or less), and this `attention_mask` of shape {tuple(mask.shape)} has other values: biases. Give a mask of "
            "bool, a 2-D mask of padding, or use attn_implementation='sdpa'"
        )
    return seen


# What is added to a logit for no weight to be left of it.
_HIDDEN = -1e4

_CAUSAL = masking_utils.causal_mask_function
_AND = masking_utils.and_masks(_CAUSAL).__code__
_SLIDING = masking_utils.sliding_window_overlay(1).__code__
_REFUSED = {
    masking_utils.or_masks(_CAUSAL).__code__: "tokens that see tokens behind them",
    masking_utils.bidirectional_mask_function.__code__: "encoders and cross-attention",
    masking_utils.chunked_overlay(1, torch.zeros(1)).__code__: "chunked attention",
    masking_utils.packed_sequence_mask_function(torch.zeros(1, 1)).__code__: "several sequences packed in one row",
}


def _window_of(mask_function: Callable[..., Any]) -> int | None:
    """The sliding window of a causal mask; None without one."""
    windows: list[int] = []
    is_causal = False
    functions = [mask_function]
    while functions:
        function = functions.pop()
        code = getattr(function, "__code__", None)
        if function is _CAUSAL:
            is_causal = True
        elif code is _AND:
            functions.extend(_closed_over(function, "mask_functions"))
        elif code is _SLIDING:
            windows.append(int(_closed_over(function, "sliding_window")))
        else:
            name = getattr(function, "__qualname__", type(function).__name__)
            reason = (
                _REFUSED.get(code, f"the mask function `{name}`") if code is not None else f"the mask function `{name}`"
            )
            raise _refused(reason)
    if not is_causal:
        raise _refused("a mask that is not causal")
    return min(windows, default=None)


def _refused(reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"attn_implementation='tokenselect' has no kernel for {reason}: it serves causal self-attention with padding and sliding "
        "windows. A part of a model may have another: attn_implementation={'text_config': 'tokenselect', 'vision_config': 'sdpa'}"
    )


def _closed_over(function: Callable[..., Any], name: str) -> Any:
    closure = getattr(function, "__closure__", None) or ()
    return dict(zip(function.__code__.co_freevars, closure, strict=True))[name].cell_contents
