"""Devices and contexts of the library, made once for each kind of layer and shared by all models of a thread."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import torch

from tokenselect import Config, Context, Device

from .options import TokenSelectOptions

__all__ = ["Kernels", "LayerConfig", "device_of", "kernels_for", "release"]

_DTYPES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}


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
        if query.dtype not in _DTYPES or key.dtype != query.dtype:
            raise NotImplementedError(
                "attn_implementation='tokenselect' takes queries and keys of float16, bfloat16 or float32, got "
                f"{query.dtype} and {key.dtype}"
            )
        sm_scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        return cls(
            num_qo_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=query.shape[3],
            dtype=_DTYPES[query.dtype],
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
        self._step: tuple[Context, tuple[int, int, int]] | None = None
        self._reader: tuple[Context, tuple[int, int, int, int]] | None = None

    def step(self, rows: int, block_len: int, kv_tokens: int) -> Context:
        """A context for batches of up to so many rows, query tokens of a row, and tokens cached by all rows."""
        need = (rows, block_len, kv_tokens)
        if self._step is None or any(got < want for got, want in zip(self._step[1], need)):
            had = self._step[1] if self._step else (0, 0, 0)
            # Twice what is needed where it grows, so that a sequence which gets longer comes here seldom.
            room = tuple(got if got >= want else _round_up(want) for got, want in zip(had, need))
            self._step = None  # gives its workspace back first
            dense = self.layer == self.layer.dense()
            more = {"operations": ["append", "attend"]} if dense else {}
            context = Context(
                self.device, self.config, max_rows=room[0], max_block_len=room[1], max_kv_tokens=room[2], **more
            )
            self._step = (context, (room[0], room[1], room[2]))
        return self._step[0]

    def reader(self, options: TokenSelectOptions, kv_len: int) -> Context:
        """A context that reads prompts until a sequence has `kv_len` tokens."""
        wanted = (options.block_len, options.max_piece_len, options.max_workspace_bytes)
        if self._reader is None or self._reader[1][:3] != wanted or self._reader[1][3] < kv_len:
            room = _round_up(kv_len)
            self._reader = None
            context = Context.for_prefill(
                self.device,
                self.config,
                block_len=options.block_len,
                max_piece_len=options.max_piece_len,
                max_workspace_bytes=options.max_workspace_bytes,
                max_kv_len=room,
            )
            self._reader = (context, (*wanted, room))
        return self._reader[0]


# Contexts are used by one thread at a time.
_of_thread = threading.local()


def device_of(tensor: torch.Tensor, given: Device | None = None) -> Device:
    """The library's device for a tensor: the processor, or a GPU with PyTorch's current stream."""
    if given is not None:
        return given
    devices: dict[Any, Device] = _registry("devices")
    if tensor.device.type == "cpu":
        key: tuple[Any, ...] = ("cpu",)
        if key not in devices:
            devices[key] = Device.cpu()
        return devices[key]
    if tensor.device.type != "cuda" or torch.version.hip is not None:
        raise NotImplementedError(
            f"attn_implementation='tokenselect' runs on the processor and on CUDA devices, got {tensor.device}"
        )
    stream = torch.cuda.current_stream(tensor.device).cuda_stream
    ordinal = tensor.device.index
    if ("cuda", ordinal, stream) not in devices:
        # The library uses the current context if it is that device's.
        with torch.cuda.device(tensor.device):
            devices["cuda", ordinal, stream] = Device.cuda(ordinal, stream=stream)
    return devices["cuda", ordinal, stream]


def kernels_for(device: Device, layer: LayerConfig) -> Kernels:
    """The contexts of a configuration on a device, in this thread."""
    kernels: dict[Any, Kernels] = _registry("kernels")
    key = (device, layer)
    if key not in kernels:
        kernels[key] = Kernels(device, layer)
    return kernels[key]


def release() -> None:
    """Gives back the workspaces of this thread's contexts, which models and caches share; the next step makes them anew."""
    _of_thread.__dict__.clear()


def _registry(name: str) -> dict[Any, Any]:
    found: dict[Any, Any] = _of_thread.__dict__.setdefault(name, {})
    return found


def _round_up(number: int) -> int:
    return 1 << (number - 1).bit_length() if number > 1 else 1
