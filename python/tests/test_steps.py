"""Steps and operations on the processor, against the definitions in NumPy."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest

import tokenselect as ts
from definitions import (
    HKV,
    HQ,
    PAGE,
    THETA,
    Array,
    D,
    Draw,
    StandIn,
    attend,
    config,
    from_bf16,
    select,
    tables,
    to_bf16,
    view,
)


def test_owned_cache(device: ts.Device, draw: Draw) -> None:
    for fields in [{}, dict(positions="reassigned", rope=dict(theta=THETA))]:
        cfg = config(**fields)
        cache = ts.Cache(device, cfg, num_layers=1, num_pages=16, page_size=PAGE)
        ctx = ts.Context(device, cfg, max_rows=1, max_block_len=8, max_kv_tokens=64)
        sequence = cache.create()
        keys, values = np.zeros((0, HKV, D)), np.zeros((0, HKV, D))
        for block in [8, 8, 8, 1, 1]:
            q, k, v = draw(block, HQ, D), draw(block, HKV, D), draw(block, HKV, D)
            keys, values = np.concatenate([keys, k]), np.concatenate([values, v])
            batch = cache.extend([(sequence, block)])
            out, lse = ctx.step(cache, 0, batch, q, k, v, lse=True)
            votes, tokens = select(cfg, q.astype(np.float64), keys)
            assert ctx.selected() == tokens
            want_out, want_lse = attend(cfg, q.astype(np.float64), keys, values, tokens)
            np.testing.assert_allclose(out, want_out, atol=1e-5)
            np.testing.assert_allclose(lse, want_lse, atol=1e-5)
            if votes is not None:
                shown = np.asarray(ctx.workspace("votes"))[cfg.n_init : cfg.n_init + len(votes)]
                np.testing.assert_allclose(shown, votes, atol=1e-5)
                assert ctx.workspace("votes").numpy().shape == (64,)
        assert cache.len(sequence) == 26
        out = np.empty_like(q)
        assert ctx.attend_dense(batch, cache.layer(0), q, out=out) is out
        want_out, _ = attend(cfg, q.astype(np.float64), keys, values, list(range(26)))
        np.testing.assert_allclose(out, want_out, atol=1e-5)
        cache.free(sequence)
        assert cache.num_free_pages == 16


def test_borrowed_cache(device: ts.Device, draw: Draw) -> None:
    """bf16, keys and values among each other in both layouts, one operation at a time."""
    cfg = config(dtype="bf16", selection_cache=1, similarity_threshold=0.5)
    layouts: list[Literal["NHD", "HND"]] = ["NHD", "HND"]
    for layout in layouts:
        shape = (PAGE, HKV, D) if layout == "NHD" else (HKV, PAGE, D)
        pool = np.full((16, 2, *shape), 0x7FC0, dtype=np.uint16)  # NaN
        kv = view((pool[:, 0], pool[:, 1]), layout)
        ctx = ts.Context(device, cfg, max_rows=1, max_block_len=8, max_kv_tokens=64)
        selections = ts.SelectionCache(device, cfg, num_layers=2, num_sequences=4)
        keys, values = np.zeros((0, HKV, D)), np.zeros((0, HKV, D))
        for block in [8, 8, 1, 1]:
            q, k, v = (to_bf16(draw(block, heads, D)) for heads in (HQ, HKV, HKV))
            keys = np.concatenate([keys, from_bf16(k)])
            values = np.concatenate([values, from_bf16(v)])
            given = tables(len(keys), 16)
            batch = ts.Batch(PAGE, np.array([0, block]), *given, sequence_indices=[3])
            ctx.append(batch, kv, k, v)
            ctx.pool(batch, q, selections, layer=1)
            ctx.score(batch, kv)
            ctx.vote(batch)
            ctx.top_k(batch, selections, layer=1)
            out, lse = np.empty((block, HQ, D), np.float32), np.empty((block, HQ), np.float32)
            ctx.attend(batch, kv, q, out, lse)
            _, tokens = select(cfg, from_bf16(q), keys)
            assert ctx.selected() == tokens
            want_out, want_lse = attend(cfg, from_bf16(q), keys, values, tokens)
            np.testing.assert_allclose(out, want_out, atol=1e-4)
            np.testing.assert_allclose(lse, want_lse, atol=1e-4)
            rounded = ctx.attend(batch, kv, q)
            np.testing.assert_allclose(from_bf16(rounded), want_out, atol=1e-2, rtol=1e-2)
        assert batch.row(0).kv_len == 18
        before = selections.stats(1).reused
        ctx.select(batch, kv, q, selections, layer=1)  # the same queries again
        assert (selections.stats(1).reused, selections.stats(0).reused) == (before + 1, 0)


def test_parts(device: ts.Device, draw: Draw) -> None:
    """Attention over two halves of a list, merged."""
    cfg = config()
    ctx = ts.Context(device, cfg, max_rows=1, max_block_len=1, max_kv_tokens=64)
    k, v, q = draw(16, PAGE, HKV, D), draw(16, PAGE, HKV, D), draw(1, HQ, D)
    kv, batch = ts.KvView(k, v), ts.Batch(PAGE, [0, 1], [0, 16], range(16), [PAGE])
    tokens = np.arange(0, 64, 3, dtype=np.int32)
    total = np.array([len(tokens)], dtype=np.int32)
    whole = ctx.attend_to(batch, kv, q, tokens[None], total)
    parts = []
    for ranks in np.split(np.arange(len(tokens), dtype=np.int32), [9]):
        length = np.array([len(ranks)], dtype=np.int32)
        parts.append(ctx.attend_to(batch, kv, q, tokens[ranks][None], length, ranks[None], total, lse=True))
    out = np.empty_like(q)
    ctx.merge(np.stack([out for out, _ in parts]), np.stack([lse for _, lse in parts]), out)
    np.testing.assert_allclose(out, whole, atol=1e-6)


def test_strides(device: ts.Device, draw: Draw) -> None:
    """Keys and values in strides of their own, and behind each other in one row, in either order."""
    cfg = config()
    ctx = ts.Context(device, cfg, max_rows=1, max_block_len=8, max_kv_tokens=64)
    pages = 16
    rows, pair = np.zeros((pages, HKV, PAGE, 2 * D), np.float32), np.zeros((pages, 2, PAGE, HKV, D), np.float32)
    hnd = np.zeros((pages, HKV, PAGE, D), np.float32)
    views = [
        ts.KvView(np.zeros((pages, PAGE, HKV, D), np.float32), np.zeros((pages, PAGE, HKV, D), np.float32)),
        ts.KvView(rows[..., :D], rows[..., D:], "HND"),
        ts.KvView(rows[..., D:], rows[..., :D], "HND"),
        ts.KvView(pair[:, 1], pair[:, 0]),
        ts.KvView(np.zeros((pages, PAGE, HKV, D), np.float32), hnd.transpose(0, 2, 1, 3)),
    ]
    q, k, v = (draw(8, heads, D) for heads in (HQ, HKV, HKV))
    results = []
    for kv in views:
        for length in (8, 16, 24):
            batch = ts.Batch(PAGE, [0, 8], *tables(length, pages))
            ctx.append_select(batch, kv, q, k + length, v - length)
        results.append((ctx.selected(), ctx.attend(batch, kv, q)))
    for tokens, out in results:
        assert tokens == results[0][0]
        np.testing.assert_array_equal(out, results[0][1])
    np.testing.assert_array_equal(hnd[pages - 1].transpose(1, 0, 2), v[:PAGE] - 8)
    with pytest.raises(ValueError, match="`k pages` must have adjacent elements in the last dimension"):
        ctx.score(batch, ts.KvView(rows[..., ::2], rows[..., ::2], "HND"))


def test_fused(device: ts.Device, draw: Draw) -> None:
    """Slices of a fused projection are taken as they are, and give the bits of dense tensors."""
    cfg = config()
    ctx = ts.Context(device, cfg, max_rows=1, max_block_len=8, max_kv_tokens=64)

    def run(of: Callable[[Array], Array], cast: Callable[[Array], Any] = lambda tensor: tensor) -> list[Any]:
        """What every function makes of `[tokens, heads, D]` that are `of(fused)`."""
        random = np.random.default_rng(9)
        cache = ts.Cache(device, cfg, num_pages=32, page_size=PAGE)
        sequences, kv = [cache.create(), cache.create()], cache.layer(0)
        made: list[Any] = []
        for block in (8, 8, 1, 1):
            fused = random.standard_normal((block, HQ + 2 * HKV, D)).astype(np.float32)
            q, k, v = (cast(of(part)) for part in np.split(fused, [HQ, HQ + HKV], axis=1))
            out, lse = np.empty((block, HQ, D), np.float32), np.empty((block, HQ), np.float32)
            given = dict(out=cast(out), lse=cast(lse))
            batch = cache.extend([(sequences[0], block)])
            step = ctx.step if block == 8 else ctx.step_dense
            step(cache, 0, batch, q, k, v, **given)
            made += [out.copy(), lse.copy()]
            batch = cache.extend([(sequences[1], block)])
            ctx.append(batch, (cache, 0), k, v)
            ctx.pool(batch, q)
            ctx.score(batch, kv)
            ctx.vote_top_k(batch)
            ctx.attend(batch, kv, q, **given)
            made += [out.copy(), lse.copy(), ctx.selected()]
            ctx.select(batch, kv, q)
            length = np.array([len(ctx.selected())], np.int32)
            ctx.attend_to(batch, kv, q, np.array([ctx.selected()], np.int32), length, **given)
            made += [out.copy(), lse.copy()]
            ctx.attend_dense(batch, kv, q, **given)
            made += [out.copy(), lse.copy()]
        return made

    def heads_first(part: Array) -> Array:
        return np.ascontiguousarray(part.transpose(1, 0, 2)).transpose(1, 0, 2)

    want = run(np.ascontiguousarray)
    stand_in = lambda tensor: StandIn(tensor, "float32")
    for results in (run(lambda part: part), run(heads_first), run(lambda part: part, stand_in)):
        for got, want_one in zip(results, want, strict=True):
            np.testing.assert_array_equal(got, want_one)


def test_own_results(device: ts.Device, draw: Draw) -> None:
    """Logits by their index, votes and lists of one's own, and what comes too early."""
    cfg = config()
    ctx = ts.Context(device, cfg, max_rows=1, max_block_len=1, max_kv_tokens=64)
    k, v, q = draw(16, PAGE, HKV, D), draw(16, PAGE, HKV, D), draw(1, HQ, D)
    kv, batch = ts.KvView(k, v), ts.Batch(PAGE, [0, 1], [0, 16], range(16), [PAGE])
    with pytest.raises(ts.Error, match="`score` needs `pool` of the same batch before it") as caught:
        ctx.score(batch, kv)
    assert caught.value.status == "TS_STATUS_ORDER"
    ctx.pool(batch, q)
    ctx.score(batch, kv)
    logits = ctx.workspace("logits").numpy().ravel()
    want = np.einsum("hd,nhd->nh", q[0], np.repeat(k.reshape(64, HKV, D), HQ // HKV, axis=1)) / np.sqrt(D)
    for token in (2, 17, 59):
        got = [logits[ctx.logit_index(batch, 0, token, head)] for head in range(HQ)]
        np.testing.assert_allclose(got, want[token], atol=1e-5)
    with pytest.raises(ts.Error, match="`token` must be below 64, got 64"):
        ctx.logit_index(batch, 0, 64, 0)
    votes = np.asarray(ctx.workspace("votes"))
    votes[:] = np.arange(64) % 10
    ctx.provide("votes", batch)
    ctx.top_k(batch)
    assert ctx.selected() == [0, 1, 9, 19, 29, 39, 49, 60, 61, 62, 63]
    other = ts.Batch(PAGE, [0, 1], [0, 16], range(16), [PAGE])
    with pytest.raises(ts.Error, match="the workspace holds the results of another batch"):
        ctx.attend(other, kv, q)
    ctx.provide("selected", other)
    tokens, length = np.array([ctx.selected()], np.int32), np.array([11], np.int32)
    np.testing.assert_array_equal(ctx.attend(other, kv, q), ctx.attend_to(batch, kv, q, tokens, length))
    with pytest.raises(ValueError, match="`name` must be one of queries"):
        ctx.provide("vote", batch)


def test_ranks(device: ts.Device, draw: Draw) -> None:
    """Two contexts that share the heads, with their products and votes added, decide as one with all heads."""
    fields = dict(selection_cache=1, similarity_threshold=0.8, max_reuse=2)
    pools = [np.zeros((16, PAGE, HKV, D), np.float32) for _ in "kv"]

    def rank(heads: int) -> tuple[ts.Context, ts.SelectionCache]:
        cfg = config(num_qo_heads=heads * HQ // HKV, num_kv_heads=heads, **fields)
        ctx = ts.Context(device, cfg, max_rows=1, max_block_len=8, max_kv_tokens=64)
        return ctx, ts.SelectionCache(device, cfg, num_layers=1, num_sequences=1)

    (whole, reuse), ranks, first = rank(HKV), [rank(1) for _ in range(HKV)], draw(8, HQ, D)
    length, actions, own_differ = 0, [], False
    for step, block in enumerate([8, 8, 8, *[1] * 9]):
        length += block
        q, k, v = first[:block] + 0.3 * draw(block, HQ, D), *(draw(block, HKV, D) for _ in "kv")
        q[:, HQ // 2 :] += (0.7 if step % 2 else 0) * draw(block, HQ // 2, D)
        batch = ts.Batch(PAGE, [0, block], *tables(length, 16), sequence_indices=[0])
        whole.append_select(batch, view(pools), q, k, v, reuse)
        action = whole.workspace("actions").numpy()[0]
        actions.append(action)
        parts = [q[:, HQ // HKV * head :][:, : HQ // HKV] for head in range(HKV)]
        views = [view(pool[:, :, head : head + 1] for pool in pools) for head in range(HKV)]

        def all_reduce(name: str) -> None:
            buffers = [np.asarray(ctx.workspace(name)) for ctx, _ in ranks]
            total = sum(buffers)
            for buffer in buffers:
                buffer[:] = total

        for (ctx, cached), part in zip(ranks, parts, strict=True):
            ctx.pool(batch, part, cached)
            own_differ |= ctx.workspace("actions").numpy()[0] != action
            ctx.pool(batch, part)
            ctx.compare(batch, cached)
        assert ctx.workspace("products").numpy().dtype == np.float64
        all_reduce("products")
        for (ctx, cached), kv in zip(ranks, views, strict=True):
            ctx.decide(batch, cached)
            assert ctx.workspace("actions").numpy()[0] == action
            ctx.score(batch, kv)
            ctx.vote(batch)
        all_reduce("votes")
        for ctx, cached in ranks:
            ctx.top_k(batch, cached)
            assert ctx.selected() == whole.selected()
    assert set(actions) == {1, 2, 3}
    assert own_differ


def test_operations(device: ts.Device, draw: Draw) -> None:
    """A context for some operations, and what a device supports."""
    cfg = config()
    ctx = ts.Context(device, cfg, operations=["vote", "score", "pool"], max_kv_tokens=64)
    q, batch = draw(1, HQ, D), ts.Batch(PAGE, [0, 1], [0, 1], [0], [1])
    kv = ts.KvView(draw(1, PAGE, HKV, D), draw(1, PAGE, HKV, D))
    ctx.select(batch, kv, q)
    with pytest.raises(ts.Error, match="`attend` needs the operation `attend`, which this was made without") as caught:
        ctx.attend(batch, kv, q)
    assert caught.value.status == "TS_STATUS_MISSING"
    for operations in ([], ["append", "step"]):
        with pytest.raises(ValueError, match="`operations` must be some of append, .*, got (none|step)"):
            ts.Context(device, cfg, operations=operations)  # type: ignore[arg-type]
    assert device.supports(cfg)


def test_written_len(device: ts.Device, draw: Draw) -> None:
    """A layer that missed a step says so."""
    cfg = config()
    cache = ts.Cache(device, cfg, num_layers=2, num_pages=16, page_size=PAGE)
    ctx = ts.Context(device, cfg, max_block_len=8, max_kv_tokens=64)
    sequence = cache.create()
    q, k, v = (draw(8, heads, D) for heads in (HQ, HKV, HKV))
    missed = cache.extend([(sequence, 8)])
    blocks = missed.in_blocks(5)
    assert (blocks.num_rows, blocks.info.max_block_len, blocks.row(1).block_len) == (2, 5, 3)
    ctx.step(cache, 0, missed, q, k, v)
    assert [cache.written_len(layer, sequence) for layer in (0, 1)] == [8, 0]
    batch = cache.extend([(sequence, 8)])
    with pytest.raises(ts.Error, match="layer 1 holds the keys and values of 0 tokens") as caught:
        ctx.step(cache, 1, batch, q, k, v)
    assert caught.value.status == "TS_STATUS_UNWRITTEN"
    ctx.append(missed, (cache, 1), k, v)
    ctx.step(cache, 1, batch, q, k, v)
    assert cache.written_len(1, sequence) == 16
    cache.extend([(sequence, 8)])
    cache.layer_mut(0)
    assert [cache.written_len(layer, sequence) for layer in (0, 1)] == [24, 16]


def test_selected_before_a_selection(device: ts.Device, draw: Draw) -> None:
    """No list is not an empty one."""
    ctx = ts.Context(device, config(), max_rows=2, max_block_len=1, max_kv_tokens=64)
    batch, q = ts.Batch(PAGE, [0, 1], [0, 2], [1, 0], [3]), draw(1, HQ, D)
    kv = view((draw(2, PAGE, HKV, D), draw(2, PAGE, HKV, D)))
    text = "`selected` needs `select` of the same batch before it, the workspace holds no selected lists"
    for use in (lambda: None, lambda: ctx.attend_dense(batch, kv, q), lambda: ctx.pool(batch, q)):
        use()
        with pytest.raises(ts.Error, match=text) as caught:
            ctx.selected()
        assert caught.value.status == "TS_STATUS_ORDER"
    ctx.select(batch, kv, q)
    assert ctx.selected() == list(range(7)) and ctx.selected(1) == []


def test_errors_name_sequences_as_the_caller_does(device: ts.Device) -> None:
    """By the number that `create` answered."""
    cache = ts.Cache(device, config(), num_pages=4, page_size=PAGE)
    cache.free(cache.create())
    sequence = cache.create()
    assert sequence > 2**32  # the place of the first one, used again
    cache.extend([(sequence, 3)])
    uses: dict[str, Callable[[], object]] = {
        "holds 3 tokens and cannot be truncated to 4": lambda: cache.truncate(sequence, 4),
        "appears in rows 0 and 1 of one batch": lambda: cache.extend([(sequence, 1), (sequence, 1)]),
        "cannot grow to": lambda: cache.extend([(sequence, 2**40)]),
    }
    for text, use in uses.items():
        with pytest.raises(ts.ArgumentError, match=f"^sequence {sequence} {text}"):
            use()
    cache.free(sequence)
    with pytest.raises(ts.ArgumentError, match=f"^sequence {sequence} is not in this cache"):
        cache.len(sequence)


def test_out_of_pages_says_what_there_are(device: ts.Device) -> None:
    """A cache holds fewer tokens by default than a context has room for."""
    cache = ts.Cache(device, config())
    sequence = cache.create()
    text = (
        "out of pages: 1025 needed, 1024 free: `num_pages`=1024 of `page_size`=16 hold 16384 tokens of all sequences together, "
        "make the cache with more"
    )
    with pytest.raises(ts.OutOfPagesError, match=text) as caught:
        cache.extend([(sequence, 16385)])
    assert caught.value.status == "TS_STATUS_OUT_OF_PAGES"
    cache.extend([(sequence, 16384)])


def test_pages_of_another_shape(device: ts.Device, draw: Draw) -> None:
    """The error has the sizes in the order in which they were given, and says which is which."""
    cfg = config()
    ctx = ts.Context(device, cfg, max_rows=1, max_block_len=1, max_kv_tokens=64)
    batch, q = ts.Batch(PAGE, [0, 1], [0, 2], [1, 0], [3]), draw(1, HQ, D)
    nhd, hnd = draw(2, PAGE, HKV, D), draw(2, HKV, PAGE, D)
    ctx.attend_dense(batch, ts.KvView(hnd, hnd, "HND"), q)
    for pages, layout, shape, dims in (
        (hnd, "NHD", (2, 4, 2, 16), "num_pages, page_size, num_kv_heads, head_dim"),
        (nhd, "HND", (2, 2, 4, 16), "num_pages, num_kv_heads, page_size, head_dim"),
        (nhd[:, :2], "NHD", (2, 4, 2, 16), "num_pages, page_size, num_kv_heads, head_dim"),
    ):
        text = f'`k pages` must have shape {shape}, which is [{dims}] with layout="{layout}", for a batch of page_size 4, got {pages.shape}'
        with pytest.raises(ts.ArgumentError, match=re.escape(text)) as caught:
            ctx.attend_dense(batch, ts.KvView(pages, pages, layout), q)  # type: ignore[arg-type]
        assert caught.value.status == "TS_STATUS_SHAPE"
    cache = ts.Cache(device, cfg, num_pages=2, page_size=8, layout="HND")
    text = (
        '`kv` must have shape (2, 2, 4, 16), which is [num_pages, num_kv_heads, page_size, head_dim] with layout="HND"'
    )
    with pytest.raises(ts.ArgumentError, match=re.escape(text)):
        ctx.attend_dense(batch, cache.layer(0), q)


def test_no_pages(device: ts.Device, draw: Draw) -> None:
    """Pools without pages, whose strides mean nothing, are what batches without tokens need."""
    cfg = config()
    ctx = ts.Context(device, cfg, max_rows=2, max_block_len=1, max_kv_tokens=64)
    pools = np.zeros((0, PAGE, HKV, D), np.float32)
    odd = np.lib.stride_tricks.as_strided(pools, pools.shape, (-7 * 4, 4, -4, 12))
    empty, padding = ts.Batch(PAGE, [0], [0], [], []), ts.Batch(PAGE, [0, 0], [0, 0], [], [0])
    q = np.zeros((0, HQ, D), np.float32)
    for pages in (pools, odd, pools[:, :, ::-1], np.zeros((0, HKV, PAGE, D), np.float32).transpose(0, 2, 1, 3)):
        kv = ts.KvView(pages, pages)
        for batch in (empty, padding):
            ctx.select(batch, kv, q)
            assert ctx.attend(batch, kv, q).shape == ctx.attend_dense(batch, kv, q).shape == (0, HQ, D)
        with pytest.raises(ts.ArgumentError, match="`page` must be below 0, got 1"):
            ctx.attend_dense(ts.Batch(PAGE, [0, 1], [0, 2], [1, 0], [3]), kv, draw(1, HQ, D))
