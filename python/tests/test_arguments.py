"""Arguments that break a rule: each error is of one family, and names the argument, the rule and what was given."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tokenselect as ts
from definitions import HKV, HQ, PAGE, D, Draw, config


def test_objects_of_another_class(device: ts.Device, draw: Draw) -> None:
    cfg = config()
    cache = ts.Cache(device, cfg, num_layers=1, num_pages=8, page_size=PAGE)
    reader = ts.Context.for_prefill(device, cfg, block_len=2, max_kv_len=8)
    ctx = ts.Context(device, cfg, max_rows=2, max_block_len=1, max_kv_tokens=64)
    sequence = cache.create()
    batch: Any = cache.extend([(sequence, 1)])
    pieces: Any = cache.extend_in_pieces(reader, [(cache.create(), 1)], 2)
    q, k, v = (draw(1, heads, D) for heads in (HQ, HKV, HKV))
    kv: Any = ts.KvView(draw(1, PAGE, HKV, D), draw(1, PAGE, HKV, D))
    some: Any = device
    wrongs: dict[str, Callable[[], object]] = {
        "`pieces` must be a Pieces, got Batch": lambda: reader.prefill(cache, 0, batch, q, k, v),
        "`batch` must be a Batch, got Pieces": lambda: ctx.step(cache, 0, pieces, q, k, v),
        "`context` must be a Context, got Device": lambda: cache.extend_in_pieces(some, [(sequence, 1)], 2),
        "`cache` must be a Cache, got Device": lambda: ctx.step(some, 0, batch, q, k, v),
        "`device` must be a Device, got KvView": lambda: ts.Cache(kv, cfg),
        "`config` must be a Config, got Device": lambda: ts.Context(device, some),
        "`kv` must be a KvView, got Device": lambda: ctx.select(batch, some, q),
        "`selection_cache` must be a SelectionCache, got Device": lambda: ctx.select(batch, kv, q, some),
        "`block_len` must be a whole number, got Device": lambda: batch.in_blocks(some),
        "`block_len` must be a whole number, got float": lambda: batch.in_blocks(1.5),
        "`growth` must be a list of pairs of a sequence and its new tokens, got int": lambda: cache.extend(
            [batch.num_rows]
        ),
        "`progress` must be a function": lambda: reader.prefill(cache, 0, pieces, q, k, v, progress=some),
        "`q` must be a tensor with `data_ptr` or `__array_interface__` on cpu, got Device": lambda: ctx.pool(
            batch, some
        ),
        "`rope` must be a dict, got Device": lambda: config(rope=some),
        "`rope` has no field `base`": lambda: config(rope={"base": 1.0}),
        "`dtype` must be one of": lambda: config(dtype=some),
        "unexpected keyword argument 'topk'": lambda: config(topk=1),
    }
    for text, wrong in wrongs.items():
        with pytest.raises(TypeError, match=text):
            wrong()
    # Errors of the calls' own rules, unlike those of an unknown keyword, are all of one family.
    for text, wrong in wrongs.items():
        if "keyword" not in text:
            with pytest.raises(ts.TokenSelectError):
                wrong()


def test_numbers(device: ts.Device) -> None:
    """Numbers that do not fit what they stand for."""
    cfg = config()
    cache = ts.Cache(device, cfg, num_pages=8, page_size=PAGE)
    sequence = cache.create()
    batch = cache.extend([(sequence, 1)])
    wrongs: dict[str, Callable[[], object]] = {
        "`block_len` must be from 0 to 18446744073709551615, got -1": lambda: batch.in_blocks(-1),
        "`block_len` must be from 0 to 18446744073709551615, got 18446744073709551616": lambda: batch.in_blocks(2**64),
        "`layer` must be from 0 to .*, got -1": lambda: cache.written_len(-1, sequence),
        "`num_tokens` must be from 0 to .*, got -5": lambda: cache.extend([(sequence, -5)]),
        "`max_workspace_bytes` must be from 0 to .*, got -1": lambda: ts.Context.for_prefill(
            device, cfg, max_workspace_bytes=-1
        ),
        "`num_qo_heads` must be at most 65536, got 4294967300": lambda: config(num_qo_heads=2**32 + 4),
        "`selection_cache` must be 0 or 1, got 2": lambda: config(selection_cache=2),
        "`max_reuse` must be from 0 to 4294967295, got 4294967296": lambda: config(max_reuse=2**32),
        "`top_k` must be at least 1, got 0": lambda: config(top_k=0),
        "`dtype` must be one of f16, .*, got f8": lambda: config(dtype="f8"),
        "`layout` must be one of NHD, HND, got NDH": lambda: ts.KvView(np.zeros(1), np.zeros(1), "NDH"),  # type: ignore[arg-type]
        "`row` must be below 1, got 1": lambda: batch.row(1),
        "`layer` must be below 1, got 1": lambda: cache.layer(1),
        "is not in this cache": lambda: cache.len(12345),
    }
    for text, wrong in wrongs.items():
        with pytest.raises(ValueError, match=text) as caught:
            wrong()
        assert isinstance(caught.value, ts.TokenSelectError)
    with pytest.raises(IndexError):
        batch.row(1)
    assert batch.in_blocks(np.int64(1)).num_rows == 1


def test_page_tables() -> None:
    """Entries that are no page numbers are refused before they are cut off: 2^32 must not become page 0."""

    def batch(indices: Any = (0, 0), **tables: Any) -> ts.Batch:
        given: dict[str, Any] = {"qo_indptr": [0, 1], "indptr": [0, 2], "indices": indices, "last_page_len": [1]}
        return ts.Batch(PAGE, **{**given, **tables})

    for kind in (
        list,
        tuple,
        iter,
        np.array,
        lambda table: np.array(table, np.int16),
        lambda table: np.array(table, np.uint64),
    ):
        assert batch(kind([3, 4])).row(0).kv_len == PAGE + 1
    strided = np.array([[3, 9], [4, 9]])[:, 0]
    assert batch(strided).info.max_kv_len == PAGE + 1
    for value in (2**32, 2**31, -1, 2**63):
        wrongs: list[Any] = [[0, value]]
        if value < 2**63:
            wrongs.append(np.array([0, value]))
        if value > 0:
            wrongs.append(np.array([0, value], np.uint64))
        for wrong in wrongs:
            text = rf"`indices\[1\]` must be from 0 to 2147483647, got {value}"
            with pytest.raises(ts.ArgumentError, match=text):
                batch(wrong)
    for wrong, got in (
        ([0, 1.0], "float at 1"),
        ([0.0, 1.0], "float at 0"),
        ([0, True], "bool at 1"),
        ([0, "1"], "str at 1"),
        ([0, None], "NoneType at 1"),
        (np.array([0.0, 1.0]), "f64"),
        (np.array([False, True]), r"\|b1"),
        (np.array([0, 1], ">i4"), ">i4"),
        (3, "int"),
    ):
        with pytest.raises(TypeError, match=f"`indices` must be .*whole numbers, got {got}"):
            batch(wrong)
    with pytest.raises(ValueError, match=r"`indices` must be of one dimension, its shape is \(1, 2\)"):
        batch(np.array([[0, 1]]))
    with pytest.raises(ValueError, match="`indptr` must have 2 entries for 1 rows, got 3"):
        batch(indptr=[0, 1, 2])
    with pytest.raises(ValueError, match="`indptr` must end with the number of indices, 2, got 1"):
        batch(indptr=[0, 1])
    with pytest.raises(ValueError, match="`sequence_indices` must have 1 entries for 1 rows, got 2"):
        batch(sequence_indices=[0, 1])
    for candidates in ([[1, 2]], [1, 2], np.array([[1, 2]])):
        assert batch([0, 1], candidates=candidates).num_rows == 1
    with pytest.raises(ValueError, match="`candidates` must have rows of 2 entries, got 3"):
        batch(candidates=[[1, 2, 3]])
    with pytest.raises(ts.Error) as caught:
        batch(last_page_len=[9])
    assert caught.value.status == "TS_STATUS_TABLE"


def test_shapes_types_and_strides(device: ts.Device, draw: Draw) -> None:
    ctx = ts.Context(device, config(), max_rows=1, max_block_len=1, max_kv_tokens=64)
    batch = ts.Batch(PAGE, [0, 1], [0, 1], [0], [1])
    heads = draw(1, HQ, D)
    part = np.zeros((1, HQ), np.dtype([("head", "<f4", D), ("flag", "u1")]))["head"]
    unaligned = np.zeros(4 * HQ * D + 1, np.uint8)[1:].view(np.float32).reshape(1, HQ, D)
    for text, q in {
        r"`q` must have shape \(1, 4, 16\), got \(2, 4, 16\)": draw(2, HQ, D),
        r"`q` must have shape \(1, 4, 16\), got \(16,\)": draw(D),
        r"`q` must have at most 8 dimensions, got 9": draw(*[1] * 9),
        "`q` must have adjacent elements in its last dimension, its strides are": draw(1, HQ, 2 * D)[:, :, ::2],
        "`q` must have strides above 0, its strides are": heads[:, ::-1],
        "`q` must have strides of whole elements, 4 bytes, its strides are": part,
        "`q` must be at an address divisible by 4, got 0x": unaligned,
    }.items():
        with pytest.raises(ts.ArgumentError, match=text):
            ctx.pool(batch, q)
    with pytest.raises(ValueError, match="`q` must have strides above 0"):
        ctx.pool(batch, np.broadcast_to(heads[:, :1], heads.shape))
    for dtype, name in (
        (np.float16, "f16"),
        (np.float64, "f64"),
        (np.complex64, "<c8"),
        (">f4", ">f4"),
        (np.int8, r"\|i1"),
    ):
        with pytest.raises(TypeError, match=f"`q` must be f32, got {name}"):
            ctx.pool(batch, heads.astype(dtype))
    kv = ts.KvView(draw(1, PAGE, HKV, D), draw(1, PAGE, HKV, D))
    with pytest.raises(ValueError, match="`out` must be contiguous"):
        ctx.attend_dense(batch, kv, heads, out=draw(1, HQ, 2 * D)[:, :, :D])
    with pytest.raises(ValueError, match=r"`lse` must have shape \(1, 4\), got \(4, 1\)"):
        ctx.attend_dense(batch, kv, heads, lse=draw(HQ, 1))
    with pytest.raises(TypeError, match="`out` must be f32, got f64"):
        ctx.attend_dense(batch, kv, heads, out=heads.astype(np.float64))
    with pytest.raises(
        ValueError,
        match=r"must have the same four dimensions, \[num_pages, page_size, num_kv_heads, head_dim\] with layout=\"NHD\", "
        r"got \(1, 4, 2, 16\) and \(2, 4, 2, 16\)",
    ):
        ctx.score(batch, ts.KvView(draw(1, PAGE, HKV, D), draw(2, PAGE, HKV, D)))
    with pytest.raises(TypeError, match="`v pages` must be f32, got f16"):
        ctx.score(batch, ts.KvView(draw(1, PAGE, HKV, D), draw(1, PAGE, HKV, D).astype(np.float16)))
    with pytest.raises(ts.Error, match="cpu has no `capture`") as caught:
        device.capture(lambda: None)
    assert isinstance(caught.value, NotImplementedError)
    with pytest.raises(ValueError, match="`name` must be one of queries"):
        ctx.workspace("vote")
    assert device.workspace_bytes(config(), max_kv_tokens=64) > 64 * HQ * 4


def test_memory_that_cannot_be_written(device: ts.Device, draw: Draw, tmp_path: Path) -> None:
    """Read-only arrays, and files mapped to be read, where a write would be a segmentation fault."""
    cfg = config()
    cache = ts.Cache(device, cfg, num_pages=8, page_size=PAGE)
    ctx = ts.Context(device, cfg, max_rows=2, max_block_len=1, max_kv_tokens=64)
    batch = cache.extend([(cache.create(), 1)])
    q, k, v = (draw(1, heads, D) for heads in (HQ, HKV, HKV))
    draw(1, HQ, D).tofile(tmp_path / "out")
    draw(2, 1, PAGE, HKV, D).tofile(tmp_path / "pages")
    mapped: Any = np.memmap(tmp_path / "out", np.float32, "r", shape=(1, HQ, D))
    constant = np.zeros_like(q)
    constant.flags.writeable = False
    for out in (constant, mapped, mapped[:]):
        with pytest.raises(ts.ArgumentError, match="`out` must be memory that can be written, it is read-only"):
            ctx.step(cache, 0, batch, q, k, v, out=out)
    with pytest.raises(ts.ArgumentError, match="`lse` must be memory that can be written, it is read-only"):
        ctx.step(cache, 0, batch, q, k, v, lse=mapped[:, :, 0])
    pages: Any = np.memmap(tmp_path / "pages", np.float32, "r", shape=(2, 1, PAGE, HKV, D))
    one = ts.Batch(PAGE, [0, 1], [0, 1], [0], [1])
    reader = ts.Context.for_prefill(device, cfg, block_len=2, max_kv_len=8)
    for kv in (
        ts.KvView(pages[0], pages[1]),
        ts.KvView(pages[0], pages[1].copy()),
        ts.KvView(pages[0].copy(), pages[1]),
    ):
        for write in (
            lambda: ctx.append(one, kv, k, v),
            lambda: ctx.append_select(one, kv, q, k, v),
            lambda: reader.prefill_kv(one.in_pieces(reader, 2), kv, q, k, v),
        ):
            with pytest.raises(ts.ArgumentError, match="`kv` must be memory that can be written, it is read-only"):
                write()
        ctx.select(one, kv, mapped)
        np.testing.assert_allclose(ctx.attend(one, kv, mapped)[0, 0], pages[1, 0, 0, 0], rtol=1e-6)
    with pytest.raises(ts.ArgumentError, match="`kv` must be memory that can be written: take `Cache.layer_mut`"):
        ctx.append(batch, cache.layer(0), k, v)
    ctx.append(batch, cache.layer_mut(0), k, v)


def test_overlap(device: ts.Device, draw: Draw) -> None:
    """What is written is apart from everything else that a call is given, and from the library's own memory."""
    cfg = config()
    ctx = ts.Context(device, cfg, max_rows=2, max_block_len=8, max_kv_tokens=64)
    pool = draw(2, 4, PAGE, HKV, D)
    kv, batch = ts.KvView(pool[0], pool[1]), ts.Batch(PAGE, [0, 8], [0, 2], [0, 1], [PAGE])
    q, k, v = (draw(8, heads, D) for heads in (HQ, HKV, HKV))
    ctx.append_select(batch, kv, q, k, v)
    both = (
        "is written and must not overlap `{}`: it is at .0x[0-9a-f]+, 0x[0-9a-f]+., that at .0x[0-9a-f]+, 0x[0-9a-f]+."
    )
    lse = np.zeros(8 * HQ * (D + 1), np.float32)
    head = pool.reshape(-1)[: 8 * HQ * D].reshape(8, HQ, D)
    wrongs: dict[str, Callable[[], object]] = {
        "`out` " + both.format("q"): lambda: ctx.attend(batch, kv, q, out=q),
        "`out` " + both.format("lse"): lambda: ctx.attend(
            batch, kv, q, lse[: 8 * HQ * D].reshape(8, HQ, D), lse[8 * HQ * D - 9 :][: 8 * HQ].reshape(8, HQ)
        ),
        "`out` " + both.format("k pages"): lambda: ctx.attend(batch, kv, q, out=head),
        "`k pages` " + both.format("k"): lambda: ctx.append(batch, kv, pool.reshape(-1)[: k.size].reshape(k.shape), v),
        "`v pages` " + both.format("v"): lambda: ctx.append(
            batch, kv, k, pool[1].reshape(-1)[: k.size].reshape(k.shape)
        ),
        "`k pages` " + both.format("v pages"): lambda: ctx.append(batch, ts.KvView(pool[0], pool[0]), k, v),
        "`q` " + both.format("the context's workspace"): lambda: ctx.pool(
            ts.Batch(PAGE, [0, 2], [0, 2], [0, 1], [PAGE]), np.asarray(ctx.workspace("queries"))
        ),
        "`out` " + both.format("parts"): lambda: ctx.merge(q[None], draw(1, 8, HQ), out=q),
    }
    for text, wrong in wrongs.items():
        with pytest.raises(ts.ArgumentError, match=text):
            wrong()
    cache = ts.Cache(device, cfg, num_pages=4, page_size=PAGE)
    rows = cache.extend([(cache.create(), 8)])
    keys = np.asarray(cache.layer(0).k).reshape(-1)
    steps: dict[str, Callable[[], object]] = {
        "`k` " + both.format("keys of the cache"): lambda: ctx.step(
            cache, 0, rows, q, keys[: k.size].reshape(k.shape), v
        ),
        "`keys of the cache` " + both.format("v"): lambda: ctx.append(
            rows, (cache, 0), k, keys[: k.size].reshape(k.shape)
        ),
    }
    for text, step in steps.items():
        with pytest.raises(ts.ArgumentError, match=text):
            step()
    np.testing.assert_array_equal(keys, 0)


def test_another_device(device: ts.Device, emulated: ts.Device, draw: Draw) -> None:
    cfg = config(dtype="bf16", head_dim=64)
    ctx = ts.Context(emulated, cfg, max_rows=1, max_block_len=1, max_kv_tokens=16)
    batch, q = ts.Batch(PAGE, [0, 1], [0, 1], [0], [1]), np.zeros((1, HQ, 64), np.uint16)
    with pytest.raises(
        TypeError, match="`q` must be a tensor with `data_ptr` or `__cuda_array_interface__` on emulated"
    ):
        ctx.pool(batch, q)
    with pytest.raises(ts.ArgumentError, match="`q` must be on emulated, it is on cpu"):
        ctx.pool(batch, device.to_device(q))
    with pytest.raises(ts.ArgumentError, match="`q` must be on emulated, it is on emulated, another one"):
        ctx.pool(batch, ts.Device.emulated().to_device(q))
    with pytest.raises(ts.ArgumentError, match="`q` must be on cpu, it is on emulated"):
        ts.Context(device, cfg, max_rows=1, max_kv_tokens=16).pool(batch, emulated.to_device(q))
    ctx.pool(batch, emulated.to_device(q))
    with pytest.raises(ts.Error, match="must be on") as caught:
        ctx.step(
            ts.Cache(device, cfg, page_size=PAGE),
            0,
            batch,
            *(emulated.to_device(np.zeros((1, n, 64), np.uint16)) for n in (HQ, HKV, HKV)),
        )
    assert caught.value.status in ("TS_STATUS_WRONG_DEVICE", "TS_STATUS_MISSING")


def test_exceptions() -> None:
    """One family, of which each is also what Python expects."""
    assert ts.Error is ts.TokenSelectError
    for kind, also in {
        ts.ArgumentError: ValueError,
        ts.ArgumentTypeError: TypeError,
        ts.OutOfRangeError: IndexError,
        ts.OutOfMemoryError: MemoryError,
        ts.OutOfPagesError: RuntimeError,
        ts.UnsupportedError: NotImplementedError,
        ts.BusyError: RuntimeError,
        ts.DefectError: RuntimeError,
    }.items():
        assert issubclass(kind, also) and issubclass(kind, ts.TokenSelectError)
        again = pickle.loads(pickle.dumps(kind("text", "TS_STATUS_LIMIT")))
        assert (type(again), str(again), again.status) == (kind, "text", "TS_STATUS_LIMIT")


@pytest.mark.parametrize("typestr", ["<M8[ns]", "<U1000", "|O", "<c8", "<f0", ">f4", "|V4"])
def test_memory_is_of_plain_numbers(device: ts.Device, typestr: str) -> None:
    """What others count need not be bytes, and objects are not what lies in memory."""

    class Type:
        str = typestr

    with pytest.raises(TypeError, match="`typestr` must be plain numbers of 1, 2, 4 or 8 bytes"):
        ts.Buffer(device, (4,), Type())  # type: ignore[call-overload, unused-ignore]


def test_arrays_of_other_things_are_not_copied(device: ts.Device) -> None:
    arrays = [
        np.array(["x" * 1000] * 4),
        np.array([[], {}], dtype=object),
        np.zeros(3, "<M8[ns]"),
        np.zeros(3, complex),
    ]
    for array in arrays:
        with pytest.raises(TypeError, match="`host` must be plain numbers of 1, 2, 4 or 8 bytes"):
            device.to_device(array)
        buffer = ts.Buffer(device, array.shape, "<u8")
        with pytest.raises(TypeError, match="`host` must be plain numbers of 1, 2, 4 or 8 bytes"):
            buffer.from_host(array)
    assert device.to_device(np.array([True, False])).numpy().tolist() == [True, False]


def test_numbers_of_any_size(device: ts.Device) -> None:
    """Numbers that Python itself does not write out are refused as others are."""
    huge = 10**5000
    cfg = config()
    wrongs: dict[str, Callable[[], object]] = {
        "`page_size` must be from 0 to 18446744073709551615": lambda: ts.Batch(huge, [0, 1], [0, 1], [0], [1]),
        r"`qo_indptr\[1\]` must be from 0 to 2147483647": lambda: ts.Batch(PAGE, [0, huge], [0, 1], [0], [1]),
        "`top_k` must be from 0 to 18446744073709551615": lambda: config(top_k=-huge),
        "`similarity_threshold` must be a number that fits a float": lambda: config(
            selection_cache=True, similarity_threshold=huge
        ),
        "`sm_scale` must be a number that fits a float": lambda: config(sm_scale=huge),
        "`shape` must be from 0 to 18446744073709551615": lambda: ts.Buffer(device, huge, "f32"),
        "`seed` must be from 0 to 18446744073709551615": lambda: ts.Device.emulated(huge),
        "`ordinal` must be from 0 to 2147483647": lambda: ts.Device.cuda(huge),
        "`max_rows` must be from 0 to 18446744073709551615": lambda: ts.Context(device, cfg, max_rows=huge),
    }
    for text, wrong in wrongs.items():
        with pytest.raises(ts.ArgumentError, match=f"{text}, got a number of 16610 bits"):
            wrong()


def test_what_a_numbers_own_code_raises(device: ts.Device) -> None:
    """It comes out as it is; what says that it is no number is told so."""

    class Number:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def __index__(self) -> int:
            raise self.error

    batch = ts.Batch(PAGE, [0, 1], [0, 1], [0], [1])
    with pytest.raises(ZeroDivisionError):
        batch.row(Number(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        ts.Batch(PAGE, [0, Number(ZeroDivisionError())], [0, 1], [0], [1])  # type: ignore[list-item]
    for wrong in (Number(TypeError()), np.array([1, 2]), 1.0, "1", None):
        with pytest.raises(ts.ArgumentTypeError, match="`row` must be a whole number, got"):
            batch.row(wrong)  # type: ignore[arg-type]


def test_interfaces_that_are_malformed(device: ts.Device, draw: Draw) -> None:
    """Whatever an array says of itself, the error is of this package's family and names the argument."""
    ctx = ts.Context(device, config(), max_rows=1, max_block_len=1, max_kv_tokens=64)
    batch, q = ts.Batch(PAGE, [0, 1], [0, 1], [0], [1]), draw(1, HQ, D)
    good = {"data": (q.ctypes.data, False), "shape": q.shape, "typestr": "<f4", "version": 3}

    class Told:
        def __init__(self, interface: Any) -> None:
            self.__array_interface__ = interface

    ctx.pool(batch, Told(good))
    kv = ts.KvView(draw(1, PAGE, HKV, D), draw(1, PAGE, HKV, D))
    with pytest.raises(ts.ArgumentTypeError, match="`out` must be given where tensors are Told"):
        ctx.attend_dense(batch, kv, Told(good))
    wrongs: list[tuple[str, Any]] = [
        ("must be an array whose interface is a dict, got int", 5),
        ("must be an array whose interface has `data`, got none", {}),
        (
            "must be an array whose interface has an address and whether it is read-only as its `data`, got 5",
            {"data": 5},
        ),
        ("has an address and .*, got \\(-8, False\\)", {"data": (-8, False)}),
        (f"has an address and .*, got \\({2**64}, False\\)", {"data": (2**64, False)}),
        ("a type string as its `typestr`, got 5", {"typestr": 5}),
        ("`q` must be f32, got é", {"typestr": "é"}),
        ("a tuple of sizes as its `shape`, got \\[1, 4, 16\\]", {"shape": [1, 4, 16]}),
        ("a tuple of sizes as its `shape`, got \\(-1, 4, 16\\)", {"shape": (-1, 4, 16)}),
        (f"a tuple of sizes as its `shape`, got \\(1, 4, {2**70}\\)", {"shape": (1, 4, 2**70)}),
        ("a tuple of sizes as its `shape`, got \\(1, 4, 'x'\\)", {"shape": (1, 4, "x")}),
        ("must have at most 8 dimensions, got 20", {"shape": (1,) * 20}),
        ("must be of at most isize::MAX bytes, its shape is", {"shape": (2**40, 2**40, 16)}),
        ("a tuple of 3 steps, one for each dimension, as its strides, got \\(4,\\)", {"strides": (4,)}),
        ("a tuple of 3 steps, one for each dimension, as its strides, got \\(\\)", {"strides": ()}),
        ("a tuple of 3 steps, .*, got \\[256, 64, 4\\]", {"strides": [256, 64, 4]}),
        (f"a tuple of 3 steps, .*, got \\({2**70}, 64, 4\\)", {"strides": (2**70, 64, 4)}),
        ("must have strides of whole elements, 4 bytes", {"strides": (1, 2, 3)}),
        ("must have memory, its address is 0", {"data": (0, False)}),
        ("must have memory, its address is 0", {"data": (None, False)}),
        ("must be an array without a mask", {"mask": q}),
    ]
    for text, fields in wrongs:
        given = {**good, **fields} if fields and isinstance(fields, dict) else fields
        with pytest.raises(ts.TokenSelectError, match=f"`q`.*{text}|{text}") as caught:
            ctx.pool(batch, Told(given))
        assert "`q`" in str(caught.value)

    class Structured(np.ndarray[Any, Any]):
        told: Any = None

        @property
        def __array_struct__(self) -> Any:
            return self.told

    import datetime

    for told in (5, None, datetime.datetime_CAPI):
        array = q.view(Structured)
        array.told = told
        with pytest.raises(
            ts.ArgumentTypeError, match="`q` must be an array whose `__array_struct__` is a capsule of the protocol"
        ):
            ctx.pool(batch, array)


def test_masked_arrays(device: ts.Device, draw: Draw) -> None:
    """No operation heeds a mask, so that an array with one is not taken for its elements."""
    ctx = ts.Context(device, config(), max_rows=1, max_block_len=1, max_kv_tokens=64)
    batch, q = ts.Batch(PAGE, [0, 1], [0, 1], [0], [1]), draw(1, HQ, D)
    pages = draw(1, PAGE, HKV, D)
    text = "must be an array without a mask, it is masked: pass one with its masked elements filled"
    for mask in (True, np.ma.nomask):
        with pytest.raises(ts.ArgumentError, match=f"`q` {text}"):
            ctx.pool(batch, np.ma.masked_array(q, mask=mask))
        with pytest.raises(ts.ArgumentError, match=f"`v pages` {text}"):
            ctx.attend_dense(batch, ts.KvView(pages, np.ma.masked_array(pages, mask=mask)), q)
        with pytest.raises(ts.ArgumentError, match=f"`indices` {text}"):
            ts.Batch(PAGE, [0, 1], [0, 1], np.ma.masked_array([0], mask=mask), [1])
        with pytest.raises(ts.ArgumentError, match=f"`host` {text}"):
            device.to_device(np.ma.masked_array(q, mask=mask))
    ctx.pool(batch, np.ma.masked_array(q, mask=True).filled(0))


def test_lists_without_end(device: ts.Device) -> None:
    """Are refused, or run out of memory, as an exception."""
    cfg = config()
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: ts.Buffer(device, itertools.count(1), "<f4"), "`shape` must have up to 8 dimensions"),
        (lambda: ts.Buffer(device, range(10**12), "<f4"), "`shape` must have up to 8 dimensions"),
        (lambda: ts.Context(device, cfg, operations=itertools.repeat("append")), "`operations` must be some of"),
    ]
    for call, text in refused:
        with pytest.raises(ts.ArgumentError, match=text):
            call()


def test_tables_without_an_order() -> None:
    """A set has the same numbers in an order of its own."""
    for pages in ({3, 1}, frozenset((3, 1)), {3: 0, 1: 0}):
        with pytest.raises(ts.ArgumentTypeError, match="`kv_indices` must be|`indices` must be"):
            ts.Batch(4, [0, 1], [0, 2], pages, [4])
