"""Contexts of the library, made once for each kind of layer and shared by all models of a thread."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from tokenselect import Config, Context, Device
from tokenselect.torch.devices import DTYPES
from tokenselect.torch.growing import Growing

from .options import TokenSelectOptions

__all__ = ["Kernels", "LayerConfig", "kernels_for", "release"]


@dataclass(frozen=True)
class LayerConfig:
    """All that decides what a layer computes: the fields of `tokenselect.Config`, hashable. `rope` are the items of its `rope`."""

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
    threshold: float | None
    max_reuse: int | None
    rope: tuple[tuple[str, float | int | str], ...] | None

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        *,
        scaling: float | None,
        softcap: float | None,
        options: TokenSelectOptions,
        layer: int,
        rope: tuple[tuple[str, float | int | str], ...] | None,
    ) -> LayerConfig:
        """From a layer's queries and keys, `[batch, heads, tokens, head_dim]`."""
        if query.dtype not in DTYPES or key.dtype != query.dtype:
            raise NotImplementedError(
                "attn_implementation='tokenselect' takes queries and keys of float16, bfloat16 or float32, got "
                f"{query.dtype} and {key.dtype}"
            )
        sm_scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        return cls(
            num_qo_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=query.shape[3],
            dtype=DTYPES[query.dtype],
            sm_scale=sm_scale,
            logits_soft_cap=float(softcap or 0.0),
            score_scale=sm_scale if options.score_scale is None else options.score_scale,
            n_init=options.n_init,
            n_local=options.n_local,
            top_k=options.top_k,
            vote_pool_window=options.vote_pool_window,
            threshold=options.threshold(layer),
            max_reuse=options.max_reuse,
            rope=rope,
        )

    def dense(self) -> LayerConfig:
        """The same attention without a selection, which needs no room for lists."""
        return replace(
            self,
            score_scale=self.sm_scale,
            n_init=0,
            n_local=0,
            top_k=1,
            vote_pool_window=1,
            threshold=None,
            max_reuse=None,
        )

    def config(self) -> Config:
        """The library's."""
        fields: dict[str, Any] = {
            "num_qo_heads": self.num_qo_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "dtype": self.dtype,
            "sm_scale": self.sm_scale,
            "logits_soft_cap": self.logits_soft_cap,
            "score_scale": self.score_scale,
            "n_init": self.n_init,
            "n_local": self.n_local,
            "top_k": self.top_k,
            "vote_pool_window": self.vote_pool_window,
            "selection_cache": int(self.threshold is not None),
        }
        if self.threshold is not None:
            fields["similarity_threshold"] = self.threshold
        if self.max_reuse is not None:
            fields["max_reuse"] = self.max_reuse
        if self.rope is not None:
            fields.update(positions="reassigned", rope=dict(self.rope))
        return Config(**fields)


class Kernels:
    """Contexts of one configuration on one device, each made when it is first needed and again, larger, when it must be.

    `Device` and `Config` are held; the contexts' workspaces are what they cost.
    """

    def __init__(self, device: Device, layer: LayerConfig) -> None:
        self.device, self.layer = device, layer
        self.config = layer.config()
        self._step = Growing(self._make_step)
        self._reader: tuple[tuple[int, int, int], Growing] | None = None

    def step(self, rows: int, block_len: int, kv_tokens: int) -> Context:
        """A context for batches of up to so many rows, query tokens of a row, and tokens cached by all rows."""
        return self._step.get(rows, block_len, kv_tokens)

    def reader(self, options: TokenSelectOptions, kv_len: int) -> Context:
        """A context that reads prompts until a sequence has `kv_len` tokens."""
        wanted = (options.block_len, options.max_piece_len, options.max_workspace_bytes)
        if self._reader is None or self._reader[0] != wanted:
            self._reader = None  # gives its workspace back first
            self._reader = (wanted, Growing(partial(self._make_reader, *wanted)))
        return self._reader[1].get(kv_len)

    def _make_step(self, rows: int, block_len: int, kv_tokens: int) -> Context:
        more: dict[str, Any] = {"operations": ["append", "attend"]} if self.layer == self.layer.dense() else {}
        return Context(
            self.device, self.config, max_rows=rows, max_block_len=block_len, max_kv_tokens=kv_tokens, **more
        )

    def _make_reader(self, block_len: int, max_piece_len: int, max_workspace_bytes: int, kv_len: int) -> Context:
        return Context.for_prefill(
            self.device,
            self.config,
            block_len=block_len,
            max_piece_len=max_piece_len,
            max_workspace_bytes=max_workspace_bytes,
            max_kv_len=kv_len,
        )


# Contexts are used by one thread at a time.
_of_thread = threading.local()


def kernels_for(device: Device, layer: LayerConfig) -> Kernels:
    """The contexts of a configuration on a device, in this thread."""
    kernels: dict[Any, Kernels] = _of_thread.__dict__.setdefault("kernels", {})
    key = (device, layer)
    if key not in kernels:
        kernels[key] = Kernels(device, layer)
    return kernels[key]


def release() -> None:
    """Gives back the workspaces of this thread's contexts, which models and caches share; the next step makes them anew."""
    _of_thread.__dict__.clear()
