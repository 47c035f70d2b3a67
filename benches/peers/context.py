"""A context that is looked at: tokens of one layer in pages of random order."""

import torch


class Context:
    """`tokens` tokens in the first pages of `k` and `v`, `[slots, num_kv_heads, D]`. `pages` is int32 on the host, `slots` int32
    where keys and values are: the place of each token."""

    def __init__(self, size, tokens, k, v, generator):
        self.tokens = tokens
        num_pages = -(-tokens // size.page)
        self.pages = torch.randperm(num_pages, generator=generator).int()
        self.last_page_len = tokens - (num_pages - 1) * size.page
        self.num_places = num_pages * size.page
        self.k, self.v = k[: self.num_places], v[: self.num_places]
        offsets = torch.arange(size.page, dtype=torch.int32)
        self.slots = (self.pages[:, None] * size.page + offsets).flatten()[:tokens].to(k.device)

    def paged(self, page_size):
        """Keys and values as `[num_pages, page_size, num_kv_heads, D]`."""
        return [tensor.view(-1, page_size, *tensor.shape[1:]) for tensor in (self.k, self.v)]

    def in_order(self):
        """Copies of keys and values in the order of the tokens, `[1, num_kv_heads, tokens, D]`."""
        slots = self.slots.long()
        return [tensor[slots].transpose(0, 1).contiguous().unsqueeze(0) for tensor in (self.k, self.v)]
