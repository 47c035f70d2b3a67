"""Contexts of the library, made once for each kind of layer and stream."""

from __future__ import annotations

from functools import partial
from typing import Any

from tokenselect import Context, Device
from tokenselect.torch.growing import Growing

from .layers import Layer
from .options import EngineOptions

__all__ = ["Contexts", "separate", "shared_contexts"]


def separate(device: Device) -> None:
    """Lets the library's next launch begin when all before it have ended.

    Its launches may begin before the one in front has ended, if that allows it, and then read what is written by then. Engines have
    kernels that allow it too early: SGLang's that writes keys and values does before it writes.
    """
    device.separate()


class Contexts:
    """Contexts with one set of options, for every device and layer: three kinds, each made when it is first needed."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self._growing: dict[Any, Growing] = {}
        self._fixed: dict[Any, Context] = {}
        self._readers: dict[Any, Growing] = {}

    def growing(self, device: Device, layer: Layer, rows: int, block_len: int, kv_tokens: int) -> Context:
        """For batches of up to so many rows, query tokens of a row, and tokens cached by all rows. It is made again, larger, where it
        must be, so that nothing that was captured may use it."""
        key = (device, layer)
        if key not in self._growing:
            self._growing[key] = Growing(partial(_context, device, layer))
        return self._growing[key].get(rows, block_len, kv_tokens)

    def fixed(self, device: Device, layer: Layer, rows: int, kv_tokens: int) -> Context:
        """For single tokens of up to `rows` rows, and never made again: CUDA graphs have the addresses of its workspace."""
        key = (device, layer, rows, kv_tokens)
        if key not in self._fixed:
            self._fixed[key] = _context(device, layer, rows, 1, kv_tokens)
        return self._fixed[key]

    def reader(self, device: Device, layer: Layer, kv_len: int) -> Context:
        """For prompts, until a sequence has `kv_len` tokens."""
        key = (device, layer)
        if key not in self._readers:
            self._readers[key] = Growing(partial(_reader, device, layer, self.options))
        return self._readers[key].get(kv_len)


_shared: dict[EngineOptions, Contexts] = {}


def shared_contexts(options: EngineOptions) -> Contexts:
    """Those of this process with these options, which all groups of layers share."""
    if options not in _shared:
        _shared[options] = Contexts(options)
    return _shared[options]


def _context(device: Device, layer: Layer, rows: int, block_len: int, kv_tokens: int) -> Context:
    more: dict[str, Any] = {"operations": ["append", "attend"]} if layer.is_dense else {}
    return Context(device, layer.config(), max_rows=rows, max_block_len=block_len, max_kv_tokens=kv_tokens, **more)


def _reader(device: Device, layer: Layer, options: EngineOptions, kv_len: int) -> Context:
    return Context.for_prefill(
        device,
        layer.config(),
        block_len=options.block_len,
        max_piece_len=max(options.max_piece_len, options.block_len),
        max_workspace_bytes=options.max_workspace_bytes,
        max_kv_len=kv_len,
    )
