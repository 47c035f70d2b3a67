"""The library's devices and types for PyTorch's."""

from __future__ import annotations

import torch

from tokenselect import Device

__all__ = ["DTYPES", "device_of", "is_capturing"]

DTYPES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
"""The library's names of element types."""

# By ordinal and stream; None for the processor. PyTorch's streams come from a pool and live as long as the process.
_devices: dict[tuple[int, int] | None, Device] = {}


def device_of(of: torch.Tensor | torch.device | str) -> Device:
    """The library's device for a tensor's or a device of PyTorch's: the processor, or a GPU with PyTorch's current stream.

    One for each stream: what is made on it (`BatchSlot`, `SelectionCache`, `Cache`) works with contexts of the same stream alone.
    Raises `NotImplementedError` for others.
    """
    place = of.device if isinstance(of, torch.Tensor) else torch.device(of)
    if place.type == "cpu":
        if None not in _devices:
            _devices.setdefault(None, Device.cpu())
        return _devices[None]
    if place.type != "cuda" or torch.version.hip is not None:
        raise NotImplementedError(f"tokenselect runs on the processor and on CUDA devices, got {place}")
    stream = torch.cuda.current_stream(place)
    key = (stream.device.index, stream.cuda_stream)
    if key not in _devices:
        # The library uses the current context if it is that device's.
        with torch.cuda.device(stream.device):
            _devices.setdefault(key, Device.cuda(key[0], stream=stream))
    return _devices[key]


def is_capturing(tensor: torch.Tensor) -> bool:
    """Whether PyTorch captures the current stream's work."""
    return bool(tensor.is_cuda and torch.cuda.is_current_stream_capturing())
