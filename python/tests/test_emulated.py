"""GPU kernels, in the emulator."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tokenselect as ts
from definitions import HKV, HQ, PAGE, Slice, config, tables, to_bf16, view


def decoding(device: ts.Device, seed: int, max_kv_tokens: int) -> tuple[ts.Context, ts.KvView, ts.Buffer]:
    """What a step of one query over eight pages needs: a context, the pages and the query."""
    random = np.random.default_rng(seed)
    ctx = ts.Context(
        device, config(dtype="bf16", head_dim=64), max_rows=1, max_block_len=1, max_kv_tokens=max_kv_tokens
    )
    shapes = [(8, PAGE, HKV, 64)] * 2 + [(1, HQ, 64)]
    k, v, q = (device.to_device(to_bf16(random.standard_normal(shape))) for shape in shapes)
    return ctx, ts.KvView(k, v), q


def test_fused(emulated: ts.Device) -> None:
    """Slices of a fused projection on the device."""
    device = emulated
    cfg = config(dtype="bf16", head_dim=64)
    ctx = ts.Context(device, cfg, max_rows=1, max_block_len=8, max_kv_tokens=32)
    results = []
    for fused in (False, True):
        random = np.random.default_rng(6)
        kv = view(device.to_device(to_bf16(np.zeros((8, PAGE, HKV, 64)))) for _ in "kv")
        made = []
        for length, block in ((8, 8), (16, 8), (24, 8), (25, 1)):
            array = to_bf16(random.standard_normal((block, HQ + 2 * HKV, 64)))
            buffer = device.to_device(array)
            parts = np.split(array, [HQ, HQ + HKV], axis=1)
            dense = (device.to_device(np.ascontiguousarray(part)) for part in parts)
            slices = (Slice(buffer, array, part) for part in parts)
            q, k, v = slices if fused else dense
            batch, out = ts.Batch(PAGE, [0, block], *tables(length, 8)), ts.Buffer(device, (block, HQ, 64), "<f4")
            ctx.append_select(batch, kv, q, k, v)
            ctx.attend(batch, kv, q, out)
            made += [ctx.selected(), out.numpy()]
        results.append(made)
    for want, got in zip(*results, strict=True):
        np.testing.assert_array_equal(got, want)


def test_prefill(emulated: ts.Device) -> None:
    """Two prompts of odd lengths on the device, as the processor reads them."""
    device, cfg = emulated, config(dtype="bf16", head_dim=64, n_init=2, n_local=3, top_k=5)
    results = []
    for on in (ts.Device.cpu(), device):
        random = np.random.default_rng(8)
        copy: Callable[[Any], Any] = on.to_device if on is device else lambda array: array
        q, k, v = (copy(to_bf16(random.standard_normal((26, heads, 64)))) for heads in (HQ, HKV, HKV))
        ctx = ts.Context.for_prefill(on, cfg, block_len=5, max_kv_len=20, max_piece_len=10)
        kv = view(copy(to_bf16(np.zeros((8, PAGE, HKV, 64)))) for _ in "kv")
        pieces = ts.Batch(PAGE, [0, 13, 26], [0, 4, 8], range(8), [1, 1]).in_pieces(ctx, 5)
        out, lse = copy(np.zeros((26, HQ, 64), np.float32)), copy(np.zeros((26, HQ), np.float32))
        ctx.prefill_kv(pieces, kv, q, k, v, out=out, lse=lse)
        results.append([np.asarray(x) if on.kind == "cpu" else x.numpy() for x in (out, lse)])
    for want, got in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-2)


def test_select_and_capture(emulated: ts.Device) -> None:
    device = emulated
    random = np.random.default_rng(3)
    cfg = config(dtype="bf16", head_dim=64)
    lists = []
    for on in [ts.Device.cpu(), device]:
        random = np.random.default_rng(3)
        copy: Callable[[Any], Any] = (lambda x: x) if on.kind == "cpu" else on.to_device
        shapes = [(8, PAGE, HKV, 64)] * 2 + [(1, HQ, 64)]
        k, v, q = (copy(to_bf16(random.standard_normal(s))) for s in shapes)
        ctx = ts.Context(on, cfg, max_rows=1, max_block_len=1, max_kv_tokens=32)
        batch = ts.Batch(PAGE, [0, 1], *tables(30, 8))
        ctx.select(batch, ts.KvView(k, v), q)
        lists.append(ctx.selected())
    assert lists[0] == lists[1]
    assert ctx.workspace("selected").numpy()[0, : len(lists[1])].tolist() == lists[1]
    np.testing.assert_array_equal(q.numpy().shape, (1, HQ, 64))

    slot = ts.BatchSlot(device, batch, max_pages=8)
    bound = slot.put(batch)
    kv = ts.KvView(k, v)
    ctx.select(bound, kv, q)
    made, lse = ctx.attend(bound, kv, q, lse=True)  # made like `q`
    assert [(x.shape, x.dtype) for x in (made, lse)] == [((1, HQ, 64), "bf16"), ((1, HQ), "f32")]
    assert np.isfinite(lse.numpy()).all()
    graph = device.capture(lambda: ctx.select(bound, kv, q))
    slot.put(ts.Batch(PAGE, [0, 1], *tables(31, 8)))
    graph.launch()
    assert ctx.selected()[-1] == 30
    with pytest.raises(ZeroDivisionError, match="division"):
        device.capture(lambda: 1 / 0)


def test_graph_holds_what_it_uses(emulated: ts.Device) -> None:
    """Context, batch, pages and tensors of recorded work live as long as the graph."""
    device = emulated
    ctx, kv, q = decoding(device, seed=4, max_kv_tokens=32)
    out = ts.Buffer(device, (1, HQ, 64), "<f4")
    slot = ts.BatchSlot(device, ts.Batch(PAGE, [0, 1], *tables(30, 8)), max_pages=8)
    bound = slot.put(ts.Batch(PAGE, [0, 1], *tables(30, 8)))

    def work(ctx: ts.Context = ctx, bound: ts.Batch = bound, kv: ts.KvView = kv, q: ts.Buffer = q) -> None:
        ctx.select(bound, kv, q)
        ctx.attend(bound, kv, q, out)

    work()
    want = out.numpy()
    graph = device.capture(work)
    used = [weakref.ref(object) for object in (ctx, bound, kv.k, kv.v, q)]
    del work, ctx, bound, kv, q
    gc.collect()
    assert None not in [ref() for ref in used]
    graph.launch()
    np.testing.assert_array_equal(out.numpy(), want)
    del graph
    gc.collect()
    assert [ref() for ref in used] == [None] * len(used)


def test_launches_may_be_separated(emulated: ts.Device) -> None:
    """From what is in front of them in the stream: results are the same."""
    ctx, kv, q = decoding(emulated, seed=3, max_kv_tokens=64)
    batch, chosen = ts.Batch(PAGE, [0, 1], *tables(30, 8)), []
    for _ in range(2):
        ctx.select(batch, kv, q)
        chosen.append((ctx.selected(), ctx.attend(batch, kv, q).numpy().tolist()))
        emulated.separate()
    assert chosen[0] == chosen[1]
    ts.Device.cpu().separate()
    emulated.close()
    with pytest.raises(ts.Error, match="`device` was closed"):
        emulated.separate()


def test_tables_of_other_integers(emulated: ts.Device) -> None:
    """Of 64 bits, and in rows that are parts of longer ones; numbers beyond 32 bits are found, not cut off."""
    device = emulated
    ctx, kv, q = decoding(device, seed=5, max_kv_tokens=64)
    like = ts.Batch(PAGE, [0, 1], *tables(30, 8))
    ctx.select(like, kv, q)
    want = ctx.selected()
    pages = np.array([[9] * 8, [*range(7, -1, -1)]], np.int64)
    slot = ts.BatchSlot(device, like, max_pages=16)

    def copy(array: Any) -> ts.Buffer:
        return device.to_device(np.ascontiguousarray(array))

    for dtype in (np.int32, np.uint32, np.int64, np.uint64):
        wider = np.full((2, 13), 2**31 - 1, dtype)
        wider[:, 2:10] = pages
        whole = copy(wider)
        for entries in (copy(pages.astype(dtype)), Slice(whole, wider, wider[:, 2:10])):
            for other in (np.int32, np.int64):
                rows, length = copy(np.array([1], other)), copy(np.array([30], other))
                ctx.select(slot.translate(entries, length, 8, rows=rows), kv, q)
                assert ctx.selected() == want
    assert slot.faults() == 0
    length = copy(np.array([30], np.int64))
    for entries, given in (
        (copy(pages[1:] | (pages[1:] == 3) * 2**32), length),
        (copy(pages[1:]), copy(np.array([2**32 + 30]))),
    ):
        before = slot.faults()
        slot.translate(entries, given, 8)
        assert slot.faults() == before + 1
    columns = np.asfortranarray(pages)
    text = r"`entries` must have adjacent entries in its rows, its strides are \(1, 2\)"
    with pytest.raises(ts.ArgumentError, match=text):
        slot.translate(Slice(copy(columns.T), columns.T, columns), length, 8)
    with pytest.raises(ts.ArgumentError, match=r"`entries` must have strides of 0 or more, its strides are \(-8, 1\)"):
        slot.translate(Slice(copy(pages), pages, pages[::-1]), length, 8)
    with pytest.raises(ts.ArgumentError, match="`entries` must have two dimensions, got"):
        slot.translate(length, length, 8)
    with pytest.raises(ts.ArgumentTypeError, match="`kv_lens` must be u32 or u64, got f64"):
        slot.translate(copy(pages), copy(np.array([30.0])), 8)


def test_tables_on_the_device(emulated: ts.Device) -> None:
    """Block tables and slots of tokens become a batch's, directly and in recorded work."""
    device = emulated
    ctx, kv, q = decoding(device, seed=5, max_kv_tokens=64)
    like = ts.Batch(PAGE, [0, 1], *tables(30, 8))
    ctx.select(like, kv, q)
    want = ctx.selected()
    pages = np.array([[9] * 8, [*range(7, -1, -1)]], np.int32)
    slots = (PAGE * pages[:, :, None] + np.arange(PAGE, dtype=np.int32)).reshape(2, -1)
    slot = ts.BatchSlot(device, like, max_pages=16)
    rows, length = device.to_device(np.array([1], np.int32)), device.to_device(np.array([30], np.int32))
    for are_slots in (False, True):
        entries = device.to_device(slots if are_slots else pages)
        bound = slot.translate(entries, length, 8, are_slots, rows=rows)
        ctx.select(bound, kv, q)
        assert ctx.selected() == want
    assert (slot.faults(), bound.num_rows, bound.info.max_kv_len) == (0, 1, 32)
    with pytest.raises(ts.Error, match="`row` needs tables on the host"):
        bound.row(0)
    with pytest.raises(ValueError, match=r"`kv_lens` must have shape \(1,\), got \(2,\)"):
        slot.translate(device.to_device(pages), device.to_device(np.zeros(2, np.int32)), 8)
    given = [device.to_device(pages)]
    # Recorded with temporaries, which the graph holds; the length is read at each launch.
    graph = device.capture(lambda: ctx.select(slot.translate(given.pop(), length, 8, rows=rows), kv, q))
    graph.launch()
    assert ctx.selected() == want
    length.from_host(np.array([29], np.int32))
    graph.launch()
    assert ctx.selected()[-1] == 28
    slot.translate(device.to_device(pages), device.to_device(np.array([30], np.int32)), 8)  # row 0: pages beyond 8
    assert slot.faults() > 0
