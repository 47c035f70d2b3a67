"""Pools of one layer of a `TokenSelectCache`, and what it leaves for attention to write."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from tokenselect import KvView

if TYPE_CHECKING:
    from .cache import TokenSelectCache

__all__ = ["Announced", "TokenSelectLayer"]


class Announced:
    """What `TokenSelectCache.update` leaves on a key tensor: whose keys these are, until attention writes them."""

    def __init__(self, cache: TokenSelectCache, layer_idx: int, begin: int) -> None:
        self.cache, self.layer_idx, self.begin = cache, layer_idx, begin


class TokenSelectLayer(CacheLayerMixin):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """Pools of one layer. Rows, and all that changes them, belong to the `TokenSelectCache`."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False
    keys: torch.Tensor | None
    values: torch.Tensor | None

    def __init__(self, is_sliding: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.is_sliding = is_sliding
        self.record_past = False
        self.num_seen = 0  # positions that `update` was called for, padding included
        self.announced: Announced | None = None
        self.window: int | None = None
        self.view: KvView | None = None  # pages as they are
        self.token_view: KvView | None = None  # the same memory as pages of one token

    def reserve(self, num_pages: int, page_size: int, like: torch.Tensor) -> None:
        """Makes the pools, or larger ones with the same contents. `like` is `[tokens, num_kv_heads, head_dim]`."""
        if self.keys is not None and self.keys.shape[0] >= num_pages:
            return
        pools = []
        for old in (self.keys, self.values):
            pool = like.new_empty((num_pages, page_size, *like.shape[1:]))
            if old is not None:
                pool[: old.shape[0]].copy_(old)
            pools.append(pool)
        self._set_pools(pools[0], pools[1])

    def forget_others(self, like: torch.Tensor) -> None:
        """Drops pools, in which no token is, that are of another type, place or shape than `like`: those of another model."""
        if self.keys is not None and (self.keys.dtype, self.keys.device, self.keys.shape[2:]) != (
            like.dtype,
            like.device,
            like.shape[1:],
        ):
            self.keys = self.values = self.view = self.token_view = None

    def copied(self) -> TokenSelectLayer:
        """One with copies of the pools, for a copy of the cache."""
        made = copy.copy(self)
        if self.keys is not None and self.values is not None:
            made._set_pools(self.keys.clone(), self.values.clone())
        return made

    def _set_pools(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values
        self.is_initialized = True
        self.view = KvView(keys, values)
        k, v = (pool.view(-1, 1, *pool.shape[2:]) for pool in (keys, values))
        self.token_view = KvView(k, v)

    def copy_pages(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copies whole pages."""
        for pool in (self.keys, self.values):
            if pool is not None:
                pool.index_copy_(0, targets.to(pool.device), pool.index_select(0, sources.to(pool.device)))

    def activate_past_recording(self) -> None:
        """Keeps what a sliding window leaves behind, until `TokenSelectCache.crop`."""
        self.record_past = True

    def get_seq_length(self) -> int:
        """Positions so far, padding included."""
        return self.num_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask is for: all positions."""
        return self.num_seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the first step makes the pools."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Refused."""
        raise self._refused("update")

    def offload(self) -> None:
        """Refused."""
        raise self._refused("offload")

    def prefetch(self) -> None:
        """Refused."""
        raise self._refused("prefetch")

    def reset(self) -> None:
        """Refused."""
        raise self._refused("reset")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Refused."""
        raise self._refused("reorder_cache")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused."""
        raise self._refused("batch_repeat_interleave")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refused."""
        raise self._refused("batch_select_indices")

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenSelectLayer:
        raise self._refused("copy.deepcopy")

    def crop(self, tokens_to_remove: int) -> None:
        """Refused."""
        raise self._refused("crop")

    @staticmethod
    def _refused(method: str) -> NotImplementedError:
        return NotImplementedError(
            f"layers of a TokenSelectCache share their rows: call `{method}` of the cache, which has it for all layers, "
            "or not at all"
        )
