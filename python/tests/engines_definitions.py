"""Attention by docs/definitions.md over native positions, written out in float64 for the tests of the engines' backends."""

from __future__ import annotations

from typing import Any

import torch

from tokenselect.engines import EngineOptions

__all__ = ["attention", "blocks_of"]


def blocks_of(steps: list[int], options: EngineOptions, is_dense: bool) -> list[tuple[int, bool]]:
    """Blocks that forwards of so many new tokens are computed in, and whether each is dense."""
    blocks, n = [], 0
    for length in steps:
        n += length
        if is_dense or n <= options.dense_below:
            blocks.append((length, True))
            continue
        for begin in range(0, length, options.block_len):
            blocks.append((min(options.block_len, length - begin), False))
    return blocks


def attention(
    q: Any, k: Any, v: Any, steps: list[int], options: EngineOptions, scale: float, cap: float, is_dense: bool
) -> Any:
    """Of one sequence: queries, keys and values `[tokens, heads, head_dim]`, to outputs alike in float64."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
    out, n = torch.zeros_like(q), 0
    for length, whole in blocks_of(steps, options, is_dense):
        n += length
        block = q[:, n - length : n]
        tokens = torch.arange(n) if whole else _selected(block, k, n, length, options, scale)
        logits = scale * block @ k[:, tokens].transpose(1, 2)
        logits = cap * torch.tanh(logits / cap) if cap else logits
        hidden = tokens[None, :] > torch.arange(n - length, n)[:, None]
        out[:, n - length : n] = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, tokens]
    return out.transpose(0, 1)


def _selected(block: Any, k: Any, n: int, length: int, options: EngineOptions, scale: float) -> Any:
    first, last = options.n_init, n - length - options.n_local
    if last - first <= options.top_k:
        return torch.arange(n)
    factor = scale if options.score_scale is None else options.score_scale
    votes = (factor * (block.mean(1, keepdim=True) * k[:, first:last]).sum(-1)).softmax(-1).sum(0)
    order = sorted(range(last - first), key=lambda token: (-votes[token].item(), token))
    chosen = sorted(first + token for token in order[: options.top_k])
    return torch.tensor([*range(first), *chosen, *range(last, n)])
