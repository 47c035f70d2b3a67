"""`tokenselect.vllm` and `tokenselect.sglang` by the calls that these engines make, beside attention computed in PyTorch.

Runners below do what the engines' do: allocate pages, make metadata, call every layer, with padding, chunks of prompts, mixed batches
and graphs. The engines themselves are not run. Where `TOKENSELECT_ENGINE_SOURCES` names a folder with the published packages `vllm`
and `sglang`, unpacked and no more, everything runs over their base classes and data, and the names in `fake_engines.py` are compared
with theirs.

    pytest python/tests/test_engines.py
"""

# ruff: noqa: E402 (what is missing is said before it is imported)

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip(
    "torch", reason="PyTorch is missing: nothing of tokenselect.vllm and tokenselect.sglang is tested"
)
tokenselect = pytest.importorskip("tokenselect", reason="tokenselect is missing")

import fake_engines as fakes
from emulated_graph import EmulatedGraph, FakeSlot, RecordedContext, is_capturing
from engines_definitions import attention
from fake_engines import ForwardMode
from tokenselect.engines import EngineOptions

HQ, HKV, D, LAYERS = 6, 2, 16, 2
SCALE = 0.3
ALL = EngineOptions(top_k=4096)
FEW = EngineOptions(top_k=5, n_init=2, n_local=3, block_len=4)
CHOICES = {
    "all": ALL,
    "few": FEW,
    "pooled, other scale": dataclasses.replace(FEW, vote_pool_window=1, score_scale=0.7),
    "dense below": dataclasses.replace(FEW, dense_below=14),
    "dense layer": dataclasses.replace(FEW, dense_layers=(1,)),
}


@pytest.fixture(autouse=True)
def _engines(monkeypatch: Any) -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name in [name for name in os.environ if name.startswith("TOKENSELECT_") and name != "TOKENSELECT_LIBRARY"]:
        monkeypatch.delenv(name)
    fakes.OVERRIDES.clear()
    fakes.ATTENTION_BACKENDS.clear()
    fakes.ATTENTION_BACKEND_CHOICES[:] = ["triton"]
    with fakes.installed():
        yield


@pytest.fixture
def on_device(monkeypatch: Any) -> None:
    """Tables are translated where they lie, as on a GPU."""
    from tokenselect.engines import contexts, device_step
    from tokenselect.sglang import backend
    from tokenselect.vllm import metadata

    FakeSlot.made.clear()
    contexts._shared.clear()
    for module in (backend, metadata):
        monkeypatch.setattr(module, "is_on_device", lambda tensor: True)
    monkeypatch.setattr(device_step, "is_capturing", is_capturing)
    monkeypatch.setattr(device_step, "BatchSlot", FakeSlot)
    monkeypatch.setattr(contexts, "Context", RecordedContext)


def close(got: Any, expected: Any, relative: float = 2e-6) -> None:
    """The largest error, relative to the largest element."""
    scale = expected.abs().max().item()
    error = (got.double() - expected.double()).abs().max().item()
    assert scale > 0.1 and error <= relative * scale, f"{error / scale:.1e} relative, {relative:.1e} is allowed"


class Sequences:
    """Queries, keys and values of sequences, and the forwards that they were read in."""

    def __init__(self, options: EngineOptions, dtype: Any = torch.float32, cap: float = 0.0) -> None:
        self.options, self.dtype, self.cap = options, dtype, cap
        self.steps: dict[str, list[int]] = {}
        self._qkv: dict[str, Any] = {}

    def new(self, name: str, count: int) -> None:
        """New tokens of a sequence."""
        fresh = [[torch.randn(count, heads, D).to(self.dtype) for heads in (HQ, HKV, HKV)] for _ in range(LAYERS)]
        had = self._qkv.get(name)
        self._qkv[name] = (
            fresh
            if had is None
            else [[torch.cat(pair) for pair in zip(*layers, strict=True)] for layers in zip(had, fresh, strict=True)]
        )
        self.steps.setdefault(name, []).append(count)

    def length(self, name: str) -> int:
        return sum(self.steps.get(name, ()))

    def latest(self, names: list[str], layer: int, padding: int = 0) -> list[Any]:
        """Queries, keys and values of the last forward, one sequence after the other, and padding."""
        parts = [[x[-self.steps[name][-1] :] for x in self._qkv[name][layer]] for name in names]
        packed = [torch.cat(part) for part in zip(*parts, strict=True)]
        return [torch.cat([x, torch.full((padding, *x.shape[1:]), 7.0, dtype=self.dtype)]) for x in packed]

    def expected(self, names: list[str], layer: int) -> Any:
        """Outputs of the last forward."""
        outs = []
        for name in names:
            steps, is_dense = self.steps[name], layer in self.options.dense_layers
            q, k, v = self._qkv[name][layer]
            out = attention(q, k, v, steps, self.options, SCALE, self.cap, is_dense)
            outs.append(out[-steps[-1] :])
        return torch.cat(outs)


# What the engines' runners do with them, forward after forward: new tokens of each sequence. Prompts of several sequences, one in
# chunks behind a prefix that is cached, decoding, and both in one batch.
FORWARDS: list[dict[str, int]] = [
    {"a": 11, "b": 5},
    {"a": 1, "b": 9, "c": 14},
    {"a": 1, "b": 1, "c": 13},
    {"a": 1, "b": 1, "c": 1},
    {"c": 1, "a": 1},
    {"d": 1, "c": 1},
]


# vLLM.

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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("choice", ["all", "few"])
def test_vllm_forwards_in_every_order_of_strides(layout: str, choice: str) -> None:
    vllm = Vllm(CHOICES[choice], layout)
    for forward in FORWARDS:
        vllm.step(vllm.ordered(forward), padding=3)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_vllm_options(choice: str, cap: float) -> None:
    vllm = Vllm(CHOICES[choice], "BLNHC", block_size=16, cap=cap)
    for forward in FORWARDS:
        vllm.step(forward)  # in any order


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vllm_types(dtype: Any) -> None:
    vllm = Vllm(ALL, "BHLNC", dtype=dtype)
    for forward in FORWARDS:
        vllm.step(forward)


def test_vllm_rows_of_the_cache_are_a_key_and_its_value() -> None:
    """As vLLM's own kernels and its connectors have them."""
    vllm = Vllm(FEW, "BHLNC")
    for forward in ({"a": 6, "b": 3}, {"a": 1, "b": 1}):
        vllm.step(forward)
    for name in "ab":
        _, k, v = vllm.sequences._qkv[name][1]
        for token in range(len(k)):
            row = vllm.caches[1][vllm.blocks[name][token // 4], :, token % 4]
            assert torch.equal(row, torch.cat([k[token], v[token]], 1))


def test_vllm_strided_queries() -> None:
    """Queries, keys and values are slices of a fused projection."""
    vllm = Vllm(FEW)
    vllm.sequences.new("a", 21)
    metadata = vllm.builder.build(0, vllm.common({"a": 21}, 1, 21))
    qkv = torch.cat(vllm.sequences.latest(["a"], 0), 1)
    q, k, v = qkv.split([HQ, HKV, HKV], 1)
    out = torch.empty(21, HQ * D)
    vllm.impls[0].forward(vllm.layers[0], q, k, v, vllm.caches[0], metadata, out)
    vllm.compare(out.view(21, HQ, D), ["a"], 0)


def test_vllm_layers_that_share_a_cache() -> None:
    """A layer that reads another one's cache writes nothing, nor does one whose keys were written by somebody else."""
    vllm = Vllm(FEW)
    for forward in FORWARDS[:4]:
        metadata = vllm.step(vllm.ordered(forward))
        names = list(vllm.ordered(forward))
        vllm.impls[0].kv_sharing_target_layer_name = "model.layers.0.self_attn.attn"
        before = vllm.caches[0].clone()
        q, k, v = vllm.sequences.latest(names, 0)
        for key, value in ((k + 1, v + 1), (None, None)):
            out = torch.empty(q.shape)
            vllm.impls[0].forward(vllm.layers[0], q, key, value, vllm.caches[0], metadata, out)
            vllm.compare(out, names, 0)
        assert torch.equal(before.nan_to_num(), vllm.caches[0].nan_to_num())
        vllm.impls[0].kv_sharing_target_layer_name = None


@pytest.mark.parametrize("choice", ["all", "few", "dense layer"])
def test_vllm_full_graphs(choice: str, on_device: None) -> None:
    """A graph of four requests replayed for fewer and longer ones, between forwards in eager mode."""
    vllm = Vllm(CHOICES[choice], "LBNHC")
    count = 4
    statics = [[torch.zeros(count, heads, D) for heads in (HQ, HKV, HKV)] for _ in range(LAYERS)]
    outs = [torch.full((count, HQ, D), torch.nan) for _ in range(LAYERS)]

    def run(metadata: Any) -> None:
        for layer in range(LAYERS):
            q, k, v = statics[layer]
            vllm.impls[layer].forward(vllm.layers[layer], q, k, v, vllm.caches[layer], metadata, outs[layer])

    vllm.starts[:] = torch.arange(9)
    dummy = fakes.CommonAttentionMetadata(
        vllm.starts[: count + 1], vllm.starts[: count + 1].clone(), vllm.seq_lens[:count], count, count, 1, vllm.max_len,
        vllm.table[:count], torch.full((count,), -1),
    )  # fmt: skip
    vllm.seq_lens[:count] = 1  # all in block 0
    graph = EmulatedGraph()
    run(vllm.builder.build_for_cudagraph_capture(dummy))
    metadata = vllm.builder.build_for_cudagraph_capture(dummy)
    with graph.capture():
        run(metadata)
    for forward in [*FORWARDS, {"a": 1, "d": 1, "c": 1}, {"a": 1, "b": 1, "c": 1, "d": 1}, {"b": 1}]:
        if set(forward.values()) != {1}:
            vllm.step(vllm.ordered(forward))
            continue
        names = list(forward)
        for name in names:
            vllm.sequences.new(name, 1)
        vllm.builder.build(0, vllm.common(forward, count, count))
        for layer in range(LAYERS):
            for static, fresh in zip(
                statics[layer], vllm.sequences.latest(names, layer, count - len(names)), strict=True
            ):
                static.copy_(fresh)
        graph.replay()
        for layer in range(LAYERS):
            vllm.compare(outs[layer][: len(names)], names, layer)
            assert not outs[layer][len(names) :].any(), "padding must have outputs of zero"
    assert [slot.num_faults for slot in FakeSlot.made] == [0] * len(FakeSlot.made)


@pytest.mark.parametrize("padding", [0, 3])
def test_vllm_decoding_on_the_device_in_eager_mode(padding: int, on_device: None) -> None:
    vllm = Vllm(FEW)
    for forward in FORWARDS:
        metadata = vllm.step(vllm.ordered(forward), padding, is_padding_told=True)
        assert (metadata.on_device is None) == (set(forward.values()) != {1})


def test_vllm_tables_in_wider_ones(on_device: None) -> None:
    """Where vLLM splits blocks for the kernels, tables are the first entries of wider rows."""
    vllm = Vllm(FEW)
    vllm.table = torch.full((9, vllm.max_len // vllm.size + 3), -1, dtype=torch.int32)[:8, :-3]
    for forward in FORWARDS:
        vllm.step(vllm.ordered(forward))
    assert FakeSlot.made and not any(slot.num_faults for slot in FakeSlot.made)
    vllm.table = torch.zeros(16, 8, dtype=torch.int32).t()
    vllm.sequences.new("a", 1)
    with pytest.raises(
        NotImplementedError, match=r"`entries` that are int32 or int64 in rows of adjacent entries, got torch.int32 with strides \(1, 8\)"
    ):
        vllm.builder.build(0, vllm.common({"a": 1, "b": 1}, 2, 2))


def test_vllm_room_on_the_device(on_device: None) -> None:
    options = dataclasses.replace(FEW, max_kv_tokens=24)
    vllm = Vllm(options)
    vllm.step({"a": 13, "b": 7})
    vllm.step({"a": 1, "b": 1})
    vllm.sequences.new("c", 1)
    with pytest.raises(
        RuntimeError, match="28 tokens in whole pages, `max_kv_tokens` is 24: set TOKENSELECT_MAX_KV_TOKENS"
    ):
        vllm.builder.build(0, vllm.common({"a": 1, "b": 1, "c": 1}, 3, 3))
    with pytest.raises(NotImplementedError, match="where every request has one token.*2, 1.*cudagraph_mode"):
        vllm.builder.build_for_cudagraph_capture(vllm.common({"a": 2, "b": 1}, 2, 3))


@pytest.mark.parametrize("lengths", [[7, 1, 4], [1, 1]])
def test_vllm_warms_up_over_the_null_block(lengths: list[int], on_device: None) -> None:
    """Tables of zeros, and nowhere to write, as when parts of the model are captured: outputs are zeros."""
    vllm = Vllm(FEW)
    for row, length in enumerate(lengths):
        vllm.starts[row + 1 :] = int(vllm.starts[row]) + length
        vllm.seq_lens[row] = length
    rows, tokens = len(lengths), sum(lengths)
    common = fakes.CommonAttentionMetadata(
        vllm.starts[: rows + 1], vllm.starts[: rows + 1].clone(), vllm.seq_lens[:rows], rows, tokens, max(lengths), 7,
        vllm.table[:rows], torch.full((tokens,), -1),
    )  # fmt: skip
    q, k, v = (torch.ones(tokens, heads, D) for heads in (HQ, HKV, HKV))
    out = torch.full((tokens, HQ, D), torch.nan)
    vllm.impls[0].forward(vllm.layers[0], q, k, v, vllm.caches[0], vllm.builder.build(0, common), out)
    assert not out.any() and vllm.caches[0].isnan().all()


def test_vllm_profiles_memory_without_metadata() -> None:
    vllm = Vllm(FEW)
    out = torch.full((3, HQ, D), torch.nan)
    q, k, v = (torch.ones(3, heads, D) for heads in (HQ, HKV, HKV))
    assert vllm.impls[0].forward(vllm.layers[0], q, k, v, torch.tensor([]), None, out) is out
    assert not out.any()


def test_vllm_registration(caplog: Any) -> None:
    import tokenselect.vllm

    tokenselect.vllm.register()
    tokenselect.vllm.register()
    custom = fakes.AttentionBackendEnum.CUSTOM
    module, _, name = custom.get_path().rpartition(".")
    backend = getattr(__import__(module, fromlist=[name]), name)
    assert issubclass(backend, fakes.VllmAttentionBackend) and backend.get_name() == custom.name
    assert issubclass(backend.get_impl_cls(), fakes.AttentionImpl)
    assert issubclass(backend.get_builder_cls(), fakes.AttentionMetadataBuilder)
    assert backend.get_builder_cls()._cudagraph_support is fakes.AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert not (backend.is_sparse() or backend.supports_sliding_window() or backend.supports_sink())
    assert backend.supported_kv_cache_layouts() is None and 128 in backend.get_supported_head_sizes()
    assert not backend.supports_compute_capability(SimpleNamespace(major=7, minor=5))
    fakes.OVERRIDES[custom] = "somebody.else.Backend"
    tokenselect.vllm.register()
    assert custom.get_path() == "somebody.else.Backend"
    assert "CUSTOM is somebody.else.Backend already, tokenselect is left out: VLLM_PLUGINS" in caplog.text


@pytest.mark.parametrize(
    "given, text",
    [
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"sliding_window": 8}, r"a sliding window \(8\).*backend_per_kind"),
        ({"kv_cache_dtype": "fp8"}, "a cache of fp8"),
        ({"attn_type": "encoder_only"}, "attention of type encoder_only"),
        ({"sinks": torch.zeros(HQ)}, "`sinks`"),
    ],
)
def test_vllm_layers_that_are_refused(given: dict[str, Any], text: str) -> None:
    from tokenselect.vllm.backend import TokenSelectImpl

    fakes.CONFIG[0] = SimpleNamespace(additional_config={})
    with pytest.raises(NotImplementedError, match=text):
        TokenSelectImpl(HQ, D, SCALE, HKV, **given)


@pytest.mark.parametrize(
    "given, text",
    [
        ({"causal": False}, "not causal"),
        ({"dcp_local_seq_lens": torch.ones(1)}, "decode context parallelism"),
        ({"encoder_seq_lens": torch.ones(1)}, "cross-attention"),
        ({"mm_req_doc_ranges": {0: [(0, 1)]}}, "seen from both sides"),
        ({"rswa_prefix_lens": torch.ones(1)}, "reference sliding windows"),
    ],
)
def test_vllm_batches_that_are_refused(given: dict[str, Any], text: str) -> None:
    vllm = Vllm(FEW)
    vllm.sequences.new("a", 3)
    with pytest.raises(NotImplementedError, match=text):
        vllm.builder.build(0, dataclasses.replace(vllm.common({"a": 3}, 1, 3), **given))


def test_vllm_caches_that_are_refused() -> None:
    vllm = Vllm(FEW)
    vllm.sequences.new("a", 3)
    metadata = vllm.builder.build(0, vllm.common({"a": 3}, 1, 3))
    q, k, v = vllm.sequences.latest(["a"], 0)

    def forward(cache: Any, query: Any = q, **more: Any) -> None:
        vllm.impls[0].forward(vllm.layers[0], query, k, v, cache, metadata, torch.empty(3, HQ, D), **more)

    with pytest.raises(NotImplementedError, match=r"cache of \[blocks, 2, block_size, 32\], got \(2, 40, 2, 4, 16\)"):
        forward(torch.zeros(2, 40, HKV, 4, D))
    with pytest.raises(NotImplementedError, match=r"adjacent, its strides are \(64, 32, 1, 8\)"):
        forward(torch.zeros(40, 2, 32, 4).permute(0, 1, 3, 2)[:, :2].as_strided((40, 2, 4, 32), (64, 32, 1, 8)))
    with pytest.raises(NotImplementedError, match="quantise its output"):
        forward(vllm.caches[0], output_scale=torch.ones(1))
    with pytest.raises(NotImplementedError, match="queries of the cache's type, torch.float32, got torch.float16"):
        forward(vllm.caches[0], q.half())
    with pytest.raises(NotImplementedError, match="float16, bfloat16 or float32, got torch.uint8"):
        vllm.impls[1].forward(
            vllm.layers[1], q, k, v, torch.zeros(40, 2, 4, 32, dtype=torch.uint8), metadata, torch.empty(3, HQ, D)
        )
    vllm.layers[1].layer_name = "model.layers.0.parts.1.attn"
    vllm.impls[1].options = dataclasses.replace(FEW, dense_layers=(1,))
    with pytest.raises(ValueError, match="names of layers with one number, got 'model.layers.0.parts.1.attn'"):
        vllm.impls[1].forward(vllm.layers[1], q, k, v, vllm.caches[1], metadata, torch.empty(3, HQ, D))


# SGLang.


class Sglang:
    """SGLang's runner: slots in any order, a row of `req_to_token` for each request, row 0 and slot 0 for padding."""

    def __init__(
        self,
        options: EngineOptions,
        monkeypatch: Any,
        page_size: int = 1,
        dtype: Any = torch.float32,
        cap: float = 0.0,
        **runner: Any,
    ) -> None:
        import tokenselect.sglang

        for field in dataclasses.fields(options):
            value = getattr(options, field.name)
            if value is not None:
                text = ",".join(map(str, sorted(value))) if field.name == "dense_layers" else str(value)
                monkeypatch.setenv(f"TOKENSELECT_{field.name.upper()}", text)
        self.sequences = Sequences(options, dtype, cap)
        self.size = page_size
        self.pool = fakes.MHATokenToKVPool(160, page_size, dtype, HKV, D, LAYERS, "cpu")
        self.req_to_token = torch.zeros(7, 64, dtype=torch.int32)
        self.runner = SimpleNamespace(
            **{
                "token_to_kv_pool": self.pool,
                "req_to_token_pool": SimpleNamespace(req_to_token=self.req_to_token, size=6),
                "page_size": page_size,
                "use_mla_backend": False,
                "is_draft_worker": False,
                "model_config": SimpleNamespace(is_encoder_decoder=False),
                "kv_index_translator": SimpleNamespace(is_translating=False),
                **runner,
            }
        )
        tokenselect.sglang.register()
        self.backend = fakes.ATTENTION_BACKENDS["tokenselect"](self.runner)
        self.free = (torch.randperm(160 // page_size) + 1).tolist()
        self.rows: dict[str, int] = {}
        self.free_rows = [5, 2, 6, 1, 3, 4]

    def layer(self, layer_id: int, **more: Any) -> Any:
        return SimpleNamespace(
            **{
                "layer_id": layer_id,
                "tp_q_head_num": HQ,
                "tp_k_head_num": HKV,
                "tp_v_head_num": HKV,
                "qk_head_dim": D,
                "v_head_dim": D,
                "scaling": SCALE,
                "logit_cap": self.sequences.cap,
                "logit_capping_method": "tanh",
                "sliding_window_size": -1,
                "is_cross_attention": False,
                "attn_type": SimpleNamespace(value="decoder"),
                "use_irope": False,
                "pos_encoding_mode": "NONE",
                "xai_temperature_len": -1,
                **more,
            }
        )

    def allocate(self, forward: dict[str, int]) -> Any:
        """Slots of new tokens: those of a page lie side by side, pages anywhere."""
        new = []
        for name, count in forward.items():
            row = self.rows.setdefault(name, 0) or self.free_rows.pop()
            self.rows[name] = row
            end = self.sequences.length(name)
            for token in range(end - count, end):
                place = token % self.size
                slot = self.free.pop() * self.size if place == 0 else int(self.req_to_token[row, token - 1]) + 1
                self.req_to_token[row, token] = slot
                new.append(slot)
        return torch.tensor(new)

    def batch(self, forward: dict[str, int], mode: ForwardMode, with_host_lens: bool = True) -> Any:
        slots = self.allocate(forward)
        lens = torch.tensor([self.sequences.length(name) for name in forward])
        counts = list(forward.values())
        is_extend = mode != ForwardMode.DECODE
        return SimpleNamespace(
            forward_mode=mode,
            batch_size=len(forward),
            req_pool_indices=torch.tensor([self.rows[name] for name in forward]),
            seq_lens=lens,
            seq_lens_cpu=lens.clone() if with_host_lens else None,
            out_cache_loc=slots,
            out_cache_loc_is_physical=False,
            encoder_lens=None,
            mha_return_lse=None,
            extend_seq_lens=torch.tensor(counts, dtype=torch.int32) if is_extend else None,
            extend_seq_lens_cpu=counts if is_extend and with_host_lens else None,
        )

    def step(self, forward: dict[str, int], with_host_lens: bool = True, write: bool = True) -> None:
        """One forward in eager mode, compared. Without `write`, somebody else has written keys and values."""
        names = list(forward)
        for name, count in forward.items():
            self.sequences.new(name, count)
        ones = sum(count == 1 for count in forward.values())
        mode = ForwardMode.MIXED if ones else ForwardMode.EXTEND
        mode = ForwardMode.DECODE if ones == len(names) else mode
        batch = self.batch(forward, mode, with_host_lens)
        self.backend.init_forward_metadata(batch)
        # From here on the scheduler may write what it shares.
        kept = self.req_to_token.clone()
        self.req_to_token.fill_(-1)
        batch.seq_lens.fill_(-1)
        batch.req_pool_indices.fill_(-1)
        for layer_id in range(LAYERS):
            q, k, v = self.sequences.latest(names, layer_id)
            layer, packed = self.layer(layer_id), q.reshape(len(q), HQ * D)
            if write:
                out = self.backend.forward(packed, k, v, layer, batch)
            else:
                self.pool.set_kv_buffer(layer, fakes.KVWriteLoc(batch.out_cache_loc), k, v)
                out = self.backend.forward(packed, None, None, layer, batch, save_kv_cache=False)
            assert out.shape == packed.shape
            self.compare(out, names, layer_id)
        self.req_to_token.copy_(kept)

    def compare(self, out: Any, names: list[str], layer: int) -> None:
        expected = self.sequences.expected(names, layer)
        close(out.view(expected.shape), expected, 2e-6 if out.dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("page_size", [1, 4, 32])
@pytest.mark.parametrize("choice", CHOICES)
def test_sglang_forwards(choice: str, page_size: int, monkeypatch: Any) -> None:
    sglang = Sglang(CHOICES[choice], monkeypatch, page_size)
    for forward in FORWARDS:
        sglang.step(forward)


@pytest.mark.parametrize("with_host_lens, write", [(False, True), (True, False)])
def test_sglang_lengths_on_the_device_and_fused_writes(with_host_lens: bool, write: bool, monkeypatch: Any) -> None:
    sglang = Sglang(FEW, monkeypatch, page_size=4, cap=2.0)
    for forward in FORWARDS:
        sglang.step(forward, with_host_lens, write)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sglang_types(dtype: Any, monkeypatch: Any) -> None:
    sglang = Sglang(ALL, monkeypatch, dtype=dtype)
    for forward in FORWARDS:
        sglang.step(forward)


def test_sglang_prefixes_that_requests_share(monkeypatch: Any) -> None:
    """Two requests with one prefix in the tree: their rows name the same slots."""
    sglang = Sglang(FEW, monkeypatch, page_size=4)
    sglang.step({"a": 16})
    sglang.rows["b"] = sglang.free_rows.pop()
    sglang.req_to_token[sglang.rows["b"], :16] = sglang.req_to_token[sglang.rows["a"], :16]
    sequences = sglang.sequences
    sequences._qkv["b"] = [[x.clone() for x in layer] for layer in sequences._qkv["a"]]
    sequences.steps["b"] = [16]
    sglang.step({"a": 6, "b": 9})
    sglang.step({"a": 1, "b": 1})


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("choice", ["all", "few", "dense layer"])
def test_sglang_graphs(choice: str, page_size: int, on_device: None, monkeypatch: Any) -> None:
    """A graph of four rows replayed for fewer and longer ones, between forwards in eager mode."""
    sglang, count = Sglang(CHOICES[choice], monkeypatch, page_size), 4
    backend = sglang.backend
    backend.init_cuda_graph_state(count, count)
    fill = backend.get_cuda_graph_seq_len_fill_value()
    static = SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        batch_size=count,
        req_pool_indices=torch.zeros(count, dtype=torch.int64),
        seq_lens=torch.full((count,), fill, dtype=torch.int64),
        seq_lens_cpu=torch.full((count,), fill, dtype=torch.int64),
        out_cache_loc=torch.zeros(count, dtype=torch.int64),
        out_cache_loc_is_physical=False,
    )
    statics = [[torch.zeros(count, heads, D) for heads in (HQ, HKV, HKV)] for _ in range(LAYERS)]
    outs: list[Any] = []

    def run() -> None:
        outs.clear()
        backend.init_forward_metadata_in_graph(static)
        for layer_id, (q, k, v) in enumerate(statics):
            outs.append(backend.forward(q.view(count, HQ * D), k, v, sglang.layer(layer_id), static))

    graph = EmulatedGraph()
    backend.init_forward_metadata_out_graph(static, in_capture=True)
    for _ in range(2):
        run()
        backend.on_after_cuda_graph_warmup()
    with graph.capture():
        run()
    captured = list(outs)
    for forward in [*FORWARDS, {"a": 1, "d": 1, "c": 1}, {"a": 1, "b": 1, "c": 1, "d": 1}, {"b": 1}]:
        if set(forward.values()) != {1}:
            sglang.step(forward)
            continue
        names = list(forward)
        for name in names:
            sglang.sequences.new(name, 1)
        batch = sglang.batch(forward, ForwardMode.DECODE)
        for name in ("req_pool_indices", "out_cache_loc", "seq_lens", "seq_lens_cpu"):
            buffer = getattr(static, name)
            buffer.fill_(fill if name.startswith("seq_lens") else 0)
            buffer[: len(names)] = getattr(batch, name)
        for layer in range(LAYERS):
            for held, fresh in zip(
                statics[layer], sglang.sequences.latest(names, layer, count - len(names)), strict=True
            ):
                held.copy_(fresh)
        backend.init_forward_metadata_out_graph(static)
        graph.replay()
        for layer in range(LAYERS):
            sglang.compare(captured[layer][: len(names)], names, layer)
    assert [slot.num_faults for slot in FakeSlot.made] == [0] * len(FakeSlot.made)


def test_sglang_decoding_on_the_device_in_eager_mode(on_device: None, monkeypatch: Any) -> None:
    sglang = Sglang(FEW, monkeypatch)
    for forward in FORWARDS:
        sglang.step(forward)


def test_inference_mode_and_none(on_device: None, monkeypatch: Any) -> None:
    """What is made within inference mode is written outside of it, too."""
    for engine in (Sglang(FEW, monkeypatch), Vllm(FEW)):
        for number, forward in enumerate([{"a": 9}, {"a": 1}, {"a": 1}, {"a": 3}, {"a": 1}]):
            with torch.inference_mode(number % 2 == 1):
                engine.step(forward)


def test_sglang_room_on_the_device(on_device: None, monkeypatch: Any) -> None:
    sglang = Sglang(dataclasses.replace(FEW, max_kv_tokens=20), monkeypatch)
    sglang.step({"a": 13, "b": 5})
    sglang.step({"a": 1, "b": 1})
    for name in "ab":
        sglang.sequences.new(name, 1)
    with pytest.raises(RuntimeError, match="22 tokens in whole pages, `max_kv_tokens` is 20"):
        sglang.backend.init_forward_metadata(sglang.batch({"a": 1, "b": 1}, ForwardMode.DECODE))


def test_sglang_warms_up_over_row_0(monkeypatch: Any) -> None:
    sglang = Sglang(FEW, monkeypatch, page_size=4)
    lens = torch.tensor([3, 3])
    batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND, batch_size=2, req_pool_indices=torch.zeros(2, dtype=torch.int64), seq_lens=lens,
        seq_lens_cpu=lens, out_cache_loc=torch.zeros(6, dtype=torch.int64), out_cache_loc_is_physical=False,
        extend_seq_lens=lens, extend_seq_lens_cpu=[3, 3],
    )  # fmt: skip
    sglang.backend.init_forward_metadata(batch)
    q, k, v = torch.ones(8, HQ * D), torch.ones(6, HKV, D), torch.ones(6, HKV, D)
    assert not sglang.backend.forward(q, k, v, sglang.layer(0), batch).any()


def test_sglang_idle_and_registration(monkeypatch: Any) -> None:
    import tokenselect.sglang

    sglang = Sglang(FEW, monkeypatch)
    tokenselect.sglang.register()
    assert fakes.ATTENTION_BACKEND_CHOICES == ["triton", "tokenselect"]
    assert isinstance(sglang.backend, fakes.AttentionBackend)
    idle = SimpleNamespace(forward_mode=ForwardMode.IDLE)
    sglang.backend.init_forward_metadata(idle)
    assert sglang.backend.forward(torch.zeros(0, HQ * D), None, None, sglang.layer(0), idle).shape == (0, HQ * D)


class DenseBackend(fakes.AttentionBackend):
    """One of SGLang's, that writes down what it is called for."""

    def __init__(self, runner: Any) -> None:
        self.kv_index_translator = runner.kv_index_translator
        self.calls: list[str] = []

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.calls.append("init_forward_metadata")

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **more: Any
    ) -> Any:
        self.calls.append(f"forward_extend {layer.layer_id} {save_kv_cache} {sorted(more)}")
        return q


def test_sglang_layers_for_another_backend(monkeypatch: Any) -> None:
    fakes.ATTENTION_BACKENDS["triton"] = DenseBackend
    sglang = Sglang(dataclasses.replace(FEW, dense_backend="triton"), monkeypatch)
    dense = sglang.backend.dense_backend
    sglang.step({"a": 9})
    batch = sglang.batch({}, ForwardMode.EXTEND)
    q = torch.ones(1, HQ * D)
    assert sglang.backend.forward(q, q, q, sglang.layer(1, sliding_window_size=8), batch) is q
    assert sglang.backend.forward(q, q, q, sglang.layer(0), batch, save_kv_cache=False, sinks=q) is q
    assert dense.calls == ["init_forward_metadata", "forward_extend 1 True []", "forward_extend 0 False ['sinks']"]
    assert sglang.backend.attn_backend_list == [dense]
    monkeypatch.setenv("TOKENSELECT_DENSE_BACKEND", "tokenselect")
    with pytest.raises(ValueError, match="TOKENSELECT_DENSE_BACKEND must be one of triton, got 'tokenselect'"):
        fakes.ATTENTION_BACKENDS["tokenselect"](sglang.runner)


@pytest.mark.parametrize(
    "runner, text",
    [
        ({"use_mla_backend": True}, "multi-head latent attention"),
        ({"model_config": SimpleNamespace(is_encoder_decoder=True)}, "encoder-decoder models"),
        ({"is_draft_worker": True}, "speculative decoding"),
        ({"kv_index_translator": SimpleNamespace(is_translating=True)}, "unified pools"),
    ],
)
def test_sglang_models_that_are_refused(runner: dict[str, Any], text: str, monkeypatch: Any) -> None:
    with pytest.raises(NotImplementedError, match=f"{text}.*Choose another"):
        Sglang(FEW, monkeypatch, **runner)


@pytest.mark.parametrize(
    "layer, more, text",
    [
        ({"sliding_window_size": 8}, {}, r"a sliding window \(8\) \(layer 0\): name one of SGLang's backends"),
        ({"is_cross_attention": True}, {}, "cross-attention"),
        ({"attn_type": SimpleNamespace(value="encoder_only")}, {}, "attention of type encoder_only"),
        ({"v_head_dim": 8}, {}, r"values of another head dimension \(8\) than keys \(16\)"),
        ({"tp_v_head_num": 1}, {}, r"other heads of values \(1\) than of keys \(2\)"),
        ({"use_irope": True}, {}, "attention in chunks"),
        ({"pos_encoding_mode": "ALIBI"}, {}, "positions by ALIBI"),
        ({"logit_cap": 3.0, "logit_capping_method": "hard"}, {}, "logits capped by hard"),
        ({"xai_temperature_len": 9}, {}, "a temperature by length"),
        ({}, {"sinks": torch.ones(1)}, "`sinks`"),
        ({}, {"k_rope": torch.ones(1)}, "`k_rope`"),
        ({"tp_k_head_num": 3, "tp_v_head_num": 3}, {}, r"\[slots, 3, 16\], layer 0 has \(161, 2, 16\)"),
    ],
)
def test_sglang_layers_that_are_refused(
    layer: dict[str, Any], more: dict[str, Any], text: str, monkeypatch: Any
) -> None:
    sglang = Sglang(FEW, monkeypatch)
    sglang.step({"a": 2})
    batch = sglang.batch({}, ForwardMode.EXTEND)
    with pytest.raises(NotImplementedError, match=text):
        sglang.backend.forward(torch.ones(2, HQ * D), None, None, sglang.layer(0, **layer), batch, **more)


def test_sglang_batches_that_are_refused(monkeypatch: Any) -> None:
    sglang = Sglang(FEW, monkeypatch, page_size=4)
    sglang.sequences.new("a", 6)
    batch = sglang.batch({"a": 6}, ForwardMode.EXTEND)
    q = torch.ones(6, HQ * D)
    with pytest.raises(RuntimeError, match="`init_forward_metadata` comes first"):
        sglang.backend.forward(q, None, None, sglang.layer(0), batch)
    for given, text in (
        ({"forward_mode": ForwardMode.TARGET_VERIFY}, "the forward mode TARGET_VERIFY"),
        ({"encoder_lens": torch.ones(1)}, "encoder_lens"),
        ({"mha_return_lse": True}, "log-sum-exp"),
    ):
        with pytest.raises(NotImplementedError, match=text):
            sglang.backend.init_forward_metadata(SimpleNamespace(**{**vars(batch), **given}))
    sglang.backend.init_forward_metadata(batch)
    with pytest.raises(NotImplementedError, match="queries of the pool's type, torch.float32, got torch.float16"):
        sglang.backend.forward(q.half(), None, None, sglang.layer(0), batch)
    sglang.req_to_token[sglang.rows["a"], 1] += 8
    with pytest.raises(NotImplementedError, match="side by side.*pages of 4"):
        sglang.backend.init_forward_metadata(batch)
    sglang.pool.kv_cache_layout = "hnd"
    with pytest.raises(NotImplementedError, match="layout nhd, it is in hnd"):
        fakes.ATTENTION_BACKENDS["tokenselect"](sglang.runner)


# Both.


def test_options_of_the_environment_and_of_the_engine() -> None:
    environ = {
        "TOKENSELECT_TOP_K": "7",
        "TOKENSELECT_DENSE_LAYERS": "0, 3",
        "TOKENSELECT_SCORE_SCALE": "0.5",
        "TOKENSELECT_DENSE_BACKEND": "triton",
        "TOKENSELECT_LIBRARY": "elsewhere",
    }
    options = EngineOptions.read({"top_k": 9, "n_init": 1}, environ)
    expected = EngineOptions(top_k=9, n_init=1, dense_layers=[3, 0], score_scale=0.5, dense_backend="triton")
    assert options == expected and options.dense_layers == frozenset({0, 3})


@pytest.mark.parametrize(
    "given, environ, text",
    [
        ({"topk": 1}, {}, "`topk` is no option of tokenselect, there are top_k, n_init"),
        ({}, {"TOKENSELECT_TOP_K": "many"}, "TOKENSELECT_TOP_K must be a whole number, got 'many'"),
        ({}, {"TOKENSELECT_SCORE_SCALE": "x"}, "TOKENSELECT_SCORE_SCALE must be a number, got 'x'"),
        ({}, {"TOKENSELECT_DENSE_LAYERS": "all"}, "TOKENSELECT_DENSE_LAYERS must be numbers of layers"),
        ({}, {"TOKENSELECT_TOP_K": "0"}, "`top_k` must be at least 1, got 0"),
        ({"n_local": -1}, {}, "`n_local` must be at least 0, got -1"),
        ({"block_len": 1.5}, {}, "`block_len` must be a whole number, got 1.5"),
        ({"vote_pool_window": 2}, {}, "`vote_pool_window` must be odd, got 2"),
        ({"score_scale": float("nan")}, {}, "`score_scale` must be finite, got nan"),
        ({"dense_layers": "0"}, {}, "`dense_layers` must be a list"),
        ({"dense_layers": [-1]}, {}, "`dense_layers` must be at least 0, got -1"),
        ({"max_kv_tokens": 0}, {}, "`max_kv_tokens` must be at least 1, got 0"),
        ({"dense_backend": 3}, {}, "`dense_backend` must be the name of a backend, got 3"),
    ],
)
def test_options_that_are_refused(given: dict[str, Any], environ: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        EngineOptions.read(given, environ)


def test_vllm_additional_config_that_is_refused() -> None:
    from tokenselect.vllm.metadata import options_of

    assert options_of(SimpleNamespace(additional_config=object())) == EngineOptions()
    with pytest.raises(ValueError, match="must be a dictionary of options, got 'top_k=3'"):
        options_of(SimpleNamespace(additional_config={"tokenselect": "top_k=3"}))


def test_rows_that_contradict_each_other() -> None:
    from tokenselect.engines.host_step import HostStep

    pages = np.arange(2, dtype=np.int32)
    with pytest.raises(ValueError, match="a row of 5 new tokens .*got 4 tokens and 2 pages of 4"):
        HostStep(4, [5], [4], [pages], 0)
    with pytest.raises(ValueError, match="got 9 tokens and 2 pages of 4"):
        HostStep(4, [5], [9], [pages], 0)
    with pytest.raises(ValueError, match="got 1, 2 and 1"):
        HostStep(4, [5], [9, 9], [pages], 0)


def test_slots_must_be_made_before_they_are_captured(on_device: None) -> None:
    from tokenselect.engines.device_step import Slots

    slots, device = Slots(), tokenselect.Device.cpu()

    def place(rows: int, is_captured: bool) -> Any:
        return slots.place(torch.ones(rows, dtype=torch.int32), device, 4, 8, is_captured)

    with pytest.raises(RuntimeError, match="a decoding step of 2 rows must run once in the stream of the capture"):
        place(2, True)
    kept = place(2, False)
    assert place(2, True) is kept
    for rows in range(3, 20):
        place(rows, False)
    assert place(2, False) is kept and len(slots._loose) == 8


@pytest.mark.parametrize("are_slots", [False, True])
def test_translated_tables_are_those_of_the_emulated_gpu(are_slots: bool) -> None:
    """`FakeSlot` is true to `BatchSlot`: padding between rows is no fault, writes nothing and has outputs of zero."""
    try:
        emulated = tokenselect.Device.emulated()
    except tokenselect.Error as error:
        pytest.skip(f"the GPU's kernels are not emulated: {error}")
    random, size = np.random.default_rng(0), 4
    arrays = [
        random.standard_normal(shape).astype(np.float16) for shape in [(12, size, 1, 64)] * 2 + [(4, 2, 64), (4, 1, 64)]
    ]
    pages = np.array([[5, 2, 7, 1], [0, 0, 0, 0], [3, 9, 4, 0], [0, 0, 0, 0]], np.int32)
    entries, rows = pages, None
    if are_slots:
        slots = (pages[:, :, None] * size + np.arange(size, dtype=np.int32)).reshape(4, -1)
        entries, rows = np.ascontiguousarray(slots[[3, 0, 2, 1]]), np.array([1, 0, 2, 3], np.int32)
    results = []
    for device, kind, copy in (
        (emulated, tokenselect.BatchSlot, emulated.to_device),
        (tokenselect.Device.cpu(), FakeSlot, lambda array: torch.from_numpy(array.copy())),
    ):
        config = tokenselect.Config(
            num_qo_heads=2, num_kv_heads=1, head_dim=64, dtype="f16", top_k=3, n_init=2, n_local=2, selection_cache=0
        )
        context = tokenselect.Context(device, config, max_rows=4, max_block_len=1, max_kv_tokens=64)
        slot = kind(device, tokenselect.Batch(size, [0, 1], [0, 1], [0], [1]).padded(4, 1), 16)
        lens = copy(np.array([14, 0, 9, 0], np.int32))
        bound = slot.translate(copy(entries), lens, 12, slots=are_slots, rows=None if rows is None else copy(rows))
        batch = getattr(bound, "batch", bound)
        k, v, q, new = (copy(array) for array in arrays)
        kv, out = tokenselect.KvView(k, v), copy(np.full((4, 2, 64), np.nan, np.float16))
        context.append_select(batch, kv, q, new, new)
        context.attend(batch, kv, q, out=out)
        assert (slot.num_faults if isinstance(slot, FakeSlot) else slot.faults()) == 0
        results.append([torch.from_numpy(np.asarray(x.numpy())) for x in (k, v, out)])
    (k, v, out), (other_k, other_v, other_out) = results
    assert torch.equal(k, other_k) and torch.equal(v, other_v)
    close(out, other_out.double(), 2e-3)
    assert not out[[1, 3]].any() and out[[0, 2]].any()


def test_launches_are_separated_from_those_before(monkeypatch: Any) -> None:
    """Once a layer, before anything of the library's but the translation of tables, which reads the engine's tables alone."""
    from tokenselect.engines import contexts, host_step

    calls: list[str] = []
    monkeypatch.setattr(host_step, "separate", lambda device: calls.append("separate"))
    monkeypatch.setattr(contexts, "Context", RecordedContext)
    monkeypatch.setattr(RecordedContext, "called", lambda self, name: calls.append(name))
    contexts._shared.clear()
    sglang = Sglang(FEW, monkeypatch)
    sglang.step({"a": 1})
    assert calls == ["separate", "select", "attend"] * LAYERS
    contexts._shared.clear()


def test_imports_need_neither_the_engines_nor_pytorch() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'vllm', 'sglang'): sys.modules[name] = None\n"
        "import tokenselect.vllm, tokenselect.sglang, tokenselect.engines\n"
        "for module in (tokenselect.vllm, tokenselect.sglang):\n"
        "    try: module.register()\n"
        "    except ImportError: continue\n"
        "    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The published sources.

published = pytest.mark.skipif(
    fakes.SOURCES is None, reason="TOKENSELECT_ENGINE_SOURCES is not set: names of the engines are as they were read"
)


def _parsed(path: str) -> ast.Module:
    file = Path(str(fakes.SOURCES), *path.split("."))
    return ast.parse((file / "__init__.py" if file.is_dir() else file.with_suffix(".py")).read_text())


def _arguments(function: Any) -> list[str]:
    given = function.args
    more = [each for each in (given.vararg, given.kwarg) if each]
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs, *more)]
    return [name for name in names if name not in ("self", "cls")]


@published
@pytest.mark.parametrize("path, name", [(path, name) for path, names in fakes.FAKES.items() for name in names])
def test_names_are_those_of_the_published_sources(path: str, name: str) -> None:
    ours, tree = fakes.FAKES[path][name], _parsed(path)
    theirs = next((node for node in tree.body if getattr(node, "name", None) == name), None)
    if isinstance(theirs, ast.FunctionDef):
        assert list(inspect.signature(ours).parameters) == _arguments(theirs)
        return
    if not isinstance(theirs, ast.ClassDef):  # assigned, or imported from another module
        assert name in {
            part for node in ast.walk(tree) for part in (getattr(node, "id", ""), getattr(node, "name", ""))
        }
        return
    defined = {node.name: node for node in theirs.body if isinstance(node, ast.FunctionDef)}
    fields = {ast.unparse(node.target) for node in theirs.body if isinstance(node, ast.AnnAssign)}
    for each, value in vars(ours).items():
        function = getattr(value, "__func__", value)
        if inspect.isfunction(function) and each in defined:
            got = [argument for argument in inspect.signature(function).parameters if argument not in ("self", "cls")]
            # The pool's have more arguments, none of which is needed.
            wanted = _arguments(defined[each])
            assert got == (wanted[: len(got)] if name == "MHATokenToKVPool" else wanted), each
        elif inspect.isfunction(function):
            assert each.startswith("_"), f"{each} is not in {path}"
    if dataclasses.is_dataclass(ours):
        assert {field.name for field in dataclasses.fields(ours)} <= fields
    if issubclass(ours, Enum):
        assert {member.name for member in ours} <= set(_assigned(theirs))


def _assigned(kind: ast.ClassDef) -> dict[str, ast.expr]:
    return {ast.unparse(node.targets[0]): node.value for node in kind.body if isinstance(node, ast.Assign)}


@published
def test_orders_of_strides_are_those_of_the_published_sources() -> None:
    kinds = {node.name: node for node in _parsed("vllm.v1.kv_cache_layout").body if isinstance(node, ast.ClassDef)}
    orders = {name: ast.literal_eval(value) for name, value in _assigned(kinds["KVCacheLayout"]).items()}
    assert orders == LAYOUTS


@published
@pytest.mark.parametrize(
    "given, reasons",
    [
        ({}, []),
        ({"has_sliding_window": True}, ["sliding window not supported"]),
        ({"has_sink": True}, ["attention sinks not supported"]),
        ({"use_mla": True}, ["MLA not supported"]),
        ({"head_size": 80}, ["head_size not supported"]),
        ({"kv_cache_dtype": "fp8"}, ["kv_cache_dtype not supported"]),
        ({"block_size": 528}, []),
        ({"block_size": 8}, ["block_size not supported"]),
        ({"attn_type": "encoder_only"}, ["attention type encoder_only not supported"]),
        ({"use_dcp": True}, ["DCP not supported"]),
        ({"use_pcp": True}, ["PCP not supported"]),
        ({"device_capability": SimpleNamespace(major=7)}, ["compute capability not supported"]),
    ],
)
def test_vllm_validates_configurations(given: dict[str, Any], reasons: list[str]) -> None:
    from tokenselect.vllm.backend import TokenSelectBackend

    asked = {
        "head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16, "use_mla": False,
        "has_sink": False, "use_sparse": False, "use_mm_prefix": False, "use_per_head_quant_scales": False,
        "device_capability": SimpleNamespace(major=9), "attn_type": "decoder", **given,
    }  # fmt: skip
    assert TokenSelectBackend.validate_configuration(**asked) == reasons
