"""Reassigned positions: a model's own RoPE as the library's, and the model without it.

Layers that select are given a cosine of 1 and a sine of 0, so that their queries and keys stay as they were before RoPE; the library
rotates them at their places in the selected list. Layers that attend to all tokens, or within a window, keep the model's rotation.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

__all__ = ["library_rope", "take_rope_away"]

Rope = tuple[tuple[str, float | int | str], ...]

# Of frequencies in float32.
_TOLERANCE = 1e-5


def library_rope(rotary: torch.nn.Module, attention: torch.nn.Module, layer_type: str | None) -> Rope:
    """The library's `rope` that rotates as `rotary`, a model's rotary embedding, does for an attention layer.

    Raises `NotImplementedError`, naming the rope type, where the library has none.
    """
    frequencies, factor = _of_model(rotary, layer_type)
    config: Any = rotary.config
    parameters: Any = config.rope_parameters
    if layer_type is not None and layer_type in parameters:
        parameters = parameters[layer_type]
    kind = parameters.get("rope_type", "default")
    rope: dict[str, float | int | str] = {"theta": float(parameters["rope_theta"]), "rotary_dim": 2 * len(frequencies)}
    if kind == "linear":
        rope.update(scaling="linear", factor=float(parameters["factor"]))
    elif kind == "llama3":
        rope.update(
            scaling="llama3",
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_position=float(parameters["original_max_position_embeddings"]),
        )
    elif kind == "yarn":
        original = parameters["original_max_position_embeddings"]
        rope.update(
            scaling="yarn",
            factor=float(parameters["factor"] or config.max_position_embeddings / original),
            original_max_position=float(original),
            beta_fast=float(parameters.get("beta_fast") or 32),
            beta_slow=float(parameters.get("beta_slow") or 1),
            attention_factor=float(factor),
        )
    elif kind != "default":
        raise NotImplementedError(
            f"positions='reassigned' does not have the rope type '{kind}': default, linear, llama3 and yarn are there"
        )
    if kind != "yarn" and factor != 1.0:
        raise NotImplementedError(
            f"positions='reassigned' takes an attention factor of RoPE with yarn alone, the rope type '{kind}' has {factor}"
        )
    expected = torch.tensor(_frequencies(rope), dtype=torch.float64, device=frequencies.device)
    error = ((expected - frequencies) / frequencies.clamp(min=1e-30)).abs().max().item()
    if not error < _TOLERANCE:
        raise NotImplementedError(
            f"positions='reassigned': the frequencies of the model's rope type '{kind}' differ from the library's by {error:.1e} relative, "
            f"{_TOLERANCE:.0e} is allowed"
        )
    rope["pairing"] = _pairing(rotary, attention, layer_type, frequencies, factor)
    return tuple(sorted(rope.items()))


def _of_model(rotary: torch.nn.Module, layer_type: str | None) -> tuple[torch.Tensor, float]:
    prefix = f"{layer_type}_" if layer_type is not None and hasattr(rotary, f"{layer_type}_inv_freq") else ""
    frequencies = getattr(rotary, f"{prefix}original_inv_freq", getattr(rotary, f"{prefix}inv_freq", None))
    if not isinstance(frequencies, torch.Tensor) or not hasattr(rotary, "config"):
        raise NotImplementedError(
            f"positions='reassigned' needs a rotary embedding with `inv_freq` and `config`, {type(rotary).__name__} has none"
        )
    return frequencies.detach().double(), float(getattr(rotary, f"{prefix}attention_scaling", 1.0))


def _frequencies(rope: dict[str, Any]) -> list[float]:
    """As the library makes them: definitions, "Positions"."""
    dim, theta = rope["rotary_dim"], rope["theta"]
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    scaling = rope.get("scaling")
    if scaling == "linear":
        return [frequency / rope["factor"] for frequency in plain]
    if scaling == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = [(rope["original_max_position"] * frequency / math.tau - low) / (high - low) for frequency in plain]
        ramp = [min(max(k, 0.0), 1.0) for k in keep]
        return [f * (k + (1 - k) / rope["factor"]) for f, k in zip(plain, ramp, strict=True)]
    if scaling == "yarn":

        def dim_of(rotations: float) -> float:
            return float(dim * math.log(rope["original_max_position"] / (rotations * math.tau)) / (2 * math.log(theta)))

        first = max(math.floor(dim_of(rope["beta_fast"])), 0)
        last = min(math.ceil(dim_of(rope["beta_slow"])), dim - 1)
        width = last - first or 0.001
        ramp = [min(max((i - first) / width, 0.0), 1.0) for i in range(dim // 2)]
        return [f * (1 - r + r / rope["factor"]) for f, r in zip(plain, ramp, strict=True)]
    return plain


def _pairing(
    rotary: torch.nn.Module,
    attention: torch.nn.Module,
    layer_type: str | None,
    frequencies: torch.Tensor,
    factor: float,
) -> str:
    """Which elements the model rotates with each other, found by rotating a head once."""
    module = sys.modules[type(attention).__module__]
    rotate = getattr(module, "apply_rotary_pos_emb", None)
    if rotate is None:
        raise NotImplementedError(
            f"positions='reassigned' needs `apply_rotary_pos_emb` in {module.__name__}, to see which elements it pairs"
        )
    dim = 2 * len(frequencies)
    head = torch.arange(1, int(getattr(attention, "head_dim", dim)) + 1, dtype=torch.float32)
    like = head.view(1, 1, 1, -1).to(frequencies.device)
    given = () if layer_type is None or not hasattr(rotary, f"{layer_type}_inv_freq") else (layer_type,)
    position = 3
    try:
        cos, sin = rotary(like[0], torch.tensor([[position]], device=like.device), *given)
        rotated = rotate(like, like.clone(), cos, sin)[0].to("cpu", torch.float64).view(-1)
    except (TypeError, RuntimeError, ValueError) as error:
        raise NotImplementedError(
            f"positions='reassigned' cannot tell which elements {module.__name__} pairs: {error}"
        ) from error
    angles = position * frequencies.to("cpu", torch.float64)
    flat = head.double()
    halves = slice(0, dim // 2), slice(dim // 2, dim)
    neighbours = slice(0, dim, 2), slice(1, dim, 2)
    for name, (first, second) in (("half_split", halves), ("interleaved", neighbours)):
        expected = flat.clone()
        expected[first] = factor * (flat[first] * angles.cos() - flat[second] * angles.sin())
        expected[second] = factor * (flat[second] * angles.cos() + flat[first] * angles.sin())
        if torch.allclose(rotated, expected, rtol=1e-4, atol=1e-4):
            return name
    raise NotImplementedError(
        f"positions='reassigned': {module.__name__} rotates neither halves nor neighbours of the first {dim} elements"
    )


def take_rope_away(attention: torch.nn.Module, rope: Rope) -> torch.utils.hooks.RemovableHandle:
    """Gives an attention layer a cosine of 1 and a sine of 0 until the handle's `remove`."""
    attention._tokenselect_rope = rope  # type: ignore[assignment, unused-ignore]
    return attention.register_forward_pre_hook(_without_rope, with_kwargs=True)


def _without_rope(
    attention: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    implementation = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    if implementation != "tokenselect":
        raise RuntimeError(
            "`configure` with positions='reassigned' has taken RoPE away from this model, which has "
            f"attn_implementation='{implementation}' now: set 'tokenselect' again, and positions='native' before another one"
        )
    embeddings = kwargs.get("position_embeddings")
    if not isinstance(embeddings, (tuple, list)) or len(embeddings) != 2:
        raise NotImplementedError(
            "positions='reassigned' needs attention layers that are given `position_embeddings=(cos, sin)`, "
            f"{type(attention).__name__} is not"
        )
    cos, sin = embeddings
    return args, {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}
