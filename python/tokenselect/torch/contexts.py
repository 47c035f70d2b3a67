"""Contexts of one configuration, for whatever stream PyTorch works in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch

from tokenselect import Config, Context, Device
from tokenselect.errors import TokenSelectError

from .devices import device_of, is_capturing

__all__ = ["Contexts"]


class Contexts:
    """Contexts with one configuration and the same limits: one for each device and stream, made when it is first needed.

    Each has a workspace of `Device.workspace_bytes`, and its own selection: `select` and `attend` belong in one stream. Used by one
    thread at a time.

    CUDA graphs. Captured work has the addresses of the workspace, so do the work once in the stream of the capture before, and keep this
    object, the handles and the pages as long as the graph. Lengths are those of a `BatchSlot` of that stream:

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            slot = BatchSlot(tokenselect.torch.device_of("cuda"), first, max_pages)
            batch = tokenselect.torch.handle(slot.put(first))
            step(batch)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                step(batch)
            for following in ...:
                slot.put(following)
                graph.replay()

    PyTorch's graphs ask nothing of the library: make the slot for at most `max_kv_tokens` in whole pages, and put batches there whose
    pages the pools have. (`Device.capture` checks both.) Launches of the library may begin before a kernel in front has ended that lets
    them; Triton's of compiled code do, before they have written, where `torch._inductor.config.triton.enable_pdl` is set: leave it off.
    """

    def __init__(
        self,
        config: Config,
        *,
        max_rows: int = 1,
        max_block_len: int = 512,
        max_kv_tokens: int = 131072,
        operations: Iterable[Literal["append", "pool", "score", "vote", "attend"]] | None = None,
    ) -> None:
        """As `Context`, without a device. Errors in these arguments come with the first context."""
        self.config = config
        self._is_reader = False
        self._limits: dict[str, Any] = {
            "max_rows": max_rows,
            "max_block_len": max_block_len,
            "max_kv_tokens": max_kv_tokens,
        }
        if operations is not None:
            self._limits["operations"] = list(operations)
        self._made: dict[Device, Context] = {}

    @classmethod
    def for_prefill(
        cls,
        config: Config,
        *,
        block_len: int = 512,
        max_kv_len: int = 131072,
        max_piece_len: int = 8192,
        max_workspace_bytes: int = 1 << 30,
    ) -> Contexts:
        """As `Context.for_prefill`, without a device: for `prefill` and `prefill_kv`."""
        made = cls.__new__(cls)
        made.config, made._is_reader = config, True
        made._limits = {
            "block_len": block_len,
            "max_kv_len": max_kv_len,
            "max_piece_len": max_piece_len,
            "max_workspace_bytes": max_workspace_bytes,
        }
        made._made = {}
        return made

    def on(self, tensor: torch.Tensor | torch.device | str) -> Context:
        """The context for work on a tensor, in PyTorch's current stream: to cut batches in pieces (`Batch.in_pieces`), or to look at what
        was selected. Raises `TokenSelectError` where it would have to be made while PyTorch captures."""
        place = device_of(tensor)
        context = self._made.get(place)
        if context is None:
            if isinstance(tensor, torch.Tensor) and is_capturing(tensor):
                raise TokenSelectError(
                    "work must run once in the stream of a capture before it is captured, so that its workspace is there: run it under "
                    "`torch.cuda.stream(stream)`, then capture under `torch.cuda.graph(graph, stream=stream)`",
                    "TS_STATUS_MISSING",
                )
            make: Any = Context.for_prefill if self._is_reader else Context
            context = self._made[place] = make(place, self.config, **self._limits)
        return context

    def close(self) -> None:
        """Gives the workspaces back; the next operation makes them anew."""
        self._made.clear()
