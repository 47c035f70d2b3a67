"""What a layer computes, and its cache as the library sees it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from tokenselect import Config, KvView
from tokenselect.torch.devices import DTYPES

from .options import EngineOptions

__all__ = ["Layer", "PagedKv"]


@dataclass(frozen=True)
class Layer:
    """All that decides what a layer computes, hashable: layers that are equal share contexts."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    sm_scale: float
    logits_soft_cap: float
    score_scale: float
    n_init: int
    n_local: int
    top_k: int
    vote_pool_window: int
    is_dense: bool

    @classmethod
    def of(
        cls,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        scale: float,
        soft_cap: float | None,
        options: EngineOptions,
    ) -> Layer:
        """A layer that selects. Raises `NotImplementedError` for types that the library does not have."""
        if dtype not in DTYPES:
            raise NotImplementedError(f"tokenselect takes keys and values of float16, bfloat16 or float32, got {dtype}")
        return cls(
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=DTYPES[dtype],
            sm_scale=float(scale),
            logits_soft_cap=float(soft_cap or 0.0),
            score_scale=float(scale if options.score_scale is None else options.score_scale),
            n_init=options.n_init,
            n_local=options.n_local,
            top_k=options.top_k,
            vote_pool_window=options.vote_pool_window,
            is_dense=False,
        )

    def dense(self) -> Layer:
        """The same attention without a selection, which needs no room for lists."""
        return replace(self, score_scale=self.sm_scale, n_init=0, n_local=0, top_k=1, vote_pool_window=1, is_dense=True)

    def config(self) -> Config:
        """The library's."""
        return Config(
            num_qo_heads=self.num_qo_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            sm_scale=self.sm_scale,
            logits_soft_cap=self.logits_soft_cap,
            score_scale=self.score_scale,
            n_init=self.n_init,
            n_local=self.n_local,
            top_k=self.top_k,
            vote_pool_window=self.vote_pool_window,
            # Which request a row belongs to is not told apart when a place of the engine's tables is used again.
            selection_cache=0,
        )


class PagedKv:
    """Keys and values of a layer where the engine keeps them, with any strides: `[num_pages, page_size, num_kv_heads, head_dim]`
    (`NHD`) or `[num_pages, num_kv_heads, page_size, head_dim]` (`HND`). Nothing is copied."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, layout: Literal["NHD", "HND"]) -> None:
        self.k, self.v, self.layout = k, v, layout
        self.view = KvView(k, v, layout)
        self.num_pages: int = k.shape[0]
        self.page_size: int = k.shape[1 if layout == "NHD" else 2]
        self.num_kv_heads: int = k.shape[2 if layout == "NHD" else 1]
        self.head_dim: int = k.shape[3]

    def tokens(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of some tokens, `[tokens, num_kv_heads, head_dim]`, copied. A slot is page times page size and place."""
        page, place = slots // self.page_size, slots % self.page_size
        at: Any = (page, place) if self.layout == "NHD" else (page, slice(None), place)
        return self.k[at], self.v[at]
