"""Operations that `torch.compile` and `torch.cuda.graph` take as they are: `torch.ops.tokenselect`.

    import tokenselect.torch as ops

    ctx = ops.handle(ops.Contexts(config, max_rows=4, max_block_len=1, max_kv_tokens=1 << 20))  # once
    kv = ops.handle(KvView(k_pages, v_pages))  # once a layer

    @torch.compile(fullgraph=True)
    def attention(x, batch, kv):
        q, k, v = project(x)
        return ops.step_kv(ctx, batch, kv, q, k, v)

    for ...:  # nothing is compiled anew when lengths change
        batch = ops.handle(Batch(16, qo_indptr, indptr, indices, last_page_len))
        out = attention(x, batch, kv)

Contexts, batches and caches are no tensors. A `handle` stands for one: a tensor of one number on the processor, whose value no compiled
code depends on. It is held as other tensors are, and holds its object. What an operation keeps for the next one, such as a selection,
it writes into the handle as far as PyTorch knows, so that no compiler takes the two apart; pages and outputs are tensors, declared as
written where they are. Work is put in PyTorch's current stream. See `Contexts` for CUDA graphs.
"""

from .contexts import Contexts
from .devices import device_of
from .handles import handle
from .operations import (
    append,
    append_select,
    attend,
    attend_dense,
    prefill,
    prefill_kv,
    select,
    step,
    step_dense,
    step_kv,
)

__all__ = [
    "Contexts",
    "append",
    "append_select",
    "attend",
    "attend_dense",
    "device_of",
    "handle",
    "prefill",
    "prefill_kv",
    "select",
    "step",
    "step_dense",
    "step_kv",
]
