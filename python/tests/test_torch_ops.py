"""`tokenselect.torch`: operators of PyTorch's, beside the package's own calls, by themselves and in compiled code.

Skipped, aloud, where PyTorch is not installed, and in part where there is no C++ compiler or no CUDA device.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed")

import tokenselect as ts
import tokenselect.torch as ops
from definitions import HKV, HQ, PAGE, D, config
from tokenselect.torch import handles, operators

NUM_PAGES = 16
LIMITS: dict[str, Any] = {"max_rows": 2, "max_block_len": 8, "max_kv_tokens": NUM_PAGES * PAGE}
BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(
            shutil.which("g++") is None, reason="there is no C++ compiler: inductor is not tested"
        ),
    ),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def ctx() -> Any:
    return ops.handle(ops.Contexts(config(), **LIMITS))


@pytest.fixture
def own() -> ts.Context:
    """A context whose calls are the package's own."""
    return ts.Context(ops.device_of("cpu"), config(), **LIMITS)


def batch(length: int, new: int = 1) -> ts.Batch:
    """Two rows of lengths that differ, in shuffled pages."""
    lens = [length, length + 3]
    pages = [-(-n // PAGE) for n in lens]
    order = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(7))[: sum(pages)]
    last = [n - (held - 1) * PAGE for n, held in zip(lens, pages, strict=True)]
    return ts.Batch(PAGE, [0, new, 2 * new], [0, pages[0], sum(pages)], order, last, sequence_indices=[0, 1])


def pages() -> list[Any]:
    return [torch.randn(NUM_PAGES, PAGE, HKV, D) for _ in range(2)]


def tokens(num: int) -> list[Any]:
    """Queries, keys and values: slices of a fused projection."""
    return list(torch.randn(num, HQ + 2 * HKV, D).split([HQ, HKV, HKV], dim=1))


def copies(tensors: list[Any]) -> list[Any]:
    return [tensor.clone() for tensor in tensors]


def expect_equal(got: Any, want: Any) -> None:
    got, want = (value if isinstance(value, (tuple, list)) else (value,) for value in (got, want))
    assert len(got) == len(want)
    for left, right in zip(got, want, strict=True):
        assert left.shape == right.shape and left.dtype == right.dtype
        assert torch.equal(left, right)


# --- by themselves


@pytest.mark.parametrize("as_handle", [True, False])
def test_equal_the_packages_calls(ctx: Any, own: ts.Context, as_handle: bool) -> None:
    kv, (q, k, v), rows = pages(), tokens(4), batch(20, 2)
    mine, b = copies(kv), ops.handle(rows)
    view = ts.KvView(*kv)
    given = ops.handle(ts.KvView(*mine)) if as_handle else tuple(mine)

    ops.append(ctx, b, given, k, v)
    own.append(rows, view, k, v)
    expect_equal(mine, kv)
    lse = torch.empty(4, HQ)
    expect_equal((ops.attend_dense(ctx, b, given, q, lse=lse), lse), own.attend_dense(rows, view, q, lse=True))

    ops.select(ctx, b, given, q)
    own.select(rows, view, q)
    expect_equal(ops.attend(ctx, b, given, q), own.attend(rows, view, q))

    ops.append_select(ctx, b, given, q, k * 2, v * 2)
    own.append_select(rows, view, q, k * 2, v * 2)
    expect_equal((ops.attend(ctx, b, given, q, lse=lse), lse), own.attend(rows, view, q, lse=True))
    expect_equal(mine, kv)

    got = ops.step_kv(ctx, b, given, q, k, v, lse=lse)
    own.append_select(rows, view, q, k, v)
    expect_equal((got, lse), own.attend(rows, view, q, lse=True))
    expect_equal(mine, kv)


def test_outputs_of_ones_own(ctx: Any) -> None:
    kv, (q, k, v), b = tuple(pages()), tokens(2), ops.handle(batch(20))
    want = ops.step_kv(ctx, b, kv, q, k, v)
    out = torch.empty(2, HQ, D)
    assert ops.attend(ctx, b, kv, q, out=out) is out
    expect_equal(out, want)


def test_layouts(ctx: Any) -> None:
    kv, (q, k, v), b = pages(), tokens(2), ops.handle(batch(20))
    want = ops.step_kv(ctx, b, tuple(kv), q, k, v)
    turned = tuple(part.transpose(1, 2).contiguous() for part in kv)
    expect_equal(ops.step_kv(ctx, b, turned, q, k, v, layout="HND"), want)
    together = torch.cat(turned, dim=-1)
    halves = ops.handle(ts.KvView(together[..., :D], together[..., D:], "HND"))
    expect_equal(ops.step_kv(ctx, b, halves, q, k, v), want)


def test_selection_cache() -> None:
    cfg = config(selection_cache=True, similarity_threshold=-1.0)
    ctx, kv, (q, k, v) = ops.handle(ops.Contexts(cfg, **LIMITS)), tuple(pages()), tokens(2)
    reuse = ts.SelectionCache(ops.device_of("cpu"), cfg, num_layers=2, num_sequences=2)
    selections = ops.handle(reuse)
    for length in (20, 21, 22):
        ops.step_kv(ctx, ops.handle(batch(length)), kv, q, k, v, selections=selections, layer=1)
    assert (reuse.stats(1).scored, reuse.stats(1).reused, reuse.stats(0).scored) == (2, 4, 0)


def test_prompts_and_an_own_cache() -> None:
    cfg = config()
    place = ops.device_of("cpu")
    contexts = ops.Contexts.for_prefill(cfg, block_len=4, max_kv_len=64, max_piece_len=8)
    readers, steps = ops.handle(contexts), ops.handle(ops.Contexts(cfg, **LIMITS))
    q, k, v = tokens(30)
    reader, own = contexts.on("cpu"), ts.Context(place, cfg, **LIMITS)

    def cache() -> tuple[ts.Cache, int]:
        made = ts.Cache(place, cfg, num_layers=2, num_pages=NUM_PAGES, page_size=PAGE)
        return made, made.create()

    (mine, sequence), (other, same) = cache(), cache()
    m = ops.handle(mine)
    pieces, want = mine.extend_in_pieces(reader, [(sequence, 30)], 4), other.extend_in_pieces(reader, [(same, 30)], 4)
    p = ops.handle(pieces)
    for layer in range(2):
        lse = torch.empty(30, HQ)
        got = ops.prefill(readers, m, layer, p, q, k, v, lse=lse)
        expect_equal((got, lse), reader.prefill(other, layer, want, q, k, v, lse=True))
    rows, want_rows = mine.extend([(sequence, 1)]), other.extend([(same, 1)])
    b, (q1, k1, v1) = ops.handle(rows), tokens(1)
    expect_equal(ops.step(steps, m, 0, b, q1, k1, v1), own.step(other, 0, want_rows, q1, k1, v1))
    expect_equal(ops.step_dense(steps, m, 1, b, q1, k1, v1), own.step_dense(other, 1, want_rows, q1, k1, v1))

    kv = pages()
    theirs = copies(kv)
    whole = ts.Batch(PAGE, [0, 30], [0, 8], range(8), [2])
    cut = whole.in_pieces(reader, 4)
    got = ops.prefill_kv(readers, ops.handle(cut), tuple(kv), q, k, v)
    expect_equal(got, reader.prefill_kv(cut, ts.KvView(*theirs), q, k, v))
    expect_equal(kv, theirs)


# --- what PyTorch checks of operators

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("as_handle", [True, False])
@pytest.mark.parametrize("name", ["append", "select", "append_select", "attend", "attend_dense", "step_kv"])
def test_opcheck(ctx: Any, name: str, as_handle: bool) -> None:
    kv, (q, k, v), b = pages(), tokens(2), ops.handle(batch(20))
    view = ops.handle(ts.KvView(*kv))
    both: tuple[Any, Any] = (view, None) if as_handle else (kv[0], kv[1])
    ops.select(ctx, b, view, q)
    out, lse = torch.empty(2, HQ, D), torch.empty(2, HQ)
    arguments = {
        "append": (k, v, "NHD"),
        "select": (q, "NHD", None, 0),
        "append_select": (q, k, v, "NHD", None, 0),
        "attend": (q, "NHD", out, lse),
        "attend_dense": (q, "NHD", out, None),
        "step_kv": (q, k, v, "NHD", None, 0, out, lse),
    }[name]
    operator = getattr(torch.ops.tokenselect, name).default
    torch.library.opcheck(operator, (ctx, b, *both, *arguments), test_utils=CHECKS)
    torch.library.opcheck(operator, (ctx, b, *both, *arguments), test_utils="test_autograd_registration")


def test_opcheck_prompts() -> None:
    cfg = config()
    contexts = ops.Contexts.for_prefill(cfg, block_len=4, max_kv_len=64, max_piece_len=8)
    kv, (q, k, v) = pages(), tokens(30)
    cut = ops.handle(ts.Batch(PAGE, [0, 30], [0, 8], range(8), [2]).in_pieces(contexts.on("cpu"), 4))
    arguments = (ops.handle(contexts), cut, *kv, q, k, v, "NHD", None, 0, torch.empty(30, HQ, D), None)
    torch.library.opcheck(torch.ops.tokenselect.prefill_kv.default, arguments)


@pytest.mark.parametrize("name", ["step", "step_dense", "prefill"])
def test_opcheck_an_own_cache(name: str) -> None:
    cfg, place, new = config(), ops.device_of("cpu"), 8
    contexts = ops.Contexts.for_prefill(cfg, block_len=4, max_kv_len=64) if name == "prefill" else None
    ctx = contexts or ops.Contexts(cfg, **LIMITS)
    cache = ts.Cache(place, cfg, num_pages=NUM_PAGES, page_size=PAGE)
    growth = [(cache.create(), new)]
    grown: Any = cache.extend_in_pieces(contexts.on("cpu"), growth, 4) if contexts else cache.extend(growth)
    out = torch.empty(new, HQ, D)
    arguments = (ops.handle(ctx), ops.handle(cache), 0, ops.handle(grown), *tokens(new), out, None)
    torch.library.opcheck(getattr(torch.ops.tokenselect, name).default, arguments)


def test_graphs_of_the_compilers_own_go_around_them() -> None:
    for name in ("attend", "step_kv", "step"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.tokenselect, name).default.tags


def test_what_is_declared_as_written() -> None:
    written = {
        name: [a.name for a in getattr(torch.ops.tokenselect, name).default._schema.arguments if a.is_write]
        for name in ops.__all__
        if name not in ("Contexts", "device_of", "handle")
    }
    assert written == {
        "append": ["kv", "v_pages"],
        "append_select": ["context", "kv", "v_pages", "selections"],
        "attend": ["out", "lse"],
        "attend_dense": ["out", "lse"],
        "prefill": ["context", "cache", "out", "lse"],
        "prefill_kv": ["context", "kv", "v_pages", "selections", "out", "lse"],
        "select": ["context", "selections"],
        "step": ["context", "cache", "out", "lse"],
        "step_dense": ["context", "cache", "out", "lse"],
        "step_kv": ["context", "kv", "v_pages", "selections", "out", "lse"],
    }


# --- compiled


class Attention(torch.nn.Module):  # type: ignore[misc, unused-ignore]
    """Two layers: one that selects, in one operator or in two, and one that attends to all tokens."""

    def __init__(self, ctx: Any, kv: Any, fused: bool) -> None:
        super().__init__()
        width = HQ * D
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(width, (HQ + 2 * HKV) * D) for _ in range(2))
        self.ctx, self.kv, self.fused = ctx, kv, fused

    def forward(self, x: Any, b: Any, kv: Any = None) -> Any:
        given = self.kv if kv is None else kv
        for layer in range(2):
            q, k, v = self.qkv[layer](x).view(-1, HQ + 2 * HKV, D).split([HQ, HKV, HKV], dim=1)
            if layer == 1:
                ops.append(self.ctx, b, given[layer], k, v)
                out = ops.attend_dense(self.ctx, b, given[layer], q)
            elif self.fused:
                out = ops.step_kv(self.ctx, b, given[layer], q, k, v)
            else:
                ops.append_select(self.ctx, b, given[layer], q, k, v)
                unused = ops.attend(self.ctx, b, given[layer], q + 1)  # nobody reads it
                del unused
                out = ops.attend(self.ctx, b, given[layer], q)
            x = x + out.flatten(1)
        return x


def layers(as_handles: bool) -> tuple[list[Any], list[Any]]:
    """Pages of two layers, and what operators are given of them."""
    kv = [pages() for _ in range(2)]
    return [part for layer in kv for part in layer], [
        ops.handle(ts.KvView(*layer)) if as_handles else tuple(layer) for layer in kv
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("as_handles", [True, False])
def test_compiled(ctx: Any, backend: str, fused: bool, as_handles: bool) -> None:
    """The same bits of pages as eager code, and nothing compiled anew when lengths change."""
    mine, given = layers(as_handles)
    kept = copies(mine)
    module = Attention(ctx, given, fused)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    xs = [torch.randn(2, HQ * D) for _ in range(6)]
    outs = []
    for step, x in enumerate(xs):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            outs.append(compiled(x, ops.handle(batch(18 + step))))
    written = copies(mine)
    for tensor, was in zip(mine, kept, strict=True):
        tensor.copy_(was)
    for step, x in enumerate(xs):
        torch.testing.assert_close(outs[step], module(x, ops.handle(batch(18 + step))), rtol=1e-5, atol=1e-5)
    for got, want in zip(written, mine, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(got, was) for got, was in zip(written, kept, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_as_inputs_are_written_where_they_are(ctx: Any, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor hands the pages on; `aot_eager` may work on copies and writes them back."""
    seen: list[int] = []

    def spy(k: Any, v: Any, layout: Any) -> ts.KvView:
        seen.extend([k.data_ptr(), v.data_ptr()])
        return ts.KvView(k, v, layout)

    mine, _ = layers(False)
    module = Attention(ctx, None, False)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    kept, x = copies(mine), torch.randn(2, HQ * D)
    monkeypatch.setattr(operators, "KvView", spy)
    b = ops.handle(batch(18))
    got = compiled(x, b, [tuple(mine[:2]), tuple(mine[2:])])
    if backend == "inductor":
        assert set(seen) == {tensor.data_ptr() for tensor in mine}
    torch.testing.assert_close(got, module(x, b, [tuple(kept[:2]), tuple(kept[2:])]), rtol=1e-5, atol=1e-5)
    for left, right in zip(mine, kept, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pytorch_reads_pages_after_they_are_written(ctx: Any, backend: str) -> None:
    def work(b: Any, k_pages: Any, v_pages: Any, q: Any, k: Any, v: Any) -> Any:
        before = k_pages.sum()
        out = ops.step_kv(ctx, b, (k_pages, v_pages), q, k, v)
        k_pages.mul_(2)
        return before, out, k_pages.sum(), ops.attend_dense(ctx, b, (k_pages, v_pages), q)

    kv, inputs, b = pages(), tokens(2), ops.handle(batch(18))
    mine = copies(kv)
    got = torch.compile(work, fullgraph=True, backend=backend)(b, *mine, *inputs)
    for left, right in zip([*got, *mine], [*work(b, *kv, *inputs), *kv], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_prompts_and_steps_over_an_own_cache(backend: str) -> None:
    cfg, place = config(), ops.device_of("cpu")
    contexts = ops.Contexts.for_prefill(cfg, block_len=4, max_kv_len=64, max_piece_len=8)
    readers, steps = ops.handle(contexts), ops.handle(ops.Contexts(cfg, **LIMITS))

    def attention(qkv: Any, context: Any, cache: Any, rows: Any, is_prompt: bool) -> Any:
        q, k, v = qkv.split([HQ, HKV, HKV], dim=1)
        out = (ops.prefill if is_prompt else ops.step)(context, cache, 0, rows, q, k, v)
        return out * 2

    def run(work: Callable[..., Any], inputs: list[Any]) -> list[Any]:
        cache = ts.Cache(place, cfg, num_pages=NUM_PAGES, page_size=PAGE)
        c, outs = ops.handle(cache), []
        for prompt in (20, 27, 13):
            sequence = cache.create()
            pieces = ops.handle(cache.extend_in_pieces(contexts.on("cpu"), [(sequence, prompt)], 4))
            outs.append(work(inputs[0][:prompt], readers, c, pieces, True))
            for x in inputs[1:]:
                outs.append(work(x, steps, c, ops.handle(cache.extend([(sequence, 1)])), False))
            cache.free(sequence)
        return outs

    inputs = [torch.randn(n, HQ + 2 * HKV, D) for n in (30, 1, 1, 1)]
    want = run(attention, inputs)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    for left, right in zip(run(torch.compile(attention, fullgraph=True, backend=counter), inputs), want, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    # Prompts of one length, of any length, and steps.
    assert counter.frame_count == 3


# --- errors


def test_handles(ctx: Any) -> None:
    kv, (q, k, v) = tuple(pages()), tokens(2)
    gone = ops.handle(batch(20)).clone()
    gc.collect()
    with pytest.raises(
        ts.TokenSelectError, match=r"`batch` must be the handle of a Batch that is there, handle \d+ stands for"
    ):
        ops.step_kv(ctx, gone, kv, q, k, v)
    with pytest.raises(TypeError, match="`batch` must be the handle of a Batch, got that of a Contexts"):
        ops.step_kv(ctx, ctx, kv, q, k, v)
    with pytest.raises(
        ValueError, match=r"`batch` must be a handle, one int64 on cpu, got \(\) of torch.float32 on cpu"
    ):
        ops.step_kv(ctx, torch.tensor(1.0), kv, q, k, v)
    with pytest.raises(TypeError, match=r"`batch` must be a handle: pass `tokenselect.torch.handle\(…\)`, got Batch"):
        ops.step_kv(ctx, batch(20), kv, q, k, v)  # type: ignore[arg-type, unused-ignore]
    with pytest.raises(
        TypeError, match="`of` must be one of Batch, Cache, Contexts, KvView, Pieces, SelectionCache, got Tensor"
    ):
        ops.handle(torch.tensor(3))  # type: ignore[arg-type, unused-ignore]
    b = ops.handle(batch(20))
    first = ops.step_kv(ctx, b, kv, q, k, v)
    with torch.inference_mode():
        inside = ops.handle(batch(20))
        expect_equal(ops.step_kv(ctx, inside, kv, q, k, v), first)
    expect_equal(ops.step_kv(ctx, inside, kv, q, k, v), first)


def test_handles_hold_their_objects(ctx: Any) -> None:
    number = int(ctx)
    assert handles.resolve("context", ctx, ops.Contexts).on("cpu").max_rows == 2
    del ctx
    other = ops.handle(ops.Contexts(config()))
    assert int(other) != number
    rows = batch(20)
    b, again = ops.handle(rows), ops.handle(rows)
    del rows
    gc.collect()
    assert handles.resolve("batch", b, ts.Batch) is handles.resolve("batch", again, ts.Batch)
    lost = b.clone()
    del b, again
    gc.collect()
    with pytest.raises(ts.TokenSelectError):
        handles.resolve("batch", lost, ts.Batch)


def test_wrong_tensors(ctx: Any) -> None:
    kv, (q, k, v), b = tuple(pages()), tokens(2), ops.handle(batch(20))
    with pytest.raises(TypeError, match="`q` must be f32, got f16"):
        ops.step_kv(ctx, b, kv, q.half(), k, v)
    with pytest.raises(ValueError, match=r"`out` must have shape \(2, 4, 16\), got \(3, 4, 16\)"):
        ops.attend_dense(ctx, b, kv, q, out=torch.empty(3, HQ, D))
    with pytest.raises(ValueError, match="`k pages` must be on meta, it is on cpu"):
        ops.select(ctx, b, kv, q.to("meta"))
    with pytest.raises(NotImplementedError, match="tokenselect runs on the processor and on CUDA devices, got xpu"):
        ops.device_of("xpu")
    with torch.enable_grad():
        with pytest.raises(ValueError, match="`q` requires gradients, which this library does not compute"):
            ops.step_kv(ctx, b, kv, q.clone().requires_grad_(), k, v)
        with pytest.raises(ValueError, match="`kv` requires gradients"):
            ops.append(ctx, b, (kv[0].clone().requires_grad_(), kv[1]), k, v)
        ops.step_kv(ctx, b, kv, q, k, v)


def test_errors_while_compiling(ctx: Any) -> None:
    kv, inputs, b = pages(), tokens(2), ops.handle(batch(20))

    def work(b: Any, k_pages: Any, v_pages: Any, q: Any, k: Any, v: Any) -> Any:
        return ops.step_kv(ctx, b, (k_pages, v_pages), q, k, v)

    def compile_(*given: Any) -> Any:
        torch._dynamo.reset()
        return torch.compile(work, fullgraph=True, backend="aot_eager")(*given)

    q = inputs[0]
    for given, text in (
        ((b, *kv, q.half(), *inputs[1:]), "`k pages` must be f16, got torch.float32"),
        ((b, *kv, q[0], *inputs[1:]), "`q` must have 3 dimensions, got 2"),
        ((b, *kv, q.to("meta"), *inputs[1:]), "`k pages` must be on meta, it is on cpu"),
        ((b.float(), *kv, *inputs), "`batch` must be a handle, one int64 on cpu"),
        ((3, *kv, *inputs), "`batch` must be a handle: pass `tokenselect.torch.handle"),
        (
            (b, *torch.stack(kv), *inputs),
            "`k pages` must be all of its memory in compiled code, it is part of a larger tensor",
        ),
    ):
        with pytest.raises(Exception, match=text):
            compile_(*given)
    with (
        torch.enable_grad(),
        pytest.raises(Exception, match="`q` requires gradients, which this library does not compute"),
    ):
        compile_(b, *kv, q.clone().requires_grad_(), *inputs[1:])
    lost = ops.handle(batch(20)).clone()
    with pytest.raises(ts.TokenSelectError, match="stands for nothing any more"):
        compile_(lost, *kv, *inputs)


# --- on a GPU

on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA device: graphs and streams are not tested"
)


def cuda_config() -> ts.Config:
    return config(dtype=torch.bfloat16, head_dim=64)


def cuda_tensors() -> tuple[Any, ...]:
    kv = [torch.randn(NUM_PAGES, PAGE, HKV, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    q, k, v = (torch.randn(2, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (HQ, HKV, HKV))
    return kv, q, k, v


@on_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graph(compiled: bool) -> None:
    contexts = ops.Contexts(cuda_config(), max_rows=2, max_block_len=1, max_kv_tokens=NUM_PAGES * PAGE)
    ctx, (kv, q, k, v) = ops.handle(contexts), cuda_tensors()
    view, out = ops.handle(ts.KvView(*kv)), torch.empty_like(q)

    def work(b: Any) -> None:
        ops.step_kv(ctx, b, view, q * 1, k, v, out=out)

    step = torch.compile(work, fullgraph=True, backend="aot_eager") if compiled else work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        slot = ts.BatchSlot(ops.device_of("cuda"), batch(18), NUM_PAGES)
        b = ops.handle(slot.put(batch(18)))
        step(b)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step(b)
        for length in range(19, 25):
            for tensor in (q, k, v):
                tensor.normal_()
            before = copies(kv)
            slot.put(batch(length))
            graph.replay()
            got, written = out.clone(), copies(kv)
            for tensor, was in zip(kv, before, strict=True):
                tensor.copy_(was)
            work(ops.handle(batch(length)))
            torch.testing.assert_close(got, out, rtol=1e-2, atol=1e-2)  # the work may be split otherwise
            expect_equal(written, kv)
    stream.synchronize()


@on_gpu
def test_cuda_graph_of_work_that_has_not_run() -> None:
    ctx, (kv, q, k, v) = ops.handle(ops.Contexts(cuda_config(), max_rows=2, max_block_len=1)), cuda_tensors()
    b = ops.handle(batch(18))
    with (
        pytest.raises(ts.TokenSelectError, match="must run once in the stream of a capture before it is captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        ops.step_kv(ctx, b, tuple(kv), q, k, v)


@on_gpu
def test_cuda_graph_of_a_batch_that_is_nowhere_yet() -> None:
    """Its tables would be copied from the host at every replay."""
    ctx, (kv, q, k, v) = ops.handle(ops.Contexts(cuda_config(), max_rows=2, max_block_len=1)), cuda_tensors()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.step_kv(ctx, ops.handle(batch(18)), tuple(kv), q, k, v)
        b = ops.handle(batch(19))
        with (
            pytest.raises(ts.TokenSelectError, match="needs to happen before the capture: run the work once first"),
            torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream),
        ):
            ops.step_kv(ctx, b, tuple(kv), q, k, v)


@on_gpu
def test_streams() -> None:
    """Each stream has a device, and work is ordered with PyTorch's in it."""
    ctx, (kv, q, k, v) = ops.handle(ops.Contexts(cuda_config(), max_rows=2, max_block_len=1)), cuda_tensors()
    want = ops.step_kv(ctx, ops.handle(batch(18)), tuple(kv), q, k, v)
    here = ops.device_of("cuda")
    assert ops.device_of(q) is here and ops.device_of("cuda:0") is here
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert ops.device_of("cuda") is not here
        torch.cuda._sleep(10_000_000)  # what follows must wait for it
        expect_equal(ops.step_kv(ctx, ops.handle(batch(18)), tuple(kv), q * 1, k, v), want)
    stream.synchronize()


@on_gpu
def test_compiled_on_a_gpu() -> None:
    ctx, (kv, q, k, v) = ops.handle(ops.Contexts(cuda_config(), max_rows=2, max_block_len=1)), cuda_tensors()

    def work(b: Any, k_pages: Any, v_pages: Any, *q: Any) -> Any:
        return ops.step_kv(ctx, b, (k_pages, v_pages), q[0] * 2, k, v) + 1

    compiled = torch.compile(work, fullgraph=True, backend="inductor")
    for length in range(18, 24):
        mine = copies(kv)
        b = ops.handle(batch(length))
        torch.testing.assert_close(compiled(b, *mine, q), work(b, *kv, q), rtol=1e-2, atol=1e-2)
        expect_equal(mine, kv)
