from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, SupportsIndex, TypeAlias, TypeVar, final, overload

from typing_extensions import Self, disjoint_base

from tokenselect.typing import IntegersLike, RopeFields, TensorLike

_Q = TypeVar("_Q", bound=TensorLike)
_Out = TypeVar("_Out", bound=TensorLike)
_Lse = TypeVar("_Lse", bound=TensorLike)

_DType: TypeAlias = Any
_Layout: TypeAlias = Literal["NHD", "HND"]
_Operation: TypeAlias = Literal["append", "pool", "score", "vote", "attend"]
_Progress: TypeAlias = Callable[[int, int], object]

__all__ = [
    "Batch",
    "BatchInfo",
    "BatchRow",
    "BatchSlot",
    "Buffer",
    "Cache",
    "Config",
    "Context",
    "Device",
    "Graph",
    "KvView",
    "Memory",
    "Pieces",
    "SelectionCache",
    "SelectionStats",
    "version",
]

version: str

@final
class Config:
    def __new__(
        cls,
        *,
        num_qo_heads: SupportsIndex = 32,
        num_kv_heads: SupportsIndex = 8,
        head_dim: SupportsIndex = 128,
        dtype: _DType = "bf16",
        n_init: SupportsIndex = 128,
        n_local: SupportsIndex = 512,
        top_k: SupportsIndex = 2048,
        vote_pool_window: SupportsIndex = 1,
        score_scale: float | None = None,
        sm_scale: float | None = None,
        logits_soft_cap: float | None = None,
        positions: Literal["native", "reassigned"] = "native",
        rope: RopeFields | None = None,
        selection_cache: bool | SupportsIndex = True,
        similarity_threshold: float = 0.9,
        max_reuse: SupportsIndex | None = None,
    ) -> Self: ...
    @property
    def num_qo_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def dtype(self) -> Literal["f16", "bf16", "f32"]: ...
    @property
    def n_init(self) -> int: ...
    @property
    def n_local(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def vote_pool_window(self) -> int: ...
    @property
    def score_scale(self) -> float | None: ...
    @property
    def sm_scale(self) -> float | None: ...
    @property
    def logits_soft_cap(self) -> float | None: ...
    @property
    def positions(self) -> Literal["native", "reassigned"]: ...
    @property
    def selection_cache(self) -> bool: ...
    @property
    def similarity_threshold(self) -> float | None: ...
    @property
    def max_reuse(self) -> int | None: ...

@final
class Device:
    @staticmethod
    def cpu() -> Device: ...
    @staticmethod
    def cuda(ordinal: SupportsIndex = 0, stream: object | None = None) -> Device: ...
    @staticmethod
    def emulated(seed: SupportsIndex = 0) -> Device: ...
    @property
    def kind(self) -> Literal["cpu", "cuda", "emulated"]: ...
    @property
    def ordinal(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def _num_kept(self) -> int: ...
    def synchronize(self) -> None: ...
    def separate(self) -> None: ...
    def to_device(self, host: TensorLike) -> Buffer: ...
    def supports(self, config: Config) -> bool: ...
    def workspace_bytes(
        self,
        config: Config,
        *,
        max_rows: SupportsIndex = 1,
        max_block_len: SupportsIndex = 512,
        max_kv_tokens: SupportsIndex = 131072,
        operations: Iterable[_Operation] | None = None,
    ) -> int: ...
    def capture(self, work: Callable[[], object]) -> Graph: ...
    def close(self) -> None: ...

@final
class Graph:
    def launch(self) -> None: ...
    def close(self) -> None: ...

@disjoint_base
class Memory:
    @property
    def device(self) -> Device: ...
    @property
    def ptr(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def typestr(self) -> str: ...
    @property
    def dtype(self) -> str | None: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def __array_interface__(self) -> dict[str, Any]: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...
    def to_host(self) -> bytearray: ...
    def numpy(self) -> Any: ...
    def torch(self) -> Any: ...

@final
class Buffer(Memory):
    def __new__(cls, device: Device, shape: SupportsIndex | Iterable[SupportsIndex], typestr: _DType) -> Self: ...
    def from_host(self, host: TensorLike) -> None: ...
    def close(self) -> None: ...

@final
class KvView:
    def __new__(cls, k: TensorLike, v: TensorLike, layout: _Layout = "NHD") -> Self: ...
    @property
    def k(self) -> Any: ...
    @property
    def v(self) -> Any: ...
    @property
    def layout(self) -> _Layout: ...

@final
class BatchInfo:
    @property
    def num_rows(self) -> int: ...
    @property
    def num_query_tokens(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def max_block_len(self) -> int: ...
    @property
    def max_kv_len(self) -> int: ...
    @property
    def num_token_places(self) -> int: ...

@final
class BatchRow:
    @property
    def query_begin(self) -> int: ...
    @property
    def block_len(self) -> int: ...
    @property
    def kv_len(self) -> int: ...
    @property
    def token_base(self) -> int: ...

@final
class Batch:
    def __new__(
        cls,
        page_size: SupportsIndex,
        qo_indptr: IntegersLike,
        indptr: IntegersLike,
        indices: IntegersLike,
        last_page_len: IntegersLike,
        sequence_indices: IntegersLike | None = None,
        candidates: IntegersLike | Sequence[Sequence[int]] | None = None,
    ) -> Self: ...
    @property
    def info(self) -> BatchInfo: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_query_tokens(self) -> int: ...
    def row(self, row: SupportsIndex) -> BatchRow: ...
    def padded(self, num_rows: SupportsIndex, block_len: SupportsIndex) -> Batch: ...
    def in_blocks(self, block_len: SupportsIndex) -> Batch: ...
    def in_pieces(self, context: Context, block_len: SupportsIndex) -> Pieces: ...
    def close(self) -> None: ...

@final
class Pieces:
    @property
    def num_pieces(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def num_query_tokens(self) -> int: ...
    @property
    def block_len(self) -> int: ...
    def close(self) -> None: ...

@final
class BatchSlot:
    def __new__(cls, device: Device, like: Batch, max_pages: SupportsIndex) -> Self: ...
    @property
    def device(self) -> Device: ...
    @property
    def num_rows(self) -> int: ...
    def put(self, batch: Batch) -> Batch: ...
    def translate(
        self,
        entries: TensorLike,
        kv_lens: TensorLike,
        num_pages: SupportsIndex,
        slots: bool | SupportsIndex = False,
        rows: TensorLike | None = None,
        sequence_indices: TensorLike | None = None,
        num_sequences: SupportsIndex = 0,
    ) -> Batch: ...
    def faults(self) -> int: ...
    def close(self) -> None: ...

@final
class SelectionStats:
    @property
    def reused(self) -> int: ...
    @property
    def scored(self) -> int: ...
    @property
    def complete(self) -> int: ...

@final
class SelectionCache:
    def __new__(
        cls, device: Device, config: Config, num_layers: SupportsIndex, num_sequences: SupportsIndex
    ) -> Self: ...
    def clear(self, sequence: SupportsIndex) -> None: ...
    def fork(self, src: SupportsIndex, dst: SupportsIndex) -> None: ...
    def truncate(self, sequence: SupportsIndex, length: SupportsIndex) -> None: ...
    def stats(self, layer: SupportsIndex | None = None) -> SelectionStats: ...
    def reset_stats(self) -> None: ...
    def close(self) -> None: ...

@final
class Cache:
    def __new__(
        cls,
        device: Device,
        config: Config,
        *,
        num_layers: SupportsIndex = 1,
        num_pages: SupportsIndex = 1024,
        page_size: SupportsIndex = 16,
        max_sequences: SupportsIndex = 16,
        layout: _Layout = "NHD",
    ) -> Self: ...
    def create(self) -> int: ...
    def fork(self, sequence: SupportsIndex) -> int: ...
    def truncate(self, sequence: SupportsIndex, length: SupportsIndex) -> None: ...
    def free(self, sequence: SupportsIndex) -> None: ...
    def len(self, sequence: SupportsIndex) -> int: ...
    @property
    def num_free_pages(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    def extend(self, growth: Iterable[tuple[SupportsIndex, SupportsIndex]]) -> Batch: ...
    def extend_in_pieces(
        self, context: Context, growth: Iterable[tuple[SupportsIndex, SupportsIndex]], block_len: SupportsIndex
    ) -> Pieces: ...
    def written_len(self, layer: SupportsIndex, sequence: SupportsIndex) -> int: ...
    def layer(self, layer: SupportsIndex) -> KvView: ...
    def layer_mut(self, layer: SupportsIndex) -> KvView: ...
    def selections(self) -> SelectionCache: ...
    def stats(self) -> SelectionStats: ...
    def close(self) -> None: ...

@final
class Context:
    def __new__(
        cls,
        device: Device,
        config: Config,
        *,
        max_rows: SupportsIndex = 1,
        max_block_len: SupportsIndex = 512,
        max_kv_tokens: SupportsIndex = 131072,
        operations: Iterable[_Operation] | None = None,
    ) -> Self: ...
    @staticmethod
    def for_prefill(
        device: Device,
        config: Config,
        *,
        block_len: SupportsIndex = 512,
        max_kv_len: SupportsIndex = 131072,
        max_piece_len: SupportsIndex = 8192,
        max_workspace_bytes: SupportsIndex = 1073741824,
    ) -> Context: ...
    @property
    def device(self) -> Device: ...
    @property
    def config(self) -> Config: ...
    @property
    def max_rows(self) -> int: ...
    @property
    def max_block_len(self) -> int: ...
    @property
    def max_kv_len(self) -> int | None: ...
    @property
    def max_kv_tokens(self) -> int: ...
    def append(self, batch: Batch, kv: KvView | tuple[Cache, int], k: TensorLike, v: TensorLike) -> None: ...
    def select(
        self,
        batch: Batch,
        kv: KvView,
        q: TensorLike,
        selection_cache: SelectionCache | None = None,
        layer: SupportsIndex = 0,
    ) -> None: ...
    def append_select(
        self,
        batch: Batch,
        kv: KvView,
        q: TensorLike,
        k: TensorLike,
        v: TensorLike,
        selection_cache: SelectionCache | None = None,
        layer: SupportsIndex = 0,
    ) -> None: ...
    def pool(
        self,
        batch: Batch,
        q: TensorLike,
        selection_cache: SelectionCache | None = None,
        layer: SupportsIndex = 0,
    ) -> None: ...
    def compare(
        self, batch: Batch, selection_cache: SelectionCache | None = None, layer: SupportsIndex = 0
    ) -> None: ...
    def decide(self, batch: Batch, selection_cache: SelectionCache | None = None, layer: SupportsIndex = 0) -> None: ...
    def score(self, batch: Batch, kv: KvView) -> None: ...
    def vote(self, batch: Batch) -> None: ...
    def top_k(self, batch: Batch, selection_cache: SelectionCache | None = None, layer: SupportsIndex = 0) -> None: ...
    def vote_top_k(
        self, batch: Batch, selection_cache: SelectionCache | None = None, layer: SupportsIndex = 0
    ) -> None: ...
    @overload
    def attend(
        self,
        batch: Batch,
        kv: KvView,
        q: _Q,
        out: None = None,
        lse: None = None,
    ) -> _Q: ...
    @overload
    def attend(
        self,
        batch: Batch,
        kv: KvView,
        q: _Q,
        out: None = None,
        *,
        lse: Literal[True],
    ) -> tuple[_Q, Any]: ...
    @overload
    def attend(
        self,
        batch: Batch,
        kv: KvView,
        q: _Q,
        out: None = None,
        *,
        lse: _Lse,
    ) -> tuple[_Q, _Lse]: ...
    @overload
    def attend(
        self,
        batch: Batch,
        kv: KvView,
        q: _Q,
        out: _Out,
        lse: None = None,
    ) -> _Out: ...
    @overload
    def attend(
        self,
        batch: Batch,
        kv: KvView,
        q: _Q,
        out: _Out,
        lse: Literal[True],
    ) -> tuple[_Out, Any]: ...
    @overload
    def attend(
        self,
        batch: Batch,
        kv: KvView,
        q: _Q,
        out: _Out,
        lse: _Lse,
    ) -> tuple[_Out, _Lse]: ...
    @overload
    def attend_dense(
        self,
        batch: Batch,
        kv: KvView,
        q: _Q,
        out: None = None,
        lse: None = None,
    ) -> _Q: ...
    @overload
    def attend_dense(
        self,
        batch: Batch,
        kv: KvView,
        q: _Q,
        out: None = None,
        *,
        lse: Literal[True],
    ) -> tuple[_Q, Any]: ...
    @overload
    def attend_dense(
        self,
        batch: Batch,
        kv: KvView,
        q: _Q,
        out: None = None,
        *,
        lse: _Lse,
    ) -> tuple[_Q, _Lse]: ...
    @overload
    def attend_dense(
        self,
        batch: Batch,
        kv: KvView,
        q: _Q,
        out: _Out,
        lse: None = None,
    ) -> _Out: ...
    @overload
    def attend_dense(
        self,
        batch: Batch,
        kv: KvView,
        q: _Q,
        out: _Out,
        lse: Literal[True],
    ) -> tuple[_Out, Any]: ...
    @overload
    def attend_dense(
        self,
        batch: Batch,
        kv: KvView,
        q: _Q,
        out: _Out,
        lse: _Lse,
    ) -> tuple[_Out, _Lse]: ...
    @overload
    def attend_to(
        self,
        batch: Batch,
        kv: KvView,
        q: _Q,
        tokens: TensorLike,
        length: TensorLike,
        ranks: TensorLike | None = None,
        total_len: TensorLike | None = None,
        out: None = None,
        lse: None = None,
    ) -> _Q: ...
    @overload
    def attend_to(
        self,
        batch: Batch,
        kv: KvView,
        q: _Q,
        tokens: TensorLike,
        length: TensorLike,
        ranks: TensorLike | None = None,
        total_len: TensorLike | None = None,
        out: None = None,
        *,
        lse: Literal[True],
    ) -> tuple[_Q, Any]: ...
    @overload
    def attend_to(
        self,
        batch: Batch,
        kv: KvView,
        q: _Q,
        tokens: TensorLike,
        length: TensorLike,
        ranks: TensorLike | None = None,
        total_len: TensorLike | None = None,
        out: None = None,
        *,
        lse: _Lse,
    ) -> tuple[_Q, _Lse]: ...
    @overload
    def attend_to(
        self,
        batch: Batch,
        kv: KvView,
        q: _Q,
        tokens: TensorLike,
        length: TensorLike,
        ranks: TensorLike | None = None,
        total_len: TensorLike | None = None,
        *,
        out: _Out,
        lse: None = None,
    ) -> _Out: ...
    @overload
    def attend_to(
        self,
        batch: Batch,
        kv: KvView,
        q: _Q,
        tokens: TensorLike,
        length: TensorLike,
        ranks: TensorLike | None = None,
        total_len: TensorLike | None = None,
        *,
        out: _Out,
        lse: Literal[True],
    ) -> tuple[_Out, Any]: ...
    @overload
    def attend_to(
        self,
        batch: Batch,
        kv: KvView,
        q: _Q,
        tokens: TensorLike,
        length: TensorLike,
        ranks: TensorLike | None = None,
        total_len: TensorLike | None = None,
        *,
        out: _Out,
        lse: _Lse,
    ) -> tuple[_Out, _Lse]: ...
    @overload
    def merge(
        self,
        parts: TensorLike,
        part_lses: TensorLike,
        out: _Out,
        lse: None = None,
    ) -> _Out: ...
    @overload
    def merge(
        self,
        parts: TensorLike,
        part_lses: TensorLike,
        out: _Out,
        lse: Literal[True],
    ) -> tuple[_Out, Any]: ...
    @overload
    def merge(
        self,
        parts: TensorLike,
        part_lses: TensorLike,
        out: _Out,
        lse: _Lse,
    ) -> tuple[_Out, _Lse]: ...
    @overload
    def step(
        self,
        cache: Cache,
        layer: SupportsIndex,
        batch: Batch,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        out: None = None,
        lse: None = None,
    ) -> _Q: ...
    @overload
    def step(
        self,
        cache: Cache,
        layer: SupportsIndex,
        batch: Batch,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        out: None = None,
        *,
        lse: Literal[True],
    ) -> tuple[_Q, Any]: ...
    @overload
    def step(
        self,
        cache: Cache,
        layer: SupportsIndex,
        batch: Batch,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        out: None = None,
        *,
        lse: _Lse,
    ) -> tuple[_Q, _Lse]: ...
    @overload
    def step(
        self,
        cache: Cache,
        layer: SupportsIndex,
        batch: Batch,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        out: _Out,
        lse: None = None,
    ) -> _Out: ...
    @overload
    def step(
        self,
        cache: Cache,
        layer: SupportsIndex,
        batch: Batch,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        out: _Out,
        lse: Literal[True],
    ) -> tuple[_Out, Any]: ...
    @overload
    def step(
        self,
        cache: Cache,
        layer: SupportsIndex,
        batch: Batch,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        out: _Out,
        lse: _Lse,
    ) -> tuple[_Out, _Lse]: ...
    @overload
    def step_dense(
        self,
        cache: Cache,
        layer: SupportsIndex,
        batch: Batch,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        out: None = None,
        lse: None = None,
    ) -> _Q: ...
    @overload
    def step_dense(
        self,
        cache: Cache,
        layer: SupportsIndex,
        batch: Batch,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        out: None = None,
        *,
        lse: Literal[True],
    ) -> tuple[_Q, Any]: ...
    @overload
    def step_dense(
        self,
        cache: Cache,
        layer: SupportsIndex,
        batch: Batch,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        out: None = None,
        *,
        lse: _Lse,
    ) -> tuple[_Q, _Lse]: ...
    @overload
    def step_dense(
        self,
        cache: Cache,
        layer: SupportsIndex,
        batch: Batch,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        out: _Out,
        lse: None = None,
    ) -> _Out: ...
    @overload
    def step_dense(
        self,
        cache: Cache,
        layer: SupportsIndex,
        batch: Batch,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        out: _Out,
        lse: Literal[True],
    ) -> tuple[_Out, Any]: ...
    @overload
    def step_dense(
        self,
        cache: Cache,
        layer: SupportsIndex,
        batch: Batch,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        out: _Out,
        lse: _Lse,
    ) -> tuple[_Out, _Lse]: ...
    @overload
    def prefill(
        self,
        cache: Cache,
        layer: SupportsIndex,
        pieces: Pieces,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        out: None = None,
        lse: None = None,
        progress: _Progress | None = None,
    ) -> _Q: ...
    @overload
    def prefill(
        self,
        cache: Cache,
        layer: SupportsIndex,
        pieces: Pieces,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        out: None = None,
        *,
        lse: Literal[True],
        progress: _Progress | None = None,
    ) -> tuple[_Q, Any]: ...
    @overload
    def prefill(
        self,
        cache: Cache,
        layer: SupportsIndex,
        pieces: Pieces,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        out: None = None,
        *,
        lse: _Lse,
        progress: _Progress | None = None,
    ) -> tuple[_Q, _Lse]: ...
    @overload
    def prefill(
        self,
        cache: Cache,
        layer: SupportsIndex,
        pieces: Pieces,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        out: _Out,
        lse: None = None,
        progress: _Progress | None = None,
    ) -> _Out: ...
    @overload
    def prefill(
        self,
        cache: Cache,
        layer: SupportsIndex,
        pieces: Pieces,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        out: _Out,
        lse: Literal[True],
        progress: _Progress | None = None,
    ) -> tuple[_Out, Any]: ...
    @overload
    def prefill(
        self,
        cache: Cache,
        layer: SupportsIndex,
        pieces: Pieces,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        out: _Out,
        lse: _Lse,
        progress: _Progress | None = None,
    ) -> tuple[_Out, _Lse]: ...
    @overload
    def prefill_kv(
        self,
        pieces: Pieces,
        kv: KvView,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        selection_cache: SelectionCache | None = None,
        layer: SupportsIndex = 0,
        out: None = None,
        lse: None = None,
        progress: _Progress | None = None,
    ) -> _Q: ...
    @overload
    def prefill_kv(
        self,
        pieces: Pieces,
        kv: KvView,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        selection_cache: SelectionCache | None = None,
        layer: SupportsIndex = 0,
        out: None = None,
        *,
        lse: Literal[True],
        progress: _Progress | None = None,
    ) -> tuple[_Q, Any]: ...
    @overload
    def prefill_kv(
        self,
        pieces: Pieces,
        kv: KvView,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        selection_cache: SelectionCache | None = None,
        layer: SupportsIndex = 0,
        out: None = None,
        *,
        lse: _Lse,
        progress: _Progress | None = None,
    ) -> tuple[_Q, _Lse]: ...
    @overload
    def prefill_kv(
        self,
        pieces: Pieces,
        kv: KvView,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        selection_cache: SelectionCache | None = None,
        layer: SupportsIndex = 0,
        *,
        out: _Out,
        lse: None = None,
        progress: _Progress | None = None,
    ) -> _Out: ...
    @overload
    def prefill_kv(
        self,
        pieces: Pieces,
        kv: KvView,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        selection_cache: SelectionCache | None = None,
        layer: SupportsIndex = 0,
        *,
        out: _Out,
        lse: Literal[True],
        progress: _Progress | None = None,
    ) -> tuple[_Out, Any]: ...
    @overload
    def prefill_kv(
        self,
        pieces: Pieces,
        kv: KvView,
        q: _Q,
        k: TensorLike,
        v: TensorLike,
        selection_cache: SelectionCache | None = None,
        layer: SupportsIndex = 0,
        *,
        out: _Out,
        lse: _Lse,
        progress: _Progress | None = None,
    ) -> tuple[_Out, _Lse]: ...
    def workspace(self, name: str) -> Memory: ...
    def provide(self, name: str, batch: Batch) -> None: ...
    def logit_index(self, batch: Batch, row: SupportsIndex, token: SupportsIndex, qo_head: SupportsIndex) -> int: ...
    def selected(self, row: SupportsIndex = 0) -> list[int]: ...
    def close(self) -> None: ...
    def _panic(self) -> None: ...
