"""Rings of references through this package's objects are collected, but never while a device works on what they hold."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np

import tokenselect as ts
from definitions import HKV, HQ, PAGE, D, Draw, Slice, config, to_bf16


class Array(np.ndarray[Any, Any]):
    """An array that can hold other objects."""


class Holder:
    """Anything that holds something."""


def test_tensor_that_holds_its_view(draw: Draw) -> None:
    array = draw(2, PAGE, HKV, D).view(Array)
    array.view_of_it = ts.KvView(array, array)  # type: ignore[attr-defined]
    gone = weakref.ref(array)
    del array
    gc.collect()
    assert gone() is None


def test_every_class_shows_what_it_holds(emulated: ts.Device) -> None:
    cfg = config(dtype="bf16", head_dim=64, selection_cache=True)
    cache = ts.Cache(emulated, cfg, num_pages=4, page_size=PAGE)
    batch = cache.extend([(cache.create(), 1)])
    context = ts.Context(emulated, cfg, max_rows=1, max_block_len=1, max_kv_tokens=16)
    slot, array = ts.BatchSlot(emulated, batch, 4), to_bf16(np.zeros((1, HQ, 64)))
    bound, q = slot.put(batch), emulated.to_device(array)
    context.pool(bound, q)
    k, v = Holder(), Holder()
    kv: Any = ts.KvView(k, v)  # type: ignore[arg-type]
    for each, held in (
        (kv, [k, v]),
        (cache, [emulated]),
        (cache.layer(0), [cache]),
        (cache.layer(0).k, [emulated, cache]),
        (cache.selections(), [cache]),
        (context, [emulated]),
        (context.workspace("votes"), [emulated, context]),
        (q, [emulated]),
        (slot, [emulated]),
        (emulated.capture(lambda: context.pool(bound, q)), [emulated, context, bound, q]),
    ):
        assert gc.is_tracked(each)
        found = gc.get_referents(each)
        assert {id(one) for one in held} <= {id(one) for one in found}, each


def test_graph_that_holds_itself(emulated: ts.Device) -> None:
    """Work that was launched is over on the emulated device when the launch returns."""
    cfg = config(dtype="bf16", head_dim=64)
    ctx = ts.Context(emulated, cfg, max_rows=1, max_block_len=1, max_kv_tokens=16)
    batch = ts.Batch(PAGE, [0, 1], [0, 1], [0], [1])
    bound = ts.BatchSlot(emulated, batch, 4).put(batch)
    for launches in (0, 2):
        array = to_bf16(np.zeros((1, HQ, 64)))
        q = Slice(emulated.to_device(array), array, array)
        ctx.pool(bound, q)
        emulated.synchronize()
        graph = emulated.capture(lambda q=q: ctx.pool(bound, q))  # type: ignore[misc]
        for _ in range(launches):
            graph.launch()
        q.graph = graph  # type: ignore[attr-defined]
        gone = weakref.ref(graph)
        del graph, q
        gc.collect()
        assert gone() is None
        emulated.synchronize()


def test_what_is_held_elsewhere_stays(emulated: ts.Device, draw: Draw) -> None:
    """Collections change nothing that is in use."""
    array = draw(2, PAGE, HKV, D).view(Array)
    view = ts.KvView(array, array)
    array.view_of_it = view  # type: ignore[attr-defined]
    gone = weakref.ref(array)
    del array
    for _ in range(3):
        gc.collect()
    found = gone()
    assert found is not None and view.k is found and found.view_of_it is view
