"""Devices and contexts of the library, made once for each kind of layer and stream."""

from __future__ import annotations

from typing import Any

import torch

from tokenselect import Context, Device

from .layers import Layer
from .options import EngineOptions

__all__ = ["Contexts", "device_of", "separate", "shared_contexts"]

_devices: dict[Any, Device] = {}
_words: dict[torch.device, torch.Tensor] = {}


def device_of(tensor: torch.Tensor) -> Device:
    """The library's device for a tensor: the processor, or a GPU with PyTorch's current stream.

    Raises `NotImplementedError` for others.
    """
    if tensor.device.type == "cpu":
        key: tuple[Any, ...] = ("cpu",)
        if key not in _devices:
            _devices[key] = Device.cpu()
        return _devices[key]
    if tensor.device.type != "cuda" or torch.version.hip is not None:
        raise NotImplementedError(f"tokenselect runs on the processor and on CUDA devices, got {tensor.device}")
    stream = torch.cuda.current_stream(tensor.device).cuda_stream
    key = ("cuda", tensor.device.index, stream)
    if key not in _devices:
        # The library uses the current context if it is that device's.
        with torch.cuda.device(tensor.device):
            _devices[key] = Device.cuda(tensor.device.index, stream=stream)
    return _devices[key]


def separate(tensor: torch.Tensor) -> None:
    """Lets the library's next launch begin when all before it have ended, on the GPU of a tensor.

    Its launches may begin before the one in front has ended, if that allows it, and then read what is written by then. Engines have
    kernels that allow it earlier: SGLang's that writes keys and values does before it writes. A write of PyTorch's in between does not.
    """
    if tensor.is_cuda:
        if tensor.device not in _words:
            with torch.inference_mode(False):
                _words[tensor.device] = torch.empty(1, dtype=torch.int32, device=tensor.device)
        _words[tensor.device].zero_()


class Contexts:
    """Contexts with one set of options, for every device and layer: three kinds, each made when it is first needed."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self._growing: dict[Any, tuple[Context, tuple[int, int, int]]] = {}
        self._fixed: dict[Any, Context] = {}
        self._readers: dict[Any, tuple[Context, int]] = {}

    def growing(self, device: Device, layer: Layer, rows: int, block_len: int, kv_tokens: int) -> Context:
        """For batches of up to so many rows, query tokens of a row, and tokens cached by all rows. It is made again, larger, where it
        must be, so that nothing that was captured may use it."""
        key, need = (device, layer), (rows, block_len, kv_tokens)
        had = self._growing[key][1] if key in self._growing else (0, 0, 0)
        if any(got < want for got, want in zip(had, need, strict=True)):
            # Twice what is needed where it grows, so that sequences which get longer come here seldom.
            room = tuple(got if got >= want else _round_up(want) for got, want in zip(had, need, strict=True))
            self._growing.pop(key, None)  # gives its workspace back first
            self._growing[key] = (_context(device, layer, *room), (room[0], room[1], room[2]))
        return self._growing[key][0]

    def fixed(self, device: Device, layer: Layer, rows: int, kv_tokens: int) -> Context:
        """For single tokens of up to `rows` rows, and never made again: CUDA graphs have the addresses of its workspace."""
        key = (device, layer, rows, kv_tokens)
        if key not in self._fixed:
            self._fixed[key] = _context(device, layer, rows, 1, kv_tokens)
        return self._fixed[key]

    def reader(self, device: Device, layer: Layer, kv_len: int) -> Context:
        """For prompts, until a sequence has `kv_len` tokens."""
        key = (device, layer)
        if key not in self._readers or self._readers[key][1] < kv_len:
            room = _round_up(kv_len)
            self._readers.pop(key, None)
            context = Context.for_prefill(
                device,
                layer.config(),
                block_len=self.options.block_len,
                max_piece_len=max(self.options.max_piece_len, self.options.block_len),
                max_workspace_bytes=self.options.max_workspace_bytes,
                max_kv_len=room,
            )
            self._readers[key] = (context, room)
        return self._readers[key][0]


_shared: dict[EngineOptions, Contexts] = {}


def shared_contexts(options: EngineOptions) -> Contexts:
    """Those of this process with these options, which all groups of layers share."""
    if options not in _shared:
        _shared[options] = Contexts(options)
    return _shared[options]


def _context(device: Device, layer: Layer, rows: int, block_len: int, kv_tokens: int) -> Context:
    more: dict[str, Any] = {"operations": ["append", "attend"]} if layer.is_dense else {}
    return Context(device, layer.config(), max_rows=rows, max_block_len=block_len, max_kv_tokens=kv_tokens, **more)


def _round_up(number: int) -> int:
    return 1 << (number - 1).bit_length() if number > 1 else 1
