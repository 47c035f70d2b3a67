"""What vLLM says of a batch, as a step: the builder of a group of layers, and the metadata that it builds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from tokenselect.engines.contexts import Contexts, shared_contexts
from tokenselect.engines.device_step import DeviceStep, Slots, check_room, is_on_device
from tokenselect.engines.host_step import HostStep
from tokenselect.engines.layers import PagedKv
from tokenselect.engines.options import EngineOptions

__all__ = ["TokenSelectMetadata", "TokenSelectMetadataBuilder", "options_of"]

# vLLM's block for what is not there: tables of nothing else are those of padding and of runs that warm up.
_NULL_BLOCK = 0


def options_of(vllm_config: Any) -> EngineOptions:
    """Options of the environment, and of `tokenselect` in vLLM's `additional_config`.

    Raises `ValueError` for what is no option.
    """
    more = getattr(vllm_config, "additional_config", None)
    given = more.get("tokenselect") if isinstance(more, dict) else None
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"`tokenselect` in the additional config must be a dictionary of options, got {given!r}")
    return EngineOptions.read(given)


@dataclass
class TokenSelectMetadata(AttentionMetadata):  # type: ignore[misc]
    """A batch as the layers of a group share it; the tables are vLLM's own buffers."""

    contexts: Contexts
    num_actual_tokens: int
    query_lens: list[int]
    """Tokens of each request, 0 for padding."""
    seq_lens: torch.Tensor
    """`[num_reqs]` int32."""
    block_table: torch.Tensor
    """`[num_reqs, blocks]` int32."""
    on_device: DeviceStep | None
    """The step where every request has one token and the tables are on a GPU."""
    _on_host: dict[int, HostStep] = field(default_factory=dict)

    def step(self, kv: PagedKv) -> DeviceStep | HostStep:
        """The step over a cache. Where it is not `on_device`, the first layer reads the tables, which waits for the GPU."""
        if self.on_device is not None:
            return self.on_device
        if kv.page_size not in self._on_host:
            kv_lens = self.seq_lens.cpu().tolist()
            width = -(-max(kv_lens, default=0) // kv.page_size)
            tables: Any = self.block_table[:, : max(width, 1)].cpu().numpy().astype(np.int32, copy=False)
            kv_lens = [0 if table[0] == _NULL_BLOCK else length for table, length in zip(tables, kv_lens, strict=True)]
            below = self.contexts.options.dense_below
            self._on_host[kv.page_size] = HostStep(kv.page_size, self.query_lens, kv_lens, list(tables), below)
        return self._on_host[kv.page_size]


class TokenSelectMetadataBuilder(AttentionMetadataBuilder[TokenSelectMetadata]):  # type: ignore[misc]
    """Builds the metadata of a group of layers. Batches of one token a request are captured in full CUDA graphs."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._contexts = shared_contexts(options_of(vllm_config))
        self._slots = Slots()
        self._block_size = int(kv_cache_spec.block_size)
        self._max_rows = int(vllm_config.scheduler_config.max_num_seqs)
        self._max_kv_tokens = self._room(vllm_config)
        self._init_reorder_batch_threshold(1)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TokenSelectMetadata:
        """Raises `NotImplementedError` for what the library does not compute, and `RuntimeError` for more tokens than there is room
        for."""
        metadata = self._build(common_attn_metadata)
        if metadata.on_device is not None:
            bound = common_attn_metadata.seq_lens_cpu_upper_bound
            # Without the bound every sequence may be the longest.
            longest = [int(common_attn_metadata.max_seq_len)] * sum(metadata.query_lens)
            check_room(torch.tensor(longest) if bound is None else bound, self._block_size, self._max_kv_tokens)
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> TokenSelectMetadata:
        """As `build`, of lengths that no cache need have room for. Raises `NotImplementedError` for batches whose requests have more
        than one token, or unequally many."""
        metadata = self._build(common_attn_metadata)
        if metadata.on_device is None and is_on_device(metadata.seq_lens):
            raise NotImplementedError(
                "tokenselect can be captured in a full CUDA graph where every request has one token, got "
                f"{metadata.query_lens}: set `cudagraph_mode` to FULL_AND_PIECEWISE, FULL_DECODE_ONLY or PIECEWISE"
            )
        return metadata

    def _build(self, common: CommonAttentionMetadata) -> TokenSelectMetadata:
        _refuse(common)
        starts = common.query_start_loc_cpu[: common.num_reqs + 1]
        query_lens = (starts[1:] - starts[:-1]).tolist()
        seq_lens = common.seq_lens[: common.num_reqs]
        block_table = common.block_table_tensor[: common.num_reqs]
        on_device = None
        if is_on_device(seq_lens) and _is_decode(query_lens, common.num_actual_tokens):
            on_device = DeviceStep(
                self._slots,
                block_table,
                seq_lens,
                None,
                are_slots=False,
                max_rows=max(self._max_rows, common.num_reqs),
                max_kv_tokens=self._max_kv_tokens,
                null_entry=_NULL_BLOCK,
            )
        return TokenSelectMetadata(
            self._contexts, common.num_actual_tokens, query_lens, seq_lens, block_table, on_device
        )

    def _room(self, vllm_config: Any) -> int:
        """Tokens of a decoding step."""
        given = self._contexts.options.max_kv_tokens
        if given is not None:
            return given
        size = self._block_size
        longest = -(-int(vllm_config.model_config.max_model_len) // size) * size
        room = self._max_rows * longest
        cache = vllm_config.cache_config
        blocks = getattr(cache, "num_gpu_blocks", None)
        return min(room, int(blocks) * int(cache.block_size)) if blocks else room


def _is_decode(query_lens: list[int], num_actual_tokens: int) -> bool:
    """Whether token `r` is request `r`'s only one, for all requests that are no padding."""
    ones = sum(query_lens)
    is_single = query_lens[:ones] == [1] * ones and not any(query_lens[ones:])
    return is_single and ones > 0 and num_actual_tokens >= len(query_lens)


def _refuse(common: CommonAttentionMetadata) -> None:
    refused = {
        "attention that is not causal": common.causal is not True,
        "decode context parallelism (`dcp_local_seq_lens`)": common.dcp_local_seq_lens is not None,
        "encoders and cross-attention (`encoder_seq_lens`)": common.encoder_seq_lens is not None,
        "prefixes that are seen from both sides (`mm_req_doc_ranges`)": bool(common.mm_req_doc_ranges),
        "reference sliding windows (`rswa_prefix_lens`)": common.rswa_prefix_lens is not None,
    }
    for what, is_there in refused.items():
        if is_there:
            raise NotImplementedError(f"tokenselect does not serve {what}: choose another attention backend")
