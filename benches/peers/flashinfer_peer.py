"""FlashInfer's paged attention and top-k, planned once and run on the current stream."""

import flashinfer
import torch

VERSION = flashinfer.__version__
WORKSPACE_BYTES = 256 << 20


class Decode:
    """A decode row over pages `k`, `v`, `[num_pages, page_size, num_kv_heads, D]`, in the order of `pages` (int32)."""

    def __init__(self, q, k, v, pages, last_page_len, tensor_cores):
        self.q, self.kv, self.out = q, (k, v), torch.empty_like(q)
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
        backend = "fa2" if tensor_cores else "auto"
        self.wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=tensor_cores, backend=backend
        )
        indptr = torch.tensor([0, pages.numel()], dtype=torch.int32, device=q.device)
        last_page_len = torch.tensor([last_page_len], dtype=torch.int32, device=q.device)
        self.wrapper.plan(
            indptr, pages, last_page_len, q.shape[1], k.shape[2], q.shape[2], k.shape[1], q_data_type=q.dtype,
            kv_data_type=k.dtype,
        )  # fmt: skip

    def __call__(self):
        return self.wrapper.run(self.q, self.kv, out=self.out)


class Prefill:
    """Causal attention of `q`, `[T, num_qo_heads, D]`, the last tokens of those in pages as for `Decode`, by the kernels of
    `backend`, "fa2" or "fa3"."""

    def __init__(self, q, k, v, pages, last_page_len, backend):
        self.q, self.kv, self.out = q, (k, v), torch.empty_like(q)
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
        self.wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
        qo_indptr, indptr, last_page_len = (
            torch.tensor(table, dtype=torch.int32, device=q.device)
            for table in ([0, q.shape[0]], [0, pages.numel()], [last_page_len])
        )
        self.wrapper.plan(
            qo_indptr, indptr, pages, last_page_len, q.shape[1], k.shape[2], q.shape[2], k.shape[1], causal=True,
            q_data_type=q.dtype, kv_data_type=k.dtype,
        )  # fmt: skip

    def __call__(self):
        return self.wrapper.run(self.q, self.kv, out=self.out)


def top_k(votes, k):
    """Indices of the `k` largest of `[n]` f32, in no order."""
    function = getattr(flashinfer, "top_k", None) or flashinfer.topk.top_k
    return function(votes.unsqueeze(0), k)[1].squeeze(0)
