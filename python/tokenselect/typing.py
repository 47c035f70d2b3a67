"""What tensors are, for type checkers: this package takes anything of these shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypedDict, runtime_checkable

__all__ = [
    "IntegersLike",
    "RopeFields",
    "SupportsArrayInterface",
    "SupportsCudaArrayInterface",
    "SupportsDataPtr",
    "TensorLike",
]


@runtime_checkable
class SupportsDataPtr(Protocol):
    """PyTorch's tensors."""

    def data_ptr(self) -> int: ...

    def stride(self) -> Any: ...


@runtime_checkable
class SupportsArrayInterface(Protocol):
    """NumPy's arrays."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...


@runtime_checkable
class SupportsCudaArrayInterface(Protocol):
    """Arrays on a CUDA device, such as CuPy's."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


TensorLike = SupportsDataPtr | SupportsArrayInterface | SupportsCudaArrayInterface
"""A tensor or an array."""

IntegersLike = Sequence[int] | Iterable[int] | SupportsDataPtr | SupportsArrayInterface
"""A page table."""


class RopeFields(TypedDict, total=False):
    """The rotary embedding of reassigned positions; what is not given has the library's default."""

    theta: float
    rotary_dim: int | None
    pairing: str
    scaling: str
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: float
    beta_fast: float
    beta_slow: float
    attention_factor: float | None
