"""As much of vLLM 0.33 and SGLang 0.5.23 as their attention backends meet: names, arguments and fields, without what they do.

`MODULES` says where each lies in the engine. Where `TOKENSELECT_ENGINE_SOURCES` names a folder with the published packages, most are
replaced by the published ones, and `FAKES` has those of this file.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any, ClassVar, Generic, TypeVar

import torch

import engine_sources

M = TypeVar("M")


# vLLM.


class AttentionType(str, Enum):
    DECODER = "decoder"
    ENCODER = "encoder"
    ENCODER_ONLY = "encoder_only"
    ENCODER_DECODER = "encoder_decoder"


class VllmAttentionBackend:
    supported_dtypes: ClassVar[list[Any]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> Any: ...

    @staticmethod
    def get_name() -> Any: ...

    @staticmethod
    def get_impl_cls() -> Any: ...

    @staticmethod
    def get_builder_cls() -> Any: ...

    @classmethod
    def get_supported_head_sizes(cls) -> Any: ...

    @classmethod
    def is_sparse(cls) -> bool:
        return False

    @classmethod
    def supports_sink(cls) -> bool:
        return False

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return False

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> Any: ...

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> Any: ...

    @classmethod
    def supported_kv_cache_layouts(cls) -> Any: ...


class AttentionMetadata:
    pass


@dataclass
class CommonAttentionMetadata:
    query_start_loc: Any
    query_start_loc_cpu: Any
    seq_lens: Any
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Any
    slot_mapping: Any
    causal: Any = True
    encoder_seq_lens: Any = None
    dcp_local_seq_lens: Any = None
    seq_lens_cpu_upper_bound: Any = None
    mm_req_doc_ranges: Any = None
    rswa_prefix_lens: Any = None


class AttentionCGSupport(Enum):
    ALWAYS = 3
    UNIFORM_BATCH = 2
    UNIFORM_SINGLE_TOKEN_DECODE = 1
    NEVER = 0


class AttentionMetadataBuilder(Generic[M]):
    reorder_batch_threshold: int | None = None

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        self.kv_cache_spec, self.layer_names, self.vllm_config, self.device = (
            kv_cache_spec,
            layer_names,
            vllm_config,
            device,
        )

    def _init_reorder_batch_threshold(
        self,
        reorder_batch_threshold: Any = 1,
        supports_spec_as_decode: bool = False,
        supports_dcp_with_varlen: bool = False,
    ) -> None:
        self.reorder_batch_threshold = reorder_batch_threshold

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any: ...

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any: ...


class AttentionImpl(Generic[M]):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: Any = None,
        alibi_slopes: Any = None,
        sliding_window: Any = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: Any = None,
        attn_type: Any = AttentionType.DECODER,
        kv_sharing_target_layer_name: Any = None,
    ) -> None: ...

    def forward(
        self,
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        kv_cache: Any,
        attn_metadata: Any,
        output: Any,
        output_scale: Any = None,
        output_block_scale: Any = None,
    ) -> Any: ...


class AttentionBackendEnum(Enum):
    FLASH_ATTN = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
    CUSTOM = None

    def get_path(self, include_classname: bool = True) -> str:
        return str(OVERRIDES.get(self, self.value))

    def is_overridden(self) -> bool:
        return self in OVERRIDES


OVERRIDES: dict[AttentionBackendEnum, str] = {}


def register_backend(backend: Any, class_path: Any = None, is_mamba: bool = False) -> Callable[[type], type]:
    OVERRIDES[backend] = class_path
    return lambda kind: kind


def get_dcp_world_size_and_rank(enabled: bool = True) -> tuple[int, int]:
    return 1, 0


def get_pcp_group() -> Any:
    raise AssertionError("there is no group without an engine")


def get_current_vllm_config_or_none() -> Any:
    return None


CONFIG: list[Any] = [None]


def get_current_vllm_config() -> Any:
    return CONFIG[0]


# SGLang.


class ForwardMode(IntEnum):
    EXTEND = 1
    DECODE = 2
    MIXED = 3
    IDLE = 4
    TARGET_VERIFY = 5
    DRAFT_EXTEND_V2 = 6

    def is_decode(self) -> bool:
        return self == ForwardMode.DECODE

    def is_mixed(self) -> bool:
        return self == ForwardMode.MIXED

    def is_idle(self) -> bool:
        return self == ForwardMode.IDLE

    def is_decode_or_idle(self) -> bool:
        return self in (ForwardMode.DECODE, ForwardMode.IDLE)


class AttentionBackend:
    needs_cpu_seq_lens: bool = True
    attn_backend_list: Any = None
    kv_index_translator: Any = None

    def init_forward_metadata(self, forward_batch: Any) -> None: ...

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None: ...

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None: ...

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None: ...

    def get_cuda_graph_seq_len_fill_value(self) -> Any: ...

    def on_after_cuda_graph_warmup(self) -> None: ...

    def forward(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
    ) -> Any:
        if forward_batch.forward_mode.is_idle():
            return q.new_empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        run = self.forward_decode if forward_batch.forward_mode.is_decode() else self.forward_extend
        return run(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs)

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
    ) -> Any: ...

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
    ) -> Any: ...

    def support_triton(self) -> bool:
        return True


ATTENTION_BACKENDS: dict[str, Any] = {}
ATTENTION_BACKEND_CHOICES = ["triton"]


def add_attention_backend_choices(names: list[str]) -> None:
    ATTENTION_BACKEND_CHOICES.extend(names)


def register_attention_backend(name: str) -> Callable[[Any], Any]:
    def decorator(make: Any) -> Any:
        ATTENTION_BACKENDS[name] = make
        return make

    return decorator


@dataclass
class KVWriteLoc:
    loc: Any
    swa_loc: Any = None
    full_loc: Any = None
    physical: bool = False

    @classmethod
    def for_batch(cls, forward_batch: Any, *, swa_loc: Any = None, full_loc: Any = None) -> KVWriteLoc:
        return cls(forward_batch.out_cache_loc, swa_loc, full_loc, forward_batch.out_cache_loc_is_physical)


class MHATokenToKVPool:
    """`[slots, num_kv_heads, head_dim]` a layer; slot 0 is for padding."""

    def __init__(
        self, size: int, page_size: int, dtype: Any, head_num: int, head_dim: int, layer_num: int, device: str
    ) -> None:
        self.size, self.page_size, self.kv_cache_layout = size, page_size, "nhd"
        shape = (size + page_size, head_num, head_dim)
        self.k_buffer = [torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(layer_num)]
        self.v_buffer = [torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(layer_num)]
        for buffer in (*self.k_buffer, *self.v_buffer):
            buffer[0] = 0

    def get_key_buffer(self, layer_id: int) -> Any:
        return self.k_buffer[layer_id]

    def get_value_buffer(self, layer_id: int) -> Any:
        return self.v_buffer[layer_id]

    def set_kv_buffer(self, layer: Any, loc_info: Any, cache_k: Any, cache_v: Any) -> None:
        self.k_buffer[layer.layer_id][loc_info.loc] = cache_k
        self.v_buffer[layer.layer_id][loc_info.loc] = cache_v


MODULES: dict[str, dict[str, Any]] = {
    "vllm.config.vllm": {
        "get_current_vllm_config": get_current_vllm_config,
        "get_current_vllm_config_or_none": get_current_vllm_config_or_none,
    },
    "vllm.config": {
        "get_current_vllm_config": get_current_vllm_config,
        "get_current_vllm_config_or_none": get_current_vllm_config_or_none,
    },
    "vllm.distributed.parallel_state": {
        "get_dcp_world_size_and_rank": get_dcp_world_size_and_rank,
        "get_pcp_group": get_pcp_group,
    },
    "vllm.v1.attention.backend": {
        "AttentionBackend": VllmAttentionBackend,
        "AttentionCGSupport": AttentionCGSupport,
        "AttentionImpl": AttentionImpl,
        "AttentionMetadata": AttentionMetadata,
        "AttentionMetadataBuilder": AttentionMetadataBuilder,
        "AttentionType": AttentionType,
        "CommonAttentionMetadata": CommonAttentionMetadata,
    },
    "vllm.v1.attention.backends.registry": {
        "AttentionBackendEnum": AttentionBackendEnum,
        "register_backend": register_backend,
    },
    "sglang.srt.layers.attention.attention_registry": {
        "ATTENTION_BACKENDS": ATTENTION_BACKENDS,
        "register_attention_backend": register_attention_backend,
    },
    "sglang.srt.layers.attention.base_attn_backend": {"AttentionBackend": AttentionBackend},
    "sglang.srt.mem_cache.memory_pool": {"KVWriteLoc": KVWriteLoc, "MHATokenToKVPool": MHATokenToKVPool},
    "sglang.srt.model_executor.forward_batch_info": {"ForwardMode": ForwardMode},
    "sglang.srt.server_args": {
        "ATTENTION_BACKEND_CHOICES": ATTENTION_BACKEND_CHOICES,
        "add_attention_backend_choices": add_attention_backend_choices,
    },
}

FAKES = {path: dict(names) for path, names in MODULES.items()}
SOURCES = os.environ.get("TOKENSELECT_ENGINE_SOURCES")
_PUBLISHED = [
    "vllm.v1.attention.backend",
    "vllm.v1.attention.backends.registry",
    "sglang.srt.layers.attention.attention_registry",
    "sglang.srt.layers.attention.base_attn_backend",
    "sglang.srt.mem_cache.memory_pool",
    "sglang.srt.model_executor.forward_batch_info",
]


def _replace() -> None:
    """What computes nothing, by what is published."""
    for path, module in engine_sources.load(str(SOURCES), _PUBLISHED).items():
        for name in MODULES[path]:
            if name != "MHATokenToKVPool":  # allocates as the engine is configured
                MODULES[path][name] = getattr(module, name)
                ours = (
                    "VllmAttentionBackend"
                    if path == "vllm.v1.attention.backend" and name == "AttentionBackend"
                    else name
                )
                globals()[ours] = getattr(module, name)
        if hasattr(module, "_ATTN_OVERRIDES"):
            globals()["OVERRIDES"] = module._ATTN_OVERRIDES


if SOURCES:
    _replace()

_OURS = ("tokenselect.vllm.backend", "tokenselect.vllm.metadata", "tokenselect.sglang.backend")


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """These instead of the engines, installed or not."""
    had = {
        name: module
        for name, module in sys.modules.items()
        if name in _OURS or name.split(".")[0] in ("vllm", "sglang")
    }
    _forget(had)
    for path, names in MODULES.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        for name, value in names.items():
            setattr(sys.modules[path], name, value)
    try:
        yield
    finally:
        _forget([name for name in sys.modules if name in _OURS or name.split(".")[0] in ("vllm", "sglang")])
        sys.modules.update(had)


def _forget(names: Iterable[str]) -> None:
    for name in list(names):
        del sys.modules[name]
        package, _, module = name.rpartition(".")
        if name in _OURS:  # `from package import module` would find it there
            delattr(sys.modules[package], module)
