"""Rules that options of several kinds share. Each raises `ValueError`, which names the option, its rule and what was given."""

from __future__ import annotations

import math
from collections.abc import Collection

__all__ = ["at_least", "finite_or_none", "layers", "odd"]


def at_least(name: str, value: object, least: int) -> None:
    """A whole number from `least` on."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"`{name}` must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}")


def odd(name: str, value: int) -> None:
    """An odd number from 1 on."""
    at_least(name, value, 1)
    if value % 2 == 0:
        raise ValueError(f"`{name}` must be odd, got {value}")


def finite_or_none(name: str, value: object) -> None:
    """A finite number, or None."""
    if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
        raise ValueError(f"`{name}` must be finite, got {value!r}")


def layers(name: str, value: Collection[int]) -> frozenset[int]:
    """Numbers of layers."""
    if isinstance(value, str) or not isinstance(value, Collection):
        raise ValueError(f"`{name}` must be a list of numbers of layers, got {value!r}")
    for layer in value:
        at_least(name, layer, 0)
    return frozenset(value)
