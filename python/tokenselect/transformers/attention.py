"""The attention function that `attn_implementation="tokenselect"` names."""

from __future__ import annotations

from typing import Any

import torch

from tokenselect.torch.devices import device_of

from .borrowed import attend_borrowed
from .contexts import LayerConfig
from .layer import Announced
from .masks import RowMask, from_4d
from .options import TokenSelectOptions

__all__ = ["options_of", "tokenselect_attention"]

_DEFAULT = TokenSelectOptions()


def options_of(module: torch.nn.Module) -> TokenSelectOptions:
    """What `configure` set, or the defaults."""
    options: TokenSelectOptions = getattr(module, "_tokenselect_options", _DEFAULT)
    return options


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the kernels are not PyTorch's
def tokenselect_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: RowMask | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a layer over the tokens that it selects: `query`, `[batch, num_qo_heads, tokens, head_dim]`, `key` and `value`,
    `[batch, num_kv_heads, keys, head_dim]`, to `[batch, tokens, num_qo_heads, head_dim]`.

    Keys and values are new ones that a `TokenSelectCache` announced, or all there are. Raises `NotImplementedError` with the reason
    for what it does not serve, and the library's errors for what a device does not.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _check(query, key, value, dropout, s_aux, bool(causal), kwargs)
    announced: Announced | None = getattr(key, "_tokenselect", None)
    mask = _rows(attention_mask, query, key, announced)
    layer_idx = int(getattr(module, "layer_idx", 0) or 0)
    options = announced.cache.options if announced is not None else options_of(module)
    is_dense = layer_idx in options.dense_layers
    rope = getattr(module, "_tokenselect_rope", None)
    selects = not is_dense and mask.window is None
    if (rope is not None) != (selects and options.positions == "reassigned"):
        rule = "must have RoPE taken away" if rope is None else "must keep its RoPE"
        kind = "selects with reassigned positions" if rope is None else "attends with native positions"
        raise ValueError(
            f"layer {layer_idx} {kind} and {rule}: call `tokenselect.transformers.configure(model, options)` with the options of the cache"
        )
    config = LayerConfig.of(query, key, scaling=scaling, softcap=softcap, options=options, layer=layer_idx, rope=rope)
    with torch.no_grad():
        if announced is not None:
            out = announced.cache.attend(announced, query, key, value, mask, config, is_dense)
        else:
            device = options.device or device_of(query)
            out = attend_borrowed(query, key, value, mask, config, options, device, is_dense)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        out = _NoGradient.apply(out, query, key, value)  # type: ignore[no-untyped-call, unused-ignore]
    return out, None


def _rows(
    attention_mask: RowMask | torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, announced: Announced | None
) -> RowMask:
    if isinstance(attention_mask, torch.Tensor):
        mask = from_4d(attention_mask, key.shape[2] if announced is None else announced.begin + key.shape[2])
    elif isinstance(attention_mask, RowMask):
        mask = attention_mask
    else:
        raise NotImplementedError(
            "attn_implementation='tokenselect' needs the mask that `create_causal_mask` or `create_sliding_window_causal_mask` of "
            f"transformers make; this layer was called with {type(attention_mask).__name__}"
        )
    batch_size, _, q_length, _ = query.shape
    if (mask.batch_size, mask.q_length) != (batch_size, q_length):
        raise ValueError(
            f"the mask must be for {batch_size} rows of {q_length} queries, it is for {mask.batch_size} of {mask.q_length}"
        )
    return mask


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    s_aux: torch.Tensor | None,
    is_causal: bool,
    more: dict[str, Any],
) -> None:
    refused = {
        "attention sinks (`s_aux`)": s_aux is not None,
        f"dropout ({dropout})": dropout > 0,
        "encoders and cross-attention (`is_causal=False`)": not is_causal,
        "`output_attentions`: it never has the weights": bool(more.get("output_attentions")),
        "biases by position (`position_bias`)": more.get("position_bias") is not None,
        "packed sequences (`cu_seq_lens_q`)": more.get("cu_seq_lens_q") is not None,
        f"values of another head dimension ({value.shape[3]}) than keys ({key.shape[3]})": key.shape[3]
        != value.shape[3],
        f"queries of another head dimension ({query.shape[3]}) than keys ({key.shape[3]})": key.shape[3]
        != query.shape[3],
    }
    for what, is_there in refused.items():
        if is_there:
            raise NotImplementedError(f"attn_implementation='tokenselect' does not serve {what}")


class _NoGradient(torch.autograd.Function):  # type: ignore[misc, unused-ignore]
    """The output, whose gradient nobody can have."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise NotImplementedError(
            "attn_implementation='tokenselect' has no gradient: it is for inference. Train with 'sdpa' or 'eager'"
        )
