"""Token selection and sparse attention over paged KV caches, for long-context LLM inference.

Tensors are PyTorch's (CUDA or CPU), NumPy's, or anything with `__cuda_array_interface__` or `__array_interface__`; on the CPU device
they lie in the host's memory, on a CUDA device in that device's. bf16 without PyTorch is `uint16`, or `ml_dtypes.bfloat16`. Neither
PyTorch nor NumPy is needed to import this.

    stream = torch.cuda.current_stream()
    device = Device.cuda(0, stream=stream)  # ordered with PyTorch's own work
    config = Config(num_qo_heads=32, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, top_k=2048)
    ctx = Context(device, config, max_rows=1, max_block_len=1, max_kv_tokens=1 << 20)
    kv = KvView(k_pages, v_pages)  # [num_pages, page_size, num_kv_heads, head_dim], any strides
    batch = Batch(16, qo_indptr, indptr, indices, last_page_len)
    ctx.select(batch, kv, q)
    out = ctx.attend(batch, kv, q)

Nothing waits for a GPU but `synchronize`, `selected`, `stats`, `faults`, `numpy` and `to_host`. Tensors that are
passed may be temporaries: what the device has not read yet is kept. Objects may be dropped, or closed, in any order. One object is used
by one call at a time; `Device`, `Config`, `Batch` and `Pieces` may be shared. Nothing lives on in a forked process: `multiprocessing` must
start processes with `spawn`. A call that fails raises a `TokenSelectError` and has
changed nothing (but see `Context.prefill`).
"""

from tokenselect._native import (
    Batch,
    BatchInfo,
    BatchRow,
    BatchSlot,
    Buffer,
    Cache,
    Config,
    Context,
    Device,
    Graph,
    KvView,
    Memory,
    Pieces,
    SelectionCache,
    SelectionStats,
    version,
)
from tokenselect.errors import (
    ArgumentError,
    ArgumentTypeError,
    BusyError,
    DefectError,
    Error,
    OutOfMemoryError,
    OutOfPagesError,
    OutOfRangeError,
    TokenSelectError,
    UnsupportedError,
)

__version__ = version

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "Batch",
    "BatchInfo",
    "BatchRow",
    "BatchSlot",
    "Buffer",
    "BusyError",
    "Cache",
    "Config",
    "Context",
    "DefectError",
    "Device",
    "Error",
    "Graph",
    "KvView",
    "Memory",
    "OutOfMemoryError",
    "OutOfPagesError",
    "OutOfRangeError",
    "Pieces",
    "SelectionCache",
    "SelectionStats",
    "TokenSelectError",
    "UnsupportedError",
    "version",
]
