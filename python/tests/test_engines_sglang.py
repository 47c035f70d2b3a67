"""`tokenselect.sglang` by the calls that SGLang makes, beside attention computed in PyTorch: see `test_engines.py`."""

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

from engines_runners import ALL, CHOICES, FEW, FORWARDS, HKV, HQ, LAYERS, D, engines, on_device
from engines_sglang import Sglang
from engines_vllm import Vllm

import fake_engines as fakes
from emulated_graph import EmulatedGraph, FakeSlot
from fake_engines import ForwardMode

__all__ = ["engines", "on_device"]  # fixtures are found by name


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
