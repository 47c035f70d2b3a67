"""The operators, `torch.ops.tokenselect.*`, and functions over them that make outputs.

All of them write into tensors that they are given and answer nothing, so that there is one of each, with and without an output of the
caller's. A handle is declared as written (`context`, `cache`, `selections`) where the object that it stands for changes in a way that
a later operation reads: `select` writes `context`, and `attend` reads it.

Arguments of all functions: `context`, `batch`, `pieces`, `cache` and `selections` are handles. `kv` is a layer's pages:
the handle of a `KvView`, whose memory compiled code does not know, or a pair of tensors in `layout`, as `KvView` takes them, which it
knows to be written; in compiled code each is all of its memory then. `q`, `[tokens, num_qo_heads, head_dim]`, `k` and `v`, `[tokens,
num_kv_heads, head_dim]`, may be slices of a fused projection. `selections` with `layer` is a Selection Cache. `out`
is a dense tensor to write, None for a new one; `lse`, `[tokens, num_qo_heads]` in float32, has the log-sum-exp written into it where it
is given. Errors are the package's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from tokenselect import Batch, Cache, Context, KvView, Pieces, SelectionCache
from tokenselect.errors import ArgumentError, ArgumentTypeError, TokenSelectError, UnsupportedError

from .contexts import Contexts
from .devices import DTYPES, is_capturing
from .handles import expect_handle, resolve

__all__ = [
    "append",
    "append_select",
    "attend",
    "attend_dense",
    "prefill",
    "prefill_kv",
    "select",
    "step",
    "step_dense",
    "step_kv",
]

Layout: TypeAlias = Literal["NHD", "HND"]
Kv: TypeAlias = Tensor | tuple[Tensor, Tensor]
_Work = TypeVar("_Work", bound=Callable[..., None])


def _operation(schema: str) -> Callable[[_Work], Any]:
    """Registers an operator that does the work decorated."""
    name, _, arguments = schema.partition("(")
    names = re.findall(r"(\w+)[,)]", arguments.partition(" ->")[0])
    written = re.findall(r"Tensor\(\w!\)\??\s+(\w+)", arguments)

    def check(*args: Any) -> None:
        _check(dict(zip(names, args, strict=True)))

    def register(work: _Work) -> Any:
        made = torch.library.custom_op(f"tokenselect::{name}", work, mutates_args=written, schema=f"({arguments}")
        made.register_fake(check)
        return made

    return register


_HANDLES = {"context", "batch", "pieces", "kv", "cache", "selections"}
_RANKS = {"k pages": 4, "v pages": 4, "q": 3, "k": 3, "v": 3, "out": 3, "lse": 2}


def _check(given: dict[str, Any]) -> None:
    """What can be told of tensors without their elements and lengths, while code is compiled; the operator checks all when it runs."""
    if given.get("v_pages") is not None:
        given.update({"k pages": given.pop("kv"), "v pages": given.pop("v_pages")})
    first = "q" if "q" in given else "k"
    for name, rank in _RANKS.items():
        tensor = given.get(name)
        if tensor is None:
            continue
        if tensor.dim() != rank:
            raise ArgumentError(f"`{name}` must have {rank} dimensions, got {tensor.dim()}", "TS_STATUS_SHAPE")
        place = given[first].device
        if tensor.device != place:
            raise ArgumentError(f"`{name}` must be on {place}, it is on {tensor.device}", "TS_STATUS_WRONG_DEVICE")
        allowed = {torch.float32} if name == "lse" else {given[first].dtype}
        if name == "out":
            allowed.add(torch.float32)
        names = [DTYPES[dtype] for dtype in DTYPES if dtype in allowed] or list(DTYPES.values())
        if tensor.dtype not in DTYPES or tensor.dtype not in allowed:
            raise ArgumentTypeError(f"`{name}` must be {' or '.join(names)}, got {tensor.dtype}", "TS_STATUS_DTYPE")
        if name.endswith("pages"):
            _expect_whole(name, tensor)
    for name in _HANDLES:
        if given.get(name) is not None:
            expect_handle(name, given[name])


def _expect_whole(name: str, pages: Tensor) -> None:
    # Compiled code copies what is written and shares memory with another tensor that is: too much, and from the wrong place where a
    # graph's input does not begin where its memory does (`clone_preserve_strides` in PyTorch 2.11).
    if pages.storage_offset() != 0 or pages.untyped_storage().nbytes() != pages.numel() * pages.element_size():
        raise ArgumentError(
            f"`{name}` must be all of its memory in compiled code, it is part of a larger tensor: pass "
            "`tokenselect.torch.handle(KvView(k_pages, v_pages))`, made outside",
            "TS_STATUS_CONFIG",
        )


# --- what runs


def _on(context: Tensor, tensor: Tensor) -> Context:
    return resolve("context", context, Contexts).on(tensor)


def _view(kv: Tensor, v_pages: Tensor | None, layout: Layout) -> KvView:
    return resolve("kv", kv, KvView) if v_pages is None else KvView(kv, v_pages, layout)


def _reuse(selections: Tensor | None) -> SelectionCache | None:
    return None if selections is None else resolve("selections", selections, SelectionCache)


def _own(cache: Tensor, q: Tensor) -> Cache:
    if is_capturing(q):
        raise UnsupportedError(
            "a step over a `Cache` cannot be captured by PyTorch, which would leave its lengths behind: use `step_kv`, or "
            "`Device.capture`",
            "TS_STATUS_UNSUPPORTED",
        )
    return resolve("cache", cache, Cache)


@_operation(
    "append(Tensor context, Tensor batch, Tensor(a!) kv, Tensor(b!)? v_pages, Tensor k, Tensor v, str layout) -> ()"
)
def _append(
    context: Tensor, batch: Tensor, kv: Tensor, v_pages: Tensor | None, k: Tensor, v: Tensor, layout: Layout
) -> None:
    _on(context, k).append(resolve("batch", batch, Batch), _view(kv, v_pages, layout), k, v)


@_operation(
    "select(Tensor(a!) context, Tensor batch, Tensor kv, Tensor? v_pages, Tensor q, str layout, "
    "Tensor(b!)? selections, SymInt layer) -> ()"
)
def _select(
    context: Tensor,
    batch: Tensor,
    kv: Tensor,
    v_pages: Tensor | None,
    q: Tensor,
    layout: Layout,
    selections: Tensor | None,
    layer: int,
) -> None:
    view = _view(kv, v_pages, layout)
    _on(context, q).select(resolve("batch", batch, Batch), view, q, _reuse(selections), layer)


@_operation(
    "append_select(Tensor(a!) context, Tensor batch, Tensor(b!) kv, Tensor(c!)? v_pages, Tensor q, Tensor k, Tensor v, "
    "str layout, Tensor(d!)? selections, SymInt layer) -> ()"
)
def _append_select(
    context: Tensor,
    batch: Tensor,
    kv: Tensor,
    v_pages: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    selections: Tensor | None,
    layer: int,
) -> None:
    view = _view(kv, v_pages, layout)
    _on(context, q).append_select(resolve("batch", batch, Batch), view, q, k, v, _reuse(selections), layer)


@_operation(
    "attend(Tensor context, Tensor batch, Tensor kv, Tensor? v_pages, Tensor q, str layout, Tensor(a!) out, "
    "Tensor(b!)? lse) -> ()"
)
def _attend(
    context: Tensor,
    batch: Tensor,
    kv: Tensor,
    v_pages: Tensor | None,
    q: Tensor,
    layout: Layout,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    _on(context, q).attend(resolve("batch", batch, Batch), _view(kv, v_pages, layout), q, out, lse)


@_operation(
    "attend_dense(Tensor context, Tensor batch, Tensor kv, Tensor? v_pages, Tensor q, str layout, Tensor(a!) out, "
    "Tensor(b!)? lse) -> ()"
)
def _attend_dense(
    context: Tensor,
    batch: Tensor,
    kv: Tensor,
    v_pages: Tensor | None,
    q: Tensor,
    layout: Layout,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    _on(context, q).attend_dense(resolve("batch", batch, Batch), _view(kv, v_pages, layout), q, out, lse)


@_operation(
    "step_kv(Tensor(a!) context, Tensor batch, Tensor(b!) kv, Tensor(c!)? v_pages, Tensor q, Tensor k, Tensor v, "
    "str layout, Tensor(d!)? selections, SymInt layer, Tensor(e!) out, Tensor(f!)? lse) -> ()"
)
def _step_kv(
    context: Tensor,
    batch: Tensor,
    kv: Tensor,
    v_pages: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    selections: Tensor | None,
    layer: int,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    view, rows, on = _view(kv, v_pages, layout), resolve("batch", batch, Batch), _on(context, q)
    on.append_select(rows, view, q, k, v, _reuse(selections), layer)
    on.attend(rows, view, q, out, lse)


@_operation(
    "prefill_kv(Tensor(a!) context, Tensor pieces, Tensor(b!) kv, Tensor(c!)? v_pages, Tensor q, Tensor k, Tensor v, "
    "str layout, Tensor(d!)? selections, SymInt layer, Tensor(e!) out, Tensor(f!)? lse) -> ()"
)
def _prefill_kv(
    context: Tensor,
    pieces: Tensor,
    kv: Tensor,
    v_pages: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    selections: Tensor | None,
    layer: int,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    view, rows = _view(kv, v_pages, layout), resolve("pieces", pieces, Pieces)
    _on(context, q).prefill_kv(rows, view, q, k, v, _reuse(selections), layer, out=out, lse=lse)


@_operation(
    "step(Tensor(a!) context, Tensor(b!) cache, SymInt layer, Tensor batch, Tensor q, Tensor k, Tensor v, Tensor(c!) out, "
    "Tensor(d!)? lse) -> ()"
)
def _step(
    context: Tensor,
    cache: Tensor,
    layer: int,
    batch: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    _on(context, q).step(_own(cache, q), layer, resolve("batch", batch, Batch), q, k, v, out, lse)


@_operation(
    "step_dense(Tensor(a!) context, Tensor(b!) cache, SymInt layer, Tensor batch, Tensor q, Tensor k, Tensor v, "
    "Tensor(c!) out, Tensor(d!)? lse) -> ()"
)
def _step_dense(
    context: Tensor,
    cache: Tensor,
    layer: int,
    batch: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    _on(context, q).step_dense(_own(cache, q), layer, resolve("batch", batch, Batch), q, k, v, out, lse)


@_operation(
    "prefill(Tensor(a!) context, Tensor(b!) cache, SymInt layer, Tensor pieces, Tensor q, Tensor k, Tensor v, "
    "Tensor(c!) out, Tensor(d!)? lse) -> ()"
)
def _prefill(
    context: Tensor,
    cache: Tensor,
    layer: int,
    pieces: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    _on(context, q).prefill(_own(cache, q), layer, resolve("pieces", pieces, Pieces), q, k, v, out, lse)


# --- what is called


def _expect(**given: object) -> None:
    """Checks that arguments are tensors, handles among them, of which no gradient is wanted."""
    for name, value in given.items():
        for tensor in value if name == "kv" and isinstance(value, tuple) and len(value) == 2 else (value,):
            if tensor is None and name == "selections":
                continue
            if not isinstance(tensor, Tensor):
                rule = "a handle: pass `tokenselect.torch.handle(…)`" if name in _HANDLES else "a tensor"
                raise _error(ArgumentTypeError, f"`{name}` must be {rule}, got {type(tensor).__name__}")
            if tensor.requires_grad and torch.is_grad_enabled():
                raise _error(
                    ArgumentError,
                    f"`{name}` requires gradients, which this library does not compute: call it under `torch.no_grad()`, or pass "
                    f"`{name}.detach()`",
                )


def _error(kind: type[TokenSelectError], text: str) -> Exception:
    # What compiled code raises is told by the compiler, which knows Python's own exceptions alone.
    return ValueError(text) if torch.compiler.is_compiling() else kind(text, "TS_STATUS_CONFIG")


def _pair(kv: Kv) -> tuple[Tensor, Tensor | None]:
    return (kv, None) if isinstance(kv, Tensor) else kv


def append(context: Tensor, batch: Tensor, kv: Kv, k: Tensor, v: Tensor, *, layout: Layout = "NHD") -> None:
    """Writes keys and values of a batch's new tokens into the pages: `Context.append`."""
    _expect(context=context, batch=batch, kv=kv, k=k, v=v)
    _append(context, batch, *_pair(kv), k, v, layout)


def select(
    context: Tensor,
    batch: Tensor,
    kv: Kv,
    q: Tensor,
    *,
    layout: Layout = "NHD",
    selections: Tensor | None = None,
    layer: int = 0,
) -> None:
    """Selects the tokens that `attend` reads, of those that the pages have: `Context.select`."""
    _expect(context=context, batch=batch, kv=kv, q=q, selections=selections)
    _select(context, batch, *_pair(kv), q, layout, selections, layer)


def append_select(
    context: Tensor,
    batch: Tensor,
    kv: Kv,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: Layout = "NHD",
    selections: Tensor | None = None,
    layer: int = 0,
) -> None:
    """`append` and `select`: `Context.append_select`, a launch less."""
    _expect(context=context, batch=batch, kv=kv, q=q, k=k, v=v, selections=selections)
    _append_select(context, batch, *_pair(kv), q, k, v, layout, selections, layer)


def attend(
    context: Tensor,
    batch: Tensor,
    kv: Kv,
    q: Tensor,
    *,
    layout: Layout = "NHD",
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention over the tokens selected last: `Context.attend`. Answers `out`."""
    _expect(context=context, batch=batch, kv=kv, q=q)
    out = q.new_empty(q.shape) if out is None else out
    _attend(context, batch, *_pair(kv), q, layout, out, lse)
    return out


def attend_dense(
    context: Tensor,
    batch: Tensor,
    kv: Kv,
    q: Tensor,
    *,
    layout: Layout = "NHD",
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention over all tokens: `Context.attend_dense`. Answers as `attend`."""
    _expect(context=context, batch=batch, kv=kv, q=q)
    out = q.new_empty(q.shape) if out is None else out
    _attend_dense(context, batch, *_pair(kv), q, layout, out, lse)
    return out


def step_kv(
    context: Tensor,
    batch: Tensor,
    kv: Kv,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: Layout = "NHD",
    selections: Tensor | None = None,
    layer: int = 0,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """`append_select` and `attend` in one operator. Answers as `attend`."""
    _expect(context=context, batch=batch, kv=kv, q=q, k=k, v=v, selections=selections)
    out = q.new_empty(q.shape) if out is None else out
    _step_kv(context, batch, *_pair(kv), q, k, v, layout, selections, layer, out, lse)
    return out


def prefill_kv(
    context: Tensor,
    pieces: Tensor,
    kv: Kv,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: Layout = "NHD",
    selections: Tensor | None = None,
    layer: int = 0,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Prompts of any length, with `Contexts.for_prefill`: `Context.prefill_kv`. Answers as `attend`."""
    _expect(context=context, pieces=pieces, kv=kv, q=q, k=k, v=v, selections=selections)
    out = q.new_empty(q.shape) if out is None else out
    _prefill_kv(context, pieces, *_pair(kv), q, k, v, layout, selections, layer, out, lse)
    return out


def step(
    context: Tensor,
    cache: Tensor,
    layer: int,
    batch: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """A step over the library's own cache: `Context.step`, not within a capture of PyTorch's. Answers as `attend`."""
    _expect(context=context, cache=cache, batch=batch, q=q, k=k, v=v)
    out = q.new_empty(q.shape) if out is None else out
    _step(context, cache, layer, batch, q, k, v, out, lse)
    return out


def step_dense(
    context: Tensor,
    cache: Tensor,
    layer: int,
    batch: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """As `step`, over all tokens: `Context.step_dense`."""
    _expect(context=context, cache=cache, batch=batch, q=q, k=k, v=v)
    out = q.new_empty(q.shape) if out is None else out
    _step_dense(context, cache, layer, batch, q, k, v, out, lse)
    return out


def prefill(
    context: Tensor,
    cache: Tensor,
    layer: int,
    pieces: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Prompts of any length into the library's own cache: `Context.prefill`, not within a capture. Answers as `attend`."""
    _expect(context=context, cache=cache, pieces=pieces, q=q, k=k, v=v)
    out = q.new_empty(q.shape) if out is None else out
    _prefill(context, cache, layer, pieces, q, k, v, out, lse)
    return out
