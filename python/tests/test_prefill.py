"""Prompts of any length."""

from __future__ import annotations

import numpy as np
import pytest

import tokenselect as ts
from definitions import HKV, HQ, PAGE, THETA, Array, D, Draw, attend, config, select, view


def test_prefill(device: ts.Device, draw: Draw) -> None:
    """Prompts piece by piece, against the definitions; a function that stops, or raises."""
    for fields in [{}, dict(positions="reassigned", rope=dict(theta=THETA))]:
        cfg = config(**fields)
        cache = ts.Cache(device, cfg, num_layers=2, num_pages=32, page_size=PAGE)
        ctx = ts.Context.for_prefill(device, cfg, block_len=6, max_kv_len=40, max_piece_len=24)
        first, second = cache.create(), cache.create()
        pieces = cache.extend_in_pieces(ctx, [(first, 37), (second, 20)], 6)
        assert (pieces.num_pieces, pieces.num_blocks, pieces.block_len) == (3, 11, 6)
        q, k, v = (draw(57, heads, D) for heads in (HQ, HKV, HKV))
        told = []
        out, lse = ctx.prefill(cache, 0, pieces, q, k, v, lse=True, progress=lambda *at: told.append(at))
        assert told == [(24, 57), (43, 57), (57, 57)]
        for begin, end in ((0, 37), (37, 57)):
            for block in range(begin, end, 6):
                of_block, seen = slice(block, min(block + 6, end)), slice(begin, min(block + 6, end))
                queries = q[of_block].astype(np.float64)
                _, tokens = select(cfg, queries, k[seen].astype(np.float64))
                want_out, want_lse = attend(cfg, queries, k[seen], v[seen], tokens)
                np.testing.assert_allclose(out[of_block], want_out, atol=1e-5)
                np.testing.assert_allclose(lse[of_block], want_lse, atol=1e-5)

        given = np.full_like(q, 7)
        stopped = ctx.prefill(cache, 1, pieces, q, k, v, out=given, progress=lambda done, _: done < 43)
        assert stopped is given
        np.testing.assert_array_equal(given[:43], out[:43])
        np.testing.assert_array_equal(given[43:], 7)
        assert [cache.written_len(1, sequence) for sequence in (first, second)] == [37, 6]
        with pytest.raises(ZeroDivisionError):
            ctx.prefill(cache, 1, pieces, q, k, v, progress=lambda done, total: done / 0)
        np.testing.assert_array_equal(ctx.prefill(cache, 1, pieces, q, k, v), out)

        pools = [np.full((16, PAGE, HKV, D), np.nan, np.float32) for _ in "kv"]
        batch = ts.Batch(PAGE, [0, 37, 57], [0, 10, 15], range(15), [1, 4], sequence_indices=[0, 1])
        own = batch.in_pieces(ctx, 6)
        np.testing.assert_array_equal(ctx.prefill_kv(own, view(pools), q, k, v), out)

    with pytest.raises(ValueError, match=r"`q` must have shape \(57, 4, 16\), got \(56, 4, 16\)"):
        ctx.prefill(cache, 0, pieces, q[1:], k, v)
    with pytest.raises(ts.Error, match="`max_workspace_bytes` must be at least .*, got 1000"):
        ts.Context.for_prefill(device, cfg, max_workspace_bytes=1000)
    with pytest.raises(TypeError, match="unexpected keyword argument 'block'"):
        ts.Context.for_prefill(device, cfg, block=6)  # type: ignore[call-arg]
    with pytest.raises(ts.Error, match="`max_block_len` is limited to 6, the batch needs 7"):
        cache.extend_in_pieces(ctx, [(cache.create(), 8)], 7)
    text = "out of pages: .* free: `num_pages`=32 of `page_size`=4 hold 128 tokens of all sequences together, make the cache with more"
    with pytest.raises(ts.OutOfPagesError, match=text) as caught:
        cache.extend_in_pieces(ctx, [(second, 1), (cache.create(), 40), (cache.create(), 40)], 6)
    assert (caught.value.status, cache.len(second)) == ("TS_STATUS_OUT_OF_PAGES", 20)


def test_buffers_that_progress_closes(device: ts.Device, draw: Draw) -> None:
    """Memory that a call works on cannot be closed before it returns."""
    cfg = config()
    cache = ts.Cache(device, cfg, num_pages=512, page_size=PAGE)
    ctx = ts.Context.for_prefill(device, cfg, block_len=4, max_kv_len=512, max_piece_len=4)
    tensors = [draw(400, heads, D) for heads in (HQ, HKV, HKV)]
    pieces = cache.extend_in_pieces(ctx, [(cache.create(), 400)], 4)
    want = ctx.prefill(cache, 0, pieces, tensors[0], tensors[1], tensors[2])
    q, k, v = (device.to_device(tensor) for tensor in tensors)
    others: list[ts.Buffer] = []

    def close(done: int, total: int) -> None:
        for buffer in (q, k, v):
            with pytest.raises(
                ts.BusyError, match="`buffer` is at work in another call.* must not be closed meanwhile"
            ):
                buffer.close()
        others.extend(device.to_device(np.full_like(tensor, np.nan)) for tensor in tensors)

    out = ctx.prefill(cache, 0, pieces, q, k, v, np.empty_like(want), progress=close)
    np.testing.assert_array_equal(out, want)
    q.close()
    with pytest.raises(ts.Error, match="`buffer` was closed"):
        q.numpy()


def test_longest_sequence(device: ts.Device, draw: Draw) -> None:
    """`max_kv_len` is a limit, by its own name, whatever room is left by the pages."""
    cfg = config()
    cache = ts.Cache(device, cfg, num_pages=512, page_size=PAGE)
    ctx = ts.Context.for_prefill(device, cfg, block_len=4, max_kv_len=100)
    longer = ts.Context.for_prefill(device, cfg, block_len=4, max_kv_len=101)
    assert (ctx.max_kv_len, ts.Context(device, cfg, max_kv_tokens=64).max_kv_len) == (100, None)
    sequence, other = cache.create(), cache.create()
    q, k, v = (draw(101, heads, D) for heads in (HQ, HKV, HKV))
    text = "`max_kv_len` is limited to 100, a sequence would have {} tokens: make the limit of `Context.for_prefill` larger"
    with pytest.raises(ts.ArgumentError, match=text.format(101)) as caught:
        cache.extend_in_pieces(ctx, [(other, 1), (sequence, 101)], 4)
    assert (caught.value.status, cache.len(other), cache.len(sequence)) == ("TS_STATUS_LIMIT", 0, 0)
    pieces = cache.extend_in_pieces(ctx, [(sequence, 100)], 4)
    ctx.prefill(cache, 0, pieces, q[:100], k[:100], v[:100])
    with pytest.raises(ts.ArgumentError, match=text.format(2**60 + 100)):
        cache.extend_in_pieces(ctx, [(sequence, 2**60)], 4)
    with pytest.raises(ts.ArgumentError, match=text.format(101)):
        ctx.prefill(cache, 0, cache.extend_in_pieces(longer, [(sequence, 1)], 4), q[:1], k[:1], v[:1])
    pools = [np.zeros((26, PAGE, HKV, D), np.float32) for _ in "kv"]
    batch = ts.Batch(PAGE, [0, 101], [0, 26], range(26), [1])
    with pytest.raises(ts.ArgumentError, match=text.format(101)):
        batch.in_pieces(ctx, 4)
    with pytest.raises(ts.ArgumentError, match=text.format(101)):
        ctx.prefill_kv(batch.in_pieces(longer, 4), view(pools), q, k, v)
    longer.prefill_kv(batch.in_pieces(longer, 4), view(pools), q, k, v)
    # One that stays as long as it is may be longer.
    assert cache.extend_in_pieces(ctx, [(sequence, 0), (other, 5)], 4).num_query_tokens == 5


def test_step_of_a_reader(device: ts.Device, draw: Draw) -> None:
    """What reads prompts cannot decode, and says what is missing in words that the caller knows."""
    cfg = config()
    cache = ts.Cache(device, cfg, num_pages=512, page_size=PAGE)
    ctx = ts.Context.for_prefill(device, cfg, block_len=4, max_kv_len=100)
    batch = cache.extend([(cache.create(), 1)])
    text = "`step` needs the operation `score`, which this was made without: what reads prompts selects for long blocks alone"
    with pytest.raises(ts.Error, match=text) as caught:
        ctx.step(cache, 0, batch, draw(1, HQ, D), draw(1, HKV, D), draw(1, HKV, D))
    assert caught.value.status == "TS_STATUS_MISSING"


def test_what_progress_may_do(device: ts.Device, draw: Draw) -> None:
    """Other objects are free; those at work are neither used nor closed."""
    cfg = config(selection_cache=1)
    cache = ts.Cache(device, cfg, num_layers=1, num_pages=32, page_size=PAGE)
    ctx, other = (ts.Context.for_prefill(device, cfg, block_len=6, max_kv_len=40) for _ in range(2))
    first, second = cache.create(), cache.create()
    pieces, selections = cache.extend_in_pieces(ctx, [(first, 13)], 6), cache.selections()
    q, k, v = (draw(13, heads, D) for heads in (HQ, HKV, HKV))
    for name, forbidden in {
        "context": lambda: ctx.selected(0),
        "context` is at work .* must not be closed": ctx.close,
        "cache": lambda: cache.extend([(second, 1)]),
        "cache` is at work .* must not be closed": cache.close,
        "pieces` is at work .* must not be closed": pieces.close,
        "cache` is at work": selections.reset_stats,
    }.items():
        with pytest.raises(RuntimeError, match=f"`{name}"):
            ctx.prefill(cache, 0, pieces, q, k, v, progress=lambda *_: forbidden())
    pools = [np.zeros((4, PAGE, HKV, D), np.float32) for _ in "kv"]
    own = ts.Batch(PAGE, [0, 13], [0, 4], range(4), [1]).in_pieces(other, 6)
    told: list[Array] = []

    def read_another(*_: int) -> None:
        told.append(other.prefill_kv(own, view(pools), q, k, v))

    out = ctx.prefill(cache, 0, pieces, q, k, v, progress=read_another)
    np.testing.assert_array_equal(told[0], out)
    for stops in (False, np.bool_(False), 0):
        dones: list[int] = []

        def stop(done: int, _: int) -> object:
            dones.append(done)
            return stops

        ctx.prefill(cache, 0, pieces, q, k, v, progress=stop)
        assert len(dones) == 1
    for closed in (pieces, ctx, cache):
        closed.close()
