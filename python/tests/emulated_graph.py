"""CUDA graphs of PyTorch's as far as a backend meets them, on the processor.

What is done within `capture` is recorded: the library's calls, and what PyTorch writes into memory that is there already. `replay` does those again, with the
tensors that they were recorded with, and runs no Python of the backend. What would wait for a GPU fails in a capture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import tokenselect as ts

__all__ = ["EmulatedGraph", "FakeSlot", "RecordedContext", "is_capturing"]

_WRITES = {"copy_", "zero_", "fill_", "index_copy_", "__setitem__"}
_WAITS = {"cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__index__"}


class EmulatedGraph(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
    """A recording. One at a time."""

    current: EmulatedGraph | None = None

    def __init__(self) -> None:
        super().__init__()
        self._work: list[Callable[[], Any]] = []
        self._in_library = False

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        EmulatedGraph.current = self
        try:
            with self:
                yield
        finally:
            EmulatedGraph.current = None

    def replay(self) -> None:
        for work in self._work:
            work()

    def library(self, work: Callable[[], Any]) -> Any:
        """Does work of the library, which may look at memory, and records it."""
        self._work.append(work)
        self._in_library = True
        try:
            return work()
        finally:
            self._in_library = False

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if not self._in_library:
            assert name not in _WAITS, f"`{name}` waits for the device, which cannot be captured"
            if name in _WRITES or "out" in kwargs:
                self._work.append(lambda: func(*args, **kwargs))
        return func(*args, **kwargs)


def is_capturing(tensor: Any) -> bool:
    return EmulatedGraph.current is not None


def _do(work: Callable[[], Any]) -> Any:
    return work() if EmulatedGraph.current is None else EmulatedGraph.current.library(work)


class _Bound:
    """A batch in a slot: the one that was put there last."""

    def __init__(self) -> None:
        self.batch: Any = None


class FakeSlot:
    """`BatchSlot.translate` on the processor, by the rules of `TablesOnDevice`."""

    made: list[FakeSlot] = []

    def __init__(self, device: Any, like: Any, max_pages: int) -> None:
        assert not is_capturing(None), "a slot allocates, which cannot be captured"
        self.num_rows, self.max_pages, self.page_size = like.num_rows, max_pages, like.info.page_size
        self.num_faults = 0
        FakeSlot.made.append(self)

    def translate(self, entries: Any, kv_lens: Any, num_pages: int, slots: bool = False, rows: Any = None) -> Any:
        for tensor in (entries, kv_lens, rows):
            assert tensor is None or tensor.dtype in (torch.int32, torch.int64)
            assert tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1
        assert kv_lens.shape == (self.num_rows,) and (rows is None or rows.shape == (self.num_rows,))
        bound = _Bound()

        def put() -> None:
            bound.batch = self._batch(entries.numpy(), kv_lens.tolist(), num_pages, slots, rows)

        _do(put)
        return bound

    def _batch(self, entries: Any, kv_lens: list[int], num_pages: int, slots: bool, rows: Any) -> Any:
        size, indptr = self.page_size, [0]
        indices: list[int] = []
        last: list[int] = []
        for row, length in enumerate(kv_lens):
            at = row if rows is None else int(rows[row])
            places = -(-length // size)
            fits = at < entries.shape[0] and places * (size if slots else 1) <= entries.shape[1]
            fits = fits and len(indices) + places <= self.max_pages
            held = entries[at, : places * size : size] // size if slots else entries[at, :places]
            if not fits or (held >= num_pages).any():
                self.num_faults += 1
                held, length = [], 0
            indices.extend(int(page) for page in held)
            indptr.append(len(indices))
            last.append((length - 1) % size + 1 if length else 0)
        return ts.Batch(size, list(range(len(kv_lens) + 1)), indptr, indices, last)


class RecordedContext:
    """A context of the library whose calls are recorded."""

    def __init__(self, device: Any, config: Any, **limits: Any) -> None:
        assert not is_capturing(None), "a context allocates, which cannot be captured"
        self._real = ts.Context(device, config, **limits)

    @staticmethod
    def for_prefill(device: Any, config: Any, **limits: Any) -> Any:
        return ts.Context.for_prefill(device, config, **limits)

    def called(self, name: str) -> None:
        """Is told of every call."""

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._real, name)

        def call(batch: Any, *args: Any, **kwargs: Any) -> Any:
            self.called(name)

            def work() -> Any:
                return method(batch.batch if isinstance(batch, _Bound) else batch, *args, **kwargs)

            return _do(work)

        return call
