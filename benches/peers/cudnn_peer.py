"""Dense attention by cuDNN, through the operator that `torch.nn.functional.scaled_dot_product_attention` calls."""

import torch

NAME = "cuDNN (PyTorch)"


def attend(q, k, v, causal):
    """Attention and its log-sum-exps, `[1, num_qo_heads, T, 1]`. On the processor PyTorch's own stands in, for tests."""
    if q.is_cuda:
        operator = torch.ops.aten._scaled_dot_product_cudnn_attention
        out, lse = operator(q, k, v, attn_bias=None, compute_log_sumexp=True, is_causal=causal)[:2]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal)
    return out, lse.reshape(*q.shape[:3], 1)


class Prefill:
    """Causal attention of `q`, `[T, num_qo_heads, D]`, the last tokens of `k` and `v`, `[1, num_kv_heads, n, D]`.

    PyTorch lets cuDNN align a causal mask with the first key alone. So the tokens before the queries are attended to without a
    mask, and those of the queries with one, and the two are merged by their log-sum-exps.
    """

    def __init__(self, q, k, v):
        self.q = q.transpose(0, 1).unsqueeze(0).contiguous()
        before = k.shape[2] - q.shape[0]
        self.before = k[:, :, :before], v[:, :, :before]
        self.last = k[:, :, before:], v[:, :, before:]

    def __call__(self):
        before, before_lse = attend(self.q, *self.before, causal=False)
        last, last_lse = attend(self.q, *self.last, causal=True)
        share = torch.sigmoid(before_lse - last_lse)
        merged = torch.lerp(last.float(), before.float(), share).to(last.dtype)
        return merged.squeeze(0).transpose(0, 1)
