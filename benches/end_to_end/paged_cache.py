"""Keys and values of all layers in pages of random order, allocated once for the longest context."""

from __future__ import annotations

import torch
from model import Shape

PAGE_SIZE = 16


class PagedCache:
    """`k` and `v`, a tensor `[pages, PAGE_SIZE, num_kv_heads, D]` for each layer, full of random numbers. A context of
    `n` tokens has the first pages of `pages`, a random order of all of them, so that each context is the beginning of
    the longer ones."""

    def __init__(self, shape: Shape, num_layers: int, max_tokens: int, device: torch.device) -> None:
        self.shape, self.num_layers, self.device = shape, num_layers, device
        num_pages = -(-max_tokens // PAGE_SIZE)
        self.max_tokens = num_pages * PAGE_SIZE
        size = (num_pages, PAGE_SIZE, shape.num_kv_heads, shape.head_dim)
        self.k, self.v = (
            [torch.empty(size, dtype=torch.bfloat16, device=device).normal_() for _ in range(num_layers)] for _ in "kv"
        )
        generator = torch.Generator().manual_seed(num_pages)
        self.pages = torch.randperm(num_pages, generator=generator).int()
        self.pages_on_device = self.pages.to(device)

    def table(self, tokens: int) -> tuple[torch.Tensor, int]:
        """The pages of a context, int32 on the host, and the tokens in the last one."""
        num_pages = -(-tokens // PAGE_SIZE)
        return self.pages[:num_pages], tokens - (num_pages - 1) * PAGE_SIZE

    def bytes(self, tokens: int) -> int:
        """Bytes of a context's keys and values in all layers of the model."""
        return tokens * self.shape.cache_bytes_per_token * self.shape.num_layers

    @property
    def allocated_bytes(self) -> int:
        """Bytes of what is allocated here."""
        return sum(tensor.nbytes for tensor in (*self.k, *self.v))
