"""Token selection and sparse attention over paged KV caches, through the C library.

Tensors are PyTorch's (CUDA or CPU), NumPy's, or anything with `__cuda_array_interface__` or `__array_interface__`; on
the CPU device they lie in the host's memory, on a CUDA device in that device's. bf16 without PyTorch is `uint16`.

    stream = torch.cuda.current_stream().cuda_stream
    device = Device.cuda(0, stream=stream)  # ordered with PyTorch's own work
    config = Config(num_qo_heads=32, num_kv_heads=8, head_dim=128, dtype="bf16", top_k=2048)
    ctx = Context(device, config, max_rows=1, max_block_len=1, max_kv_tokens=1 << 20)
    kv = KvView(k_pages, v_pages)  # [num_pages, page_size, num_kv_heads, head_dim], any strides
    batch = Batch(16, qo_indptr, indptr, indices, last_page_len)
    ctx.select(batch, kv, q)
    out = ctx.attend(batch, kv, q)

Queries, keys and values, `[tokens, heads, head_dim]`, may be slices of a fused projection's output: any strides above 0
but that of the last dimension, which is 1.

Nothing waits for a GPU but `synchronize`, `selected`, `stats`, `faults`, `numpy` and `to_host`. A tensor that is passed
lives until the call returns, and must live until the device has done the work; tensors of PyTorch's caching allocator
do, if both use one stream. Objects may be dropped in any order. One object is used by one thread at a time; a failed
call raises `Error` and has changed nothing (but see `prefill`).
"""

import ctypes

import tokenselect_abi as abi
from tokenselect_abi import Error
from tokenselect_tensors import LIBRARY as _lib
from tokenselect_tensors import TYPESTR, Memory, View, int32, like

__all__ = ["Batch", "BatchSlot", "Buffer", "Cache", "Config", "Context", "Device", "Error", "Graph", "KvView"]
__all__ += ["Pieces", "SelectionCache", "version"]

version = _lib.version

_DTYPES = ["f16", "bf16", "f32", "u32", "u64", "f64"]
_CODES = {name: code for code, name in enumerate(_DTYPES)}
_CODES.update(float16=0, bfloat16=1, float32=2, half=0)
_LAYOUTS = {"NHD": 0, "HND": 1}
_CHOICES = {
    "dtype": _CODES,
    "positions": {"native": 0, "reassigned": 1},
    "layout": _LAYOUTS,
    "pairing": {"half_split": 0, "interleaved": 1},
    "scaling": {"none": 0, "linear": 1, "llama3": 2, "yarn": 3},
}
_OPERATIONS = dict(append=1, pool=2, score=4, vote=8, attend=16)
_WORKSPACE = [
    "queries", "similarities", "actions", "logits", "stats", "votes", "pooled_votes", "top_k", "selected",
    "selected_len", "products",
]  # fmt: skip


def _set(structure, fields):
    """Sets fields of a structure; names stand for the numbers of enumerations."""
    known = {name for name, _ in structure._fields_}
    for name, value in fields.items():
        if name not in known or name in ("struct_size", "reserved"):
            raise TypeError(f"no field `{name}` in {type(structure).__name__}")
        choices = _CHOICES.get(name)
        if name == "rope":
            _set(structure.rope, value)
        elif choices is not None and isinstance(value, str):
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value}")
            setattr(structure, name, choices[value])
        else:
            kind = dict(structure._fields_)[name]
            if kind in (ctypes.c_size_t, ctypes.c_uint32):
                value = abi.unsigned(name, value, kind)
            setattr(structure, name, value)


class Config:
    """What is computed: the fields of `ts_config`, by keyword.

    `dtype`, `positions`, `rope["pairing"]` and `rope["scaling"]` take names: `dtype="bf16"`, `positions="reassigned",
    rope=dict(theta=5e5)`. What is not given has the default of the library.
    """

    def __init__(self, **fields):
        self.raw = abi.Config()
        _lib.config_default(self.raw, ctypes.sizeof(abi.Config))
        _set(self.raw, fields)
        _lib.config_validate(self.raw)

    @property
    def dtype(self):
        """Type of queries, keys and values: `f16`, `bf16` or `f32`."""
        return _DTYPES[self.raw.dtype]

    def __getattr__(self, name):
        if name == "raw":
            raise AttributeError(name)
        return getattr(self.raw, name)


class _Handle:
    """Owns a handle of the library."""

    kind_of_handle = None
    calls = 0  # of `progress` that are under way, in which nothing else may have it, or close it if it is shared
    is_shared = False

    def __init__(self, handle, destroy):
        self.handle, self._destroy = handle, destroy

    def is_lent(self):
        """Whether a `prefill` that works with it calls its `progress`."""
        return self.calls > 0 and not self.is_shared

    def close(self):
        """Gives the handle back now instead of when the object is dropped."""
        if self.calls > 0:
            raise RuntimeError(f"`{self.kind_of_handle}` is at work in `prefill`: its `progress` must not close it")
        handle, self.handle = getattr(self, "handle", None), None
        if handle:
            self._destroy(handle)

    __del__ = close

    @property
    def _as_parameter_(self):
        return self.handle  # what ctypes passes for this object


class Device(_Handle):
    """Where operations run: `Device.cpu()`, `Device.cuda(0)`, `Device.emulated()`."""

    kind_of_handle = "device"

    def __init__(self, handle, kind, ordinal=0):
        super().__init__(handle, _lib.device_destroy)
        self.kind, self.ordinal = kind, ordinal
        self.name = _lib.device_name(handle).decode()

    @classmethod
    def cpu(cls):
        """The processor."""
        return cls(_lib.made("device_cpu"), "cpu")

    @classmethod
    def cuda(cls, ordinal=0, stream=None):
        """A CUDA device. `stream` is a raw stream (0 for the default one) that all work is put in; None makes one, which
        is not ordered with anything else."""
        if stream is None:
            return cls(_lib.made("device_cuda", ordinal), "cuda", ordinal)
        return cls(_lib.made("device_cuda_on_stream", ordinal, stream), "cuda", ordinal)

    @classmethod
    def emulated(cls, seed=0):
        """The GPU kernels on the processor, every access checked, for tests. Tensors come from `to_device`."""
        return cls(_lib.made("device_emulated", seed), "emulated")

    def synchronize(self):
        """Waits until everything put on the device is done."""
        _lib.device_synchronize(self)

    def to_device(self, host):
        """A copy of a NumPy array in memory of the device."""
        interface = host.__array_interface__
        buffer = Buffer(self, interface["shape"], interface["typestr"])
        buffer.from_host(host)
        return buffer

    def supports(self, config):
        """Whether steps of a configuration can be run here. Of one that cannot, `Context` says what is missing."""
        try:
            _lib.device_supports(self, config.raw)
        except Error as error:
            if error.status == "TS_STATUS_UNSUPPORTED":
                return False
            raise
        return True

    def workspace_bytes(self, config, **limits):
        """Bytes of the workspace of a `Context` with these arguments."""
        return _lib.made("workspace_bytes", self, config.raw, _limits(limits), kind=ctypes.c_size_t)

    def capture(self, work):
        """Records what `work()` puts on the device, instead of doing it. Run it once before; batches come from a
        `BatchSlot`. The graph holds what `work` passes to this module."""
        raised, record = [], []

        def call(_):
            try:
                record.extend(_lib.recorded(work))
            except BaseException as error:  # noqa: BLE001: raised again below
                raised.append(error)
            return len(raised)

        try:
            graph = Graph(_lib.made("capture", self, abi.WORK(call), None), _lib.graph_destroy)
        except Error:
            if raised:
                raise raised[0] from None
            raise
        graph.record = record
        return graph


class Graph(_Handle):
    """Work recorded by `Device.capture`."""

    kind_of_handle = "graph"

    def launch(self):
        """Does the work, after the device's earlier work. Does not wait."""
        _lib.graph_launch(self)


class Buffer(Memory, _Handle):
    """Memory of a device that the library owns."""

    kind_of_handle = "buffer"

    def __init__(self, device, shape, typestr):
        _Handle.__init__(self, None, _lib.buffer_destroy)
        self.describe(device, 0, shape, typestr, None)
        self.handle = _lib.made("buffer_create", device, self.num_bytes)
        self.ptr = _lib.made("buffer_data", self) or 0

    def from_host(self, host):
        """Copies a NumPy array of the same shape and type there, after the device's earlier work."""
        interface = host.__array_interface__
        if interface.get("strides") is not None:
            raise ValueError("`host` must be contiguous")
        if (tuple(interface["shape"]), interface["typestr"]) != (self.shape, self.typestr):
            got = f"{interface['shape']} of {interface['typestr']}"
            raise ValueError(f"`host` must be {self.shape} of {self.typestr}, got {got}")
        if self.num_bytes:
            _lib.memory_write(self.device, self.ptr, interface["data"][0], self.num_bytes)


class Workspace(Memory):
    """A buffer of a context's workspace; holds the context. Token numbers are int32."""

    def __init__(self, context, buffer):
        raw = _lib.made("context_workspace", context, buffer, kind=abi.Tensor)
        self.dtype = _DTYPES[raw.dtype]
        self.describe(context.device, raw.data or 0, raw.shape[: raw.rank], TYPESTR[self.dtype], context)


class KvView:
    """Paged keys and values of one layer: `[num_pages, page_size, num_kv_heads, head_dim]`, or with `layout="HND"`
    `[num_pages, num_kv_heads, page_size, head_dim]`. Any strides but that of the last dimension, those of keys and those
    of values; the two may be slices of one tensor, in any order: `KvView(kv[:, 0], kv[:, 1])`, `KvView(kv[..., d:],
    kv[..., :d], "HND")`. Holds them."""

    def __init__(self, k, v, layout="NHD"):
        if layout not in _LAYOUTS:
            raise ValueError(f"`layout` must be NHD or HND, got {layout}")
        self.k, self.v, self.layout = k, v, layout
        self._raw = {}

    @classmethod
    def _of(cls, raw, owner):
        view = cls(None, None)
        view._raw, raw.owner, raw.is_read_only = raw, owner, False  # the same for every device
        return view

    def raw(self, device, dtype):
        """The structure of the library."""
        if isinstance(self._raw, abi.KvView):
            return self._raw
        key = (device.name, dtype)
        if key not in self._raw:
            self._raw[key] = self._describe(device, dtype)
        return self._raw[key]

    def _describe(self, device, dtype):
        k, v = View("k pages", self.k, device), View("v pages", self.v, device)
        k.dtype("k pages", [dtype])
        v.dtype("v pages", [dtype])
        if len(k.shape) != 4 or k.shape != v.shape:
            raise ValueError(f"k and v pages must have the same four dimensions, got {k.shape} and {v.shape}")
        if k.shape[3] > 1 and (k.strides[3], v.strides[3]) != (1, 1):
            raise ValueError(f"the last strides of k and v pages must be 1, got {k.strides} and {v.strides}")
        token, head = (1, 2) if self.layout == "NHD" else (2, 1)
        raw = abi.KvView(
            k=k.ptr, v=v.ptr, num_pages=k.shape[0], page_size=k.shape[token], num_kv_heads=k.shape[head],
            head_dim=k.shape[3], k_stride_page=k.strides[0], k_stride_token=k.strides[token],
            k_stride_head=k.strides[head], v_stride_page=v.strides[0], v_stride_token=v.strides[token],
            v_stride_head=v.strides[head],
        )  # fmt: skip
        raw.is_read_only = k.is_read_only or v.is_read_only
        return raw


class Batch(_Handle):
    """One step's rows, from FlashInfer's tables (lists, arrays or tensors of integers, copied): see `ts_batch_tables`.

    `candidates` is `[rows, 2]`, for parts of sequences.
    """

    kind_of_handle = "batch"

    def __init__(self, page_size, qo_indptr, indptr, indices, last_page_len, sequence_indices=None, candidates=None):
        super().__init__(None, _lib.batch_destroy)
        if isinstance(candidates, (list, tuple)):
            candidates = [bound for bounds in candidates for bound in bounds]
        given = dict(qo_indptr=qo_indptr, indptr=indptr, indices=indices, last_page_len=last_page_len)
        given.update(sequence_indices=sequence_indices, candidates=candidates)
        tables = {what: int32(what, values) for what, values in given.items() if values is not None}
        count = {what: table[1] for what, table in tables.items()}
        rows = count["last_page_len"]
        wanted = {"qo_indptr": rows + 1, "indptr": rows + 1, "sequence_indices": rows, "candidates": 2 * rows}
        for what, need in wanted.items():
            if count.get(what, need) != need:
                raise ValueError(f"`{what}` must have {need} entries for {rows} rows, got {count[what]}")
        pages = ctypes.c_int32.from_address(tables["indptr"][0] + 4 * rows).value
        if pages != count["indices"]:
            raise ValueError(f"`indptr` must end with the number of indices, {count['indices']}, got {pages}")
        raw = abi.BatchTables(page_size=page_size, num_rows=rows, **{what: table[0] for what, table in tables.items()})
        self._own(_lib.made("batch_create", raw))

    @classmethod
    def _of(cls, handle):
        batch = cls.__new__(cls)
        _Handle.__init__(batch, None, _lib.batch_destroy)
        batch._own(handle)
        return batch

    def _own(self, handle):
        self.handle = handle
        self.info = _lib.made("batch_get_info", self, kind=abi.BatchInfo)
        self.num_rows, self.num_query_tokens = self.info.num_rows, self.info.num_query_tokens

    def row(self, row):
        """`query_begin`, `block_len`, `kv_len` and `token_base` (its place in votes and logits) of a row."""
        return _lib.made("batch_get_row", self, row, kind=abi.BatchRow)

    def padded(self, num_rows, block_len):
        """The batch with padding rows of `block_len` queries added, until it has `num_rows`."""
        return Batch._of(_lib.made("batch_padded", self, num_rows, block_len))

    def in_blocks(self, block_len):
        """The same tokens with every row cut into blocks of `block_len` tokens, each a row that selects for itself: for a piece of a
        prompt. Shorter blocks find more of what single queries look for, and cost more."""
        return Batch._of(_lib.made("batch_in_blocks", self, block_len))

    def in_pieces(self, context, block_len):
        """Another engine's prompts, each with all its tokens in one row, as pieces for `prefill` of `context`."""
        return Pieces(_lib.made("batch_in_pieces", self, context, block_len))


class Pieces(_Handle):
    """Prompts cut into pieces that one step of a context has room for, for all layers: `num_pieces`, `num_blocks`,
    `num_query_tokens`, `block_len`."""

    kind_of_handle = "pieces"
    is_shared = True

    def __init__(self, handle):
        super().__init__(handle, _lib.pieces_destroy)
        info = _lib.made("pieces_get_info", self, kind=abi.PiecesInfo)
        self.num_pieces, self.num_blocks, self.block_len = info.num_pieces, info.num_blocks, info.block_len
        self.num_query_tokens = info.num_query_tokens


class BatchSlot(_Handle):
    """A fixed place for the tables of batches with the rows and blocks of `like`, for captured work."""

    kind_of_handle = "batch_slot"

    def __init__(self, device, like, max_pages):
        super().__init__(None, _lib.batch_slot_destroy)
        self.device, self.num_rows = device, like.num_rows
        self.handle = _lib.made("batch_slot_create", device, like, max_pages)

    def put(self, batch):
        """Puts a batch there; the batch that is answered is to be captured with."""
        return Batch._of(_lib.made("batch_slot_put", self, batch))

    def translate(self, entries, kv_lens, num_pages, slots=False, rows=None, sequence_indices=None, num_sequences=0):
        """Puts the batch there that an engine's tables on the device describe, int32: see `ts_device_tables`. `entries`
        is `[table_rows, entries]`, the others are `[num_rows]`. The batch that is answered has rows that only the device
        knows."""
        raw = abi.DeviceTables(num_pages=num_pages, num_sequences=num_sequences, entries_are_slots=int(slots))
        table = View("entries", entries, self.device)
        if len(table.shape) != 2:
            raise ValueError(f"`entries` must have two dimensions, got {table.shape}")
        raw.num_table_rows, raw.num_entries = table.shape
        raw.entries = table.expect("entries", table.shape, ["u32"])
        for name, tensor in dict(rows=rows, kv_lens=kv_lens, sequence_indices=sequence_indices).items():
            if tensor is not None:
                setattr(raw, name, View(name, tensor, self.device).expect(name, (self.num_rows,), ["u32"]))
        return Batch._of(_lib.made("batch_slot_translate", self, raw))

    def faults(self):
        """How many rows `translate` left without tokens, pages it replaced and sequences it left out so far. Waits for
        the device."""
        return _lib.made("batch_slot_faults", self, kind=ctypes.c_uint32)


class SelectionCache(_Handle):
    """Cached selections of every layer and sequence, for an engine with a cache of its own."""

    kind_of_handle = "selection_cache"

    def __init__(self, device, config, num_layers, num_sequences):
        super().__init__(None, _lib.selection_cache_destroy)
        self.handle = _lib.made("selection_cache_create", device, config.raw, num_layers, num_sequences)

    cache = None  # whose they are

    def is_lent(self):
        return super().is_lent() or (self.cache is not None and self.cache.is_lent())

    def clear(self, sequence):
        """Forgets the selections of a sequence."""
        _lib.selection_cache_clear(self, sequence)

    def fork(self, src, dst):
        """Copies the selections of a sequence to another."""
        _lib.selection_cache_fork(self, src, dst)

    def truncate(self, sequence, length):
        """Forgets the selections that a sequence cut to `length` tokens cannot use."""
        _lib.selection_cache_truncate(self, sequence, length)

    def stats(self, layer=None):
        """`reused`, `scored` and `complete` rows so far, of a layer or of all."""
        if layer is None:
            return _lib.made("selection_cache_stats", self, kind=abi.SelectionStats)
        return _lib.made("selection_cache_layer_stats", self, layer, kind=abi.SelectionStats)

    def reset_stats(self):
        """Sets the counters to 0."""
        _lib.selection_cache_reset_stats(self)


class Cache(_Handle):
    """An owned cache: `num_layers`, `num_pages`, `page_size`, `max_sequences`, `layout` as in `ts_cache_config`."""

    kind_of_handle = "cache"

    def __init__(self, device, config, **size):
        super().__init__(None, _lib.cache_destroy)
        raw = abi.CacheConfig()
        _lib.cache_config_default(raw, ctypes.sizeof(raw))
        _set(raw, size)
        self.handle = _lib.made("cache_create", device, config.raw, raw)

    def create(self):
        """A new, empty sequence."""
        return _lib.made("cache_sequence_create", self, kind=ctypes.c_uint64)

    def fork(self, sequence):
        """A new sequence with the same tokens."""
        return _lib.made("cache_sequence_fork", self, sequence, kind=ctypes.c_uint64)

    def truncate(self, sequence, length):
        """Drops the tokens of a sequence from `length` on."""
        _lib.cache_sequence_truncate(self, sequence, length)

    def free(self, sequence):
        """Ends a sequence."""
        _lib.cache_sequence_free(self, sequence)

    def len(self, sequence):
        """Tokens of a sequence."""
        return _lib.made("cache_sequence_len", self, sequence, kind=ctypes.c_size_t)

    @property
    def num_free_pages(self):
        """Pages that no sequence holds."""
        return _lib.made("cache_num_free_pages", self, kind=ctypes.c_size_t)

    def extend(self, growth):
        """Makes room for new tokens, `[(sequence, num_tokens)]`; answers the batch of these rows, for all layers."""
        return Batch._of(_lib.made("cache_extend", self, *self._growth(growth)))

    def extend_in_pieces(self, context, growth, block_len):
        """Makes room for whole prompts, `[(sequence, num_tokens)]` of any length, cut into blocks of `block_len` tokens and these
        into pieces within the limits of `context`; answers the pieces, for `prefill` of all layers."""
        return Pieces(_lib.made("cache_extend_in_pieces", self, context, *self._growth(growth), block_len))

    @staticmethod
    def _growth(growth):
        rows = len(growth)
        names = [abi.unsigned("sequence", sequence, ctypes.c_uint64) for sequence, _ in growth]
        lengths = [abi.unsigned("num_tokens", tokens, ctypes.c_size_t) for _, tokens in growth]
        sequences, num_tokens = (ctypes.c_uint64 * rows)(*names), (ctypes.c_size_t * rows)(*lengths)
        return sequences, num_tokens, rows

    def written_len(self, layer, sequence):
        """Leading tokens of a sequence whose keys and values a layer has: less than `len` until the layer's step."""
        return _lib.made("cache_written_len", self, layer, sequence, kind=ctypes.c_size_t)

    def layer(self, layer):
        """Keys and values of a layer, to read."""
        return self._layer(_lib.cache_layer, layer)

    def layer_mut(self, layer):
        """Keys and values of a layer for kernels of one's own that write them on a GPU: all tokens that the sequences
        have now count as written."""
        return self._layer(_lib.cache_layer_mut, layer)

    def _layer(self, function, layer):
        raw = abi.KvView()
        function(self, layer, raw, ctypes.sizeof(raw))
        return KvView._of(raw, self)

    def selections(self):
        """The Selection Cache, for `Context.select` and the like."""
        made = SelectionCache.__new__(SelectionCache)
        _Handle.__init__(made, _lib.made("cache_selections", self), _lib.selection_cache_destroy)
        made.cache = self
        return made

    def stats(self):
        """`reused`, `scored` and `complete` rows so far."""
        return _lib.made("cache_stats", self, kind=abi.SelectionStats)


def _limits(given):
    raw = abi.Limits()
    _lib.limits_default(raw, ctypes.sizeof(raw))
    _set(raw, {name: value for name, value in given.items() if name != "operations"})
    names = given.get("operations", list(_OPERATIONS))
    unknown = [name for name in names if name not in _OPERATIONS]
    if unknown or not names:
        raise ValueError(f"`operations` must be some of {', '.join(_OPERATIONS)}, got {', '.join(unknown) or 'none'}")
    raw.operations = sum(_OPERATIONS[name] for name in set(names))
    return raw


class Context(_Handle):
    """Runs steps and single operations: configuration, limits (`max_rows`, `max_block_len`, `max_kv_tokens`) and
    workspace.

    `operations`, some of `append`, `pool`, `score`, `vote` and `attend`, are those that are asked for; all of them by
    default. A GPU scores and attends for some head dimensions, and votes for any.
    """

    kind_of_handle = "context"

    def __init__(self, device, config, **limits):
        super().__init__(None, _lib.context_destroy)
        self.device, self.config = device, config
        self.handle = _lib.made("context_create", device, config.raw, _limits(limits))

    @classmethod
    def for_prefill(cls, device, config, **prefill):
        """One that reads prompts: `block_len`, `max_kv_len`, `max_piece_len` and `max_workspace_bytes` as in `ts_prefill_config`.
        Short blocks are nearer to dense attention and cost more passes over the keys; long blocks pool many queries into one
        and are fastest. It selects for blocks alone: decoding has a context of its own."""
        raw = abi.PrefillConfig()
        _lib.prefill_config_default(raw, ctypes.sizeof(raw))
        _set(raw, prefill)
        context = cls.__new__(cls)
        _Handle.__init__(context, None, _lib.context_destroy)
        context.device, context.config = device, config
        context.handle = _lib.made("context_create_prefill", device, config.raw, raw)
        return context

    def append(self, batch, kv, k, v):
        """Writes `k` and `v`, `[num_query_tokens, num_kv_heads, head_dim]`, into the pages of the batch; `kv` may be a
        pair `(cache, layer)`."""
        given = self._input(batch, k=k, v=v)
        if isinstance(kv, tuple):
            return _lib.cache_append(self, kv[0], kv[1], batch, given)
        return _lib.append(self, batch, self._kv(kv, True), given)

    def select(self, batch, kv, q, selection_cache=None, layer=0):
        """`pool`, `score`, `vote` and `top_k` in one."""
        _lib.select(self, batch, self._kv(kv), self._input(batch, q=q), selection_cache, layer)

    def append_select(self, batch, kv, q, k, v, selection_cache=None, layer=0):
        """`append`, then `select`, in fewer launches where blocks are short; with `attend` after it, a step over a
        borrowed cache."""
        _lib.append_select(self, batch, self._kv(kv, True), self._input(batch, q=q, k=k, v=v), selection_cache, layer)

    def vote_top_k(self, batch, selection_cache=None, layer=0):
        """`vote`, then `top_k` of these votes."""
        _lib.vote_top_k(self, batch, selection_cache, layer)

    def pool(self, batch, q, selection_cache=None, layer=0):
        """Scoring queries, similarities and actions from `q`, `[num_query_tokens, num_qo_heads, head_dim]`."""
        _lib.pool(self, batch, self._input(batch, q=q), selection_cache, layer)

    def compare(self, batch, selection_cache=None, layer=0):
        """Where ranks share the heads of a layer: the buffer `products`, f64, to be added over all ranks between `pool`
        without a Selection Cache and `decide`. See `ts_compare`."""
        _lib.compare(self, batch, selection_cache, layer)

    def decide(self, batch, selection_cache=None, layer=0):
        """Similarities and actions by the sums of `products`; pass what was passed to `compare`."""
        _lib.decide(self, batch, selection_cache, layer)

    def score(self, batch, kv):
        """Logits and softmax statistics of the candidates."""
        _lib.score(self, batch, self._kv(kv))

    def vote(self, batch):
        """Votes of the candidates."""
        _lib.vote(self, batch)

    def top_k(self, batch, selection_cache=None, layer=0):
        """The selected lists; pass what was passed to `pool`, or `decide`."""
        _lib.top_k(self, batch, selection_cache, layer)

    def attend(self, batch, kv, q, out=None, lse=None):
        """Attention over the selected lists: `out`, or `(out, lse)` where `lse` is a tensor or True. What is not given
        is made like `q`, with f32 for `lse`."""
        return self._attend("attend", batch, kv, q, (), out, lse)

    def attend_dense(self, batch, kv, q, out=None, lse=None):
        """As `attend`, over all tokens."""
        return self._attend("attend_dense", batch, kv, q, (), out, lse)

    def attend_to(self, batch, kv, q, tokens, length, ranks=None, total_len=None, out=None, lse=None):
        """As `attend`, over lists of one's own, int32 on the device: `tokens` (and `ranks`) `[rows, width]`, `length`
        (and `total_len`) `[rows]`."""
        rows, width = View("tokens", tokens, self.device).shape
        raw = abi.Selection(num_rows=rows, width=width)
        shapes = dict(tokens=(rows, width), len=(rows,), ranks=(rows, width), total_len=(rows,))
        for (name, shape), tensor in zip(shapes.items(), (tokens, length, ranks, total_len)):
            if tensor is not None:
                setattr(raw, name, View(name, tensor, self.device).expect(name, shape, ["u32"]))
        return self._attend("attend_to", batch, kv, q, (raw,), out, lse)

    def merge(self, parts, part_lses, out, lse=None):
        """Combines attention over disjoint parts of a list: f32, `[parts, tokens, heads, head_dim]` and
        `[parts, tokens, heads]`. Writes `out`."""
        parts_view = View("parts", parts, self.device)
        num_parts, tokens, *_ = parts_view.shape
        hq, d = self.config.num_qo_heads, self.config.head_dim
        raw = abi.Parts(num_parts=num_parts, num_query_tokens=tokens)
        raw.parts = parts_view.expect("parts", (num_parts, tokens, hq, d), ["f32"])
        raw.part_lses = View("part_lses", part_lses, self.device).expect("part_lses", (num_parts, tokens, hq), ["f32"])
        output, answer = self._output(tokens, out, out, lse)
        _lib.merge(self, raw, output)
        return answer

    def step(self, cache, layer, batch, q, k, v, out=None, lse=None):
        """Append, select and attend for one layer of an owned cache. Answers as `attend`."""
        return self._step("step", cache, layer, batch, (q, k, v), out, lse)

    def step_dense(self, cache, layer, batch, q, k, v, out=None, lse=None):
        """As `step`, attending to all tokens."""
        return self._step("step_dense", cache, layer, batch, (q, k, v), out, lse)

    def prefill(self, cache, layer, pieces, q, k, v, out=None, lse=None, progress=None):
        """Reads prompts in one layer of an owned cache, piece by piece. `pieces` come from `Cache.extend_in_pieces`; `q`, `k` and `v`
        have the query tokens of all of them. `progress(done, total)` is called after each piece; where it answers False or raises,
        reading stops. The layer and the outputs then have what was read, as where the device fails. It must not use this context nor
        the cache. See `ts_prefill`. Answers as `attend`."""
        return self._prefill("prefill", (cache, layer, pieces), (), pieces, (q, k, v), out, lse, progress)

    def prefill_kv(self, pieces, kv, q, k, v, selection_cache=None, layer=0, out=None, lse=None, progress=None):
        """As `prefill`, over another engine's memory: `pieces` come from `Batch.in_pieces`."""
        first, last = (pieces, self._kv(kv, True)), (selection_cache, layer)
        return self._prefill("prefill_kv", first, last, pieces, (q, k, v), out, lse, progress)

    def workspace(self, name):
        """A buffer between operations, by name: `queries`, `similarities`, `actions`, `logits`, `stats`, `votes`,
        `pooled_votes`, `top_k`, `selected`, `selected_len`, `products`. The same memory; `.torch()`, `.numpy()` for
        copies."""
        return Workspace(self, self._buffer(name))

    @staticmethod
    def _buffer(name):
        """The number of a buffer."""
        if name not in _WORKSPACE:
            raise ValueError(f"`name` must be one of {', '.join(_WORKSPACE)}, got {name}")
        return _WORKSPACE.index(name)

    def provide(self, name, batch):
        """Says that a buffer of the workspace holds results of one's own for a batch: votes for `top_k`, or lists for
        `attend`. See `ts_context_provide`."""
        _lib.context_provide(self, self._buffer(name), batch)

    def logit_index(self, batch, row, token, qo_head):
        """Index into the elements of the buffer `logits` of a query head's logit for a token of a row."""
        return _lib.made("context_logit_index", self, batch, row, token, qo_head, kind=ctypes.c_size_t)

    def selected(self, row=0):
        """The selected tokens of a row, as a list. Waits for the device."""
        length = _lib.made("context_selected", self, row, None, 0, kind=ctypes.c_size_t)
        tokens = (ctypes.c_uint32 * length)()
        _lib.made("context_selected", self, row, tokens, length, kind=ctypes.c_size_t)
        return list(tokens)

    def _kv(self, kv, written=False):
        raw = kv.raw(self.device, self.config.dtype)
        if written and raw.is_read_only:
            raise ValueError("`kv` must be memory that can be written, it is read-only")
        return raw

    def _input(self, batch, **tensors):
        """The structure of the library with some of `q`, `k` and `v`."""
        raw, config = abi.StepInput(), self.config
        for what, tensor in tensors.items():
            heads = config.num_qo_heads if what == "q" else config.num_kv_heads
            shape = (batch.num_query_tokens, heads, config.head_dim)
            found = View(what, tensor, self.device).heads(what, shape, [config.dtype])
            for name, value in zip((what, f"{what}_stride_token", f"{what}_stride_head"), found):
                setattr(raw, name, value)
        return raw

    def _output(self, tokens, q, out, lse):
        """The structure of the library, and what is answered."""
        heads = (tokens, self.config.num_qo_heads)
        shape = (*heads, self.config.head_dim)
        out = like(q, shape, None) if out is None else out
        lse = like(q, heads, "float32") if lse is True else lse
        view = View("out", out, self.device)
        dtypes = list(dict.fromkeys([self.config.dtype, "f32", "f16", "bf16"]))
        raw = abi.Output(out=view.written("out", shape, dtypes), out_dtype=_CODES[view.dtype("out", dtypes)])
        if lse is None:
            return raw, out
        raw.lse = View("lse", lse, self.device).written("lse", heads, ["f32"])
        return raw, (out, lse)

    def _attend(self, name, batch, kv, q, more, out, lse):
        given = self._input(batch, q=q)
        output, answer = self._output(batch.num_query_tokens, q, out, lse)
        getattr(_lib, name)(self, batch, self._kv(kv), given, *more, output)
        return answer

    def _step(self, name, cache, layer, batch, tensors, out, lse):
        given = self._input(batch, **dict(zip("qkv", tensors)))
        output, answer = self._output(batch.num_query_tokens, tensors[0], out, lse)
        getattr(_lib, name)(self, cache, layer, batch, given, output)
        return answer

    def _prefill(self, name, first, last, pieces, tensors, out, lse, progress):
        raised, at_work = [], [self, *(handle for handle in (*first, *last) if isinstance(handle, _Handle))]

        def call(_, done, total):
            try:
                for handle in at_work:
                    handle.calls += 1
                answer = progress(done, total)
                return int(answer is not None and not answer)
            except BaseException as error:  # noqa: BLE001: raised again below
                raised.append(error)
                return 1
            finally:
                for handle in at_work:
                    handle.calls -= 1

        given = self._input(pieces, **dict(zip("qkv", tensors)))
        output, answer = self._output(pieces.num_query_tokens, tensors[0], out, lse)
        told = abi.PROGRESS() if progress is None else abi.PROGRESS(call)
        getattr(_lib, name)(self, *first, given, output, *last, told, None)
        if raised:
            raise raised[0]
        return answer
