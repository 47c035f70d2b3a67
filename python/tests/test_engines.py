"""`tokenselect.vllm` and `tokenselect.sglang` by the calls that these engines make, beside attention computed in PyTorch.

Runners in `engines_vllm.py` and `engines_sglang.py` do what the engines' do: allocate pages, make metadata, call every layer, with
padding, chunks of prompts, mixed batches and graphs. The engines themselves are not run. Where `TOKENSELECT_ENGINE_SOURCES` names a folder with the published packages `vllm`
and `sglang`, unpacked and no more, everything runs over their base classes and data, and the names in `fake_engines.py` are compared
with theirs.

    pytest python/tests -k engines
"""

# ruff: noqa: E402 (what is missing is said before it is imported)

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip(
    "torch", reason="PyTorch is missing: nothing of tokenselect.vllm and tokenselect.sglang is tested"
)
tokenselect = pytest.importorskip("tokenselect", reason="tokenselect is missing")

from engines_runners import FEW, LAYERS, close, engines, on_device
from engines_sglang import Sglang

from emulated_graph import FakeSlot, RecordedContext
from tokenselect.engines import EngineOptions

__all__ = ["engines", "on_device"]  # fixtures are found by name


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
