"""Tensors that stand for objects of the library.

Operators of PyTorch's take tensors, numbers and strings. A number would be part of what is compiled, which changes with every batch; the
value of a tensor is not, and only a tensor can be declared as written, which is how a compiler knows what must stay in order.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, TypeVar

import torch

from tokenselect import Batch, Cache, KvView, Pieces, SelectionCache
from tokenselect.errors import ArgumentError, ArgumentTypeError, TokenSelectError

from .contexts import Contexts

__all__ = ["expect_handle", "handle", "resolve"]

_T = TypeVar("_T")
_KINDS = (Batch, Cache, Contexts, KvView, Pieces, SelectionCache)

# Numbers are never used again.
_numbers = itertools.count(1)
_objects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def handle(of: Batch | Cache | Contexts | KvView | Pieces | SelectionCache) -> torch.Tensor:
    """A tensor that stands for an object in this module's operations: one int64 on the processor.

    The tensor holds the object; a copy of it does not. Make it outside of compiled functions, and pass it to them or keep it where they
    find it, but not as a parameter or buffer of a module, which `Module.to` moves to other devices.
    Raises `ArgumentTypeError` for other objects.
    """
    if not isinstance(of, _KINDS):
        names = ", ".join(kind.__name__ for kind in _KINDS)
        raise ArgumentTypeError(f"`of` must be one of {names}, got {type(of).__name__}", "TS_STATUS_CONFIG")
    number = next(_numbers)
    with torch.inference_mode(False):  # it counts as written, within inference mode and outside of it
        tensor = torch.tensor([number], dtype=torch.int64, device="cpu")
    tensor._tokenselect = of  # type: ignore[attr-defined, unused-ignore]
    _objects[number] = of
    return tensor


def expect_handle(what: str, tensor: torch.Tensor) -> None:
    """Raises `ArgumentError` for a tensor that is no handle, by all but its value."""
    if tensor.dtype != torch.int64 or tensor.dim() != 1 or tensor.shape[0] != 1 or tensor.device.type != "cpu":
        raise ArgumentError(
            f"`{what}` must be a handle, one int64 on cpu, got {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}",
            "TS_STATUS_CONFIG",
        )


def resolve(what: str, tensor: torch.Tensor, kind: type[_T]) -> _T:
    """The object that the argument called `what` stands for.

    Raises `TokenSelectError` where it is gone, `ArgumentError` for a tensor that is no handle, `ArgumentTypeError` for a handle of another
    class.
    """
    expect_handle(what, tensor)
    number = int(tensor)
    found = _objects.get(number)
    if found is None:
        raise TokenSelectError(
            f"`{what}` must be the handle of a {kind.__name__} that is there, handle {number} stands for nothing any more: hold the tensor "
            "that `handle` made, not a copy, as long as it is used",
            "TS_STATUS_CLOSED",
        )
    if not isinstance(found, kind):
        raise ArgumentTypeError(
            f"`{what}` must be the handle of a {kind.__name__}, got that of a {type(found).__name__}",
            "TS_STATUS_CONFIG",
        )
    return found
