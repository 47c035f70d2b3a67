"""Functions over the operators, which check their arguments and make outputs.

`context`, `batch`, `pieces`, `cache` and `selections` are handles. `kv` is a layer's pages: the handle of a `KvView`, whose memory
compiled code does not know, or a pair of tensors in `layout`, as `KvView` takes them, which it knows to be written; in compiled code each
is all of its memory then. `q`, `[tokens, num_qo_heads, head_dim]`, `k` and `v`, `[tokens, num_kv_heads, head_dim]`, may be slices of a
fused projection. `selections` with `layer` is a Selection Cache. `out` is a dense tensor to write, None for a new one; `lse`, `[tokens,
num_qo_heads]` in float32, has the log-sum-exp written into it where it is given. Errors are the package's.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from tokenselect.errors import ArgumentError, ArgumentTypeError, TokenSelectError

from . import operators
from .operators import HANDLES, Layout

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

Kv: TypeAlias = Tensor | tuple[Tensor, Tensor]


def _expect(**given: object) -> None:
    """Checks that arguments are tensors, handles among them, of which no gradient is wanted."""
    for name, value in given.items():
        for tensor in value if name == "kv" and isinstance(value, tuple) and len(value) == 2 else (value,):
            if tensor is None and name == "selections":
                continue
            if not isinstance(tensor, Tensor):
                rule = "a handle: pass `tokenselect.torch.handle(…)`" if name in HANDLES else "a tensor"
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
    operators.append(context, batch, *_pair(kv), k, v, layout)


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
    operators.select(context, batch, *_pair(kv), q, layout, selections, layer)


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
    operators.append_select(context, batch, *_pair(kv), q, k, v, layout, selections, layer)


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
    operators.attend(context, batch, *_pair(kv), q, layout, out, lse)
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
    operators.attend_dense(context, batch, *_pair(kv), q, layout, out, lse)
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
    operators.step_kv(context, batch, *_pair(kv), q, k, v, layout, selections, layer, out, lse)
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
    operators.prefill_kv(context, pieces, *_pair(kv), q, k, v, layout, selections, layer, out, lse)
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
    operators.step(context, cache, layer, batch, q, k, v, out, lse)
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
    operators.step_dense(context, cache, layer, batch, q, k, v, out, lse)
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
    operators.prefill(context, cache, layer, pieces, q, k, v, out, lse)
    return out
