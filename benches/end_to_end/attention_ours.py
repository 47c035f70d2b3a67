"""This library's attention: selected anew, selected again from the Selection Cache, and dense."""

from __future__ import annotations

from dataclasses import dataclass

import tokenselect as ts
import torch
from model import Attend, Model, NoAttention
from paged_cache import PAGE_SIZE, PagedCache

NAME = "tokenselect"
MAX_WORKSPACE_BYTES = 4 << 30


@dataclass(frozen=True)
class Selection:
    """What is attended to. `local_decode` does not count the token itself; `local_prefill` is before a block of
    `block`."""

    n_init: int = 128
    top_k: int = 2048
    local_decode: int = 511
    local_prefill: int = 0
    block: int = 512


class Ours:
    """One sequence over `cache`, whose prompt is read in pieces of `piece` tokens."""

    name = NAME

    def __init__(self, model: Model, cache: PagedCache, piece: int, selection: Selection) -> None:
        self.model, self.cache, self.piece, self.selection = model, cache, piece, selection
        self.num_layers = cache.num_layers
        on_gpu = model.device.type == "cuda"
        self.device = ts.Device.cuda(0, stream=torch.cuda.current_stream()) if on_gpu else ts.Device.cpu()
        self.kv = [ts.KvView(k, v) for k, v in zip(cache.k, cache.v, strict=True)]
        config, free = self._config(selection.local_prefill), free_bytes(model.device)
        self.prefill = ts.Context.for_prefill(
            self.device, config, block_len=selection.block, max_kv_len=cache.max_tokens, max_piece_len=piece,
            max_workspace_bytes=MAX_WORKSPACE_BYTES,
        )  # fmt: skip
        self.prefill_workspace = free - free_bytes(model.device)
        self.decode_workspace = 0

    def prefill_at(self, position: int) -> dict[str, Attend]:
        """Attention of a piece that begins at `position`, and what comes before it alone."""
        tokens = position + self.piece
        pages, last_page_len = self.cache.table(tokens)
        batch = ts.Batch(PAGE_SIZE, [0, self.piece], [0, len(pages)], pages, [last_page_len])
        pieces, blocks = batch.in_pieces(self.prefill, self.selection.block), batch.in_blocks(self.selection.block)
        nothing, ctx, kv = NoAttention(self.model, self.piece), self.prefill, self.kv

        def append(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
            ctx.append(blocks, kv[layer], k, v)

        def select(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
            ctx.append_select(blocks, kv[layer], q, k, v)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            select(layer, q, k, v)
            return ctx.attend(blocks, kv[layer], q)

        def attend_in_steps(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return ctx.prefill_kv(pieces, kv[layer], q, k, v)

        # A workspace without room for all blocks of the piece reads them in several steps.
        if pieces.num_pieces > 1:
            return {"all": attend_in_steps}
        # What `prefill_kv` does. Called so, PyTorch uses the memory of one layer again for the next, as for the others.
        return {
            "all": attend,
            "without selection and attention": nothing.after(append),
            "without attention": nothing.after(select),
        }

    def decode_at(self, tokens: int) -> dict[str, Attend]:
        """Attention of the last of `tokens` tokens, in all ways."""
        config, free = self._config(self.selection.local_decode), free_bytes(self.model.device)
        ctx = ts.Context(self.device, config, max_rows=1, max_block_len=1, max_kv_tokens=tokens + PAGE_SIZE)
        self.decode_workspace = free - free_bytes(self.model.device)
        cached = ts.SelectionCache(self.device, config, num_layers=self.num_layers, num_sequences=1)
        pages, last_page_len = self.cache.table(tokens)
        batch = ts.Batch(PAGE_SIZE, [0, 1], [0, len(pages)], pages, [last_page_len], sequence_indices=[0])
        if self.device.kind == "cuda":
            # Tables at a fixed place, as a graph needs them.
            self.slot = ts.BatchSlot(self.device, batch, max_pages=len(pages))
            batch = self.slot.put(batch)
        kv, nothing = self.kv, NoAttention(self.model, 1)
        self.cached = cached

        def anew(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            ctx.append_select(batch, kv[layer], q, k, v)
            return ctx.attend(batch, kv[layer], q)

        def reused(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            ctx.append_select(batch, kv[layer], q, k, v, selection_cache=cached, layer=layer)
            return ctx.attend(batch, kv[layer], q)

        def dense(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            ctx.append(batch, kv[layer], k, v)
            return ctx.attend_dense(batch, kv[layer], q)

        def select(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
            ctx.append_select(batch, kv[layer], q, k, v)

        return {"anew": anew, "reused": reused, "dense": dense, "anew, without attention": nothing.after(select)}

    def close(self) -> None:
        """Gives the workspace back."""
        self.prefill.close()

    def _config(self, n_local: int) -> ts.Config:
        """Native positions, and a Selection Cache that always reuses where it is passed."""
        shape, selection = self.model.shape, self.selection
        return ts.Config(
            num_qo_heads=shape.num_qo_heads, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, dtype="bf16",
            n_init=selection.n_init, n_local=n_local, top_k=selection.top_k, similarity_threshold=-1.0,
            max_reuse=2**32 - 2,
        )  # fmt: skip


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU: the library allocates its workspace beside PyTorch's allocator."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
