"""FlashInfer's dense attention over the same pages: FA3 for prompts, tensor cores for decoding. Planned once for a
length, which is not timed."""

from __future__ import annotations

import flashinfer
import torch
from model import Attend, Model, NoAttention
from paged_cache import PAGE_SIZE, PagedCache

NAME = "FlashInfer"
WORKSPACE_BYTES = 256 << 20


class FlashInfer:
    """One sequence over `cache`, whose prompt is read in pieces of `piece` tokens."""

    name = NAME

    def __init__(self, model: Model, cache: PagedCache, piece: int) -> None:
        self.model, self.cache, self.piece, self.num_layers = model, cache, piece, cache.num_layers
        self.workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=model.device)
        self.prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self.workspace, "NHD", backend="fa3")
        shape = model.shape
        self.heads = (shape.num_qo_heads, shape.num_kv_heads, shape.head_dim, PAGE_SIZE)
        self.types = dict(q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
        self.out = torch.empty(piece, *self.heads[::2], dtype=torch.bfloat16, device=model.device)

    def prefill_at(self, position: int) -> dict[str, Attend]:
        """Attention of a piece that begins at `position`, and what comes before it alone."""
        tables = self._tables(position + self.piece)
        qo_indptr = self._integers([0, self.piece])
        self.prefill.plan(qo_indptr, *tables, *self.heads, causal=True, **self.types)
        kv, append = self._kv(), self._append(position, self.piece, tables)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            append(layer, q, k, v)
            return self.prefill.run(q, kv[layer], out=self.out)

        return {"all": attend, "without attention": NoAttention(self.model, self.piece).after(append)}

    def decode_at(self, tokens: int) -> dict[str, Attend]:
        """Attention of the last of `tokens` tokens."""
        tables = self._tables(tokens)
        indptr, indices, last_page_len = (table.clone() for table in tables)
        decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self.workspace, "NHD", use_cuda_graph=True, use_tensor_cores=True, backend="fa2",
            paged_kv_indptr_buffer=indptr, paged_kv_indices_buffer=indices,
            paged_kv_last_page_len_buffer=last_page_len,
        )  # fmt: skip
        decode.plan(*tables, *self.heads, **self.types)
        kv, append = self._kv(), self._append(tokens - 1, 1, tables)
        out = torch.empty_like(self.out[:1])

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            append(layer, q, k, v)
            return decode.run(q, kv[layer], out=out)

        return {"dense": attend, "dense, without attention": NoAttention(self.model, 1).after(append)}

    def close(self) -> None:
        """Nothing: all of its memory is PyTorch's."""

    def _kv(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(self.cache.k, self.cache.v, strict=True))

    def _append(self, position: int, count: int, tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> Attend:
        """Writes the tokens `[position, position + count)`."""
        indptr, indices, last_page_len = tables
        rows = torch.zeros(count, dtype=torch.int32, device=self.model.device)
        positions = torch.arange(position, position + count, dtype=torch.int32, device=self.model.device)
        kv = self._kv()

        def append(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            flashinfer.append_paged_kv_cache(k, v, rows, positions, kv[layer], indices, indptr, last_page_len, "NHD")
            return q

        return append

    def _tables(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`indptr`, `indices` and `last_page_len` of a context."""
        pages, last_page_len = self.cache.table(tokens)
        indices = self.cache.pages_on_device[: len(pages)]
        return self._integers([0, len(pages)]), indices, self._integers([last_page_len])

    def _integers(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.model.device)
