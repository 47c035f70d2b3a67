"""The C interface of tokenselect as ctypes sees it: structures, prototypes, errors. `tokenselect` is what to import.

Follows include/tokenselect.h; the test compares the size of every structure.
"""

import ctypes
import operator
import os
import threading
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path

ABI_VERSION = 2


class Error(RuntimeError):
    """What the library answers: a text that names the argument, the rule it broke and the numbers.

    `status` is the name of the code: `TS_STATUS_OUT_OF_PAGES`.
    """

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class Address(int):
    """An address, which holds what it points into: as long as somebody has the address, the memory is there."""

    def __new__(cls, address, owner):
        made = super().__new__(cls, address)
        made.owner = owner
        return made


class _Structure(ctypes.Structure):
    """A structure that knows its size and holds what is put into it, such as an `Address`."""

    def __init__(self, **fields):
        if "struct_size" in dict(self._fields_):
            fields["struct_size"] = ctypes.sizeof(self)
        super().__init__(**fields)

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        self.__dict__.setdefault("_held", {})[name] = value


def _structure(name, **fields):
    """A structure with these fields, in this order."""
    return type(name, (_Structure,), {"_fields_": list(fields.items())})


Rope = _structure(
    "ts_rope",
    theta=c_double, rotary_dim=c_uint32, pairing=c_int32, scaling=c_int32, reserved=c_uint32, factor=c_double,
    low_freq_factor=c_double, high_freq_factor=c_double, original_max_position=c_double, beta_fast=c_double,
    beta_slow=c_double, attention_factor=c_double,
)  # fmt: skip
Config = _structure(
    "ts_config",
    struct_size=c_size_t, num_qo_heads=c_uint32, num_kv_heads=c_uint32, head_dim=c_uint32, dtype=c_int32,
    n_init=c_size_t, n_local=c_size_t, top_k=c_size_t, vote_pool_window=c_size_t, score_scale=c_float,
    sm_scale=c_float, logits_soft_cap=c_float, positions=c_int32, rope=Rope, selection_cache=c_int32,
    similarity_threshold=c_float, max_reuse=c_uint32, reserved=c_uint32,
)  # fmt: skip
Limits = _structure(
    "ts_limits",
    struct_size=c_size_t, max_rows=c_size_t, max_block_len=c_size_t, max_kv_tokens=c_size_t, operations=c_int32,
    reserved=c_int32,
)  # fmt: skip
CacheConfig = _structure(
    "ts_cache_config",
    struct_size=c_size_t, num_layers=c_size_t, num_pages=c_size_t, page_size=c_size_t, max_sequences=c_size_t,
    layout=c_int32, reserved=c_int32,
)  # fmt: skip
KvView = _structure(
    "ts_kv_view",
    struct_size=c_size_t, k=c_void_p, v=c_void_p, num_pages=c_size_t, page_size=c_size_t, num_kv_heads=c_size_t,
    head_dim=c_size_t, k_stride_page=c_size_t, k_stride_token=c_size_t, k_stride_head=c_size_t, v_stride_page=c_size_t,
    v_stride_token=c_size_t, v_stride_head=c_size_t,
)  # fmt: skip
BatchTables = _structure(
    "ts_batch_tables",
    struct_size=c_size_t, page_size=c_size_t, num_rows=c_size_t, qo_indptr=c_void_p, indptr=c_void_p,
    indices=c_void_p, last_page_len=c_void_p, sequence_indices=c_void_p, candidates=c_void_p,
)  # fmt: skip
DeviceTables = _structure(
    "ts_device_tables",
    struct_size=c_size_t, num_table_rows=c_size_t, num_entries=c_size_t, entries=c_void_p, entries_are_slots=c_int32,
    reserved=c_int32, rows=c_void_p, kv_lens=c_void_p, sequence_indices=c_void_p, num_pages=c_size_t,
    num_sequences=c_size_t,
)  # fmt: skip
BatchInfo = _structure(
    "ts_batch_info",
    num_rows=c_size_t, num_query_tokens=c_size_t, page_size=c_size_t, max_block_len=c_size_t,
    max_kv_len=c_size_t, num_token_places=c_size_t,
)  # fmt: skip
BatchRow = _structure(
    "ts_batch_row", query_begin=c_size_t, block_len=c_size_t, kv_len=c_size_t, token_base=c_size_t
)
Output = _structure(
    "ts_output", struct_size=c_size_t, out=c_void_p, lse=c_void_p, out_dtype=c_int32, reserved=c_int32
)
Selection = _structure(
    "ts_selection",
    struct_size=c_size_t, num_rows=c_size_t, width=c_size_t, tokens=c_void_p, len=c_void_p, ranks=c_void_p,
    total_len=c_void_p,
)  # fmt: skip
Parts = _structure(
    "ts_parts",
    struct_size=c_size_t, num_parts=c_size_t, num_query_tokens=c_size_t, parts=c_void_p, part_lses=c_void_p,
)  # fmt: skip
StepInput = _structure(
    "ts_step_input",
    struct_size=c_size_t, q=c_void_p, k=c_void_p, v=c_void_p, q_stride_token=c_size_t, q_stride_head=c_size_t,
    k_stride_token=c_size_t, k_stride_head=c_size_t, v_stride_token=c_size_t, v_stride_head=c_size_t,
)  # fmt: skip
PrefillConfig = _structure(
    "ts_prefill_config",
    struct_size=c_size_t, block_len=c_size_t, max_kv_len=c_size_t, max_piece_len=c_size_t,
    max_workspace_bytes=c_size_t,
)  # fmt: skip
PiecesInfo = _structure(
    "ts_pieces_info", num_pieces=c_size_t, num_blocks=c_size_t, num_query_tokens=c_size_t, block_len=c_size_t
)
SelectionStats = _structure("ts_selection_stats", reused=c_uint64, scored=c_uint64, complete=c_uint64)
Tensor = _structure("ts_tensor", data=c_void_p, dtype=c_int32, rank=c_uint32, shape=c_size_t * 4)

STRUCTURES = [
    Rope, Config, Limits, CacheConfig, KvView, BatchTables, DeviceTables, BatchInfo, BatchRow, Output, Selection,
    Parts, StepInput, PrefillConfig, PiecesInfo, SelectionStats, Tensor,
]  # fmt: skip

WORK = ctypes.CFUNCTYPE(c_int32, c_void_p)
PROGRESS = ctypes.CFUNCTYPE(c_int32, c_void_p, c_size_t, c_size_t)

_P = c_void_p  # an address
_OUT = POINTER(c_void_p)  # where a new handle is written


class _handle:
    """An argument that is an object of one class: of another, its handle would be taken for what it is not."""

    ctype = c_void_p

    def __init__(self, kind, name=None):
        self.kind, self.name = kind, name or kind

    def __call__(self, value):
        if value is None:
            return None  # the library knows where there may be none
        kind = getattr(type(value), "kind_of_handle", None)
        if kind != self.kind:
            wanted = "".join(word.capitalize() for word in self.kind.split("_"))
            raise TypeError(f"`{self.name}` must be a {wanted}, got {type(value).__name__}")
        if value.is_lent():
            raise RuntimeError(f"`{self.name}` is at work in `prefill`: its `progress` must not use it")
        return value


class _number:
    """An argument that is not negative, and fits: ctypes would cut it off."""

    def __init__(self, ctype, name):
        self.ctype, self.name = ctype, name

    def __call__(self, value):
        return unsigned(self.name, value, self.ctype)


def _size(name):
    return _number(c_size_t, name)


def unsigned(name, value, ctype):
    """A whole number, which a `ctype` can hold."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be a whole number, got {type(value).__name__}") from None
    most = (1 << 8 * ctypes.sizeof(ctype)) - 1
    if not 0 <= number <= most:
        raise ValueError(f"`{name}` must be from 0 to {most}, got {number}")
    return number


FUNCTIONS = {
    "ts_device_cpu": [_OUT],
    "ts_device_cuda": [_number(c_uint32, "ordinal"), _OUT],
    "ts_device_cuda_on_stream": [_number(c_uint32, "ordinal"), _P, _OUT],
    "ts_device_emulated": [_number(c_uint64, "seed"), _OUT],
    "ts_device_supports": [_handle("device"), POINTER(Config)],
    "ts_device_synchronize": [_handle("device")],
    "ts_buffer_create": [_handle("device"), _size("num_bytes"), _OUT],
    "ts_buffer_data": [_handle("buffer"), _OUT],
    "ts_memory_write": [_handle("device"), _P, _P, _size("num_bytes")],
    "ts_memory_read": [_handle("device"), _P, _P, _size("num_bytes")],
    "ts_config_default": [POINTER(Config), c_size_t],
    "ts_limits_default": [POINTER(Limits), c_size_t],
    "ts_cache_config_default": [POINTER(CacheConfig), c_size_t],
    "ts_config_validate": [POINTER(Config)],
    "ts_context_create": [_handle("device"), POINTER(Config), POINTER(Limits), _OUT],
    "ts_workspace_bytes": [_handle("device"), POINTER(Config), POINTER(Limits), POINTER(c_size_t)],
    "ts_context_workspace": [_handle("context"), c_int32, POINTER(Tensor)],
    "ts_context_provide": [_handle("context"), c_int32, _handle("batch")],
    "ts_context_logit_index": [
        _handle("context"), _handle("batch"), _size("row"), _size("token"), _size("qo_head"), POINTER(c_size_t),
    ],
    "ts_context_selected": [_handle("context"), _size("row"), POINTER(c_uint32), _size("capacity"), POINTER(c_size_t)],
    "ts_batch_create": [POINTER(BatchTables), _OUT],
    "ts_batch_padded": [_handle("batch"), _size("num_rows"), _size("block_len"), _OUT],
    "ts_batch_in_blocks": [_handle("batch"), _size("block_len"), _OUT],
    "ts_batch_get_info": [_handle("batch"), POINTER(BatchInfo)],
    "ts_batch_get_row": [_handle("batch"), _size("row"), POINTER(BatchRow)],
    "ts_batch_slot_create": [_handle("device"), _handle("batch", "like"), _size("max_pages"), _OUT],
    "ts_batch_slot_put": [_handle("batch_slot", "slot"), _handle("batch"), _OUT],
    "ts_batch_slot_translate": [_handle("batch_slot", "slot"), POINTER(DeviceTables), _OUT],
    "ts_batch_slot_faults": [_handle("batch_slot", "slot"), POINTER(c_uint32)],
    "ts_append": [_handle("context"), _handle("batch"), POINTER(KvView), POINTER(StepInput)],
    "ts_append_select": [
        _handle("context"), _handle("batch"), POINTER(KvView), POINTER(StepInput), _handle("selection_cache"),
        _size("layer"),
    ],
    "ts_vote_top_k": [_handle("context"), _handle("batch"), _handle("selection_cache"), _size("layer")],
    "ts_select": [
        _handle("context"), _handle("batch"), POINTER(KvView), POINTER(StepInput), _handle("selection_cache"),
        _size("layer"),
    ],
    "ts_pool": [_handle("context"), _handle("batch"), POINTER(StepInput), _handle("selection_cache"), _size("layer")],
    "ts_compare": [_handle("context"), _handle("batch"), _handle("selection_cache"), _size("layer")],
    "ts_decide": [_handle("context"), _handle("batch"), _handle("selection_cache"), _size("layer")],
    "ts_score": [_handle("context"), _handle("batch"), POINTER(KvView)],
    "ts_vote": [_handle("context"), _handle("batch")],
    "ts_top_k": [_handle("context"), _handle("batch"), _handle("selection_cache"), _size("layer")],
    "ts_attend": [_handle("context"), _handle("batch"), POINTER(KvView), POINTER(StepInput), POINTER(Output)],
    "ts_attend_dense": [_handle("context"), _handle("batch"), POINTER(KvView), POINTER(StepInput), POINTER(Output)],
    "ts_attend_to": [
        _handle("context"), _handle("batch"), POINTER(KvView), POINTER(StepInput), POINTER(Selection),
        POINTER(Output),
    ],
    "ts_merge": [_handle("context"), POINTER(Parts), POINTER(Output)],
    "ts_selection_cache_create": [
        _handle("device"), POINTER(Config), _size("num_layers"), _size("num_sequences"), _OUT,
    ],
    "ts_selection_cache_clear": [_handle("selection_cache", "selections"), _number(c_uint64, "sequence")],
    "ts_selection_cache_fork": [_handle("selection_cache", "selections"), _size("src"), _size("dst")],
    "ts_selection_cache_truncate": [_handle("selection_cache", "selections"), _number(c_uint64, "sequence"), _size("len")],
    "ts_selection_cache_stats": [_handle("selection_cache", "selections"), POINTER(SelectionStats)],
    "ts_selection_cache_layer_stats": [
        _handle("selection_cache", "selections"), _size("layer"), POINTER(SelectionStats),
    ],
    "ts_selection_cache_reset_stats": [_handle("selection_cache", "selections")],
    "ts_cache_create": [_handle("device"), POINTER(Config), POINTER(CacheConfig), _OUT],
    "ts_cache_sequence_create": [_handle("cache"), POINTER(c_uint64)],
    "ts_cache_sequence_fork": [_handle("cache"), _number(c_uint64, "sequence"), POINTER(c_uint64)],
    "ts_cache_sequence_truncate": [_handle("cache"), _number(c_uint64, "sequence"), _size("len")],
    "ts_cache_sequence_free": [_handle("cache"), _number(c_uint64, "sequence")],
    "ts_cache_sequence_len": [_handle("cache"), _number(c_uint64, "sequence"), POINTER(c_size_t)],
    "ts_cache_written_len": [_handle("cache"), _size("layer"), _number(c_uint64, "sequence"), POINTER(c_size_t)],
    "ts_cache_num_free_pages": [_handle("cache"), POINTER(c_size_t)],
    "ts_cache_extend": [_handle("cache"), POINTER(c_uint64), POINTER(c_size_t), _size("num_rows"), _OUT],
    "ts_cache_layer": [_handle("cache"), _size("layer"), POINTER(KvView), c_size_t],
    "ts_cache_layer_mut": [_handle("cache"), _size("layer"), POINTER(KvView), c_size_t],
    "ts_cache_selections": [_handle("cache"), _OUT],
    "ts_cache_stats": [_handle("cache"), POINTER(SelectionStats)],
    "ts_cache_append": [_handle("context"), _handle("cache"), _size("layer"), _handle("batch"), POINTER(StepInput)],
    "ts_step": [
        _handle("context"), _handle("cache"), _size("layer"), _handle("batch"), POINTER(StepInput), POINTER(Output),
    ],
    "ts_step_dense": [
        _handle("context"), _handle("cache"), _size("layer"), _handle("batch"), POINTER(StepInput), POINTER(Output),
    ],
    "ts_prefill_config_default": [POINTER(PrefillConfig), c_size_t],
    "ts_context_create_prefill": [_handle("device"), POINTER(Config), POINTER(PrefillConfig), _OUT],
    "ts_cache_extend_in_pieces": [
        _handle("cache"), _handle("context"), POINTER(c_uint64), POINTER(c_size_t), _size("num_rows"),
        _size("block_len"), _OUT,
    ],
    "ts_batch_in_pieces": [_handle("batch"), _handle("context"), _size("block_len"), _OUT],
    "ts_pieces_get_info": [_handle("pieces"), POINTER(PiecesInfo)],
    "ts_prefill": [
        _handle("context"), _handle("cache"), _size("layer"), _handle("pieces"), POINTER(StepInput), POINTER(Output),
        PROGRESS, _P,
    ],
    "ts_prefill_kv": [
        _handle("context"), _handle("pieces"), POINTER(KvView), POINTER(StepInput), POINTER(Output),
        _handle("selection_cache"), _size("layer"), PROGRESS, _P,
    ],
    "ts_capture": [_handle("device"), WORK, _P, _OUT],
    "ts_graph_launch": [_handle("graph")],
}
_HANDLES = ["device", "buffer", "context", "batch", "batch_slot", "selection_cache", "cache", "pieces", "graph"]
FUNCTIONS.update({f"ts_{handle}_destroy": [_P] for handle in _HANDLES})


def _find():
    """The shared library: `TOKENSELECT_LIBRARY`, beside this file, or where cargo puts it in a checkout."""
    here = Path(__file__).resolve().parent
    name = "libtokenselect_c.so"
    places = [here / name, *(here.parents[2] / "target" / profile / name for profile in ("release", "debug"))]
    given = os.environ.get("TOKENSELECT_LIBRARY")
    places = [Path(given)] if given else places
    for place in places:
        if place.exists():
            return str(place)
    raise ImportError(
        f"no tokenselect library at {', '.join(map(str, places))}: build it with "
        "`cargo build --release -p tokenselect-capi`, or name it in TOKENSELECT_LIBRARY"
    )


class Library:
    """Every function of the header by its name without `ts_`; one that fails raises `Error`.

    Handles are passed as the objects that own them and tensors as an `Address`, so that both live as long as the call;
    what is passed while work is recorded lives as long as the record.
    """

    def __init__(self):
        self.path = _find()
        library = ctypes.CDLL(self.path)
        library.ts_version.restype = c_char_p
        library.ts_abi_version.restype = c_uint32
        library.ts_last_error_message.restype = c_char_p
        library.ts_status_name.restype = c_char_p
        library.ts_status_name.argtypes = [c_int32]
        library.ts_device_name.restype = c_char_p
        library.ts_device_name.argtypes = [c_void_p]
        if library.ts_abi_version() != ABI_VERSION:
            raise ImportError(
                f"{self.path} has version {library.ts_abi_version()} of the interface, this module {ABI_VERSION}"
            )
        self.version = library.ts_version().decode()
        self.device_name = library.ts_device_name
        self._recording = threading.local()

        def check(status, function, arguments):
            if status != 0:
                name = library.ts_status_name(status).decode()
                raise Error(name, library.ts_last_error_message().decode())

        for name, types in FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes = [getattr(kind, "ctype", kind) for kind in types]
            function.restype, function.errcheck = c_int32, check
            checks = [(i, kind) for i, kind in enumerate(types) if isinstance(kind, (_handle, _number))]
            setattr(self, name.removeprefix("ts_"), self._held(function, checks))

    def _held(self, function, checks):
        """The function, whose arguments are checked, and held while this thread records."""
        recording = self._recording

        def call(*arguments):
            arguments = list(arguments)
            for i, check in checks:
                arguments[i] = check(arguments[i])
            record = getattr(recording, "record", None)
            if record is not None:
                record.append(arguments)
            function(*arguments)

        return call

    def recorded(self, work):
        """Runs `work()`; answers what this thread passed to the library meanwhile."""
        outer, record = getattr(self._recording, "record", None), []
        self._recording.record = record
        try:
            work()
        finally:
            self._recording.record = outer
        return record

    def made(self, function, *arguments, kind=c_void_p):
        """What `function` writes through its last argument."""
        to = kind()
        getattr(self, function)(*arguments, ctypes.byref(to))
        return to if isinstance(to, ctypes.Structure) else to.value
