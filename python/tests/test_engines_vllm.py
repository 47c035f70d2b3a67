"""`tokenselect.vllm` by the calls that vLLM makes, beside attention computed in PyTorch: see `test_engines.py`."""

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

from engines_runners import ALL, CHOICES, FEW, FORWARDS, HKV, HQ, LAYERS, SCALE, D, engines, on_device
from engines_vllm import LAYOUTS, Vllm

import fake_engines as fakes
from emulated_graph import EmulatedGraph, FakeSlot
from tokenselect.engines import EngineOptions

__all__ = ["engines", "on_device"]  # fixtures are found by name


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
        NotImplementedError,
        match=r"`entries` that are int32 or int64 in rows of adjacent entries, got torch.int32 with strides \(1, 8\)",
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


def test_vllm_additional_config_that_is_refused() -> None:
    from tokenselect.vllm.metadata import options_of

    assert options_of(SimpleNamespace(additional_config=object())) == EngineOptions()
    with pytest.raises(ValueError, match="must be a dictionary of options, got 'top_k=3'"):
        options_of(SimpleNamespace(additional_config={"tokenselect": "top_k=3"}))
