"""The definitions in NumPy, and what tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

import tokenselect as ts

HQ, HKV, D, PAGE = 4, 2, 16, 4
THETA = 5e5

Array = npt.NDArray[Any]
Draw = Callable[..., npt.NDArray[np.float32]]


def rotate(x: Array, positions: Array) -> Array:
    """RoPE of `[tokens, heads, D]`, pairs `i` and `i + D / 2`."""
    angles = positions[:, None, None] * THETA ** (-2.0 * np.arange(D // 2) / D)
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], -1)


def select(config: ts.Config, q: Array, k: Array) -> tuple[Array | None, list[int]]:
    """The votes of the candidates and the selected list."""
    n, block = len(k), len(q)
    end = max(n - block - config.n_local, 0)
    begin = min(config.n_init, end)
    if end - begin <= config.top_k:
        return None, list(range(n))
    if config.positions == "reassigned":
        q = rotate(q, config.n_local + np.arange(block))
    keys = np.repeat(k[begin:end], HQ // HKV, axis=1)
    logits = np.einsum("hd,jhd->hj", q.mean(0), keys) / np.sqrt(D)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    votes = (weights / weights.sum(-1, keepdims=True)).sum(0)
    chosen = np.sort(np.lexsort((np.arange(len(votes)), -votes))[: config.top_k]) + begin
    return votes, [*range(begin), *chosen.tolist(), *range(end, n)]


def attend(config: ts.Config, q: Array, k: Array, v: Array, tokens: list[int]) -> tuple[Array, Array]:
    """Attention over a list: out and log-sum-exp."""
    block, m = len(q), len(tokens)
    k, v = k[tokens], v[tokens]
    if config.positions == "reassigned":
        k, q = rotate(k, np.arange(m)), rotate(q, m - block + np.arange(block))
    k, v = np.repeat(k, HQ // HKV, axis=1), np.repeat(v, HQ // HKV, axis=1)
    logits = np.einsum("thd,jhd->thj", q, k) / np.sqrt(D)
    hidden = np.arange(m)[None, :] > m - block + np.arange(block)[:, None]
    logits[np.broadcast_to(hidden[:, None, :], logits.shape)] = -np.inf
    largest = logits.max(-1, keepdims=True)
    weights = np.exp(logits - largest)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("thj,jhd->thd", weights / total, v), (largest + np.log(total))[..., 0]


def to_bf16(x: Array) -> npt.NDArray[np.uint16]:
    """Rounded to bfloat16, as uint16."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(x: Array) -> Array:
    """bfloat16 bits as float64."""
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def config(**fields: Any) -> ts.Config:
    """A small configuration."""
    given = dict(num_qo_heads=HQ, num_kv_heads=HKV, head_dim=D, dtype="f32", n_init=2, n_local=3, top_k=5)
    return ts.Config(**{**given, "selection_cache": False, **fields})


def view(tensors: Iterable[Any], layout: Literal["NHD", "HND"] = "NHD") -> ts.KvView:
    """A view of keys and values."""
    k, v = tensors
    return ts.KvView(k, v, layout)


def tables(length: int, num_pages: int) -> tuple[list[int], list[int], list[int]]:
    """indptr, indices and last_page_len of one row in pages that lie in reverse order."""
    pages = -(-length // PAGE)
    return [0, pages], [num_pages - 1 - page for page in range(pages)], [length - (pages - 1) * PAGE]


class StandIn:
    """What the package asks of a PyTorch tensor at least, over a NumPy array: for machines without PyTorch."""

    def __init__(self, array: Array, dtype: str) -> None:
        self.array, self.dtype, self.shape, self.device = array, f"torch.{dtype}", array.shape, "cpu"

    def data_ptr(self) -> int:
        return int(self.array.__array_interface__["data"][0])

    def stride(self) -> tuple[int, ...]:
        return tuple(stride // self.array.itemsize for stride in self.array.strides)


class Fleeting(StandIn):
    """A copy of an array that scribbles over its elements when nobody holds it any more."""

    def __init__(self, array: Array) -> None:
        super().__init__(array.copy(), str(array.dtype))

    def __del__(self) -> None:
        self.array.view(np.uint8).fill(0x7F)


class Slice:
    """A part of a buffer, with strides."""

    def __init__(self, buffer: ts.Buffer, array: Array, part: Array) -> None:
        self.buffer = buffer  # holds the memory
        self.interface: dict[str, Any] = {
            "data": (buffer.ptr + part.ctypes.data - array.ctypes.data, False),
            "shape": part.shape,
            "typestr": buffer.typestr,
            "strides": part.strides,
            "version": 3,
            "stream": None,
        }

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.interface
