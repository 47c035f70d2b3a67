"""The package itself: what it imports, shows and says."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tokenselect as ts
from definitions import HKV, PAGE, D, config


def run(code: str, folder: Path | str = "/") -> str:
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_imports_neither_numpy_nor_torch() -> None:
    code = "import sys, tokenselect as ts; ts.Cache(ts.Device.cpu(), ts.Config()); print({'numpy', 'torch'} & {*sys.modules})"
    assert run(code) == "set()"


def test_entry_points() -> None:
    """The names by which engines find their plugins."""
    found = importlib.metadata.distribution("tokenselect").entry_points
    assert {(point.group, point.name, point.value) for point in found} == {
        ("vllm.general_plugins", "tokenselect", "tokenselect.vllm:register"),
        ("sglang.srt.plugins", "tokenselect", "tokenselect.sglang:register"),
    }


def test_any_folder(tmp_path: Path) -> None:
    """The module is found and runs wherever the process stands."""
    deep = tmp_path.joinpath(*"abcdefgh")
    deep.mkdir(parents=True)
    where = str(Path(ts.__file__).parent.parent)
    for folder in ("/", tmp_path, deep):
        code = f"import sys; sys.path.insert(0, {where!r}); import tokenselect as ts; print(ts.Device.cpu().name)"
        assert run(code, folder) == "cpu"


def test_no_driver() -> None:
    """Without a driver, or without so many GPUs, making a CUDA device is an error that says so."""
    with pytest.raises(ts.TokenSelectError, match="cuda:99") as caught:
        ts.Device.cuda(99)
    assert caught.value.status == "TS_STATUS_DRIVER"
    with pytest.raises(ValueError, match="`ordinal` must be from 0 to 2147483647, got -1"):
        ts.Device.cuda(-1)
    with pytest.raises(TypeError, match="`stream` must be a whole number, got str"):
        ts.Device.cuda(0, stream="0")


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", ts.version) and ts.__version__ == ts.version


def test_every_class_has_a_repr(device: ts.Device, emulated: ts.Device) -> None:
    cfg = config(selection_cache=True)
    ctx = ts.Context(device, cfg, max_kv_tokens=64)
    cache = ts.Cache(device, cfg, num_pages=4, page_size=PAGE)
    batch = cache.extend([(cache.create(), 5)])
    reader = ts.Context.for_prefill(device, cfg, block_len=2, max_kv_len=8)
    pool = np.zeros((1, PAGE, HKV, D), np.float32)
    shown = [
        device,
        cfg,
        ctx,
        cache,
        batch,
        batch.info,
        batch.row(0),
        cache.layer(0),
        ts.KvView(pool, pool),
        cache.selections(),
        ts.SelectionCache(device, cfg, 1, 1),
        cache.stats(),
        cache.extend_in_pieces(reader, [(cache.create(), 2)], 2),
        ts.Buffer(device, 3, "bf16"),
        ctx.workspace("votes"),
        ts.BatchSlot(emulated, batch, 4),
        emulated.capture(lambda: None),
    ]
    missing = {getattr(ts, name) for name in ts.__all__ if inspect.isclass(getattr(ts, name))} - {
        type(x) for x in shown
    }
    assert all(issubclass(kind, Exception) for kind in missing)
    for each in shown:
        text = repr(each)
        assert type(each).__name__ in text and " object at 0x" not in text, text
        assert type(each).__module__ == "tokenselect" and type(each).__doc__
    assert repr(cfg) == (
        "Config(num_qo_heads=4, num_kv_heads=2, head_dim=16, dtype='f32', n_init=2, n_local=3, top_k=5, vote_pool_window=1, "
        "score_scale=None, sm_scale=None, logits_soft_cap=None, positions='native', selection_cache=True, "
        "similarity_threshold=0.9, max_reuse=None)"
    )
    assert repr(batch.row(0)) == "BatchRow(query_begin=0, block_len=5, kv_len=5, token_base=0)"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"vote_pool_window": 3, "score_scale": 0.1, "sm_scale": 1e-7, "logits_soft_cap": 50.0, "dtype": "bf16"},
        {"selection_cache": True, "similarity_threshold": 0.123, "max_reuse": 7},
        {"positions": "reassigned"},
        {"positions": "reassigned", "rope": {"theta": 5e5, "rotary_dim": 8, "pairing": "interleaved"}},
        {"positions": "reassigned", "rope": {"scaling": "linear", "factor": 3.0}},
        {
            "positions": "reassigned",
            "rope": {
                "scaling": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.5,
                "high_freq_factor": 3.5,
                "original_max_position": 4096.0,
            },
        },
        {"positions": "reassigned", "rope": {"scaling": "yarn", "factor": 4.0, "beta_fast": 30.0, "beta_slow": 2.0}},
        {"positions": "reassigned", "rope": {"scaling": "yarn", "factor": 4.0, "attention_factor": 1.25}},
    ],
)
def test_repr_of_a_configuration_makes_an_equal_one(fields: dict[str, Any]) -> None:
    cfg = config(**fields)
    assert eval(repr(cfg), {"Config": ts.Config}) == cfg  # all fields are in it
    assert repr(cfg) != repr(config(top_k=6, **fields))


def test_classes_that_are_not_called() -> None:
    """What is made elsewhere says where, in this package's family."""
    calls: dict[str, Any] = {
        r"`Device` must not be called, its objects come from `Device.cpu\(\)`, `Device.cuda\(0": ts.Device,
        "`Graph` must not be called, its objects come from `Device.capture`": ts.Graph,
        "`Memory` must not be called, its objects come from `Context.workspace`": ts.Memory,
        "`Pieces` must not be called, its objects come from `Cache.extend_in_pieces` and `Batch.in_pieces`": ts.Pieces,
        "`BatchInfo` must not be called, its objects come from `Batch.info`": ts.BatchInfo,
        "`BatchRow` must not be called, its objects come from `Batch.row`": ts.BatchRow,
        "`SelectionStats` must not be called": ts.SelectionStats,
    }
    for text, kind in calls.items():
        for given in ((), ("cpu",), (0, 1)):
            with pytest.raises(ts.ArgumentTypeError, match=text):
                kind(*given)
        with pytest.raises(TypeError, match=text):
            kind(ordinal=0)
    with pytest.raises(
        ts.ArgumentTypeError, match="`Config` takes keywords alone, such as .*, got 3 arguments without one"
    ):
        ts.Config(32, 8, 128)  # type: ignore[call-arg]


def test_signatures() -> None:
    """Real names and defaults, for `help` and editors."""
    for call, text in {
        ts.Context.step: "(self, /, cache, layer, batch, q, k, v, out=None, lse=None)",
        ts.Context.select: "(self, /, batch, kv, q, selection_cache=None, layer=0)",
        ts.Device.cuda: "(ordinal=0, stream=None)",
        ts.Cache: "(device, config, *, num_layers=1, num_pages=1024, page_size=16, max_sequences=16, layout='NHD')",
        ts.Batch: "(page_size, qo_indptr, indptr, indices, last_page_len, sequence_indices=None, candidates=None)",
        ts.KvView: "(k, v, layout='NHD')",
    }.items():
        assert str(inspect.signature(call)) == text  # type: ignore[arg-type]
    assert list(inspect.signature(ts.Config).parameters)[:4] == ["num_qo_heads", "num_kv_heads", "head_dim", "dtype"]
    for kind in (ts.Batch, ts.BatchSlot, ts.Buffer, ts.Cache, ts.Context, ts.Device, ts.Graph, ts.SelectionCache):
        for name, method in inspect.getmembers(kind, callable):
            if not name.startswith("_"):
                assert method.__doc__ or name == "close", f"{kind.__name__}.{name}"
                assert "args" not in inspect.signature(method).parameters, f"{kind.__name__}.{name}"


def test_defaults_are_the_librarys() -> None:
    """What the signature says is what is taken."""
    made = ts.Config()
    for name, parameter in inspect.signature(ts.Config).parameters.items():
        if name != "rope":
            assert getattr(made, name) == pytest.approx(parameter.default), name
    ctx = ts.Context(ts.Device.cpu(), config())
    for name in ("max_rows", "max_block_len", "max_kv_tokens"):
        assert getattr(ctx, name) == inspect.signature(ts.Context).parameters[name].default


def test_types_of_elements(device: ts.Device) -> None:
    for dtype, name in ((np.float32, "f32"), (np.dtype(np.float16), "f16"), ("bfloat16", "bf16"), ("half", "f16")):
        assert config(dtype=dtype).dtype == name
    for python in (float, int, bool):
        text = f"`dtype` must be one of f16, bf16, f32, a `torch.dtype` or a `numpy.dtype` of these, got Python's {python.__name__}"
        with pytest.raises(ts.ArgumentTypeError, match=text):
            config(dtype=python)
        with pytest.raises(ts.ArgumentTypeError, match=f"`typestr` must be .*, got Python's {python.__name__}"):
            ts.Buffer(device, 3, python)
    for unclear in ("float", "int"):  # of other sizes in PyTorch than in NumPy
        with pytest.raises(ts.ArgumentError, match=f"`dtype` must be one of .*, got {unclear}"):
            config(dtype=unclear)
    assert config() == config() and config() != config(top_k=6)
    for given, typestr in (
        ("bf16", "<u2"),
        ("<f4", "<f4"),
        (np.dtype(np.int32), "<i4"),
        (np.float64, "<f8"),
        ("|u1", "|u1"),
    ):
        assert ts.Buffer(device, (2, 3), given).typestr == typestr
    for wrong in ("<c8", "f3", ">f4"):
        with pytest.raises(ValueError, match="`typestr` must be a type string"):
            ts.Buffer(device, 1, wrong)


def test_buffers(device: ts.Device, emulated: ts.Device) -> None:
    """Copies to a device and back, of any size and kind."""
    for on in (device, emulated):
        for array in (
            np.arange(7, dtype=np.uint8),
            np.eye(3),
            np.zeros((0, 3)),
            np.arange(6, dtype=np.int16).reshape(2, 3),
        ):
            buffer = on.to_device(array)
            np.testing.assert_array_equal(buffer.numpy(), array)
            assert (buffer.shape, buffer.num_bytes) == (array.shape, array.nbytes)
            buffer.from_host(array * 2)
            np.testing.assert_array_equal(buffer.numpy(), array * 2)
        with pytest.raises(ValueError, match=r"`host` must have shape \(2, 3\), got \(3, 2\)"):
            buffer.from_host(np.zeros((3, 2), np.int16))
        with pytest.raises(TypeError, match="`host` must be <i2, got <f4"):
            buffer.from_host(np.zeros((2, 3), np.float32))
        with pytest.raises(ValueError, match="`host` must be contiguous"):
            buffer.from_host(np.zeros((2, 6), np.int16)[:, ::2])
        with pytest.raises(TypeError, match="`host` must be an array or a tensor of the host, got int"):
            on.to_device(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`buffer` is written and must not overlap `host`"):
        made = ts.Buffer(device, 8, "f32")
        made.from_host(np.asarray(made))
