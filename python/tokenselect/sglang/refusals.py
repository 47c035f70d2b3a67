"""What of SGLang the library does not compute, by name."""

from __future__ import annotations

from typing import Any

__all__ = ["reason_against_batch", "reason_against_layer", "reason_against_runner"]


def reason_against_runner(runner: Any) -> str | None:
    """Why a model cannot have this backend; None where it can."""
    translator = getattr(runner, "kv_index_translator", None)
    return _first(
        {
            "multi-head latent attention (`use_mla_backend`)": bool(getattr(runner, "use_mla_backend", False)),
            "encoder-decoder models": bool(getattr(runner.model_config, "is_encoder_decoder", False)),
            "drafts of speculative decoding (`is_draft_worker`)": bool(getattr(runner, "is_draft_worker", False)),
            "unified pools, whose ids are translated (`kv_index_translator`)": bool(
                getattr(translator, "is_translating", False)
            ),
        }
    )


def reason_against_batch(forward_batch: Any) -> str | None:
    """Why a batch cannot be computed."""
    mode = forward_batch.forward_mode
    served = mode.is_decode_or_idle() or mode.is_mixed() or getattr(mode, "name", "") == "EXTEND"
    return _first(
        {
            f"the forward mode {getattr(mode, 'name', mode)}": not served,
            "encoders and cross-attention (`encoder_lens`)": getattr(forward_batch, "encoder_lens", None) is not None,
            "the log-sum-exp of attention (`mha_return_lse`)": bool(getattr(forward_batch, "mha_return_lse", False)),
        }
    )


def reason_against_layer(layer: Any, more: dict[str, Any]) -> str | None:
    """Why a layer, called with arguments beyond those of every layer, cannot be computed here. Another backend may."""
    kind = getattr(layer.attn_type, "value", layer.attn_type)
    window, cap = layer.sliding_window_size, layer.logit_cap
    return _first(
        {
            f"a sliding window ({window})": window is not None and window > -1,
            "cross-attention": bool(layer.is_cross_attention),
            f"attention of type {kind}": kind != "decoder",
            f"values of another head dimension ({layer.v_head_dim}) than keys ({layer.qk_head_dim})": layer.v_head_dim
            != layer.qk_head_dim,
            f"other heads of values ({layer.tp_v_head_num}) than of keys ({layer.tp_k_head_num})": layer.tp_v_head_num
            != layer.tp_k_head_num,
            "attention in chunks (`use_irope`)": bool(getattr(layer, "use_irope", False)),
            f"positions by {getattr(layer, 'pos_encoding_mode', '')} in attention": getattr(
                layer, "pos_encoding_mode", "NONE"
            )
            != "NONE",
            f"logits capped by {getattr(layer, 'logit_capping_method', '')}": bool(cap)
            and getattr(layer, "logit_capping_method", "tanh") != "tanh",
            "a temperature by length (`xai_temperature_len`)": getattr(layer, "xai_temperature_len", -1) > 0,
            **{f"`{name}`": value is not None and value is not False for name, value in more.items()},
        }
    )


def _first(reasons: dict[str, bool]) -> str | None:
    return next((what for what, is_there in reasons.items() if is_there), None)
