"""PyTorch's own dense attention over contiguous keys and values of few layers: cuDNN for prompts, the faster of flash
and cuDNN for decoding."""

from __future__ import annotations

import statistics
import time
from contextlib import AbstractContextManager, nullcontext

import cudnn_peer
import torch
from model import Attend, Model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

NAME = "torch SDPA"
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


class Sdpa:
    """One sequence, whose keys and values lie in `[1, num_kv_heads, max_tokens, D]` for each of `num_layers` layers."""

    name = NAME

    def __init__(self, model: Model, max_tokens: int, piece: int, num_layers: int = 1) -> None:
        self.model, self.piece, self.num_layers = model, piece, num_layers
        shape = model.shape
        size = (1, shape.num_kv_heads, max_tokens, shape.head_dim)
        self.k, self.v = (
            [torch.empty(size, dtype=torch.bfloat16, device=model.device).normal_() for _ in range(num_layers)]
            for _ in "kv"
        )
        self.backend = "none"

    def prefill_at(self, position: int) -> dict[str, Attend]:
        """Attention of a piece that begins at `position`."""
        end = position + self.piece

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys, values = self._append(layer, position, k, v)
            if position > 0:
                return cudnn_peer.Prefill(q, keys[:, :, :end], values[:, :, :end])()
            queries = q.transpose(0, 1).unsqueeze(0).contiguous()
            out, _ = cudnn_peer.attend(queries, keys[:, :, :end], values[:, :, :end], causal=True)
            return out.squeeze(0).transpose(0, 1)

        return {"all": attend}

    def decode_at(self, tokens: int) -> dict[str, Attend]:
        """Attention of the last of `tokens` tokens, by the fastest backend that runs. Raises what the last one raised
        where none does."""

        def with_backend(choice: SDPBackend | None) -> Attend:
            def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                keys, values = self._append(layer, tokens - 1, k, v)
                queries = q.transpose(0, 1).unsqueeze(0)
                chosen: AbstractContextManager[object] = nullcontext() if choice is None else sdpa_kernel(choice)
                with chosen:
                    out = scaled_dot_product_attention(
                        queries, keys[:, :, :tokens], values[:, :, :tokens], enable_gqa=True
                    )
                return out.squeeze(0).transpose(0, 1)

            return attend

        if self.model.device.type != "cuda":
            return {"dense": with_backend(None)}
        attends, millis, failure = {}, {}, RuntimeError("no backend")
        for name, choice in BACKENDS.items():
            try:
                attends[name] = with_backend(choice)
                millis[name] = self._millis(attends[name])
            except RuntimeError as error:
                failure = error
        if not millis:
            raise failure
        self.backend = min(millis, key=lambda name: millis[name])
        return {"dense": attends[self.backend]}

    def heads(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random queries, keys and values of `count` tokens."""
        shape = self.model.shape
        sizes = [(count, heads, shape.head_dim) for heads in (shape.num_qo_heads, *[shape.num_kv_heads] * 2)]
        q, k, v = (torch.randn(size, dtype=torch.bfloat16, device=self.model.device) for size in sizes)
        return q, k, v

    def close(self) -> None:
        """Nothing: all of its memory is PyTorch's."""

    def _append(self, layer: int, position: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.k[layer], self.v[layer]
        end = position + k.shape[0]
        keys[0, :, position:end].copy_(k.transpose(0, 1))
        values[0, :, position:end].copy_(v.transpose(0, 1))
        return keys, values

    def _millis(self, attend: Attend) -> float:
        """A rough time, to choose by."""
        given, times = self.heads(1), []
        for _ in range(4):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            attend(0, *given)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * 1e3)
        return statistics.median(times[1:])
