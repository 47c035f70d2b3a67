"""What vLLM's runner does: pages, metadata and calls of every layer."""

# ruff: noqa: E402 (what is missing is said before it is imported)

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip(
    "torch", reason="PyTorch is missing: nothing of tokenselect.vllm and tokenselect.sglang is tested"
)
tokenselect = pytest.importorskip("tokenselect", reason="tokenselect is missing")

from engines_runners import HKV, HQ, LAYERS, SCALE, D, Sequences, close

import fake_engines as fakes
from tokenselect.engines import EngineOptions

# Strides of `[layers, blocks, heads, tokens, content]` that vLLM 0.33 declares: which comes first in memory.
LAYOUTS = {
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "LHBNC": (0, 2, 1, 3, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "BHLNC": (1, 2, 0, 3, 4),
}


def vllm_caches(layout: str, num_blocks: int, block_size: int, dtype: Any) -> list[Any]:
    """Views `[blocks, heads, tokens, 2 * head_dim]` of all layers, in one allocation."""
    order, shape = LAYOUTS[layout], (LAYERS, num_blocks, HKV, block_size, 2 * D)
    memory = torch.full([shape[axis] for axis in order], torch.nan, dtype=dtype)
    return list(memory.permute([order.index(axis) for axis in range(5)]))


class Vllm:
    """vLLM's runner: a block table for each request, block 0 for padding, persistent buffers for what graphs read."""

    def __init__(
        self,
        options: EngineOptions,
        layout: str = "LBHNC",
        block_size: int = 4,
        dtype: Any = torch.float32,
        cap: float = 0.0,
        max_num_seqs: int = 4,
        **impl: Any,
    ) -> None:
        from tokenselect.vllm.backend import TokenSelectBackend

        self.sequences = Sequences(options, dtype, cap)
        self.size, self.max_len = block_size, 64
        given = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
        self.config = SimpleNamespace(
            additional_config={"tokenselect": {name: value for name, value in given.items() if value is not None}},
            scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
            model_config=SimpleNamespace(max_model_len=self.max_len),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            cache_config=SimpleNamespace(num_gpu_blocks=40, block_size=block_size),
        )
        fakes.CONFIG[0] = self.config
        self.caches = vllm_caches(layout, 40, block_size, dtype)
        names = [f"model.layers.{layer}.self_attn.attn" for layer in range(LAYERS)]
        self.layers = [SimpleNamespace(layer_name=name) for name in names]
        make = TokenSelectBackend.get_impl_cls()
        self.impls = [
            make(HQ, D, SCALE, HKV, None, None, "auto", cap or None, fakes.AttentionType.DECODER, None, **impl)
            for _ in names
        ]
        spec = SimpleNamespace(block_size=block_size, num_kv_heads=HKV, head_size=D)
        self.builder = TokenSelectBackend.get_builder_cls()(spec, names, self.config, torch.device("cpu"))
        self.free = torch.randperm(39).add(1).tolist()
        self.blocks: dict[str, list[int]] = {}
        self.table = torch.zeros(8, self.max_len // block_size, dtype=torch.int32)
        self.seq_lens = torch.zeros(8, dtype=torch.int32)
        self.starts = torch.zeros(9, dtype=torch.int32)

    def common(self, forward: dict[str, int], num_reqs: int, num_tokens: int) -> Any:
        """Metadata of a batch, padded."""
        self.table.zero_()
        self.seq_lens.zero_()
        start = 0
        for row, (name, count) in enumerate(forward.items()):
            blocks = self.blocks.setdefault(name, [])
            while len(blocks) * self.size < self.sequences.length(name):
                blocks.append(self.free.pop())
            self.table[row, : len(blocks)] = torch.tensor(blocks)
            self.seq_lens[row] = self.sequences.length(name)
            self.starts[row] = start
            start += count
        self.starts[len(forward) :] = start
        return fakes.CommonAttentionMetadata(
            query_start_loc=self.starts[: num_reqs + 1],
            query_start_loc_cpu=self.starts[: num_reqs + 1].clone(),
            seq_lens=self.seq_lens[:num_reqs],
            seq_lens_cpu_upper_bound=self.seq_lens[:num_reqs].clone(),
            num_reqs=num_reqs,
            num_actual_tokens=num_tokens,
            max_query_len=max(forward.values()),
            max_seq_len=int(self.seq_lens.max()),
            block_table_tensor=self.table[:num_reqs],
            slot_mapping=torch.full((num_tokens,), -1, dtype=torch.int64),
        )

    def ordered(self, forward: dict[str, int]) -> dict[str, int]:
        """Single tokens first, as the builder's threshold asks for."""
        assert self.builder.reorder_batch_threshold == 1
        return dict(sorted(forward.items(), key=lambda item: item[1] > 1))

    def step(self, forward: dict[str, int], padding: int = 0, is_padding_told: bool = False) -> Any:
        """One forward in eager mode, compared. Graphs of parts of the model pad tokens, which attention may be told of."""
        names = list(forward)
        for name, count in forward.items():
            self.sequences.new(name, count)
        tokens = sum(forward.values())
        told = tokens + padding if is_padding_told else tokens
        metadata = self.builder.build(0, self.common(forward, len(names), told))
        for layer in range(LAYERS):
            q, k, v = self.sequences.latest(names, layer, padding)
            out = torch.full(q.shape, torch.nan, dtype=q.dtype)
            answer = self.impls[layer].forward(self.layers[layer], q, k, v, self.caches[layer], metadata, out)
            assert answer is out
            self.compare(out[:tokens], names, layer)
            assert not out[tokens:told].any(), "padding must have outputs of zero"
        return metadata

    def compare(self, out: Any, names: list[str], layer: int) -> None:
        close(out, self.sequences.expected(names, layer), 2e-6 if out.dtype == torch.float32 else 2e-2)
