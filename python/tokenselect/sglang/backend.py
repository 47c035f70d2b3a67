"""The attention backend that `--attention-backend tokenselect` names."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from tokenselect.engines.contexts import shared_contexts
from tokenselect.engines.device_step import DeviceStep, Slots, buffer_like, check_room, is_on_device
from tokenselect.engines.host_step import HostStep
from tokenselect.engines.layers import Layer, PagedKv
from tokenselect.engines.options import EngineOptions
from tokenselect.torch.devices import device_of

from .refusals import reason_against_batch, reason_against_layer, reason_against_runner

__all__ = ["TokenSelectAttnBackend"]

# The library's pages have 1 to 256 tokens.
_MAX_PAGE_SIZE = 256


class TokenSelectAttnBackend(AttentionBackend):  # type: ignore[misc]
    """Layers select the tokens that they attend to, over SGLang's pool. Those that cannot go to the backend that
    `TOKENSELECT_DENSE_BACKEND` names.

    Raises `NotImplementedError`, with what it is, for models, batches and layers that are not served.
    """

    # Lengths of a step are checked against the room that there is for it.
    needs_cpu_seq_lens: bool = True

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        _refuse(reason_against_runner(model_runner), "model")
        self.options = EngineOptions.read()
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token: torch.Tensor = model_runner.req_to_token_pool.req_to_token
        self.page_size = int(getattr(model_runner, "page_size", 1) or 1)
        layout = getattr(self.token_to_kv_pool, "kv_cache_layout", "nhd")
        if layout != "nhd":
            raise NotImplementedError(f"tokenselect needs SGLang's pool in the layout nhd, it is in {layout}")
        self.dense_backend: Any = None
        name = self.options.dense_backend
        if name is not None:
            if name == "tokenselect" or name not in ATTENTION_BACKENDS:
                known = ", ".join(sorted(set(ATTENTION_BACKENDS) - {"tokenselect"}))
                raise ValueError(f"TOKENSELECT_DENSE_BACKEND must be one of {known}, got {name!r}")
            self.dense_backend = ATTENTION_BACKENDS[name](model_runner)
            self.attn_backend_list = [self.dense_backend]
        # SGLang wants wrappers to have the translator of what they wrap.
        self.kv_index_translator = getattr(self.dense_backend or model_runner, "kv_index_translator", None)
        self._contexts = shared_contexts(self.options)
        self._slots = Slots()
        self._layers: dict[int, tuple[Layer, PagedKv, tuple[Any, ...]]] = {}
        # Row 0 of `req_to_token` is for padding, and for runs that warm up.
        self._max_rows = int(self.req_to_token.shape[0])
        self._buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._step: HostStep | DeviceStep | None = None

    # Metadata.

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Outside of CUDA graphs."""
        if self.dense_backend is not None:
            self.dense_backend.init_forward_metadata(forward_batch)
        self._prepare(forward_batch, False)
        self._translate(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Before a graph is captured or replayed."""
        if self.dense_backend is not None:
            self.dense_backend.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        self._prepare(forward_batch, in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Captured, and replayed: lengths and page tables are read from the runner's buffers anew."""
        if self.dense_backend is not None:
            self.dense_backend.init_forward_metadata_in_graph(forward_batch)
        self._translate(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Graphs have up to `max_bs` rows."""
        if self.dense_backend is not None:
            self.dense_backend.init_cuda_graph_state(max_bs, max_num_tokens)
        self._max_rows = max(self._max_rows, max_bs)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Padding has one token, that of the pool's slot 0."""
        return 1

    def support_triton(self) -> bool:
        return bool(self.dense_backend is None or self.dense_backend.support_triton())

    def on_after_cuda_graph_warmup(self) -> None:
        if self.dense_backend is not None:
            self.dense_backend.on_after_cuda_graph_warmup()

    # Layers.

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
    ) -> torch.Tensor:
        """One token a row: `q`, `[tokens, num_qo_heads * head_dim]`, to an output alike."""
        return self._forward("forward_decode", q, k, v, layer, forward_batch, save_kv_cache, kwargs)

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
    ) -> torch.Tensor:
        """Prompts, or the rest of them behind a cached prefix, and single tokens among them."""
        return self._forward("forward_extend", q, k, v, layer, forward_batch, save_kv_cache, kwargs)

    def _forward(
        self,
        name: str,
        q: Any,
        k: Any,
        v: Any,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool,
        more: dict[str, Any],
    ) -> torch.Tensor:
        reason = reason_against_layer(layer, more)
        if reason is not None:
            if self.dense_backend is None:
                raise NotImplementedError(
                    f"tokenselect does not serve {reason} (layer {layer.layer_id}): name one of SGLang's backends for such layers in "
                    "TOKENSELECT_DENSE_BACKEND"
                )
            forward = getattr(self.dense_backend, name)
            dense: torch.Tensor = forward(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **more)
            return dense
        if self._step is None:
            raise RuntimeError("tokenselect has no metadata of this batch: `init_forward_metadata` comes first")
        if save_kv_cache and k is not None and v is not None:
            # The pool knows more of its memory than its layout: what it is loaded from, and which stream it is written in.
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc.for_batch(forward_batch), k, v)
        made, kv = self._of_layer(layer)
        queries: torch.Tensor = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        if queries.dtype != kv.k.dtype:
            raise NotImplementedError(
                f"tokenselect needs queries of the pool's type, {kv.k.dtype}, got {queries.dtype}"
            )
        out = queries.new_empty(queries.shape)
        with torch.no_grad():
            self._step.attend(self._contexts, device_of(queries), made, kv, queries, None, out)
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def _of_layer(self, layer: Any) -> tuple[Layer, PagedKv]:
        # By these calls the pool waits for layers that it is still loading.
        k, v = (
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
        )
        shape = (layer.tp_k_head_num, layer.qk_head_dim)
        key = (k.data_ptr(), v.data_ptr(), k.shape, layer.tp_q_head_num, shape, layer.scaling, layer.logit_cap)
        known = self._layers.get(layer.layer_id)
        if known is None or known[2] != key:
            if k.dim() != 3 or k.shape != v.shape or tuple(k.shape[1:]) != shape:
                raise NotImplementedError(
                    f"tokenselect needs keys and values of [slots, {shape[0]}, {shape[1]}], layer {layer.layer_id} has "
                    f"{tuple(k.shape)} and {tuple(v.shape)}"
                )
            made = Layer.of(layer.tp_q_head_num, *shape, k.dtype, layer.scaling, layer.logit_cap or None, self.options)
            if layer.layer_id in self.options.dense_layers:
                made = made.dense()
            size = self._pages_of(k.shape[0])
            paged = PagedKv(k.unflatten(0, (-1, size)), v.unflatten(0, (-1, size)), "NHD")
            self._layers[layer.layer_id] = known = (made, paged, key)
        return known[0], known[1]

    # Steps.

    def _prepare(self, forward_batch: Any, in_capture: bool) -> None:
        """The step of a batch, as far as the host makes it."""
        self._step = None
        if forward_batch.forward_mode.is_idle():
            return
        _refuse(reason_against_batch(forward_batch), "batch")
        if not forward_batch.forward_mode.is_decode():
            lens = _on_host(forward_batch.seq_lens_cpu, forward_batch.seq_lens)
            queries = _on_host(forward_batch.extend_seq_lens_cpu, forward_batch.extend_seq_lens)
            self._step = self._host_step(forward_batch, queries, lens)
        elif not is_on_device(forward_batch.seq_lens):
            lens = forward_batch.seq_lens.tolist()
            self._step = self._host_step(forward_batch, [1] * len(lens), lens)
        else:
            self._step = self._device_step(forward_batch, in_capture)

    def _host_step(self, forward_batch: Any, query_lens: list[int], kv_lens: list[int]) -> HostStep:
        size = self._page_size_of_pool()
        rows = forward_batch.req_pool_indices.long()
        kv_lens = [length if row else 0 for row, length in zip(rows.tolist(), kv_lens, strict=True)]
        slots = self.req_to_token[rows, : max(kv_lens, default=0)]
        tables: Any = slots.cpu().numpy().astype(np.int32, copy=False)
        pages = []
        for row, length in zip(tables, kv_lens, strict=True):
            held = row[:length]
            firsts = held[::size]
            if size > 1 and not np.array_equal(np.repeat(firsts, size)[:length] + np.arange(length) % size, held):
                raise NotImplementedError(
                    f"tokenselect needs the tokens of a page side by side in the pool, as SGLang has them with pages of {size}"
                )
            pages.append(firsts // size)
        return HostStep(size, query_lens, kv_lens, pages, self.options.dense_below)

    def _device_step(self, forward_batch: Any, in_capture: bool) -> DeviceStep:
        size, count = self._page_size_of_pool(), int(forward_batch.batch_size)
        room = self._room(size)
        if not in_capture and forward_batch.seq_lens_cpu is not None:
            check_room(forward_batch.seq_lens_cpu, size, room)
        if count not in self._buffers:
            # Graphs have their addresses.
            rows = forward_batch.req_pool_indices
            self._buffers[count] = (buffer_like(rows, dtype=torch.int32), buffer_like(rows, dtype=torch.int32))
        rows, lens = self._buffers[count]
        step = DeviceStep(
            self._slots, self.req_to_token, lens, rows, are_slots=True, max_rows=self._max_rows, max_kv_tokens=room
        )
        step.prepare(device_of(lens), size)
        return step

    def _translate(self, forward_batch: Any) -> None:
        """Reads lengths and tables on the device. What SGLang shares with its scheduler is read here and nowhere later."""
        if isinstance(self._step, DeviceStep):
            rows, lens = self._buffers[self._step.num_rows]
            rows.copy_(forward_batch.req_pool_indices)
            lens.copy_(forward_batch.seq_lens)
            size = self._page_size_of_pool()
            self._step.translate(device_of(lens), size, self._num_slots() // size)

    def _room(self, page_size: int) -> int:
        """Tokens of a decoding step."""
        if self.options.max_kv_tokens is not None:
            return self.options.max_kv_tokens
        longest = -(-int(self.req_to_token.shape[1]) // page_size) * page_size
        return min(self._max_rows * longest, self._num_slots() + self._max_rows * page_size)

    def _num_slots(self) -> int:
        return int(self.token_to_kv_pool.size) + self.page_size

    def _page_size_of_pool(self) -> int:
        return self._pages_of(self._num_slots())

    def _pages_of(self, num_slots: int) -> int:
        """Tokens of a page as the library sees the pool: SGLang's, or 1 where that is beyond it."""
        fits = self.page_size <= _MAX_PAGE_SIZE and num_slots % self.page_size == 0
        return self.page_size if fits else 1


def _on_host(host: Any, device: Any) -> list[int]:
    """Numbers of which there may be a copy on the host; else this waits for the device."""
    numbers = device if host is None else host
    return [int(number) for number in (numbers.tolist() if hasattr(numbers, "tolist") else numbers)]


def _refuse(reason: str | None, what: str) -> None:
    if reason is not None:
        raise NotImplementedError(f"tokenselect does not serve this {what}: {reason}. Choose another attention backend")
