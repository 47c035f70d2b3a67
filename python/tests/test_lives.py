"""Objects in use, closed, out of memory, and after a defect."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tokenselect as ts
from definitions import HKV, HQ, PAGE, D, Draw, Slice, config, tables, to_bf16


def test_closed(device: ts.Device, draw: Draw) -> None:
    """What was closed says so; closing twice is nothing."""
    cfg = config()
    ctx, cache = ts.Context(device, cfg, max_kv_tokens=64), ts.Cache(device, cfg, num_pages=4, page_size=PAGE)
    batch, buffer = ts.Batch(PAGE, [0, 1], [0, 1], [0], [1]), ts.Buffer(device, (2,), "<f4")
    layer, votes = cache.layer(0), ctx.workspace("votes")
    for closed in (ctx, cache, batch, buffer, device):
        closed.close()
        closed.close()
    uses: dict[str, Callable[[], object]] = {
        "context": lambda: ctx.selected(),
        "cache": lambda: cache.create(),
        "batch": lambda: batch.row(0),
        "buffer": lambda: buffer.numpy(),
        "device": lambda: ts.Cache(device, cfg),
    }
    for name, use in uses.items():
        with pytest.raises(ts.Error, match=f"`{name}` was closed") as caught:
            use()
        assert caught.value.status == "TS_STATUS_CLOSED"
    with pytest.raises(ts.Error, match="`context` was closed"):
        votes.numpy()
    with pytest.raises(ts.Error, match="`cache` was closed"):
        np.asarray(layer.k)


def test_arrays_outlive_what_was_closed(device: ts.Device) -> None:
    """Memory that an array shows is there as long as the array, whatever is closed."""
    cfg = config()
    buffer = device.to_device(np.arange(1000, dtype=np.float32))
    ctx, cache = ts.Context(device, cfg, max_kv_tokens=1000), ts.Cache(device, cfg, num_pages=64)
    arrays = [np.asarray(buffer), np.asarray(ctx.workspace("votes")), np.asarray(cache.layer_mut(0).k)]
    for closed in (buffer, ctx, cache):
        closed.close()
    del buffer, ctx, cache, closed
    for array in arrays:
        array[:] = 7
    other = [ts.Buffer(device, 1000, "f32").numpy() for _ in range(100)]
    for array in arrays:
        np.testing.assert_array_equal(array, 7)
    np.testing.assert_array_equal(np.stack(other), 0)


def test_graph_outlives_what_was_closed(emulated: ts.Device) -> None:
    """So does the memory of recorded work."""
    random = np.random.default_rng(4)
    cfg = config(dtype="bf16", head_dim=64)
    ctx = ts.Context(emulated, cfg, max_rows=1, max_block_len=1, max_kv_tokens=32)
    k, v, q = (emulated.to_device(to_bf16(random.standard_normal(s))) for s in [(8, PAGE, HKV, 64)] * 2 + [(1, HQ, 64)])
    batch, out = ts.Batch(PAGE, [0, 1], *tables(30, 8)), ts.Buffer(emulated, (1, HQ, 64), "<f4")
    slot = ts.BatchSlot(emulated, batch, max_pages=8)
    bound = slot.put(batch)
    kv = ts.KvView(k, v)

    def work() -> None:
        ctx.select(bound, kv, q)
        ctx.attend(bound, kv, q, out)

    work()
    want = out.numpy()
    graph = emulated.capture(work)
    for closed in (ctx, bound, k, v, q, slot):
        closed.close()
    graph.launch()
    np.testing.assert_array_equal(out.numpy(), want)
    graph.close()
    with pytest.raises(ts.Error, match="`graph` was closed"):
        graph.launch()


def test_addresses_are_read_at_every_call(device: ts.Device, draw: Draw) -> None:
    """A tensor may get other memory between calls."""

    class Moving:
        def __init__(self, array: Any) -> None:
            self.array = array

        @property
        def __array_interface__(self) -> dict[str, Any]:
            found: dict[str, Any] = self.array.__array_interface__
            return found

    ctx = ts.Context(device, config(), max_rows=1, max_block_len=1, max_kv_tokens=64)
    batch, q = ts.Batch(PAGE, [0, 1], [0, 2], [1, 0], [3]), draw(1, HQ, D)
    k, v = Moving(draw(2, PAGE, HKV, D)), Moving(draw(2, PAGE, HKV, D))
    kv = ts.KvView(k, v)
    for _ in range(3):
        k.array, v.array = draw(2, PAGE, HKV, D), draw(2, PAGE, HKV, D)
        want = ctx.attend_dense(batch, ts.KvView(k.array, v.array), q)
        np.testing.assert_array_equal(ctx.attend_dense(batch, kv, q), want)


def test_what_tells_of_an_array_may_own_it(device: ts.Device, draw: Draw) -> None:
    """An array of another library's may be made as it is asked for: what it answers then lives as long as the call."""

    class Made:
        def __init__(self, array: Any) -> None:
            self.array = array

        @property
        def __array_struct__(self) -> object:
            return self.array.copy().view(Scribbling).__array_struct__

        @property
        def __array_interface__(self) -> dict[str, Any]:
            raise AssertionError("there is a structure")

    class Scribbling(np.ndarray[Any, Any]):
        def __del__(self) -> None:
            np.asarray(self).fill(np.nan)

    ctx = ts.Context(device, config(), max_rows=1, max_block_len=1, max_kv_tokens=64)
    batch, q = ts.Batch(PAGE, [0, 1], [0, 2], [1, 0], [3]), draw(1, HQ, D)
    kv = ts.KvView(draw(2, PAGE, HKV, D), draw(2, PAGE, HKV, D))
    want, out = ctx.attend_dense(batch, kv, q), np.empty_like(q)
    ctx.attend_dense(batch, kv, Made(q), out)
    np.testing.assert_array_equal(out, want)


def test_temporaries_on_a_device(emulated: ts.Device) -> None:
    """What a device may not have read yet is kept until it has."""
    cfg = config(dtype="bf16", head_dim=64)
    ctx = ts.Context(emulated, cfg, max_rows=1, max_block_len=1, max_kv_tokens=32)
    batch, array = ts.Batch(PAGE, [0, 1], [0, 1], [0], [1]), np.zeros((1, HQ, 64), np.uint16)
    dropped: list[int] = []

    class Fleeting(Slice):
        def __del__(self) -> None:
            dropped.append(emulated._num_kept)

    for _ in range(3):
        buffer = emulated.to_device(array)
        ctx.pool(batch, Fleeting(buffer, array, array))
    emulated.synchronize()
    assert (len(dropped), emulated._num_kept) == (3, 0)


def test_two_threads(device: ts.Device) -> None:
    """Objects at work are in nobody else's hands; other threads run meanwhile."""
    cfg = config()
    cache = ts.Cache(device, cfg, num_pages=1024, page_size=PAGE)
    ctx = ts.Context.for_prefill(device, cfg, block_len=4, max_kv_len=4096, max_piece_len=4)
    length = 3000
    pieces = cache.extend_in_pieces(ctx, [(cache.create(), length)], 4)
    random = np.random.default_rng(1)
    q, k, v = (random.standard_normal((length, heads, D)).astype(np.float32) for heads in (HQ, HKV, HKV))
    told = threading.Event()
    stops: list[bool] = []
    results: list[Any] = []

    def progress(done: int, total: int) -> bool:
        told.set()
        return not stops

    def read() -> None:
        results.append(ctx.prefill(cache, 0, pieces, q, k, v, progress=progress))

    thread = threading.Thread(target=read)
    thread.start()
    assert told.wait(60)
    busy = 0
    for _ in range(1000):
        for use in (cache.create, ctx.selected, cache.close, ctx.close, pieces.close):
            try:
                use()
            except ts.BusyError as error:
                busy += 1
                assert "is at work in another call" in str(error)
                assert error.status == "TS_STATUS_BUSY"
        if busy >= 5 or not thread.is_alive():
            break
        time.sleep(0)
    other = ts.Context.for_prefill(device, cfg, block_len=4, max_kv_len=64)
    own = ts.Batch(PAGE, [0, 13], [0, 4], range(4), [1]).in_pieces(other, 4)
    pools = np.zeros((2, 4, PAGE, HKV, D), np.float32)
    other.prefill_kv(own, ts.KvView(pools[0], pools[1]), q[:13], k[:13], v[:13])
    stops.append(True)
    thread.join()
    assert busy >= 5 and len(results) == 1
    ctx.close()


def test_keyboard_interrupt_stops_prefill() -> None:
    """A signal's handler runs between two pieces, and what it raises comes out."""
    code = """
import os, signal, threading
import numpy as np, tokenselect as ts
device, config = ts.Device.cpu(), ts.Config(num_qo_heads=4, num_kv_heads=2, head_dim=16, dtype="f32", top_k=5)
cache = ts.Cache(device, config, num_pages=8192)
ctx = ts.Context.for_prefill(device, config, block_len=4, max_kv_len=131072, max_piece_len=4)
pieces = cache.extend_in_pieces(ctx, [(cache.create(), 100_000)], 4)
q, k, v = (np.ones((100_000, heads, 16), np.float32) for heads in (4, 2, 2))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have turned it off
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    ctx.prefill(cache, 0, pieces, q, k, v)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "interrupted\n", done.stderr


def test_out_of_memory(device: ts.Device) -> None:
    """Memory that cannot be had is an exception, whatever asks for it, and never the end of the process."""
    wide = config(num_qo_heads=2**16, num_kv_heads=2**16, head_dim=256)  # beyond the address space, not only the memory
    batch = ts.Batch(PAGE, [0, 1], [0, 1], [0], [1])
    for ask in (
        lambda: ts.Cache(device, wide, num_pages=2**31 - 1, page_size=256),
        lambda: ts.Context(device, wide, max_rows=2**20, max_kv_tokens=2**31 - 1),
        lambda: ts.SelectionCache(device, wide, 2**15, 2**32),
        lambda: ts.Buffer(device, (2**46,), "<f4"),
    ):
        with pytest.raises(MemoryError, match="no memory for .* of [0-9]+ bytes") as caught:
            ask()
        assert isinstance(caught.value, ts.OutOfMemoryError)
    with pytest.raises(ValueError, match="`shape` must be of bytes that can be counted"):
        ts.Buffer(device, (2**40, 2**40), "<f4")
    with pytest.raises(ts.ArgumentError, match="rows"):
        batch.padded(2**40, 1)


def test_out_of_memory_with_little_memory() -> None:
    """Tables of the caller's, and copies, in a process that has hardly any memory left."""
    code = """
import resource
import numpy as np, tokenselect as ts
device = ts.Device.cpu()
pages = np.zeros(1 << 26, np.uint8)
buffer = ts.Buffer(device, (1 << 26,), "|u1")
pages.sum()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20),) * 2)
def fails(ask):
    try:
        ask()
    except MemoryError as error:
        print(type(error).__name__)
fails(lambda: ts.Batch(16, [0, 1], [0, 1 << 26], pages, [16]))
fails(buffer.to_host)
fails(lambda: device.to_device(pages))
fails(lambda: ts.Context(device, ts.Config(dtype="f32"), max_kv_tokens=1 << 24))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    kinds = done.stdout.split()
    assert len(kinds) == 4 and set(kinds) <= {"OutOfMemoryError", "MemoryError"}, done.stdout + done.stderr


def test_a_panic_stays_inside(device: ts.Device) -> None:
    """A defect of the library is an exception, and what it left half done is not used again."""
    ctx = ts.Context(device, config(), max_kv_tokens=64)
    with pytest.raises(ts.DefectError, match="defect in tokenselect: a test's own") as caught:
        ctx._panic()
    assert caught.value.status == "TS_STATUS_PANIC"
    with pytest.raises(ts.DefectError, match="`context` was at work when tokenselect failed by a defect of its own"):
        ctx.selected()
    ctx.close()
    assert repr(ctx)


def test_closed_by_a_later_argument(device: ts.Device, draw: Draw) -> None:
    """Code of an argument's own runs within a call: what the call has looked at by then cannot be closed, and its memory stays."""
    ctx = ts.Context(device, config(), max_rows=2, max_block_len=1, max_kv_tokens=64)
    other = ts.Context(device, config(), max_rows=2, max_block_len=1, max_kv_tokens=1 << 16)
    cache = ts.Cache(device, config(), num_pages=1 << 8, page_size=PAGE)
    batch, q = ts.Batch(PAGE, [0, 1], [0, 2], [1, 0], [3]), draw(1, HQ, D)
    pages = ts.Buffer(device, (1 << 14, PAGE, HKV, D), "f32")
    pages.from_host(draw(*pages.shape))
    queries = device.to_device(q)
    kv = ts.KvView(pages, pages)
    want = ctx.attend_dense(batch, kv, q)
    told: list[str] = []

    class Closing:
        """An output that closes other arguments when it is asked where it lies."""

        def __init__(self, shape: tuple[int, ...], *closed: Any) -> None:
            self.array, self.closed = np.zeros(shape, np.float32), closed

        @property
        def __array_interface__(self) -> dict[str, Any]:
            for each in self.closed:
                with pytest.raises(
                    ts.BusyError, match="is at work in another call.*must not be closed meanwhile"
                ) as caught:
                    each.close()
                told.append(str(caught.value).split("`")[1])
            found: dict[str, Any] = self.array.__array_interface__
            return found

    out = Closing(q.shape, pages, queries, ctx, batch)
    ctx.attend_dense(batch, kv, queries, out)
    assert told == ["buffer", "buffer", "context", "batch"]
    np.testing.assert_array_equal(out.array, want)

    told.clear()
    keys, actions = cache.layer_mut(0).k, other.workspace("actions")
    ctx.attend_dense(batch, ts.KvView(keys, keys), q, Closing(q.shape, cache))
    two = ts.Batch(PAGE, [0, 1, 2], [0, 2, 3], [1, 0, 2], [3, 1])
    ctx.attend_to(two, kv, draw(2, HQ, D), np.zeros((2, 1), np.int32), actions, out=Closing((2, HQ, D), other))
    assert told == ["cache", "context"]

    # A call that has returned, or failed, holds nothing.
    with pytest.raises(ts.ArgumentError):
        ctx.attend_dense(batch, kv, queries, Closing((1,), queries))
    for each in (pages, queries, cache, other):
        each.close()
    with pytest.raises(ts.Error, match="`buffer` was closed"):
        ctx.attend_dense(batch, kv, q)


def test_closed_by_a_number(device: ts.Device, draw: Draw) -> None:
    """So does `__index__` of a number's own."""
    ctx = ts.Context(device, config(), max_rows=1, max_block_len=1, max_kv_tokens=64)
    cache = ts.Cache(device, config(), num_pages=4, page_size=PAGE)
    batch = cache.extend([(cache.create(), 1)])

    class Closing:
        def __init__(self, closed: Any) -> None:
            self.closed = closed

        def __index__(self) -> int:
            self.closed.close()
            return 0

    q, k, v = (draw(1, heads, D) for heads in (HQ, HKV, HKV))
    with pytest.raises(ts.BusyError, match="`batch` is at work"):
        batch.row(Closing(batch))
    with pytest.raises(ts.BusyError, match="`context` is at work"):
        ctx.append(batch, (cache, Closing(ctx)), k, v)  # type: ignore[arg-type]
    with pytest.raises(ts.Error, match="`cache` was closed"):
        ctx.step(cache, Closing(cache), batch, q, k, v)
