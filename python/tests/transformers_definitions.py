"""Attention by docs/definitions.md, written out in float64 for the tests: one row and one block after the other."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers

from tokenselect.transformers import TokenSelectOptions

Rotate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def selected(scored: Any, k: Any, n: int, length: int, options: TokenSelectOptions, scale: float) -> torch.Tensor:
    """The tokens that a block of `length`, whose last token is `n - 1`, attends to. `scored` are its queries for scoring."""
    first, last = options.n_init, n - length - options.n_local
    if last - first <= options.top_k:
        return torch.arange(n)
    logits = scale * (scored.mean(1, keepdim=True) * k[:, first:last]).sum(-1)
    votes = logits.softmax(-1).sum(0)
    order = sorted(range(last - first), key=lambda token: (-votes[token].item(), token))
    chosen = sorted(first + token for token in order[: options.top_k])
    return torch.tensor([*range(first), *chosen, *range(last, n)])


def attention(
    q: Any,
    k: Any,
    v: Any,
    blocks: list[int],
    options: TokenSelectOptions,
    scale: float,
    softcap: float | None,
    rotate: Rotate | None,
) -> torch.Tensor:
    """Attention of one row: queries, keys and values are `[heads, tokens, dim]`. `rotate(x, positions)` is RoPE for reassigned
    positions, None for native ones."""
    groups = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    out = torch.zeros_like(q)
    n = 0
    for length in blocks:
        n += length
        block = q[:, n - length : n]
        steps = torch.arange(length)
        tokens = selected(
            block if rotate is None else rotate(block, options.n_local + steps), k, n, length, options, scale
        )
        m = len(tokens)
        query, keys = block, k[:, tokens]
        if rotate is not None:
            query, keys = rotate(query, m - length + steps), rotate(keys, torch.arange(m))
        hidden = torch.arange(m)[None, :] > m - length + steps[:, None]
        out[:, n - length : n] = softmax(scale * query @ keys.transpose(1, 2), softcap, hidden) @ v[:, tokens]
    return out


def softmax(logits: Any, softcap: float | None, hidden: Any) -> Any:
    """Weights of logits, capped, of which some are hidden."""
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)


def blocks_of(prompts: list[int], block_len: int) -> list[int]:
    """Blocks that prompts, one after the other, are read in."""
    return [min(block_len, length - begin) for length in prompts for begin in range(0, length, block_len)]


class ByDefinition:
    """A model in float64 whose layers attend by definition. `blocks(length)` are the blocks of a row of that length."""

    def __init__(self, model: Any, blocks: Callable[[int], list[int]], options: TokenSelectOptions) -> None:
        transformers.AttentionInterface.register("by_definition", self._attention)
        transformers.AttentionMaskInterface.register("by_definition", transformers.masking_utils.sdpa_mask)
        self.model = copy.deepcopy(model).double()
        self.model.set_attn_implementation("by_definition")
        self.blocks, self.options = blocks, options
        self.apply_rotary = sys.modules[type(model).__module__].apply_rotary_pos_emb
        self.rotary = next(module for name, module in self.model.named_modules() if name.endswith("rotary_emb"))
        for module in self.model.modules():
            if hasattr(module, "is_causal") and self._selects(module) and options.positions == "reassigned":
                module.register_forward_pre_hook(self._without_rotation, with_kwargs=True)

    def logits(self, ids: Any, mask: Any) -> Any:
        """Of every token, one row after the other and without padding; zeros for padding."""
        logits = torch.zeros(*ids.shape, self.model.config.vocab_size, dtype=torch.float64)
        for row in range(len(ids)):
            kept = mask[row].bool()
            logits[row, kept] = self.model(ids[row : row + 1, kept], use_cache=False).logits[0]
        return logits

    def _layer_type(self, module: Any) -> str:
        kinds = getattr(module.config, "layer_types", None)
        return kinds[module.layer_idx] if kinds else "full_attention"

    def _selects(self, module: Any) -> bool:
        return self._layer_type(module) == "full_attention" and module.layer_idx not in self.options.dense_layers

    @staticmethod
    def _without_rotation(module: Any, args: Any, given: Any) -> Any:
        cos, sin = given["position_embeddings"]
        return args, {**given, "position_embeddings": (cos * 0 + 1, sin * 0)}

    def _attention(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, softcap: Any = None, **more: Any
    ) -> Any:
        if not self._selects(module):
            groups = module.num_key_value_groups
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            tokens = torch.arange(query.shape[2])
            hidden = tokens > tokens[:, None] if mask is None else ~mask
            return (softmax(scaling * query @ key.transpose(2, 3), softcap, hidden) @ value).transpose(1, 2), None

        def rotate(x: Any, positions: Any) -> Any:
            kind = self._layer_type(module)
            given = (kind,) if hasattr(self.rotary, f"{kind}_inv_freq") else ()
            cos, sin = self.rotary(x, positions[None], *given)
            return self.apply_rotary(x[None], x[None], cos, sin)[0][0]

        reassigned = rotate if self.options.positions == "reassigned" else None
        blocks = self.blocks(query.shape[2])
        out = attention(query[0], key[0], value[0], blocks, self.options, scaling, softcap, reassigned)
        return out[None].transpose(1, 2), None
