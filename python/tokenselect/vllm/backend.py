"""The backend class that vLLM's registry names, and the implementation of a layer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionType

from tokenselect.engines.layers import Layer, PagedKv
from tokenselect.torch.devices import device_of

from .metadata import TokenSelectMetadata, TokenSelectMetadataBuilder, options_of

__all__ = ["TokenSelectBackend", "TokenSelectImpl"]


class TokenSelectBackend(AttentionBackend):  # type: ignore[misc]
    """What vLLM asks before it makes layers. Sliding windows, sinks, MLA, quantised caches, encoders, DCP and PCP are declined here, by
    vLLM's own checks."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]
    # Writing keys and values is one launch with the selection's first.
    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[TokenSelectImpl]:
        return TokenSelectImpl

    @staticmethod
    def get_builder_cls() -> type[TokenSelectMetadataBuilder]:
        return TokenSelectMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [16, 32, 64, 128, 256]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [64, 96, 128, 256]

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return bool(capability.major >= 8)

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def supported_kv_cache_layouts(cls) -> None:
        """Any strides."""
        return None


class TokenSelectImpl(AttentionImpl[TokenSelectMetadata]):  # type: ignore[misc]
    """Attention of a layer over the tokens that it selects.

    Raises `NotImplementedError` for layers that cannot select: name another backend for their kind in `backend_per_kind`.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **more: Any,
    ) -> None:
        refused = {
            "ALiBi (`alibi_slopes`)": alibi_slopes is not None,
            f"a sliding window ({sliding_window})": sliding_window is not None,
            f"a cache of {kv_cache_dtype}": kv_cache_dtype not in TokenSelectBackend.supported_kv_cache_dtypes,
            f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
            **{f"`{name}`": value is not None for name, value in more.items()},
        }
        for what, is_there in refused.items():
            if is_there:
                raise NotImplementedError(
                    f"tokenselect does not serve {what}: name another attention backend for such layers in `backend_per_kind`"
                )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.options = options_of(get_current_vllm_config())
        self._kv: tuple[Any, PagedKv] | None = None
        self._layer: Layer | None = None

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: TokenSelectMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes keys and values of the batch, and `output`: `query` and `output` are `[tokens, num_heads, head_size]`, `key` and
        `value` `[tokens, num_kv_heads, head_size]`, `kv_cache` `[blocks, num_kv_heads, block_size, 2 * head_size]` in any order of
        strides. Without metadata, as when memory is profiled, the output is zeros."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("tokenselect does not quantise its output (`output_scale`)")
        if attn_metadata is None:
            return output.fill_(0)
        kv = self._cache(kv_cache)
        if self._layer is None:
            self._layer = self._made(layer, kv_cache.dtype)
        if query.dtype != kv_cache.dtype:
            raise NotImplementedError(
                f"tokenselect needs queries of the cache's type, {kv_cache.dtype}, got {query.dtype}"
            )
        count = attn_metadata.num_actual_tokens
        is_written = self.kv_sharing_target_layer_name is not None or key is None or value is None
        new = None if is_written else (key[:count], value[:count])  # type: ignore[index]
        out = output.view(-1, self.num_heads, self.head_size)
        with torch.no_grad():
            attn_metadata.step(kv).attend(
                attn_metadata.contexts, device_of(query), self._layer, kv, query[:count], new, out[:count]
            )
        return output

    def _cache(self, kv_cache: torch.Tensor) -> PagedKv:
        key = (kv_cache.data_ptr(), kv_cache.shape, kv_cache.stride())
        if self._kv is None or self._kv[0] != key:
            size = self.head_size
            if kv_cache.dim() != 4 or kv_cache.shape[1] != self.num_kv_heads or kv_cache.shape[3] != 2 * size:
                raise NotImplementedError(
                    f"tokenselect needs a cache of [blocks, {self.num_kv_heads}, block_size, {2 * size}], got {tuple(kv_cache.shape)}"
                )
            if kv_cache.stride(3) != 1:
                raise NotImplementedError(
                    f"tokenselect needs a cache whose keys and values are adjacent, its strides are {kv_cache.stride()}"
                )
            self._kv = (key, PagedKv(kv_cache[..., :size], kv_cache[..., size:], "HND"))
        return self._kv[1]

    def _made(self, layer: Any, dtype: torch.dtype) -> Layer:
        made = Layer.of(
            self.num_heads, self.num_kv_heads, self.head_size, dtype, self.scale, self.logits_soft_cap, self.options
        )
        if self.options.dense_layers and _index_of(layer) in self.options.dense_layers:
            return made.dense()
        return made


def _index_of(layer: Any) -> int:
    """The number in a layer's name, as vLLM reads it."""
    name = str(getattr(layer, "layer_name", ""))
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if len(numbers) != 1:
        raise ValueError(f"`dense_layers` needs names of layers with one number, got {name!r}")
    return numbers[0]
