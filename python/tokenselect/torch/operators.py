"""The operators, `torch.ops.tokenselect.*`.

All of them write into tensors that they are given and answer nothing, so that there is one of each, with and without an output of the
caller's. A handle is declared as written (`context`, `cache`, `selections`, and `kv` where that is one) where the object that it stands
for changes in a way that a later operator reads: `select` writes `context`, and `attend` reads it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from tokenselect import Batch, Cache, Context, KvView, Pieces, SelectionCache
from tokenselect.errors import ArgumentError, ArgumentTypeError, UnsupportedError

from .contexts import Contexts
from .devices import DTYPES, is_capturing
from .handles import expect_handle, resolve

__all__ = [
    "HANDLES",
    "Layout",
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
_Work = TypeVar("_Work", bound=Callable[..., None])


# Graphs that the compiler makes by itself (`mode="reduce-overhead"`) go around the operators: the values of handles would stay in there.
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


def _operation(schema: str) -> Callable[[_Work], Any]:
    """Registers an operator that does the work decorated."""
    name, _, arguments = schema.partition("(")
    names = re.findall(r"(\w+)[,)]", arguments.partition(" ->")[0])
    written = re.findall(r"Tensor\(\w!\)\??\s+(\w+)", arguments)

    def check(*args: Any) -> None:
        _check(dict(zip(names, args, strict=True)))

    def register(work: _Work) -> Any:
        made = torch.library.custom_op(
            f"tokenselect::{name}", work, mutates_args=written, schema=f"({arguments}", tags=_TAGS
        )
        made.register_fake(check)
        return made

    return register


HANDLES = {"context", "batch", "pieces", "kv", "cache", "selections"}
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
    for name in HANDLES:
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
def append(
    context: Tensor, batch: Tensor, kv: Tensor, v_pages: Tensor | None, k: Tensor, v: Tensor, layout: Layout
) -> None:
    _on(context, k).append(resolve("batch", batch, Batch), _view(kv, v_pages, layout), k, v)


@_operation(
    "select(Tensor(a!) context, Tensor batch, Tensor kv, Tensor? v_pages, Tensor q, str layout, "
    "Tensor(b!)? selections, SymInt layer) -> ()"
)
def select(
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
def append_select(
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
def attend(
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
def attend_dense(
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
def step_kv(
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
def prefill_kv(
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
def step(
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
def step_dense(
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
def prefill(
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
