"""PyTorch's tensors on the processor. Skipped, aloud, where PyTorch is not installed."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tokenselect as ts
from definitions import HKV, HQ, PAGE, D, attend, config

torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.fixture
def ctx(device: ts.Device) -> ts.Context:
    return ts.Context(device, config(), max_rows=1, max_block_len=8, max_kv_tokens=64)


@pytest.fixture
def batch() -> ts.Batch:
    return ts.Batch(PAGE, [0, 8], [0, 2], torch.tensor([1, 0]), [PAGE])


def pages() -> Any:
    return torch.randn(2, 2, PAGE, HKV, D)


def test_step(device: ts.Device) -> None:
    cfg = config(dtype=torch.bfloat16)
    cache = ts.Cache(device, cfg, num_pages=16, page_size=PAGE)
    ctx = ts.Context(device, cfg, max_block_len=8, max_kv_tokens=64)
    q, k, v = (torch.randn(8, heads, D, dtype=torch.bfloat16) for heads in (HQ, HKV, HKV))
    batch = cache.extend([(cache.create(), 8)])
    out, lse = ctx.step(cache, 0, batch, q, k, v, lse=True)
    as_f64 = [x.to(torch.float64).numpy() for x in (q, k, v)]
    want_out, want_lse = attend(cfg, as_f64[0], as_f64[1], as_f64[2], list(range(8)))
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    np.testing.assert_allclose(out.to(torch.float64).numpy(), want_out, atol=1e-2, rtol=1e-2)
    np.testing.assert_allclose(lse.numpy(), want_lse, atol=1e-4)
    assert ctx.workspace("selected").torch()[0, :8].tolist() == list(range(8))
    assert cache.layer(0).k.torch().dtype == torch.bfloat16


def test_types() -> None:
    for dtype, name in ((torch.float32, "f32"), (torch.float16, "f16"), (torch.bfloat16, "bf16")):
        assert config(dtype=dtype).dtype == name
    for dtype in (torch.int8, torch.complex64, torch.float64):
        with pytest.raises((TypeError, ValueError), match="`dtype` must be"):
            config(dtype=dtype)
    buffer = ts.Buffer(ts.Device.cpu(), (2, 3), torch.bfloat16)
    assert (buffer.typestr, buffer.dtype, buffer.torch().dtype) == ("<u2", "bf16", torch.bfloat16)
    buffer.from_host(torch.ones(2, 3, dtype=torch.bfloat16))
    assert buffer.torch().tolist() == [[1.0] * 3] * 2


def test_fused_projection(ctx: ts.Context, batch: ts.Batch) -> None:
    """Slices of a fused projection are taken as they are."""
    q, k, v = torch.randn(8, HQ + 2 * HKV, D).split([HQ, HKV, HKV], dim=1)
    assert not q.is_contiguous()
    results = []
    for parts in ((q, k, v), (q.contiguous(), k.contiguous(), v.contiguous())):
        kv = pages() * 0
        ctx.append_select(batch, ts.KvView(kv[0], kv[1]), *parts)
        results.append((kv, ctx.attend(batch, ts.KvView(kv[0], kv[1]), parts[0])))
    for fused, dense in zip(*results, strict=True):
        assert torch.equal(fused, dense)


def test_temporaries(ctx: ts.Context, batch: ts.Batch) -> None:
    kv, (q, k, v) = pages(), (torch.randn(8, heads, D) for heads in (HQ, HKV, HKV))
    view = ts.KvView(kv[0], kv[1])
    ctx.append(batch, view, k + 1, v + 1)
    assert torch.equal(kv[0][1], (k + 1)[:PAGE]) and torch.equal(kv[1][0], (v + 1)[PAGE:])
    ctx.select(batch, view, q + 1)
    assert torch.equal(ctx.attend(batch, view, q + 1), ctx.attend(batch, view, (q + 1).clone()))


def test_memory_is_looked_for_at_every_call(ctx: ts.Context, batch: ts.Batch) -> None:
    """A tensor that was given other memory: what it had is gone."""
    (k, v), q = pages(), torch.randn(8, HQ, D)
    kv = ts.KvView(k, v)
    for _ in range(20):
        other_k, other_v = pages()
        k.set_(other_k.clone())
        v.set_(other_v.clone())
        gc.collect()
        want = ctx.attend_dense(batch, ts.KvView(other_k, other_v), q)
        assert torch.equal(ctx.attend_dense(batch, kv, q), want)


def test_other_memory_during_a_long_call(device: ts.Device) -> None:
    """A tensor that is given other memory while a prefill reads it: it reads what it was given."""
    ctx = ts.Context.for_prefill(device, config(), block_len=4, max_kv_len=512, max_piece_len=4)
    cache = ts.Cache(device, config(), num_pages=256, page_size=PAGE)
    pieces = cache.extend_in_pieces(ctx, [(cache.create(), 400)], 4)
    q, k, v = (torch.randn(400, heads, D) for heads in (HQ, HKV, HKV))
    want = ctx.prefill(cache, 0, pieces, q.clone(), k.clone(), v.clone())

    def replace(done: int, total: int) -> None:
        for tensor in (q, k, v):
            tensor.set_(torch.zeros_like(tensor))

    assert torch.equal(ctx.prefill(cache, 0, pieces, q, k, v, progress=replace), want)


def test_lazy_elements(ctx: ts.Context, batch: ts.Batch) -> None:
    """Elements that are not what memory holds are refused, and taken once they are made."""
    kv = pages()
    view = ts.KvView(kv[0], kv[1])
    lazy = torch.view_as_complex(torch.randn(8, HQ, D, 2)).conj().imag
    assert lazy.is_neg()
    with pytest.raises(
        ts.ArgumentError, match=r"`q` must have its elements in memory, it is lazily negated: pass `q.resolve_neg\(\)`"
    ):
        ctx.select(batch, view, lazy)
    ctx.select(batch, view, lazy.resolve_neg().contiguous())
    conjugated = torch.randn(8, HQ, D, dtype=torch.complex64).conj()
    with pytest.raises(TypeError, match="`q` must be f32, got torch.complex64"):
        ctx.select(batch, view, conjugated)


def test_gradients(ctx: ts.Context, batch: ts.Batch) -> None:
    kv, q = pages(), torch.randn(8, HQ, D, requires_grad=True)
    view = ts.KvView(kv[0], kv[1])
    text = r"`q` requires gradients, which this library does not compute: call it under `torch.no_grad\(\)`, or pass `q.detach\(\)`"
    for given in (q, q * 2):
        with pytest.raises(ts.ArgumentError, match=text):
            ctx.select(batch, view, given)
    with pytest.raises(ts.ArgumentError, match="`k pages` requires gradients"):
        ctx.score(batch, ts.KvView(torch.nn.Parameter(kv[0].clone()), kv[1]))
    with torch.no_grad():
        ctx.select(batch, view, q)
    with torch.inference_mode():
        ctx.select(batch, view, q)
        ctx.attend(batch, view, q)
    ctx.select(batch, view, q.detach())


def test_forward_derivatives(ctx: ts.Context, batch: ts.Batch) -> None:
    """Dual tensors are refused, their tangents would be lost; others are not."""
    kv, q = pages(), torch.randn(8, HQ, D)
    view = ts.KvView(kv[0], kv[1])
    ad = torch.autograd.forward_ad
    with ad.dual_level():
        dual = ad.make_dual(q, torch.ones_like(q))
        text = r"`{}` is a dual tensor, whose derivatives this library does not compute: pass `torch.autograd.forward_ad.unpack_dual"
        for given in (dual, dual * 2):
            with pytest.raises(ts.ArgumentError, match=text.format("q")):
                ctx.attend_dense(batch, view, given)
        with pytest.raises(ts.ArgumentError, match=text.format("v pages")):
            ctx.attend_dense(batch, ts.KvView(kv[0], ad.make_dual(kv[1], kv[1])), q)
        want = ctx.attend_dense(batch, view, ad.unpack_dual(dual).primal)
        assert torch.equal(ctx.attend_dense(batch, view, q), want)
    with pytest.raises(ts.TokenSelectError, match="`q`"):
        torch.func.jvp(lambda q: ctx.attend_dense(batch, view, q), (q,), (q,))
    assert torch.equal(ctx.attend_dense(batch, view, q), want)


def test_forward_derivatives_of_operators() -> None:
    import tokenselect.torch as ops

    kv, q = pages(), torch.randn(8, HQ, D)
    given = (
        ops.handle(ops.Contexts(config(), max_rows=1, max_block_len=8, max_kv_tokens=64)),
        ops.handle(ts.Batch(PAGE, [0, 8], [0, 2], torch.tensor([1, 0]), [PAGE])),
        ops.handle(ts.KvView(kv[0], kv[1])),
    )
    ad = torch.autograd.forward_ad
    with (
        torch.no_grad(),
        ad.dual_level(),
        pytest.raises(
            ts.ArgumentError, match="`(q|k pages)` is (a dual tensor|given within `torch.autograd.forward_ad)"
        ),
    ):
        ops.attend_dense(*given, ad.make_dual(q, q))


def test_traces(ctx: ts.Context, batch: ts.Batch) -> None:
    """A trace would hold the results as constants."""
    kv, q = pages(), torch.randn(8, HQ, D)
    view = ts.KvView(kv[0], kv[1])
    with pytest.raises(
        ts.ArgumentError,
        match="`k pages` is given within `torch.jit.trace`, which would take the results for constants",
    ):
        torch.jit.trace(lambda q: ctx.attend_dense(batch, view, q), q)
    ctx.attend_dense(batch, view, q)


@pytest.mark.filterwarnings("ignore:.*MaskedTensors is in prototype.*")
def test_masked_tensors(ctx: ts.Context, batch: ts.Batch) -> None:
    from torch.masked import masked_tensor

    kv, q = pages(), torch.randn(8, HQ, D)
    with pytest.raises(ts.ArgumentError, match="`q` must be an array without a mask, it is masked"):
        ctx.attend_dense(batch, ts.KvView(kv[0], kv[1]), masked_tensor(q, q > 0))


def test_page_tables() -> None:
    def batch(indices: Any) -> ts.Batch:
        return ts.Batch(PAGE, [0, 1], [0, 2], indices, [1])

    for dtype in (torch.int32, torch.int64, torch.uint8, torch.int16):
        assert batch(torch.tensor([3, 4], dtype=dtype)).num_rows == 1
    assert batch(torch.tensor([[3, 9], [4, 9]])[:, 0]).num_rows == 1
    for value in (2**32, -1):
        with pytest.raises(ts.ArgumentError, match=rf"`indices\[1\]` must be from 0 to 2147483647, got {value}"):
            batch(torch.tensor([0, value]))
    for dtype, name in ((torch.float32, "f32"), (torch.bool, "torch.bool")):
        with pytest.raises(TypeError, match=f"`indices` must be whole numbers, got {name}"):
            batch(torch.tensor([0, 1], dtype=dtype))


def test_tensors_without_elements_in_memory(ctx: ts.Context, batch: ts.Batch) -> None:
    kv = pages()
    view = ts.KvView(kv[0], kv[1])
    with pytest.raises(ts.ArgumentError, match="`q` must be on cpu, it is on meta"):
        ctx.select(batch, view, torch.empty(8, HQ, D, device="meta"))
    with pytest.raises(ts.ArgumentTypeError, match="`q` must be a tensor with its elements in memory, in strides"):
        ctx.select(batch, view, torch.randn(8, HQ, D).to_sparse())


def test_threads(device: ts.Device) -> None:
    """Contexts of their own in threads of their own, on long rows, where other threads run meanwhile."""
    q, kv = torch.randn(1, HQ, D), torch.randn(2, 8192, PAGE, HKV, D)
    batch = ts.Batch(PAGE, [0, 1], [0, 8192], range(8192), [PAGE])
    results: list[Any] = []

    def work() -> None:
        ctx = ts.Context(device, config(), max_rows=1, max_block_len=1, max_kv_tokens=8192 * PAGE)
        for _ in range(5):
            ctx.select(batch, ts.KvView(kv[0], kv[1]), q + 0)
            results.append(ctx.attend(batch, ts.KvView(kv[0], kv[1]), q + 0))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 15
    for out in results:
        assert torch.equal(out, results[0])


class Interrupting:
    """An array whose interface does something first."""

    def __init__(self, array: Any, work: Callable[[], object]) -> None:
        self.array, self.work = array, work

    @property
    def __array_interface__(self) -> Any:
        self.work()
        return self.array.__array_interface__


@pytest.mark.parametrize(
    "change", [lambda x: x.set_(torch.zeros(1)), lambda x: x.resize_(10**6)], ids=["set", "resize"]
)
def test_other_memory_by_code_of_an_argument(ctx: ts.Context, batch: ts.Batch, change: Callable[[Any], object]) -> None:
    """The address of a tensor that was looked at before is not used when it has changed."""
    kv = ts.KvView(*pages())
    q, out = torch.randn(8, HQ, D), torch.zeros(8, HQ, D)
    lse = Interrupting(np.zeros((8, HQ), np.float32), lambda: change(q))
    with pytest.raises(ts.ArgumentError, match="`q` must keep its memory until the call returns"):
        ctx.attend_dense(batch, kv, q, out, lse)
    assert not out.any()
    q, k = torch.randn(8, HQ, D), pages()[0]
    values = Interrupting(np.zeros((2, PAGE, HKV, D), np.float32), lambda: change(k))
    # What the call makes may lie where the keys were, which is refused, too.
    with pytest.raises(ts.ArgumentError, match="must keep its memory|must not overlap `k pages`"):
        ctx.attend_dense(batch, ts.KvView(k, values), q)


def test_other_memory_by_who_is_told_of_progress(device: ts.Device) -> None:
    """A prompt is not read on from where a tensor was."""
    cfg = config()
    cache = ts.Cache(device, cfg, num_pages=64, page_size=PAGE)
    ctx = ts.Context.for_prefill(device, cfg, block_len=8, max_kv_len=256, max_piece_len=8)
    pieces = cache.extend_in_pieces(ctx, [(cache.create(), 64)], 8)
    q, k, v = (torch.randn(64, heads, D) for heads in (HQ, HKV, HKV))

    def progress(done: int, total: int) -> None:
        q.resize_(10**6)

    with pytest.raises(ts.ArgumentError, match="`q` must keep its memory"):
        ctx.prefill(cache, 0, pieces, q, k, v, progress=progress)
