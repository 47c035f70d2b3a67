"""What becomes of tensors: their lives, their kinds, their memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tokenselect as ts
from definitions import HKV, HQ, PAGE, Array, D, Draw, Fleeting, StandIn, config, to_bf16, view


def test_temporaries(device: ts.Device, draw: Draw) -> None:
    """Tensors that are temporaries of a call live until it returns."""
    cfg = config()
    ctx = ts.Context(device, cfg, max_rows=1, max_block_len=16, max_kv_tokens=64)
    batch = ts.Batch(PAGE, [0, 16], [0, 16], range(16), [PAGE])
    q, k, v = (draw(16, heads, D) for heads in (HQ, HKV, HKV))
    pools = draw(16, PAGE, HKV, D), draw(16, PAGE, HKV, D)
    tokens, length = np.arange(64, dtype=np.int32)[None], np.array([64], np.int32)
    parts, lses = draw(2, 16, HQ, D), draw(2, 16, HQ)

    def run(of: Callable[[Array], Any]) -> list[Any]:
        """What every function makes of tensors that are `of(array)`, each a temporary of the call."""
        given = [pool.copy() for pool in pools]
        kv, out = view(given), np.zeros((16, HQ, D), np.float32)
        made: list[Any] = []
        ctx.append(batch, kv, of(k), of(v))
        made += [pool.copy() for pool in given]
        ctx.append_select(batch, kv, of(q), of(v), of(k))
        made += [pool.copy() for pool in given] + [ctx.selected()]
        ctx.select(batch, kv, of(2 * q))
        made.append(ctx.selected())
        ctx.attend(batch, kv, of(q), StandIn(out, "float32"))
        made.append(out.copy())
        ctx.attend_dense(batch, ts.KvView(of(pools[0]), of(pools[1])), of(q), StandIn(out, "float32"))
        made.append(out.copy())
        ctx.attend_to(batch, kv, of(q), of(tokens), of(length), out=StandIn(out, "float32"))
        made.append(out.copy())
        lists = dict(ranks=of(tokens), total_len=of(length))
        ctx.attend_to(batch, kv, of(q), of(tokens), of(length), **lists, out=StandIn(out, "float32"))
        made.append(out.copy())
        del lists
        ctx.merge(of(parts), of(lses), out)
        made.append(out.copy())
        ctx.pool(batch, of(q))
        ctx.score(batch, ts.KvView(of(pools[0]), of(pools[1])))
        ctx.vote_top_k(batch)
        made += [ctx.workspace("queries").numpy(), ctx.selected()]
        for step in ("step", "step_dense"):
            cache = ts.Cache(device, cfg, num_pages=16, page_size=PAGE)
            rows = cache.extend([(cache.create(), 16)])
            getattr(ctx, step)(cache, 0, rows, of(q), of(k), of(v), StandIn(out, "float32"))
            made.append(out.copy())
            rows = cache.extend([(cache.create(), 16)])
            ctx.append(rows, (cache, 0), of(v), of(k))
            ctx.attend_dense(rows, cache.layer(0), of(q), StandIn(out, "float32"))
            made.append(out.copy())
        reader = ts.Context.for_prefill(device, cfg, block_len=6, max_kv_len=16)
        pieces = cache.extend_in_pieces(reader, [(cache.create(), 16)], 6)
        reader.prefill(cache, 0, pieces, of(q), of(k), of(v), StandIn(out, "float32"))
        made.append(out.copy())
        return made

    for want, got in zip(run(lambda array: array), run(Fleeting), strict=True):
        np.testing.assert_array_equal(got, want)
    tables = ts.Batch(PAGE, *(np.array(table) for table in ([0, 1], [0, 2], [3, 4], [2])))
    assert tables.row(0).kv_len == 6


def test_what_is_held(device: ts.Device, draw: Draw) -> None:
    """Objects may be dropped in any order: what needs another holds it."""
    cfg = config()
    cache = ts.Cache(device, cfg, num_pages=4, page_size=PAGE)
    held = weakref.ref(cache)
    layer = cache.layer(0)
    del cache
    gc.collect()
    assert held() is not None
    ctx = ts.Context(device, cfg, max_block_len=1, max_kv_tokens=64)
    ctx.attend_dense(ts.Batch(PAGE, [0, 1], [0, 1], [0], [1]), layer, draw(1, HQ, D))
    del layer
    gc.collect()
    assert held() is None
    votes = np.asarray(ctx.workspace("votes"))
    held_context = weakref.ref(ctx)
    del ctx
    gc.collect()
    assert held_context() is not None
    votes[:] = 1
    del votes
    gc.collect()
    assert held_context() is None


def test_data_ptr(device: ts.Device, draw: Draw) -> None:
    """Tensors with PyTorch's methods give what NumPy's arrays give."""
    cfg = config(dtype="bf16")
    ctx = ts.Context(device, cfg, max_block_len=1, max_kv_tokens=64)
    pool, q = to_bf16(draw(16, 2, PAGE, HKV, D)), to_bf16(draw(1, HQ, D))
    batch = ts.Batch(PAGE, [0, 1], [0, 16], range(16), [PAGE])
    want, want_lse = ctx.attend_dense(batch, ts.KvView(pool[:, 0], pool[:, 1]), q, lse=True)
    as_bf16 = [StandIn(part, "bfloat16") for part in (pool[:, 0], pool[:, 1], q)]
    out, lse = np.empty_like(q), np.empty((1, HQ), np.float32)
    ctx.attend_dense(batch, view(as_bf16[:2]), as_bf16[2], StandIn(out, "bfloat16"), StandIn(lse, "float32"))
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(lse, want_lse)
    as_bf16[2].device = "cuda:0"
    with pytest.raises(ValueError, match="`q` must be on cpu, it is on cuda:0"):
        ctx.pool(batch, as_bf16[2])
