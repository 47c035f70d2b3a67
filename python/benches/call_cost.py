"""What a call costs on the host beyond the work itself.

A tiny configuration on the processor, one decode step over 24 tokens and one of a row without tokens, where next to nothing is to be
done, with NumPy's arrays and, where it is installed, PyTorch's tensors. `cargo bench -p tokenselect-python` times the same calls from
Rust; the difference is what the package adds.

    python benches/call_cost.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import tokenselect as ts

HQ, HKV, D, PAGE, LENGTH = 4, 2, 16, 4, 24
CALLS, ROUNDS = 2000, 15


def microseconds(call: Callable[[], object]) -> float:
    """The median over rounds of the mean time of a call."""
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - begin) / CALLS * 1e6)
    return statistics.median(times)


def measure(name: str, draw: Callable[..., Any], empty: Callable[..., Any]) -> None:
    """Times the calls with tensors of one library."""
    device = ts.Device.cpu()
    config = ts.Config(
        num_qo_heads=HQ, num_kv_heads=HKV, head_dim=D, dtype="f32", n_init=2, n_local=3, top_k=5, selection_cache=False
    )
    ctx = ts.Context(device, config, max_rows=1, max_block_len=LENGTH, max_kv_tokens=64)
    pages = LENGTH // PAGE
    batch = ts.Batch(PAGE, [0, 1], [0, pages], range(pages), [PAGE])
    kv = ts.KvView(draw(pages, PAGE, HKV, D), draw(pages, PAGE, HKV, D))
    q, k, v, out = draw(1, HQ, D), draw(1, HKV, D), draw(1, HKV, D), empty(1, HQ, D)
    cache = ts.Cache(device, config, num_pages=pages, page_size=PAGE)
    sequence = cache.create()
    prompt = cache.extend([(sequence, LENGTH - 1)])
    ctx.append(prompt, (cache, 0), draw(LENGTH - 1, HKV, D), draw(LENGTH - 1, HKV, D))
    row = cache.extend([(sequence, 1)])
    ctx.select(batch, kv, q)
    nothing = ts.Batch(PAGE, [0, 1], [0, 0], [], [0])
    for call, work in {
        "append": lambda: ctx.append(batch, kv, k, v),
        "select": lambda: ctx.select(batch, kv, q),
        "attend": lambda: ctx.attend(batch, kv, q, out),
        "attend, out made": lambda: ctx.attend(batch, kv, q),
        "step": lambda: ctx.step(cache, 0, row, q, k, v, out),
        "step, out made": lambda: ctx.step(cache, 0, row, q, k, v),
        "append nothing": lambda: ctx.append(nothing, kv, k, v),
        "select nothing": lambda: ctx.select(nothing, kv, q),
        "attend nothing": lambda: ctx.attend(nothing, kv, q, out),
        "attend nothing, out made": lambda: ctx.attend(nothing, kv, q),
    }.items():
        print(f"{name:6} {call:25} {microseconds(work):6.2f} µs")


def main() -> None:
    try:
        import numpy as np
    except ImportError:
        print("no NumPy")
    else:
        measure(
            "numpy",
            lambda *shape: np.random.default_rng(1).standard_normal(shape).astype(np.float32),
            lambda *shape: np.empty(shape, np.float32),
        )
    try:
        import torch
    except ImportError:
        print("no PyTorch")
    else:
        measure("torch", torch.randn, torch.empty)


if __name__ == "__main__":
    main()
