"""Options of a model, and the cache that `generate` makes for it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin, PreTrainedModel

from .attention import options_of
from .cache import TokenSelectCache, unsupported
from .options import TokenSelectOptions
from .rope import library_rope, take_rope_away

__all__ = ["configure", "make_caches"]

# By which the model's forward knows its cache: `cache` since 5.2x, `past_key_values` before.
_CACHE_NAMES = ("cache", "past_key_values")


def configure(model: PreTrainedModel, options: TokenSelectOptions | None = None, **changes: Any) -> TokenSelectOptions:
    """Sets the options of a model with `attn_implementation="tokenselect"`, for the caches that `generate` makes and for forwards
    without a `TokenSelectCache`. `changes` are fields of `options`, or of the defaults. Answers the options.

    With `positions="reassigned"` it takes RoPE away from the layers that select; with `"native"` it gives it back.

    Raises `TypeError` for an option that does not exist, `ValueError` where the model has another attention implementation or an option
    breaks its rule, `NotImplementedError` for
    RoPE that the library does not have, and then changes nothing.
    """
    known = [field.name for field in dataclasses.fields(TokenSelectOptions)]
    if unknown := [name for name in changes if name not in known]:
        raise TypeError(f"configure() has no option {', '.join(unknown)}; there are {', '.join(known)}")
    options = TokenSelectOptions(**{**(vars(options) if options is not None else {}), **changes})
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation != "tokenselect":
        raise ValueError(f"`model` must have attn_implementation='tokenselect', it has '{config._attn_implementation}'")
    options.check_layers(config.num_hidden_layers)
    layers = _attention_layers(model)
    ropes = _ropes(model, layers, options) if options.positions == "reassigned" else {}
    for module in (model, *model.modules()):
        handle = module.__dict__.pop("_tokenselect_rope_handle", None)
        if handle is not None:
            handle.remove()
            del module._tokenselect_rope
    for layer in layers:
        layer._tokenselect_options = options  # type: ignore[assignment, unused-ignore]
        if layer in ropes:
            layer.__dict__["_tokenselect_rope_handle"] = take_rope_away(layer, ropes[layer])
    model._tokenselect_options = options  # type: ignore[assignment, unused-ignore]
    return options


def _attention_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Those that call the attention function."""
    found = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "is_causal")]
    return [
        module
        for module in found
        if getattr(getattr(module, "config", None), "_attn_implementation", None) == "tokenselect"
    ]


def _ropes(
    model: torch.nn.Module, layers: list[torch.nn.Module], options: TokenSelectOptions
) -> dict[torch.nn.Module, Any]:
    rotaries = {name: module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == "rotary_emb"}
    if len(rotaries) != 1:
        raise NotImplementedError(
            f"positions='reassigned' needs one `rotary_emb` for all layers, the model has {len(rotaries)}: {', '.join(rotaries) or 'none'}"
        )
    (rotary,) = rotaries.values()
    ropes = {}
    for layer in layers:
        layer_idx: Any = layer.layer_idx
        config: Any = layer.config
        kinds = getattr(config, "layer_types", None)
        kind = kinds[layer_idx] if kinds else None
        slides = kind == "sliding_attention" if kinds else getattr(config, "sliding_window", None) is not None
        if not slides and layer_idx not in options.dense_layers:
            ropes[layer] = library_rope(rotary, layer, kind)
    return ropes


def make_caches() -> None:
    """Lets `generate` make a `TokenSelectCache` where it would make a `DynamicCache`, for models with
    `attn_implementation="tokenselect"`. Others, and caches that are given or asked for by name, stay what they are."""
    original = GenerationMixin._prepare_cache_for_generation
    if getattr(original, "_tokenselect", False):
        return

    @functools.wraps(original)
    def prepare(
        self: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        given = {name for name in _CACHE_NAMES if model_kwargs.get(name) is not None}
        answer = original(
            self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs
        )
        config = self.config.get_text_config(decoder=True)
        if given or generation_config.cache_implementation is not None or config._attn_implementation != "tokenselect":
            return answer
        for name in _CACHE_NAMES:
            # Of a model that has layers of other kinds, too, the dynamic cache stays, and is served.
            if type(model_kwargs.get(name)) is DynamicCache and unsupported(config) is None:
                cache = TokenSelectCache(config, options_of(self), max_length=max_cache_length)
                if generation_config.is_assistant:
                    cache.activate_past_recording()
                model_kwargs[name] = cache
        return answer

    prepare._tokenselect = True  # type: ignore[attr-defined, unused-ignore]
    GenerationMixin._prepare_cache_for_generation = prepare  # type: ignore[method-assign, unused-ignore]
